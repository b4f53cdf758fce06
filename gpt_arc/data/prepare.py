"""From text to a prepared dataset: what the scripts in prepare/ share.

A corpus of any size goes through in a stream: the main thread reads, worker threads encode, results are written in
order. A text file goes in pieces for char and GPT-2's kind of tokenizer; for others it is held whole, as a line of JSON
or a row of parquet always is. What a run has written lies in data/.NAME.partial until all is; a run that was stopped
goes on there.
"""

import contextlib
import dataclasses
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
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from gpt_arc.data.documents import BEGINNING, Cut, Documents
from gpt_arc.data.token_files import MAX_TOKENS, ShardWriter, TokenFiles
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, find_tokenizer, load_tokenizer
from gpt_arc.errors import UserError
from gpt_arc.files import DATA_ROOT, put_directory, sync, write_file
from gpt_arc.settings import STRICT

BATCH = 2**20  # characters that a worker encodes at a time
SAVE_EVERY = 2**24  # tokens after which a run that is stopped goes on
SPLITS = ("train", "val")
Part = tuple[str, str, bool]  # split, text, whether a document ends with it


@dataclass(frozen=True, kw_only=True, config=STRICT)
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
    """Prepare data/NAME anew, whatever it holds."""

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction = {self.val_fraction} must lie between 0 and 1")
        if not 0 < self.shard_tokens <= MAX_TOKENS:
            raise ValueError(f"shard_tokens = {self.shard_tokens} must be at least 1 and at most {MAX_TOKENS}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers = {self.workers} must be at least 1")


def dataset_directory(name: str) -> Path:
    """data/NAME. Raises UserError unless `name` is a plain folder name."""
    if not name or name.startswith(".") or Path(name).name != name:
        raise UserError(f"name = {name!r} must be a plain folder name: the dataset becomes {DATA_ROOT}/NAME")
    return DATA_ROOT / name


@dataclasses.dataclass
class PreparationProgress:
    """How far a run has come: what going on takes."""

    position: Any = None  # in the documents, behind what has been written
    revision: str | None = None  # of the documents
    documents: int = 0  # that ended before it
    empty: int = 0  # documents without text, which are not among those
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
        "tokenizer": "char" if by_characters else _digest(tokenizer),
        "split": rule,
        "val_fraction": settings.val_fraction,
        "shard_tokens": settings.shard_tokens,
    }
    part = settings.val_fraction
    val = f"{part:g} of the documents, by a hash" if rule == "hash" else f"the last {part:g} of the characters"

    work = directory.with_name(f".{directory.name}.partial")
    with _locked(directory):
        if _is_prepared(directory, made_of, tokenizer, settings.overwrite):
            print(f"{directory} is prepared already")
            if _read_json(work / "plan.json") in (None, made_of):  # of a run that was killed at its end
                _remove(work)
            return
        print(f"preparing {directory} from {documents.name}; val: {val}", flush=True)
        with _carrying_out(made_of, work, settings.overwrite):
            documents.revision = (_read_json(work / "progress.json") or {}).get("revision")
            boundary = None
            if by_characters or rule == "tail":
                total, found = _survey(documents, "anywhere" if by_characters else "space", by_characters)
                tokenizer = CharTokenizer(sorted(found)) if by_characters and found else tokenizer
                if total < 2:
                    raise UserError(f"{documents.name} has {total} characters: two are the least that can be split")
                if rule == "tail":  # exactly: a tenth in floating point is a little more
                    boundary = total - math.ceil(total * Fraction(str(part)))
            done = _write_shards(documents, settings, tokenizer, boundary, work)
            _refuse_an_empty_split(done, documents.name, rule)
            tokens = {"train": done.train, "val": done.val}
            dataset = work / "dataset"
            assert tokens == {split: len(TokenFiles(dataset, split)) for split in SPLITS}
            meta = {"format_version": 1, "vocab_size": tokenizer.vocab_size, "tokens": tokens}
            meta |= {"documents": done.documents, "source": documents.name, "made_of": made_of}
            meta |= {"revision": documents.revision} if documents.revision else {}
            tokenizer.save(dataset)
            write_file(dataset / "meta.json", json.dumps(meta, indent=1) + "\n")
            put_directory(dataset, directory)
    counts = ", ".join(f"{split} {count:,} tokens" for split, count in tokens.items())
    empty = f", {done.empty:,} empty document{'s' if done.empty > 1 else ''} left out" if done.empty else ""
    print(f"{directory}: {done.characters:,} characters, vocabulary {tokenizer.vocab_size:,}, {counts}{empty}")


