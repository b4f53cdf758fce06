"""Examples over epochs: order, held-out split and micro-batches."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from gpt_arc.distributed import RANK, WORLD_SIZE, say
from gpt_arc.tables import counted

E = TypeVar("E")


class EpochOrder:
    """Which examples make up which update: every one once an epoch, in an order that the seed and the epoch decide."""

    def __init__(self, count: int, size: int, seed: int):
        self.count, self.size, self.seed = count, size, seed
        self.per_epoch = math.ceil(count / size)  # updates, the last of them smaller

    def updates(self, epochs: int) -> int:
        return self.per_epoch * epochs

    def rows(self, update: int) -> list[int]:
        """The numbers of the examples of an update, counted from 0 over all epochs."""
        epoch, place = divmod(update, self.per_epoch)
        return self.take(epoch * self.count + place * self.size, min(self.size, self.count - place * self.size))

    def before(self, update: int) -> list[int]:
        """The numbers of the examples of all updates before an update, counted from 0 over all epochs."""
        epoch, place = divmod(update, self.per_epoch)
        return self.take(0, epoch * self.count + place * self.size) if update else []

    def take(self, first: int, count: int) -> list[int]:
        """The numbers of `count` examples from the `first` on, counted from 0 over all epochs."""
        epochs = range(first // self.count, (first + count - 1) // self.count + 1)
        orders = [np.random.default_rng((self.seed, epoch)).permutation(self.count) for epoch in epochs]
        start = first % self.count
        return np.concatenate(orders)[start : start + count].tolist()


def held_out(examples: Sequence[E], fraction: float, seed: int) -> dict[str, list[E]]:
    """The splits train and val, to which goes a `fraction` drawn by the seed; without val where that is none.

    Says so where there are too few examples for a val.
    """
    count = round(fraction * len(examples))
    if fraction and not count:
        share = f"val_fraction = {fraction:g} of {counted(len(examples), 'example')} rounds to none"
        say(f"val            none: {share}; name others by --val")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = [examples[i] for i in order]
    return {"train": mixed[count:], "val": mixed[:count]} if count else {"train": list(examples)}


def digest(content: Any) -> str:
    """A hash of whatever JSON can express."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def micro_batches(rows: Sequence[int], size: int) -> Iterator[tuple[list[int], float]]:
    """This process's part of the rows of an update, at most `size` at a time, and what it counts: 1.

    Every process gets as many parts; where there are no rows left for one it is a row that counts 0.
    """
    together = size * WORLD_SIZE
    for first in range(0, len(rows), together):
        own = list(rows[first : first + together][RANK::WORLD_SIZE])
        yield (own, 1.0) if own else ([rows[0]], 0.0)


POOL = 50  # batches whose examples are sorted by length together: enough to save padding, few enough to stay shuffled


def epoch_batches(lengths: np.ndarray, size: int, seed: int, epoch: int, group_by_length: bool) -> list[np.ndarray]:
    """The rows of each batch of an epoch, a function of seed and epoch alone: every row once, the last batch smaller.

    With `group_by_length` rows are shuffled, sorted by length within pools of batches, and the batches shuffled.
    """
    generator = np.random.default_rng((seed, epoch))
    rows = generator.permutation(len(lengths))
    if not group_by_length:
        return [rows[start : start + size] for start in range(0, len(rows), size)]
    pools = [rows[start : start + POOL * size] for start in range(0, len(rows), POOL * size)]
    rows = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [batches[i] for i in generator.permutation(len(batches))]
