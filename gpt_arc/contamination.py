"""Texts that a corpus and a benchmark have in common: cut out of the corpus, or counted on the benchmark.

    items = read_items(find_files(["lambada.jsonl"]))
    decontaminate(Files(find_files(["pages/"]), "text"), items, FilterSettings(), Path("clean.jsonl"))
    measure(Files(find_files(["clean.jsonl"]), "text"), items, Path("lambada.overlap.jsonl"))

What is looked for are windows of a fixed length: of words, or of characters. Those of the items are few, so they are
held, by hash, and the corpus streams past in batches, on all cores. A window whose hash is among them is compared
number by number before it counts, so everything but GPT-2's Bloom filter is exact.
"""

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from gpt_arc.documents import Files, read_text
from gpt_arc.errors import UserError, first_line
from gpt_arc.files import replacing
from gpt_arc.tokenizer import well_formed

BATCH = 2**20  # characters that a process is given at a time
BLOCK = 2**16  # windows that are hashed at a time, which fit a processor's cache
CACHED = 2**18  # spellings of words that are remembered
SEPARATOR = 0  # stands between texts, and for every word that no item has: no window to look for holds it
NO_WORD = -1  # what is punctuation alone
GOLDEN = 0x9E3779B97F4A7C15
WORD_FILTER = 8  # words of GPT-2's n-grams
WORDS_LEAST, WORDS_MOST = 8, 13  # of GPT-3's n-grams on the benchmark's side
LETTERS, SAMPLES = 50, 3  # characters of GPT-4's substrings, and how many an item has
FALSE_POSITIVES = 1e-8  # at most, of GPT-2's filter
ALPHANUMERIC = re.compile(r"[^\W_]+")
TOKEN, SPACE = re.compile(r"\S+"), re.compile(r"\s")

