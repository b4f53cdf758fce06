"""What training reads: prepared datasets, the order of their windows, and the fixed windows of an evaluation."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_arc.errors import UserError
from gpt_arc.token_files import DATA_ROOT, TokenFiles
from gpt_arc.tokenizer import FILE_NAME as TOKENIZER_FILE
from gpt_arc.tokenizer import Tokenizer, load_tokenizer
from model import IGNORED

SCRIPTS = Path(__file__).parents[1] / "prepare"
SMALL_CORPORA = ("python_manual", "tinyshakespeare")  # those that train.py prepares by itself


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset: a folder of token files. Bare shards, as others publish them, come without a tokenizer."""

    directory: Path
    tokenizer: Tokenizer | None

    @property
    def fingerprint(self) -> str:
        """Tells this data from other data of the same name, as far as meta.json knows of it."""
        meta = self.directory / "meta.json"
        return hashlib.sha256(meta.read_bytes()).hexdigest() if meta.exists() else ""

    def split(self, name: str, block_size: int, vocab_size: int) -> TokenFiles:
        """The token files of a split. Raises UserError if it doesn't hold one window."""
        files = TokenFiles(self.directory, name, vocab_size)
        if len(files) <= block_size:
            raise UserError(
                f"block_size = {block_size} is longer than the {name} split of {self.directory}: a window and its "
                f"last target take {block_size + 1} tokens and it has {len(files)}; lower --block_size"
            )
        return files


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


def open_dataset(directory: Path) -> Dataset:
    """Raises UserError if the folder's tokenizer is damaged."""
    return Dataset(directory, load_tokenizer(directory) if (directory / TOKENIZER_FILE).exists() else None)


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
        sequences = np.arange(consumed, consumed + count)
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(sequences // self.per_epoch):
            here = sequences // self.per_epoch == epoch
            offset_seed, order_seed = np.random.SeedSequence((self.seed, int(epoch))).generate_state(2, np.uint64)
            offset = int(offset_seed) % (self.room + 1)
            starts[here] = offset + self.block_size * permute(
                sequences[here] % self.per_epoch, self.per_epoch, int(order_seed)
            )
        return starts


def evaluation_starts(tokens: int, block_size: int, windows: int) -> np.ndarray:
    """First tokens of the windows to evaluate: `windows` of them spread evenly, or all of the split if 0 or too many.

    All means side by side: every token but the first is predicted once, the last window being cut short.
    """
    every = np.arange(0, tokens - 1, block_size)
    if windows == 0 or windows >= len(every):
        return every
    return np.linspace(0, tokens - 1 - block_size, windows).astype(np.int64)


def windows(files: TokenFiles, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, each (B, length) int64, of the windows at `starts`; past the end, targets are -1."""
    rows = np.full((len(starts), length + 1), IGNORED, dtype=np.int64)
    for row, start in zip(rows, starts.tolist()):
        tokens = files.read(start, min(length + 1, len(files) - start))
        row[: len(tokens)] = tokens
    both = torch.from_numpy(rows)
    return both[:, :-1].clamp(min=0), both[:, 1:].contiguous()


def batches(
    files: TokenFiles, starts: np.ndarray, size: int, block_size: int, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets, each (size, block_size) int64, of the windows at `starts` that fall to process `rank`.

    What is missing at the end is filled up with rows that are not scored, so every batch has the same shape and every
    process gets as many.
    """
    for first in range(rank * size, len(starts) + rank * size, size * ranks):
        tokens, targets = windows(files, starts[first : first + size], block_size)
        missing = size - len(tokens)
        yield F.pad(tokens, (0, 0, 0, missing)), F.pad(targets, (0, 0, 0, missing), value=IGNORED)
