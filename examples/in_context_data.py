"""Writes text for learning in context: each document shows a new substitution of letters by examples.

    python examples/in_context_data.py
    python prepare/text.py --input data/in_context/corpus.jsonl --name in_context_text --tokenizer char

A document draws one random permutation of ten letters and applies it to seventeen words, one a line, with an empty line
at the end:

    dab>hfc
    bee>cii
    ...

Only the lines before reveal the mapping: the first line can only be guessed, the last is determined except for letters
that have not occurred. All words of a document have the same length, one to three letters, and use two to ten different
letters: short words of few letters make the rule easy to discover, which is hard otherwise.

Some mappings are held out: no document has one of them or agrees with one in more than `most_equal` letters. To apply
those, a model must have learnt to infer a mapping; knowing some mappings is not enough.
The script writes

    corpus.jsonl                  one document a line, as "text"
    NUMBER/{pool,items}.jsonl     for each held-out mapping: demonstrations and questions, with "input", "output"
    mappings.json                 the held-out mappings: the images of abcdefghij

The same seed gives the same files.
"""

import json
import random
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Lt
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import DATA_ROOT, new_directory
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count
from gpt_arc.tables import counted

LETTERS = "abcdefghij"
WORD = 3  # letters of the longest words, which the questions have
LINES = 17  # in a document: sixteen demonstrations and a question


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    output: Path = DATA_ROOT / "in_context"
    """Folder to write; replaces an older one."""
    documents: Count = 100_000
    """Training documents, of 103 characters on average."""
    held_out: Count = 10
    """Mappings that occur in no document."""
    most_equal: Annotated[int, Ge(0), Lt(len(LETTERS))] = 5
    """Maximum number of the ten letters that a document's mapping and a held-out one may map alike."""
    items: Count = 100
    """Test words per held-out mapping."""
    pool: Count = 100
    """Words per held-out mapping for demonstrations; none is a test word."""
    seed: int = 0
    """Random seed."""

    def __post_init__(self):
        if self.items + self.pool > len(LETTERS) ** WORD:
            raise ValueError(f"items and pool must be at most {len(LETTERS) ** WORD} words together")


def new_mapping(rng: random.Random) -> str:
    """Returns a random permutation: the images of LETTERS in order."""
    return "".join(rng.sample(LETTERS, len(LETTERS)))


def equal_letters(first: str, second: str) -> int:
    """Returns the number of letters that two mappings map alike."""
    return sum(a == b for a, b in zip(first, second))


def mapped(text: str, mapping: str) -> str:
    return text.translate(str.maketrans(LETTERS, mapping))


def documents(options: Options, held_out: list[str], rng: random.Random) -> Iterator[str]:
    """Yields texts whose mappings differ enough from all held-out ones."""
    for _ in range(options.documents):
        while True:
            mapping = new_mapping(rng)
            if max(equal_letters(mapping, other) for other in held_out) <= options.most_equal:
                break
        length, letters = rng.randint(1, WORD), rng.sample(LETTERS, rng.randint(2, len(LETTERS)))
        words = ["".join(rng.choices(letters, k=length)) for _ in range(LINES)]
        yield "".join(f"{word}>{mapped(word, mapping)}\n" for word in words) + "\n"


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    rng = random.Random(options.seed)
    held_out = sorted({new_mapping(rng) for _ in range(options.held_out)})
    if len(held_out) < options.held_out:
        raise UserError(f"held_out = {options.held_out}: two of the mappings are equal; use fewer, or another seed")
    with new_directory(options.output) as folder:
        (folder / "mappings.json").write_text(json.dumps(held_out, indent=1) + "\n")
        for number, mapping in enumerate(held_out):
            (folder / str(number)).mkdir()
            words = rng.sample(["".join(word) for word in product(LETTERS, repeat=WORD)], options.items + options.pool)
            rows = [json.dumps({"input": word, "output": mapped(word, mapping)}) for word in words]
            (folder / str(number) / "items.jsonl").write_text("\n".join(rows[: options.items]) + "\n")
            (folder / str(number) / "pool.jsonl").write_text("\n".join(rows[options.items :]) + "\n")
        with open(folder / "corpus.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents(options, held_out, rng))
    print(
        f"{options.output}: {counted(options.documents, 'document')}, {counted(options.held_out, 'mapping')} held out"
    )


if __name__ == "__main__":
    entry_point(main)()
