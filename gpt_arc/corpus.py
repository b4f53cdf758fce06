"""From text to a prepared dataset: what the scripts in prepare/ share.

A corpus of any size goes through in a stream: the main thread reads, worker threads encode, results are written in
order. What a run has written lies in data/.NAME.partial until it is whole; a run that was stopped goes on there.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from gpt_arc.documents import BEGINNING, Cut, Documents
from gpt_arc.errors import UserError
from gpt_arc.files import DATA_ROOT, put_directory, sync, write_file
from gpt_arc.token_files import MAX_TOKENS, ShardWriter, TokenFiles, write_dataset
from gpt_arc.tokenizer import CharTokenizer, Tokenizer, find_tokenizer, load_tokenizer

BATCH = 2**20  # characters that a worker encodes at a time
SAVE_EVERY = 2**24  # tokens after which a run that is stopped goes on
SPLITS = ("train", "val")

Part = tuple[str, str, bool]  # split, text, whether a document ends with it


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """How documents become a dataset."""

    tokenizer: str = "gpt2"
    """char: one token per character. gpt2: GPT-2's BPE. Else a folder or file that holds one, or NAME below data/."""
    split: Literal["auto", "hash", "tail"] = "auto"
    """hash: documents go to val by a hash of their text. tail: the end of all is val. auto: tail for a single text."""
    val_fraction: float = 0.1
    """How much goes to val: of the documents, or with tail of the characters."""
    shard_tokens: int = 100_000_000
    """Tokens of a token file; more tokens make more files."""
    workers: int | None = None
    """Threads that encode. None: one per core."""
    overwrite: bool = False
    """Replace data/NAME if it holds something else."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction = {self.val_fraction} must lie between 0 and 1")
        if not 0 < self.shard_tokens <= MAX_TOKENS:
            raise ValueError(f"shard_tokens = {self.shard_tokens} must be at least 1 and at most {MAX_TOKENS}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers = {self.workers} must be at least 1")


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises UserError if it can't be read, or naming the first byte that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise UserError(f"{path} is not UTF-8 text: byte 0x{wrong:02X} at offset {error.start}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def prepare_text(text: str, name: str, source: str, overwrite: bool) -> None:
    """Write data/NAME from a short text by characters; the last tenth of them is the val split.

    A dataset of this name stays if it was made of the same text; otherwise this raises UserError, unless `overwrite`.
    """
    directory = dataset_directory(name)
    digest = hashlib.sha256(hashlib.sha256(text.encode()).digest()).hexdigest()
    made_of = {"sha256": digest, "tokenizer": "char", "val": "last tenth"}
    if _is_prepared(directory, made_of, None, overwrite):
        return
    tokenizer = CharTokenizer.from_text(text)
    tokens, cut = tokenizer.encode_array(text), len(text) * 9 // 10
    splits = {"train": tokens[:cut], "val": tokens[cut:]}
    write_dataset(directory, tokenizer, splits, {"source": source, "made_of": made_of})
    _report(directory, len(text), tokenizer, {split: len(tokens) for split, tokens in splits.items()})


def dataset_directory(name: str) -> Path:
    """data/NAME. Raises UserError unless `name` is a plain folder name."""
    if not name or name.startswith(".") or Path(name).name != name:
        raise UserError(f"name = {name!r} must be a plain folder name: the dataset becomes {DATA_ROOT}/NAME")
    return DATA_ROOT / name


@dataclass
class Progress:
    """How far a run has come: what going on takes."""

    position: Any = None  # in the documents, behind what has been written
    documents: int = 0  # that ended before it
    characters: int = 0  # before it
    side: str | None = None  # the split of the document that it lies in
    bytes_read: int = 0
    train: int = 0  # tokens written
    val: int = 0


def prepare_documents(documents: Documents, settings: CorpusSettings, name: str) -> None:
    """Write data/NAME from `documents`: shards of train and val, tokenizer.json and meta.json.

    Where the tokenizer has an end-of-text token it follows every document; empty documents are left out. The bytes
    written depend on the documents and settings alone, neither on the number of workers nor on interruptions. A dataset
    of this name stays if it was made of the same in the same way; otherwise this raises UserError, unless `overwrite`.
    """
    directory = dataset_directory(name)
    by_characters = settings.tokenizer == "char"
    tokenizer = None if by_characters else find_tokenizer(settings.tokenizer)
    rule = settings.split if settings.split != "auto" else "tail" if documents.is_one else "hash"
    made_of = {
        **documents.identity(),
        "tokenizer": settings.tokenizer if settings.tokenizer in ("char", "gpt2") else _digest(tokenizer),
        "split": rule,
        "val_fraction": settings.val_fraction,
        "shard_tokens": settings.shard_tokens,
    }
    if _is_prepared(directory, made_of, tokenizer, settings.overwrite):
        return
    part = settings.val_fraction
    val = f"{part:g} of the documents, by a hash" if rule == "hash" else f"the last {part:g} of the characters"
    print(f"preparing {directory} from {documents.name}; val: {val}", flush=True)

    with _work_folder(directory, made_of) as work:
        boundary = None
        if by_characters or rule == "tail":
            total, found = _survey(documents, "anywhere" if by_characters else "space", by_characters)
            tokenizer = CharTokenizer(sorted(found)) if by_characters and found else tokenizer
            if total < 2:
                raise UserError(f"{documents.name} has {total} characters: two are the least that can be split")
            if rule == "tail":  # exactly: a tenth in floating point is a little more
                boundary = total - math.ceil(total * Fraction(str(settings.val_fraction)))
        done = _write_shards(documents, settings, tokenizer, boundary, work)
        _refuse_an_empty_split(done, documents.name, rule)
        tokens = {"train": done.train, "val": done.val}
        dataset = work / "dataset"
        assert tokens == {split: len(TokenFiles(dataset, split)) for split in SPLITS}
        meta = {"format_version": 1, "vocab_size": tokenizer.vocab_size, "tokens": tokens}
        meta |= {"documents": done.documents, "source": documents.name, "made_of": made_of}
        tokenizer.save(dataset)
        write_file(dataset / "meta.json", json.dumps(meta, indent=1) + "\n")
        put_directory(dataset, directory)
    _report(directory, done.characters, tokenizer, tokens)


def _write_shards(
    documents: Documents, settings: CorpusSettings, tokenizer: Tokenizer, boundary: int | None, work: Path
) -> Progress:
    """Encode what is left to encode into the token files of `work`; progress.json says from where on."""
    saved = Progress(**(_read_json(work / "progress.json") or {}))
    if saved.position is not None:
        print(f"going on after {saved.train + saved.val:,} tokens", flush=True)
    writers = {
        split: ShardWriter(
            work / "dataset", split, tokenizer.vocab_size, settings.shard_tokens, written=getattr(saved, split)
        )
        for split in SPLITS
    }
    cut: Cut = "never"
    if tokenizer.cuts_at_space:
        cut = "anywhere" if isinstance(tokenizer, CharTokenizer) else "space"
    batches = _batches(documents, cut, boundary, settings.val_fraction, saved)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    documents.bytes_read = saved.bytes_read
    shown = _Shown("encoding", documents.total_bytes, saved.bytes_read)
    done = saved
    for done, tokens in _in_order(partial(_encode, tokenizer), batches, settings.workers or cores):
        for split, writer in writers.items():
            writer.append(tokens[split])
        done = replace(done, **{split: writer.written for split, writer in writers.items()})
        if done.train + done.val - saved.train - saved.val >= min(SAVE_EVERY, settings.shard_tokens):
            for writer in writers.values():
                writer.save()
            sync(work / "dataset")
            write_file(work / "progress.json", json.dumps(asdict(done)))
            saved = done
        shown.at(done.bytes_read)
    for writer in writers.values():
        writer.close()
    shown.close()
    return done


def _batches(
    documents: Documents, cut: Cut, boundary: int | None, val_fraction: float, start: Progress
) -> Iterator[tuple[list[Part], Progress]]:
    """What a worker encodes at a time, and the progress behind it.

    The val split starts at character `boundary`; where that is None, hashes choose its documents.
    """
    batch: list[Part] = []
    size = 0
    seen = replace(start)
    for text, ends in documents.pieces(cut, start.position):
        if text and boundary is None:
            seen.side = seen.side or _side(text, val_fraction)
            batch.append((seen.side, text, ends))
        elif text:
            at = min(max(boundary - seen.characters, 0), len(text))
            parts = [("train", text[:at], ends or seen.characters + at == boundary), ("val", text[at:], ends)]
            batch += [part for part in parts if part[1]]
        seen.documents += bool(text) and ends
        seen.characters += len(text)
        seen.side = None if ends else seen.side
        size += len(text)
        if size >= BATCH:
            yield batch, replace(seen, position=documents.position(), bytes_read=documents.bytes_read)
            batch, size = [], 0
    if batch:
        yield batch, replace(seen, position=documents.position(), bytes_read=documents.bytes_read)


def _side(text: str, val_fraction: float) -> str:
    """The split of the document that `text` begins, by that beginning alone: other documents don't move it."""
    digest = hashlib.sha256(text[:BEGINNING].encode()).digest()
    return "val" if int.from_bytes(digest[:8]) < val_fraction * 2**64 else "train"


