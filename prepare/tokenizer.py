"""Train a tokenizer, byte-level BPE as GPT-2's, on your own text.

    python prepare/tokenizer.py --input folder/ --name papers --vocab_size 40478
    python prepare/text.py --input folder/ --name papers --tokenizer papers

It becomes data/NAME/tokenizer.json. What --input takes is what prepare/text.py takes.
"""

import sys
from collections.abc import Iterator

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import Files, InputSettings, merge_inputs
from gpt_arc.data.prepare import dataset_directory
from gpt_arc.data.tokenizer import BPETokenizer, holds_tokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options(InputSettings):
    name: str
    """Name of the tokenizer: it becomes data/NAME/tokenizer.json."""
    vocab_size: int
    """Tokens in all: 256 bytes, the merges and <|endoftext|>."""
    overwrite: bool = False
    """Train it anew where data/NAME/tokenizer.json is there already."""


def texts_of(files: Files) -> Iterator[str]:
    empty = True
    for text, _ in files.pieces("space"):
        yield text
        empty = empty and not text
    if empty:
        raise UserError(f"{files.name} has no text")


def main() -> None:
    options = parse_flags(Options, __doc__, merge_inputs(sys.argv[1:]))
    directory = dataset_directory(options.name)
    if options.name in ("char", "gpt2"):
        raise UserError(f"--tokenizer {options.name} means another one already: choose another name")
    if any(directory.glob("*.bin")):
        raise UserError(f"{directory} holds a dataset already, made with its tokenizer: choose another name")
    if holds_tokenizer(directory) and not options.overwrite:
        raise UserError(
            f"{directory} holds a tokenizer already: --overwrite=True trains it anew, or choose another name"
        )
    files = options.files()
    tokenizer = BPETokenizer.train(texts_of(files), options.vocab_size)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    print(f"{directory / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens")
    if tokenizer.vocab_size < options.vocab_size:
        print(f"note: {files.name} has no more pairs to merge, so they are fewer than {options.vocab_size:,}")


if __name__ == "__main__":
    entry_point(main)()
