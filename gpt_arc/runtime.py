"""Where and how a model runs: device, precision, compilation. `auto` is resolved here, from the hardware alone."""

import contextlib
import ctypes
import gc
import math
import os
import platform
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt_arc.errors import UserError, first_line
from model import GPT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Compiling takes a quarter of a minute to one on a CPU and gains a twentieth of the time or so from then on: it pays
# after some twenty minutes. Counted in FLOPs, at 300 GFLOP/s, so that no stopwatch decides how a run is computed.
COMPILE_PAYS_AFTER = 1200 * 300e9
# Of decoding, per step: what compiled code saves of the time that reading a byte of the weights takes, and of a block's
# own; 2 cores with AVX-512 (`python tools/bench.py sample`). Compiling takes up to half a minute the first time.
DECODING_SAVES_PER_BYTE, DECODING_SAVES_PER_BLOCK, DECODING_COMPILES_IN = 24e-12, 150e-6, 30.0
# Weights that a CPU's caches hold, in bytes of float32: halving them gains nothing, and 16-bit operations cost more.
DECODING_SMALL = 8e6


def resolve_device(setting: str, local_rank: int = 0, prefer: str | None = None) -> torch.device:
    """The device for a setting; auto is `prefer` where that is there, else cuda, else mps, else cpu.

    Raises UserError for a device that is not there.
    """
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if setting == "auto":
        setting = prefer if count.get(prefer) else next(kind for kind, number in count.items() if number)
    try:
        device = torch.device(setting)
    except RuntimeError:
        raise UserError(f'device = "{setting}" is not a device: say auto, cpu, cuda, cuda:1 or mps') from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    elif device.type == "cuda" and local_rank != 0:
        raise UserError(f'device = "{setting}" would put several processes on one GPU: say cuda')
    if (device.index or 0) >= count.get(device.type, 0):
        there = ", ".join(f"{n} x {kind}" for kind, n in count.items() if n)
        raise UserError(f'device = "{setting}" is not available here; there is {there}')
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what torch means by "the current device" from here on
    return device


def resolve_dtype(setting: str, device: torch.device) -> str:
    """The precision of matrix products; auto is the fastest that the hardware multiplies natively."""
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()  # Intel AMX, AVX-512 BF16 and the Arm extension
        return "bfloat16" if any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else "float32"
    return "float32"


def resolve_compile(setting: bool | str, device: torch.device, flops: float) -> tuple[bool, str]:
    """Whether to compile, and why. `flops` is what is left of the run to compute."""
    if setting != "auto":
        return bool(setting), "as set or begun"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401  torch's wheels for GPUs bring it, on the platforms it supports
        except ImportError:
            return False, "Triton is not installed"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return False, "Triton needs a GPU of compute capability 7.0 or more"
        return True, "it pays on GPUs"
    if device.type != "cpu":
        return False, f"it is not dependable on {device.type}"
    if flops < COMPILE_PAYS_AFTER:
        return False, "the run is too short to pay it back"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return (True, "the run is long") if compiler else (False, "there is no C++ compiler")


def resolve_decoding_dtype(setting: str, device: torch.device, weights: int) -> torch.dtype:
    """The type of the weights for decoding; auto is float32 for a small model on a CPU, else as `resolve_dtype` says.

    `weights` is their size in bytes.
    """
    small = setting == "auto" and device.type == "cpu" and weights < DECODING_SMALL
    return torch.float32 if small else DTYPES[resolve_dtype(setting, device)]


def resolve_decoding_compile(setting: bool | str, device: torch.device, model: GPT, steps: int) -> bool:
    """Whether to compile the decoding of `steps` tokens a row; auto: if that saves more time than compiling takes."""
    if setting != "auto":
        return bool(setting)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    saved = steps * (weights * DECODING_SAVES_PER_BYTE + model.config.n_layer * DECODING_SAVES_PER_BLOCK)
    return saved > DECODING_COMPILES_IN and resolve_compile("auto", device, math.inf)[0]


def set_up(device: torch.device, dtype: str) -> None:
    """What makes training faster on the device, for the whole process.

    On a GPU TF32 for what autocast leaves in float32. On a CPU, with glibc, freed memory is kept: by default it returns
    what is larger than 32 MiB, and each time it is wanted again the system fills it with zeros, page by page.
    Everywhere what the imports made is left out of garbage collection, which a step would wait for.
    """
    gc.collect()
    gc.freeze()
    if device.type == "cuda" and dtype != "float32":
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mmap_max, trim_threshold = -4, -1  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which a forward pass multiplies in `dtype`."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def compile_in_place(
    model: GPT, replica: torch.nn.Module, batch: Sequence[Tensor], device: torch.device, dtype: str
) -> str | None:
    """Compile `model` and try a step on a `batch`; if that fails, undo it and return the reason in one line.

    `replica` is the model or its DistributedDataParallel, through which the compiler learns of the gradients' buckets.
    `nn.Module.compile` leaves the names of parameters alone, so `_orig_mod.` never reaches a file.
    """
    try:
        if device.type == "cpu":  # or its kernels add in whatever order their threads finish: no exact resume
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        model.compile()
        batch = [tensor.clone() for tensor in to_device(batch, device)]  # code for one given twice would fit no other
        with replica.no_sync() if replica is not model else contextlib.nullcontext():
            with autocast(device, dtype):
                loss = replica(*batch)
            loss.total.backward()
        return None
    except Exception as error:  # whatever a compiler, its cache or its driver may raise
        model._compiled_call_impl = None
        torch.use_deterministic_algorithms(False)
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        model.zero_grad()


def to_device(batch: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors of `batch` on the device; to a GPU the copies of pinned ones run while the host goes on."""
    return [tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch]


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
        return f"{name}, {torch.get_num_threads()} threads"
    return device.type


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of every generator that training draws from in this process."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned, as far as this device has the same generators."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
