"""The order of training windows, a pure function of the seed and of the number of windows read, and an evaluation's."""

from collections.abc import Sequence

import numpy as np

from gpt_arc.errors import UserError


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A pseudo-random permutation of 0 .. size - 1 at `index`, without holding it: a keyed Feistel network.

    Rounds over the smallest even number of bits that covers `size` mix the halves (Luby and Rackoff 1988), eight of
    them because four are not uniform for a handful of elements; results beyond `size` are sent through again, which
    keeps it a permutation (Black and Rogaway 2002).
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
    """SplitMix64's finalizer: every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class TrainingOrder:
    """Which window comes when: a pure function of the seed and the number of sequences consumed before it.

    Epoch e cuts the split of `tokens` tokens into windows of `block_size` from an offset of its own and visits each
    once, in an order of its own. One window fewer than fit leaves the offset room to move.
    """

    def __init__(self, tokens: int, block_size: int, seed: int):
        self.block_size, self.seed = block_size, seed
        self.per_epoch = max(1, (tokens - 1) // block_size - 1)
        self.room = tokens - 1 - self.per_epoch * block_size  # the largest offset

    def starts(self, consumed: int, count: int) -> np.ndarray:
        """First tokens (count,) of the sequences consumed .. consumed + count."""
        return self.at(np.arange(consumed, consumed + count))

    def at(self, sequences: np.ndarray) -> np.ndarray:
        """First tokens of the sequences with these numbers."""
        starts = np.empty(len(sequences), dtype=np.int64)
        for epoch in np.unique(sequences // self.per_epoch):
            here = sequences // self.per_epoch == epoch
            offset_seed, order_seed = np.random.SeedSequence((self.seed, int(epoch))).generate_state(2, np.uint64)
            offset = int(offset_seed) % (self.room + 1)
            starts[here] = offset + self.block_size * permute(
                sequences[here] % self.per_epoch, self.per_epoch, int(order_seed)
            )
        return starts


class MixtureOrder:
    """Which window of which dataset comes when: a pure function of the seed and the sequences consumed before it.

    Of every CYCLE sequences each dataset gives its share, in an order of the cycle's own: how many it has given before
    is known without counting.
    """

    CYCLE = 4096

    def __init__(self, orders: Sequence[TrainingOrder], bounds: np.ndarray, weights: Sequence[float], seed: int):
        self.orders, self.bounds, self.seed = orders, bounds, seed
        exact = np.array(weights) * self.CYCLE
        self.quotas = np.floor(exact).astype(np.int64)
        left_over = np.argsort(self.quotas - exact, kind="stable")[: self.CYCLE - self.quotas.sum()]
        self.quotas[left_over] += 1  # to the largest remainders
        if not self.quotas.all():
            raise UserError(
                f"a weight of the mixture is less than a {self.CYCLE}th of their sum: give it more, or leave it out"
            )
        self.firsts = np.cumsum(self.quotas) - self.quotas

    def starts(self, consumed: int, count: int) -> np.ndarray:
        """First tokens (count,) of the sequences consumed .. consumed + count."""
        sequences = np.arange(consumed, consumed + count)
        cycles, slots = np.divmod(sequences, self.CYCLE)
        for cycle in np.unique(cycles):
            key = np.random.SeedSequence((self.seed, int(cycle), self.CYCLE)).generate_state(1, np.uint64)[0]
            slots[cycles == cycle] = permute(slots[cycles == cycle], self.CYCLE, int(key))
        sources = np.searchsorted(self.firsts, slots, side="right") - 1
        numbers = cycles * self.quotas[sources] + slots - self.firsts[sources]
        starts = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            here = sources == source
            starts[here] = self.bounds[source] + self.orders[source].at(numbers[here])
        return starts


def evaluation_starts(tokens: int, block_size: int, windows: int) -> np.ndarray:
    """First tokens of the windows to evaluate: `windows` of them spread evenly, or all of the split if 0 or too many.

    All means side by side: every token but the first is predicted once, the last window being cut short.
    """
    every = np.arange(0, tokens - 1, block_size)
    if windows == 0 or windows >= len(every):
        return every
    return np.linspace(0, tokens - 1 - block_size, windows).astype(np.int64)
