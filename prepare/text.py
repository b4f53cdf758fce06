"""Prepare your own text.

    python prepare/text.py --input book.txt --name book --tokenizer char
    python prepare/text.py --input folder/ more.jsonl.gz 'crawl/*.parquet' --name papers --tokenizer gpt2

A document is a file of text or HTML, a line of JSON (.jsonl, .ndjson), an element of a JSON array, or a row of .csv,
.tsv or parquet, with its text in --field. The content tells what the name doesn't. All except parquet may be packed
(.gz, .bz2, .xz, .zst). --pattern '*.md' reads other files of a folder; --input - reads standard input. With the
tokenizer char or one like GPT-2's, a text file may be larger than memory; any other document is held whole. The same
command resumes after an interruption.

--shard=0/4 to --shard=3/4 prepare a quarter of the files each, on one machine or four that share the files. The command
without --shard then joins them into the dataset that it would have written alone.
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
    shard: str | None = None
    """I/N: prepare part I, from 0, of N of the files, as data/NAME-I-of-N. None: everything, or join such parts."""


def main() -> None:
    options = parse_flags(Options, __doc__, merge_inputs(sys.argv[1:]))
    prepare_documents(options.files(), options, options.name, options.shard)
    if options.shard is None:
        print(after_preparation(options.name))


if __name__ == "__main__":
    entry_point(main)()
