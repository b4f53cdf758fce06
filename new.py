"""Train a model on your own text, from files to a sample, in the time you have.

    python new.py book.txt
    python new.py folder/ more.jsonl --minutes=10

Prepares the text as prepare/text.py does, measures how fast this machine trains, writes data/NAME.toml, an ordinary
config, and trains with train.py, which ends with a sample of text. The dataset, the config and the run are named after
the text.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


# Modules that need torch are imported in functions, so that wrong settings are refused at once.

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import Files, find_files
from gpt_arc.data.prepare import CorpusSettings, dataset_directory, prepare_documents
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.data.tokenizer import load_tokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command, resource, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Positional, Positive
from gpt_arc.tables import counted, duration

LEAST_VAL = 10  # tokens: a window of them, longer than the recipes' n-grams
HEADER = "# Written by new.py, which replaces it: copy it to change it.\n\n"


@dataclass(frozen=True, config=STRICT)
class Options:
    input: Positional[tuple[str, ...]] = ()
    """Text files, JSON lines, parquet, folders and glob patterns."""
    minutes: Positive = 2.0
    """Time for training, at most; it takes less if the text is read often enough before."""
    name: str | None = None
    """Name of the dataset, the config and the run. None: after the first input."""
    field: str | None = None
    """Field of JSON lines, or column of parquet, with the text. None: text."""
    pattern: str | None = None
    """Files to read in a folder, at any depth. None: .txt, JSON lines and parquet."""
    overwrite: bool = False
    """Replace data/NAME, whatever it contains."""


def prepare(options: Options, name: str) -> None:
    """Writes data/NAME, whose val split is the end of the text, by characters if these are few."""
    from gpt_arc.training.recipes import tokenizer_for

    documents, distinct = Files(find_files(options.input, options.pattern), options.field or "text"), set()
    for text, _ in documents.pieces("anywhere"):
        distinct.update(text)
    settings = CorpusSettings(tokenizer=tokenizer_for(len(distinct)), split="tail", overwrite=options.overwrite)
    prepare_documents(documents, settings, name)


def configure(name: str, minutes: float) -> dict[str, Any]:
    """Chooses the settings for data/NAME by measuring each recipe's steps, and says how long training will take."""
    from gpt_arc.device import resolve_device, resolve_dtype
    from gpt_arc.training.config import build_config, read_settings
    from gpt_arc.training.recipes import RECIPES, choose
    from gpt_arc.training.threads import tokens_per_second

    directory = dataset_directory(name)
    train, val = (len(TokenFiles(directory, split)) for split in ("train", "val"))
    if val < LEAST_VAL:
        raise UserError(f"{train + val} tokens in {directory} are too few to learn from: name a longer text")
    data = {"dataset": name, "vocab_size": load_tokenizer(directory).vocab_size}
    device = resolve_device("auto")
    presets, rates = {}, {}
    for key, recipe in RECIPES.items():
        presets[key] = read_settings(resource(f"configs/{recipe.config}.toml")) | recipe.settings | data
        config = build_config(presets[key], recipe.config)
        rates[key] = tokens_per_second(config, device, resolve_dtype("auto", device))
    key, settings = choose(train, val, rates, minutes)
    settings = presets[key] | settings | {"compile": False}  # as measured
    tokens = settings["max_iters"] * settings["batch_size"] * settings["block_size"]
    steps, rate = settings["max_iters"], rates[key]
    print(
        f"recipe         {key}, {counted(steps, 'step')}, {counted(tokens / train, 'epoch', '.2g')}: "
        f"about {duration(tokens / rate)} at the {rate:,.0f} tokens/s measured, besides evaluations",
        flush=True,
    )
    return settings


def main() -> int:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if not options.input:
        raise UserError(f"name a text: {command('new.py', 'book.txt')}")
    name = options.name or re.sub(r"[^\w-]+", "-", Path(options.input[0]).resolve().stem).strip("-") or "text"
    prepare(options, name)
    settings = configure(name, options.minutes)

    from gpt_arc.training.config import write_settings

    config = dataset_directory(name).with_name(f"{name}.toml")
    write_file(config, HEADER + write_settings(settings))
    print(f"config         {config}", flush=True)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for train.py, which receives it too
    return subprocess.call([sys.executable, resource("train.py"), config])


if __name__ == "__main__":
    entry_point(main)()
