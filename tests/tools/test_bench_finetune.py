"""The fine-tuning benchmark: its updates train the model, and the figures follow from their times."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import finetune as finetune_module
from benchmarks.finetune import (
    FinetuneBench,
    FinetuneJob,
    FinetuneRound,
    HFTrainer,
    OurFinetuner,
    OurFinetunerWithLanguage,
    draw_examples,
    summarize,
)
from benchmarks.processes import ratio_of_medians
from gpt_arc.errors import entry_point
from model import GPTConfig
from tools import bench

TOML = "[model]\nblock_size = 16\nvocab_size = 50\nn_layer = 1\nn_head = 2\nn_embd = 16\n"
FLAGS = "--batch_size=4 --examples=8 --min_tokens=4 --max_tokens=16 --device=cpu".split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with tiny.toml."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TOML)
    return tmp_path


def job(folder, **settings):
    settings = {"batch_size": 4, "examples": 8, "min_tokens": 4, "max_tokens": 16, "rounds": 1, **settings}
    return FinetuneJob(FinetuneBench("tiny.toml", **settings), GPTConfig(16, 53, 1, 2, 16), "cpu", "float32", folder)


@contextlib.contextmanager
def in_this_process(name, worker_class, job):
    worker = worker_class(job)
    yield lambda method: method and getattr(worker, method)()


def test_a_run_measures_ours_and_the_trainer(place, monkeypatch, output_of):
    monkeypatch.setattr(finetune_module, "child_process", in_this_process)
    flags = "--rounds=1 --steps=2 --classes=3 --dtype=bfloat16 --n_layer=2 --transformers=True --json=results.json"
    output = output_of(entry_point(bench.main), "bench.py", "finetune", "tiny.toml", *FLAGS, *flags.split())
    results = json.loads(Path("results.json").read_text())
    assert (results["dtype"], results["settings"]["classes"]) == ("bfloat16", 3)
    assert (results["architecture"]["n_layer"], results["architecture"]["vocab_size"]) == (2, 53)
    programs = results["programs"]
    assert list(programs) == ["ours", "ours + LM", "transformers", "transformers 16 bit"]
    for name, row in programs.items():
        (seconds,) = row["rounds"]
        assert row["examples_per_second"] == pytest.approx(8 / seconds) and row["warmup_seconds"] > 0
        assert row["step_ms"]["median"] == pytest.approx(500 * seconds) and 0.05 < row["peak_memory_gb"] < 8
        (shown,) = [line[len(name) :].split() for line in output.splitlines() if line.startswith(f"{name}  ")]
        assert shown[0] == f"{row['examples_per_second']:,.2f}" and shown[1] == f"{row['step_ms']['median']:,.1f}"
        if name != "ours":
            ratio = results["ratios"][name]["median"]
            assert ratio == pytest.approx(programs["ours"]["examples_per_second"] / row["examples_per_second"])
            assert f"{name} takes {ratio:.2f} times as long as ours" in output
    assert sorted(path.name for path in place.iterdir()) == ["results.json", "tiny.toml"]


def test_figures_and_ratios_follow_from_the_times():
    ours = summarize(60, 2, *[FinetuneRound(seconds, 10**9) for seconds in (9, 2, 4, 3)])
    assert ours == {
        "examples_per_second": 20,
        "round_seconds": {"median": 3, "min": 2, "max": 4},
        "step_ms": {"median": 1500, "min": 1000, "max": 2000},
        "peak_memory_gb": 1,
        "warmup_seconds": 9,
        "rounds": [2, 4, 3],
    }
    peer = summarize(60, 2, *[FinetuneRound(seconds, 10**9) for seconds in (9, 6, 4, 9)])
    assert ratio_of_medians(ours, peer) == {"median": 2, "min": 1, "max": 3}


@pytest.mark.parametrize("worker", [OurFinetuner, OurFinetunerWithLanguage, HFTrainer])
def test_all_competitors_train_on_whole_epochs_of_the_same_examples(worker, tmp_path):
    measured, batches_seen = worker(job(tmp_path, steps=4)), []  # two epochs a round

    def record(module, args, kwargs):
        tokens = kwargs["input_ids"] if worker is HFTrainer else args[0].squeeze(1)
        lengths = kwargs["attention_mask"].sum(1) if worker is HFTrainer else args[1].squeeze(1)
        batches_seen.append([row[:length].tolist() for row, length in zip(tokens, lengths)])

    measured.model.register_forward_pre_hook(record, with_kwargs=True)
    before = [parameter.detach().clone() for parameter in measured.model.parameters()]
    for batches in (4, 8):
        assert measured.round().seconds > 0 and len(batches_seen) == batches
    sequences, labels = draw_examples(measured.settings, 53)
    assert {len(batch) for batch in batches_seen} == {4} and set(labels) <= {0, 1}
    for epoch in range(0, 8, 2):
        assert sorted(batches_seen[epoch] + batches_seen[epoch + 1]) == sorted(sequences)
    assert all(s[0] == 50 and s[-1] == 52 and max(s[1:-1]) < 50 and 4 <= len(s) <= 16 for s in sequences)
    for old, new in zip(before, measured.model.parameters(), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "MODEL is missing: A config (quickstart, or a .toml file), whose architecture may be changed by flags"),
        (["tidy.toml"], "there is no config file tidy.toml; did you mean tiny.toml?"),
        (["tiny.toml", "--round=3"], "there is no flag --round; did you mean --rounds?"),
        (["tiny.toml", "--steps=0"], "steps = 0 must be at least 1"),
        (["tiny.toml", "--classes=1"], "classes = 1 must be at least 2"),
        (["tiny.toml", f"--seed={2**32}"], "must be between 0 and 4294967295"),
        (["tiny.toml", "--examples=9"], "examples = 9 must be a multiple of batch_size = 4"),
        (["tiny.toml", "--max_tokens=3"], "max_tokens = 3 is less than min_tokens = 4"),
        (["tiny.toml", "--max_tokens=17"], "max_tokens = 17 is more than the context, block_size = 16"),
        (["tiny.toml", "--transformers=True", "--positions=sinusoidal"], "no supported architecture of transformers"),
        (["tiny.toml", "--json=nowhere/results.json"], "there is no folder nowhere for the results"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(flags, sentence, place, output_of):
    assert sentence in output_of(entry_point(bench.main), "tools/bench.py", "finetune", *FLAGS, *flags)
