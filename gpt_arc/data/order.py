"""The order of training windows, a pure function of the seed and the number of windows consumed; evaluation windows."""

from collections.abc import Sequence

import numpy as np

from gpt_arc.errors import UserError


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Elements `index` of a pseudo-random permutation of 0 .. size - 1, computed by a keyed Feistel network.

    It works on the smallest even number of bits that covers `size` (Luby and Rackoff 1988), in eight rounds, because
    four are not uniform for small sizes. Results beyond `size` pass through it again, which keeps it a permutation
    (Black and Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(8, np.uint64)
    result = np.asarray(index, dtype=np.uint64).copy()
    todo = np.ones(result.shape, dtype=bool)
    while todo.any():
        left, right = result[todo] >> np.uint64(half), result[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[todo] = (left << np.uint64(half)) | right
        todo[todo] = result[todo] >= size
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: every input bit affects every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class TrainingOrder:
    """The order of one dataset's windows: a pure function of the seed and the number of sequences consumed.

    Each epoch cuts the `tokens` tokens into windows of `block_size` from a different offset and visits each window
    once, in a different order. It uses one window fewer than fit, which leaves room for the offset.
    """

    def __init__(self, tokens: int, block_size: int, seed: int):
        self.block_size, self.seed = block_size, seed
        self.per_epoch = max(1, (tokens - 1) // block_size - 1)
        self.room = tokens - 1 - self.per_epoch * block_size  # the largest offset

    def starts(self, consumed: int, count: int) -> np.ndarray:
        """Positions (count,) of the first tokens of sequences consumed .. consumed + count."""
        return self.at(np.arange(consumed, consumed + count))

    def at(self, sequences: np.ndarray) -> np.ndarray:
        """Positions of the first tokens of the sequences with these numbers."""
        starts = np.empty(len(sequences), dtype=np.int64)
        for epoch in np.unique(sequences // self.per_epoch):
            in_epoch = sequences // self.per_epoch == epoch
            offset_seed, order_seed = np.random.SeedSequence((self.seed, int(epoch))).generate_state(2, np.uint64)
            offset = int(offset_seed) % (self.room + 1)
            starts[in_epoch] = offset + self.block_size * permute(
                sequences[in_epoch] % self.per_epoch, self.per_epoch, int(order_seed)
            )
        return starts


class MixtureOrder:
    """The order of the windows of several datasets: a pure function of the seed and the number consumed.

    Every CYCLE sequences hold each dataset's share, in an order that differs between cycles. So the number of windows
    a dataset has contributed before a cycle follows from the cycle's number.
    """

    CYCLE = 4096

    def __init__(self, orders: Sequence[TrainingOrder], bounds: np.ndarray, weights: Sequence[float], seed: int):
        self.orders, self.bounds, self.seed = orders, bounds, seed
        exact = np.array(weights) * self.CYCLE
        self.quotas = np.floor(exact).astype(np.int64)
        largest = np.argsort(self.quotas - exact, kind="stable")[: self.CYCLE - self.quotas.sum()]
        self.quotas[largest] += 1  # largest-remainder rounding
        if not self.quotas.all():
            raise UserError(
                f"a weight of the mixture is less than a {self.CYCLE}th of their sum: raise it, or remove the dataset"
            )
        self.firsts = np.cumsum(self.quotas) - self.quotas

    def starts(self, consumed: int, count: int) -> np.ndarray:
        """Positions (count,) of the first tokens of sequences consumed .. consumed + count."""
        sequences = np.arange(consumed, consumed + count)
        cycles, slots = np.divmod(sequences, self.CYCLE)
        for cycle in np.unique(cycles):
            key = np.random.SeedSequence((self.seed, int(cycle), self.CYCLE)).generate_state(1, np.uint64)[0]
            slots[cycles == cycle] = permute(slots[cycles == cycle], self.CYCLE, int(key))
        sources = np.searchsorted(self.firsts, slots, side="right") - 1
        numbers = cycles * self.quotas[sources] + slots - self.firsts[sources]
        starts = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            rows = sources == source
            starts[rows] = self.bounds[source] + self.orders[source].at(numbers[rows])
        return starts


def evaluation_starts(tokens: int, block_size: int, windows: int) -> np.ndarray:
    """Positions of the first tokens of the windows to evaluate: `windows` of them, spread evenly.

    If `windows` is 0, or more than fit, they cover the split: every token except the first is predicted once, and the
    last window is cut short.
    """
    every = np.arange(0, tokens - 1, block_size)
    if windows == 0 or windows >= len(every):
        return every
    return np.linspace(0, tokens - 1 - block_size, windows).astype(np.int64)
