"""Prepare your own text.

    python prepare/text.py --input book.txt --name book --tokenizer char
    python prepare/text.py --input folder/ more.jsonl.gz 'crawl/*.parquet' --name papers --tokenizer gpt2

A text file is one document; so is each line of JSON (.jsonl) and row of parquet, its text in --field. Text and JSON may
be packed (.gz, .zst). A run that was stopped goes on by the same command. Then: python train.py CONFIG --dataset=NAME
"""

import sys
from dataclasses import dataclass

from gpt_arc.corpus import CorpusSettings, prepare_documents
from gpt_arc.documents import Files, find_files, gathered
from gpt_arc.errors import entry_point
from gpt_arc.flags import parse_flags


@dataclass(frozen=True, kw_only=True)
class Options(CorpusSettings):
    input: tuple[str, ...]
    """Files, folders and glob patterns."""
    name: str
    """Name of the dataset: it becomes data/NAME."""
    field: str = "text"
    """The field of JSON lines, or the column of parquet, that holds the text."""
    pattern: str | None = None
    """Which files of a folder, at any depth. None: .txt, .jsonl and .parquet."""


def main() -> None:
    options = parse_flags(Options, __doc__, gathered(sys.argv[1:]))
    files = Files(find_files(options.input, options.pattern), options.field)
    prepare_documents(files, options, options.name)


if __name__ == "__main__":
    entry_point(main)()
