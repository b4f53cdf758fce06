"""Preparation of datasets from text, shared by the scripts in prepare/.

A corpus of any size is streamed: the main thread reads, worker threads encode, and another writes the results in order.
With char and GPT-2-style tokenizers a text file is read in pieces; with others it is held in memory whole, as lines of
JSON and rows of parquet always are. Output accumulates in data/.NAME.partial until it is complete, so an interrupted
preparation can resume from there.
"""

import codecs
import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from gpt_arc.data.declared import SETTINGS_FILE
from gpt_arc.data.documents import BEGINNING, Cut, Documents, Files, available_cores
from gpt_arc.data.engine import Encode, corpus_encoder
from gpt_arc.data.json_lines import read_object
from gpt_arc.data.token_files import MAX_TOKENS, ShardWriter, TokenFiles
from gpt_arc.data.tokenizer import (
    END_OF_TEXT,
    MAIN_FILES,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
)
from gpt_arc.errors import UserError
from gpt_arc.files import DATA_ROOT, name_failed_writes, put_directory, release, restore, sync, take_lock, write_file
from gpt_arc.manifest import check_files, record_files
from gpt_arc.memory import keep_freed_memory
from gpt_arc.reading import read_json
from gpt_arc.settings import STRICT, Count
from gpt_arc.tables import counted

ValFraction = Annotated[float, Gt(0), Lt(1)]
BATCH = 2**20  # characters per unit of work
SAVE_EVERY = 2**24  # tokens between saves that an interrupted preparation resumes from
LONGEST_NAME = 200  # bytes; with what is added while it is prepared, systems allow 255
SPLITS = ("train", "val")
Part = tuple[str, str, bool]  # split, text, whether it ends a document


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CorpusSettings:
    """How documents become a dataset."""

    tokenizer: str = "gpt2"
    """char: one token per character. gpt2: GPT-2's BPE. Else a tokenizer's folder or file, or NAME in data/."""
    split: Literal["auto", "hash", "tail"] = "auto"
    """hash: choose val documents by a hash of their text. tail: val is the end. auto: tail for one text, else hash."""
    val_fraction: ValFraction = 0.1
    """Share for val: of the documents, or with tail of the characters."""
    shard_tokens: Annotated[int, Ge(1), Le(MAX_TOKENS)] = 100_000_000
    """Maximum tokens per token file."""
    workers: Count | None = None
    """Encoding threads. None: one per core."""
    fast: bool = True
    """Encode with gigatoken if it knows the tokenizer, comparing samples. The bytes written are the same either way."""
    overwrite: bool = False
    """Replace data/NAME, whatever it contains."""


def dataset_directory(name: str) -> Path:
    """data/NAME. Raises UserError unless `name` is a plain folder name."""
    if not name or name.startswith(".") or Path(name).name != name or len(name.encode()) > LONGEST_NAME:
        raise UserError(
            f"name = {name[:60]!r} must be a plain folder name of at most {LONGEST_NAME} bytes: the dataset becomes "
            f"{DATA_ROOT}/NAME"
        )
    return DATA_ROOT / name


@dataclasses.dataclass
class PreparationProgress:
    """The state needed to resume."""

    position: Any = None  # in the documents, after everything written
    revision: str | None = None  # of the documents
    documents: int = 0  # that end before `position`
    empty: int = 0  # documents without text, not counted in `documents`
    characters: int = 0  # before `position`
    side: str | None = None  # the split of the document that contains `position`
    bytes_read: int = 0
    train: int = 0  # tokens written
    val: int = 0


