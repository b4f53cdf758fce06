"""Overlap between a corpus and a benchmark: cut it out of the corpus, or count it per benchmark item.

    items = read_items(find_files(["lambada.jsonl"]))
    decontaminate(Files(find_files(["pages/"]), "text"), items, FilterSettings(), Path("clean.jsonl"))
    measure(Files(find_files(["clean.jsonl"]), "text"), items, Path("lambada.overlap.jsonl"))

Texts are compared by windows of a fixed number of words or characters. The items have few windows, so these are held
in memory, by hash, while the corpus is read in batches on all cores. A window whose hash matches is compared in full
before it counts, so everything except GPT-2's Bloom filter is exact.
"""

import abc
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import random
import re
import signal
import string
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from gpt_arc.data.documents import Files, available_cores, read_text
from gpt_arc.data.json_lines import parse_line
from gpt_arc.data.tokenizer import well_formed
from gpt_arc.errors import UserError
from gpt_arc.files import replacing
from gpt_arc.settings import STRICT, Count, Natural
from gpt_arc.tables import counted

BATCH = 2**20  # characters given to a process at a time
BLOCK = 2**16  # windows hashed at a time; they fit in the CPU cache
CACHED, LONGEST_CACHED = 2**18, 64  # most words in the cache, and most characters of a cached word
SEPARATOR = 0  # between texts, and for every word that no item contains: no window of an item includes it
NO_WORD = -1  # punctuation only
GOLDEN = 0x9E3779B97F4A7C15
WORD_FILTER = 8  # words in GPT-2's n-grams
WORDS_LEAST, WORDS_MOST = 8, 13  # bounds on the words in GPT-3's n-grams when a benchmark is measured
LETTERS, SAMPLES = 50, 3  # characters in GPT-4's substrings, and substrings per item
FALSE_POSITIVES = 1e-8  # upper bound for GPT-2's filter
ALPHANUMERIC = re.compile(r"[^\W_]+")
TOKEN = re.compile(r"\S+")
Method = Literal["gpt2", "gpt3", "gpt4"]
METHODS: tuple[Method, ...] = ("gpt2", "gpt3", "gpt4")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilterSettings:
    """What to cut out of a corpus; the defaults are from the GPT-3 paper."""

    words: Count = 13
    """Length in words of the n-grams that a document must not share with an item."""
    window: Natural = 200
    """Characters to remove on each side of an n-gram."""
    shortest_piece: Natural = 200
    """Remaining pieces with fewer characters are removed too."""
    most_pieces: Count = 10
    """A document cut into more pieces is dropped."""
    most_documents: Count = 10
    """An n-gram in more documents than this is a common phrase and is kept."""


class Items(NamedTuple):
    """A benchmark's examples."""

    texts: list[str]
    numbers: list[int]  # each item's number in its file, from 1: the line number in a .jsonl file
    file_of: np.ndarray  # index of each item's file in `files`
    files: list[str]


def read_items(paths: Iterable[Path], fields: Sequence[str] = ()) -> Items:
    """Reads items from files: one per line of JSON, and one per other text file.

    The text of a line is its strings, or only the strings in `fields`, at any depth, in order, joined by newlines.
    Raises UserError for an unreadable file, a line that is not JSON, or a missing field.
    """
    texts, numbers, file_of, files = [], [], [], []
    for path in paths:
        name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
        if name.endswith(".parquet"):
            raise UserError(f"{path}: items can only be read from .jsonl and text files; convert the rows to .jsonl")
        content = read_text(path)
        lines = name.endswith((".jsonl", ".json"))
        parts = enumerate(content.split("\n") if lines else [content], start=1)
        parts = [(number, part) for number, part in parts if part.strip()]
        if not parts:
            raise UserError(f"{path} contains no items")
        texts += [_item_text(part, fields, f"{path}:{number}") if lines else part for number, part in parts]
        numbers += [number for number, _ in parts]
        file_of += [len(files)] * len(parts)
        files.append(str(path))
    if not files:
        raise UserError("--items names no files: give the .jsonl or .txt files of a benchmark")
    return Items(texts, numbers, np.array(file_of), files)


