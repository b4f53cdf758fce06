"""Names the processes that are slower than the others, which wait for them in every step."""

import math
import socket
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from gpt_arc import distributed
from gpt_arc.distributed import WORLD_SIZE, say

T = TypeVar("T")
SLOW = 1.5  # times the median time of a matrix product
LATE = 0.1  # share of the time spent waiting for data


class Pace:
    """How fast this process computes and gets its data."""

    def __init__(self, device: torch.device):
        self.device = device
        self._waited, self._reported = 0.0, 0.0  # seconds waited for data, and of training up to the last report

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches, and measures how long they take to come."""
        batches = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def report(self, seconds: float) -> None:
        """Says which processes are slow, after `seconds` of training in all. Every process must call this."""
        if WORLD_SIZE == 1:
            return
        elapsed = seconds - self._reported
        share = self._waited / elapsed if elapsed else 0.0
        processes = distributed.gather((socket.gethostname(), share, product_seconds(self.device)))
        self._waited, self._reported = 0.0, seconds
        usual = statistics.median_low(product for _, _, product in processes)
        least = min(share for _, share, _ in processes)
        for rank, (host, share, product) in enumerate(processes):
            if product > SLOW * usual:
                say(f"process {rank} on {host} is slow: it multiplies {product / usual:.1f} times as long as others")
            if share > LATE + least:
                say(f"process {rank} on {host} is slow: it waits for its data during {share:.0%} of the training")


def product_seconds(device: torch.device, times: int = 5) -> float:
    """Measures how long a product of matrices takes on the device, at best."""
    a = torch.ones((4096, 4096) if device.type == "cuda" else (512, 512), device=device)
    best = math.inf
    for _ in range(times):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best
