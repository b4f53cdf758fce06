"""The speedrun benchmark: our seconds come from the run's metrics.jsonl, nanoGPT's from its recipe."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from benchmarks import speedrun as speedrun_module
from benchmarks.processes import nanogpt_model
from benchmarks.speedrun import (
    TRAIN_FILE,
    Evaluation,
    NanoGPTSpeedrun,
    SpeedrunJob,
    SpeedrunRun,
    compute_floor,
    ratio,
    reached,
    read_evaluations,
    split_arguments,
    summarize,
    train_ours,
    write_raw,
)
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.errors import UserError, entry_point
from gpt_arc.training.config import Config, DataConfig, LoggingConfig, TrainingConfig
from helpers import ROOT, TINY_FLAGS, forking_command
from model import GPTConfig
from tools import bench
from warm import WarmPopen

FLAGS = [flag for flag in TINY_FLAGS if not flag.startswith("--eval_iters")]
# the interface of nanoGPT's model.py for training; logits depend on the position and on all earlier tokens
NANOGPT = """
import json, pathlib
from types import SimpleNamespace as GPTConfig
import torch, torch.nn as nn, torch.nn.functional as F

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte, self.wpe = (nn.Embedding(n, 8) for n in (config.vocab_size, config.block_size))
        self.lm_head = nn.Linear(8, config.vocab_size, bias=False)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        with open(pathlib.Path(__file__).with_name("calls.jsonl"), "a") as file:
            arguments = [weight_decay, learning_rate, *betas, device_type]
            file.write(json.dumps({"optimizer": arguments, "config": vars(self.config)}) + "\\n")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        past = self.wte(idx).cumsum(1) / torch.arange(1, idx.size(1) + 1).view(1, -1, 1)
        logits = self.lm_head(past + self.wpe.weight[: idx.size(1)])
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""
# replaces train.py: prints and writes what a compiled run with two evaluations does
TRAIN = """
import json, pathlib, sys, time
arguments = sys.argv[1:]
folder = pathlib.Path(next(a.split("=")[1] for a in arguments if a.startswith("--out_dir=")))
folder.mkdir()
print("device         cpu (A, cpu, 2 threads), bfloat16, {compiled}: the run is long")
time.sleep(0.1)
{output}
time.sleep(0.2)
(folder / "run.json").write_text(json.dumps(arguments))
lines = [{{"step": 1, "tokens": 8, "seconds": 0.01}}, {{"step": 2, "tokens": 16, "seconds": 0.02, "val_loss": 3.5}}]
lines += [{{"step": 4, "tokens": 32, "seconds": 0.04, "val_loss": 3.25}}, {{"step": 5, "tokens": 40, "seconds": 0.05}}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
print("step 2: val 3.5", flush=True)
print("step 4: val 3.25", flush=True)
time.sleep(0.3)
{end}
"""


@pytest.fixture
def place(workplace):
    """The working directory, with data/sums, sums.toml and a nanoGPT checkout."""
    Path("nanoGPT").mkdir()
    Path("nanoGPT/model.py").write_text(NANOGPT)
    return workplace


def job(folder):
    tokens, dataset = TokenFiles(folder / "data/sums", "train"), folder / "data/sums"
    write_raw(tokens, folder / TRAIN_FILE)
    training = TrainingConfig(max_iters=8, learning_rate=0.02, warmup_iters=3, weight_decay=0.5, grad_clip=0.1, seed=3)
    vocabulary = json.loads((dataset / "meta.json").read_text())["vocab_size"]
    model = GPTConfig(16, vocabulary, 1, 1, 8, bias=False)
    config = Config(model, DataConfig(batch_size=4), training, LoggingConfig(eval_interval=3))
    return SpeedrunJob(folder / "nanoGPT", config, "cpu", dataset, folder)