def _item_text(line: str, fields: Sequence[str], place: str) -> str:
    row = parse_line(line, place)
    for field in fields:
        if not isinstance(row, dict):
            raise UserError(f"{place} is not an object with fields, which --item_fields requires")
        if field not in row:
            names = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{place} has no field {field!r}: its fields are {names}; change --item_fields")
    if fields:
        row = {field: content for field, content in row.items() if field in fields}
    return well_formed("\n".join(_strings(row)))


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _strings(part)


class _WithoutPunctuation(dict):
    """Table for str.translate that removes Unicode punctuation and ASCII symbols ($ + < = > ^ ` | ~)."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        removed = unicodedata.category(character).startswith("P") or character in string.punctuation
        self[code] = None if removed else character
        return self[code]


_without_punctuation = _WithoutPunctuation()


def word_of(token: str) -> str:
    """Normalizes a whitespace-separated token as in GPT-3's filter: lowercase, no punctuation; may return ""."""
    return token.translate(_without_punctuation).lower()


class _WordCache(dict[str, int], abc.ABC):
    """Cache of `compute(word)` for short words; the long strings of data in some pages would fill memory."""

    @abc.abstractmethod
    def compute(self, word: str) -> int:
        """Returns the number of a word."""

    def __missing__(self, word: str) -> int:
        number = self.compute(word)
        if len(word) <= LONGEST_CACHED:
            if len(self) >= CACHED:
                self.clear()
            self[word] = number
        return number

    def array(self, words: re.Pattern, text: str, dtype: type) -> np.ndarray:
        """Returns the numbers of all matches of `words` in `text`, without a list, which would need far more memory."""
        return np.fromiter(map(self.__getitem__, map(re.Match.group, words.finditer(text))), dtype)


class Vocabulary(_WordCache):
    """Maps tokens to word numbers: from 1 for words in items, SEPARATOR for other words, NO_WORD for punctuation."""

    def __init__(self):
        super().__init__()
        self.words: dict[str, int] = {}
        self.growing = True  # while the items are read

    def compute(self, word: str) -> int:
        word = word_of(word)
        if not word:
            return NO_WORD
        if self.growing:
            return self.words.setdefault(word, len(self.words) + 1)
        return self.words.get(word, SEPARATOR)

    def numbers(self, text: str) -> np.ndarray:
        """Returns the number of each whitespace-separated token in `text`, including punctuation-only tokens."""
        return self.array(TOKEN, text, np.int32)


class Sequences(NamedTuple):
    """Texts as numbers, concatenated, with a separator after each."""

    numbers: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, parts: list[np.ndarray]) -> "Sequences":
        separator = np.array([SEPARATOR], np.int32)
        lengths = np.array([len(part) for part in parts], np.int64)
        joined = np.concatenate([array for part in parts for array in (part, separator)] or [separator])
        return cls(joined, np.cumsum(lengths + 1) - lengths - 1, lengths)

    def windows(self, length: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the start of every window of `length` numbers and the index of its text.

        `among`, a boolean per text, restricts this to some texts.
        """
        counts = np.maximum(self.lengths - length + 1, 0)
        if among is not None:
            counts = counts * among
        owners = np.repeat(np.arange(len(counts)), counts)
        starts = np.arange(counts.sum()) + np.repeat(self.begins - (np.cumsum(counts) - counts), counts)
        return starts, owners


def words_of(texts: list[str], vocabulary: Vocabulary) -> Sequences:
    """Returns the texts as word numbers, without tokens that are punctuation only."""
    parts = [vocabulary.numbers(text) for text in texts]
    return Sequences.of([part[part != NO_WORD] for part in parts])


@functools.cache
def _is_alphanumeric() -> np.ndarray:
    return np.fromiter(map(str.isalnum, map(chr, range(0x110000))), bool)


def letters_of(text: str) -> np.ndarray:
    """Returns the code points of a text's letters and digits, in any script, case kept, as in GPT-4's check."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<i4")
    return codes[_is_alphanumeric()[codes]]


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Hashes each number with splitmix64."""
    values = numbers.astype(np.uint64) + np.uint64((seed + 1) * GOLDEN % 2**64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(64)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the powers of an odd number and of its inverse, modulo 2^64."""
    powers, inverses = np.full(count, GOLDEN, np.uint64), np.full(count, pow(GOLDEN, -1, 2**64), np.uint64)
    powers[0] = inverses[0] = 1
    return np.cumprod(powers), np.cumprod(inverses)


