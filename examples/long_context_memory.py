"""What long inputs cost a small model on a CPU: memory and CPU time of reading, of a step of decoding, and of training.

    python examples/long_context_memory.py
    python examples/long_context_memory.py --lengths 1024 4096 --training 2048
    MALLOC_MMAP_THRESHOLD_=65536 python examples/long_context_memory.py      # glibc gives freed memory back at once

Each line is a process of its own with a model of 4 blocks of width 128 and random weights, in float32. Memory is the
process's peak over what it needs for a few tokens. Beside that of training is what `train.py --dry_run` plans for
activations and logits.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic.dataclasses import dataclass

from gpt_arc.decoding.decoder import Decoder
from gpt_arc.errors import entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.planning.cost import memory_estimate
from gpt_arc.settings import STRICT, Count
from gpt_arc.tables import table
from model import GPT, GPTConfig

BAND = {"positions": "rotary", "attention_band": 256, "attention_sinks": 4}  # in every second block
READERS: dict[str, tuple[dict, torch.dtype | None, int | None]] = {  # settings, type of the cache, tokens at a time
    "rotary": ({"positions": "rotary"}, None, None),
    "rotary, parts of 512": ({"positions": "rotary"}, None, 512),
    "rotary, parts of 512, bfloat16 cache": ({"positions": "rotary"}, torch.bfloat16, 512),
    "rotary, parts of 512, int8 cache": ({"positions": "rotary"}, torch.int8, 512),
    "rotary, band of 256 and 4 sinks": (BAND, None, None),
    "alibi": ({"positions": "alibi"}, None, None),
    "alibi, parts of 512, int8 cache": ({"positions": "alibi"}, torch.int8, 512),
}
TRAINERS = "forward and backward", "forward and backward, activation checkpointing"
MOST_BIASES = 2**28  # of ALiBi, in one piece: 1 GiB, and three times that in copies


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    lengths: tuple[Count, ...] = (1024, 4096, 16_384, 32_768)
    """Tokens of prompts."""
    training: tuple[Count, ...] = (1024, 8192)
    """Tokens of training sequences."""


def make_model(length: int, settings: Mapping[str, Any]) -> GPT:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {"block_size": length, "n_layer": 4, "n_head": 4, "n_embd": 128}
    return GPT(GPTConfig(vocab_size=94, norm="rmsnorm", activation="swiglu", bias=False, **shape, **settings))


def mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def reading(name: str, length: int) -> list:
    settings, cache_dtype, prefill = READERS[name]
    if settings["positions"] == "alibi" and not prefill and 4 * length**2 > MOST_BIASES:
        return [name, length, None, None, None, None]
    decoder = Decoder(make_model(length + 4, settings).eval(), cache_dtype, prefill)
    decoder.read([[1, 2, 3]], room=1)
    decoder.step([1])
    before, prompt = mebibytes(), torch.randint(94, (length,)).tolist()
    read = seconds(lambda: decoder.read([prompt], room=4))
    step = seconds(lambda: [decoder.step([1]) for _ in range(4)]) / 4
    kept = sum(buffer.nbytes for part in decoder.cache for buffer in part.buffers()) / 2**20
    return [name, length, f"{mebibytes() - before:,.0f}", f"{kept:,.1f}", f"{read:.1f}", f"{1000 * step:.0f}"]


def training(name: str, length: int) -> list:
    model = make_model(length, {"positions": "rotary"})
    tokens = torch.randint(94, (1, length))
    model.activation_checkpointing = name.endswith("checkpointing")
    model(tokens[:, :8], tokens[:, :8]).total.backward()
    before = mebibytes()
    spent = seconds(lambda: model(tokens, tokens).total.backward())
    peak, checkpointing = mebibytes() - before, model.activation_checkpointing
    step, weights = (memory_estimate(model, n, "float32", "cpu", checkpointing) for n in (1, 0))
    return [name, length, f"{peak:,.0f}", f"{(step - weights) / 2**20:,.0f}", f"{spent:.1f}"]


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    read = [["", "tokens", "peak, MiB", "cache, MiB", "CPU, s", "a step, ms"]]
    trained = [["", "tokens", "peak, MiB", "planned, MiB", "CPU, s"]]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        read += [pool.apply(reading, (name, length)) for name in READERS for length in options.lengths]
        trained += [pool.apply(training, (name, length)) for name in TRAINERS for length in options.training]
    print(f"{table(read)}\n\n{table(trained)}")


if __name__ == "__main__":
    entry_point(main)()
