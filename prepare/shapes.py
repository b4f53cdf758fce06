"""Draw pictures of coloured shapes, with questions and answers: a task for models that read images.

    python prepare/shapes.py
    python prepare/shapes.py --count 40000 --size 48
    bash examples/gpt4_arc.sh                               all stages: encoder, text model, both together

A picture has one to three shapes in different quarters. A question asks for a colour, a shape, a count, a position or a
relation. Two kinds of combinations are held out, so that a model has to combine what it has learned apart: a tenth of
the triples of a colour, a shape and a quarter, and three pairs of a colour and a shape wherever they are. No training
picture has one; the question of each test picture is about one. Nothing is downloaded. It writes to data/:

    shapes/pictures/*.png            the pictures
    shapes/train.jsonl               image, kind, prompt, response, for stages/sft.py
    shapes/test.jsonl                the same about held-out triples, for stages/eval.py
    shapes/pairs.jsonl               the same about held-out pairs, which are harder
    shapes/shuffled.jsonl            the questions of test.jsonl about other pictures: what can be guessed unseen
    shapes/descriptions.jsonl        the training pictures described: "red circle top left, ring blue bottom right"
    shapes/labels.jsonl              image, colour, shape, quarter: pictures of one thing, for
                                     stages/pretrain_encoder.py; half of them in a colour without a name
    shapes/tokenizer.json            a token for each word
    shapes_text/                     the training questions with answers drawn at random, and descriptions of things
                                     drawn at random, a prepared dataset: a text model learns the language from it,
                                     and nothing about which answers are frequent
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import math
import random
import sys
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.extras import import_extra
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Seed
from gpt_arc.tables import counted
from gpt_arc.vision.questions import prepare_questions, write_rows, write_shuffled, write_text

COLOURS = {
    "red": (220, 30, 30), "green": (20, 160, 40), "blue": (40, 70, 230), "yellow": (235, 210, 30),
    "purple": (150, 40, 180), "black": (20, 20, 20),
}  # fmt: skip
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")
HELD_OUT = (("red", "triangle"), ("blue", "ring"), ("yellow", "square"))
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three")
KINDS = ("colour", "shape", "count", "position", "relation")
RELATIONS = (("left of", "right of"), ("above", "below"))
DESCRIBE = "What is in the picture?"
FAR = 60  # distance in red, green and blue between a named colour and one without a name, at least
LIGHT = 565  # sum of red, green and blue of a colour without a name, at most: the background is white


class Thing(NamedTuple):
    """A shape in a picture."""

    colour: str  # a name in COLOURS, or #rrggbb
    shape: str
    quarter: int  # index in QUARTERS

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


EVERY = [Thing(*names, quarter) for names in product(COLOURS, SHAPES) for quarter in range(len(QUARTERS))]


def split_of(thing: Thing) -> str:
    """Returns the split that a thing belongs to. Each colour, shape and quarter has its share of the test's triples."""
    if thing.pair in HELD_OUT:
        return "pairs"
    number = list(COLOURS).index(thing.colour) + 2 * SHAPES.index(thing.shape) + 3 * thing.quarter
    return "test" if number % 10 == 0 else "train"


THINGS = {split: [thing for thing in EVERY if split_of(thing) == split] for split in ("train", "test", "pairs")}


@dataclass(frozen=True, config=STRICT)
class Options:
    count: Count = 24_000
    """Training questions, each about a picture of its own."""
    labelled: Count = 24_000
    """Pictures with labels."""
    test: Count = 1_000
    """Questions of each test."""
    size: Count = 32
    """Side of the pictures in pixels."""
    seed: Seed = 0
    """Seed of the pictures and questions."""
    overwrite: bool = False
    """Replace data/shapes."""


