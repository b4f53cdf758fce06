"""Batches of windows of tokens, prefetched in a thread."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gpt_arc.data.masking import Masking
from gpt_arc.data.order import MixtureOrder, TrainingOrder
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.device import send
from gpt_arc.nn.head_loss import IGNORED

CPU = torch.device("cpu")
Arguments = tuple[Tensor, Tensor, *tuple[Tensor | None, ...]]  # of GPT.forward
Batch = Sequence[Tensor | None]  # the same, wherever it came from


def pad_rows(rows: Iterable[Sequence[int]], device: torch.device = CPU, value: int = 0) -> Tensor:
    """Stacks rows of different lengths: (rows, longest) int64, with `value` after the end of a row."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return send(pad_sequence(tensors, batch_first=True, padding_value=value), device)


class TokenSource(Protocol):
    """What windows are read from: a split, or a stand-in."""

    @property
    def separator(self) -> int | None: ...

    @property
    def masking(self) -> Masking | None: ...

    def dataset_of(self, start: int) -> range: ...

    def read(self, start: int, count: int) -> np.ndarray: ...


def windows(split: TokenSource | TokenFiles, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, each (B, length) int64, of the windows at `starts`. Targets past the end are -1."""
    rows = np.full((len(starts), length + 1), IGNORED, dtype=np.int64)
    for row, start in zip(rows, starts.tolist()):
        tokens = split.read(start, length + 1)
        row[: len(tokens)] = tokens
    padded = torch.from_numpy(rows)
    return padded[:, :-1].clamp(min=0), padded[:, 1:].contiguous()


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields the same batches, reading each in a thread while its predecessor is in use. For a GPU they are pinned."""
    pin = device.type == "cuda"

    def read() -> Batch | None:
        batch = next(batches, None)
        return tuple(tensor if tensor is None else tensor.pin_memory() for tensor in batch) if pin and batch else batch

    # torch's current GPU is a property of each thread
    with ThreadPoolExecutor(1, initializer=partial(torch.cuda.set_device, device) if pin else None) as thread:
        reading = thread.submit(read)
        while (batch := reading.result()) is not None:
            reading = thread.submit(read)
            yield batch


def training_batches(
    split: TokenSource, order: TrainingOrder | MixtureOrder, consumed: int, sequences: int, size: int, block_size: int,
    rank: int = 0, ranks: int = 1,
) -> Iterator[Arguments]:  # fmt: skip
    """Yields batches of `size` forever: the slice of process `rank` of each global batch of `sequences`.

    The first global batch begins after `consumed` sequences.
    """
    share = sequences // ranks
    while True:
        first = consumed + rank * share
        numbers = np.arange(first, first + share)
        yield from evaluation_batches(split, order.starts(first, share), size, block_size, numbers=numbers)
        consumed += sequences


def evaluation_batches(
    split: TokenSource, starts: np.ndarray, size: int, block_size: int, rank: int = 0, ranks: int = 1,
    numbers: np.ndarray | None = None,
) -> Iterator[Arguments]:  # fmt: skip
    """Yields the model's arguments for the windows of process `rank`, each (size, block_size) int64.

    They are tokens, targets and, if the split has a separator, the number of each token's document; a document begins
    with its separator. Of pairs, they are tokens, targets, types and labels. Masks and pairs are drawn by the windows'
    `numbers`; None: by their starts. Rows that are not scored pad the last batch, so every batch has the same shape and
    every process gets the same number of batches.
    """
    for first in range(rank * size, len(starts) + rank * size, size * ranks):
        chosen = starts[first : first + size]
        seeds = (starts if numbers is None else numbers)[first : first + size]
        absent = size - len(chosen)
        missing = (0, 0, 0, absent)
        if split.masking and split.masking.pairs:
            tokens, types, is_text, labels = split.masking.pairs.rows(split, chosen, seeds, block_size)
            tokens, targets = split.masking.hide(tokens, is_text, seeds)
            further = None, None, None, F.pad(types, missing), F.pad(labels, (0, absent), value=IGNORED)
        else:
            tokens, targets = windows(split, chosen, block_size)
            further = () if split.separator is None else (F.pad((tokens == split.separator).cumsum(1), missing),)
            if split.masking:
                real = F.pad(targets[:, :-1] != IGNORED, (1, 0), value=True)
                tokens, targets = split.masking.hide(tokens.where(real, split.masking.token), real, seeds)
        yield F.pad(tokens, missing), F.pad(targets, missing, value=IGNORED), *further


def blank_batch(split: TokenSource, size: int, block_size: int) -> Arguments:
    """A batch like those of `evaluation_batches`, of zeros."""
    rows = torch.zeros(size, block_size, dtype=torch.int64)
    if split.masking and split.masking.pairs:
        return rows, rows, None, None, None, rows, rows[:, 0]
    return (rows, rows) if split.separator is None else (rows, rows, rows)
