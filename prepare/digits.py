"""Prepare scikit-learn's 1,797 handwritten digits as pictures with a question each: a task for models that read images.

    python prepare/digits.py
    bash examples/gpt4_arc.sh           all stages: encoder, text model, both together

A fifth of them, drawn by the seed, is the test. scikit-learn brings the digits along, so nothing is downloaded. It
writes to data/:

    digits/pictures/*.png            the pictures, 8 x 8 pixels
    digits/{train,test}.jsonl        image, prompt, response: which digit it is, in a word
    digits/shuffled.jsonl            the test's questions about other pictures: what can be guessed unseen
    digits/labels.jsonl              image, label: the training pictures, each also moved by a pixel in eight directions
    digits/tokenizer.json            a token for each word
    digits_text/                     the question with answers drawn at random, a prepared dataset
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import random
import sys
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from gpt_arc.errors import entry_point
from gpt_arc.extras import import_extra
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Seed
from gpt_arc.vision.questions import prepare_questions, write_rows, write_shuffled, write_text

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "Which digit is this?"
MOVES = [(0, 0), *((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y)]
TEXTS = 2_000  # questions for the text model


@dataclass(frozen=True, config=STRICT)
class Options:
    seed: Seed = 0
    """Seed that draws the test."""
    overwrite: bool = False
    """Replace data/digits."""


def picture(values: Any, move: tuple[int, int] = (0, 0)) -> Any:
    """Returns a picture, of Pillow's, of a digit (8, 8) between 0 and 16, white on black and moved by some pixels."""
    image = import_extra("PIL.Image")
    drawn = image.new("L", (8, 8))
    drawn.paste(image.fromarray((values * 15.9375).astype("uint8")), move)
    return drawn


def write_all(folder: Path, options: Options) -> None:
    digits = import_extra("sklearn.datasets").load_digits()
    order = list(range(len(digits.target)))
    random.Random(options.seed).shuffle(order)
    rows, labels = [], []
    for number, i in enumerate(order):
        is_test = number < len(order) // 5
        for move, offset in enumerate(MOVES[:1] if is_test else MOVES):
            name, word = f"pictures/{i:04}-{move}.png", WORDS[digits.target[i]]
            picture(digits.images[i], offset).save(folder / name)
            if not is_test:
                labels.append({"image": name, "label": word})
            if not move:
                rows.append({"image": name, "prompt": QUESTION, "response": word})
    test, train = rows[: len(order) // 5], rows[len(order) // 5 :]
    for name, split in {"train": train, "test": test, "labels": labels}.items():
        write_rows(folder / f"{name}.jsonl", split)
    write_shuffled(folder, test, options.seed)
    rng = random.Random(options.seed)
    write_text(folder, [(QUESTION, rng.choice(WORDS)) for _ in range(TEXTS)])
    print(f"{len(train):,} digits to train on and {len(test):,} for the test")


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    prepare_questions("digits", options, write_all)


if __name__ == "__main__":
    entry_point(main)()
