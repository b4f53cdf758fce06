"""How many CPU threads a step is worth, by measurement: a small model on busy cores is fastest with one."""

import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from gpt_arc.device import autocast
from gpt_arc.distributed import WORLD_SIZE
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.cost import flops_per_token
from gpt_arc.training.config import Config
from model import GPT

MEASURED_FOR = 0.15  # seconds, for each number of threads
PRODUCTS_FOR = 0.02  # seconds of products of matrices, before that
MEASURED = 20e9  # FLOPs of a measured step; a larger batch is measured in part
LARGE = 50e9  # FLOPs of one sequence: from here on, threads spend little of their time waiting for one another
WORTHWHILE = 0.9  # of the time with half the threads; cores that become busy later cost far more than a tenth


def resolve_threads(
    config: Config, saved: int | None, sequences: int, flops: int, device: torch.device, dtype: str
) -> int:
    """Returns the number of threads for a run, as `choose_threads` does.

    `saved`: the number that a resumed run began with, since sums in another order would change its results; only
    OMP_NUM_THREADS, which torchrun sets too, wins over it. `flops` counts a token's forward and backward pass.
    """
    flops *= config.model.block_size
    if saved and config.training.threads == "auto" and "OMP_NUM_THREADS" not in os.environ:
        return min(saved, os.cpu_count() or saved)
    measured = max(1, min(sequences, int(MEASURED / flops)))
    setting, large = config.training.threads, flops > LARGE
    return choose_threads(setting, device, large, lambda: step_timer(config, measured, device, dtype))


def choose_threads(
    setting: int | Literal["auto"], device: torch.device, large: bool, timer: Callable[[], Callable[[int], float]]
) -> int:
    """Returns the number of threads for the steps that `timer()` measures, as `timed` does; auto gives large ones all.

    auto doubles the number for as long as that saves a tenth of a step's time. OMP_NUM_THREADS wins over it.
    """
    most = torch.get_num_threads()
    if setting != "auto":
        return int(setting)
    if "OMP_NUM_THREADS" in os.environ or device.type != "cpu" or WORLD_SIZE > 1 or large or most == 1:
        return most
    torch.set_num_threads(1)  # what `timer` builds and tries first would take many seconds with more on busy cores
    seconds_with = timer()
    threads, seconds = 1, seconds_with(1)
    while threads < most:
        more = min(2 * threads, most)
        seconds, before = seconds_with(more), seconds
        if seconds > WORTHWHILE * before:
            break
        threads = more
    return threads


def step_timer(config: Config, sequences: int, device: torch.device, dtype: str) -> Callable[[int], float]:
    """Returns `timed` of a training step that reads random tokens."""
    from gpt_arc.training.optim import Updater  # imports torch.distributed.device_mesh, which sampling doesn't need

    model = GPT(config.model).to(device)
    updater = Updater(model, config.training, device, dtype)
    tokens = torch.randint(config.model.vocab_size, (sequences, config.model.block_size), device=device)

    def step() -> None:
        with autocast(device, dtype):
            loss = model(tokens, tokens)
        updater.backward(loss.total / tokens.numel())
        updater.update(config.training.learning_rate, loss.total.detach())

    return timed(step)


def timed(step: Callable[[], object]) -> Callable[[int], float]:
    """Returns a function that measures the mean time of `step` with some number of threads, in seconds.

    On busy cores a step with several threads can take many seconds. If these threads don't even multiply two matrices
    faster than one does, the function returns infinity at once. torch's number of threads stays as measured last.
    """
    matrix = torch.ones(256, 256)
    product = partial(torch.mm, matrix, matrix)

    def seconds(threads: int) -> float:
        if threads > 1:
            alone, together = (mean_time(product, count, PRODUCTS_FOR) for count in (1, threads))
            if together > WORTHWHILE * alone:
                return math.inf
        return mean_time(step, threads, MEASURED_FOR)

    step()
    return seconds


def mean_time(step: Callable[[], object], threads: int, least: float) -> float:
    """Mean time of `step` with some number of threads, measured for at least `least` seconds."""
    torch.set_num_threads(threads)
    times: list[float] = []
    while sum(times) < least:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.mean(times[1:] or times)  # the first one also chooses kernels


def set_reading_threads(setting: int | Literal["auto"], model: GPT, tokens: int) -> None:
    """Sets the number of threads for a model that reads up to `tokens` tokens at a time without learning."""
    device, context = model.token_embedding.weight.device, model.config.block_size
    flops = flops_per_token(model) / 3 * context  # of a forward pass alone
    windows = max(1, min(tokens // context, int(MEASURED / flops)))

    @torch.inference_mode()
    def read() -> None:
        model.hidden(torch.zeros(windows, context, dtype=torch.int64))

    torch.set_num_threads(choose_threads(setting, device, flops > LARGE, lambda: timed(read)))


def tokens_per_second(config: Config, device: torch.device, dtype: str) -> float:
    """Measures how many tokens a new run would train on in a second on this device, with the threads it would use."""
    with meta_device():
        flops = flops_per_token(GPT(config.model))
    sequences = config.data.batch_size
    threads = resolve_threads(config, None, sequences, flops, device, dtype)
    torch.set_num_threads(threads)
    seconds = step_timer(config, sequences, device, dtype)(threads)
    return sequences * config.model.block_size / seconds
