"""Processes: who this one is among those that torchrun started, and what they tell each other.

Every function also serves a single process that torchrun did not start.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
IS_MAIN = RANK == 0  # the one process that writes and prints


@contextlib.contextmanager
def process_group(backend: str, device: torch.device) -> Iterator[None]:
    """Join the processes for the duration of the block."""
    if WORLD_SIZE == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo" if backend == "auto" else backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum of every process's `values`, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(values)
    return values


def from_main(value: Any) -> Any:
    """The main process's value of a picklable object, in every process."""
    if WORLD_SIZE == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every process's value of a picklable object, by rank, in every process."""
    if WORLD_SIZE == 1:
        return [value]
    values: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values
