"""Baselines of words alone, on sets whose words decide all, half or nothing."""

import sys

import pytest

import gpt1_baselines
from gpt_arc.errors import UserError
from helpers import write


@pytest.fixture
def folder(tmp_path):
    """`package` and `related` are decided by a word, `follows` by the order of words alone."""
    pairs = [("red fox", "ab"), ("blue whale", "cd")] * 10
    sets = {
        "package": [{"text": f"{text} number {i}", "label": label} for i, (text, label) in enumerate(pairs)],
        "follows": [
            {"premise": "one two", "hypothesis": order, "label": label}
            for order, label in (("three four", "yes"), ("four three", "no"))
        ] * 10,
        "related": [{"text_a": text, "text_b": f"and {text}", "label": label} for text, label in pairs],
        "next_sentence": [
            {"context": "the red fox ran", "options": ["the the the", "a red fox", "no word"], "label": 1},
            {"context": "the blue whale swam", "options": ["the whale", "the fox ran", "the red ran"], "label": 1},
            {"context": "the the the", "options": ["a", "b", "c"], "label": 2},
        ],
    }  # fmt: skip
    for name, rows in sets.items():
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.jsonl", rows)
    return tmp_path


def test_words_decide_what_they_can(folder, monkeypatch, capsys):
    accuracies = gpt1_baselines.accuracies(folder)
    assert accuracies == pytest.approx({"package": 1, "follows": 0.5, "related": 1, "next_sentence": 1 / 3})
    monkeypatch.setattr(sys, "argv", ["gpt1_baselines.py", f"--data={folder}"])
    gpt1_baselines.main()
    assert "next_sentence     33.3%" in capsys.readouterr().out


def test_missing_sets_are_named(tmp_path):
    with pytest.raises(UserError, match="package/train.jsonl: write it with python examples/gpt1_data.py"):
        gpt1_baselines.accuracies(tmp_path)
