"""new.py, from files to a sample. train.py runs in this process instead of its own."""

import sys
from types import SimpleNamespace

import pytest
import torch

import new
import train
from gpt_arc.errors import entry_point
from gpt_arc.files import resource
from gpt_arc.training import threads
from gpt_arc.training.config import build_config, read_settings
from helpers import TEXT


@pytest.fixture
def called(monkeypatch):
    """The commands that new.py starts."""
    commands = []

    def call(command):
        commands.append([str(part) for part in command[1:]])
        monkeypatch.setattr(sys, "argv", commands[-1])
        with pytest.raises(SystemExit) as stop:
            entry_point(train.main)()
        return stop.value.code

    monkeypatch.setattr(new, "subprocess", SimpleNamespace(call=call))
    return commands


@pytest.fixture
def start(tmp_path, monkeypatch, stage_runner, called):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threads, "tokens_per_second", lambda config, device, dtype: 10_000)
    return lambda *flags: stage_runner(new, *flags)


def test_a_book_becomes_a_dataset_a_config_a_run_and_a_sample(start, called, tmp_path):
    (tmp_path / "my sums.txt").write_text(TEXT)
    output = start("my sums.txt", "--minutes=0.01")
    assert "recipe         ngrams, 3 steps, " in output and "about 0.46 seconds" in output
    assert "sample of step 3:" in output and "finished step 3: best val loss" in output
    assert (tmp_path / "out" / "my-sums" / "best" / "model.safetensors").exists()
    assert [command[1] for command in called] == ["data/my-sums.toml"]
    assert output.count("next:") == 1 and "python sample.py out/my-sums" in output
    settings = read_settings(tmp_path / "data" / "my-sums.toml")
    assert settings["dataset"] == "my-sums" and settings["vocab_size"] == len(set(TEXT)) and settings["max_iters"] == 3


def test_a_folder_and_a_file_are_one_text_and_the_config_repeats_the_run(start, stage_runner, tmp_path):
    (tmp_path / "poems").mkdir()
    for number in range(3):
        (tmp_path / "poems" / f"{number}.txt").write_text(TEXT)
    (tmp_path / "more.jsonl").write_text('{"text": "One line more."}\n')
    assert "4 files" in start("poems", "more.jsonl", "--minutes=0.005")
    assert "run            out/poems-2" in stage_runner(train, "data/poems.toml")
    first, second = (tmp_path / "out" / name / "last" / "model.safetensors" for name in ("poems", "poems-2"))
    assert first.read_bytes() == second.read_bytes()


def test_what_training_returns_ends_it(start, called, monkeypatch, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.setattr(new.subprocess, "call", lambda command: called.append(command) or 130)
    assert start("book.txt", "--minutes=0.01").code == 130
    assert len(called) == 1


def test_no_text_and_no_file_are_refused(start):
    assert "name a text: python new.py book.txt" in start().message
    assert "missing.txt can't be read" in start("missing.txt").message


def test_a_text_too_short_to_learn_from_is_refused(start, called, tmp_path):
    (tmp_path / "short.txt").write_text("hello " * 15)
    assert "90 tokens in data/short are too few to learn from: name a longer text" in start("short.txt").message
    (tmp_path / "longer.txt").write_text("hello " * 17)
    assert "finished step" in start("longer.txt", "--minutes=0.01")


def test_the_rate_counts_the_tokens_of_a_step(monkeypatch):
    config = build_config(read_settings(resource("configs/speedrun_cpu.toml")), "speedrun_cpu")
    monkeypatch.setattr(threads, "step_timer", lambda config, sequences, device, dtype: {1: sequences / 8}.__getitem__)
    assert threads.tokens_per_second(config, torch.device("cpu"), "float32") == 8 * 64
