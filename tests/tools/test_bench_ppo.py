"""The reinforcement learning benchmark: competitors learn one task from the same weights; figures follow."""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ppo as ppo_module
from benchmarks.ppo import (
    COPIED,
    TRL,
    Iteration,
    PPOBench,
    PPORun,
    RunEnd,
    compare,
    draw_response,
    has_ppo_trainer,
    overlap,
    prepare,
    summarize,
)
from gpt_arc.chat.files import read_prompts
from gpt_arc.chat.format import Turn, load_chat_model
from gpt_arc.errors import entry_point
from tools import bench

TINY = (
    "--n_layer=1 --n_head=2 --n_embd=16 --block_size=20 --prompts=8 --supervised_updates=2 --episodes=24 "
    "--episodes_per_iteration=8 --minibatches=2 --inner_epochs=2 --max_new_tokens=4 --seeds=1"
).split()


def measured(output_of, *flags):
    """The output and the results of a run of the tiny task."""
    output = output_of(entry_point(bench.main), "bench.py", "ppo", *TINY, "--json=results.json", *flags)
    return output, json.loads(Path("results.json").read_text())


def check(programs):
    for row in programs.values():
        assert [len(curve) for curve in row["curves"]] == [len(kl) for kl in row["kl_curves"]] == [3]
        assert row["rewards"] == [curve[-1] for curve in row["curves"]] and all(0 <= r < 1 for r in row["rewards"])
        counted = [seconds[2] for seconds in row["seconds"]]
        assert row["episodes_per_second"] == pytest.approx(8 / np.median(counted)) and min(counted) > 0
        assert all(kl[0] == pytest.approx(0, abs=1e-5) for kl in row["kl_curves"])  # all begin as the reference
        assert all(abs(kl[2]) > 1e-5 for kl in row["kl_curves"])  # and all learn
        assert 0 <= row["tokens"] <= 4 and 0.05 < row["peak_memory_gb"] < 8


@pytest.mark.slow
def test_a_run_measures_ours(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    output, results = measured(output_of)
    assert list(results["programs"]) == ["ours"] and results["comparisons"] == {}
    check(results["programs"])
    assert f"{results['parameters']:,} parameters" in output
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.skipif(not has_ppo_trainer(), reason=f"there is no trl with a PPOTrainer: pip install trl=={TRL}")
def test_a_run_compares_ours_with_trl(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    output, results = measured(output_of, "--trl=True")
    programs, comparison = results["programs"], results["comparisons"]["ours"]
    assert list(programs) == ["ours", "trl"] and results["trl"] == importlib.metadata.version("trl")
    ratio = programs["ours"]["episodes_per_second"] / programs["trl"]["episodes_per_second"]
    assert comparison["speed"]["median"] == pytest.approx(ratio) and f"ours: {ratio:.2f} times trl" in output


def test_the_prepared_policy_and_prompts(tmp_path):
    settings = PPOBench(1, 2, 16, 20, prompts=8, episodes_per_iteration=8, supervised_updates=1, max_new_tokens=4)
    config = prepare(settings, tmp_path)
    model, tokenizer, chat = load_chat_model(tmp_path / "policy")
    assert model.config == config and config.vocab_size == 30 and len(chat.added) == 4
    prompts = [conversation.row["prompt"] for conversation in read_prompts(tmp_path / "prompts.jsonl")]
    assert len(prompts) == 8 and all(4 <= len(prompt) <= 8 for prompt in prompts)
    assert all(chat.prompt([Turn("user", p)])[1:-1] == tokenizer.encode(p) for p in prompts)


def test_examples_copy_the_stated_share_of_letters():
    generator, shared, letters = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        response = draw_response(generator, "abcd", 16)
        shared += overlap("abcd", response, 1)
        letters += len(response)
    share = COPIED + (1 - COPIED) * 4 / 26
    assert letters / 2000 == pytest.approx(8, abs=0.4) and shared / letters == pytest.approx(share, abs=0.015)


def test_the_reward_counts_letters_of_the_prompt():
    assert overlap("abc", "cabbage", 8) == 5 / 8
    assert overlap("abc", "", 8) == overlap("", "abc", 8) == 0


def a_run(rewards, seconds):
    return PPORun([Iteration(s, [r - 0.1, r + 0.1], 3.0) for r, s in zip(rewards, seconds)], RunEnd([0.0] * 5, 10**9))


def test_figures_and_comparisons_follow_from_the_runs():
    ours = summarize([a_run([0, 0, 0, 0, r], [9, 9, 1, 2, 3]) for r in (0.5, 0.6, 0.7)])
    trl = summarize([a_run([0, 0, 0, 0, r], [9, 9, 4, 4, 4]) for r in (0.4, 0.5, 0.6)])
    assert ours["rewards"] == pytest.approx([0.5, 0.6, 0.7]) and ours["peak_memory_gb"] == 1
    assert (ours["episodes_per_second"], trl["episodes_per_second"]) == (1.0, 0.5)
    comparison = compare(ours, trl)
    assert comparison["speed"] == {"median": 2, "min": 2, "max": 2} and comparison["reward"] == pytest.approx(0.2)
    margin = 2.776445 * 0.1 * (2 / 3) ** 0.5  # Student's t with four degrees of freedom: equal variances
    assert comparison["interval"] == pytest.approx([(0.1 - margin) / 0.5, (0.1 + margin) / 0.5], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seeds=0"], "seeds = 0 must be at least 1"),
        (["--n_layer=0"], "--n_layer = 0 must be at least 1"),
        (["--minibatches=3"], "episodes_per_iteration = 64 must be a multiple of minibatches = 3"),
        (["--episodes=100"], "episodes = 100 must be a multiple of episodes_per_iteration = 64"),
        (["--episodes=128"], "of more than 2 iterations"),
        (["--prompts=63"], "prompts = 63 must be episodes_per_iteration or more"),
        (["--block_size=25"], "block_size = 25 must be 26 or more"),
        (["--kl_coeff=1"], "there is no flag --kl_coeff; did you mean --kl_coef?"),
        (["--json=nowhere/results.json"], "there is no folder nowhere for the results"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(flags, sentence, tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    assert sentence in output_of(entry_point(bench.main), "tools/bench.py", "ppo", *flags)


def test_without_a_trainer_the_message_names_the_release_that_has_one(monkeypatch, output_of):
    monkeypatch.setattr(ppo_module, "has_ppo_trainer", lambda: False)
    message = output_of(entry_point(bench.main), "tools/bench.py", "ppo", "--trl=True")
    assert f"pip install trl=={TRL}" in message