def _hashes(values: np.ndarray, length: int, seed: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yields polynomial hashes of all windows of `length` values in blocks, as (start of the first window, hashes)."""
    powers, inverses = _powers(BLOCK + length)
    for start in range(0, len(values) - length + 1, BLOCK):
        block = _mixed(values[start : start + BLOCK + length - 1], seed)
        sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(block * powers[: len(block)])))
        sums = sums[length:] - sums[:-length]
        yield start, sums * inverses[: len(sums)]


class WindowIndex:
    """Index of the distinct windows at given positions of a sequence, for finding them in other sequences.

    `numbers` gives the window at each position, equal windows sharing a number; there are `count` distinct windows.
    """

    def __init__(self, sequence: np.ndarray, starts: np.ndarray, length: int):
        """`starts` must be sorted, and no window may contain the separator."""
        self.length, self.sequence = length, sequence
        for seed in range(8):  # after a collision try another hash
            self.seed = seed
            hashes = np.empty(len(starts), np.uint64)
            for at, block in _hashes(sequence, length, seed):
                first, last = np.searchsorted(starts, (at, at + len(block)))
                hashes[first:last] = block[starts[first:last] - at]
            self.hashes, first, numbers = np.unique(hashes, return_index=True, return_inverse=True)
            self.starts, self.numbers, self.count = starts[first], numbers.astype(np.int32), len(first)
            del hashes, first, numbers
            if all(
                self._equal(sequence, starts[at : at + BLOCK], self.numbers[at : at + BLOCK]).all()
                for at in range(0, len(starts), BLOCK)
            ):
                break
        else:
            raise RuntimeError("every hash function tried has collisions between windows")
        self._shift = np.uint64(64 - max(10, (16 * self.count).bit_length()))
        self._bitmap = np.zeros(2 ** (61 - int(self._shift)), np.uint8)  # 16 to 32 bits per window, so few others match
        np.bitwise_or.at(self._bitmap, *_bits(self.hashes >> self._shift))

    def find(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the positions in `sequence` of windows in the index, in order, and the numbers of those windows."""
        positions, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        if self.count:
            for start, hashes in _hashes(sequence, self.length, self.seed):
                at, bit = _bits(hashes >> self._shift)
                candidates = np.flatnonzero(self._bitmap[at] & bit)
                number = np.minimum(np.searchsorted(self.hashes, hashes[candidates]), self.count - 1)
                matching = self.hashes[number] == hashes[candidates]
                candidates, number = start + candidates[matching], number[matching]
                equal = self._equal(sequence, candidates, number)
                positions.append(candidates[equal])
                numbers.append(number[equal])
        return np.concatenate(positions), np.concatenate(numbers)

    def _equal(self, sequence: np.ndarray, positions: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Whether the windows of `sequence` at `positions` equal the indexed windows with these numbers."""
        if not len(positions):
            return np.empty(0, bool)
        indexed = sliding_window_view(self.sequence, self.length)[self.starts[numbers]]
        return (sliding_window_view(sequence, self.length)[positions] == indexed).all(axis=1)


def _bits(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Converts bit positions to byte positions and the masks within those bytes."""
    shifts = (positions & np.uint64(7)).astype(np.uint8)
    return (positions >> np.uint64(3)).astype(np.int64), np.left_shift(np.uint8(1), shifts)


class BloomFilter:
    """Set of 64-bit keys at 40 bits each: contains every added key, and others with probability at most `rate`."""

    def __init__(self, capacity: int, rate: float = FALSE_POSITIVES):
        # The formula, for independent probes, uses half the rate. The other half allows for keys whose two hashes agree
        # modulo the size, which is rare in a filter of four megabytes or more.
        self.size = max(2**25, math.ceil(-max(capacity, 1) * math.log(rate / 2) / math.log(2) ** 2))
        self.probes = max(1, round(-math.log2(rate / 2)))
        self.bits = np.zeros(self.size // 8 + 1, np.uint8)

    def add(self, keys: np.ndarray) -> None:
        for at, bit in self._probes_of(keys):
            np.bitwise_or.at(self.bits, at, bit)

    def contains(self, keys: np.ndarray) -> np.ndarray:
        present = np.ones(len(keys), bool)
        for at, bit in self._probes_of(keys):
            present &= (self.bits[at] & bit) != 0
        return present

    def _probes_of(self, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        first, step = _mixed(keys, 1), _mixed(keys, 2)  # double hashing: probe i is at first + i * step
        for _ in range(self.probes):
            yield _bits(first % np.uint64(self.size))
            first = first + step


class _WordKeys(_WordCache):
    def compute(self, word: str) -> int:
        return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


_word_keys = _WordKeys()


def filter_keys(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the keys of the texts' 8-grams as in GPT-2's filter, and the index of each key's text.

    Words here are lowercase sequences of letters and digits; everything else separates words.
    """
    words = [_word_keys.array(ALPHANUMERIC, text.lower(), np.uint64) for text in texts]
    lengths = np.array([len(part) for part in words], np.int64)
    owners = np.repeat(np.arange(len(texts)), lengths)
    if len(owners) < WORD_FILTER:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    keys = np.concatenate([hashes for _, hashes in _hashes(np.concatenate(words), WORD_FILTER)])
    within = owners[: len(keys)] == owners[WORD_FILTER - 1 :]
    return keys[within], owners[: len(keys)][within]


_task: Any = None


def _start_worker(task: Callable) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C


def _run_task(texts: list[str]) -> Any:
    return _task(texts)


@contextlib.contextmanager
def _ctrl_c_deferred() -> Iterator[None]:
    """Delays Ctrl-C until the block ends; otherwise it could leave half-started processes that never exit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        signal.raise_signal(signal.SIGINT)


def _each_batch(
    documents: Files, task: Callable[[list[str]], Any], workers: int | None, title: str
) -> Iterator[tuple[list[str], Any]]:
    """Yields batches of the documents' texts, in order, with the result of `task`, computed by `workers` processes."""
    workers = workers or available_cores()
    with tqdm(total=documents.total_bytes, desc=title, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        in_process = ((texts, documents.bytes_read, task(texts)) for texts, _ in _batches(documents))
        for texts, read, result in _in_processes(documents, task, workers) if workers > 1 else in_process:
            yield texts, result
            bar.update(read - bar.n)


def _in_processes(
    documents: Files, task: Callable[[list[str]], Any], workers: int
) -> Iterator[tuple[list[str], int, Any]]:
    """Yields batches of texts, the bytes read up to the end of each, and the result of `task`."""
    # forked processes share the memory of the index
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (task,))
    waiting: deque = deque()
    ahead = 0  # total size of the waiting texts
    try:
        for texts, size in _batches(documents):
            with _ctrl_c_deferred():
                waiting.append((size, texts, documents.bytes_read, pool.submit(_run_task, texts)))
            ahead += size
            while ahead > 3 * workers * BATCH:
                size, texts, read, result = waiting.popleft()
                ahead -= size
                yield texts, read, result.result()
        for _, texts, read, result in waiting:
            yield texts, read, result.result()
    except BrokenProcessPool:
        raise UserError("a process was killed, probably for lack of memory: --workers=1 needs less") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Files) -> Iterator[tuple[list[str], int]]:
    """Yields batches of texts with a lower bound on their memory."""
    texts: list[str] = []
    size = 0
    for text, _ in documents.pieces("never"):
        texts.append(text)
        size += len(text) + 64  # 64: overhead of a string object
        if size >= BATCH:
            yield texts, size
            texts, size = [], 0
    if texts:
        yield texts, size


def _refuse_streams(documents: Files) -> None:
    for path in documents.paths:
        if not path.is_file():
            raise UserError(f"{path} is not a file that can be read twice: save its content to a file first")


def pieces_of(length: int, hits: Iterable[tuple[int, int]], window: int) -> list[tuple[int, int]]:
    """Returns the spans that remain of `length` characters after removing `hits` and `window` characters around each.

    `hits` are spans in order.
    """
    pieces, begin = [], 0
    for start, end in hits:
        if start - window > begin:
            pieces.append((begin, start - window))
        begin = max(begin, end + window)
    return pieces + ([(begin, length)] if begin < length else [])


class _Hits(NamedTuple):
    """Occurrences of an index's n-grams in a batch of documents."""

    documents: Sequences
    positions: np.ndarray  # in order
    numbers: np.ndarray  # of the n-grams
    owners: np.ndarray  # indices of the documents

    @classmethod
    def of(cls, texts: list[str], vocabulary: Vocabulary, index: WindowIndex) -> "_Hits":
        documents = words_of(texts, vocabulary)
        positions, numbers = index.find(documents.numbers)
        return cls(documents, positions, numbers, np.searchsorted(documents.begins, positions, side="right") - 1)


def _ngrams_of(vocabulary: Vocabulary, index: WindowIndex, texts: list[str]) -> np.ndarray:
    """Pass 1: returns the n-grams that occur, each once per document that contains it."""
    hits = _Hits.of(texts, vocabulary, index)
    return np.unique(hits.owners * index.count + hits.numbers) % index.count


def _cuts_of(
    vocabulary: Vocabulary, index: WindowIndex, ignored: np.ndarray, window: int, texts: list[str]
) -> dict[int, tuple[list[tuple[int, int]], np.ndarray]]:
    """Pass 2: maps each document that contains an n-gram to its remaining pieces and its n-grams."""
    hits = _Hits.of(texts, vocabulary, index)
    rare = ~ignored[hits.numbers]
    positions, numbers, owners = hits.positions[rare], hits.numbers[rare], hits.owners[rare]
    cuts = {}
    for owner in np.unique(owners).tolist():
        in_document = slice(*np.searchsorted(owners, (owner, owner + 1)))
        spans = np.array([match.span() for match in TOKEN.finditer(texts[owner])])
        spans = spans[vocabulary.numbers(texts[owner]) != NO_WORD]
        firsts = positions[in_document] - hits.documents.begins[owner]
        removed = np.stack((spans[firsts, 0], spans[firsts + index.length - 1, 1]), axis=1).tolist()
        cuts[owner] = pieces_of(len(texts[owner]), removed, window), np.unique(numbers[in_document])
    return cuts


class _Ngrams(NamedTuple):
    """The items' n-grams, and the files that contain each."""

    index: WindowIndex
    grams: np.ndarray  # in order, each once per file that contains it
    files: np.ndarray  # the file for each entry of `grams`

    @classmethod
    def of(cls, words: Sequences, items: Items, length: int) -> "_Ngrams":
        starts, owners = words.windows(length)
        if not len(starts):
            raise UserError(f"no item has {counted(length, 'word')}, so there is nothing to look for: lower --words")
        index = WindowIndex(words.numbers, starts, length)
        of_files = np.unique(index.numbers * np.int64(len(items.files)) + items.file_of[owners])
        index.numbers = np.empty(0, np.int32)  # no longer needed; frees memory
        return cls(index, *np.divmod(of_files, len(items.files)))

    def files_of(self, grams: np.ndarray) -> np.ndarray:
        """Returns the files that contain any of these n-grams."""
        ranges = zip(np.searchsorted(self.grams, grams), np.searchsorted(self.grams, grams, side="right"))
        return np.unique(np.concatenate([self.files[first:last] for first, last in ranges]))


def decontaminate(
    documents: Files, items: Items, settings: FilterSettings, output: Path, workers: int | None = None
) -> dict[str, Any]:
    """Writes the documents, without the text they share with the items, to `output` as lines of JSON.

    Returns the counts. The first pass counts the documents that contain each n-gram, the second cuts. The bytes written
    don't depend on the number of workers. Raises UserError if documents can't be read twice or no item is long enough.
    """
    _refuse_streams(documents)
    vocabulary = Vocabulary()
    words = words_of(items.texts, vocabulary)
    vocabulary.growing = False
    ngrams = _Ngrams.of(words, items, settings.words)
    index = ngrams.index

    frequency = np.zeros(index.count, np.int64)  # documents that contain each n-gram
    task: Callable = functools.partial(_ngrams_of, vocabulary, index)
    for _, numbers in _each_batch(documents, task, workers, "looking for n-grams"):
        np.add.at(frequency, numbers, 1)
    ignored = frequency > settings.most_documents

    of_documents = {"read": 0, "unchanged": 0, "cut": 0, "dropped": 0, "left_without_pieces": 0}
    pieces = {"kept": 0, "too_short": 0}
    characters = {"read": 0, "written": 0}
    touched = np.zeros(len(items.files), np.int64)
    task = functools.partial(_cuts_of, vocabulary, index, ignored, settings.window)
    with replacing(output) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for texts, cuts in _each_batch(documents, task, workers, "cutting"):
            for number, text in enumerate(texts):
                parts, outcome = [text], "unchanged"
                if number in cuts:
                    spans, grams = cuts[number]
                    parts = [text[a:b] for a, b in spans if b - a >= settings.shortest_piece]
                    outcome = "cut" if parts else "left_without_pieces"
                    if len(spans) > settings.most_pieces:
                        parts, outcome = [], "dropped"
                    else:
                        pieces["kept"] += len(parts)
                        pieces["too_short"] += len(spans) - len(parts)
                    touched[ngrams.files_of(grams)] += 1
                of_documents["read"] += 1
                of_documents[outcome] += 1
                characters["read"] += len(text)
                for part in parts:
                    characters["written"] += len(part)
                    file.write(json.dumps({"text": part}, ensure_ascii=False) + "\n")

    def per_file(files: np.ndarray) -> list[int]:
        return np.bincount(files, minlength=len(items.files)).tolist()

    characters["removed"] = characters["read"] - characters["written"]
    by_file = {
        "items": per_file(items.file_of),
        "items_too_short": per_file(items.file_of[words.lengths < settings.words]),
        "ngrams": per_file(ngrams.files),
        "ngrams_found": per_file(ngrams.files[frequency[ngrams.grams] > 0]),
        "ngrams_ignored": per_file(ngrams.files[ignored[ngrams.grams]]),
        "documents": touched.tolist(),
    }
    counts = {"different": index.count, "found": int((frequency > 0).sum()), "ignored": int(ignored.sum())}
    return {
        "documents": of_documents,
        "pieces": pieces,
        "characters": characters,
        "ngrams": {"words": settings.words} | counts,
        "files": [
            {"file": name} | {key: values[number] for key, values in by_file.items()}
            for number, name in enumerate(items.files)
        ],
    }


def words_compared(lengths: Sequence[int] | np.ndarray) -> int:
    """Returns GPT-3's N for items of these lengths: the 5th percentile, rounded down and clamped to 8..13.

    Interpolates linearly between the two nearest lengths, like numpy's default, but exactly.
    """
    ordered = np.sort(lengths).tolist()
    rank, hundredths = divmod(5 * (len(ordered) - 1), 100)
    below, above = ordered[rank], ordered[min(rank + 1, len(ordered) - 1)]
    return min(max(below + (above - below) * hundredths // 100, WORDS_LEAST), WORDS_MOST)


def substrings_of(letters: np.ndarray, seed: str) -> list[np.ndarray]:
    """Returns GPT-4's substrings of an item: three of 50 characters from random positions, or all of a short item."""
    if len(letters) <= LETTERS:
        return [letters] if len(letters) else []
    starts = range(len(letters) - LETTERS + 1)
    chosen = random.Random(seed).sample(starts, min(SAMPLES, len(starts)))
    return [letters[start : start + LETTERS] for start in sorted(chosen)]


class _Windows(NamedTuple):
    """Windows of one length to look for."""

    index: WindowIndex
    owners: np.ndarray  # the item of each window
    seen: np.ndarray  # whether each distinct window was found

    @classmethod
    def of(cls, sequences: Sequences, lengths: np.ndarray, owners: np.ndarray) -> "list[_Windows]":
        """Builds the searches, one per distinct length; each sequence has one of `lengths` and an item in `owners`."""
        searches = []
        for length in np.unique(lengths[lengths > 0]).tolist():
            starts, texts = sequences.windows(length, lengths == length)
            index = WindowIndex(sequences.numbers, starts, length)
            searches.append(cls(index, owners[texts], np.zeros(index.count, bool)))
        return searches


def _look(
    vocabulary: Vocabulary, words: list[WindowIndex], letters: list[WindowIndex], count: bool, texts: list[str]
) -> tuple[list[np.ndarray], int]:
    """Returns the windows found for each index and, if `count`, the number of 8-grams for GPT-2's filter."""
    numbers = []
    if words:
        documents = words_of(texts, vocabulary)
        numbers += [np.unique(index.find(documents.numbers)[1]) for index in words]
    if letters:
        documents = Sequences.of([letters_of(text) for text in texts])
        numbers += [np.unique(index.find(documents.numbers)[1]) for index in letters]
    lengths = (sum(1 for _ in ALPHANUMERIC.finditer(text.lower())) for text in texts) if count else ()
    return numbers, sum(max(0, length - WORD_FILTER + 1) for length in lengths)


def _filter_keys_alone(texts: list[str]) -> np.ndarray:
    return np.unique(filter_keys(texts)[0])


def measure(
    documents: Files,
    items: Items,
    output: Path,
    methods: Sequence[Method] = METHODS,
    seed: int = 0,
    workers: int | None = None,
) -> dict[str, Any]:
    """Writes each item's overlap with the documents to `output`, one line of JSON per item.

    Returns the counts per file of items. Raises UserError if the documents can't be read twice.
    """
    _refuse_streams(documents)
    vocabulary, count, by_file = Vocabulary(), len(items.texts), items.file_of
    bounds = np.searchsorted(by_file, np.arange(len(items.files) + 1)).tolist()
    slices = [slice(begin, end) for begin, end in zip(bounds, bounds[1:])]  # the items of each file
    report: list[dict[str, Any]] = [
        {"file": name, "items": part.stop - part.start} for name, part in zip(items.files, slices)
    ]
    searches: dict[str, list[_Windows]] = {"gpt3": [], "gpt4": []}
    if "gpt3" in methods:
        words = words_of(items.texts, vocabulary)
        compared = [words_compared(words.lengths[part]) for part in slices]
        searches["gpt3"] = _Windows.of(words, np.minimum(np.array(compared)[by_file], words.lengths), np.arange(count))
    vocabulary.growing = False
    if "gpt4" in methods:
        samples = [substrings_of(letters_of(text), f"{seed} {text}") for text in items.texts]
        parts = Sequences.of([part for parts in samples for part in parts])
        searches["gpt4"] = _Windows.of(parts, parts.lengths, np.repeat(np.arange(count), [*map(len, samples)]))

    indexes = ([search.index for search in searches[method]] for method in ("gpt3", "gpt4"))
    look = functools.partial(_look, vocabulary, *indexes, "gpt2" in methods)
    capacity = read = characters = 0
    for texts, (matches, eights) in _each_batch(documents, look, workers, "looking for the items"):
        for search, numbers in zip(searches["gpt3"] + searches["gpt4"], matches):
            search.seen[numbers] = True
        capacity, read, characters = capacity + eights, read + len(texts), characters + sum(map(len, texts))

    columns: dict[str, list] = {}
    if "gpt2" in methods:
        bloom = BloomFilter(capacity)
        for _, keys in _each_batch(documents, _filter_keys_alone, workers, "filling the filter"):
            bloom.add(keys)
        eights, common = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for at in range(0, count, BATCH // 64):
            keys, owners = filter_keys(items.texts[at : at + BATCH // 64])
            eights += np.bincount(at + owners, minlength=count)
            common += np.bincount(at + owners[bloom.contains(keys)], minlength=count)
        columns |= {"gpt2_ngrams": eights.tolist(), "gpt2_found": common.tolist()}
        for part, entry in zip(slices, report):
            total, shared = (int(array[part].sum()) for array in (eights, common))
            entry["gpt2"] = {"ngrams": total, "found": shared, "percent": 100 * shared / total if total else None}
    for method, name in (("gpt3", "dirty"), ("gpt4", "contaminated")):
        if method in methods:
            flags = np.zeros(count, bool)
            for index, owners, seen in searches[method]:
                flags[owners[seen[index.numbers]]] = True
            columns[f"{method}_{name}"] = flags.tolist()
            for number, (part, entry) in enumerate(zip(slices, report)):
                amount = int(flags[part].sum())
                entry[method] = {"words": compared[number]} if method == "gpt3" else {}
                entry[method] |= {name: amount, "clean": entry["items"] - amount}
    with replacing(output) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for number in range(count):
            line = {"file": items.files[by_file[number]], "item": items.numbers[number]}
            file.write(json.dumps(line | {key: values[number] for key, values in columns.items()}) + "\n")
    return {"documents": read, "characters": characters, "seed": seed, "files": report}