def prepare_documents(documents: Documents, settings: CorpusSettings, name: str, shard: str | None = None) -> None:
    """Write data/NAME from `documents`: shards of train and val, tokenizer.json and meta.json.

    The tokenizer's end-of-text token, if any, follows every document; empty documents are skipped. The bytes written
    depend only on the documents and settings, not on the number of workers or on interruptions. A dataset of this name
    is kept if it was made from the same documents and settings; otherwise this raises UserError, unless `overwrite`.

    A `shard` I/N is part I of N of the files, written to data/NAME-I-of-N. Where such parts are, they are joined.
    """
    part = [] if shard is None else _part_of_all(shard, documents, settings)
    directory = dataset_directory(f"{name}-{part[0]}-of-{part[1]}" if part else name)
    by_characters = settings.tokenizer == "char"
    if by_characters:
        keep_freed_memory()  # gigatoken's caches, by contrast, have to give theirs back
    tokenizer = None if by_characters else find_tokenizer(settings.tokenizer)
    rule = settings.split if settings.split != "auto" else "tail" if documents.is_one else "hash"
    made_of = {
        **documents.identity(),
        "tokenizer": "char" if tokenizer is None else _digest(tokenizer),
        "split": rule,
        "val_fraction": settings.val_fraction,
        "shard_tokens": settings.shard_tokens,
    }
    made_of |= {"part": part} if part else {}
    share = settings.val_fraction
    val = f"{share:g} of the documents, by a hash" if rule == "hash" else f"the last {share:g} of the characters"

    work = directory.with_name(f".{directory.name}.partial")
    with locked(directory):
        restore(directory)
        if _is_prepared(directory, made_of, tokenizer, settings.overwrite):
            print(f"{directory} is prepared already")
            if read_object(work / "plan.json") in (None, made_of):  # left by a process killed at the very end
                _remove(work)
            return
        parts = [] if part else _parts(directory, documents, made_of)
        _refuse_glued_documents(documents, tokenizer, settings.tokenizer)
        print(f"preparing {directory} from {documents.name}; val: {val}", flush=True)
        with _work_folder(made_of, work, settings.overwrite):
            documents.revision = (read_object(work / "progress.json") or {}).get("revision")
            boundary = None
            if parts:
                tokenizer = load_tokenizer(parts[0])
            elif tokenizer is None or rule == "tail":
                total, characters = _survey(documents, by_characters)
                if total < 2:
                    raise UserError(
                        f"{counted(total, 'character')} in {documents.name}: at least two are needed for a split"
                    )
                tokenizer = CharTokenizer(characters) if tokenizer is None else tokenizer
                if rule == "tail":  # exact: a tenth in floating point is slightly more
                    boundary = total - math.ceil(total * Fraction(str(share)))
            if parts:
                done = _join(parts, tokenizer.vocab_size, settings.shard_tokens, work)
            else:
                done = _write_shards(documents, settings, tokenizer, boundary, work, part[2:])
            if not part:
                _refuse_an_empty_split(done, documents.name, rule)
            _finish(work / "dataset", done, tokenizer, documents, made_of)
            put_directory(work / "dataset", directory)
    tokens = {"train": done.train, "val": done.val}
    of_val = f" ({tokens['val'] / max(sum(tokens.values()), 1):.1%} of the tokens)"
    counts = ", ".join(f"{split} {counted(count, 'token')}" for split, count in tokens.items()) + of_val
    empty = f", {counted(done.empty, 'empty document')} skipped" if done.empty else ""
    print(f"{directory}: {counted(done.characters, 'character')}, vocabulary {tokenizer.vocab_size:,}, {counts}{empty}")
    if part and not done.documents:
        print(f"note: {directory} has no text, because so few files have any; the parts are joined as usual")


def _finish(
    dataset: Path, done: PreparationProgress, tokenizer: Tokenizer, documents: Documents, made_of: dict[str, Any]
) -> None:
    """Write what belongs beside the token files."""
    tokens = {"train": done.train, "val": done.val}
    assert tokens == {split: _written(dataset, split, tokens[split]) for split in SPLITS}
    meta = {"format_version": 1, "vocab_size": tokenizer.vocab_size, "tokens": tokens}
    meta |= {"documents": done.documents, "source": documents.name, "made_of": made_of}
    meta |= {"revision": documents.revision} if documents.revision else {}
    meta |= {"empty": done.empty, "characters": done.characters} if "part" in made_of else {}
    tokenizer.save(dataset)
    write_file(dataset / "meta.json", json.dumps(meta, indent=1) + "\n")
    record_files(dataset, *sorted(path.name for path in dataset.iterdir()))


def _written(dataset: Path, split: str, tokens: int) -> int:
    """How many tokens the files of a split have; a part of a corpus may lack a split."""
    return len(TokenFiles(dataset, split)) if tokens else len(list(dataset.glob(f"{split}_*.bin")))


