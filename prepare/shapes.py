"""Draw pictures of coloured shapes, with questions and answers: a task for models that read images.

    python prepare/shapes.py
    python prepare/shapes.py --count 20000 --size 48
    python train.py --dataset=shapes_text ...               the texts alone, for a model to start from
    python stages/sft.py out/shapes --train data/shapes/train.jsonl --image_encoder ENCODER.toml

A picture has one to three shapes in different quarters. A question asks for a colour, a shape, a count, a position or a
relation. A tenth of the pairs of a colour and a shape are held out: no training picture has one, and every test picture
does, so that a model has to combine what it has learned apart. Nothing is downloaded. It writes to data/:

    shapes/pictures/*.png            the pictures
    shapes/{train,test}.jsonl        image, kind, prompt, response; stages/sft.py and stages/eval.py read them
    shapes/shuffled.jsonl            the test's questions about other pictures: what can be guessed without seeing
    shapes_text/                     the training texts as characters, a prepared dataset
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from gpt_arc.data.documents import Text
from gpt_arc.data.json_lines import read_object
from gpt_arc.data.prepare import CorpusSettings, prepare_documents
from gpt_arc.errors import UserError, entry_point
from gpt_arc.extras import import_extra
from gpt_arc.files import DATA_ROOT, new_directory
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Seed
from gpt_arc.tables import counted

COLOURS = {
    "red": (220, 30, 30), "green": (20, 160, 40), "blue": (40, 70, 230), "yellow": (235, 210, 30),
    "purple": (150, 40, 180), "black": (20, 20, 20),
}  # fmt: skip
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")
HELD_OUT = (("red", "triangle"), ("blue", "ring"), ("yellow", "square"))
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three")
MADE_OF = "made_of.json"
KINDS = ("colour", "shape", "count", "position", "relation")


class Thing(NamedTuple):
    """A shape in a picture."""

    colour: str
    shape: str
    quarter: int  # index in QUARTERS

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True, config=STRICT)
class Options:
    count: Count = 12_000
    """Training questions, each about a picture of its own."""
    test: Count = 1_000
    """Test questions."""
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
        box, colour = (x, y, x + side - 1, y + side - 1), COLOURS[thing.colour]
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


def things(rng: random.Random, held_out: bool) -> list[Thing]:
    """Returns one to three things of different colours and shapes; the first is a held-out pair, or none is."""
    while True:
        count = rng.randint(1, 3)
        pairs = list(zip(rng.sample(list(COLOURS), count), rng.sample(SHAPES, count)))
        if held_out:
            pairs[0] = rng.choice(HELD_OUT)
        quarters = rng.sample(range(4), len(pairs))
        chosen = [Thing(*pair, quarter) for pair, quarter in zip(pairs, quarters)]
        unique = all(len({getattr(thing, name) for thing in chosen}) == len(chosen) for name in ("colour", "shape"))
        if unique and any(thing.pair in HELD_OUT for thing in chosen) == held_out:
            return chosen


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
    words = (("left of", "right of"), ("above", "below"))[across]
    truth = words[place(first)[across] > place(other)[across]]
    return f"Is the {first.shape} {words[0]} or {words[1]} the {other.shape}?", truth


def place(thing: Thing) -> tuple[int, int]:
    """Returns the column and the row of a thing's quarter."""
    return thing.quarter % 2, thing.quarter // 2


def write_split(folder: Path, split: str, count: int, options: Options) -> list[dict[str, str]]:
    """Writes pictures and questions, and returns the questions."""
    rng, rows = random.Random(f"{options.seed} {split}"), []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        seen = things(rng, split == "test")
        while kind == "relation" and len(seen) == 1:
            seen = things(rng, split == "test")
        name = f"pictures/{split}-{number:06}.png"
        draw(seen, options.size, rng).save(folder / name)
        prompt, response = question(kind, seen, rng)
        rows.append({"image": name, "kind": kind, "prompt": prompt, "response": response})
    write_rows(folder / f"{split}.jsonl", rows)
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if options.size < 16:
        raise UserError(f"size = {options.size} is too small to tell shapes apart: 16 is the least")
    folder = DATA_ROOT / "shapes"
    made_of = dataclasses.asdict(dataclasses.replace(options, overwrite=False))
    if read_object(folder / MADE_OF) == made_of:
        print(f"{folder} is prepared already")
    elif folder.exists() and not options.overwrite:
        raise UserError(f"{folder} has other pictures: --overwrite=True replaces them")
    else:
        with new_directory(folder) as temporary:
            (temporary / "pictures").mkdir()
            write_split(temporary, "train", options.count, options)
            test = write_split(temporary, "test", options.test, options)
            pictures = [row["image"] for row in test]
            random.Random(options.seed).shuffle(pictures)
            write_rows(temporary / "shuffled.jsonl", [row | {"image": name} for row, name in zip(test, pictures)])
            (temporary / MADE_OF).write_text(json.dumps(made_of, indent=1) + "\n")
        print(f"{folder}: {counted(options.count, 'question')} to train on and {options.test:,} for the test")
    texts = (json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines())
    text = Text("".join(f"{row['prompt']} {row['response']}\n" for row in texts), f"the questions of {folder}")
    prepare_documents(text, CorpusSettings(tokenizer="char", overwrite=options.overwrite), "shapes_text")


if __name__ == "__main__":
    entry_point(main)()
