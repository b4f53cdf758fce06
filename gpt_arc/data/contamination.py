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
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from gpt_arc.data.documents import Files, read_text
from gpt_arc.data.json_lines import parse_line
from gpt_arc.data.tokenizer import well_formed
from gpt_arc.errors import UserError
from gpt_arc.files import replacing
from gpt_arc.settings import STRICT

BATCH = 2**20  # characters that a process is given at a time
BLOCK = 2**16  # windows that are hashed at a time, which fit a processor's cache
CACHED, LONGEST_CACHED = 2**18, 64  # spellings of words that are remembered, and the characters of one
SEPARATOR = 0  # stands between texts, and for every word that no item has: no window to look for holds it
NO_WORD = -1  # what is punctuation alone
GOLDEN = 0x9E3779B97F4A7C15
WORD_FILTER = 8  # words of GPT-2's n-grams
WORDS_LEAST, WORDS_MOST = 8, 13  # of GPT-3's n-grams on the benchmark's side
LETTERS, SAMPLES = 50, 3  # characters of GPT-4's substrings, and how many an item has
FALSE_POSITIVES = 1e-8  # at most, of GPT-2's filter
ALPHANUMERIC = re.compile(r"[^\W_]+")
TOKEN = re.compile(r"\S+")
Method = Literal["gpt2", "gpt3", "gpt4"]
METHODS: tuple[Method, ...] = ("gpt2", "gpt3", "gpt4")


