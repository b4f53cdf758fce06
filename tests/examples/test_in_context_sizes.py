"""examples/in_context_sizes.py: its sequences, its metrics beside loops over words, and the command."""

import json

import pytest
import torch

import in_context_sizes
from gpt_arc.errors import entry_point
from helpers import ROOT, randomised
from in_context_sizes import LENGTH, LETTERS, SHOTS, WORDS, Options
from model import GPT

RESULTS = ROOT / "docs/results"


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("task", in_context_sizes.TASKS)
def test_every_letter_is_followed_by_its_image(task):
    images = in_context_sizes.mappings(task, 50, generator())
    assert images.sort(-1).values.tolist() == [[*range(LETTERS)]] * 50
    steps = (images - torch.arange(LETTERS)) % LETTERS
    assert (steps == steps[:, :1]).all() == (task == "shift")
    assert len(images.unique(dim=0)) == (LETTERS if task == "shift" else 50)
    tokens = in_context_sizes.draw(images, generator(), fewest=2)
    assert tokens.shape == (50, 2 * LENGTH * WORDS)
    for row, image in zip(tokens.tolist(), images.tolist()):
        assert all(image[letter] == after for letter, after in zip(row[::2], row[1::2]))
    assert {len(set(row)) for row in tokens[:, ::2].tolist()} == {*range(2, LETTERS + 1)}
    whole = in_context_sizes.draw(images, generator())[:, ::2].tolist()
    assert min(len(set(row)) for row in whole) >= LETTERS - 1


def test_metrics_are_those_of_a_loop_over_words():
    options = Options(sequences=7, seed=3)
    model = randomised(GPT(options.model(8)))
    report = in_context_sizes.test(model, "shift", options)
    assert report["parameters"] == 2 * 12 * 8 * 8 + 5 * 8 + 2 * 2 * 8  # matrices, norms, norms of queries and keys
    seeded = torch.Generator().manual_seed(4)
    tokens = in_context_sizes.draw(in_context_sizes.mappings("shift", 7, seeded), seeded)
    scores = model(tokens).log_softmax(-1)
    for i, shots in enumerate(SHOTS):
        right, log_probabilities = [], []
        for row, score in zip(tokens.tolist(), scores):
            places = [2 * (LENGTH * shots + j) for j in range(LENGTH)]  # of the word's letters
            right.append([int(score[p].argmax()) == row[p + 1] for p in places])
            log_probabilities.append(sum(score[p, row[p + 1]].item() for p in places) / LENGTH)
        assert report["exact match"]["mean"][i] == pytest.approx(sum(map(all, right)) / 7)
        assert report["letters right"]["mean"][i] == pytest.approx(sum(map(sum, right)) / 7 / LENGTH)
        assert report["log-probability"]["mean"][i] == pytest.approx(sum(log_probabilities) / 7, rel=1e-5)
        error = torch.tensor(log_probabilities).std().item() / 7**0.5
        assert report["log-probability"]["standard error"][i] == pytest.approx(error, rel=1e-4)


def test_the_command_writes_figures_and_a_picture(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    flags = "--widths 4 8 --max_iters=2 --batch_size=2 --sequences=20 --output=out/try".split()
    output = output_of(entry_point(in_context_sizes.main), "in_context_sizes.py", *flags)
    figures = json.loads((tmp_path / "out/try/figures.json").read_text())
    assert [(f["task"], f["width"]) for f in figures] == [(t, w) for t in in_context_sizes.TASKS for w in (4, 8)]
    assert all(len(f["exact match"]["mean"]) == len(SHOTS) for f in figures)
    assert all(-4 < f["log-probability"]["mean"][0] < -2 for f in figures)
    assert output.count(str(figures[0]["parameters"])) >= 2
    assert (tmp_path / "out/try/accuracy.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--widths=5", "must be even"),
        ("--max_iters=0", "must be at least 1"),
        ("--width=4", "did you mean --widths"),
    ],
)
def test_mistakes_are_refused(flag, reason, tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    assert reason in output_of(entry_point(in_context_sizes.main), "in_context_sizes.py", flag)
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_figures_of_the_run():
    reports = json.loads((RESULTS / "in_context_sizes.json").read_text())
    page = (RESULTS / "in_context.md").read_text()
    names = "exact match", "log-probability"
    for report in reports:
        exact, scores = (report[name]["mean"] for name in names)
        by_letters = report["letters right"]["mean"][-1] ** LENGTH
        cells = [f"{report['parameters']:,}", *(f"{100 * value:.1f}" for value in [*exact, by_letters])]
        assert f"| {' | '.join([*cells, *(f'{score:.2f}' for score in scores)])} |" in page
        assert abs(exact[-1] - by_letters) < 0.031
        assert all(max(report[name]["standard error"]) < bound for name, bound in zip(names, (0.016, 0.04)))
    of_permutations = [report for report in reports if report["task"] == "permutation"]
    exact, scores = ([report[name]["mean"][-1] for report in of_permutations] for name in names)
    first, of_scores = ((values[1] - values[0]) / (values[-1] - values[0]) for values in (exact, scores))
    assert f"{of_scores:.0%} of its whole rise, where exact match makes {first:.0%}" in page.replace("\n", " ")
    second = (exact[2] - exact[1]) / (exact[-1] - exact[0])
    assert f"from 918 to 1,608 parameters alone is {second:.0%} of its whole rise" in page
