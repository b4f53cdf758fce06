"""Prepare your own text.

    python prepare/text.py --input book.txt --name book --tokenizer char
    python prepare/text.py --input folder/ more.jsonl.gz 'crawl/*.parquet' --name papers --tokenizer gpt2

A document is a text file, a line of JSON (.jsonl) or a row of parquet, with its text in --field. --pattern '*.md' reads
other files of a folder, as text. Text and JSON may be compressed (.gz, .zst). With the tokenizer char or one like
GPT-2's, a text file may be larger than memory; any other document is held whole. The same command resumes after an
interruption.
Then: python train.py CONFIG --dataset=NAME
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import InputSettings, merge_inputs
from gpt_arc.data.prepare import CorpusSettings, prepare_documents
from gpt_arc.errors import entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.next_steps import after_preparation
from gpt_arc.settings import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options(CorpusSettings, InputSettings):
    name: str
    """Name of the dataset, written to data/NAME."""


def main() -> None:
    options = parse_flags(Options, __doc__, merge_inputs(sys.argv[1:]))
    prepare_documents(options.files(), options, options.name)
    print(after_preparation(options.name))


if __name__ == "__main__":
    entry_point(main)()
