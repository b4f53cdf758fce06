"""Writes documents for measuring long contexts: prose, copies of random text, and keys to remember.

    python examples/long_context_data.py --longest=512
    python examples/long_context_data.py --longest=64
    python prepare/text.py --input data/long_context_512/corpus.jsonl --name long_512 --tokenizer char
    python prepare/text.py --input data/long_context_64/corpus.jsonl --name long_64 --tokenizer long_512

Sizes of documents are log-uniform between 16 and `longest` characters. A quarter of the documents is prose of Python's
manual, half random letters and digits and the same again, and a quarter prose behind a key of four digits, which the
end asks for:

    copy x4vbtr0a|x4vbtr0a
    key 5093: The "print" statement ... key 5093

A model trained on short documents has learnt the same tasks over shorter distances. The same seed gives the same file.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from pydantic.dataclasses import dataclass

from gpt_arc.errors import entry_point
from gpt_arc.evaluation.recall import COPIED, COPY, KEY, random_key
from gpt_arc.files import DATA_ROOT, new_directory
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count
from gpt_arc.tables import counted

SHORTEST = 16


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    output: Path | None = None
    """Folder to write; replaces an older one. None: data/long_context_LONGEST."""
    documents: Count = 50_000
    """Documents, of 143 characters on average if the longest has 512, 35 if it has 64."""
    longest: Count = 512
    """Characters of the longest documents."""
    seed: int = 0
    """Random seed."""

    def __post_init__(self):
        if self.longest <= SHORTEST:
            raise ValueError(f"longest = {self.longest} must be more than {SHORTEST}")


def documents(options: Options, prose: str, rng: random.Random) -> Iterator[str]:
    for _ in range(options.documents):
        size = round(SHORTEST * (options.longest / SHORTEST) ** rng.random())
        begin = rng.randrange(len(prose) - size)
        match rng.choice(("prose", "copy", "copy", "key")):
            case "prose":
                yield prose[begin : begin + size]
            case "copy":
                copied = "".join(rng.choices(COPIED, k=(size - len(COPY)) // 2))
                yield COPY.format(copied, copied)
            case "key":
                key = random_key(rng)
                yield KEY.format(key, prose[begin : begin + max(size - 20, 0)], key)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    prose = "\n".join(topics[name] for name in sorted(topics))
    prose = "".join(letter for letter in prose if letter.isascii())
    output = options.output or DATA_ROOT / f"long_context_{options.longest}"
    with new_directory(output) as folder:
        rows = (json.dumps({"text": text}) + "\n" for text in documents(options, prose, random.Random(options.seed)))
        with open(folder / "corpus.jsonl", "w") as file:
            file.writelines(rows)
    print(f"{output}: {counted(options.documents, 'document')} of up to {options.longest:,} characters")


if __name__ == "__main__":
    entry_point(main)()
