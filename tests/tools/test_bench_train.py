"""The training benchmark: it measures real optimizer steps, and the figures follow from their times."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.nn.functional as F

from benchmarks import speedrun
from benchmarks import train as train_module
from benchmarks.processes import ModelBench, read_model_arguments
from benchmarks.train import (
    NanoGPTTrainer,
    OurTrainer,
    TrainBench,
    TrainJob,
    TrainRound,
    TransformersTrainer,
    summarize,
)
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import resource
from gpt_arc.planning import cost as cost_module
from gpt_arc.training.config import Config, DataConfig, TrainingConfig, build_config, read_settings
from helpers import command
from model import GPT, GPTConfig
from tools import bench

TOML = "[model]\nblock_size = 16\nvocab_size = 50\nn_layer = 2\nn_head = 2\nn_embd = 16\nbias = false\n"
TOML += "[data]\nbatch_size = 4\ntokens_per_step = 128\n"
MODEL = GPTConfig(16, 50, 2, 2, 16, bias=False)
TRAINING = TrainingConfig(learning_rate=1e-2, warmup_iters=1, weight_decay=0.5, beta1=0.8, grad_clip=0.1, adam_eps=1e-4)
# 2 steps per round with 4 phases: data, forward, backward, update
ROUNDS = [
    TrainRound([[9, 9, 9, 9], [1, 1, 1, 1]], [4.0, 3.9], 5 * 10**9),
    TrainRound([[0.25, 1, 2, 0.75], [0.5, 1, 2, 1]], [3.8, 3.7], 6 * 10**9),
    TrainRound([[0, 1.5, 3, 0.5], [0, 2, 5, 1]], [3.6, 3.5], 7 * 10**9),
]


@pytest.mark.parametrize(
    "read",
    [
        lambda args: train_module.read_arguments(args, TrainBench, "", "")[1].model,
        lambda args: speedrun.read_arguments([*args, "--target=2"])[2].model,
        lambda args: read_model_arguments(ModelBench, "", args)[1],
    ],
    ids=["train", "speedrun", "sample"],
)
def test_a_config_is_named_as_for_train(read):
    model = build_config(read_settings(resource("configs/char_tiny.toml")), "").model
    for name in ("char_tiny", str(resource("configs/char_tiny.toml"))):
        assert read([name, "--n_layer=3"]) == dataclasses.replace(model, n_layer=3)


def test_other_names_are_refused_or_those_of_models(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="char_tine is not a config file .*did you mean char_tiny"):
        train_module.read_arguments(["char_tine"], TrainBench, "", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "char_tiny").mkdir()
    for name in ("gpt2", "char_tiny"):  # a published model, and a folder
        settings, architecture = read_model_arguments(ModelBench, "", [name])
        assert settings.model == name and architecture is None


# the interface of nanoGPT's model.py for training, which records its calls
NANOGPT = """
import json, pathlib
from types import SimpleNamespace as GPTConfig
import torch, torch.nn as nn, torch.nn.functional as F

