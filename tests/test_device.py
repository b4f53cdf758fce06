"""Devices, precision and compilation: what auto selects on real and simulated hardware."""

import importlib
import os
import platform
import re
import subprocess
import sys
from functools import partial

import pytest
import torch

from gpt_arc import startup
from gpt_arc.device import (
    autocast,
    check_kernels,
    resolve_device,
    resolve_dtype,
    rng_state,
    set_rng_state,
    set_up_device,
)
from gpt_arc.errors import UserError
from gpt_arc.training.compile import compile_in_place, resolve_compile
from model import GPT, GPTConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_devices():
    assert resolve_device("cpu") == CPU
    for setting, sentence in (
        ("cuda:99", "is not available here"),
        ("gpu", "is not a device"),
        ("meta", "not available"),
    ):
        with pytest.raises(UserError, match=sentence):
            resolve_device(setting)


def test_auto_selects_the_best_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert resolve_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert resolve_device("cuda", local_rank=0) == CUDA
    assert resolve_device("auto", prefer="cpu") == CPU
    with pytest.raises(UserError, match="several processes on one GPU"):
        resolve_device("cuda:0", local_rank=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto", prefer="cuda") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "bfloat16"), ({"bf16": True}, "bfloat16"),
        ({"avx2": True, "amx_bf16": False}, "float32"), ({}, "float32"),
    ],
)  # fmt: skip
def test_auto_precision_on_a_cpu(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("float16", CPU) == "float16"


def test_auto_precision_on_a_gpu(monkeypatch):
    for native, expected in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert resolve_dtype("auto", CUDA) == expected
    assert resolve_dtype("auto", torch.device("mps")) == "float32"


def test_tf32_by_name(monkeypatch):
    with pytest.raises(UserError, match="tf32 is a type of NVIDIA's GPUs, and the device is cpu: use float32"):
        resolve_dtype("tf32", CPU)
    assert resolve_dtype("tf32", CUDA) == "tf32"
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    for dtype, expected in (("float32", []), ("tf32", ["high"]), ("bfloat16", ["high"])):
        chosen.clear()
        set_up_device(CUDA, dtype)
        assert chosen == expected
    assert not autocast(CPU, "tf32")._enabled


@pytest.mark.parametrize(
    ("capability", "built", "has"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90", "compute_120"], False),
        ((7, 0), ["sm_50", "sm_70", "sm_75"], True),
        ((8, 9), ["sm_75", "sm_80", "sm_90a"], True),
        ((12, 1), ["sm_90", "compute_120"], True),
        ((12, 0), ["sm_80", "sm_90a", "sm_100a"], False),
        ((9, 4), ["gfx90a", "gfx942"], True),
    ],
)
def test_a_gpu_without_kernels_is_refused(capability, built, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    if has:
        return check_kernels(CUDA)
    message = "no kernels for Tesla V100, of compute capability .*--index-url https://download.pytorch.org/whl/cu126"
    with pytest.raises(UserError, match=message):
        check_kernels(CUDA)


def test_memory_grows_in_segments_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    importlib.reload(startup)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    importlib.reload(startup)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")  # its older name
    importlib.reload(startup)
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_a_compiler_s_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    reason = f"TORCHINDUCTOR_CACHE_DIR names {folder}, which can't be written to: Not a directory"
    with pytest.raises(UserError, match=re.escape(f"--compile=False does without it: {reason}")):
        resolve_compile(True, CPU, 1.0)
    assert resolve_compile("auto", CPU, 1e18) == (False, reason)
    assert resolve_compile(False, CPU, 1.0)[0] is False
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new"))
    assert resolve_compile(True, CPU, 1.0)[0]


def test_auto_compiles_where_it_pays_off(monkeypatch):
    assert resolve_compile(True, CPU, 1.0) == (True, "as set or as recorded")
    assert resolve_compile(False, CPU, 1e9) == (False, "as set or as recorded")
    assert resolve_compile("auto", CPU, 1e12) == (False, "the run is too short for it to pay off")
    monkeypatch.setenv("CXX", "c++")
    assert resolve_compile("auto", CPU, 1e18)[0]
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert resolve_compile("auto", CPU, 1e18) == (False, "there is no C++ compiler")
    assert not resolve_compile("auto", torch.device("mps"), 1e18)[0]


def test_a_failing_compiler_leaves_the_model_unchanged(monkeypatch):
    model = GPT(GPTConfig(8, 11, 1, 2, 16))
    expected = model(torch.zeros(1, 8, dtype=torch.int64))

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(model, "compile", broken)
    reason = compile_in_place(model, model, (1, 8), CPU, "float32")
    assert reason == "RuntimeError: no compiler"
    assert torch.equal(model(torch.zeros(1, 8, dtype=torch.int64)), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_trial_compilation_serves_the_first_step(monkeypatch):
    """Even if the trial passed one tensor as tokens and targets, which are two tensors in training."""
    model, frames = GPT(GPTConfig(8, 11, 1, 2, 16)), []
    monkeypatch.setattr(model, "compile", partial(model.compile, backend=lambda graph, _: frames.append(1) or graph))
    assert compile_in_place(model, model, [torch.zeros(2, 8, dtype=torch.int64)] * 2, CPU, "float32") is None
    compiled = len(frames)
    tokens = torch.randint(11, (2, 9))
    model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).total.backward()
    assert len(frames) == compiled > 0
    torch.use_deterministic_algorithms(False)


def test_generator_states_are_restored():
    states = rng_state(CPU)
    drawn = torch.rand(3)
    set_rng_state(states, CPU)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_kept():
    """In its own process: otherwise a block of 64 MB goes back to the system, which zeroes the next page by page."""
    code = (
        "import os, sys, torch\n"
        "from gpt_arc.device import set_up_device\n"
        "if sys.argv[1] == 'True': set_up_device(torch.device('cpu'), 'bfloat16')\n"
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "torch.ones(8)\n"
        "before = resident()\n"
        "torch.ones(1 << 24)\n"
        "print(resident() - before)"
    )
    kept, kept_by_default = (
        int(subprocess.run([sys.executable, "-c", code, str(way)], capture_output=True, check=True).stdout)
        for way in (True, False)
    )
    assert kept_by_default < 8 << 20 < 60 << 20 < kept
