"""Prepare 10 billion tokens of FineWeb-Edu, web pages selected for educational content (arXiv:2406.17557).

    python prepare/fineweb.py                               streams it from the Hugging Face hub
    python prepare/fineweb.py --sample sample-100BT --name fineweb_100
    python prepare/fineweb.py --input FOLDER                reads its parquet files, without a network

The same command resumes after an interruption. Requires `pip install -e '.[data]'`.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import dataclasses
import sys
from typing import Literal

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import merge_inputs
from gpt_arc.data.hub_corpora import HubSettings, prepare_from_hub
from gpt_arc.data.prepare import ValFraction
from gpt_arc.errors import UserError, entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.next_steps import after_preparation
from gpt_arc.settings import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options(HubSettings):
    dataset: str = "HuggingFaceFW/fineweb-edu"
    name: str = "fineweb"
    """Name of the dataset, written to data/NAME."""
    sample: Literal["sample-10BT", "sample-100BT", "sample-350BT"] | None = None
    """Which sample to stream, of 10, 100 or 350 billion tokens. None: sample-10BT, or --config."""
    val_fraction: ValFraction = 0.001
    """Share of the documents for val."""


def main() -> None:
    options = parse_flags(Options, __doc__, merge_inputs(sys.argv[1:]))
    if options.input and options.sample:
        raise UserError(f"--sample={options.sample} selects what to stream, but --input names files: give only one")
    print(
        after_preparation(
            prepare_from_hub(dataclasses.replace(options, config=options.sample or options.config or "sample-10BT"))
        )
    )


if __name__ == "__main__":
    entry_point(main)()
