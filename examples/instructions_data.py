"""Writes instructions about the letters of words, with known answers, and a corpus that teaches these abilities.

    python examples/instructions_data.py
    python prepare/text.py --input data/instructgpt/corpus.jsonl --name instructgpt_text --tokenizer char

The corpus is prose: the paragraphs of the Python manual that every CPython carries, and sentences such as "Backwards
tiger is regit.", with two wordings for each ability. An instruction looks like "backwards: tiger"; the corpus has none.
A hash of each word decides whether it is held out; no sentence, demonstration or training prompt has a held-out word.
The script writes

    corpus.jsonl              one document a line, as "text"
    demonstrations.jsonl      prompts with right responses, most with extra characters, such as "um regit"
    {train,test}.jsonl        prompts: kind, prompt, answer

The same seed, and the same version of Python, give the same files.
"""

import dataclasses
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from pydantic.dataclasses import dataclass

from gpt_arc.errors import entry_point
from gpt_arc.files import DATA_ROOT, new_directory
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count

HELD_OUT = 0.2  # share of the words
SENTENCES = 4  # in a document about words
BEFORE, AFTER = ("um ", "so ", "- "), ("!", "!!", "!!!")  # what careless writers add to an answer


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of instruction: its answer for a word, and its wordings in the corpus."""

    answer: Callable[[str], str]
    sentences: tuple[str, str]
    most: int = 6  # most letters of a word
    letters: int | None = None  # number of different letters to draw from
    instructed: bool = True  # False: only in the corpus


def most_frequent(word: str) -> int:
    return max(Counter(word).values())


KINDS = {
    "once more": Kind(lambda word: word, ("Once more {word} is {answer}.", "He said {word} and she said {answer}.")),
    "backwards": Kind(
        lambda word: word[::-1], ("Backwards {word} is {answer}.", "From its end {word} reads {answer}.")
    ),
    "in order": Kind(
        lambda word: "".join(sorted(word)),
        ("In order {word} is {answer}.", "Put the letters of {word} in order and get {answer}."),
        instructed=False,  # small models learn it slowly
    ),
    "in capitals": Kind(str.upper, ("In capitals {word} is {answer}.", "Write {word} large and get {answer}.")),
    "double letters": Kind(
        lambda word: "".join(2 * letter for letter in word),
        ("With double letters {word} is {answer}.", "Write each letter of {word} twice and get {answer}."),
        most=5,
    ),
    "one letter on": Kind(
        lambda word: "".join(ascii_lowercase[(ascii_lowercase.index(letter) + 1) % 26] for letter in word),
        ("One letter on {word} is {answer}.", "After the letters of {word} come {answer}."),
    ),
    "ends": Kind(
        lambda word: word[0] + word[-1],
        ("The ends of {word} are {answer}.", "First and last in {word} stand {answer}."),
    ),
    "most": Kind(
        lambda word: str(most_frequent(word)),
        ("Of one letter {word} has {answer}.", "The most that {word} has of a letter is {answer}."),
        letters=3,
        instructed=False,
    ),
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    output: Path = DATA_ROOT / "instructgpt"
    """Folder to write; replaces an older one."""
    documents: Count = 20_000
    """Documents of sentences about words, four sentences each, in addition to the manual."""
    demonstrations: Count = 1_500
    """Prompts with responses, for supervised fine-tuning."""
    train: Count = 20_000
    """Training prompts for rankings and rewards."""
    test: Count = 2_000
    """Test prompts, with held-out words."""
    seed: int = 0
    """Random seed."""


def is_held_out(word: str) -> bool:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) < HELD_OUT * 2**32


def draw_word(kind: Kind, held_out: bool, rng: random.Random) -> str:
    while True:
        letters = rng.sample(ascii_lowercase, kind.letters) if kind.letters else ascii_lowercase
        word = "".join(rng.choices(letters, k=rng.randint(3, kind.most)))
        if is_held_out(word) == held_out:
            return word


def careless(answer: str, rng: random.Random) -> str:
    """Returns a right answer as a careless writer would give it; a quarter of them are clean."""
    return rng.choice([answer, answer, *(before + answer for before in BEFORE), *(answer + after for after in AFTER)])


def instructions(
    count: int, held_out: bool, rng: random.Random, excluded: set[str] | None = None
) -> list[dict[str, Any]]:
    """Returns distinct instructions, equally many of each kind, without the prompts in `excluded`."""
    rows, prompts = [], set(excluded or ())
    names = [name for name, kind in KINDS.items() if kind.instructed]
    while len(rows) < count:
        name = names[len(rows) % len(names)]
        word = draw_word(KINDS[name], held_out, rng)
        prompt = f"{name}: {word}"
        if prompt not in prompts:
            prompts.add(prompt)
            rows.append({"kind": name, "prompt": prompt, "answer": KINDS[name].answer(word)})
    rng.shuffle(rows)
    return rows


def documents(count: int, rng: random.Random) -> Iterator[str]:
    """Yields documents of sentences about words that are not held out."""
    kinds = list(KINDS.values())
    for _ in range(count):
        chosen = [rng.choice(kinds) for _ in range(SENTENCES)]
        words = [draw_word(kind, False, rng) for kind in chosen]
        yield "\n".join(
            rng.choice(kind.sentences).format(word=word, answer=kind.answer(word)) for kind, word in zip(chosen, words)
        )


def manual() -> list[str]:
    """Returns the paragraphs of the Python manual in ASCII."""
    from pydoc_data.topics import topics

    texts = (topics[name].encode("ascii", "ignore").decode() for name in sorted(topics))
    return [paragraph for text in texts for paragraph in text.split("\n\n") if paragraph.strip()]


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    rng = random.Random(options.seed)
    corpus = [*manual(), *documents(options.documents, rng)]
    demonstrations = instructions(options.demonstrations, False, rng)
    train = instructions(options.train, False, rng, {row["prompt"] for row in demonstrations})
    files = {
        "corpus": [{"text": text} for text in corpus],
        "demonstrations": [{**row, "response": careless(row["answer"], rng)} for row in demonstrations],
        "train": train,
        "test": instructions(options.test, True, rng),
    }
    with new_directory(options.output) as folder:
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"{options.output}: " + ", ".join(f"{name} {len(rows):,}" for name, rows in files.items()))


if __name__ == "__main__":
    entry_point(main)()
