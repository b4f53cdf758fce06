"""Train a tokenizer, byte-level BPE as GPT-2's, on your own text.

    python prepare/tokenizer.py --input folder/ --name papers --vocab_size 40478
    python prepare/text.py --input folder/ --name papers --tokenizer papers

It becomes data/NAME/tokenizer.json. What --input takes is what prepare/text.py takes.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from gpt_arc.corpus import dataset_directory
from gpt_arc.documents import Files, find_files, gathered
from gpt_arc.errors import UserError, entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.tokenizer import BPETokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    input: tuple[str, ...]
    """Files, folders and glob patterns."""
    name: str
    """Name of the tokenizer: it becomes data/NAME/tokenizer.json."""
    vocab_size: int
    """Tokens in all: 256 bytes, the merges and <|endoftext|>."""
    field: str = "text"
    """The field of JSON lines, or the column of parquet, that holds the text."""
    pattern: str | None = None
    """Which files of a folder, at any depth. None: .txt, .jsonl and .parquet."""
    overwrite: bool = False
    """Replace data/NAME/tokenizer.json if it is another."""


def texts_of(files: Files) -> Iterator[str]:
    empty = True
    for text, _ in files.pieces("space"):
        yield text
        empty = empty and not text
    if empty:
        raise UserError(f"{files.name} has no text")


def main() -> None:
    options = parse_flags(Options, __doc__, gathered(sys.argv[1:]))
    directory = dataset_directory(options.name)
    files = Files(find_files(options.input, options.pattern), options.field)
    before = load_tokenizer(directory) if (directory / "tokenizer.json").exists() and not options.overwrite else None
    tokenizer = BPETokenizer.train(texts_of(files), options.vocab_size)
    if tokenizer == before:
        print(f"{directory / 'tokenizer.json'} is that tokenizer already")
        return
    if any(directory.glob("*.bin")):
        raise UserError(f"{directory} holds a dataset made with another tokenizer: choose another name")
    if before is not None:
        raise UserError(f"{directory} holds another tokenizer: --overwrite=True replaces it, or choose another name")
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    print(f"{directory / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens")
    if tokenizer.vocab_size < options.vocab_size:
        print(f"note: {files.name} has no more pairs to merge, so they are fewer than {options.vocab_size:,}")


if __name__ == "__main__":
    entry_point(main)()
