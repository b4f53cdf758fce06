"""stages/eval.py on questions about images, and the pictures of prepare/shapes.py."""

import json
import string
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.evaluation.reader import Reader
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.images import read_image
from gpt_arc.vision.model import VisionGPT, save_vision
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.directory import save_model
from helpers import randomised, write
from model import GPT, GPTConfig
from prepare import digits, shapes, words
from stages import eval as evaluation

LETTERS = CharTokenizer("abcdefgh")
COLOURS = ("red", "blue", "lime", "black", "white")
TASK = 'title = "t"\nkind = "generate"\nimage = "image"\ncontext = "{q}"\nanswer = "{a}"\nmax_new_tokens = 4\n'


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        Image.new("RGB", (8, 8), colour).save(f"{colour}.png")
    chat = ChatFormat.new(TEMPLATES["markers"], LETTERS, 8)
    encoder = ImageEncoder(EncoderConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=8))
    text = GPT(GPTConfig(24, chat.vocab_size, 2, 2, 16))
    model = randomised(VisionGPT(text, encoder, Projector(ProjectorConfig(), 8, 16)), seed=42, scale=0.6)
    save_model(model.text, LETTERS, "seen")
    save_vision(model, Path("seen"))
    for folder in ("seen", "text"):
        save_model(model.text, LETTERS, folder)
        chat.save(folder)
    Path("images.toml").write_text(TASK)
    return model, chat


@pytest.fixture
def measure(model, stage_runner):
    return partial(stage_runner, evaluation)


@torch.no_grad()
def answer(model, chat, colour, question):
    """The greedy answer by full forward passes."""
    tokens = chat.prompt([Turn("user", f"<image>{question}", images=(range(-1, -5, -1),))])
    pixels = model.preprocessing.pixels(read_image(Path(f"{colour}.png")), 8)[None]
    response = []
    for _ in range(4):
        response.append(model(torch.tensor([tokens + response]), pixels=pixels)[0, -1].argmax().item())
    return chat.decode(response)


@pytest.mark.parametrize("batch_tokens", [8192, 30])
def test_exact_match_is_that_of_full_forward_passes(batch_tokens, model, measure):
    rows = [(colour, question) for colour in COLOURS for question in ("abc", "d", "abc" * 2)]
    answers = [answer(*model, *row) for row in rows]
    assert len(set(answers)) > 2
    wrong = [text if i % 3 else "hgfh" for i, text in enumerate(answers)]
    items = [{"image": f"{colour}.png", "q": question, "a": a} for (colour, question), a in zip(rows, wrong)]
    write("items.jsonl", items)
    flags = ("seen", "--chat=True", "--tasks=images.toml", "--data=items.jsonl", "--device=cpu", "--json=report.json")
    measure(*flags, f"--batch_tokens={batch_tokens}")
    (result,) = json.loads(Path("report.json").read_text())["models"][0]["tasks"]
    assert result["values"] == [float(i % 3 > 0) for i in range(len(rows))]


CHOICE = 'title = "t"\nkind = "choice"\nimage = "image"\ncontext = "{q}"\noptions = "options"\nanswer = "{best}"\n'


