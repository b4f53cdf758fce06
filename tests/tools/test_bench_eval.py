"""The evaluation benchmark: all competitors compute the same scores, and the figures follow from their times."""

import contextlib
import json
from pathlib import Path

import pytest

from benchmarks import eval as eval_module
from benchmarks.eval import (
    EvalBench,
    EvalJob,
    HarnessScorer,
    HarnessScorer16Bit,
    OurScorer,
    OurScorer16Bit,
    draw_items,
    minimum_flops,
    summarize,
)
from gpt_arc.errors import entry_point
from model import GPTConfig
from tools import bench

TOML = "[model]\nblock_size = 16\nvocab_size = 50\nn_layer = 1\nn_head = 2\nn_embd = 16\n"
FLAGS = "--items=6 --min_context=4 --max_context=9 --min_option=1 --max_option=5 --device=cpu --rounds=1".split()
SMALL = {"items": 6, "min_context": 4, "max_context": 9, "min_option": 1, "max_option": 5}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with tiny.toml."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TOML)
    return tmp_path


@contextlib.contextmanager
def in_this_process(name, worker_class, job):
    worker = worker_class(job)
    yield lambda method: method and getattr(worker, method)()


@pytest.mark.slow
def test_a_run_measures_ours_and_the_harness(place, monkeypatch, output_of):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(eval_module, "child_process", in_this_process)
    flags = "--dtype=bfloat16 --n_layer=2 --transformers=True --batch_sizes 1 5 --json=results.json".split()
    output = output_of(entry_point(bench.main), "bench.py", "eval", "tiny.toml", *FLAGS, *flags)
    results = json.loads(Path("results.json").read_text())
    assert (results["dtype"], results["architecture"]["n_layer"]) == ("bfloat16", 2)
    programs = results["programs"]
    assert list(programs) == ["ours", "harness", "ours 16 bit", "harness 16 bit"]
    for name, row in programs.items():
        (seconds,) = row["rounds"]
        assert row["items_per_second"] == pytest.approx(6 / seconds) and row["warmup_seconds"] > 0
        assert row["floor_share"] == pytest.approx(row["floor_seconds"] / seconds) and row["floor_seconds"] > 0
        (shown,) = [line[16:].split() for line in output.splitlines() if line.startswith(f"{name:16}")]
        assert shown[0] == f"{row['items_per_second']:,.2f}" and shown[-1] == f"{row['floor_share']:.0%}"
    for name, ours in (("harness", "ours"), ("harness 16 bit", "ours 16 bit")):
        ratio = results["ratios"][name]
        assert ratio["median"] == pytest.approx(programs[name]["rounds"][0] / programs[ours]["rounds"][0])
        assert ratio["batch_size"] in (1, 5)
        assert f"{name} takes {ratio['median']:.2f} times as long as {ours} (" in output
    assert 0 < results["largest_difference"] < 1e-4 and -50 < results["least_log_probability"] < -10
    assert sorted(path.name for path in place.iterdir()) == ["results.json", "tiny.toml"]


def test_all_competitors_compute_the_same_scores():
    pytest.importorskip("lm_eval")
    job = EvalJob(EvalBench("tiny.toml", **SMALL, batch_sizes=(4,)), GPTConfig(16, 50, 2, 2, 16), "cpu", "bfloat16")
    scores = []
    for worker in (OurScorer, HarnessScorer, OurScorer16Bit, HarnessScorer16Bit):
        measured = worker(job)
        assert measured.round() > 0
        scores.append(measured.log_probabilities())
        assert {parameter.dtype for parameter in measured.model.parameters()} == {measured.dtype}
    assert len(scores[0]) == 24 and scores[1] == pytest.approx(scores[0], abs=1e-4)
    assert scores[2] == pytest.approx(scores[0], rel=0.03) and scores[3] == pytest.approx(scores[0], rel=0.03)


def test_items_follow_the_settings():
    pairs = draw_items(EvalBench("", options=3), 50)
    assert len(pairs) == 3000 and pairs == draw_items(EvalBench("", options=3), 50)
    assert pairs != draw_items(EvalBench("", options=3, seed=2), 50)
    assert all(pairs[n][0] == pairs[n - n % 3][0] for n in range(3000))
    assert {len(context) for context, _ in pairs} == {*range(60, 101)}
    assert {len(option) for _, option in pairs} == {*range(5, 21)}
    assert {token for _, option in pairs for token in option} == {*range(50)}


def test_figures_follow_from_the_times():
    assert summarize(60, 9, 2, 4, 3) == {
        "items_per_second": 20,
        "round_seconds": {"median": 3, "min": 2, "max": 4},
        "warmup_seconds": 9,
        "rounds": [2, 4, 3],
    }


def test_the_floor_reads_each_context_once_and_skips_last_tokens():
    settings = EvalBench("", items=2, options=3, min_context=7, max_context=7, min_option=4, max_option=4)
    assert minimum_flops(settings, GPTConfig(16, 50, 1, 2, 16), 1000) == 2 * 1000 * 2 * (7 + 3 * 3) + 2 * 50 * 16 * 24


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "MODEL is missing: A config (quickstart, or a .toml file), whose architecture may be changed by flags"),
        (["tiny.toml", "--item=3"], "there is no flag --item; did you mean --items?"),
        (["tiny.toml", "--items=0"], "items = 0 must be at least 1"),
        (["tiny.toml", "--max_context=3"], "max_context = 3 is less than min_context = 4"),
        (["tiny.toml", "--max_option=9"], "max_context + max_option - 1 = 17 is more than the context"),
        (["tiny.toml", "--batch_sizes", "0"], "--batch_sizes = 0 must be at least 1"),
        (["tiny.toml", "--batch_sizes"], "--batch_sizes = [] must be a list of 1 or more whole numbers"),
        (["tiny.toml", f"--seed={2**63}"], "must be at least 0 and less than 2^63"),
        (["tiny.toml", "--transformers=True", "--positions=sinusoidal"], "no supported architecture of transformers"),
        (["tiny.toml", "--json=nowhere/results.json"], "there is no folder nowhere for the results"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(flags, sentence, place, output_of):
    assert sentence in output_of(entry_point(bench.main), "tools/bench.py", "eval", *FLAGS, *flags)
