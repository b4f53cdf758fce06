"""Processes: who this one is among those that torchrun started, and what they tell each other.

Every function also serves a single process that torchrun did not start.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from gpt_arc.errors import UserError, mute

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
IS_MAIN = RANK == 0  # the one process that writes and prints


def say(text: str) -> None:
    """Print a line, above a progress bar if there is one: the main process does, for all."""
    if IS_MAIN:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read along has gone: the run goes on
            mute()


@contextlib.contextmanager
def process_group(backend: str, device: torch.device) -> Iterator[None]:
    """Join the processes for the duration of the block. Raises UserError for a backend that can't serve the device.

    After an error the group is left to the end of the process: to dissolve it would wait for the others for ever.
    """
    if WORLD_SIZE == 1:
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"several processes can't share work on {device.type}: use --device=cpu, or one process")
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend = nccl serves GPUs, not {device.type}: use gloo or auto")
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    yield
    dist.destroy_process_group()


def split_batch(sequences: int, batch_size: int) -> tuple[int, int]:
    """Micro-batches of each process in one step, and the sequences of each: equal, and batch_size at most.

    Raises UserError if the processes can't share the sequences of a step equally.
    """
    if sequences % WORLD_SIZE:
        raise UserError(
            f"the {sequences} sequences of a step (batch_size x gradient_accumulation_steps) can't be shared equally "
            f"by {WORLD_SIZE} processes: make them a multiple of {WORLD_SIZE}"
        )
    own = sequences // WORLD_SIZE
    size = max(n for n in range(1, min(batch_size, own) + 1) if own % n == 0)
    return own // size, size


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
