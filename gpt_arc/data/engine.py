"""Encoding of a corpus: by gigatoken if it knows the tokenizer, checked against the tokenizer's own library.

    encode = corpus_encoder(tokenizer)                 # thread-safe
    ids, counts = encode(["a text", "and another"])    # the ids of all texts, and how many each has

gigatoken encodes byte-level BPE more than ten times as fast as tiktoken and `tokenizers`, which remain the engines of
prompts. Its caches grow with the text, so each thread replaces its copy from time to time.
"""

import json
import math
import os
import threading
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt_arc.data.tokenizer import FILE_NAME, BPETokenizer, LibraryTokenizer, Tokenizer, byte_alphabet
from gpt_arc.errors import UserError

SAMPLE = 1 << 12  # characters of a text that both engines encode
RENEW_AFTER = 1 << 24  # characters; in the worst case, Chinese, caches grow by about 20 bytes for each
MEMORY, ENGINE_MEMORY = 300 << 20, 100 << 20  # bytes of the process, and more for each engine, that caches may fill
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def corpus_encoder(tokenizer: Tokenizer, fast: bool = True) -> Encode:
    """Returns the fastest function that encodes texts as `tokenizer.encode_batch` does."""
    description = _for_gigatoken(tokenizer) if fast else None
    try:
        return tokenizer.encode_batch if description is None else FastEncoder(tokenizer, *description)
    except (ImportError, RuntimeError):  # not installed, or a pattern that it doesn't know
        return tokenizer.encode_batch


class FastEncoder:
    """gigatoken, compared with the tokenizer on all texts of the first batch and on one text of every other.

    Only the beginnings of texts are compared. Raises UserError where they differ. A batch that makes gigatoken panic is
    left to the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, content: str, nfc: bool):
        from gigatoken import gigatoken_rs

        self._load: Callable[[str], Any] = gigatoken_rs.load_hf_json
        self._tokenizer, self._content, self._nfc = tokenizer, content, nfc
        self._thread, self._engines = threading.local(), 0
        self._spare = [self._load(content)]  # raises RuntimeError for a tokenizer that it can't encode with
        self._compared = False

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # `tokenizers` has NFC of an old version of Unicode, which leaves what is normalized by a later one as it is
        others = [i for i, text in enumerate(texts) if self._nfc and not unicodedata.is_normalized("NFC", text)]
        known = list(texts)
        for i in others:
            known[i] = ""
        try:
            ids, counts = self._encode(known)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            return self._tokenizer.encode_batch(texts)
        if not others:
            return ids, counts
        arrays = np.split(ids, np.cumsum(counts)[:-1])
        for i in others:
            arrays[i] = self._tokenizer.encode_array(texts[i])
        return np.concatenate(arrays), np.array([len(array) for array in arrays])

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        samples = [text[:SAMPLE] for text in (texts[len(texts) // 2 :][:1] if self._compared else texts)]
        self._compared |= bool(texts)
        rows = self._engine(sum(map(len, texts))).encode_batch([*texts, *samples], parallel=False)
        ids, ends = rows.layout.content.data, rows.layout.offsets.data
        expected, _ = self._tokenizer.encode_batch(samples)
        if not np.array_equal(ids[ends[len(texts)] :], expected):
            raise UserError(self._difference(samples))
        return ids[: ends[len(texts)]], np.diff(ends[: len(texts) + 1])

    def _engine(self, characters: int) -> Any:
        """The engine of this thread, which must not encode in two threads at once."""
        thread, limit = self._thread, MEMORY + self._engines * ENGINE_MEMORY
        if getattr(thread, "engine", None) is None:
            try:
                thread.engine, thread.encoded = self._spare.pop(), 0
            except IndexError:
                thread.engine, thread.encoded = self._load(self._content), 0
            self._engines += 1
        elif thread.encoded >= RENEW_AFTER and _resident() >= limit:
            thread.engine = None  # before the next one takes memory
            thread.engine, thread.encoded = self._load(self._content), 0
        thread.encoded += characters
        return thread.engine

    def _difference(self, samples: Sequence[str]) -> str:
        encode = self._load(self._content).encode
        text = next(text for text in samples if encode(text).tolist() != self._tokenizer.encode(text))
        return (
            f"gigatoken encodes {text[:60]!r}... differently from the tokenizer's own library: repeat the command with "
            "--fast=False, and please report it"
        )


def _for_gigatoken(tokenizer: Tokenizer) -> tuple[str, bool] | None:
    """Returns a tokenizer.json with which gigatoken encodes text as `tokenizer` does, and whether text must be NFC.

    None unless that is certain for all but the pattern. Special tokens are left out, since a corpus that spells one out
    contains ordinary text.
    """
    if not isinstance(tokenizer, BPETokenizer | LibraryTokenizer):
        return None
    table = json.loads(tokenizer.files()[FILE_NAME])
    model, added = table["model"], table.get("added_tokens") or []
    changing = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    added = [token for token in added if not token.get("special")]
    if (
        model.get("type") != "BPE"
        or any(model.get(key) for key in changing)
        or not set(byte_alphabet()) <= model["vocab"].keys()
        or table.get("normalizer") not in (None, {"type": "NFC"})
        or not _splits_into_bytes(table.get("pre_tokenizer") or {})
        or any(token.get("single_word") or token.get("normalized") and table.get("normalizer") for token in added)
    ):
        return None
    return json.dumps(table | {"added_tokens": added, "normalizer": None}), table.get("normalizer") is not None


def _splits_into_bytes(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether a text is split by one pattern, GPT-2's or another, and spelled in the byte alphabet."""
    *splits, spelling = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return (
        spelling.get("type") == "ByteLevel"
        and not spelling.get("add_prefix_space")
        and spelling.get("use_regex", True) == (not splits)
        and all(split["type"] == "Split" and "Regex" in split["pattern"] for split in splits)
        and all(split["behavior"] == "Isolated" and not split["invert"] for split in splits)
    )


def _resident() -> float:
    """Bytes of memory that the process holds; infinite where the system doesn't say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return math.inf
