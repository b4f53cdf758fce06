"""torch.compile for training: whether it pays, and compiling in place."""

import contextlib
import os
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt_arc.device import autocast, to_device
from gpt_arc.errors import first_line
from model import GPT

# Compiling takes a quarter of a minute to one on a CPU and gains a twentieth of the time or so from then on: it pays
# after some twenty minutes. Counted in FLOPs, at 300 GFLOP/s, so that no stopwatch decides how a run is computed.
COMPILE_PAYS_AFTER = 1200 * 300e9


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