@torch.no_grad()
@pytest.mark.parametrize("batch_tokens", [8192, 30])
def test_options_are_scored_as_by_full_forward_passes(batch_tokens, model, measure):
    (vision, chat), options, items, expected = model, ["a", "bcd", "ef"], [], []
    for colour in COLOURS:
        for question in ("abc", "d", "abc" * 2):
            prompt = chat.prompt([Turn("user", f"<image>{question}", images=(range(-1, -5, -1),))])
            pixels = vision.preprocessing.pixels(read_image(Path(f"{colour}.png")), 8)[None]
            for option in options:
                tokens = LETTERS.encode(option)
                logits = vision(torch.tensor([prompt + tokens]), pixels=pixels)[0, len(prompt) - 1 : -1]
                expected.append(logits.log_softmax(-1)[range(len(tokens)), tokens].sum().item())
            best = max(range(3), key=lambda i: expected[i - 3])
            items.append({"image": f"{colour}.png", "q": question, "options": options, "best": best})
    assert len(set(expected)) == 45
    reader = Reader(vision.text, LETTERS, batch_tokens, chat, vision)
    pairs = [(item["q"], option) for item in items for option in options]
    paths = [Path(item["image"]) for item in items for _ in options]
    scores = reader.score_about_images(pairs, paths, "choice", ["item"] * 45)
    assert [score.log_probability for score in scores] == pytest.approx(expected, abs=1e-4)

    Path("choice.toml").write_text(CHOICE)
    write("items.jsonl", [item | {"best": (item["best"] + (i % 3 == 0)) % 3} for i, item in enumerate(items)])
    flags = ("seen", "--chat=True", "--tasks=choice.toml", "--data=items.jsonl", "--device=cpu", "--json=report.json")
    measure(*flags, f"--batch_tokens={batch_tokens}")
    (result,) = json.loads(Path("report.json").read_text())["models"][0]["tasks"]
    assert result["values"] == [float(i % 3 > 0) for i in range(15)] and result["chance"] == pytest.approx(1 / 3)
    write("items.jsonl", [items[0] | {"q": "a" * 20}])
    assert "choice, item 1, option 0: a question about an image takes 26 tokens" in measure(*flags).message


@pytest.mark.parametrize(
    "flags, item, message",
    [
        (("text", "--chat=True"), {}, "are for a chat model trained on them"),
        (("seen",), {}, "add --chat=True"),
        (("seen", "--chat=True", "--shots=1"), {}, "leave shots out"),
        (("seen", "--chat=True"), {"image": "../a.png"}, "images, item 1: the image ../a.png is outside"),
        (("seen", "--chat=True"), {"image": "none.png"}, "none.png is missing"),
        (("seen", "--chat=True"), {"image": None}, "item 1: the image 'None' is not the name of a file"),
        (("seen", "--chat=True"), {"q": "a" * 20}, "a question about an image takes 26 tokens"),
    ],
    ids=str,
)
def test_questions_that_cannot_be_put_are_refused(flags, item, message, measure):
    write("items.jsonl", [{"image": "red.png", "q": "a", "a": "b"} | item])
    refused = measure(*flags, "--tasks=images.toml", "--data=items.jsonl", "--device=cpu")
    assert refused.code == 2 and message in refused.message, refused.message


# ---- shapes


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["shapes.py", "--labelled=20", *flags])
        shapes.main()
        return {
            split: [json.loads(line) for line in Path(f"data/shapes/{split}.jsonl").read_text().splitlines()]
            for split in ("train", "test", "pairs", "shuffled", "labels", "descriptions")
        }

    return call


def seen_in(path, background=(255, 255, 255)):
    """The colours in a picture, and the quarters that each is in."""
    image = Image.open(path)
    half = image.width // 2
    names = {value: name for name, value in shapes.COLOURS.items()}
    return {
        (names[value], (x >= half) + 2 * (y >= half))
        for x in range(image.width)
        for y in range(image.height)
        if (value := image.getpixel((x, y))) != background
    }


def test_pictures_show_what_the_answers_say(prepare):
    splits = prepare("--count=60", "--test=40")
    for row in splits["train"] + splits["test"] + splits["pairs"]:
        seen = seen_in(f"data/shapes/{row['image']}")
        words = row["prompt"].rstrip("?").split()
        if row["kind"] == "colour":
            assert row["response"] in {colour for colour, _ in seen}
        elif row["kind"] == "count":
            assert shapes.NUMBERS.index(row["response"]) == len(seen)
        elif row["kind"] == "position":
            assert (words[3], shapes.QUARTERS.index(row["response"])) in seen
        elif row["kind"] == "shape":
            assert words[-1] in {colour for colour, _ in seen} and row["response"] in shapes.SHAPES
        else:
            assert len(seen) > 1 and row["response"] in row["prompt"]
    assert {row["kind"] for row in splits["test"]} == set(shapes.KINDS)


