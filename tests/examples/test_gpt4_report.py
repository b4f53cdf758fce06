"""The table and the pictures of examples/gpt4_arc.sh."""

import json
from pathlib import Path

import pytest
from PIL import Image

import gpt4_report
from gpt_arc.chat.format import TEMPLATES, ChatFormat
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import entry_point
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.model import VisionGPT, save_vision
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.directory import save_model
from helpers import write
from model import GPT, GPTConfig

LETTERS = CharTokenizer("abcdefgh")


def results(task, **values):
    """A task's items, each with the value that a test gave it, by test."""
    folder = Path("out/gpt4_arc", task)
    folder.mkdir(parents=True)
    Path("data", task).mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(f"data/{task}/red.png")
    for test, pairs in values.items():
        rows = [{"image": "red.png", "prompt": "abc", "response": "d", **({"kind": kind} if kind else {})}
                for kind, _ in pairs]  # fmt: skip
        write(f"data/{task}/{test}.jsonl", rows)
        task_result = {"values": [value for _, value in pairs]}
        (folder / f"{test}.json").write_text(json.dumps({"models": [{"tasks": [task_result]}]}))
    encoder, chat = ImageEncoder(EncoderConfig(8, 4, 1, 2, 12)), ChatFormat.new(TEMPLATES["markers"], LETTERS, 8)
    text = GPT(GPTConfig(64, chat.vocab_size, 1, 2, 16))
    save_model(text, LETTERS, folder / "seen")
    chat.save(folder / "seen")
    save_vision(VisionGPT(text, encoder, Projector(ProjectorConfig(), 12, 16)), folder / "seen")


def test_shares_are_counted_by_kind_and_answers_are_drawn(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    main = entry_point(gpt4_report.main)
    assert "has no results: run bash examples/gpt4_arc.sh first" in output_of(main, "gpt4_report.py")
    seen = [("colour", 1.0), ("count", 1.0), ("colour", 0.0), ("count", 1.0)] * 3
    results("shapes", test=seen, pairs=[("colour", 0.0), ("count", 1.0)], shuffled=[("colour", 0.0), ("count", 0.0)])
    results("digits", test=[("", 1.0)] * 9 + [("", 0.0)], shuffled=[("", 0.0)])
    expected = (
        "| right answers, % | test | held-out pairs | shuffled pictures |\n|---|---|---|---|\n"
        "| colour | 50.0 | 0.0 | 0.0 |\n| count | 100.0 | 100.0 | 0.0 |\n| shapes, all | 75.0 | 50.0 | 0.0 |\n"
        "| digits | 90.0 |  | 0.0 |\n"
    )
    assert output_of(main, "gpt4_report.py") == expected == Path("out/gpt4_arc/table.md").read_text()
    for task in ("shapes", "digits"):
        assert Image.open(f"out/gpt4_arc/{task}/answers.png").size == (720, 600)


@pytest.mark.parametrize("task", gpt4_report.TASKS)
def test_each_task_has_its_files(task):
    root = Path(gpt4_report.__file__).parent
    assert (root / f"{task}_encoder.toml").is_file() and (root.parent / "prepare" / f"{task}.py").is_file()
