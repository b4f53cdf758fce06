"""Text from which a model can learn to learn: in each document a new substitution of letters, shown by examples.

    python examples/in_context_data.py
    python prepare/text.py --input data/in_context/corpus.jsonl --name in_context_text --tokenizer char

A document has one mapping of ten letters onto ten letters, a permutation drawn at random, and applies it to seventeen
words, a line each, with an empty line at the end:

    dab>hfc
    bee>cii
    ...

Nothing tells which mapping it is but the lines before: the first line can only be guessed, the last one is known, but
for letters that haven't come yet. Words have one to three letters, all words of a document as many, and two to ten
different letters among them: short words of few letters teach how it is done, which is hard to hit upon otherwise.

Some mappings are held out: no document has one of them, nor agrees with one in more than `most_equal` letters. Asked
about those, a model has to have learnt how a mapping is found out; to know some won't do.
Written are

    corpus.jsonl                  a document a line, as "text"
    NUMBER/{pool,items}.jsonl     of each held-out mapping: demonstrations, and other words to ask, as "input", "output"
    mappings.json                 the held-out mappings: what abcdefghij becomes

The same seed gives the same files.
"""

import json
import random
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import DATA_ROOT, new_directory
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT

LETTERS = "abcdefghij"
WORD = 3  # letters of the longest words, those that are asked
LINES = 17  # of a document: sixteen demonstrations and a question


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    output: Path = DATA_ROOT / "in_context"
    """Folder to write; an older one goes."""
    documents: int = 100_000
    """Documents to learn from, of 103 characters on average."""
    held_out: int = 10
    """Mappings that no document has."""
    most_equal: int = 5
    """How many of the ten letters a document's mapping may map as a held-out one does."""
    items: int = 100
    """Words to ask of every held-out mapping."""
    pool: int = 100
    """Words of every held-out mapping to draw demonstrations from; none of them is asked."""
    seed: int = 0
    """The source of all randomness."""

    def __post_init__(self):
        for name in ("documents", "held_out", "items", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.items + self.pool > len(LETTERS) ** WORD:
            raise ValueError(f"items and pool must be at most {len(LETTERS) ** WORD} words together")
        if not 0 <= self.most_equal < len(LETTERS):
            raise ValueError(f"most_equal = {self.most_equal} must lie between 0 and {len(LETTERS) - 1}")


def new_mapping(chance: random.Random) -> str:
    """What the LETTERS become, in their order: a permutation of them."""
    return "".join(chance.sample(LETTERS, len(LETTERS)))


def equal_letters(one: str, other: str) -> int:
    """How many letters two mappings map alike."""
    return sum(a == b for a, b in zip(one, other))


def mapped(text: str, mapping: str) -> str:
    return text.translate(str.maketrans(LETTERS, mapping))


def documents(options: Options, held_out: list[str], chance: random.Random) -> Iterator[str]:
    """Texts whose mappings are none of those held out, nor nearly."""
    for _ in range(options.documents):
        while True:
            mapping = new_mapping(chance)
            if max(equal_letters(mapping, other) for other in held_out) <= options.most_equal:
                break
        length, letters = chance.randint(1, WORD), chance.sample(LETTERS, chance.randint(2, len(LETTERS)))
        words = ["".join(chance.choices(letters, k=length)) for _ in range(LINES)]
        yield "".join(f"{word}>{mapped(word, mapping)}\n" for word in words) + "\n"


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    chance = random.Random(options.seed)
    held_out = sorted({new_mapping(chance) for _ in range(options.held_out)})
    if len(held_out) < options.held_out:
        raise UserError(f"held_out = {options.held_out}: two of them are the same; ask for fewer, or set another seed")
    with new_directory(options.output) as folder:
        (folder / "mappings.json").write_text(json.dumps(held_out, indent=1) + "\n")
        for number, mapping in enumerate(held_out):
            (folder / str(number)).mkdir()
            words = chance.sample(
                ["".join(word) for word in product(LETTERS, repeat=WORD)], options.items + options.pool
            )
            rows = [json.dumps({"input": word, "output": mapped(word, mapping)}) for word in words]
            (folder / str(number) / "items.jsonl").write_text("\n".join(rows[: options.items]) + "\n")
            (folder / str(number) / "pool.jsonl").write_text("\n".join(rows[options.items :]) + "\n")
        with open(folder / "corpus.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents(options, held_out, chance))
    print(f"{options.output}: {options.documents:,} documents, {options.held_out} mappings held out")


if __name__ == "__main__":
    entry_point(main)()
