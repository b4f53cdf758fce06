"""Token files: arrays of token ids on disk, in llm.c's format, so that published shards load unchanged.

A file holds 256 int32 (magic, version, number of tokens), then the tokens in 16 or 32 bits. A prepared dataset is a
folder of token files (`train*.bin`, `val*.bin`) with `tokenizer.json` and `meta.json`.
"""

import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from gpt_arc.errors import UserError
from gpt_arc.files import command, sync
from gpt_arc.reading import open_plain, reading

HEADER = 256  # int32 values
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # (magic, version) -> type of the tokens
MAX_TOKENS = 2**31 - 1  # per file: the header counts them in an int32


class ShardWriter:
    """Appends tokens to the token files of one split: SPLIT_000000.bin and so on, each of `shard_tokens` tokens.

    A token takes 16 bits if the vocabulary fits. `written` is the number of tokens that an earlier writer saved; what
    it wrote after them is cut off. Raises UserError if the files hold fewer, and for a token outside the vocabulary.
    """

    def __init__(self, directory: Path, split: str, vocab_size: int, shard_tokens: int, written: int = 0):
        self.directory, self.split, self.shard_tokens, self.written = directory, split, shard_tokens, written
        self.vocab_size, self._type = vocab_size, _token_type(vocab_size)
        self._file: BinaryIO | None = None
        self._changed: list[Path] = []  # the last is that of `_file`

    def append(self, tokens: np.ndarray) -> None:
        if tokens.dtype.kind != "u" and tokens.min(initial=0) < 0 or tokens.max(initial=0) >= self.vocab_size:
            outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
            raise UserError(
                f"{self.directory}: the token id {outside[0]} lies outside the vocabulary of {self.vocab_size}"
            )
        while len(tokens):
            chunk = tokens[: self.shard_tokens - self.written % self.shard_tokens]
            self._file = self._file or self._open()
            self._file.write(np.ascontiguousarray(chunk, self._type).data)
            self.written += len(chunk)
            tokens = tokens[len(chunk) :]
            if self.written % self.shard_tokens == 0:
                self._changed = self.flush()
                self._close_file()

    def flush(self) -> list[Path]:
        """Hands all tokens to the operating system, with a header that makes the last file valid so far.

        Returns the files that have changed since the last call, for the caller to `sync`.
        """
        changed, self._changed = self._changed, []
        if self._file is not None:
            count = (self.written - 1) % self.shard_tokens + 1
            self._file.seek(0)
            self._file.write(_header(self._type, count))
            self._file.seek(0, os.SEEK_END)
            self._file.flush()
            self._changed = changed[-1:]
        return changed

    def close(self) -> None:
        """Flushes all tokens to disk and closes the file."""
        for path in self.flush():
            sync(path)
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        shard, before = divmod(self.written, self.shard_tokens)
        path = self.directory / f"{self.split}_{shard:06}.bin"
        self._changed.append(path)
        file = open(path, "r+b" if before else "wb")
        size = 4 * HEADER + before * self._type.itemsize
        if before and path.stat().st_size < size:
            raise UserError(f"{path} is truncated: delete {self.directory.parent} and run the same command again")
        file.truncate(size)
        file.seek(size)
        return file


class TokenFiles:
    """The token files of one split as one long sequence, read in pieces, which keeps resident memory constant.

    A file belongs to the split if its name contains the split's name as a word: val.bin, fineweb_val_000000.bin. Raises
    UserError for a file that is not a token file or is truncated.
    """

    def __init__(self, directory: Path, split: str, vocab_size: int = 2**32):
        self.vocab_size = vocab_size
        of_split = re.compile(rf"(?<![a-z]){split}(?![a-z])", re.IGNORECASE)
        self.paths = sorted(path for path in Path(directory).glob("*.bin") if of_split.search(path.stem))
        if not self.paths:
            raise UserError(f"{directory} has no token file for its {split} split: prepare the dataset again")
        self._types: list[np.dtype] = []
        self._identities: list[Identity] = []
        ends = [0]
        for path in self.paths:
            with reading(path), open_plain(path):
                content, identity = _read(path, 4 * HEADER, 0)
            header = np.frombuffer(content.ljust(4 * HEADER, b"\0"), dtype="<i4")
            dtype = FORMATS.get((int(header[0]), int(header[1])))
            if dtype is None:
                convert = command("tools/from_nanogpt.py", directory, "FOLDER")
                raise UserError(
                    f"{path} is not a token file: it begins with {header[0]}, {header[1]}; convert files of nanoGPT, "
                    f"which have no header, with: {convert}"
                )
            size = 4 * HEADER + int(header[2]) * dtype.itemsize
            if identity.size != size:
                raise UserError(
                    f"{path} is damaged, {identity.size} bytes instead of {size}: prepare the dataset again"
                )
            self._types.append(dtype)
            self._identities.append(identity)
            ends.append(ends[-1] + int(header[2]))
        self._ends = np.array(ends)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count as int64, across files, fewer at the end of the split.

        Raises UserError for a token outside the vocabulary, and for a file that has changed since it was opened.
        """
        parts = []
        count = min(count, len(self) - start)
        while count > 0:
            file = int(np.searchsorted(self._ends, start, side="right")) - 1
            size = min(count, int(self._ends[file + 1]) - start)
            dtype = self._types[file]
            offset = 4 * HEADER + (start - int(self._ends[file])) * dtype.itemsize
            content, identity = _read(self.paths[file], size * dtype.itemsize, offset)
            if identity != self._identities[file] or len(content) < size * dtype.itemsize:
                raise UserError(
                    f"{self.paths[file]} was changed or replaced while it was in use: prepare the dataset again, then "
                    "resume or start a new run"
                )
            parts.append(np.frombuffer(content, dtype=dtype))
            start, count = start + size, count - size
        tokens = np.concatenate(parts).astype(np.int64)
        if tokens.max(initial=0) >= self.vocab_size:
            folder = self.paths[0].parent
            has_tokenizer = (folder / "tokenizer.json").exists()
            mend = "prepare the dataset again" if has_tokenizer else "set --vocab_size of train.py"
            raise UserError(f"{folder} has the token id {tokens.max()}, beyond vocab_size = {self.vocab_size}: {mend}")
        return tokens


def _token_type(vocab_size: int) -> np.dtype:
    return next(dtype for dtype in FORMATS.values() if vocab_size <= 2 ** (8 * dtype.itemsize))


def _header(dtype: np.dtype, count: int) -> bytes:
    header = np.zeros(HEADER, dtype="<i4")
    header[:3] = *next(key for key, value in FORMATS.items() if value == dtype), count
    return header.tobytes()


class Identity(NamedTuple):
    """What changes when a file is replaced, truncated or written to."""

    inode: int
    size: int
    modified: int  # nanoseconds


def _read(path: Path, count: int, offset: int) -> tuple[bytes, Identity]:
    """Read bytes of a file without keeping it open: a corpus may have more files than a process may open."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        os.lseek(descriptor, offset, os.SEEK_SET)
        content = os.read(descriptor, count)
        while len(content) < count and (more := os.read(descriptor, count - len(content))):  # at most 2 GiB at once
            content += more
        status = os.fstat(descriptor)
        return content, Identity(status.st_ino, status.st_size, status.st_mtime_ns)
    finally:
        os.close(descriptor)
