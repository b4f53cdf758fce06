"""What training reads: prepared datasets, the order of their windows, and the fixed windows of an evaluation."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_arc.config import Source
from gpt_arc.errors import UserError
from gpt_arc.files import DATA_ROOT
from gpt_arc.token_files import TokenFiles
from gpt_arc.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from model import IGNORED

SCRIPTS = Path(__file__).parents[1] / "prepare"
SMALL_CORPORA = ("python_manual", "tinyshakespeare")  # those that train.py prepares by itself


@dataclass(frozen=True)
class Corpus:
    """What a run trains on: prepared datasets, folders of token files, each with its share of the windows.

    Bare shards, as others publish them, come without a tokenizer.
    """

    names: tuple[str, ...]
    directories: tuple[Path, ...]
    weights: tuple[float, ...]  # their sum is 1
    tokenizer: Tokenizer | None

    @property
    def fingerprint(self) -> str:
        """Tells this data from other data of the same name, as far as meta.json knows of it."""
        metas = [directory / "meta.json" for directory in self.directories]
        content = [meta.read_bytes() for meta in metas if meta.exists()]
        if len(self.names) > 1:
            content.append(repr((self.names, self.weights)).encode())
        return hashlib.sha256(b"".join(content)).hexdigest() if content else ""

    def separator(self) -> int:
        """The token that begins a document, for attention confined to documents. Raises UserError if there is none."""
        if self.tokenizer is None or self.tokenizer.end_of_text is None:
            raise UserError(
                f"document_mask = true needs documents that an end-of-text token parts, and {self.directories[0]} has "
                "no tokenizer with one: prepare the text with a BPE tokenizer, or leave document_mask out"
            )
        return self.tokenizer.end_of_text

    def split(self, name: str, block_size: int, vocab_size: int, document_mask: bool) -> "Split":
        """One split of every dataset. Raises UserError if one doesn't hold a window."""
        parts = []
        for directory in self.directories:
            files = TokenFiles(directory, name, vocab_size)
            if len(files) <= block_size:
                raise UserError(
                    f"block_size = {block_size} is longer than the {name} split of {directory}: a window and its "
                    f"last target take {block_size + 1} tokens and it has {len(files)}; lower --block_size"
                )
            counted = _tokens_of(directory, name)
            if counted not in (None, len(files)):
                raise UserError(
                    f"{directory} has {len(files):,} tokens in its {name} split, its meta.json counts {counted:,}: a "
                    "token file is missing or surplus; prepare the dataset again"
                )
            parts.append(files)
        return Split(parts, self.weights, self.separator() if document_mask else None)


def _tokens_of(directory: Path, split: str) -> int | None:
    """The number of tokens that meta.json counts, None where there is none, as beside others' shards."""
    try:
        return int(json.loads((directory / "meta.json").read_text())["tokens"][split])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prepare_missing(sources: Sequence[Source]) -> None:
    """Prepare the small datasets that come with a script. Raises UserError, saying what to run, for any other."""
    for source in sources:
        if find_dataset(source.name) is None:
            prepare_dataset(source.name)


def open_corpus(sources: Sequence[Source]) -> Corpus | None:
    """The datasets of a run, None if one is not prepared. Raises UserError for tokenizers that differ."""
    directories = [find_dataset(source.name) for source in sources]
    if None in directories:
        return None
    tokenizers = [load_tokenizer(d) if holds_tokenizer(d) else None for d in directories]
    for directory, tokenizer in zip(directories, tokenizers):
        if tokenizer != tokenizers[0]:
            raise UserError(
                f"{directory} has another tokenizer than {directories[0]}: the datasets of a mixture must share one"
            )
    return Corpus(tuple(source.name for source in sources), tuple(directories), shares(sources), tokenizers[0])


def shares(sources: Sequence[Source]) -> tuple[float, ...]:
    """The weights of a mixture, divided by their sum."""
    total = sum(source.weight for source in sources)
    return tuple(source.weight / total for source in sources)


def plan(sources: Sequence[Source], split: "Split | None", tokens: int) -> list[str]:
    """For each dataset its share of `tokens`, and how many epochs that is of it, where it is prepared."""
    lines = []
    for source, share, part in zip(sources, shares(sources), split.parts if split else [None] * len(sources)):
        epochs = f"{tokens * share / len(part):.3g} epochs of {len(part):,} tokens" if part else "not prepared yet"
        lines.append(f"{share:.1%} {source.name}: {epochs}")
    return lines


