"""Gives a process of torch's CPU build a CUDA device that computes nothing.

Fake tensors live on it, autograd and the compiler take it for the GPU named. `install` has to come before anything
imports torch, and can't be undone, so whatever is measured on the device is measured in a process of its own. `choose`
has to come before anything asks what the GPU is like.
"""

import ctypes
import importlib.util
import types
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GPU:
    """What the compiler asks a GPU for."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that a block may ask for
    cache: int  # bytes of the second-level cache
    threads: int = 2048  # of a multiprocessor

    @property
    def target(self) -> int:
        return 10 * self.capability[0] + self.capability[1]


GPUS = {
    75: GPU("Tesla T4", (7, 5), 40, 65_536, 4 << 20, threads=1024),
    80: GPU("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912, 40 << 20),
    90: GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448, 50 << 20),
    100: GPU("NVIDIA B200", (10, 0), 148, 232_448, 126 << 20),
}


gpu: GPU  # in use


def choose(target: int) -> GPU:
    """Makes the device the GPU of capability `target`."""
    global gpu
    gpu = GPUS[target]
    return gpu


def install(library: Path) -> None:
    """Gives torch the device cuda:0; `library` is device.cpp, compiled."""
    torch_libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for path in (torch_libraries / "libc10.so", torch_libraries / "libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    import torch
    import torch._functorch.config

    torch._functorch.config.graphsafe_rng_functionalization = False
    for name, function in functions().items():
        setattr(torch.cuda, name, function)
    torch.cuda.default_generators = (torch.default_generator,)
    torch.version.cuda = "13.0"
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_cudaCachingAllocator_is_enabled = lambda: True
    torch._C._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    torch._C._dynamo.guards._reinterpret_tensor = lambda x, size, stride, offset=0: torch.as_strided(
        x, size, stride, x.storage_offset() + offset
    )
    tensor = torch.tensor
    torch.tensor = lambda data, *args, device=None, **kwargs: (
        tensor(data, *args, **kwargs) if device is None else tensor(data, *args, **kwargs).to(device)
    )
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.nn.Module.to = move


class Stream:
    """The one stream; its events are `FakeDevice`'s."""

    cuda_stream = device_index = stream_id = 0

    def wait_stream(self, other: Any) -> None:
        pass

    wait_event = wait_stream

    def record_event(self) -> Any:
        pass


def move(module: Any, *where: Any, **types: Any) -> Any:
    """`nn.Module.to` with new parameters, since fake tensors can't change their device in place."""
    import torch

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            moved = parameter.detach().to(*where, **types)
            part.register_parameter(name, torch.nn.Parameter(moved, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(*where, **types))
    return module


def functions() -> dict[str, Any]:
    """What stands in for the functions of torch.cuda."""
    import torch

    stream = Stream()
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda *args: nullcontext(),
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_properties": lambda device=None: properties(),
        "get_arch_list": lambda: [f"sm_{target}" for target in GPUS],
        "is_bf16_supported": lambda including_emulation=True: gpu.target >= 80,
        "is_tf32_supported": lambda: gpu.target >= 80,
        "memory_allocated": lambda device=None: 0,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "Stream": lambda *args, **settings: stream,
        "Event": lambda *args, **settings: stream.record_event(),
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }


def properties() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.multiprocessors,
        total_memory=80 << 30,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=gpu.threads,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=gpu.shared_memory,
        shared_memory_per_multiprocessor=gpu.shared_memory,
        L2_cache_size=gpu.cache,
        gcnArchName="",
        is_integrated=False,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
        uuid="0",
        pci_bus_id=0,
        pci_device_id=0,
    )