def _part_of_all(shard: str, documents: Documents, settings: CorpusSettings) -> list[int]:
    """I, N, and the first and last + 1 of the files that are part I/N.

    Raises UserError if the documents can't be prepared in these parts.
    """
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"shard = {shard} must be I/N, with I from 0 to N - 1")
    if documents.is_one or not isinstance(documents, Files):
        raise UserError(
            f"{documents.name} is a single text, which can't be prepared in parts: leave out --shard={shard}"
        )
    if settings.split == "tail":
        raise UserError(
            f"--split=tail can't be combined with --shard={shard}, since a part doesn't know where all files end: use "
            "--split=hash"
        )
    if int(count) > len(documents.paths):
        raise UserError(
            f"--shard={shard}: {documents.name} can't be divided into {count} parts, as no file is divided: split the "
            "files first, or use fewer parts"
        )
    return [int(number), int(count), *documents.share(int(number), int(count))]


def _parts(directory: Path, documents: Documents, made_of: dict[str, Any]) -> list[Path]:
    """The folders of a complete set of the parts that --shard prepared, in order; none if there are no parts.

    Raises UserError if each set that was begun lacks a part, or has one of other texts or settings.
    """
    if documents.is_one or not isinstance(documents, Files):
        return []
    pattern = re.compile(re.escape(directory.name) + r"-\d+-of-(\d+)")
    found: dict[int, list[Path]] = {}  # folders by N
    for path in sorted(directory.parent.glob(f"{glob.escape(directory.name)}-*")):
        if match := pattern.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    refusals = []
    for count in sorted(found, key=lambda count: len(found[count]), reverse=True):
        parts = [directory.with_name(f"{directory.name}-{number}-of-{count}") for number in range(count)]
        for number, path in enumerate(parts):
            expected = made_of | {"part": [number, count, *documents.share(number, count)]}
            if (read_object(path / "meta.json") or {}).get("made_of") != expected:
                refusals.append((path, f"--shard={number}/{count}"))
                break
        else:
            for path in parts:
                check_files(path)
            if others := sorted({path for paths in found.values() for path in paths} - set(parts)):
                print(f"{_listed(others)} don't belong to these {count} parts, and can be deleted")
            return parts
    if refusals:
        path, mend = refusals[0]
        state = "is missing"
        if path.exists():
            state, mend = "is made of other texts or settings", f"{mend} --overwrite=True"
        everything = _listed(sum(found.values(), []))
        raise UserError(f"{path} {state}: prepare it with {mend}, or delete {everything} to prepare everything here")
    return []


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:8])) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


def _join(parts: list[Path], vocab_size: int, shard_tokens: int, work: Path) -> PreparationProgress:
    """Copy the tokens of the parts into the token files of `work`."""
    done = PreparationProgress()
    writers = {split: ShardWriter(work / "dataset", split, vocab_size, shard_tokens) for split in SPLITS}
    for path in parts:
        meta = read_json(path / "meta.json")
        for split, writer in writers.items():
            for start in range(0, meta["tokens"][split], SAVE_EVERY):
                writer.append(TokenFiles(path, split).read(start, SAVE_EVERY))
        for count in ("documents", "empty", "characters"):
            setattr(done, count, getattr(done, count) + meta[count])
    for split, writer in writers.items():
        writer.close()
        setattr(done, split, writer.written)
    print(f"joined {', '.join(map(str, parts))}, which can be deleted")
    return done


def _write_shards(
    documents: Documents,
    settings: CorpusSettings,
    tokenizer: Tokenizer,
    boundary: int | None,
    work: Path,
    files: list[int],
) -> PreparationProgress:
    """Encode into the token files of `work`, from the position saved in progress.json.

    `files`: the first and last + 1 of the files to read; empty for all documents.
    """
    path = work / "progress.json"
    saved = read_json(path, PreparationProgress) if path.exists() else PreparationProgress()
    if files and isinstance(documents, Files):
        first, documents.end = files
        saved.position = saved.position or [first, None]
    if saved.train + saved.val:
        print(f"resuming after {counted(saved.train + saved.val, 'token')}", flush=True)
    cut: Cut = "never"
    if tokenizer.cuts_at_space:
        cut = "anywhere" if isinstance(tokenizer, CharTokenizer) else "space"
    documents.bytes_read = saved.bytes_read
    output = _Output(documents, tokenizer.vocab_size, settings.shard_tokens, work, saved)
    encode = partial(_encode, corpus_encoder(tokenizer, settings.fast), tokenizer.end_of_text)
    batches = _batches(documents, cut, boundary, settings.val_fraction, saved)
    try:
        _in_order(encode, batches, output.append, settings.workers or available_cores())
        output.finish()
    except KeyboardInterrupt:
        output.save()
        output.wait()
        raise
    finally:
        output.close()
    return output.done