class Split:
    """One split of a corpus: the token files of its datasets one after another, which no window crosses."""

    def __init__(self, parts: Sequence[TokenFiles], weights: Sequence[float], separator: int | None = None):
        self.parts, self.weights, self.separator = parts, weights, separator
        self.bounds = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count as int64, fewer at the end of the dataset that `start` lies in."""
        part = int(np.searchsorted(self.bounds, start, side="right")) - 1
        return self.parts[part].read(start - int(self.bounds[part]), count)

    def training_order(self, block_size: int, seed: int) -> "TrainingOrder | MixtureOrder":
        if len(self.parts) == 1:
            return TrainingOrder(len(self), block_size, seed)
        seeds = np.random.SeedSequence((seed, len(self.parts))).generate_state(len(self.parts), np.uint64)
        orders = [TrainingOrder(len(part), block_size, int(own)) for part, own in zip(self.parts, seeds)]
        return MixtureOrder(orders, self.bounds[:-1], self.weights, seed)

    def evaluation_starts(self, block_size: int, windows: int) -> np.ndarray:
        """First tokens of the windows to evaluate: every dataset's share of them, as far as its split has so many.

        0 means the whole of every split.
        """
        counts = [windows and max(1, round(windows * weight)) for weight in self.weights]
        starts = [evaluation_starts(len(part), block_size, count) for part, count in zip(self.parts, counts)]
        return np.concatenate([bound + own for bound, own in zip(self.bounds, starts)])


def find_dataset(name: str) -> Path | None:
    """The folder of a prepared dataset, `name` being one below data/ or a path. None if it is not there."""
    for directory in (DATA_ROOT / name, Path(name)):
        if next(directory.glob("*.bin"), None):
            return directory
    return None


def prepare_dataset(name: str) -> Path:
    """Prepare a small corpus that comes with a script. Raises UserError, saying what to run, for any other."""
    script = SCRIPTS / f"{name}.py"
    if name not in SMALL_CORPORA:
        command = (
            f"`python prepare/{name}.py`"
            if script.exists()
            else f"`python prepare/text.py --input FILE_OR_FOLDER --name {name} --tokenizer gpt2` on your own text"
        )
        raise UserError(
            f"there is no dataset {name}, neither {DATA_ROOT / name} nor a folder of that path: prepare it by "
            f"{command}, or name a prepared one by --dataset"
        )
    print(f"preparing the dataset {name}", flush=True)
    if subprocess.run([sys.executable, script], stdout=sys.stderr).returncode:
        raise UserError(f"the dataset {name} could not be prepared, as said above")
    return DATA_ROOT / name


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


def windows(split: Split | TokenFiles, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, each (B, length) int64, of the windows at `starts`; past the end, targets are -1."""
    rows = np.full((len(starts), length + 1), IGNORED, dtype=np.int64)
    for row, start in zip(rows, starts.tolist()):
        tokens = split.read(start, length + 1)
        row[: len(tokens)] = tokens
    both = torch.from_numpy(rows)
    return both[:, :-1].clamp(min=0), both[:, 1:].contiguous()


def ahead(batches: Iterator[tuple[Tensor, ...]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The same batches, each read in a thread of its own while the one before is computed with; pinned for a GPU."""
    pin = device.type == "cuda"

    def read() -> tuple[Tensor, ...] | None:
        batch = next(batches, None)
        return tuple(tensor.pin_memory() for tensor in batch) if pin and batch else batch

    # which GPU a thread means is its own affair
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device if pin else None, initargs=[device] * pin) as thread:
        reading = thread.submit(read)
        while (batch := reading.result()) is not None:
            reading = thread.submit(read)
            yield batch


def training_batches(
    split: Split, order: "TrainingOrder | MixtureOrder", consumed: int, sequences: int, size: int, block_size: int,
    rank: int = 0, ranks: int = 1,
) -> Iterator[tuple[Tensor, ...]]:  # fmt: skip
    """Batches of `size` for process `rank`, without end: of each global batch of `sequences` its own slice.

    The first global batch begins after `consumed` sequences.
    """
    own = sequences // ranks
    while True:
        yield from batches(split, order.starts(consumed + rank * own, own), size, block_size)
        consumed += sequences


def batches(
    split: Split, starts: np.ndarray, size: int, block_size: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Tensor, ...]]:
    """What the model is called with, each (size, block_size) int64, of the windows that fall to process `rank`.

    Tokens and targets, and if the split has a separator, the number of the document that each token belongs to; the
    separator begins its document. What is missing at the end is filled up with rows that are not scored, so every batch
    has the same shape and every process gets as many.
    """
    for first in range(rank * size, len(starts) + rank * size, size * ranks):
        tokens, targets = windows(split, starts[first : first + size], block_size)
        missing = (0, 0, 0, size - len(tokens))
        tokens, targets = F.pad(tokens, missing), F.pad(targets, missing, value=IGNORED)
        yield (tokens, targets) if split.separator is None else (tokens, targets, (tokens == split.separator).cumsum(1))
