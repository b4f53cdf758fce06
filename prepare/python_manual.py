"""Prepare the Python language reference, as characters: a corpus that comes with every CPython.

    python prepare/python_manual.py

The text is `pydoc_data.topics`, the source of `help("while")`: about half a million characters, in the version of
the Python that runs this. Nothing is downloaded.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import Text
from gpt_arc.data.prepare import CorpusSettings, prepare_documents
from gpt_arc.errors import entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Options:
    overwrite: bool = False
    """Replace data/python_manual, for example one from another version of Python."""


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    from pydoc_data.topics import topics

    text = Text("\n".join(topics.values()), f"pydoc_data.topics of Python {sys.version.split()[0]}")
    prepare_documents(text, CorpusSettings(tokenizer="char", overwrite=options.overwrite), "python_manual")


if __name__ == "__main__":
    entry_point(main)()
