"""examples/gpt1_zero_shot.py: its two figures against sums over every token and pair, and the command."""

import json
import random
from itertools import product
from pathlib import Path

import pytest
import torch

import gpt1_zero_shot
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import entry_point
from gpt_arc.evaluation.reader import Reader
from gpt_arc.reading import read_json
from gpt_arc.weights.directory import save_model
from helpers import ROOT, randomised, write
from model import GPT, GPTConfig

LETTERS = CharTokenizer(" abcdefg")
TINY = GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=8)
LSTM = GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=2, n_embd=8, mixer="lstm", positions="none")
MAIN = entry_point(gpt1_zero_shot.main)


def word(rng):
    return "".join(rng.choices("abcdefg", k=rng.randint(1, 5)))


RNG = random.Random(0)
CHOICES = [
    {"context": word(RNG), "options": [word(RNG) + "abcd"[k] for k in range(4)], "label": i % 4} for i in range(24)
]
HALVES = [{"premise": word(RNG), "hypothesis": word(RNG), "label": ("yes", "no")[i % 3 == 0]} for i in range(18)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with labelled sets, and two checkpoints of a GPT and of an LSTM."""
    monkeypatch.chdir(tmp_path)
    for task, rows in (("next_sentence", CHOICES), ("follows", HALVES)):
        Path("data/gpt1_arc", task).mkdir(parents=True)
        write(f"data/gpt1_arc/{task}/test.jsonl", rows)
    for (name, config), seed in product((("gpt", TINY), ("lstm", LSTM)), (1, 2)):
        run = Path("out/relatives", name, str(seed))
        for step in (25, 50):
            save_model(randomised(GPT(config), seed=step + seed), LETTERS, run / f"step-{step:08}")
        lines = [{"step": 25, "val_loss": 3.0}, {"step": 30, "train_loss": 2.5}, {"step": 50, "val_loss": 2.0 + seed}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def mean_log_probability(model, context, text):
    """By one pass over the whole text, token by token."""
    before, tokens = LETTERS.encode(context), LETTERS.encode(f"{context} {text}")
    log_probabilities = model(torch.tensor([tokens]))[0].log_softmax(-1)
    each = [log_probabilities[i - 1, tokens[i]].item() for i in range(len(before), len(tokens))]
    return sum(each) / len(each)


@pytest.mark.parametrize("config", [TINY, LSTM], ids=["gpt", "lstm"])
def test_the_figures_are_those_of_each_text_alone(config, workplace):
    model = randomised(GPT(config), seed=3)
    reader, data = Reader(model, LETTERS, 64), Path("data/gpt1_arc")
    right = []
    for item in CHOICES:
        scores = [mean_log_probability(model, item["context"], option) for option in item["options"]]
        right.append(scores.index(max(scores)) == item["label"])
    assert 0 < sum(right) < 24 and gpt1_zero_shot.next_sentence(reader, data) == pytest.approx(sum(right) / 24)
    scores = {label: [] for label in ("yes", "no")}
    for item in HALVES:
        scores[item["label"]].append(mean_log_probability(model, item["premise"], item["hypothesis"]))
    pairs = [yes > no for yes, no in product(scores["yes"], scores["no"])]
    assert gpt1_zero_shot.follows(reader, data) == pytest.approx(sum(pairs) / len(pairs))


def test_the_area_under_the_curve():
    higher, lower = [0.1, 0.4, 0.35, 0.8, 0.4], [0.2, 0.4, 0.3]
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(higher, lower)]
    assert gpt1_zero_shot.ranked(higher, lower) == pytest.approx(sum(wins) / 15)
    metrics = pytest.importorskip("sklearn.metrics")
    area = metrics.roc_auc_score([1] * 5 + [0] * 3, higher + lower)
    assert gpt1_zero_shot.ranked(higher, lower) == pytest.approx(area)
    assert gpt1_zero_shot.ranked([2.0, 3.0], [0.0, 1.0]) == 1.0


def test_the_command_continues(workplace, output_of):
    flags = "--models", "gpt", "lstm", "--seeds", "1", "2", "--steps", "25"
    output_of(MAIN, "gpt1_zero_shot.py", *flags)
    first = read_json(Path("out/gpt1_zero_shot/figures.json"))["runs"]
    output = output_of(MAIN, "gpt1_zero_shot.py", *flags, "50")
    runs = read_json(Path("out/gpt1_zero_shot/figures.json"))["runs"]
    grid = [(step, model, seed) for step in (25, 50) for model in ("gpt", "lstm") for seed in (1, 2)]
    assert runs[:4] == first and [(run["step"], run["model"], run["seed"]) for run in runs] == grid
    table = Path("out/gpt1_zero_shot/table.md").read_text()
    assert table in output and table.startswith("| after updates | 25 | 50 |\n|---|---|---|\n")
    assert "\n| val loss: LSTM | 3.000 ± 0.000 | 3.500 ± 0.500 |\n" in table and "sentences shuffled" not in table
    cells = []
    for step in (25, 50):
        one, other = (100 * run["follows"] for run in runs if (run["model"], run["step"]) == ("gpt", step))
        cells.append(f"{(one + other) / 2:.1f} ± {abs(one - other) / 2:.1f}")
    assert f"\n| `follows`, % of pairs: GPT | {' | '.join(cells)} |\n" in table
    assert Path("out/gpt1_zero_shot/zero_shot.png").stat().st_size > 8000


def test_a_missing_checkpoint_is_refused(workplace, output_of):
    refused = output_of(MAIN, "gpt1_zero_shot.py", "--models", "gpt", "--steps", "7")
    assert "has no checkpoint of step 7: run bash examples/relatives_arc.sh first" in refused


def test_the_page_has_the_figures_of_the_run():
    runs = read_json(ROOT / "docs/results/gpt1_zero_shot.json")["runs"]
    assert gpt1_zero_shot.table(runs) in (ROOT / "docs/results/gpt1_arc.md").read_text()
