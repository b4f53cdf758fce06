"""Prepare your own text.

    python prepare/text.py --input book.txt --name book --tokenizer char
    python prepare/text.py --input folder/ --name papers --tokenizer gpt2

Of a folder, every file below it that matches --pattern is one document. Then: python train.py CONFIG --dataset=NAME
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from gpt_arc.corpus import TokenizerName, prepare_text, read_text
from gpt_arc.errors import UserError, entry_point
from gpt_arc.flags import parse_flags


@dataclass(frozen=True)
class Options:
    input: Path
    """A UTF-8 text file, or a folder of them."""
    name: str
    """Name of the dataset: it becomes data/NAME."""
    tokenizer: TokenizerName = "gpt2"
    """char: one token per character. gpt2: GPT-2's byte-level BPE."""
    pattern: str = "*.txt"
    """Which files of a folder, at any depth."""
    overwrite: bool = False
    """Replace data/NAME if it holds something else."""


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    paths = [options.input]
    if options.input.is_dir():
        paths = sorted(path for path in options.input.rglob("*") if path.is_file() and path.match(options.pattern))
    if not paths:
        raise UserError(f"no file below {options.input} matches --pattern {options.pattern}")
    documents = [read_text(path) for path in paths]
    prepare_text(documents, options.tokenizer, options.name, str(options.input), options.overwrite)


if __name__ == "__main__":
    entry_point(main)()