class _Output:
    """The token files of a dataset in the making. progress.json beside them has the position to resume from."""

    def __init__(
        self, documents: Documents, vocab_size: int, shard_tokens: int, work: Path, saved: PreparationProgress
    ):
        self.documents, self.work, self.done, self._saved = documents, work, saved, saved
        self._save_every = min(SAVE_EVERY, shard_tokens)
        self._bar = _ProgressBar("encoding", documents.total_bytes, saved.bytes_read)
        self._writers = {
            split: ShardWriter(work / "dataset", split, vocab_size, shard_tokens, getattr(saved, split))
            for split in SPLITS
        }
        self._disk = ThreadPoolExecutor(1)  # waits for the disk while more is encoded and written
        self._saving: Future | None = None

    def append(self, batch: tuple[PreparationProgress, dict[str, np.ndarray]]) -> None:
        progress, tokens = batch
        for split, writer in self._writers.items():
            writer.append(tokens[split])
        self.done = replace(progress, **{split: writer.written for split, writer in self._writers.items()})
        if self.done.train + self.done.val - self._saved.train - self._saved.val >= self._save_every:
            self.save()
        self._bar.at(self.done.bytes_read)

    def save(self) -> None:
        """Begin to flush what was appended since the last save, and to record it as what to resume from."""
        if self.done is self._saved:
            return
        self.wait()
        changed = [path for writer in self._writers.values() for path in writer.flush()]
        progress = replace(self.done, revision=self.documents.revision)
        self._saving = self._disk.submit(self._record, changed, progress)
        self._saved = self.done

    def _record(self, changed: list[Path], progress: PreparationProgress) -> None:
        for path in changed:
            sync(path)
        sync(self.work / "dataset")
        write_file(self.work / "progress.json", json.dumps(asdict(progress)))

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises what went wrong there."""
        if self._saving is not None:
            self._saving.result()

    def finish(self) -> None:
        """Flush everything to disk."""
        self.wait()
        for writer in self._writers.values():
            writer.close()

    def close(self) -> None:
        self._disk.shutdown()
        self._bar.close()


def _batches(
    documents: Documents, cut: Cut, boundary: int | None, val_fraction: float, start: PreparationProgress
) -> Iterator[tuple[list[Part], PreparationProgress]]:
    """Yields units of work, each with the progress after it.

    The val split starts at character `boundary`; if that is None, hashes choose its documents.
    """
    batch: list[Part] = []
    size = 0
    seen = replace(start)
    for text, ends in documents.pieces(cut, start.position):
        if not text:
            seen.empty += 1  # pieces of a longer text are never empty
        elif boundary is None:
            seen.side = seen.side or _side(text, val_fraction)
            batch.append((seen.side, text, ends))
        else:
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
    yield batch, replace(seen, position=documents.position(), bytes_read=documents.bytes_read)


def _side(text: str, val_fraction: float) -> str:
    """The split of a document, determined by its beginning alone, so that other documents can't move it."""
    digest = hashlib.sha256(text[:BEGINNING].encode()).digest()
    return "val" if int.from_bytes(digest[:8]) < val_fraction * 2**64 else "train"


def _encode(
    encode: Encode, end_of_text: int | None, batch: tuple[list[Part], PreparationProgress]
) -> tuple[PreparationProgress, dict[str, np.ndarray]]:
    """Returns the progress after a batch and, by split, its tokens, with end_of_text after every document."""
    parts, progress = batch
    ids, counts = encode([text for _, text, _ in parts])
    separator = np.array([] if end_of_text is None else [end_of_text], dtype=np.uint32)
    if max(ids.max(initial=0), separator.max(initial=0)) < 2**16:  # half the memory while they wait to be written
        ids, separator = ids.astype(np.uint16), separator.astype(np.uint16)
    tokens = {split: [separator[:0]] for split in SPLITS}
    start = 0
    for (side, _, ends), count in zip(parts, counts.tolist()):
        tokens[side] += (ids[start : start + count], separator) if ends else (ids[start : start + count],)
        start += count
    return progress, {split: np.concatenate(arrays) for split, arrays in tokens.items()}