def a_run(*losses, seconds=1.0, compilation=None):
    """A run evaluated every 10 steps of 5 tokens, which take `seconds` each time."""
    evaluations = [Evaluation(10 * i, 50 * i, seconds * i, loss) for i, loss in enumerate(losses, start=1)]
    return SpeedrunRun(evaluations, 2.0, compilation, 3.0, 4.0, "float32")


# ---- which evaluation counts


def test_the_time_counts_to_the_first_evaluation_at_the_target(tmp_path):
    lines = [
        {"step": 5, "tokens": 500, "seconds": 1.0, "train_loss": 1.0},
        {"step": 10, "tokens": 1000, "seconds": 2.5, "val_loss": 2.0, "train_loss": 1.9},
        {"step": 20, "tokens": 2000, "seconds": 4.5, "val_loss": 1.5, "train_loss": 1.4},
        {"step": 25, "tokens": 2500, "seconds": 6.0, "train_loss": 0.5},
        {"step": 30, "tokens": 3000, "seconds": 7.5, "val_loss": 1.75, "train_loss": 1.4},
        {"step": 40, "tokens": 4000, "seconds": 9.5, "val_loss": 1.25, "train_loss": 1.4},
        {"step": 41, "tokens": 4100, "seconds": 9.75, "train_loss": 1.4},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations, training = read_evaluations(path)
    assert [evaluation.step for evaluation in evaluations] == [10, 20, 30, 40] and training == 9.75
    assert reached(evaluations, 1.75) == (20, 2000, 4.5, 1.5)
    assert reached(evaluations, 1.5) == (20, 2000, 4.5, 1.5)
    assert reached(evaluations, 1.4999) == (40, 4000, 9.5, 1.25)
    assert reached(evaluations, 1.2) is None and reached([], 1.2) is None


def test_figures_have_the_best_if_the_target_is_never_reached():
    row = summarize(a_run(3.0, math.nan, 2.0, 2.5, compilation=6.0), seed=7, target=1.9)
    assert row["reached"] is None and row["seed"] == 7
    assert row["best"] == {"step": 30, "tokens": 150, "seconds": 3.0, "val_loss": 2.0}
    assert row["end"]["step"] == 40 and len(row["evaluations"]) == 4
    assert (row["start_up_seconds"], row["compilation_seconds"]) == (2.0, 6.0)
    assert (row["evaluation_seconds"], row["wall_seconds"]) == (3.0, 4.0)
    assert summarize(a_run(math.nan), 7, 1.9)["best"] is None and summarize(a_run(), 7, 1.9)["end"] is None


def test_the_ratio_compares_seconds_to_the_target():
    ours, nanogpt = (
        summarize(a_run(3.0, 2.0, 1.0, seconds=0.5), 7, 2.0),
        summarize(a_run(4.0, 3.0, 2.5, 2.0, 1.0), 7, 2.0),
    )
    assert ratio(ours, nanogpt) == {"seed": 7, "ratio": 1 / 4, "at_most": False}
    short = summarize(a_run(4.0, 3.0, 2.5), 7, 2.0)  # nanoGPT would have taken longer
    assert ratio(ours, short) == {"seed": 7, "ratio": 1 / 3, "at_most": True}
    assert ratio(short, nanogpt) is None


def test_the_floor_covers_the_runs_that_reached_the_target():
    rows = [summarize(a_run(3.0, 2.0, seconds=s), 0, 2.0) for s in (1.0, 2.0, 4.0)] + [summarize(a_run(3.0), 0, 2.0)]
    floor = compute_floor(rows, 300, rate=1e5)  # 100 tokens of 300 FLOPs in 2, 4 and 8 seconds
    assert floor["seconds"] == pytest.approx(0.3) and floor["share"] == pytest.approx(0.3 / 4)
    assert compute_floor(rows, 300, None) is None and compute_floor(rows[3:], 300, 1e5) is None


# ---- nanoGPT


def test_nanogpt_s_loss_is_the_mean_over_the_whole_split(place):
    speedrun = NanoGPTSpeedrun(job(place))
    tokens = torch.from_numpy(speedrun.val.read(0, len(speedrun.val)))
    assert len(tokens) % 16 != 1  # the last window is shorter
    speedrun.segment()
    total, model = 0.0, speedrun.trainer.model
    for start in range(0, len(tokens) - 1, 16):
        for end in range(start + 1, min(start + 17, len(tokens))):
            with torch.no_grad():
                logits = model(tokens[start:end][None], tokens[start:end][None])[0]
            total -= logits[0, -1].log_softmax(-1)[tokens[end]].item()
    assert speedrun.val_loss() == pytest.approx(total / (len(tokens) - 1), abs=1e-5)
    assert model.training


def test_nanogpt_s_segments_match_a_plain_loop(place):
    speedrun_job = job(place)
    speedrun = NanoGPTSpeedrun(speedrun_job)
    evaluations = [speedrun.segment()[0] for _ in range(3)]
    assert [evaluation[:2] for evaluation in evaluations] == [(3, 3 * 64), (6, 6 * 64), (8, 8 * 64)]
    seconds = [evaluation.seconds for evaluation in evaluations]
    assert 0 < seconds[0] < seconds[1] < seconds[2]

    files = TokenFiles(place / "data/sums", "train")
    tokens = torch.from_numpy(files.read(0, len(files)))
    assert np.array_equal(np.fromfile(place / TRAIN_FILE, dtype="<u2"), tokens.numpy())
    torch.manual_seed(3)
    model = nanogpt_model(speedrun_job.checkout, speedrun_job.config.model, 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.5)
    for step in range(8):
        rate = 0.02 * (step + 1) / 4 if step < 3 else 0.002 + 0.009 * (1 + math.cos(math.pi * (step - 3) / 5))
        optimizer.param_groups[0]["lr"] = rate
        starts = torch.randint(len(tokens) - 16, (4,))
        rows = torch.stack([tokens[start : start + 17] for start in starts])
        optimizer.zero_grad()
        F.cross_entropy(model(rows[:, :-1], rows[:, 1:])[0].flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    for expected, weight in zip(model.parameters(), speedrun.trainer.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)


# ---- ours


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """Replaces train.py by a script; returns the function that runs it and checks that no temporary file is left."""

    def run(output="", end="", compiled="compiled"):
        script, steps = tmp_path / "train.py", []
        script.write_text(TRAIN.format(output=output, end=end, compiled=compiled))
        (tmp_path / "tmp").mkdir(exist_ok=True)
        monkeypatch.setattr(speedrun_module, "TRAIN", script)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        try:
            return train_ours(["tiny.toml", "--n_layer=2"], 5, steps.append), steps
        finally:
            assert not list((tmp_path / "tmp").iterdir())

    return run


def test_the_parts_of_a_compiled_run_add_up(fake_train):
    run, steps = fake_train('print("compiling      takes a minute or so", flush=True)')
    assert run.evaluations == [(2, 16, 0.02, 3.5), (4, 32, 0.04, 3.25)] and steps == [2, 4]
    assert run.dtype == "bfloat16" and run.start_up > 0.09 and run.compilation > 0.18
    assert run.evaluation > 0.24  # 0.3 seconds at the end, of which training took 0.05
    assert run.start_up + run.compilation + run.evaluation + 0.05 == pytest.approx(run.wall)


def test_a_failed_compilation_has_no_compilation_time(fake_train):
    output = 'print("compiling      takes a minute or so\\nnot compiled   no compiler", flush=True)'
    assert fake_train(output)[0].compilation is None
    run = fake_train(compiled="not compiled")[0]
    assert run.compilation is None and run.dtype == "bfloat16" and run.start_up > 0.27


@pytest.mark.slow
def test_a_diverged_run_counts_and_a_failed_one_does_not(fake_train):
    run, _ = fake_train(end='print("step 6 has diverged, x/last is the last good checkpoint"); sys.exit(1)')
    assert len(run.evaluations) == 2
    with pytest.raises(UserError, match="^ours, seed 5: no such thing$"):
        fake_train(end='sys.stderr.write("a warning\\ntrain.py: no such thing\\n"); sys.exit(2)')
    with pytest.raises(UserError, match="^ours, seed 5: ZeroDivisionError: division by zero$"):
        fake_train(end="1 / 0")
    with pytest.raises(UserError, match="^ours, seed 5: it ended with -9$"):
        fake_train(end="import os; os.kill(os.getpid(), 9)")


# ---- the benchmark


@pytest.mark.slow
def test_a_speedrun_measures_both_competitors(place, stage_runner):
    (place / "tmp").mkdir()
    flags = ["--nanogpt=nanoGPT", "--seeds", "5", "sums.toml", *FLAGS, "--target", "1", "--json=record.json"]
    completed = forking_command("tools/bench.py", "speedrun", *flags, TMPDIR=str(place / "tmp"))
    assert completed.returncode == 1 and not completed.stderr, completed.stderr  # neither reaches the target
    assert not [path for path in (place / "tmp").iterdir() if path.name.startswith("gpt-arc-")]
    results = json.loads(Path("record.json").read_text())
    (ours,), (nanogpt,) = results["programs"]["ours"], results["programs"]["nanoGPT"]
    assert [evaluation["step"] for evaluation in nanogpt["evaluations"]] == list(range(250, 2001, 250))
    assert nanogpt["end"]["tokens"] == 2000 * 12 * 64
    assert nanogpt["end"]["val_loss"] < nanogpt["evaluations"][0]["val_loss"] < 4
    assert (
        results["target"] == 1
        and ours["reached"] is nanogpt["reached"] is None
        and ours["seed"] == nanogpt["seed"] == 5
        and results["ratios"] == []
    )
    assert "ours, seed 5, does not reach 1.0000: its best is" in completed.stdout
    assert "compiled     ours was not" in completed.stdout
    for row in (ours, nanogpt):
        parts = row["start_up_seconds"] + row["evaluation_seconds"] + row["end"]["seconds"]
        assert 0 < parts <= row["wall_seconds"] + 1e-6
    vocabulary = json.loads(Path("data/sums/meta.json").read_text())["vocab_size"]
    sizes = {"block_size": 64, "vocab_size": vocabulary, "n_layer": 4, "n_head": 4, "n_embd": 128}
    called = json.loads(Path("nanoGPT/calls.jsonl").read_text())
    assert called == {"optimizer": [0.1, 1e-3, 0.9, 0.99, "cpu"], "config": sizes | {"bias": False, "dropout": 0.0}}

    stage_runner(train, "sums.toml", *FLAGS, "--eval_iters=0", "--seed=5", "--out_dir=alone")
    expected = [(e.step, e.tokens, e.val_loss) for e in read_evaluations(Path("alone/metrics.jsonl"))[0]]
    assert [(e["step"], e["tokens"], e["val_loss"]) for e in ours["evaluations"]] == expected


def test_the_table_follows_from_the_runs(place, monkeypatch, output_of):
    """Two seeds: nanoGPT ends at 2.0 and 1.8, so the target is 1.9, which ours reaches after 2 and 4 seconds."""
    nanogpt = {1: a_run(4.0, 2.0, seconds=8.0), 2: a_run(4.0, 1.8, seconds=10.0)}
    ours = {1: a_run(2.0, 1.9, 1.5), 2: a_run(2.0, 1.7, seconds=2.0, compilation=30.0)}
    order = []
    monkeypatch.setattr(
        speedrun_module, "train_nanogpt", lambda job, _: order.append("nanogpt") or nanogpt[job.config.training.seed]
    )
    monkeypatch.setattr(speedrun_module, "train_ours", lambda args, seed, _: order.append(args) or ours[seed])
    monkeypatch.setattr("gpt_arc.planning.cost.peak_flops", lambda *args: 2e9)
    flags = ["sums.toml", *FLAGS, "--target=nanogpt", "--nanogpt=nanoGPT", "--seeds", "1", "2", "--json=r.json"]
    output = output_of(entry_point(bench.main), "bench.py", "speedrun", *flags)
    results = json.loads(Path("r.json").read_text())
    assert order == ["nanogpt", ["sums.toml", *FLAGS]] * 2 and results["target"] == 1.9
    assert [ratio["at_most"] for ratio in results["ratios"]] == [True, False]
    assert results["ratio"] == pytest.approx({"median": (2 / 16 + 4 / 20) / 2, "min": 2 / 16, "max": 4 / 20})
    rows = [line.split() for line in output.splitlines() if line[:10].split() and line[10:20].strip() in ("1", "2")]
    assert rows == [
        ["ours", "1", "20", "100", "2.00", "1.9000", "3.00", "-", "2.00", "4.00"],
        ["ours", "2", "20", "100", "4.00", "1.7000", "3.00", "30.00", "2.00", "4.00"],
        ["nanoGPT", "1", "-", "-", "-", "-", "3.00", "-", "2.00", "4.00"],
        ["nanoGPT", "2", "20", "100", "20.00", "1.8000", "3.00", "-", "2.00", "4.00"],
    ]
    assert "nanoGPT, seed 1, does not reach 1.9000: its best is 2.0000 at step 20" in output
    assert "target       1.9000, where nanoGPT ends, the median" in output
    assert "ours was, in 30.0 s that don't count, in 1 of 2 runs" in output
    assert "ours takes 0.163 of nanoGPT's seconds" in output and "at most 0.125 with seed 1, 0.200 with" in output
    seconds = results["floor"]["flops_per_token"] * 100 / 2e9
    assert results["floor"]["seconds"] == pytest.approx(seconds)
    assert results["floor"]["share"] == pytest.approx((seconds / 2 + seconds / 4) / 2)


def test_an_interruption_keeps_the_finished_seeds(place, monkeypatch, stage_runner):
    def train_ours(args, seed, _):
        if seed == 3:
            raise KeyboardInterrupt
        return a_run(2.0, 1.9 - seed / 10, seconds=2.0)

    monkeypatch.setattr(speedrun_module, "train_ours", train_ours)
    monkeypatch.setattr(speedrun_module, "train_nanogpt", lambda job, _: a_run(2.0, 1.8, seconds=8.0))
    flags = ["sums.toml", *FLAGS, "--target=1.75", "--nanogpt=nanoGPT", "--json=r.json", "--seeds", "1", "2", "3", "4"]
    result = stage_runner(bench, "speedrun", *flags)
    assert result.code == 130 and "interrupted after 2 of 4 seeds" in result.message
    assert "the median of 1 of 2 runs" in result.output
    rows = json.loads(Path("r.json").read_text())["programs"]
    assert {name: [row["seed"] for row in rows[name]] for name in rows} == {"ours": [1, 2], "nanoGPT": [1, 2]}


def test_flags_are_separated_from_train_s():
    args = "--seeds 1 2 a.toml --n_layer 2 --json=r.json --device cpu --nanogpt .. b.toml --target 1.5 --seed=3".split()
    benchmark_args, train_args = split_arguments(args)
    assert benchmark_args == ["--seeds", "1", "2", "--json=r.json", "--nanogpt", "..", "--target", "1.5"]
    assert train_args == ["a.toml", "--n_layer", "2", "--device", "cpu", "b.toml", "--seed=3"]


def children(number):
    """The processes of a session, except its leader and multiprocessing's."""
    commands = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command_line = path.joinpath("cmdline").read_bytes()  # empty for a zombie
            is_child = os.getsid(int(path.name)) == number != int(path.name)
            if is_child and command_line and b"resource_tracker" not in command_line:
                commands.append(command_line.decode())
        except (ProcessLookupError, FileNotFoundError):
            pass
    return commands


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are counted in /proc")
@pytest.mark.parametrize(
    ("flags", "started", "number"),
    [
        (["--target=1"], "train.py", signal.SIGINT),
        pytest.param(["--nanogpt=nanoGPT"], "spawn_main", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_an_interruption_leaves_no_process_and_no_folder(flags, started, number, place):
    (place / "tmp").mkdir()
    running = WarmPopen(
        [sys.executable, ROOT / "tools/bench.py", "speedrun", "sums.toml", *FLAGS, "--max_iters=100000", *flags],
        env={**os.environ, "TMPDIR": str(place / "tmp")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not any(started in command_line for command_line in children(running.pid)):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(running.pid, number)  # as a terminal sends Ctrl-C
        _, errors = running.communicate(timeout=30)
    except BaseException:
        running.kill()
        raise
    assert running.returncode == 130 and errors == "bench.py: interrupted\n"
    assert not children(running.pid) and not list((place / "tmp").glob("gpt-arc-*"))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--target=1"], "name a config file: python tools/bench.py speedrun"),
        (["sums.toml"], "say which loss to reach: --target=1.886, or --nanogpt=PATH"),
        (["sums.toml", "--target=low"], '--target = low must be a number or "nanogpt"'),
        (["sums.toml", "--target=-1"], "target = -1 must be more than 0"),
        (["sums.toml", "--target=nan"], "target = nan must be more than 0, and finite"),
        (["sums.toml", "--target=nanogpt"], "target = nanogpt takes a checkout: --nanogpt=PATH"),
        (["sums.toml", "--target=1", "--seeds", "1", "1"], "seeds = (1, 1) must be different numbers"),
        (["sums.toml", "--target=1", "--seeds"], "--seeds = [] must be a list of 1 or more whole numbers"),
        (["sums.toml", "--target=1", "--seeds", "-1"], "--seeds = -1 must be at least 0"),
        (["sums.toml", "--target=1", "--seeds", "1", "x"], "--seeds = x must be a whole number"),
        (["sum.toml", "--target=1"], "there is no config file sum.toml; did you mean sums.toml?"),
        (["sums.toml", "--target=1", "--nanogpt=."], "there is no nanoGPT checkout at .: it has no model.py"),
        (["sums.toml", "--target=1", "--n_layers=2"], "there is no flag --n_layers; did you mean --n_layer?"),
        (["sums.toml", "--target=1", "--seed=2"], "sets seed itself: leave --seed out; --seeds names the seeds"),
        (["sums.toml", "--target=1", "--init-from", "gpt2"], "sets init_from itself"),
        (["run.toml", "--target=1"], "leave the table [run] out of the config file"),
        (["sums.toml", "--target=1", "--dataset=nothing"], "there is no dataset nothing"),
        (["sums.toml", "--target=1", "--block_size=1024"], "block_size = 1024 is longer than the val split"),
        (
            ["mixed.toml", "--target=1", "--nanogpt=nanoGPT"],
            "nanoGPT trains on one dataset, but this is a mixture of 2",
        ),
        (["sums.toml", "--target=1", "--json=nowhere/r.json"], "there is no folder nowhere for the results"),
        (["sums.toml", "--target=1", "--device=cuda"], "is not available here"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(args, sentence, place, output_of):
    Path("run.toml").write_text('[data]\ndataset = "sums"\n[run]\neval_only = true\n')
    tables = "".join(f'[[data.mixture]]\nname = "{name}"\nweight = 1.0\n' for name in ("sums", "./data/sums"))
    Path("mixed.toml").write_text(tables + "[model]\nblock_size = 16\n")
    assert sentence in output_of(entry_point(bench.main), "tools/bench.py", "speedrun", *args)
