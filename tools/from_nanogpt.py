"""Bring a model, a config or prepared data over from nanoGPT, without executing any of them.

    python tools/from_nanogpt.py ../nanoGPT/out/ckpt.pt mine                        a model with GPT-2's tokenizer
    python tools/from_nanogpt.py ../nanoGPT/out/ckpt.pt mine --meta ../nanoGPT/data/shakespeare_char/meta.pkl
    python tools/from_nanogpt.py ../nanoGPT/config/train_gpt2.py train_gpt2.toml    for python train.py train_gpt2.toml
    python tools/from_nanogpt.py ../nanoGPT/data/openwebtext data/webtext       train.bin and val.bin, for --dataset

A checkpoint becomes a model directory for sample.py, --init_from and the stages; its optimizer stays behind. A config
gets nanoGPT's defaults for what it leaves out, and lines without a counterpart here become comments.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys
from pathlib import Path

import tomli_w
from pydantic.dataclasses import dataclass

from gpt_arc.data.tokenizer import Tokenizer, find_tokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command, new_directory, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Positional
from gpt_arc.tables import counted


@dataclass(frozen=True, config=STRICT)
class Options:
    source: Positional[Path]
    """A checkpoint (.pt), a config (.py), or a folder with train.bin and val.bin."""
    output: Positional[Path]
    """The model directory, config file (.toml) or dataset to write."""
    meta: Path | None = None
    """The meta.pkl of data by characters. None: that beside the source, else the tokenizer is the one named."""
    tokenizer: str = "gpt2"
    """gpt2, or a prepared dataset's or tokenizer's name, where there is no meta.pkl."""

    def find_tokenizer(self, folder: Path) -> Tokenizer:
        from gpt_arc.weights.nanogpt import read_characters

        meta = self.meta or folder / "meta.pkl"
        return read_characters(meta) if self.meta or meta.is_file() else find_tokenizer(self.tokenizer)


def convert_model(options: Options) -> str:
    from gpt_arc.planning.cost import describe_parameters
    from gpt_arc.weights.directory import save_model
    from gpt_arc.weights.nanogpt import read_model
    from gpt_arc.weights.tensor_files import check_range

    model, tokenizer = read_model(options.source), options.find_tokenizer(options.source.parent)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, and {options.source} embeds "
            f"{model.config.vocab_size:,}: name the meta.pkl of its data with --meta, or its tokenizer with --tokenizer"
        )
    check_range(model.state_dict(), options.source)
    with new_directory(options.output.resolve()) as temporary:
        save_model(model, tokenizer, temporary)
    return f"{describe_parameters(model, ' parameters')}; use it with: {command('sample.py', options.output)}"


def convert_data(options: Options) -> str:
    from gpt_arc.data.token_files import MAX_TOKENS, ShardWriter
    from gpt_arc.weights.nanogpt import read_tokens

    tokenizer, counts = options.find_tokenizer(options.source), []
    with new_directory(options.output.resolve()) as temporary:
        for split in ("train", "val"):
            writer = ShardWriter(temporary, split, tokenizer.vocab_size, MAX_TOKENS)
            for tokens in read_tokens(options.source / f"{split}.bin"):
                writer.append(tokens)
            writer.close()
            counts.append(f"{split} {counted(writer.written, 'token')}")
        tokenizer.save(temporary)
    return ", ".join(counts)


def convert_config(options: Options) -> str:
    from gpt_arc.training.config import SETTINGS, build_config
    from gpt_arc.weights.nanogpt import read_config

    settings, others = read_config(options.source)
    tables: dict[str, dict] = {}
    for name, value in settings.items():
        if name in SETTINGS:
            tables.setdefault(SETTINGS[name].table or "", {})[name] = value
        else:
            others.append(f"{name} = {value!r}")
    build_config({name: value for table in tables.values() for name, value in table.items()}, str(options.source))
    comments = "".join(f"# without a counterpart here: {line}\n" for line in others)
    write_file(options.output, f"# From {options.source.name} of nanoGPT.\n{comments}\n{tomli_w.dumps(tables)}")
    return f"{counted(len(others), 'line')} without a counterpart; use it with: {command('train.py', options.output)}"


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if options.output.is_file() or options.output.is_dir() and any(options.output.iterdir()):
        raise UserError(f"{options.output} holds something already: name another place")
    if options.source.is_dir():
        print(f"{options.output}: {convert_data(options)}")
    elif options.source.suffix == ".py":
        print(f"{options.output}: {convert_config(options)}")
    else:
        print(f"{options.output}: {convert_model(options)}")


if __name__ == "__main__":
    entry_point(main)()
