"""examples/in_context_labels.py: its tasks, what random labels leave of a learner, and the command."""

import pytest
import torch

import in_context_labels
from gpt_arc.errors import entry_point
from gpt_arc.reading import read_json
from helpers import ROOT
from in_context_labels import CHOSEN, LABELS, LETTERS, SHOTS, TRAINED_ON


def generator():
    return torch.Generator().manual_seed(0)


def test_a_letter_has_one_label_in_a_task():
    tasks = in_context_labels.new_tasks(50, generator())
    pairs = in_context_labels.draw(tasks, generator())
    assert pairs.shape == (50, SHOTS + 1, 2)
    used = set()
    for task, row in zip(tasks.tolist(), pairs.tolist()):
        labels = dict(task)
        assert len(labels) == CHOSEN and all(labels[letter] == label for letter, label in row)
        assert max(labels) < LETTERS <= min(labels.values()) and max(labels.values()) < LETTERS + LABELS
        used.add(frozenset(labels))
    assert len(used) == 50


def test_noise_replaces_labels_alone():
    pairs = in_context_labels.draw(in_context_labels.new_tasks(500, generator()), generator())
    for noise in (0.0, 0.5, 1.0):
        noisy = in_context_labels.with_noise(pairs, noise, generator())
        assert torch.equal(noisy[..., 0], pairs[..., 0]) and noisy[..., 1].min() >= LETTERS
        changed = (noisy[..., 1] != pairs[..., 1]).double().mean().item()
        assert changed == pytest.approx(noise * (1 - 1 / LABELS), abs=0.02)


class Copier:
    """Answers with the label that the letter last had in the prompt, or else with `default`."""

    def __init__(self, default):
        self.default = default

    def __call__(self, tokens):
        logits = torch.zeros(*tokens.shape, LETTERS + LABELS)
        for i, (*shown, letter) in enumerate(tokens.tolist()):
            logits[i, -1, dict(zip(shown[::2], shown[1::2])).get(letter, self.default)] = 1
        return logits


class Knower:
    """Answers with the label of the letter in its own task, whatever the labels of the prompt."""

    def __init__(self, tasks):
        self.tasks = [dict(task) for task in tasks.tolist()]

    def __call__(self, tokens):
        logits = torch.zeros(*tokens.shape, LETTERS + LABELS)
        for i, (*_, letter) in enumerate(tokens.tolist()):
            logits[i, -1, self.tasks[i][letter]] = 1
        return logits


def test_random_labels_cost_a_copier_all_and_a_knower_nothing():
    tasks = in_context_labels.new_tasks(2000, generator())
    copied = in_context_labels.test(Copier(LETTERS), tasks, generator())
    missing = (1 - 1 / CHOSEN) ** SHOTS  # the letter isn't in the demonstrations
    assert copied["right"] == pytest.approx(1 - missing * (1 - 1 / LABELS), abs=0.03)
    assert copied["random"] == pytest.approx(1 / LABELS, abs=0.03) == copied["none"]
    assert in_context_labels.test(Knower(tasks), tasks, generator()) == {"right": 1, "random": 1, "none": 1}


def test_the_command_continues(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    flags = "--max_iters=2 --width=8 --batch_size=4 --sequences=20 --output=out/try".split()
    main = entry_point(in_context_labels.main)
    for seeds in (1, 2):
        output = output_of(main, "in_context_labels.py", *flags, f"--seeds={seeds}")
    runs = read_json(tmp_path / "out/try/figures.json")["runs"]
    cases = [(trained_on, noise) for noise in (0.0, 0.5) for trained_on in TRAINED_ON]
    assert [(run["trained_on"], run["noise"]) for run in runs] == 2 * cases
    assert output.count("±") == 2 * len(cases) * 4
    assert (tmp_path / "out/try/labels.png").stat().st_size > 5000


@pytest.mark.parametrize(("flag", "reason"), [("--width=9", "n_embd = 9"), ("--pool=0", "must be at least 1")])
def test_mistakes_are_refused(flag, reason, tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    assert reason in output_of(entry_point(in_context_labels.main), "in_context_labels.py", flag)
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_figures_of_the_run():
    page = (ROOT / "docs/results/in_context.md").read_text()
    for cells in in_context_labels.rows(read_json(ROOT / "docs/results/in_context_labels.json")["runs"]):
        assert f"| {' | '.join(cells)} |" in page
