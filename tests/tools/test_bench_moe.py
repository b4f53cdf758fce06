"""The mixture benchmark: the dense model costs the same, all competitors do the same work, figures follow."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import train as train_module
from benchmarks.moe import IMPLEMENTATIONS, MoeBench, equal_dense
from benchmarks.train import OurTrainer, TrainJob, TrainRound
from gpt_arc.errors import entry_point
from gpt_arc.planning import cost as cost_module
from gpt_arc.planning.cost import flops_per_token
from gpt_arc.training.config import Config, DataConfig, TrainingConfig
from helpers import forking_command
from model import GPT, GPTConfig
from tools import bench

MODEL = GPTConfig(
    16, 50, 2, 2, 16, mlp_size=24, n_experts=4, norm="rmsnorm", positions="rotary", activation="swiglu", bias=False,
    balance_loss=0.5, router_z_loss=0.0,
)  # fmt: skip
TOML = "[model]\nblock_size = 16\nvocab_size = 50\nn_layer = 2\nn_head = 2\nn_embd = 16\nmlp_size = 24\nbias = false\n"
TOML += 'n_experts = 4\nnorm = "rmsnorm"\npositions = "rotary"\nactivation = "swiglu"\n'
TOML += "[data]\nbatch_size = 4\ntokens_per_step = 128\n"


def changed(**settings):
    return dataclasses.replace(MODEL, **settings)


def job(model=MODEL, **training):
    training = dict(learning_rate=1e-2, warmup_iters=0) | training
    return TrainJob(
        MoeBench(steps=3), Config(model, DataConfig(batch_size=4), TrainingConfig(**training)), "cpu", "float32", False
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with tiny.toml."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TOML)
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({}, 48), ({"experts_per_token": 1}, 24), ({"experts_per_token": 3, "shared_experts": 2}, 120),
        ({"activation": "gelu", "mlp_size": None}, 128), ({"activation": "swiglu", "mlp_size": None}, 84),
        ({"n_layer": 6, "expert_interval": 3}, 32), ({"n_layer": 6, "expert_interval": 2, "shared_experts": 1}, 48),
    ],
)  # fmt: skip
def test_the_dense_model_has_the_mixture_s_flops_except_the_routers(settings, width):
    config = changed(**settings)
    mixture, dense = GPT(config), GPT(equal_dense(config))
    assert dense.config == dataclasses.replace(config, n_experts=0, mlp_size=width) and not dense.experts
    routers = 6 * sum(experts.router.weight.numel() for experts in mixture.experts)
    assert flops_per_token(mixture) - flops_per_token(dense) == routers > 0


def test_a_fractional_width_is_rounded():
    config = changed(n_layer=3, expert_interval=2)  # widths 24, 48 and 24
    assert equal_dense(config).mlp_size == 32
    assert equal_dense(dataclasses.replace(config, mlp_size=25)).mlp_size == 33  # of 33 1/3


def test_a_mixture_s_step_matches_a_plain_loop():
    """Including the router losses and the update of the balancing biases."""
    config = changed(balance_rate=0.1, router_z_loss=0.1)
    ours, batches = OurTrainer(job(config)), []
    draw = ours.next_batch
    ours.next_batch = lambda: batches.append(draw()) or batches[-1]
    torch.manual_seed(TrainingConfig().seed)
    model = GPT(config)
    losses = ours.round().losses
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if (p.dim() > 1) == decays], "weight_decay": 0.1 * decays}
         for decays in (True, False)], lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for (tokens, targets), loss_of_ours in zip(batches, losses, strict=True):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        balance = sum(4 * (r.load * r.gates).sum() for r in model.routings)
        loss = loss + 0.5 * balance + 0.1 * sum(r.z for r in model.routings)
        assert loss_of_ours == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for experts, routing in zip(model.experts, model.routings, strict=True):
            experts.balance += 0.1 * (0.25 - routing.load).sign()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], expected, atol=1e-5, rtol=0, msg=name)
    assert model.experts[0].balance.any() and ours.routers.take()["expert_cv"] > 0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_each_transformers_implementation_learns_with_the_same_weights_and_losses(name):
    measured = IMPLEMENTATIONS[name](job())
    assert measured.model.config._experts_implementation == name
    assert type(measured.model).__name__ == "MixtralForCausalLM" and measured.model.training
    ours = GPT(MODEL)
    assert measured.model.num_parameters() == ours.num_parameters()
    tokens, targets = measured.next_batch()
    loss = measured.forward(tokens, targets).item()
    logits = measured.model(tokens).logits[:, :-1]
    without_router = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert loss - without_router == pytest.approx(0.5 * 2, rel=0.1)  # two layers, each with nearly even expert use
    measured.next_batch = lambda: (tokens, targets)
    losses = [loss for _ in range(3) for loss in measured.round().losses]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    without_balance = IMPLEMENTATIONS[name](job(changed(balance_loss=0.0)))
    assert without_balance.forward(tokens, targets).item() == pytest.approx(without_router, abs=1e-4)


def rounds_of(seconds):
    return [TrainRound([[0.25 * seconds] * 4] * 2, [4.0, 3.9], 5 * 10**9) for _ in range(3)]


def test_table_fastest_and_floor_follow_from_the_times(place, monkeypatch, output_of):
    jobs, programs = {}, {}
    times = {"ours": 2, "dense": 1, "transformers grouped_mm": 6, "transformers eager": 5, "transformers batched_mm": 7}

    def child_process(name, program, job):
        jobs[name], programs[name], remaining = job, program, iter(rounds_of(times[name]))
        return contextlib.nullcontext(lambda method: method and next(remaining))

    monkeypatch.setattr(train_module, "child_process", child_process)
    monkeypatch.setattr(cost_module, "peak_flops", lambda *args: 1e9)
    flags = "--transformers=True --rounds=2 --dtype=float32 --device=cpu --compile=False --json=results.json".split()
    flags += "--shared_experts=0 --implementations grouped_mm eager batched_mm".split()
    output = output_of(entry_point(bench.main), "bench.py", "moe", "tiny.toml", *flags)
    results = json.loads(Path("results.json").read_text())
    assert list(results["programs"]) == list(programs) == list(times)
    assert programs["ours"] is programs["dense"] is OurTrainer and jobs["ours"].config.model.n_experts == 4
    assert [programs[f"transformers {name}"] for name in IMPLEMENTATIONS] == list(IMPLEMENTATIONS.values())
    dense = jobs["dense"].config
    assert dense == dataclasses.replace(jobs["ours"].config, model=equal_dense(jobs["ours"].config.model))
    assert {name: ratio["median"] for name, ratio in results["ratios"].items()} == pytest.approx(
        {"dense": 0.5, "transformers grouped_mm": 3, "transformers eager": 2.5, "transformers batched_mm": 3.5}
    )
    assert results["fastest"] == "transformers eager"
    assert "fastest      implementation of transformers: transformers eager, 2.50 times as long as ours" in output
    ours = GPT(jobs["ours"].config.model)
    active = ours.num_parameters(active=True)
    assert active < ours.num_parameters() and results["floor"]["flops_per_token"] == 6 * active
    assert results["floor"]["share"] == pytest.approx((4 * 16 / 2) / (1e9 / (6 * active)))
    flops = results["flops_per_token"]
    assert flops["ours"] - flops["dense"] == 6 * 2 * 4 * 16
    assert f"mlp_size = 48: {flops['dense'] / flops['ours']:.1%} of the mixture's FLOPs per token" in output
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if "tokens/s" in line)
    header, *rows = lines[start : start + 6]
    assert [row.split()[-9] for row in rows] == ["32", "64", "11", "13", "9"]  # of 64 tokens
    assert {len(row) for row in rows} == {len(header)}


@pytest.mark.slow
def test_a_run_measures_each_competitor_in_its_own_process(place):
    flags = "--batch_size=3 --dtype=bfloat16 --rounds=1 --steps=2 --device=cpu --json=results.json"
    peer_flags = "--transformers=True", "--implementations=eager"
    completed = forking_command("tools/bench.py", "moe", "tiny.toml", *peer_flags, *flags.split())
    assert completed.returncode == 0 and not completed.stderr, completed.stderr
    results = json.loads(Path("results.json").read_text())
    assert list(results["programs"]) == ["ours", "dense", "transformers eager"]
    for name, row in results["programs"].items():
        assert len(row["losses"]) == 4 and row["losses"][0] == pytest.approx(math.log(50), abs=0.2)
        assert f"\n{name} " in completed.stdout
    assert results["fastest"] == "transformers eager" and 0 < results["floor"]["share"] < 1
    assert results["programs"]["ours"]["losses"] != results["programs"]["dense"]["losses"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "name one config file: python tools/bench.py moe configs/moe.toml"),
        (["tiny.toml", "--n_experts=0"], "n_experts = 0 leaves nothing to measure: name a config"),
        (["tiny.toml", "--expert_interval=3"], "expert_interval = 3 leaves 2 blocks without experts"),
        (["tiny.toml", "--implementation=eager"], "there is no flag --implementation; did you mean --implementations?"),
        (["tiny.toml", "--implementations=fast"], "--implementations"),
        (["tiny.toml", "--implementations"], "--implementations = [] must be a list of 1 or more of"),
        (["tiny.toml", "--nanogpt=."], "there is no flag --nanogpt"),
        (["tiny.toml", "--steps=0"], "steps = 0 must be at least 1"),
        (["tiny.toml", "--transformers=True", "--shared_experts=1"], "mixtral, has no shared_experts = 1"),
        (["tiny.toml", "--transformers=True", "--capacity_factor=1"], "mixtral, has no capacity_factor = 1.0"),
        (["tiny.toml", "--transformers=True", "--experts_per_token=1"], "mixtral, has no experts_per_token = 1"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(args, sentence, place, output_of):
    assert sentence in output_of(entry_point(bench.main), "tools/bench.py", "moe", *args)


def test_the_training_benchmark_refuses_transformers_for_non_mixtral_experts(place, output_of):
    args = ["tiny.toml", "--transformers=True", "--shared_experts=1"]
    sentence = output_of(entry_point(bench.main), "tools/bench.py", "train", *args)
    assert "mixtral, has no shared_experts = 1" in sentence
    sentence = output_of(entry_point(bench.main), "tools/bench.py", "train", "tiny.toml", "--nanogpt=.")
    assert "there is no nanoGPT checkout" in sentence
    Path("model.py").touch()
    sentence = output_of(entry_point(bench.main), "tools/bench.py", "train", "tiny.toml", "--nanogpt=.")
    assert "nanoGPT only computes GPT-2 and has no" in sentence
