"""Train a byte-level BPE tokenizer like GPT-2's on your own text.

    python prepare/tokenizer.py --input folder/ --name papers --vocab_size 40478
    python prepare/text.py --input folder/ --name papers --tokenizer papers

Writes data/NAME/tokenizer.json. --input takes the same inputs as prepare/text.py.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import Files, InputSettings, merge_inputs
from gpt_arc.data.prepare import dataset_directory, locked
from gpt_arc.data.tokenizer import BPETokenizer, holds_tokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command
from gpt_arc.flags import parse_flags
from gpt_arc.next_steps import next_steps
from gpt_arc.settings import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options(InputSettings):
    name: str
    """Name of the tokenizer, written to data/NAME/tokenizer.json."""
    vocab_size: int
    """Number of tokens: 256 bytes, the merges and <|endoftext|>."""
    overwrite: bool = False
    """Replace data/NAME/tokenizer.json if it exists."""


def texts_of(files: Files) -> Iterator[str]:
    empty = True
    for text, _ in files.pieces("space"):
        yield text
        empty = empty and not text
    if empty:
        raise UserError(f"there is no text in {files.name}")


def train(files: Files, vocab_size: int) -> BPETokenizer:
    """Trains in a thread, since the library keeps the main one from noticing Ctrl-C until it is done."""
    trained: Future[BPETokenizer] = Future()

    def run() -> None:
        try:
            trained.set_result(BPETokenizer.train(texts_of(files), vocab_size))
        except BaseException as error:
            trained.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True).start()
        return trained.result()
    except KeyboardInterrupt:
        message = "interrupted, and nothing is saved: repeat the command to start again"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        os._exit(130)  # an orderly end would abort in the library's thread


def refuse_other_contents(directory: Path, overwrite: bool) -> None:
    if any(directory.glob("*.bin")):
        raise UserError(f"{directory} already contains a dataset made with its tokenizer: choose another name")
    if holds_tokenizer(directory) and not overwrite:
        raise UserError(
            f"{directory} already contains a tokenizer: replace it with --overwrite=True, or choose another name"
        )


def main() -> None:
    options = parse_flags(Options, __doc__, merge_inputs(sys.argv[1:]))
    directory = dataset_directory(options.name)
    if options.name in ("char", "gpt2"):
        raise UserError(f"--tokenizer {options.name} already means another tokenizer: choose another name")
    refuse_other_contents(directory, options.overwrite)
    files = options.files()
    tokenizer = train(files, options.vocab_size)
    with locked(directory):
        refuse_other_contents(directory, options.overwrite)  # again: another process may have filled it
        directory.mkdir(exist_ok=True)
        tokenizer.save(directory)
    print(f"{directory / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens")
    if tokenizer.vocab_size < options.vocab_size:
        print(f"note: no pairs are left to merge in {files.name}, so there are fewer than {options.vocab_size:,}")
    flags = {"field": options.field, "pattern": options.pattern, "tokenizer": options.name, "name": options.name}
    flags = (f"--{flag}={value}" for flag, value in flags.items() if value not in (None, InputSettings.field))
    step = command("prepare/text.py", "--input", *options.input, *flags)
    print(next_steps({step: "encode text with it"}))


if __name__ == "__main__":
    entry_point(main)()