def _encode(tokenizer: Tokenizer, batch: tuple[list[Part], Progress]) -> tuple[Progress, dict[str, np.ndarray]]:
    parts, progress = batch
    separator = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=np.uint32)
    tokens = {split: [separator[:0]] for split in SPLITS}
    for split, text, ends in parts:
        tokens[split].append(tokenizer.encode_array(text))
        if ends:
            tokens[split].append(separator)
    joined = {split: np.concatenate(arrays) for split, arrays in tokens.items()}
    assert all(array.max(initial=0) < tokenizer.vocab_size for array in joined.values())
    return progress, joined


def _in_order(encode: Callable, batches: Iterator[tuple[list[Part], Progress]], workers: int) -> Iterator[Any]:
    """`encode` of the batches on `workers` threads, in their order; the text in flight is bounded."""
    pool = ThreadPoolExecutor(workers)
    waiting: deque = deque()
    in_flight = 0
    try:
        for batch in batches:
            size = sum(len(text) for _, text, _ in batch[0])
            waiting.append((size, pool.submit(encode, batch)))
            in_flight += size
            while in_flight > 4 * workers * BATCH:
                size, result = waiting.popleft()
                yield result.result()
                in_flight -= size
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _survey(documents: Documents, cut: Cut, collect: bool) -> tuple[int, set[str]]:
    """The number of characters, and which there are if `collect`."""
    shown = _Shown("counting characters", documents.total_bytes, 0)
    total, found = 0, set()
    for text, _ in documents.pieces(cut):
        total += len(text)
        if collect:
            found.update(text)
        shown.at(documents.bytes_read)
    shown.close()
    return total, found


