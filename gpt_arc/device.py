"""Devices and precision. `auto` is resolved here, from the hardware alone."""

import gc
import os
import platform
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpt_arc.errors import UserError
from gpt_arc.memory import keep_freed_memory
from gpt_arc.tables import counted

ALIGNMENT = 64  # bytes, of torch's allocations on a CPU
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(setting: str, local_rank: int = 0, prefer: str | None = None) -> torch.device:
    """The device for a setting. auto means `prefer` if available, else cuda, mps or cpu, in this order.

    Raises UserError for a device that is not available.
    """
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if setting == "auto":
        setting = prefer if prefer and count.get(prefer) else next(kind for kind, number in count.items() if number)
    try:
        device = torch.device(setting)
    except RuntimeError:
        raise UserError(f'device = "{setting}" is not a device: use auto, cpu, cuda, cuda:1 or mps') from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    elif device.type == "cuda" and local_rank != 0:
        raise UserError(f'device = "{setting}" would put several processes on one GPU: use cuda')
    if (device.index or 0) >= count.get(device.type, 0):
        available = ", ".join(f"{n} x {kind}" for kind, n in count.items() if n)
        raise UserError(f'device = "{setting}" is not available here, only {available}: use auto to choose among these')
    if device.type == "cuda":
        check_kernels(device)
        torch.cuda.set_device(device)  # make it torch's current device
    return device


def check_kernels(device: torch.device) -> None:
    """Raises UserError if this build of torch has no kernels for a GPU."""
    names = (re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in torch.cuda.get_arch_list())
    built = [(match[1], (int(match[2]), int(match[3]))) for match in names if match]  # none for AMD's GPUs
    capability = torch.cuda.get_device_capability(device) if built else (0, 0)
    # sm: for GPUs of one generation; compute: for all later ones, compiled as they are loaded
    if built and not any(
        version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in built
    ):
        raise UserError(
            f"this torch, for CUDA {torch.version.cuda}, has no kernels for {torch.cuda.get_device_name(device)}, of "
            f"compute capability {capability[0]}.{capability[1]}: install one that has; for GPUs before Turing it is "
            "pip install torch --index-url https://download.pytorch.org/whl/cu126"
        )


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def resolve_dtype(setting: str, device: torch.device) -> str:
    """The precision of matrix products. auto means the fastest type that the hardware multiplies natively."""
    if setting != "auto":
        if setting == "tf32" and device.type != "cuda":
            raise UserError(f"dtype = tf32 is a type of NVIDIA's GPUs, and the device is {device.type}: use float32")
        return setting
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()  # Intel AMX, AVX-512 BF16 and the Arm extension
        return "bfloat16" if any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else "float32"
    return "float32"


def set_up_device(device: torch.device, dtype: str) -> None:
    """Make training faster on the device, for the whole process.

    On a GPU, products that autocast leaves in float32 use TF32, unless the type is float32. On a CPU, freed memory is
    kept. Everywhere, objects created by imports are exempt from garbage collection, which would delay training steps.
    """
    gc.collect()
    gc.freeze()
    if device.type == "cuda" and dtype != "float32":
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        keep_freed_memory()


def align(module: nn.Module) -> None:
    """Copies weights that lie at addresses where torch would not allocate, as tensors mapped from a file do.

    There, CPU kernels add in another order, so that a resumed run would differ from one that never stopped.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Context in which a forward pass multiplies in `dtype`."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=DTYPES[dtype] != torch.float32)


def to_device(batch: Sequence[Any], device: torch.device) -> list[Any]:
    """Move the tensors of `batch` to the device; None stays."""
    return [tensor if tensor is None else send(tensor, device) for tensor in batch]  # type: ignore  of the same kinds


def send(values: Tensor | Sequence[Any], device: torch.device) -> Tensor:
    """Numbers on the device. A GPU receives them from pinned memory, so the host doesn't wait for the copy."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that the device has; None where that isn't known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def device_name(device: torch.device) -> str:
    """The name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
        return f"{name}, {counted(torch.get_num_threads(), 'thread')}"
    return device.type


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of every random generator that training uses in this process."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states returned by `rng_state`, for the generators that this device has."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
