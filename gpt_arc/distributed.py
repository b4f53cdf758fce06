"""Distributed processes: this one's rank among those started by torchrun, and communication between them.

Every function also works in a single process started without torchrun.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from gpt_arc.errors import UserError, lose_output
from gpt_arc.files import command
from gpt_arc.tables import counted
from gpt_arc.watch import WATCH

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
MACHINES = int(os.environ.get("GROUP_WORLD_SIZE", 1))
IS_MAIN = RANK == 0  # only this process writes files and prints

# by their names in torch 2.13, and before
all_gather_single: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def launch_command(script: str, *arguments: str) -> str:
    """Returns the shell command that runs a script with as many processes as now."""
    again = command(script, *arguments)
    if WORLD_SIZE == 1:
        return again
    separator = "-- " if any(one.startswith("--monitor") for one in arguments) else ""  # torchrun has a --monitor too
    program, _, after_program = again.partition(" ")
    launched = f"{separator}{after_program}" if program == "python" else f"--no-python {separator}{again}"
    place = "--standalone" if MACHINES == 1 else f"--nnodes={MACHINES} --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT"
    return f"torchrun {place} --nproc_per_node={WORLD_SIZE // MACHINES} {launched}"


def say(text: str) -> None:
    """Print a line from the main process, above the progress bar if there is one, or lose it if that fails."""
    if IS_MAIN:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError as error:
            lose_output(error)


@contextlib.contextmanager
def process_group(backend: str, device: torch.device, timeout_minutes: float = 60) -> Iterator[None]:
    """Runs the block in a process group. Raises UserError for a backend that doesn't support the device.

    A process waits for the others for `timeout_minutes`; after half of them, `WATCH` names those that hang. With nccl,
    Python objects go by gloo, past the GPUs.

    The group is not destroyed: after an error this could wait for the other processes forever, and gloo would hold
    Python's lock while it waits for its threads, which may need the lock to release their last tensors. It ends with
    the process, at the `os._exit` of `entry_point`.
    """
    if WORLD_SIZE == 1:
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"several processes can't share work on {device.type}: use --device=cpu, or one process")
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend = nccl needs GPUs, but the device is {device.type}: use gloo or auto")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if backend == "nccl" else None,
    )
    WATCH.start(30 * timeout_minutes)
    yield


def split_batch(sequences: int, batch_size: int) -> tuple[int, int]:
    """Returns the number of micro-batches per process in one step, and their equal size, at most `batch_size`.

    Raises UserError if the sequences of a step can't be divided equally among the processes.
    """
    if sequences % WORLD_SIZE:
        raise UserError(
            f"the {counted(sequences, 'sequence')} of a step (batch_size x gradient_accumulation_steps) can't be "
            f"divided equally among {WORLD_SIZE} processes: make them a multiple of {WORLD_SIZE}"
        )
    share = sequences // WORLD_SIZE
    size = max(n for n in range(1, min(batch_size, share) + 1) if share % n == 0)
    return share // size, size


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place."""
    if WORLD_SIZE > 1:
        WATCH.arrive()
        dist.all_reduce(values)
    return values


def from_main(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Broadcast the main process's `value`, a picklable object, to every process.

    A `group` of all processes is for another thread than the main one.
    """
    if WORLD_SIZE == 1:
        return value
    if group is None:
        WATCH.arrive()
    box = [value]
    dist.broadcast_object_list(box, group=group)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Collect the `value`, a picklable object, of every process, ordered by rank, in every process."""
    if WORLD_SIZE == 1:
        return [value]
    WATCH.arrive()
    values: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values
