"""Token files: arrays of token ids on disk, in llm.c's format, so that shards published in it load as they are.

A file is 256 int32 (magic, version, number of tokens), then the tokens in 16 or 32 bits. A prepared dataset is a folder
of token files (`train*.bin`, `val*.bin`) with `tokenizer.json` and `meta.json`.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from gpt_arc.errors import UserError
from gpt_arc.files import new_directory, write_file
from gpt_arc.tokenizer import Tokenizer

HEADER = 256  # int32 values
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # (magic, version) -> type of the tokens
DATA_ROOT = Path("data")


def write_tokens(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write a token file, in 16 bits if the vocabulary fits. Raises UserError for an id outside the vocabulary."""
    tokens = np.asarray(tokens)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise UserError(f"{path}: the token id {wrong} lies outside the vocabulary of {vocab_size}")
    if len(tokens) >= 2**31:
        raise UserError(f"{path}: {len(tokens)} tokens are more than a token file counts, 2**31 - 1: use several")
    (magic, version), dtype = next(item for item in FORMATS.items() if vocab_size <= 2 ** (8 * item[1].itemsize))
    header = np.zeros(HEADER, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    write_file(path, header.tobytes() + tokens.astype(dtype).tobytes())


def _read(path: Path, count: int, offset: int) -> bytes:
    """Bytes of a file that is open for this long only: a corpus may have more files than a process may open."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, count, offset)
    finally:
        os.close(descriptor)


class TokenFiles:
    """The token files of one split as one long sequence, read with `os.pread` so that resident memory stays flat.

    They are those whose name has the split's as a word: val.bin, fineweb_val_000000.bin. Raises UserError for a file
    that is not a token file or is cut short.
    """

    def __init__(self, directory: Path, split: str, vocab_size: int = 2**32):
        self.vocab_size = vocab_size
        of_split = re.compile(rf"(?<![a-z]){split}(?![a-z])", re.IGNORECASE)
        self.paths = sorted(path for path in Path(directory).glob("*.bin") if of_split.search(path.stem))
        if not self.paths:
            raise UserError(f"{directory} has no token file for its {split} split: prepare the dataset again")
        self._types: list[np.dtype] = []
        ends = [0]
        for path in self.paths:
            header = np.frombuffer(_read(path, 4 * HEADER, 0).ljust(4 * HEADER, b"\0"), dtype="<i4")
            dtype = FORMATS.get((int(header[0]), int(header[1])))
            if dtype is None:
                raise UserError(f"{path} is not a token file: it begins with {header[0]}, {header[1]}")
            size = 4 * HEADER + int(header[2]) * dtype.itemsize
            if path.stat().st_size != size:
                raise UserError(
                    f"{path} is damaged, {path.stat().st_size} bytes instead of {size}: prepare the dataset again"
                )
            self._types.append(dtype)
            ends.append(ends[-1] + int(header[2]))
        self._ends = np.array(ends)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count as int64, across files. Raises UserError for one beyond the vocabulary."""
        parts = []
        while count > 0:
            file = int(np.searchsorted(self._ends, start, side="right")) - 1
            here = min(count, int(self._ends[file + 1]) - start)
            dtype = self._types[file]
            offset = 4 * HEADER + (start - int(self._ends[file])) * dtype.itemsize
            parts.append(np.frombuffer(_read(self.paths[file], here * dtype.itemsize, offset), dtype=dtype))
            start, count = start + here, count - here
        tokens = np.concatenate(parts).astype(np.int64)
        if tokens.max(initial=0) >= self.vocab_size:
            raise UserError(
                f"{self.paths[0].parent} has the token id {tokens.max()}, beyond vocab_size = {self.vocab_size}: set "
                "--vocab_size, or give the dataset its own tokenizer.json"
            )
        return tokens


def write_dataset(
    directory: Path, tokenizer: Tokenizer, splits: dict[str, np.ndarray], meta: dict[str, Any]
) -> dict[str, Any]:
    """Write a prepared dataset whole: token files, tokenizer.json and meta.json; an older one in its place goes."""
    meta = {
        "format_version": 1,
        "vocab_size": tokenizer.vocab_size,
        "tokens": {split: len(tokens) for split, tokens in splits.items()},
        **meta,
    }
    with new_directory(directory) as temporary:
        for split, tokens in splits.items():
            write_tokens(temporary / f"{split}.bin", tokens, tokenizer.vocab_size)
        tokenizer.save(temporary)
        write_file(temporary / "meta.json", json.dumps(meta, indent=1) + "\n")
    return meta