@dataclass(frozen=True, kw_only=True, config=STRICT)
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
        least = {"words": 1, "window": 0, "shortest_piece": 0, "most_pieces": 1, "most_documents": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {number}")


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
        lines = name.endswith((".jsonl", ".json"))
        found = enumerate(content.split("\n") if lines else [content], start=1)
        found = [(number, part) for number, part in found if part.strip()]
        if not found:
            raise UserError(f"{path} holds no items")
        texts += [_item_text(part, fields, f"{path}:{number}") if lines else part for number, part in found]
        numbers += [number for number, _ in found]
        file_of += [len(files)] * len(found)
        files.append(str(path))
    if not files:
        raise UserError("--items names nothing: give it .jsonl or .txt files that hold a benchmark")
    return Items(texts, numbers, np.array(file_of), files)


def _item_text(line: str, fields: Sequence[str], place: str) -> str:
    row = parse_line(line, place)
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


class _Remembered(dict):
    """What `compute` makes of words, remembered of short ones: the long strings of data in pages would fill memory."""

    def __missing__(self, word: str) -> int:
        found = self.compute(word)
        if len(word) <= LONGEST_CACHED:
            if len(self) >= CACHED:
                self.clear()
            self[word] = found
        return found

    def array(self, words: re.Pattern, text: str, dtype: type) -> np.ndarray:
        """Of what `words` matches in `text`, one by one: a list of it would take many times the memory of the text."""
        return np.fromiter(map(self.__getitem__, map(re.Match.group, words.finditer(text))), dtype)


class Vocabulary(_Remembered):
    """Numbers of words by their spelling in a text: from 1 on for words of items, SEPARATOR for others, or NO_WORD."""

    def __init__(self):
        super().__init__()
        self.words: dict[str, int] = {}
        self.growing = True  # while the items are read

    def compute(self, token: str) -> int:
        word = word_of(token)
        if not word:
            return NO_WORD
        if self.growing:
            return self.words.setdefault(word, len(self.words) + 1)
        return self.words.get(word, SEPARATOR)

    def numbers(self, text: str) -> np.ndarray:
        """Of what stands between white space in `text`, which may be punctuation alone."""
        return self.array(TOKEN, text, np.int32)


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


class _WordKeys(_Remembered):
    def compute(self, word: str) -> int:
        return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


_word_keys = _WordKeys()


def filter_keys(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the 8-grams of texts as GPT-2's filter compares them, and the text of each.

    Their words are runs of letters and digits, lowercase; whatever else there is stands between words.
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
    with tqdm(total=documents.total_bytes, desc=what, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        here = ((texts, documents.bytes_read, task(texts)) for texts, _ in _batches(documents))
        for texts, read, made in _in_processes(documents, task, workers) if workers > 1 else here:
            yield texts, made
            bar.update(read - bar.n)


def _in_processes(
    documents: Files, task: Callable[[list[str]], Any], workers: int
) -> Iterator[tuple[list[str], int, Any]]:
    """Texts, the bytes that were read up to them, and what `task` makes of them."""
    # forked, processes share the memory of the index
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pool = ProcessPoolExecutor(workers, context, _begin, (task,))
    waiting: deque = deque()
    ahead = 0  # what is waiting, by the size of texts
    try:
        for texts, size in _batches(documents):
            with _undisturbed():
                waiting.append((size, texts, documents.bytes_read, pool.submit(_carry_out, texts)))
            ahead += size
            while ahead > 3 * workers * BATCH:
                size, texts, read, result = waiting.popleft()
                ahead -= size
                yield texts, read, result.result()
        for _, texts, read, result in waiting:
            yield texts, read, result.result()
    except BrokenProcessPool:
        raise UserError("a process was killed, as happens where memory runs out: --workers=1 takes less") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Files) -> Iterator[tuple[list[str], int]]:
    """Texts, and what they take of memory at least."""
    texts: list[str] = []
    size = 0
    for text, _ in documents.pieces("never"):
        texts.append(text)
        size += len(text) + 64  # with what a string takes besides its characters
        if size >= BATCH:
            yield texts, size
            texts, size = [], 0
    if texts:
        yield texts, size


def _refuse_streams(documents: Files) -> None:
    for path in documents.paths:
        if not path.is_file():
            raise UserError(f"{path} is no file that can be read twice: write it to one first")


def pieces_of(length: int, hits: Iterable[tuple[int, int]], window: int) -> list[tuple[int, int]]:
    """What is left of `length` characters without `hits`, ordered spans, and `window` characters on each side."""
    pieces, begin = [], 0
    for start, end in hits:
        if start - window > begin:
            pieces.append((begin, start - window))
        begin = max(begin, end + window)
    return pieces + ([(begin, length)] if begin < length else [])


class _Hits(NamedTuple):
    """Where a batch of documents has n-grams of an index."""

    documents: Sequences
    places: np.ndarray  # in order
    numbers: np.ndarray  # of the n-grams
    owners: np.ndarray  # the documents

    @classmethod
    def of(cls, texts: list[str], vocabulary: Vocabulary, index: WindowIndex) -> "_Hits":
        documents = words_of(texts, vocabulary)
        places, numbers = index.find(documents.numbers)
        return cls(documents, places, numbers, np.searchsorted(documents.begins, places, side="right") - 1)


def _ngrams_of(vocabulary: Vocabulary, index: WindowIndex, texts: list[str]) -> np.ndarray:
    """For pass 1: which n-grams documents have, each as often as documents have it."""
    hits = _Hits.of(texts, vocabulary, index)
    return np.unique(hits.owners * index.count + hits.numbers) % index.count


def _cuts_of(
    vocabulary: Vocabulary, index: WindowIndex, ignored: np.ndarray, window: int, texts: list[str]
) -> dict[int, tuple[list[tuple[int, int]], np.ndarray]]:
    """For pass 2: what is left of the documents that have an n-gram, and which n-grams they have."""
    documents, *where = _Hits.of(texts, vocabulary, index)
    rare = ~ignored[where[1]]
    places, numbers, owners = (array[rare] for array in where)
    found = {}
    for owner in np.unique(owners).tolist():
        mine = slice(*np.searchsorted(owners, (owner, owner + 1)))
        spans = np.array([match.span() for match in TOKEN.finditer(texts[owner])])
        spans = spans[vocabulary.numbers(texts[owner]) != NO_WORD]
        firsts = places[mine] - documents.begins[owner]
        hits = np.stack((spans[firsts, 0], spans[firsts + index.length - 1, 1]), axis=1).tolist()
        found[owner] = pieces_of(len(texts[owner]), hits, window), np.unique(numbers[mine])
    return found


class _Ngrams(NamedTuple):
    """The n-grams of items, and which files of items have which."""

    index: WindowIndex
    grams: np.ndarray  # in order, each as often as files have it
    files: np.ndarray  # beside it, the file

    @classmethod
    def of(cls, words: Sequences, items: Items, length: int) -> "_Ngrams":
        starts, owners = words.windows(length)
        if not len(starts):
            raise UserError(f"no item has {length} words: there is nothing to look for (--words asks for fewer)")
        index = WindowIndex(words.numbers, starts, length)
        of_files = np.unique(index.numbers * np.int64(len(items.files)) + items.file_of[owners])
        index.numbers = np.empty(0, np.int32)  # has served
        return cls(index, *np.divmod(of_files, len(items.files)))

    def files_of(self, grams: np.ndarray) -> np.ndarray:
        """The files that have some of these n-grams."""
        ranges = zip(np.searchsorted(self.grams, grams), np.searchsorted(self.grams, grams, side="right"))
        return np.unique(np.concatenate([self.files[first:last] for first, last in ranges]))


def decontaminate(
    documents: Files, items: Items, settings: FilterSettings, output: Path, workers: int | None = None
) -> dict[str, Any]:
    """Write the documents without what they share with the items to `output`, lines of JSON. Returns what was cut.

    The first pass counts the documents that have an n-gram, the second cuts. The bytes written do not depend on the
    number of workers. Raises UserError for documents that can't be read twice, and where no item is long enough.
    """
    _refuse_streams(documents)
    vocabulary = Vocabulary()
    words = words_of(items.texts, vocabulary)
    vocabulary.growing = False
    ngrams = _Ngrams.of(words, items, settings.words)
    index = ngrams.index

    having = np.zeros(index.count, np.int64)
    task: Callable = functools.partial(_ngrams_of, vocabulary, index)
    for _, found in _each_batch(documents, task, workers, "looking for n-grams"):
        np.add.at(having, found, 1)
    ignored = having > settings.most_documents

    of_documents = {"read": 0, "unchanged": 0, "cut": 0, "dropped": 0, "left_without_pieces": 0}
    pieces = {"kept": 0, "too_short": 0}
    characters = {"read": 0, "written": 0}
    touched = np.zeros(len(items.files), np.int64)
    task = functools.partial(_cuts_of, vocabulary, index, ignored, settings.window)
    with replacing(output) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for texts, cuts in _each_batch(documents, task, workers, "cutting"):
            for number, text in enumerate(texts):
                left, what = [text], "unchanged"
                if number in cuts:
                    spans, found = cuts[number]
                    left = [text[a:b] for a, b in spans if b - a >= settings.shortest_piece]
                    what = "cut" if left else "left_without_pieces"
                    if len(spans) > settings.most_pieces:
                        left, what = [], "dropped"
                    else:
                        pieces["kept"] += len(left)
                        pieces["too_short"] += len(spans) - len(left)
                    touched[ngrams.files_of(found)] += 1
                of_documents["read"] += 1
                of_documents[what] += 1
                characters["read"] += len(text)
                for part in left:
                    characters["written"] += len(part)
                    file.write(json.dumps({"text": part}, ensure_ascii=False) + "\n")

    def per_file(files: np.ndarray) -> list[int]:
        return np.bincount(files, minlength=len(items.files)).tolist()

    characters["removed"] = characters["read"] - characters["written"]
    by_file = {
        "items": per_file(items.file_of),
        "items_too_short": per_file(items.file_of[words.lengths < settings.words]),
        "ngrams": per_file(ngrams.files),
        "ngrams_found": per_file(ngrams.files[having[ngrams.grams] > 0]),
        "ngrams_ignored": per_file(ngrams.files[ignored[ngrams.grams]]),
        "documents": touched.tolist(),
    }
    counts = {"different": index.count, "found": int((having > 0).sum()), "ignored": int(ignored.sum())}
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


class _Wanted(NamedTuple):
    """Windows of one length that are looked for."""

    index: WindowIndex
    owners: np.ndarray  # of each window the item
    seen: np.ndarray  # of each different window whether it was found

    @classmethod
    def of(cls, sequences: Sequences, lengths: np.ndarray, owners: np.ndarray) -> "list[_Wanted]":
        """The windows of `lengths`, one length for each sequence, whose items are `owners`."""
        wanted = []
        for length in np.unique(lengths[lengths > 0]).tolist():
            starts, texts = sequences.windows(length, lengths == length)
            index = WindowIndex(sequences.numbers, starts, length)
            wanted.append(cls(index, owners[texts], np.zeros(index.count, bool)))
        return wanted


def _look(
    vocabulary: Vocabulary, words: list[WindowIndex], letters: list[WindowIndex], count: bool, texts: list[str]
) -> tuple[list[np.ndarray], int]:
    """Which windows documents have, by index, and if they are to be counted how many 8-grams GPT-2's filter takes."""
    found = []
    if words:
        documents = words_of(texts, vocabulary)
        found += [np.unique(index.find(documents.numbers)[1]) for index in words]
    if letters:
        documents = Sequences.of([letters_of(text) for text in texts])
        found += [np.unique(index.find(documents.numbers)[1]) for index in letters]
    lengths = (sum(1 for _ in ALPHANUMERIC.finditer(text.lower())) for text in texts) if count else ()
    return found, sum(max(0, length - WORD_FILTER + 1) for length in lengths)


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
    """Write to `output`, a line of JSON an item, what the documents have of it; returns the counts by file of items.

    Raises UserError for documents that can't be read twice.
    """
    _refuse_streams(documents)
    vocabulary, count, by_file = Vocabulary(), len(items.texts), items.file_of
    bounds = np.searchsorted(by_file, np.arange(len(items.files) + 1)).tolist()
    slices = [slice(begin, end) for begin, end in zip(bounds, bounds[1:])]  # the items of each file
    report: list[dict[str, Any]] = [
        {"file": name, "items": part.stop - part.start} for name, part in zip(items.files, slices)
    ]
    wanted: dict[str, list[_Wanted]] = {"gpt3": [], "gpt4": []}
    if "gpt3" in methods:
        words = words_of(items.texts, vocabulary)
        compared = [words_compared(words.lengths[part]) for part in slices]
        wanted["gpt3"] = _Wanted.of(words, np.minimum(np.array(compared)[by_file], words.lengths), np.arange(count))
    vocabulary.growing = False
    if "gpt4" in methods:
        samples = [substrings_of(letters_of(text), f"{seed} {text}") for text in items.texts]
        parts = Sequences.of([part for parts in samples for part in parts])
        wanted["gpt4"] = _Wanted.of(parts, parts.lengths, np.repeat(np.arange(count), [*map(len, samples)]))

    indexes = ([each.index for each in wanted[method]] for method in ("gpt3", "gpt4"))
    look = functools.partial(_look, vocabulary, *indexes, "gpt2" in methods)
    capacity = read = characters = 0
    for texts, (found, eights) in _each_batch(documents, look, workers, "looking for the items"):
        for each, numbers in zip(wanted["gpt3"] + wanted["gpt4"], found):
            each.seen[numbers] = True
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
            for index, owners, seen in wanted[method]:
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
