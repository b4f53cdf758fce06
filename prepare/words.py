"""Prepare pictures of words to read: a task for models that read images.

    python prepare/words.py
    python prepare/words.py --count 40000
    bash examples/gpt4_arc.sh           all stages: encoder, text model, both together

A word is five capitals drawn at random, so that none can be guessed from its neighbours. It is written in the font that
Pillow brings along, black on white, in a picture of 40 x 40 pixels. No word of the test is among those to train on.
Nothing is downloaded. It writes to data/:

    words/pictures/*.png            the pictures
    words/{train,test}.jsonl        image, prompt, response: the word
    words/shuffled.jsonl            the test's questions about other pictures: what can be guessed unseen
    words/labels.jsonl              image, first ... fifth: the training pictures with their letters
    words/tokenizer.json            a token for each letter
    words_text/                     the question with other words drawn at random, a prepared dataset
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import random
import string
import sys
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.extras import import_extra
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Seed
from gpt_arc.vision.questions import LETTERS_ONLY, prepare_questions, write_rows, write_shuffled, write_text

QUESTION = "Word?"
PLACES = ("first", "second", "third", "fourth", "fifth")
SIDE, CELL = 40, 8  # pixels of a picture, and from one letter to the next
LEAST, MOST = (0, 13), (2, 14)  # where the first letter may begin: each letter stays in a cell of its own
TEXTS = 2_000  # questions for the text model
MOST_WORDS = 1_000_000  # a twelfth of all there are


@dataclass(frozen=True, config=STRICT)
class Options:
    count: Count = 12_000
    """Words to train on, all different."""
    test: Count = 500
    """Words of the test."""
    seed: Seed = 0
    """Seed of the words and of their places in the pictures."""
    overwrite: bool = False
    """Replace data/words."""


def random_words(count: int, rng: random.Random) -> list[str]:
    """Returns that many different words."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_uppercase, k=len(PLACES)))] = None
    return list(words)


def draw(word: str, left: int, top: int) -> Any:
    """Returns a picture, of Pillow's, of a word whose first letter begins at (left, top)."""
    image = import_extra("PIL.Image").new("L", (SIDE, SIDE), "white")
    pencil, font = import_extra("PIL.ImageDraw").Draw(image), import_extra("PIL.ImageFont").load_default_imagefont()
    for number, letter in enumerate(word):
        pencil.text((left + CELL * number, top), letter, fill="black", font=font)
    return image


def write_all(folder: Path, options: Options) -> None:
    rng = random.Random(options.seed)
    words = random_words(options.count + options.test + TEXTS, rng)
    rows, labels = [], []
    for number, word in enumerate(words[: options.count + options.test]):
        name = f"pictures/{number:06}.png"
        draw(word, *map(rng.randint, LEAST, MOST)).save(folder / name)
        rows.append({"image": name, "prompt": QUESTION, "response": word})
        labels.append({"image": name, **dict(zip(PLACES, word))})
    write_rows(folder / "train.jsonl", rows[: options.count])
    write_rows(folder / "labels.jsonl", labels[: options.count])
    write_rows(folder / "test.jsonl", rows[options.count :])
    write_shuffled(folder, rows[options.count :], options.seed)
    write_text(folder, [(QUESTION, word) for word in words[-TEXTS:]], LETTERS_ONLY)
    print(f"{options.count:,} words to train on and {options.test:,} for the test")


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if options.count + options.test > MOST_WORDS:
        raise UserError(f"count + test = {options.count + options.test:,} words: {MOST_WORDS:,} are the most")
    prepare_questions("words", options, write_all)


if __name__ == "__main__":
    entry_point(main)()