def _write_shards(
    documents: Documents, settings: CorpusSettings, tokenizer: Tokenizer, boundary: int | None, work: Path
) -> PreparationProgress:
    """Encode what is left to encode into the token files of `work`; progress.json says from where on."""
    saved = PreparationProgress(**(_read_json(work / "progress.json") or {}))
    if saved.position is not None:
        print(f"going on after {saved.train + saved.val:,} tokens", flush=True)
    writers = {
        split: ShardWriter(work / "dataset", split, tokenizer.vocab_size, settings.shard_tokens, getattr(saved, split))
        for split in SPLITS
    }
    cut: Cut = "never"
    if tokenizer.cuts_at_space:
        cut = "anywhere" if isinstance(tokenizer, CharTokenizer) else "space"
    batches = _batches(documents, cut, boundary, settings.val_fraction, saved)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    documents.bytes_read = saved.bytes_read
    bar = _ProgressBar("encoding", documents.total_bytes, saved.bytes_read)
    done = saved
    for done, tokens in _in_order(partial(_encode, tokenizer), batches, settings.workers or cores):
        for split, writer in writers.items():
            writer.append(tokens[split])
        done = replace(done, **{split: writer.written for split, writer in writers.items()})
        if done.train + done.val - saved.train - saved.val >= min(SAVE_EVERY, settings.shard_tokens):
            for writer in writers.values():
                writer.save()
            sync(work / "dataset")
            write_file(work / "progress.json", json.dumps(asdict(replace(done, revision=documents.revision))))
            saved = done
        bar.at(done.bytes_read)
    for writer in writers.values():
        writer.close()
    bar.close()
    return done


def _batches(
    documents: Documents, cut: Cut, boundary: int | None, val_fraction: float, start: PreparationProgress
) -> Iterator[tuple[list[Part], PreparationProgress]]:
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
        seen.empty += not text  # a text comes in pieces that have some
        seen.characters += len(text)
        seen.side = None if ends else seen.side
        size += len(text)
        if size >= BATCH:
            yield batch, replace(seen, position=documents.position(), bytes_read=documents.bytes_read)
            batch, size = [], 0
    yield batch, replace(seen, position=documents.position(), bytes_read=documents.bytes_read)


def _side(text: str, val_fraction: float) -> str:
    """The split of the document that `text` begins, by that beginning alone: other documents don't move it."""
    digest = hashlib.sha256(text[:BEGINNING].encode()).digest()
    return "val" if int.from_bytes(digest[:8]) < val_fraction * 2**64 else "train"


def _encode(
    tokenizer: Tokenizer, batch: tuple[list[Part], PreparationProgress]
) -> tuple[PreparationProgress, dict[str, np.ndarray]]:
    parts, progress = batch
    separator = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=np.uint32)
    tokens = {split: [separator[:0]] for split in SPLITS}
    for split, text, ends in parts:
        tokens[split].append(tokenizer.encode_array(text))
        if ends:
            tokens[split].append(separator)
    joined = {split: np.concatenate(arrays) for split, arrays in tokens.items()}
    return progress, joined


def _in_order(
    encode: Callable, batches: Iterator[tuple[list[Part], PreparationProgress]], workers: int
) -> Iterator[Any]:
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
    bar = _ProgressBar("counting characters", documents.total_bytes, 0)
    total, found = 0, set()
    for text, _ in documents.pieces(cut):
        total += len(text)
        if collect:
            found.update(text)
        bar.at(documents.bytes_read)
    bar.close()
    return total, found


def _refuse_an_empty_split(done: PreparationProgress, name: str, rule: str) -> None:
    if done.documents == 0:
        raise UserError(f"{name} has no text")
    for split, change in (("train", "lower"), ("val", "raise")):
        if getattr(done, split) == 0:
            mend = f"{change} --val_fraction" + (", or cut the text by --split=tail" if rule == "hash" else "")
            raise UserError(f"nothing of the {done.documents:,} documents of {name} falls into {split}: {mend}")


@contextlib.contextmanager
def _carrying_out(plan: dict[str, Any], folder: Path, overwrite: bool) -> Iterator[None]:
    """Make `folder` that of `plan`, with what a stopped run of the same plan left in it; gone afterwards.

    Raises UserError if a run of another plan left its work there, unless `overwrite`.
    """
    before = _read_json(folder / "plan.json")
    if before != plan or not (folder / "dataset").is_dir():  # or that run had put it in place already
        if before not in (None, plan) and (folder / "progress.json").exists() and not overwrite:
            changed = sorted(key for key in {*before, *plan} if before.get(key) != plan.get(key))
            raise UserError(
                f"{folder} holds what a stopped run has prepared with other settings or texts ({', '.join(changed)}): "
                "its command goes on there, and --overwrite=True begins anew"
            )
        _remove(folder)
        (folder / "dataset").mkdir(parents=True)
        write_file(folder / "plan.json", json.dumps(plan))
    try:
        yield
        _remove(folder)
    except BaseException as error:
        saved = (folder / "progress.json").exists()
        if not saved:
            _remove(folder)
        if isinstance(error, KeyboardInterrupt) and saved:
            raise KeyboardInterrupt("interrupted: the same command goes on where this one stopped") from None
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(folder)  # as of a full disk: say where
        raise


def _remove(folder: Path) -> None:
    for name in ("progress.json", "plan.json"):  # first, so that nobody goes on in what is left after a kill
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


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
    return True


def _digest(tokenizer: Tokenizer) -> str:
    parts = [tokenizer.files()]
    if isinstance(tokenizer, BPETokenizer):  # to find GPT-2's merges for its file takes a second
        parts = [tokenizer.ranks, tokenizer.special]
    return hashlib.sha256(repr([sorted(part.items()) for part in parts]).encode()).hexdigest()


def _read_json(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else None
    except (OSError, ValueError):
        return None


class _ProgressBar:
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