def test_no_training_picture_has_a_held_out_combination_and_every_test_picture_has(monkeypatch, prepare):
    drawn = []
    monkeypatch.setattr(shapes, "draw", lambda seen, size, rng: drawn.append(seen) or Image.new("RGB", (size, size)))
    splits = prepare("--count=200", "--test=50")
    triples, pairs = set(shapes.THINGS["test"]), {thing.pair for thing in shapes.THINGS["pairs"]}
    assert pairs == set(shapes.HELD_OUT) and len(triples) == 10 and not pairs & {thing.pair for thing in triples}
    trained, test, of_pairs, labelled = drawn[:200], drawn[200:250], drawn[250:300], drawn[300:]
    for seen in (*trained, *labelled):
        assert not triples & set(seen) and not pairs & {thing.pair for thing in seen}
    assert all(len({value for thing in seen for value in thing}) == 3 * len(seen) <= 9 for seen in drawn)
    assert all(seen[0] in triples for seen in test) and all(seen[0].pair in pairs for seen in of_pairs)
    for row, (thing,) in zip(splits["labels"], labelled, strict=True):
        assert (row["shape"], row["quarter"]) == (thing.shape, shapes.QUARTERS[thing.quarter])
        assert row["colour"] == thing.colour or row["colour"] is None and thing.colour not in shapes.COLOURS
    assert [row["colour"] is None for row in splits["labels"]] == [False, True] * 10
    for row, question, seen in zip(splits["descriptions"], splits["train"], trained, strict=True):
        described = {frozenset(part.split()) for part in row["response"].split(", ")}
        things = {frozenset((*thing.pair, *shapes.QUARTERS[thing.quarter].split())) for thing in seen}
        assert row["image"] == question["image"] and described == things
    shuffled = zip(splits["test"], splits["shuffled"])
    assert all(a["prompt"] == b["prompt"] and a["response"] == b["response"] for a, b in shuffled)
    assert sorted(row["image"] for row in splits["shuffled"]) == sorted(row["image"] for row in splits["test"])


def test_answers_drawn_at_random_fit_their_questions(prepare):
    rows = prepare("--count=200", "--test=5")["train"]
    lines = Path("data/shapes/texts.txt").read_text().splitlines()
    assert lines[::4] == [row["prompt"] for row in rows] and set(lines[2::4]) == {shapes.DESCRIBE}
    described = {tuple(part.split()[:2]) for line in lines[3::4] for part in line.split(", ")}
    assert described >= {*shapes.HELD_OUT, *(pair[::-1] for pair in shapes.HELD_OUT)}
    for row, answer in zip(rows, lines[1::4]):
        words = row["prompt"].rstrip("?").split(" or ")
        answers = {
            "colour": shapes.COLOURS, "shape": shapes.SHAPES, "count": shapes.NUMBERS, "position": shapes.QUARTERS,
            "relation": ("left of", "right of") if "left of" in words[0] else ("above", "below"),
        }[row["kind"]]  # fmt: skip
        assert answer in answers
    right = sum(answer == row["response"] for row, answer in zip(rows, lines[1::4]))
    assert right < 100  # as often as guessing


def test_the_same_seed_draws_the_same_and_another_is_not_mixed_in(prepare, capsys):
    first = prepare("--count=10", "--test=5")
    picture = Path("data/shapes/pictures/test-000003.png").read_bytes()
    assert prepare("--count=10", "--test=5") == first and "prepared already" in capsys.readouterr().out
    with pytest.raises(UserError, match="has other pictures"):
        prepare("--count=10", "--test=5", "--seed=1")
    assert prepare("--count=10", "--test=5", "--seed=1", "--overwrite=True") != first
    assert prepare("--count=10", "--test=5", "--overwrite=True") == first
    assert Path("data/shapes/pictures/test-000003.png").read_bytes() == picture
    with pytest.raises(UserError, match="size = 8 is too small"):
        prepare("--size=8")