def draw(things: Sequence[Thing], size: int, rng: random.Random) -> Any:
    """Returns a picture, of Pillow's, with the things on white, each somewhere in its quarter."""
    image = import_extra("PIL.Image").new("RGB", (size, size), "white")
    pencil = import_extra("PIL.ImageDraw").Draw(image)
    half = size // 2
    for thing in things:
        side = rng.randint(max(half * 5 // 8, 5), max(half - 2, 5))
        x, y = (half * part + rng.randint(0, half - side) for part in (thing.quarter % 2, thing.quarter // 2))
        box, colour = (x, y, x + side - 1, y + side - 1), COLOURS.get(thing.colour, thing.colour)
        third = side / 3
        if thing.shape == "circle":
            pencil.ellipse(box, fill=colour)
        elif thing.shape == "ring":
            pencil.ellipse(box, outline=colour, width=max(side // 5, 2))
        elif thing.shape == "square":
            pencil.rectangle(box, fill=colour)
        elif thing.shape == "triangle":
            pencil.polygon([(x, y + side - 1), (x + side - 1, y + side - 1), (x + side / 2, y)], fill=colour)
        else:
            pencil.rectangle((x + third, y, x + 2 * third, y + side - 1), fill=colour)
            pencil.rectangle((x, y + third, x + side - 1, y + 2 * third), fill=colour)
    return image


def things(rng: random.Random, split: str, least: int = 1, most: int = 3) -> list[Thing]:
    """Returns `least` to `most` things that have nothing in common; the first is of the split, the others of train."""
    chosen = [rng.choice(THINGS[split])]
    for _ in range(rng.randint(least, most) - 1):
        others = [thing for thing in THINGS["train"] if not any(set(thing) & set(other) for other in chosen)]
        chosen.append(rng.choice(others))
    return chosen


def nameless_colour(rng: random.Random) -> str:
    """Returns a colour, as #rrggbb, that is far from the named ones and from white."""
    while True:
        colour = rng.randrange(256), rng.randrange(256), rng.randrange(256)
        if min(math.dist(colour, named) for named in COLOURS.values()) >= FAR and sum(colour) <= LIGHT:
            return "#{:02x}{:02x}{:02x}".format(*colour)


def description(seen: Sequence[Thing], rng: random.Random) -> str:
    """Returns the things in random order, colour or shape first, so that each word but the first can be looked up."""
    pairs = [(rng.sample(thing.pair, 2), QUARTERS[thing.quarter]) for thing in rng.sample(seen, len(seen))]
    return ", ".join(f"{first} {second} {quarter}" for (first, second), quarter in pairs)


def random_things(rng: random.Random) -> list[Thing]:
    """Returns one to three things that have nothing in common, of all combinations: they are never drawn."""
    count = rng.randint(1, 3)
    attributes = (rng.sample(list(values), count) for values in (COLOURS, SHAPES, range(len(QUARTERS))))
    return [Thing(*thing) for thing in zip(*attributes)]


def question(kind: str, seen: Sequence[Thing], rng: random.Random) -> tuple[str, str]:
    """Returns a question of a kind about the first of the things in a picture, and its answer."""
    first, *others = seen
    if kind == "colour":
        return f"What colour is the {first.shape}?", first.colour
    if kind == "shape":
        return f"What shape is {first.colour}?", first.shape
    if kind == "count":
        return "How many shapes are there?", NUMBERS[len(seen)]
    if kind == "position":
        return f"Where is the {first.colour} {first.shape}?", QUARTERS[first.quarter]
    other = rng.choice(others)
    across = rng.choice([axis for axis in (0, 1) if place(first)[axis] != place(other)[axis]])
    words = RELATIONS[across]
    truth = words[place(first)[across] > place(other)[across]]
    return f"Is the {first.shape} {words[0]} or {words[1]} the {other.shape}?", truth


def place(thing: Thing) -> tuple[int, int]:
    """Returns the column and the row of a thing's quarter."""
    return thing.quarter % 2, thing.quarter // 2


def random_answer(row: dict[str, str], rng: random.Random) -> str:
    """Returns an answer that the question of a row could have, whatever its picture."""
    if row["kind"] == "relation":
        return rng.choice(next(words for words in RELATIONS if words[0] in row["prompt"]))
    answers = {"colour": list(COLOURS), "shape": SHAPES, "count": NUMBERS[1:], "position": QUARTERS}
    return rng.choice(answers[row["kind"]])


def write_split(folder: Path, split: str, count: int, options: Options) -> list[dict[str, str]]:
    """Writes pictures and questions, and descriptions of training pictures. Returns the questions."""
    rng, rows, described = random.Random(f"{options.seed} {split}"), [], []
    words = random.Random(f"{options.seed} descriptions")
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        seen = things(rng, split, least=2 if kind == "relation" else 1)
        name = f"pictures/{split}-{number:06}.png"
        draw(seen, options.size, rng).save(folder / name)
        prompt, response = question(kind, seen, rng)
        rows.append({"image": name, "kind": kind, "prompt": prompt, "response": response})
        if split == "train":
            described.append({"image": name, "prompt": DESCRIBE, "response": description(seen, words)})
    write_rows(folder / f"{split}.jsonl", rows)
    if described:
        write_rows(folder / "descriptions.jsonl", described)
    return rows


def write_labelled(folder: Path, options: Options) -> None:
    """Writes pictures of one thing and their labels; each second has a colour without a name, and no label of it."""
    rng, rows = random.Random(f"{options.seed} labels"), []
    for number in range(options.labelled):
        (thing,) = things(rng, "train", most=1)
        name = f"pictures/labelled-{number:06}.png"
        has_name = number % 2 == 0
        colour = thing.colour if has_name else None
        labels = {"colour": colour, "shape": thing.shape, "quarter": QUARTERS[thing.quarter]}
        if not has_name:
            thing = thing._replace(colour=nameless_colour(rng))
        draw([thing], options.size, rng).save(folder / name)
        rows.append({"image": name, **labels})
    write_rows(folder / "labels.jsonl", rows)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if options.size < 16:
        raise UserError(f"size = {options.size} is too small to tell shapes apart: 16 is the least")
    prepare_questions("shapes", options, write_all)


def write_all(folder: Path, options: Options) -> None:
    train, test, _ = (
        write_split(folder, split, options.count if split == "train" else options.test, options) for split in THINGS
    )
    write_labelled(folder, options)
    rng = random.Random(options.seed)
    texts = [
        ((row["prompt"], random_answer(row, rng)), (DESCRIBE, description(random_things(rng), rng))) for row in train
    ]
    write_text(folder, chain(*texts))
    write_shuffled(folder, test, options.seed)
    print(f"{counted(options.count, 'question')} to train on and {options.test:,} for each test")


if __name__ == "__main__":
    entry_point(main)()
