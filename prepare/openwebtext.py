"""Prepare OpenWebText, an open replication of GPT-2's training data: 8 million web pages, 9 billion tokens.

    python prepare/openwebtext.py                           streams it from the Hugging Face hub
    python prepare/openwebtext.py --input FOLDER            reads its parquet files, without a network

The same command resumes after an interruption. Requires `pip install -e '.[data]'`.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import merge_inputs
from gpt_arc.data.hub_corpora import HubSettings, prepare_from_hub
from gpt_arc.data.prepare import ValFraction
from gpt_arc.errors import entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.next_steps import after_preparation
from gpt_arc.settings import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options(HubSettings):
    dataset: str = "Skylion007/openwebtext"
    val_fraction: ValFraction = 0.0005
    """Share of the documents for val, as in nanoGPT."""


def main() -> None:
    print(after_preparation(prepare_from_hub(parse_flags(Options, __doc__, merge_inputs(sys.argv[1:])))))


if __name__ == "__main__":
    entry_point(main)()