# ---- digits


def test_digits_are_divided_once_and_moved_only_for_labels(tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.chdir(tmp_path)
    few = load_digits()
    few.images, few.target = few.images[:40], few.target[:40]
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: few)
    monkeypatch.setattr(sys, "argv", ["digits.py"])
    digits.main()
    names = ("train", "test", "shuffled", "labels")
    train, test, shuffled, labels = (
        [json.loads(line) for line in Path(f"data/digits/{name}.jsonl").read_text().splitlines()] for name in names
    )
    assert len(train) == 32 and len(test) == 8 and len(labels) == 9 * 32
    numbers = [{int(Path(row["image"]).name[:4]) for row in rows} for rows in (train, test, labels)]
    assert numbers[0] | numbers[1] == set(range(40)) and not numbers[0] & numbers[1] and numbers[2] == numbers[0]
    for row in train + test:
        number = int(Path(row["image"]).name[:4])
        assert row["response"] == digits.WORDS[few.target[number]]
        drawn = np.asarray(Image.open(f"data/digits/{row['image']}"))
        assert np.abs(drawn / 255 - few.images[number] / 16).max() < 0.01
    moved = {row["image"]: np.asarray(Image.open(f"data/digits/{row['image']}")) for row in labels}
    still, right_down = (moved[f"pictures/{min(numbers[0]):04}-{move}.png"] for move in (0, 8))
    assert digits.MOVES[8] == (1, 1) and (right_down[1:, 1:] == still[:-1, :-1]).all() and not right_down[0].any()
    assert [row["response"] for row in shuffled] == [row["response"] for row in test]
    assert sorted(row["image"] for row in shuffled) == sorted(row["image"] for row in test)


# ---- words


def cells():
    """The letter that each possible content of a cell shows."""
    font, shown = ImageFont.load_default_imagefont(), {}
    for letter in string.ascii_uppercase:
        for left, top in product(range(3), range(-3, -1)):
            cell = Image.new("L", (8, 8), "white")
            ImageDraw.Draw(cell).text((left, top), letter, fill="black", font=font)
            assert shown.setdefault(cell.tobytes(), letter) == letter
    return shown


def test_words_are_legible_and_those_of_the_test_are_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["words.py", "--count=60", "--test=20"])
    words.main()
    names = ("train", "test", "shuffled", "labels")
    train, test, shuffled, labels = (
        [json.loads(line) for line in Path(f"data/words/{name}.jsonl").read_text().splitlines()] for name in names
    )
    assert len(train) == len(labels) == 60 and len(test) == 20
    assert not {row["response"] for row in train} & {row["response"] for row in test}
    for row, label in zip(train, labels):
        assert label["image"] == row["image"] and "".join(label[place] for place in words.PLACES) == row["response"]
    shown = cells()
    for row in train + test:
        image = Image.open(f"data/words/{row['image']}")
        letters = (shown[image.crop((x, 16, x + 8, 24)).tobytes()] for x in range(0, 40, 8))
        assert "".join(letters) == row["response"] and image.getcolors()[0][0] == np.sum(np.asarray(image)[16:24] == 0)
    assert [row["response"] for row in shuffled] == [row["response"] for row in test]
    assert sorted(row["image"] for row in shuffled) == sorted(row["image"] for row in test)
    texts = set(Path("data/words/texts.txt").read_text().splitlines())
    assert words.QUESTION in texts and not texts & {row["response"] for row in train + test}
    monkeypatch.setattr(sys, "argv", ["words.py", "--count=1000000"])
    with pytest.raises(UserError, match="words: 1,000,000 are the most"):
        words.main()
