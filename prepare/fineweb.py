"""Prepare FineWeb-Edu, web pages chosen for what one learns from them (arXiv:2406.17557): 10 billion tokens of it.

    python prepare/fineweb.py                               streams it from the Hugging Face hub
    python prepare/fineweb.py --sample sample-100BT --name fineweb_100
    python prepare/fineweb.py --input FOLDER                of its parquet files, where there is no network

A run that was stopped goes on by the same command. It takes `pip install -e '.[data]'`.
"""

import sys
from typing import Literal

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import Files, HubDocuments, find_files, merge_inputs
from gpt_arc.data.prepare import CorpusSettings, prepare_documents
from gpt_arc.errors import UserError, entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options(CorpusSettings):
    input: tuple[str, ...] = ()
    """Its parquet files, or folders of them. Without any it is streamed."""
    sample: Literal["sample-10BT", "sample-100BT", "sample-350BT"] | None = None
    """Which sample to stream, of 10, 100 or 350 billion tokens. None: sample-10BT."""
    name: str = "fineweb"
    """Name of the dataset: it becomes data/NAME."""
    val_fraction: float = 0.001
    """How much of the documents goes to val."""


def main() -> None:
    options = parse_flags(Options, __doc__, merge_inputs(sys.argv[1:]))
    if options.input and options.sample:
        raise UserError(f"--sample={options.sample} says what to stream, but --input names files: give one of the two")
    local = options.input and Files(find_files(options.input), "text")
    streamed = HubDocuments("HuggingFaceFW/fineweb-edu", name=options.sample or "sample-10BT")
    prepare_documents(local or streamed, options, options.name)


if __name__ == "__main__":
    entry_point(main)()
