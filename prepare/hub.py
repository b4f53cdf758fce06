"""Prepare any dataset of texts on the Hugging Face hub.

    python prepare/hub.py roneneldan/TinyStories
    python prepare/hub.py wikimedia/wikipedia --config=20231101.en --name=wikipedia --val_fraction=0.001
    python prepare/hub.py allenai/c4 --config=en --hub_split=validation --field=text

The rows are streamed. The same command resumes after an interruption, with the commit that it began with. Requires
`pip install -e '.[data]'`.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys

from pydantic.dataclasses import dataclass

from gpt_arc.data.hub_corpora import HubSettings, prepare_from_hub
from gpt_arc.errors import entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.next_steps import after_preparation
from gpt_arc.settings import STRICT, Positional


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options(HubSettings):
    dataset: Positional[str]


def main() -> None:
    print(after_preparation(prepare_from_hub(parse_flags(Options, __doc__, sys.argv[1:]))))


if __name__ == "__main__":
    entry_point(main)()