def _in_order(
    encode: Callable[[Any], Any], batches: Iterator[tuple[list[Part], Any]], write: Callable[[Any], None], workers: int
) -> None:
    """Encodes the batches on `workers` threads and writes them in order on another, with a bounded amount in flight."""
    encoders, writer = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)
    waiting: deque[tuple[int, Future]] = deque()
    in_flight, previous = 0, None

    def write_after(previous: Future | None, encoded: Future) -> None:
        if previous is not None:
            previous.result()  # raises what went wrong there: nothing is written after it
        write(encoded.result())

    try:
        for batch in batches:
            previous = writer.submit(write_after, previous, encoders.submit(encode, batch))
            waiting.append((sum(len(text) for _, text, _ in batch[0]), previous))
            in_flight += waiting[-1][0]
            while in_flight > 4 * workers * BATCH:
                size, written = waiting.popleft()
                written.result()
                in_flight -= size
        while waiting:
            waiting.popleft()[1].result()
    finally:
        encoders.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(cancel_futures=True)


def _survey(documents: Documents, collect: bool) -> tuple[int, list[str]]:
    """Count the characters, and list the distinct ones by code point if `collect`."""
    bar = _ProgressBar("counting characters", documents.total_bytes, 0)
    total, seen, ascii_seen = 0, np.zeros(sys.maxunicode + 1, dtype=bool), b""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    for block in documents.utf_8():
        if block.isascii():
            total += len(block)
        else:
            total += int(np.count_nonzero(np.frombuffer(block, np.int8) >= -64))  # others continue a character
        if collect and (new := block.translate(None, ascii_seen)):  # all but the ASCII that was seen before
            try:
                text = decode(new)
            except UnicodeDecodeError:
                deque(documents.pieces("anywhere"), maxlen=0)  # raises UserError naming the byte
                raise
            seen[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)] = True
            ascii_seen = np.flatnonzero(seen[:128]).astype(np.uint8).tobytes()
        bar.at(documents.bytes_read)
    bar.close()
    return total, list(map(chr, np.flatnonzero(seen)))


def _refuse_glued_documents(documents: Documents, tokenizer: Tokenizer | None, name: str) -> None:
    """Raises UserError for documents that nothing would separate; characters, which have no special tokens, may."""
    if tokenizer is None or isinstance(tokenizer, CharTokenizer) or documents.is_one:
        return
    if tokenizer.end_of_text is None:
        raise UserError(
            f"the tokenizer {name} has no end-of-text token, so the documents of {documents.name} would run into one "
            f"another: name the special token that ends a text as eos_token in {SETTINGS_FILE} beside the tokenizer"
        )


def _refuse_an_empty_split(done: PreparationProgress, name: str, rule: str) -> None:
    if done.documents == 0:
        raise UserError(f"there is no text in {name}")
    for split, change in (("train", "lower"), ("val", "raise")):
        if getattr(done, split) == 0:
            remedy = f"{change} --val_fraction" + (", or split with --split=tail" if rule == "hash" else "")
            raise UserError(f"{counted(done.documents, 'document')} in {name}, and none falls into {split}: {remedy}")