def keep(**line):
    with open(pathlib.Path(__file__).with_name("calls.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\\n")

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte, self.wpe = (nn.Embedding(n, config.n_embd) for n in (config.vocab_size, config.block_size))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        print("number of parameters: few")

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        keep(optimizer=[weight_decay, learning_rate, *betas, device_type], config=vars(self.config))
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.wte(idx) + self.wpe.weight[: idx.size(1)])
        shifted_targets = torch.equal(idx[:, 1:], targets[:, :-1]) and self.training
        keep(dtype=str(logits.dtype), shape=idx.shape, shifted_targets=shifted_targets)
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
"""


def job(folder=None, **training):
    settings = TrainBench(steps=3, nanogpt=folder)
    config = Config(MODEL, DataConfig(batch_size=4), TrainingConfig(**{**vars(TRAINING), **training}))
    return TrainJob(settings, config, "cpu", "float32", compile=False)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with tiny.toml and a nanoGPT checkout."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TOML)
    Path("nanoGPT").mkdir()
    Path("nanoGPT/model.py").write_text(NANOGPT)
    return tmp_path


def test_figures_follow_from_the_times():
    assert summarize(24, *ROUNDS) == {
        "tokens_per_second": 24 / 4.75,  # steps of 4, 4.5, 5 and 8 seconds
        "step_ms": {"median": 4750, "min": 4000, "max": 8000},
        "phases_ms": {"data": 125, "forward": 1250, "backward": 2500, "update": 875},
        "peak_memory_gb": 7,
        "warmup_seconds": 40,
        "first_step_seconds": 36,
        "losses": [4.0, 3.9, 3.8, 3.7, 3.6, 3.5],
    }


def test_table_ratios_and_floor_follow_from_the_times(place, monkeypatch, output_of):
    jobs, rates = {}, iter([9e9, 1e9, 2e9])
    slower = ROUNDS[1]._replace(steps=[[2 * phase for phase in step] for step in ROUNDS[1].steps])
    rounds = {"ours": ROUNDS, "nanoGPT": [ROUNDS[0], slower, ROUNDS[2]], "transformers": ROUNDS}

    def child_process(name, program, job):
        jobs[name], remaining = job, iter(rounds[name])
        return contextlib.nullcontext(lambda method: method and next(remaining))

    monkeypatch.setattr(train_module, "child_process", child_process)
    monkeypatch.setattr(cost_module, "peak_flops", lambda *args: next(rates))
    flags = "--transformers=True --nanogpt=nanoGPT --rounds=2 --batch_size=3 --block_size=8 --dtype=float32".split()
    other_flags = "--json=results.json --activation_checkpointing=True --device=cpu --compile=False".split()
    output = output_of(entry_point(bench.main), "bench.py", "train", *flags, "tiny.toml", *other_flags)
    results, config = json.loads(Path("results.json").read_text()), jobs["ours"].config
    assert (config.data.batch_size, config.model.block_size, config.model.n_embd) == (3, 8, 16)
    assert config.training.activation_checkpointing and jobs["ours"].dtype == "float32"
    assert results["programs"] == {name: summarize(24, *times) for name, times in rounds.items()}
    assert results["ratios"]["nanoGPT"] == {"median": 1.5, "min": 1, "max": 2}
    assert results["ratios"]["transformers"] == {"median": 1, "min": 1, "max": 1} and len(results["ratios"]) == 2
    parameters = GPT(config.model).num_parameters()
    floor = {"flops_per_second": 2e9, "flops_per_token": 6 * parameters, "tokens_per_second": 2e9 / (6 * parameters)}
    assert results["floor"] == pytest.approx(floor | {"share": 24 / 4.75 / floor["tokens_per_second"]})
    (row,) = [line.split() for line in output.splitlines() if line.startswith("ours ")]
    assert row[1:] == ["5", "4,750.0", "4,000.0", "8,000.0", "125.0", "1,250.0", "2,500.0", "875.0", "7.00"]
    assert "nanoGPT takes 1.50 times as long as ours (1.00 to 2.00 over the rounds)" in output
    assert "at 2 GFLOP/s of float32 products" in output and "first step   36.0 s for ours" in output


@pytest.mark.slow
def test_a_run_measures_each_competitor_in_its_own_process(place):
    flags = "--batch_size=3 --block_size=8 --dtype=bfloat16 --rounds=2 --steps=3 --device=cpu --learning_rate=1e-3"
    peers = "--nanogpt=nanoGPT --transformers=True --json=results.json --beta2=0.9"
    completed = command("tools/bench.py", "train", "tiny.toml", *flags.split(), *peers.split())
    assert completed.returncode == 0 and "number of parameters" not in completed.stdout, completed.stderr
    results = json.loads(Path("results.json").read_text())
    assert list(results["programs"]) == ["ours", "nanoGPT", "nanoGPT 16 bit", "transformers"]
    for name, row in results["programs"].items():
        step, losses = row["step_ms"], row["losses"]
        assert row["tokens_per_second"] == pytest.approx(3 * 8 / step["median"] * 1000)
        assert row["warmup_seconds"] > row["first_step_seconds"] > 0 and 0.05 < row["peak_memory_gb"] < 4
        assert len(losses) == 9 and all(map(math.isfinite, losses)) and len(set(losses)) > 1
        assert losses[0] == pytest.approx(math.log(50), abs=0.1) and median(losses) == pytest.approx(losses[0], abs=0.5)
        assert f"\n{name} " in completed.stdout
    assert len(results["ratios"]) == 3 and 0 < results["floor"]["share"] < 1
    calls = [json.loads(line) for line in Path("nanoGPT/calls.jsonl").read_text().splitlines()]
    built = [call for call in calls if "config" in call]
    sizes = {"block_size": 8, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.0, "bias": False}
    assert built == [{"optimizer": [0.1, 1e-3, 0.9, 0.9, "cpu"], "config": sizes}] * 2
    for dtype in ("torch.float32", "torch.bfloat16"):
        assert calls.count({"dtype": dtype, "shape": [3, 8], "shifted_targets": True}) == 3 * 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_our_steps_match_a_plain_loop(checkpointing):
    ours, batches, visits = OurTrainer(job(activation_checkpointing=checkpointing)), [], []
    draw = ours.next_batch
    ours.next_batch = lambda: batches.append(draw()) or batches[-1]
    ours.model.blocks[0].register_forward_pre_hook(lambda *args: visits.append(1))
    torch.manual_seed(TRAINING.seed)
    model = GPT(MODEL)
    losses = ours.round().losses + ours.round().losses
    assert len(visits) == 6 * (1 + checkpointing)  # checkpointing recomputes each block in the backward pass

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.5},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.5e-2, betas=(0.8, 0.95), eps=1e-4)  # the rate's first step of two
    norms = []
    for (tokens, targets), loss_of_ours in zip(batches, losses, strict=True):
        assert tokens.shape == (4, 16) and torch.equal(tokens[:, 1:], targets[:, :-1])
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        assert loss_of_ours == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.1).item())
        optimizer.step()
    for (name, expected), weight in zip(model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=0, msg=name)
    assert min(norms) > 0.1 and len({str(tokens.tolist()) for tokens, _ in batches}) == 6


@pytest.mark.parametrize("worker", [OurTrainer, NanoGPTTrainer, TransformersTrainer])
def test_all_competitors_learn_a_repeated_batch(worker, place):
    measured = worker(job(Path("nanoGPT"), grad_clip=1.0))
    batch = measured.next_batch()
    measured.next_batch = lambda: batch
    losses = [loss for _ in range(3) for loss in measured.round().losses]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    assert all(parameter.grad is None for parameter in measured.model.parameters())


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "name one config file: python tools/bench.py train configs/gpt2.toml"),
        (["tidy.toml"], "there is no config file tidy.toml; did you mean tiny.toml?"),
        (["tiny.toml", "--round=3"], "there is no flag --round; did you mean --rounds?"),
        (["tiny.toml", "--rounds=0"], "rounds = 0 must be at least 1"),
        (["tiny.toml", "--nanogpt=."], "there is no nanoGPT checkout at .: it has no model.py"),
        (
            ["tiny.toml", "--nanogpt=nanoGPT", "--norm=rmsnorm"],
            'only computes GPT-2 and has no norm = "rmsnorm"',
        ),
        (["tiny.toml", "--transformers=True", "--positions=sinusoidal"], "no supported architecture of transformers"),
        (["tiny.toml", "--json=nowhere/results.json"], "there is no folder nowhere for the results"),
        (["tiny.toml", "--vocab_size=65537"], "vocab_size = 65537 is too large: the random tokens have 16 bits"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(args, sentence, place, output_of):
    assert sentence in output_of(entry_point(bench.main), "tools/bench.py", "train", *args)