Method = Literal["gpt2", "gpt3", "gpt4"]
METHODS: tuple[Method, ...] = ("gpt2", "gpt3", "gpt4")


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """What is cut out of a corpus; the numbers of the GPT-3 paper unless set."""

    words: int = 13
    """Words of the n-grams that a document must not share with an item."""
    window: int = 200
    """Characters that go with an n-gram on each side of it."""
    shortest_piece: int = 200
    """What is left of a document goes, too, where it has fewer characters."""
    most_pieces: int = 10
    """A document that falls into more pieces is dropped."""
    most_documents: int = 10
    """An n-gram that more documents have is a common phrase, and stays."""

    def __post_init__(self):
        for name, least in (("words", 1), ("window", 0), ("shortest_piece", 0), ("most_pieces", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {least}")
        if self.most_documents < 1:
            raise ValueError(f"most_documents = {self.most_documents} must be at least 1, or nothing is cut")


class Items(NamedTuple):
    """A benchmark's examples."""

    texts: list[str]
    numbers: list[int]  # of each in its file, from 1: the line of a .jsonl file
    file_of: np.ndarray  # the file of each
    files: list[str]


def read_items(paths: Iterable[Path], fields: Sequence[str] = ()) -> Items:
    """The items of files: each line of JSON one, and any other text file one.

    The text of a line is its strings, or those of `fields`, at any depth and in the line's order, parted by line ends.
    Raises UserError for a file that can't be read, a line that is none, or a field that is missing.
    """
    texts, numbers, file_of, files = [], [], [], []
    for path in paths:
        name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
        if name.endswith(".parquet"):
            raise UserError(f"{path}: items are read of lines of JSON and text files; write the rows as .jsonl")
        content = read_text(path)
        if name.endswith((".jsonl", ".json")):
            found = [
                (number, _item_text(line, fields, f"{path}:{number}"))
                for number, line in enumerate(content.split("\n"), start=1)
                if line.strip()
            ]
        else:
            found = [(1, content)] if content.strip() else []
        if not found:
            raise UserError(f"{path} holds no items")
        texts += [text for _, text in found]
        numbers += [number for number, _ in found]
        file_of += [len(files)] * len(found)
        files.append(str(path))
    if not files:
        raise UserError("--items names nothing: give it .jsonl or .txt files that hold a benchmark")
    return Items(texts, numbers, np.array(file_of), files)


def _item_text(line: str, fields: Sequence[str], place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not a line of JSON: {first_line(error)}") from None
    for field in fields:
        if not isinstance(row, dict):
            raise UserError(f"{place} is not an object with fields, as --item_fields wants")
        if field not in row:
            names = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{place} has no field {field!r}: there are {names}; --item_fields names others")
    if fields:
        row = {field: content for field, content in row.items() if field in fields}
    return well_formed("\n".join(_strings(row)))


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _strings(part)


# Words and characters as numbers


class _WithoutPunctuation(dict):
    """For str.translate: Unicode's punctuation goes, and so do ASCII's symbols ($ + < = > ^ ` | ~)."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        goes = unicodedata.category(character).startswith("P") or character in string.punctuation
        self[code] = None if goes else character
        return self[code]


_without_punctuation = _WithoutPunctuation()


def word_of(token: str) -> str:
    """What stands between white space as GPT-3's filter compares it: lowercase, without punctuation; maybe nothing."""
    return token.translate(_without_punctuation).lower()


class Vocabulary(dict):
    """Numbers of words by their spelling in a text: from 1 on for words of items, SEPARATOR for others, or NO_WORD."""

    def __init__(self):
        super().__init__()
        self.words: dict[str, int] = {}
        self.growing = True  # while the items are read

    def __missing__(self, token: str) -> int:
        word = word_of(token)
        if not word:
            number = NO_WORD
        elif self.growing:
            number = self.words.setdefault(word, len(self.words) + 1)
        else:
            number = self.words.get(word, SEPARATOR)
        if len(self) >= CACHED:
            self.clear()
        self[token] = number
        return number

    def numbers(self, text: str) -> np.ndarray:
        """Of what stands between white space in `text`, which may be punctuation alone."""
        parts, start = [np.empty(0, np.int32)], 0
        while start < len(text):  # a long text's list of words would take many times its memory
            space = SPACE.search(text, start + BATCH)
            end = space.start() if space else len(text)
            parts.append(np.fromiter(map(self.__getitem__, text[start:end].split()), np.int32))
            start = end
        return np.concatenate(parts)


class Sequences(NamedTuple):
    """Texts as numbers, one behind the other, a separator after each."""

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
        """Where the windows of `length` numbers begin, and the text of each; of the texts that `among` is true of."""
        counts = np.maximum(self.lengths - length + 1, 0)
        if among is not None:
            counts = counts * among
        owners = np.repeat(np.arange(len(counts)), counts)
        starts = np.arange(counts.sum()) + np.repeat(self.begins - (np.cumsum(counts) - counts), counts)
        return starts, owners


def words_of(texts: list[str], vocabulary: Vocabulary) -> Sequences:
    """The words of texts, those that are punctuation alone left out."""
    parts = [vocabulary.numbers(text) for text in texts]
    return Sequences.of([part[part != NO_WORD] for part in parts])


@functools.cache
def _is_alphanumeric() -> np.ndarray:
    return np.fromiter(map(str.isalnum, map(chr, range(0x110000))), bool)


def letters_of(text: str) -> np.ndarray:
    """The letters and digits of a text, of any script and case: all that GPT-4's check compares."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<i4")
    return codes[_is_alphanumeric()[codes]]


# Windows of numbers


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64: numbers that differ become ones that look drawn at random."""
    values = numbers.astype(np.uint64) + np.uint64((seed + 1) * GOLDEN % 2**64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(64)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of an odd number modulo 2^64, and of its inverse."""
    powers, inverses = np.full(count, GOLDEN, np.uint64), np.full(count, pow(GOLDEN, -1, 2**64), np.uint64)
    powers[0] = inverses[0] = 1
    return np.cumprod(powers), np.cumprod(inverses)


def _hashes(values: np.ndarray, length: int, seed: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Polynomial hashes of all windows of `length` values, by blocks, each with the place of its first window."""
    powers, inverses = _powers(BLOCK + length)
    for start in range(0, len(values) - length + 1, BLOCK):
        block = _mixed(values[start : start + BLOCK + length - 1], seed)
        sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(block * powers[: len(block)])))
        sums = sums[length:] - sums[:-length]
        yield start, sums * inverses[: len(sums)]


class WindowIndex:
    """The different windows at some places of a sequence, to be found in other sequences.

    `numbers` has the window of each place, the equal ones by the same number; there are `count` of them.
    """

    def __init__(self, sequence: np.ndarray, starts: np.ndarray, length: int):
        """`starts` are in order, and no window holds the separator."""
        self.length, self.sequence = length, sequence
        for seed in range(8):  # hashes that agree by accident are drawn anew
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
            raise RuntimeError("no hash tells the windows apart")
        self._shift = np.uint64(64 - max(10, (16 * self.count).bit_length()))
        self._bitmap = np.zeros(2 ** (61 - int(self._shift)), np.uint8)  # 16 to 32 bits a window: most others miss it
        places = self.hashes >> self._shift
        np.bitwise_or.at(self._bitmap, *_bits(places))

    def find(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where `sequence` has windows of the index, in order, and which."""
        places, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        if self.count:
            for start, hashes in _hashes(sequence, self.length, self.seed):
                at, bit = _bits(hashes >> self._shift)
                candidates = np.flatnonzero(self._bitmap[at] & bit)
                number = np.minimum(np.searchsorted(self.hashes, hashes[candidates]), self.count - 1)
                same = self.hashes[number] == hashes[candidates]
                candidates, number = start + candidates[same], number[same]
                equal = self._equal(sequence, candidates, number)
                places.append(candidates[equal])
                numbers.append(number[equal])
        return np.concatenate(places), np.concatenate(numbers)

    def _equal(self, sequence: np.ndarray, places: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Whether the windows at `places` are those of these numbers."""
        if not len(places):
            return np.empty(0, bool)
        mine = sliding_window_view(self.sequence, self.length)[self.starts[numbers]]
        return (sliding_window_view(sequence, self.length)[places] == mine).all(axis=1)


def _bits(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of bits as those of bytes, and the bits in them."""
    shifts = (places & np.uint64(7)).astype(np.uint8)
    return (places >> np.uint64(3)).astype(np.int64), np.left_shift(np.uint8(1), shifts)


class BloomFilter:
    """A set of 64-bit keys in 40 bits each: whatever was added is in it, and of all else at most a share of `rate`."""

    def __init__(self, capacity: int, rate: float = FALSE_POSITIVES):
        # Half the rate is the formula's, for places drawn one by one. The other half is left to keys that share both
        # of their hashes modulo the size, which is rare in a filter of four megabytes or more.
        self.size = max(2**25, math.ceil(-max(capacity, 1) * math.log(rate / 2) / math.log(2) ** 2))
        self.probes = max(1, round(-math.log2(rate / 2)))
        self.bits = np.zeros(self.size // 8 + 1, np.uint8)

    def add(self, keys: np.ndarray) -> None:
        for at, bit in self._places(keys):
            np.bitwise_or.at(self.bits, at, bit)

    def contains(self, keys: np.ndarray) -> np.ndarray:
        found = np.ones(len(keys), bool)
        for at, bit in self._places(keys):
            found &= (self.bits[at] & bit) != 0
        return found

    def _places(self, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        first, step = _mixed(keys, 1), _mixed(keys, 2)  # double hashing: the places are first + i * step
        for _ in range(self.probes):
            yield _bits(first % np.uint64(self.size))
            first = first + step


class _WordKeys(dict):
    def __missing__(self, word: str) -> int:
        if len(self) >= CACHED:
            self.clear()
        self[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return self[word]


_word_keys = _WordKeys()


def filter_keys(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the 8-grams of texts as GPT-2's filter compares them, and the text of each.

    Their words are runs of letters and digits, lowercase; whatever else there is stands between words.
    """
    words = [np.fromiter(map(_word_keys.__getitem__, ALPHANUMERIC.findall(text.lower())), np.uint64) for text in texts]
    lengths = np.array([len(part) for part in words], np.int64)
    owners = np.repeat(np.arange(len(texts)), lengths)
    if len(owners) < WORD_FILTER:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    keys = np.concatenate([hashes for _, hashes in _hashes(np.concatenate(words), WORD_FILTER)])
    within = owners[: len(keys)] == owners[WORD_FILTER - 1 :]
    return keys[within], owners[: len(keys)][within]


# All cores

_task: Any = None


def _begin(task: Callable) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that began this one


def _carry_out(texts: list[str]) -> Any:
    return _task(texts)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hear of Ctrl-C only afterwards: in between, processes would be left half begun, and never end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        signal.raise_signal(signal.SIGINT)


def _each_batch(
    documents: Files, task: Callable[[list[str]], Any], workers: int | None, what: str
) -> Iterator[tuple[list[str], Any]]:
    """Texts of the documents in order, some at a time, and what `task` makes of them, on `workers` processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    workers = workers or cores
    bar = tqdm(total=documents.total_bytes, desc=what, unit="B", unit_scale=True, leave=False, disable=None)
    if workers == 1:
        for texts, read in _batches(documents):
            yield texts, task(texts)
            bar.update(read - bar.n)
        bar.close()
        return
    # forked, processes share the memory of the index
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pool = ProcessPoolExecutor(workers, context, _begin, (task,))
    waiting: deque = deque()
    in_flight = 0

    def oldest() -> tuple[list[str], Any]:
        nonlocal in_flight
        texts, size, read, result = waiting.popleft()
        in_flight -= size
        made = result.result()
        bar.update(read - bar.n)
        return texts, made

    try:
        for texts, read in _batches(documents):
            size = sum(map(len, texts))
            with _undisturbed():
                waiting.append((texts, size, read, pool.submit(_carry_out, texts)))
            in_flight += size
            while in_flight > 3 * workers * BATCH:
                yield oldest()
        while waiting:
            yield oldest()
    except BrokenProcessPool:
        raise UserError("a process was killed, as happens where memory runs out: --workers=1 takes less") from None
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _batches(documents: Files) -> Iterator[tuple[list[str], int]]:
    texts: list[str] = []
    size = 0
    for text, _ in documents.pieces("never"):
        texts.append(text)
        size += len(text)
        if size >= BATCH or len(texts) >= BATCH // 64:
            yield texts, documents.bytes_read
            texts, size = [], 0
    if texts:
        yield texts, documents.bytes_read


def _refuse_streams(documents: Files) -> None:
    for path in documents.paths:
        if not path.is_file():
            raise UserError(f"{path} is no file that can be read twice: write it to one first")


# GPT-3's filter


def pieces_of(length: int, hits: Iterable[tuple[int, int]], window: int) -> list[tuple[int, int]]:
    """What is left of `length` characters without `hits`, ordered spans, and `window` characters on each side."""
    pieces, begin = [], 0
    for start, end in hits:
        if start - window > begin:
            pieces.append((begin, start - window))
        begin = max(begin, end + window)
    return pieces + ([(begin, length)] if begin < length else [])


class _Found:
    """For pass 1: which n-grams a batch has, each as often as documents have it."""

    def __init__(self, vocabulary: Vocabulary, index: WindowIndex):
        self.vocabulary, self.index = vocabulary, index

    def __call__(self, texts: list[str]) -> np.ndarray:
        documents = words_of(texts, self.vocabulary)
        places, numbers = self.index.find(documents.numbers)
        owners = np.searchsorted(documents.begins, places, side="right") - 1
        return np.unique(owners * self.index.count + numbers) % max(1, self.index.count)


class _Cut:
    """For pass 2: what is left of the documents of a batch that have an n-gram, and which n-grams they have."""

    def __init__(self, vocabulary: Vocabulary, index: WindowIndex, ignored: np.ndarray, window: int):
        self.vocabulary, self.index, self.ignored, self.window = vocabulary, index, ignored, window

    def __call__(self, texts: list[str]) -> dict[int, tuple[list[tuple[int, int]], np.ndarray]]:
        documents = words_of(texts, self.vocabulary)
        places, numbers = self.index.find(documents.numbers)
        counts = ~self.ignored[numbers]
        places, numbers = places[counts], numbers[counts]
        owners = np.searchsorted(documents.begins, places, side="right") - 1
        found = {}
        owners, begins = (array.tolist() for array in np.unique(owners, return_index=True))
        for owner, begin, end in zip(owners, begins, [*begins[1:], len(places)]):
            mine = slice(begin, end)
            firsts = places[mine] - documents.begins[owner]
            text = texts[owner]
            spans = np.array([match.span() for match in TOKEN.finditer(text)])
            spans = spans[self.vocabulary.numbers(text) != NO_WORD]
            hits = np.stack((spans[firsts, 0], spans[firsts + self.index.length - 1, 1]), axis=1).tolist()
            found[owner] = pieces_of(len(text), hits, self.window), np.unique(numbers[mine])
        return found


def decontaminate(
    documents: Files, items: Items, settings: FilterSettings, output: Path, workers: int | None = None
) -> dict[str, Any]:
    """Write the documents without what they share with the items to `output`, lines of JSON. Returns what was cut.

    The first pass counts the documents that have an n-gram, the second cuts. The bytes written do not depend on the
    number of workers.
    """
    _refuse_streams(documents)
    vocabulary = Vocabulary()
    words = words_of(items.texts, vocabulary)
    vocabulary.growing = False
    starts, owners = words.windows(settings.words)
    if not len(starts):
        raise UserError(f"no item has {settings.words} words: there is nothing to look for (--words asks for fewer)")
    index = WindowIndex(words.numbers, starts, settings.words)
    of_files = np.unique(index.numbers * np.int64(len(items.files)) + items.file_of[owners])
    grams, files = np.divmod(of_files, len(items.files))
    index.numbers = np.empty(0, np.int32)
    del starts, owners, of_files

    having = np.zeros(index.count, np.int64)
    for _, found in _each_batch(documents, _Found(vocabulary, index), workers, "looking for n-grams"):
        np.add.at(having, found, 1)
    ignored = having > settings.most_documents

    of_documents = {"read": 0, "unchanged": 0, "cut": 0, "dropped": 0, "left_without_pieces": 0}
    pieces = {"kept": 0, "too_short": 0}
    characters = {"read": 0, "written": 0}
    touched = np.zeros(len(items.files), np.int64)
    task = _Cut(vocabulary, index, ignored, settings.window)
    with replacing(output) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for texts, cuts in _each_batch(documents, task, workers, "cutting"):
            for number, text in enumerate(texts):
                parts, what = [text], "unchanged"
                if number in cuts:
                    spans, found = cuts[number]
                    lasting = [text[a:b] for a, b in spans if b - a >= settings.shortest_piece]
                    if len(spans) > settings.most_pieces:
                        parts, what = [], "dropped"
                    else:
                        parts, what = lasting, "cut" if lasting else "left_without_pieces"
                        pieces["kept"] += len(lasting)
                        pieces["too_short"] += len(spans) - len(lasting)
                    ranges = zip(np.searchsorted(grams, found), np.searchsorted(grams, found, side="right"))
                    touched[np.unique(np.concatenate([files[a:b] for a, b in ranges]))] += 1
                of_documents["read"] += 1
                of_documents[what] += 1
                characters["read"] += len(text)
                for part in parts:
                    characters["written"] += len(part)
                    file.write(json.dumps({"text": part}, ensure_ascii=False) + "\n")

    def per_file(which: np.ndarray) -> list[int]:
        return np.bincount(files[which[grams]], minlength=len(items.files)).tolist()

    characters["removed"] = characters["read"] - characters["written"]
    by_file = {
        "items": np.bincount(items.file_of).tolist(),
        "items_too_short": np.bincount(
            items.file_of[words.lengths < settings.words], minlength=len(items.files)
        ).tolist(),
        "ngrams": per_file(np.ones(index.count, bool)),
        "ngrams_found": per_file(having > 0),
        "ngrams_ignored": per_file(ignored),
        "documents": touched.tolist(),
    }
    return {
        "documents": of_documents,
        "pieces": pieces,
        "characters": characters,
        "ngrams": {"words": settings.words, "different": index.count}
        | {"found": int((having > 0).sum()), "ignored": int(ignored.sum())},
        "files": [
            {"file": name} | {key: values[number] for key, values in by_file.items()}
            for number, name in enumerate(items.files)
        ],
    }


# How much of a benchmark is in a corpus


def words_compared(lengths: Sequence[int] | np.ndarray) -> int:
    """GPT-3's N for a benchmark of items of so many words: the 5th percentile, rounded down, but 8 to 13.

    The percentile lies in a line between the two nearest lengths, as numpy's does unless told otherwise, but exactly.
    """
    ordered = np.sort(lengths).tolist()
    place, hundredths = divmod(5 * (len(ordered) - 1), 100)
    below, above = ordered[place], ordered[min(place + 1, len(ordered) - 1)]
    return min(max(below + (above - below) * hundredths // 100, WORDS_LEAST), WORDS_MOST)


def substrings_of(letters: np.ndarray, seed: str) -> list[np.ndarray]:
    """GPT-4's substrings of an item: three of 50 characters from different places; all of an item that is shorter."""
    if len(letters) <= LETTERS:
        return [letters] if len(letters) else []
    starts = range(len(letters) - LETTERS + 1)
    chosen = random.Random(seed).sample(starts, min(SAMPLES, len(starts)))
    return [letters[start : start + LETTERS] for start in sorted(chosen)]


class _Look:
    """Which windows a batch has, by index, and how many 8-grams GPT-2's filter will take of it."""

    def __init__(self, vocabulary: Vocabulary, words: list[WindowIndex], letters: list[WindowIndex], count: bool):
        self.vocabulary, self.words, self.letters, self.count = vocabulary, words, letters, count

    def __call__(self, texts: list[str]) -> tuple[list[np.ndarray], int]:
        found = []
        if self.words:
            documents = words_of(texts, self.vocabulary)
            found += [np.unique(index.find(documents.numbers)[1]) for index in self.words]
        if self.letters:
            documents = Sequences.of([letters_of(text) for text in texts])
            found += [np.unique(index.find(documents.numbers)[1]) for index in self.letters]
        lengths = (sum(1 for _ in ALPHANUMERIC.finditer(text.lower())) for text in texts) if self.count else ()
        return found, sum(max(0, length - WORD_FILTER + 1) for length in lengths)


def _keys_alone(texts: list[str]) -> np.ndarray:
    return np.unique(filter_keys(texts)[0])


def _having(index: WindowIndex, owners: np.ndarray, found: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` items have a window that was found."""
    return np.bincount(owners[found[index.numbers]], minlength=count) > 0


def measure(
    documents: Files,
    items: Items,
    output: Path,
    methods: Sequence[Method] = METHODS,
    seed: int = 0,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write to `output`, a line of JSON an item, what the documents have of it; returns the counts by file of items."""
    _refuse_streams(documents)
    vocabulary, count, by_file = Vocabulary(), len(items.texts), items.file_of
    results: dict[str, np.ndarray] = {}
    bounds = np.searchsorted(by_file, np.arange(len(items.files) + 1)).tolist()
    slices = [slice(begin, end) for begin, end in zip(bounds, bounds[1:])]  # the items of each file
    report: list[dict[str, Any]] = [
        {"file": name, "items": part.stop - part.start} for name, part in zip(items.files, slices)
    ]

    indexes: dict[str, list[tuple[WindowIndex, np.ndarray]]] = {"gpt3": [], "gpt4": []}
    if "gpt3" in methods:
        words = words_of(items.texts, vocabulary)
        compared = np.array([words_compared(words.lengths[part]) for part in slices])
        lengths = np.minimum(compared[by_file], words.lengths)
        for length in np.unique(lengths[lengths > 0]).tolist():
            starts, owners = words.windows(length, lengths == length)
            indexes["gpt3"].append((WindowIndex(words.numbers, starts, length), owners))
    vocabulary.growing = False
    if "gpt4" in methods:
        chosen = [
            (item, part)
            for item, text in enumerate(items.texts)
            for part in substrings_of(letters_of(text), f"{seed} {text}")
        ]
        samples = Sequences.of([part for _, part in chosen])
        owner_of = np.array([item for item, _ in chosen], np.int64)
        for length in np.unique(samples.lengths).tolist():
            starts, owners = samples.windows(length, samples.lengths == length)
            indexes["gpt4"].append((WindowIndex(samples.numbers, starts, length), owner_of[owners]))

    look = _Look(
        vocabulary, *([index for index, _ in indexes[method]] for method in ("gpt3", "gpt4")), "gpt2" in methods
    )
    order = [(method, *pair) for method in ("gpt3", "gpt4") for pair in indexes[method]]
    seen = [np.zeros(index.count, bool) for _, index, _ in order]
    capacity = read = characters = 0
    for texts, (found, eights) in _each_batch(documents, look, workers, "looking for the items"):
        for flags, numbers in zip(seen, found):
            flags[numbers] = True
        capacity, read, characters = capacity + eights, read + len(texts), characters + sum(map(len, texts))

    if "gpt2" in methods:
        bloom = BloomFilter(capacity)
        for _, keys in _each_batch(documents, _keys_alone, workers, "filling the filter"):
            bloom.add(keys)
        eights, common = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for at in range(0, count, BATCH // 64):
            keys, owners = filter_keys(items.texts[at : at + BATCH // 64])
            eights += np.bincount(at + owners, minlength=count)
            common += np.bincount(at + owners[bloom.contains(keys)], minlength=count)
        results |= {"gpt2_ngrams": eights, "gpt2_found": common}
        for part, entry in zip(slices, report):
            total, shared = (int(array[part].sum()) for array in (eights, common))
            entry["gpt2"] = {"ngrams": total, "found": shared, "percent": 100 * shared / total if total else None}
    for method, name in (("gpt3", "dirty"), ("gpt4", "contaminated")):
        if method in methods:
            flags = np.zeros(count, bool)
            for (which, index, owners), found in zip(order, seen):
                if which == method:
                    flags |= _having(index, owners, found, count)
            results[f"{method}_{name}"] = flags
            for number, entry in enumerate(report):
                amount = int(flags[slices[number]].sum())
                entry[method] = {"words": int(compared[number])} if method == "gpt3" else {}
                entry[method] |= {name: amount, "clean": entry["items"] - amount}
    columns = {key: values.tolist() for key, values in results.items()}
    with replacing(output) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for number in range(count):
            line = {"file": items.files[by_file[number]], "item": items.numbers[number]}
            file.write(json.dumps(line | {key: values[number] for key, values in columns.items()}) + "\n")
    return {"documents": read, "characters": characters, "seed": seed, "files": report}