def _refuse_an_empty_split(done: Progress, name: str, rule: str) -> None:
    if done.documents == 0:
        raise UserError(f"{name} has no text")
    for split, change in (("train", "lower"), ("val", "raise")):
        if getattr(done, split) == 0:
            other = "" if rule == "tail" else ", or cut the text by --split=tail"
            raise UserError(
                f"nothing of the {done.documents:,} documents of {name} falls into {split}: {change} "
                f"--val_fraction{other}"
            )


@contextlib.contextmanager
def _work_folder(directory: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The folder in which `plan` is carried out, with what a stopped run of the same plan left; gone afterwards."""
    folder = directory.with_name(f".{directory.name}.partial")
    with _locked(directory):
        if _read_json(folder / "plan.json") != plan:
            if folder.exists():
                print(f"{folder} is of other texts or settings: beginning anew", flush=True)
                shutil.rmtree(folder)
            (folder / "dataset").mkdir(parents=True)
            write_file(folder / "plan.json", json.dumps(plan))
        try:
            yield folder
            shutil.rmtree(folder)
        except BaseException as error:
            saved = (folder / "progress.json").exists()
            if not saved:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt) and saved:
                raise KeyboardInterrupt("interrupted: the same command goes on where this one stopped") from None
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(folder)  # as of a full disk: say where
            raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes from preparing `directory`. Raises UserError while another one does."""
    path = directory.with_name(f".{directory.name}.lock")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{directory} is being prepared by another process: wait for it, or stop it") from None
            except OSError:
                pass  # a file system without locks
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # another process ended meanwhile and removed the file
            try:
                yield
                return
            finally:
                path.unlink()
                with contextlib.suppress(OSError):
                    DATA_ROOT.rmdir()  # if it was made for nothing


def _is_prepared(directory: Path, made_of: dict, tokenizer: Tokenizer | None, overwrite: bool) -> bool:
    """Whether the dataset is there and whole. Raises UserError if something else is, unless `overwrite`."""
    if not directory.exists() or overwrite:
        return False
    if tokenizer is not None and not any(directory.glob("*.bin")):
        files = tokenizer.files()
        if {path.name for path in directory.iterdir()} == set(files) and load_tokenizer(directory) == tokenizer:
            return False  # the tokenizer alone, as prepare/tokenizer.py leaves it
    if (_read_json(directory / "meta.json") or {}).get("made_of") != made_of:
        raise UserError(
            f"{directory} exists and holds something else: --overwrite=True replaces it, or choose another name"
        )
    try:
        for split in SPLITS:
            TokenFiles(directory, split)
        load_tokenizer(directory)
    except UserError:
        return False
    print(f"{directory} is prepared already")
    return True


def _report(directory: Path, characters: int, tokenizer: Tokenizer, tokens: dict[str, int]) -> None:
    counts = ", ".join(f"{split} {count:,} tokens" for split, count in tokens.items())
    print(f"{directory}: {characters:,} characters, vocabulary {tokenizer.vocab_size:,}, {counts}")


def _digest(tokenizer: Tokenizer) -> str:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in tokenizer.files().items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else None
    except (OSError, ValueError):
        return None


class _Shown:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, what: str, total: int | None, start: int):
        self.what, self.total, self.start = what, total, start
        self.bar = tqdm(total=total, initial=start, desc=what, unit="B", unit_scale=True, leave=False, disable=None)
        self.began = self.last = time.monotonic()

    def at(self, bytes_read: int) -> None:
        self.bar.update(bytes_read - self.bar.n)
        now = time.monotonic()
        if self.bar.disable and now - self.last >= 30:
            rate = (bytes_read - self.start) / (now - self.began)
            of = f" of {self.total / 1e6:,.0f}" if self.total else ""
            left = f", {(self.total - bytes_read) / max(rate, 1):,.0f} s left" if self.total else ""
            print(f"{self.what}: {bytes_read / 1e6:,.0f}{of} MB, {rate / 1e6:.1f} MB/s{left}", flush=True)
            self.last = now

    def close(self) -> None:
        self.bar.close()
