"""torch.compile for training: whether it pays off, and compiling in place."""

import errno
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpt_arc.device import autocast, to_device
from gpt_arc.distributed import WORLD_SIZE, say
from gpt_arc.errors import UserError, first_line
from gpt_arc.training.parallel import REPLICATED, Parallel
from model import GPT

# On a CPU, compiling takes 15 to 60 seconds and then saves about a twentieth of the time, so it pays off after some
# twenty minutes. Counted in FLOPs, at 300 GFLOP/s, so that the decision doesn't depend on timing.
COMPILE_PAYS_AFTER = 1200 * 300e9


def check_graphs(setting: bool | str, devices: int, kind: str, is_gpu: bool) -> None:
    """Raises UserError if the setting asks for CUDA graphs on anything except one GPU."""
    if setting == "graphs" and (not is_gpu or devices > 1):
        raise UserError(f"compile = graphs is for one GPU, not for {devices} x {kind}: use --compile=True")


def resolve_compile(setting: bool | str, device: torch.device, flops: float) -> tuple[bool, str]:
    """Returns whether to compile, and why. `flops` counts the rest of the run. Raises UserError if graphs can't be."""
    check_graphs(setting, WORLD_SIZE, device.type, device.type == "cuda")
    obstacle = unusable_cache() if setting else None
    if setting != "auto":
        if obstacle:
            raise UserError(
                f"compile = {str(setting).lower()} can't work here; --compile=False does without it: {obstacle}"
            )
        return bool(setting), "as set or as recorded"
    if obstacle:
        return False, obstacle
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:  # torch's GPU wheels include it on supported platforms
            return False, "Triton is not installed"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return False, "Triton needs a GPU of compute capability 7.0 or more"
        return True, "it pays off on GPUs"
    if device.type != "cpu":
        return False, f"it is unreliable on {device.type}"
    if flops < COMPILE_PAYS_AFTER:
        return False, "the run is too short for it to pay off"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return (True, "the run is long") if compiler else (False, "there is no C++ compiler")


def unusable_cache() -> str | None:
    """Why compiled code can't be kept in the folder that the environment names, or None."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            return f"TORCHINDUCTOR_CACHE_DIR names {folder}, which can't be written to: {error.strerror}"
    return None


def compile_in_place(
    model: GPT,
    replica: nn.Module,
    batch: Sequence[Tensor | None],
    device: torch.device,
    dtype: str,
    by_block: bool = False,
    parallel: Parallel = REPLICATED,
    graphs: bool = False,
) -> str | None:
    """Compiles `model` and tries a step on `batch`. If that fails, undoes it and returns the reason in one line.

    `by_block` compiles one block, whose code serves the others, and leaves the rest as it is. `graphs` launches the
    forward and the backward pass as CUDA graphs, each as a whole. Gradients are then added up outside of the graphs'
    memory, where micro-batches find them (see "gradient accumulation" in torch/_inductor/cudagraph_trees.py).

    `replica` is the model or its DistributedDataParallel, from which the compiler gets the gradient buckets.
    `nn.Module.compile` keeps parameter names, so `_orig_mod.` never reaches a file.
    """
    parts: list[nn.Module] = [*model.blocks] if by_block else [model]
    try:
        if device.type == "cpu":  # else kernels add in the order their threads finish: no exact resume
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore  a property of the module
        for part in parts:
            part.compile(**({"mode": "reduce-overhead"} if graphs else {}))
        for parameter in model.parameters() if graphs else ():
            parameter.grad = torch.zeros_like(parameter)
        # aliased tensors would specialize the code
        batch = [tensor if tensor is None else tensor.clone() for tensor in to_device(batch, device)]
        with parallel.sharing_gradients(replica, False):
            with autocast(device, dtype):
                loss = replica(*batch)
            loss.total.backward()
        return None
    except Exception as error:  # a compiler, its cache or its driver may raise anything
        for part in parts:
            part._compiled_call_impl = None
        torch.use_deterministic_algorithms(False)
        full = os.strerror(errno.ENOSPC)  # in the messages of a C++ compiler
        return full if full in str(error) else f"{type(error).__name__}: {first_line(error)}"
    finally:
        model.zero_grad(set_to_none=not graphs)


def try_compiling(
    model: GPT,
    replica: nn.Module,
    batch: Sequence[Tensor | None],
    device: torch.device,
    dtype: str,
    setting: bool | str,
    parallel: Parallel = REPLICATED,
) -> bool:
    """Does `compile_in_place` and says so; returns whether it worked. Raises UserError if it fails, except for auto."""
    say("compiling      takes a minute or so")
    by_block = setting == "blocks" or parallel.is_sharded  # gathering weights interrupts a graph
    failure = compile_in_place(model, replica, batch, device, dtype, by_block, parallel, setting == "graphs")
    if failure and setting != "auto":
        raise UserError(f"compile = {str(setting).lower()} can't work here; --compile=False does without it: {failure}")
    if failure:
        say(f"not compiled   {failure}")
    return not failure