@contextlib.contextmanager
def _work_folder(plan: dict[str, Any], folder: Path, overwrite: bool) -> Iterator[None]:
    """Runs the block with the work folder of `plan`, keeping what an interrupted process with the same plan saved.

    The folder is deleted afterwards. Raises UserError if it holds the work of another plan, unless `overwrite`.
    """
    before = read_object(folder / "plan.json")
    if before != plan or not (folder / "dataset").is_dir():  # or the dataset was moved into place already
        if before not in (None, plan) and (folder / "progress.json").exists() and not overwrite:
            changed = sorted(key for key in {*before, *plan} if before.get(key) != plan.get(key))
            raise UserError(
                f"{folder} holds an interrupted preparation with other settings or texts ({', '.join(changed)}): "
                "repeat its command to resume it, or start again with --overwrite=True"
            )
        _remove(folder)
    try:
        with name_failed_writes(folder):
            if not (folder / "plan.json").exists():
                (folder / "dataset").mkdir(parents=True)
                write_file(folder / "plan.json", json.dumps(plan))
            yield
        _remove(folder)
    except BaseException as error:
        saved = read_object(folder / "progress.json")
        if saved is None:
            _remove(folder)
        tokens = counted(saved["train"] + saved["val"], "token") if saved else "nothing"
        resume = f"repeat the command to resume after {tokens}, saved in {folder}"
        if isinstance(error, KeyboardInterrupt):
            again = "interrupted before anything was saved: repeat the command to start again"
            raise KeyboardInterrupt(f"interrupted: {resume}" if saved else again) from None
        if saved and isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UserError(f"{error.filename}: {error.strerror}: mend this, then {resume}") from None
        raise


def _remove(folder: Path) -> None:
    for name in ("progress.json", "plan.json"):  # first, so that nothing resumes from a partly deleted folder
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Runs the block with an exclusive lock on `directory`. Raises UserError if another process holds it."""
    path = directory.with_name(f".{directory.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(path)
    except BlockingIOError:
        raise UserError(f"{directory} is being prepared by another process: wait for it, or stop it") from None
    try:
        yield
    finally:
        release(path, lock)
        with contextlib.suppress(OSError):
            DATA_ROOT.rmdir()  # if nothing was put there


def _is_prepared(directory: Path, made_of: dict, tokenizer: Tokenizer | None, overwrite: bool) -> bool:
    """Whether the dataset exists and is complete. Raises UserError if something else is there, unless `overwrite`."""
    if not directory.is_dir() and os.path.lexists(directory):
        raise UserError(f"{directory} is not a folder: delete it, or choose another name")
    if not directory.exists() or overwrite:
        return False
    if tokenizer is not None and not any(directory.glob("*.bin")):
        files = tokenizer.files()
        if {path.name for path in directory.iterdir()} == set(files) and load_tokenizer(directory) == tokenizer:
            return False  # only the tokenizer, as written by prepare/tokenizer.py
    meta = read_object(directory / "meta.json") or {}
    if meta.get("made_of") != made_of:
        raise UserError(
            f"{directory} exists and holds something else: replace it with --overwrite=True, or choose another name"
        )
    try:
        for split in SPLITS:
            _written(directory, split, meta["tokens"][split])
        load_tokenizer(directory)
        check_files(directory)
    except UserError:
        return False
    return True


def _digest(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, BPETokenizer):  # computing GPT-2's merges for its file takes a second
        parts: list[dict] = [tokenizer.ranks, tokenizer.special]
    else:
        files = tokenizer.files()
        parts = [{name: files[name] for name in files if name in (*MAIN_FILES, SETTINGS_FILE)}]
    usual = tokenizer.special_token(END_OF_TEXT)
    if tokenizer.end_of_text != usual and (usual is not None or isinstance(tokenizer, BPETokenizer)):
        parts.append({"end_of_text": tokenizer.end_of_text})  # only then, as older datasets have digests without it
    return hashlib.sha256(repr([sorted(part.items()) for part in parts]).encode()).hexdigest()


class _ProgressBar:
    """A progress bar on a terminal; elsewhere, a line every 30 seconds."""

    def __init__(self, title: str, total: int | None, start: int):
        self.title, self.total, self.start = title, total, start
        self.bar = tqdm(total=total, initial=start, desc=title, unit="B", unit_scale=True, leave=False, disable=None)
        self.began = self.last = time.monotonic()

    def at(self, bytes_read: int) -> None:
        self.bar.update(bytes_read - self.bar.n)
        now = time.monotonic()
        if self.bar.disable and now - self.last >= 30:
            rate = (bytes_read - self.start) / (now - self.began)
            of = f" of {self.total / 1e6:,.0f}" if self.total else ""
            remaining = f", {(self.total - bytes_read) / max(rate, 1):,.0f} s left" if self.total else ""
            print(f"{self.title}: {bytes_read / 1e6:,.0f}{of} MB, {rate / 1e6:.1f} MB/s{remaining}", flush=True)
            self.last = now

    def close(self) -> None:
        self.bar.close()
