"""`bench.py gpu`: every setting by the other benchmarks, whose failures are reported."""

import json
import subprocess

import pytest
import torch

from benchmarks import gpu
from gpt_arc.errors import UserError

FIGURES = {"programs": {"ours": {"tokens_per_second": 1000.0, "peak_memory_gb": 1.5}}}


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run; one with float8 fails."""
    run = []

    def answer(command, **settings):
        run.append(command[2:])
        if "--float8=True" in command:
            return subprocess.CompletedProcess(command, 2, stderr="loading\nbench.py: float8 = true needs torchao\n")
        path = next(flag.removeprefix("--json=") for flag in command if flag.startswith("--json="))
        with open(path, "w") as file:
            json.dump(FIGURES, file)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("benchmarks.gpu.subprocess.run", answer)
    monkeypatch.setattr("gpt_arc.device.resolve_device", lambda setting: torch.device("cuda"))
    return run


def test_settings_are_measured_one_at_a_time(commands, tmp_path, capsys):
    (tmp_path / "model.py").touch()
    nanogpt = f"--nanogpt={tmp_path}"
    gpu.bench_gpu(["--settings", "muon", "float8", f"--json={tmp_path}/gpu.json", nanogpt])
    flags = [[flag for flag in command if flag in sum(gpu.TRAINING.values(), ())] for command in commands]
    assert flags == [[], ["--optimizer=muon"], ["--float8=True"], [], []]
    assert [command[0] for command in commands] == ["train"] * 3 + ["sample"] * 2
    assert [nanogpt in command for command in commands] == [True] + [False] * 4
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["training"]["float8"] == {"failure": "bench.py: float8 = true needs torchao"}
    assert results["training"]["muon"] == FIGURES == results["decoding"]["one row"]
    assert capsys.readouterr().out.count("float8 = true needs torchao") == 2  # where it fails, and in the table


def test_without_a_gpu_only_a_rehearsal_runs(commands, monkeypatch):
    monkeypatch.setattr("gpt_arc.device.resolve_device", lambda setting: torch.device("cpu"))
    with pytest.raises(UserError, match="there is no GPU here: --rehearse=True tries"):
        gpu.bench_gpu([])
    assert not commands
    gpu.bench_gpu(["--rehearse=True"])
    assert commands


def test_a_rehearsal_compiles_blocks_alone_and_is_small(commands):
    gpu.bench_gpu(["--settings", "blocks", "--decoding=False", "--rehearse=True"])
    compiled = [[flag for flag in command if "compile" in flag] for command in commands]
    assert compiled == [["--compile=False"], ["--compile=blocks"]]
    assert all(set(gpu.TINY) < set(command) for command in commands)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--settings", "fast"), "settings has no fast: choose among defaults, eager"),
        (("--json=no/gpu.json",), "there is no folder no for the results: make it, or name another file"),
        (("--nanogpt=no",), "there is no nanoGPT checkout at no: it has no model.py"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(flags, message, commands):
    with pytest.raises(UserError, match=message):
        gpu.bench_gpu([*flags, "--check=True"])
    gpu.bench_gpu(["--check=True"])
    assert not commands


def test_decoding_that_fails_is_an_error(commands, monkeypatch):
    monkeypatch.setitem(gpu.DECODING, "64 rows", ("--float8=True",))
    with pytest.raises(UserError, match="64 rows failed: bench.py: float8 = true needs torchao"):
        gpu.bench_gpu(["--rehearse=True"])
