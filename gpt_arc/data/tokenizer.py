"""Tokenizers: characters, byte-level BPE, and the tokenizers that published models come with.

A tokenizer saves itself completely, as a `tokenizer.json` that Hugging Face's `tokenizers` can read
or as SentencePiece's `tokenizer.model`, so a model directory needs nothing else.

    tokenizer = CharTokenizer.from_text(text)     # or BPETokenizer.gpt2(), or BPETokenizer.train(texts, 8192)
    tokenizer.save(directory)
    tokenizer = load_tokenizer(directory)
    tokenizer.decode(tokenizer.encode("a prompt")) == "a prompt"
"""

import abc
import contextlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from gpt_arc import hub
from gpt_arc.data.declared import SETTINGS_FILE, Declared, read_declared
from gpt_arc.errors import UserError, first_line
from gpt_arc.extras import import_extra
from gpt_arc.files import DATA_ROOT, follow, whole, write_file
from gpt_arc.manifest import check_files
from gpt_arc.reading import read_bytes, read_json, reading

FILE_NAME = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
MAIN_FILES = (FILE_NAME, "vocab.json", SENTENCEPIECE_FILE)  # in the order they are looked for in a folder
END_OF_TEXT = "<|endoftext|>"
# How GPT-2 splits text before merging (openai/gpt-2 src/encoder.py:53), in tiktoken's form, which backtracks least.
# `tokenizers` calls it ByteLevel with use_regex.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # what \s matches in tiktoken
# tiktoken's regex engine panics when it has to backtrack through a million characters of white space
LONG_SPACE = re.compile(rf"(?<![{WHITE_SPACE}])[{WHITE_SPACE}]{{500000,}}+(?=[^{WHITE_SPACE}])")
TRAINING_PIECE = 1 << 16  # characters; bounds the memory and time that training spends on one very long text
LARGEST_FILE = 64 << 20  # bytes; Gemma's tokenizer.json has 33 million
MOST_GROWTH = 1000  # times that a text may become longer on its way to tokens
LONGEST_TOKEN = 128  # bytes, as in GPT-2; without it a page of dashes in a small corpus would become one token
TRAINING_SAMPLE = 1 << 26  # characters; of longer text, every second, fourth, eighth ... piece is taken
# letters, digits, symbols or white space that GPT-2's pattern keeps together; training on a long run takes minutes
LONG_RUN = re.compile(r"[^\W\d_]{129,}|\d{129,}|(?:[^\w\s]|_){129,}|\s{129,}")


class Tokenizer(abc.ABC):
    """Interface of every tokenizer."""

    vocab_size: int
    text_size: int  # vocab_size without the special tokens at its end, which no text is encoded to
    end_of_text: int | None  # the id that separates documents; None if the vocabulary has none
    declared = Declared()  # by the directory that the tokenizer was loaded from
    cuts_at_space = False  # whether splitting text just before white space leaves its ids unchanged
    joins_space = True  # whether a token may hold a space and what follows it

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`. Raises UserError if the vocabulary can't express it."""

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, but returns a uint32 array, without the cost of a list."""
        return np.array(self.encode(text), dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of all texts in one array, and how many each text has."""
        arrays = [self.encode_array(text) for text in texts]
        return np.concatenate(arrays or [np.array([], np.uint32)]), np.array([len(ids) for ids in arrays], np.int64)

    @abc.abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text of the ids."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a continuation."""
        return self.declared.ends or frozenset(() if self.end_of_text is None else (self.end_of_text,))

    @property
    def start_token(self) -> int:
        """First token of an empty prompt: the declared one, else the end-of-text token, a newline or token 0."""
        start = self.end_of_text if self.declared.start is None else self.declared.start
        if start is not None:
            return start
        try:
            return next(iter(self.encode("\n")), 0)
        except UserError:
            return 0

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids that a model reads for `text`, which begin with the tokens declared to precede each text."""
        return [*self.declared.prefix, *self.encode(text)] or [self.start_token]

    def encode_from(self, text: str, start: int, after_special: bool) -> tuple[list[int], int]:
        """Returns the ids of `text`, and how many of them hold none of its characters from `start` on.

        `after_special`: `text` follows a special token, instead of beginning a text.
        """
        tokens = self.encode(text)
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, self.encode(text[:start])))
        return tokens, sum(1 for _ in alike)

    def special_token(self, text: str) -> int | None:
        """Returns the id of a special token such as <|endoftext|>, or None if the vocabulary doesn't have it."""
        return None

    def files(self) -> dict[str, bytes]:
        """Contents of the files that `save` writes, by name; `load_tokenizer` rebuilds an equal tokenizer from them."""
        return self._vocabulary_files() | self.declared.files

    def _vocabulary_files(self) -> dict[str, bytes]:
        """Contents of the files that determine the ids of a text; {} for a tokenizer that can't be saved."""
        return {}

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that its own file puts before a text."""
        return ()

    def declare(self, folder: Path, prefix: tuple[int, ...] | None = None) -> "Tokenizer":
        """Takes over what the files in `folder` declare, see `read_declared`, and returns itself."""
        self.declared = read_declared(folder, self, prefix)
        self.end_of_text = self.declared.end_of_text
        return self

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files to `directory`."""
        for name, content in self.files().items():
            write_file(Path(directory) / name, content)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer) or type(self) is not type(other) or self.end_of_text != other.end_of_text:
            return False
        return self._vocabulary_files() == other._vocabulary_files()


@contextlib.contextmanager
def naming_text(kind: str, text: str) -> Iterator[None]:
    """Runs the block, which encodes a text of some `kind`, so that a UserError names the text and the mend."""
    try:
        yield
    except UserError as error:
        raise UserError(f"the {kind} {text[:40]!r}: {error}: leave it out") from None


def well_formed(text: str) -> str:
    """Replaces unpaired surrogates, which no Unicode encoding can express, with U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _utf_32(text: str) -> bytes:
    try:
        return text.encode("utf-32-le")
    except UnicodeEncodeError:
        return well_formed(text).encode("utf-32-le")


EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


class CharTokenizer(Tokenizer):
    """One token per Unicode character, numbered by code point order."""

    end_of_text = None
    cuts_at_space = True
    joins_space = False

    def __init__(self, characters: Iterable[str]):
        self.characters = list(characters)
        if not self.characters:
            raise ValueError("a vocabulary needs at least one character")
        self.vocab_size = self.text_size = len(self.characters)
        codes = np.array([ord(c) for c in self.characters])
        kind = np.uint16 if self.vocab_size < 2**16 else np.uint32
        self._ids = np.full(max(codes.max() + 2, 256), self.vocab_size, kind)  # by code point; vocab_size: unknown
        self._ids[codes[::-1]] = np.arange(self.vocab_size)[::-1]  # the first of equal characters counts

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        if not text:
            raise UserError("the text is empty, so there are no characters to build a vocabulary from")
        return cls(sorted(set(well_formed(text))))

    def encode(self, text: str) -> list[int]:
        """Returns one id per character. Raises UserError naming the first character that is not in the vocabulary."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        return self._encode_array(text).astype(np.uint32, copy=False)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of all texts in one array, of 16 bits if they fit, and how many each text has."""
        arrays = [self._encode_array(text) for text in texts]
        return np.concatenate(arrays or [self._ids[:0]]), np.array([len(ids) for ids in arrays], np.int64)

    def _encode_array(self, text: str) -> np.ndarray:
        if text.isascii():
            pairs = np.frombuffer(text.encode() + b"\0" * (len(text) % 2), dtype=np.uint16)
            ids = self._pairs.take(pairs).view(self._ids.dtype)[: len(text)]
        else:
            codes = np.frombuffer(_utf_32(text), dtype="<u4")
            ids = self._ids.take(codes, mode="clip")
        if ids.max(initial=0) >= self.vocab_size:
            place = int(np.argmax(ids >= self.vocab_size))
            raise UserError(
                f"the character {text[place]!r} (U+{ord(text[place]):04X}) at position {place} of the text is not "
                f"among the {self.vocab_size} characters in this tokenizer's vocabulary"
            )
        return ids

    @cached_property
    def _pairs(self) -> np.ndarray:
        """Two ids in one number, by the 16 bits of two characters of ASCII: one look-up for both."""
        codes = np.arange(2**16, dtype=np.uint16).view(np.uint8)
        return self._ids[codes].view(f"u{2 * self._ids.itemsize}")

    def encode_from(self, text: str, start: int, after_special: bool) -> tuple[list[int], int]:
        return self.encode(text), start

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.characters[token] for token in tokens if token < self.vocab_size)

    def _vocabulary_files(self) -> dict[str, bytes]:
        vocab = {character: id for id, character in enumerate(self.characters)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
        return _tokenizer_json(model, pre_tokenizer=EACH_CHARACTER, decoder={"type": "Fuse"})


class BPETokenizer(Tokenizer):
    """Byte-level BPE like GPT-2's, encoded by tiktoken.

    `ranks` maps each token's bytes to its id, in merge order; `special` maps special tokens to ids. A special token
    spelled out in a text is encoded as ordinary text.
    """

    cuts_at_space = True

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int]):
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.special = special
        self.text_size = max(ranks.values()) + 1
        self.vocab_size = max([self.text_size, *(id + 1 for id in special.values())])
        self.end_of_text = special.get(END_OF_TEXT)

    @cached_property
    def _encoding(self):
        import tiktoken

        return tiktoken.Encoding(
            "gpt-arc", pat_str=GPT2_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """GPT-2's tokenizer of 50,257 tokens, which tiktoken downloads once. Raises UserError if the download fails."""
        import requests
        import tiktoken

        try:
            encoding = tiktoken.get_encoding("gpt2")
        except requests.RequestException as error:
            raise UserError(
                f"GPT-2's merges can't be downloaded ({type(error).__name__}): connect to the internet once, or set "
                "TIKTOKEN_CACHE_DIR to a folder that contains them"
            ) from None
        return cls(encoding._mergeable_ranks, encoding._special_tokens)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Trains a tokenizer of `vocab_size` tokens on `texts`: 256 bytes, the merges, and <|endoftext|> last.

        Reads the texts once, in order, and learns from an even sample of at most TRAINING_SAMPLE characters. The
        vocabulary is smaller if the corpus has too few pairs to merge. Merges stay within the pieces that GPT-2's
        pattern splits text into. Raises UserError for fewer than 257 tokens.
        """
        from tokenizers import Tokenizer as Library
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} already make 257 tokens"
            )
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        pieces = _sample(piece for text in texts for piece in _pieces(well_formed(text), TRAINING_PIECE))
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=alphabet,
            special_tokens=[],
            max_token_length=LONGEST_TOKEN + 1,  # exclusive bound in the library
            show_progress=sys.stderr.isatty(),
        )
        library.train_from_iterator((part for piece in pieces for part in _without_long_runs(piece)), trainer)
        ranks = {_bytes_of(spelled): id for spelled, id in library.get_vocab().items()}
        return cls(ranks, {END_OF_TEXT: len(ranks)})

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        text = well_formed(text)
        cuts = [0, len(text)]
        if len(text) >= 500_000:  # GPT2_PATTERN also splits before white space and before its last character
            cuts[1:1] = [cut for space in LONG_SPACE.finditer(text) for cut in (space.start(), space.end() - 1)]
        encode = self._encoding.encode_to_numpy
        return np.concatenate([encode(text[a:b], disallowed_special=()) for a, b in itertools.pairwise(cuts)])

    def encode_from(self, text: str, start: int, after_special: bool) -> tuple[list[int], int]:
        tokens, before = self.encode(text), len(well_formed(text[:start]).encode())
        ends = itertools.accumulate(len(self._bytes_by_id[token]) for token in tokens)
        return tokens, sum(end <= before for end in ends)

    def decode(self, tokens: Iterable[int]) -> str:
        """Returns the text. Invalid UTF-8, such as part of a character, becomes U+FFFD; unknown ids are skipped."""
        return b"".join(self._bytes_by_id.get(token, b"") for token in tokens).decode("utf-8", "replace")

    @cached_property
    def joins_space(self) -> bool:
        return any(token.startswith(b" ") and token.strip() for token in self.ranks)

    def special_token(self, text: str) -> int | None:
        return self.special.get(text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BPETokenizer) or self.end_of_text != other.end_of_text:
            return False
        return (self.ranks, self.special) == (other.ranks, other.special)

    @cached_property
    def _bytes_by_id(self) -> dict[int, bytes]:
        return {id: token for token, id in self.ranks.items()} | {id: t.encode() for t, id in self.special.items()}

    def _vocabulary_files(self) -> dict[str, bytes]:
        return self._file

    @cached_property
    def _file(self) -> dict[str, bytes]:
        printable = byte_alphabet()
        spelled = {token: "".join(printable[b] for b in token) for token in self.ranks}
        vocab = {spelled[token]: id for token, id in self.ranks.items()} | self.special
        merges = [[spelled[a], spelled[b]] for a, b in merges_of(self.ranks)]
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        }
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return _tokenizer_json(model, pre_tokenizer=byte_level, decoder=byte_level, special=self.special)


class LibraryTokenizer(Tokenizer):
    """Any other tokenizer.json (GPT-1's, Qwen's, Llama's), run by the `tokenizers` library.

    A special token spelled out in a text is encoded as ordinary text, and no tokens are added before or after.
    """

    def __init__(self, content: bytes):
        self._content = content
        _check_growth(content)
        self._library = _library(content)
        special = {id for id, token in self._library.get_added_tokens_decoder().items() if token.special}
        ids = self._library.get_vocab().values()
        self.vocab_size = max(ids, default=-1) + 1
        self.text_size = max((id for id in ids if id not in special), default=-1) + 1
        self.end_of_text = self._library.token_to_id(END_OF_TEXT)

    def __reduce__(self):  # pickling self._library would lose encode_special_tokens
        state = {name: getattr(self, name) for name in ("declared", "end_of_text")}
        return LibraryTokenizer, (self._content,), state

    def encode(self, text: str) -> list[int]:
        return self._encode(self._library, text).ids

    def encode_from(self, text: str, start: int, after_special: bool) -> tuple[list[int], int]:
        encoding = self._encode(self._library_within if after_special else self._library, text)
        return encoding.ids, sum(end <= start for _, end in encoding.offsets)

    def _encode(self, library, text: str):
        text = well_formed(text)
        try:
            encoding = library.encode(text, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # Rust's, of a pattern that backtracks too much
                raise UserError(f"the tokenizer can't encode {text[:30]!r}: {first_line(error)}") from None
            if not isinstance(error, Exception):
                raise
            raise UserError(_lacking(*self._first_refused(text))) from None  # text that the vocabulary lacks
        if self._may_drop and (lost := self._first_dropped(text)):
            raise UserError(_lacking(*lost))
        return encoding

    def decode(self, tokens: Iterable[int]) -> str:
        return self._library.decode([int(token) for token in tokens], skip_special_tokens=False)

    def special_token(self, text: str) -> int | None:
        return self._library.token_to_id(text)

    @cached_property
    def joins_space(self) -> bool:
        """Whether a token may hold a space, spelled as such or by Ġ (byte-level) or ▁ (Metaspace), and more."""
        spaces, tokens = " Ġ▁", self._library.get_vocab(with_added_tokens=False)
        return any(token.startswith(tuple(spaces)) and token.strip(spaces) for token in tokens)

    @cached_property
    def _may_drop(self) -> bool:
        """Whether the library may drop characters: a BPE does, unless it has all bytes or an unknown token."""
        table = json.loads(self._library.to_str())
        model = table["model"]
        if model["type"] != "BPE" or model["unk_token"] is not None:
            return False
        spelled = [f"<0x{byte:02X}>" for byte in range(256)] if model["byte_fallback"] else byte_alphabet()
        byte_level = model["byte_fallback"] or '"ByteLevel"' in json.dumps(table["pre_tokenizer"])
        return not (byte_level and all(token in model["vocab"] for token in spelled))

    def _first_dropped(self, text: str) -> tuple[str, int] | None:
        """Returns the first character that gets no token, and its position in the normalized text, if there is one."""
        model, (text, split) = self._library.model, self._steps(text)
        prefix, suffix = model.continuing_subword_prefix or "", model.end_of_word_suffix or ""
        forms = {*itertools.product({"", prefix}, {"", suffix})}

        def lacks(character: str) -> bool:
            spelled = {spelling for piece, _ in split(character) for spelling in piece}
            return any(model.token_to_id(a + c + b) is None for c in spelled for a, b in forms)

        lacking = set(filter(lacks, set(text)))
        if not lacking or len(forms) == 1:
            return next(((c, i) for i, c in enumerate(text) if c in lacking), None)
        for piece, (start, _) in split(text):  # a character has several forms, and the one that is needed may be there
            spelled = "".join(t.value.removeprefix(prefix).removesuffix(suffix) for t in model.tokenize(piece))
            if spelled != piece:
                place = next(i for i, (a, b) in enumerate(itertools.zip_longest(piece, spelled)) if a != b)
                return piece[place], start + place
        return None

    def _first_refused(self, text: str) -> tuple[str, int]:
        """Returns the first piece that the model can't tokenize, and its position in the normalized text."""
        text, pieces_of = self._steps(text)
        for piece, (start, _) in pieces_of(text):
            try:
                self._library.model.tokenize(piece)
            except Exception:  # a type of the library's own, which Python can't name
                return piece, start
        return text, 0

    def _steps(self, text: str) -> tuple[str, Callable[[str], list[tuple[str, tuple[int, int]]]]]:
        """Returns the normalized text, and the function that splits a text into the pieces that the model gets."""
        normalizer, pre_tokenizer = self._library.normalizer, self._library.pre_tokenizer
        split = pre_tokenizer.pre_tokenize_str if pre_tokenizer else lambda text: [(text, (0, len(text)))]
        return normalizer.normalize_str(text) if normalizer else text, split

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that the post-processor puts before a text."""
        try:
            encoding = self._library.encode("a", add_special_tokens=True)
        except Exception:  # the vocabulary lacks the letter
            encoding = self._library.encode("", add_special_tokens=True)
        count = next((i for i, added in enumerate(encoding.special_tokens_mask) if not added), 0)
        return tuple(encoding.ids[:count])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LibraryTokenizer) and self._ids_follow_from == other._ids_follow_from

    @cached_property
    def _ids_follow_from(self) -> tuple:
        """The parts of the file that determine a text's ids, without post-processing, decoding and chat templates."""
        table = json.loads(self._library.to_str())
        return self.end_of_text, *(table[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens"))

    @cached_property
    def _library_within(self):
        """The library for text after a special token, where Metaspace's prepend_scheme "first" prepends nothing."""
        return _library(self._library.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"').encode())

    def _vocabulary_files(self) -> dict[str, bytes]:
        return {FILE_NAME: self._content}


def _lacking(piece: str, position: int) -> str:
    code = f" (U+{ord(piece):04X})" if len(piece) == 1 else ""
    return (
        f"{piece[:40]!r}{code} at position {position} of the text is not in the tokenizer's vocabulary, which has no "
        "token for unknown text"
    )


def _library(content: bytes):
    """Returns the library's tokenizer for a tokenizer.json, without what would change the ids of plain text."""
    from tokenizers import Tokenizer as Library

    library = Library.from_buffer(content)
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    return library


class SentencePieceTokenizer(Tokenizer):
    """A model of the `sentencepiece` library (arXiv:1808.06226), used unchanged."""

    def __init__(self, content: bytes):
        self._content = content
        self._library = import_extra("sentencepiece").SentencePieceProcessor(model_proto=content)
        self.vocab_size = self.text_size = self._library.vocab_size()
        self.end_of_text = self._library.eos_id() if self._library.eos_id() >= 0 else None  # -1: none

    @property
    def start_token(self) -> int:
        """The declared token, else the model's beginning-of-text token if it has one, else as in `Tokenizer`."""
        bos = self._library.bos_id()
        return bos if bos >= 0 and self.declared.start is None else super().start_token

    def encode(self, text: str) -> list[int]:
        return self._library.encode(well_formed(text))

    def decode(self, tokens: Iterable[int]) -> str:
        return self._library.decode([int(token) for token in tokens if token < self.vocab_size])

    def special_token(self, text: str) -> int | None:
        id = self._library.piece_to_id(text)
        return id if self._library.is_control(id) else None

    def _vocabulary_files(self) -> dict[str, bytes]:
        return {SENTENCEPIECE_FILE: self._content}


def _pieces(text: str, size: int) -> Iterator[str]:
    """Yields `text` in pieces of at most `size` characters, split before a space if possible."""
    start = 0
    while len(text) - start > size:
        end = max(text.rfind(" ", start + 1, start + size), text.rfind("\n", start + 1, start + size))
        end = end if end > start else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _sample(pieces: Iterable[str]) -> list[str]:
    """Returns every n-th piece, from the first, for the least power of two at which they fit into TRAINING_SAMPLE."""
    kept, size, stride = [], 0, 1
    for number, piece in enumerate(pieces):
        if number % stride == 0:
            kept.append(piece)
            size += len(piece)
        while size > TRAINING_SAMPLE and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            size = sum(map(len, kept))
    return kept


def _without_long_runs(piece: str) -> Iterator[str]:
    """Yields a piece, cut within runs that are longer than the longest token."""
    cuts = [cut for run in LONG_RUN.finditer(piece) for cut in range(run.start(), run.end(), LONGEST_TOKEN)]
    for start, end in itertools.pairwise([0, *(cut for cut in cuts if cut), len(piece)]):
        yield piece[start:end]


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Recovers the merges from `ranks`, in order: encoding a multi-byte token ends with the merge that creates it."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[first] >= rank:
                raise UserError(f"the token {token!r} (id {rank}) can't be formed by merging earlier tokens")
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def byte_alphabet() -> list[str]:
    """Returns the character that represents each byte in a byte-level vocabulary (openai/gpt-2 src/encoder.py:9)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(substitutes)) for b in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_alphabet())}


def _bytes_of(spelled: str) -> bytes:
    """Returns the bytes of a token spelled in the byte alphabet. Raises KeyError for any other token."""
    return bytes(_BYTE_OF[character] for character in spelled)


def _tokenizer_json(
    model: dict, pre_tokenizer: dict, decoder: dict, special: dict[str, int] | None = None
) -> dict[str, bytes]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": text, **flags} for text, id in (special or {}).items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return {FILE_NAME: json.dumps(content, ensure_ascii=False, indent=1).encode()}


def _check_ids(ids: list[int]) -> None:
    """Raises ValueError for ids that aren't natural numbers, or leave so many out that counting to them takes long."""
    if set(map(type, ids)) - {int} or min(ids, default=0) < 0:
        raise ValueError("an id in its vocabulary is not a natural number")
    if max(ids, default=0) > 4 * len(ids) + 1000:
        raise ValueError(f"it has {len(ids)} tokens, and one has the id {max(ids)}")


def _check_growth(content: bytes) -> None:
    """Raises UserError if a step may lengthen a text more than MOST_GROWTH times, or add more tokens than that."""
    table = json.loads(content)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(table.get(part) or {})) > MOST_GROWTH:
            raise UserError(f"its {part} may lengthen a text {growth:.3g} times, and {MOST_GROWTH} times are the most")
    if (added := _added_ids(table.get("post_processor") or {})) > MOST_GROWTH:
        raise UserError(f"its post_processor adds {added:,} tokens to a text, and {MOST_GROWTH} are the most")


def _added_ids(step: dict) -> int:
    """Returns how many tokens a post-processor of a tokenizer.json adds to a text."""
    tokens, pieces = step.get("special_tokens") or {}, step.get("single") or ()
    each = (len(tokens[piece["SpecialToken"]["id"]]["ids"]) for piece in pieces if "SpecialToken" in piece)
    return sum(each) + sum(map(_added_ids, step.get("processors") or ()))


def _growth(step: dict) -> float:
    """Returns how many times as long a step of a tokenizer.json may make a text."""
    inner = step.get("normalizers") or step.get("pretokenizers") or step.get("decoders")
    if inner:
        return math.prod(map(_growth, inner))
    if step.get("type") == "Prepend":
        return 1.0 + len(step["prepend"])
    if step.get("type") != "Replace":
        return {"ByteLevel": 2.0, "Precompiled": 30.0}.get(step.get("type", ""), 1.0)
    replaced, length = step["pattern"].get("String"), len(step["content"])
    return max(1.0, length / len(replaced)) if replaced else 1.0 + length  # a regex may match between characters


def _read_json(content: bytes) -> Tokenizer:
    """Reads a tokenizer.json: as CharTokenizer or BPETokenizer if it describes one, else as LibraryTokenizer."""
    table = json.loads(content)
    model, vocab, added = table["model"], table["model"]["vocab"], table.get("added_tokens") or []
    pre_tokenizer = table.get("pre_tokenizer") or {}
    _check_ids([*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))), *(one["id"] for one in added)])
    kind = model.get("type") or ("BPE" if "merges" in model else None)  # files from 2020 have no type
    plain = not table.get("normalizer") and not table.get("truncation") and not table.get("padding")
    if plain and not added and kind == "WordLevel" and pre_tokenizer == EACH_CHARACTER:
        characters = sorted(vocab, key=vocab.__getitem__)
        if all(len(character) == 1 and vocab[character] == id for id, character in enumerate(characters)):
            return CharTokenizer(characters)
    special = {token["content"]: token["id"] for token in added}
    as_gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True}
    post_processor = table.get("post_processor") or as_gpt2
    if (
        plain
        and kind == "BPE"
        and {"use_regex": True, **pre_tokenizer, "trim_offsets": True} == as_gpt2
        and post_processor["type"] in ("ByteLevel", "TemplateProcessing")
        and all("Sequence" in piece for piece in post_processor.get("single", ()))  # no token is added
        and not any(model.get(key) for key in ("dropout", "unk_token", "byte_fallback"))
        and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        and all(token["special"] for token in added)
        and not model.get("ignore_merges")
    ):
        tokenizer = _byte_level(vocab, model["merges"], special)
        if tokenizer is not None:
            return tokenizer
    return LibraryTokenizer(content)


def _byte_level(vocab: dict[str, int], merges: list, special: dict[str, int]) -> BPETokenizer | None:
    """Builds a tokenizer from a byte-level vocabulary; None if its ids aren't in merge order, as tiktoken requires."""
    try:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        ranks = {_bytes_of(spelled): id for spelled, id in vocab.items() if spelled not in special}
        has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
        ids = {*ranks.values(), *special.values()}
        if (
            not has_all_bytes
            or len(ids) < len(ranks) + len(special)
            or [(_bytes_of(a), _bytes_of(b)) for a, b in pairs] != merges_of(ranks)
        ):
            return None
    except (KeyError, UserError):  # a token not in the byte alphabet, or one that no merge creates
        return None
    return BPETokenizer(ranks, special)


def _read_vocab_and_merges(vocab: bytes, merges: bytes) -> Tokenizer:
    """Reads vocab.json and merges.txt, the files that GPT-1 (openai-gpt) and GPT-2 were published with."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    ids = json.loads(vocab)
    lines = merges.decode().replace("\r\n", "\n").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    pairs = [(first, second) for first, second in (line.split(" ") for line in lines if line)]
    if "<unk>" in ids and any(token.endswith("</w>") for token in ids):  # like transformers' OpenAIGPTTokenizer
        library = Library(models.BPE(ids, pairs, unk_token="<unk>", end_of_word_suffix="</w>"))
        library.normalizer = normalizers.BertNormalizer(lowercase=True)
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.BPEDecoder(suffix="</w>")
        library.add_special_tokens(["<unk>"])
        return LibraryTokenizer(library.to_str().encode())
    ordinary = {*_BYTE_OF, *("".join(pair) for pair in pairs)}
    tokenizer = _byte_level(ids, pairs, {token: id for token, id in ids.items() if token not in ordinary})
    if tokenizer is None:
        raise ValueError("its ids are not in the order of the merges in merges.txt")
    return tokenizer


def holds_tokenizer(directory: Path | str) -> bool:
    """Whether a folder contains a tokenizer's files."""
    return any((Path(directory) / name).exists() for name in MAIN_FILES)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Loads a tokenizer from a folder or a file: tokenizer.json, else vocab.json with merges.txt, else a *.model.

    Raises UserError if there is none or it is damaged.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next((path / name for name in MAIN_FILES if (path / name).exists()), path / FILE_NAME)
    for file in (path, folder / "merges.txt") if path.name == "vocab.json" else (path,):
        if not file.exists():
            raise UserError(f"{folder} has no {file.name}")
    content = read_bytes(path, LARGEST_FILE)
    try:
        with reading(path):
            tokenizer = _read(path, content)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    if path.name != "vocab.json":
        return tokenizer.declare(folder, None if path.suffix == ".model" else tokenizer.prefix)
    tokenizer.declare(folder)
    prefix = tokenizer.declared.prefix
    return _with_prefix(tokenizer, prefix).declare(folder, prefix) if prefix else tokenizer


def _read(path: Path, content: bytes) -> Tokenizer:
    if path.suffix == ".model":
        return SentencePieceTokenizer(content)
    if path.name != "vocab.json":
        return _read_json(content)
    settings = path.with_name(SETTINGS_FILE)
    kind = (read_json(settings) if settings.exists() else {}).get("tokenizer_class") or "GPT2"
    if not kind.startswith(("GPT2", "OpenAIGPT")):  # only code says how others split text before merging
        raise UserError(f"vocab.json and merges.txt don't describe a {kind}: save it as {FILE_NAME}")
    return _read_vocab_and_merges(content, read_bytes(path.with_name("merges.txt"), LARGEST_FILE))


def _with_prefix(tokenizer: Tokenizer, prefix: tuple[int, ...]) -> LibraryTokenizer:
    """Returns a tokenizer of vocab.json and merges.txt as one whose tokenizer.json has the prefix."""
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    library = Library.from_buffer(tokenizer.files()[FILE_NAME])
    special = [(library.id_to_token(id), id) for id in prefix]
    single = [*(text for text, _ in special), "$A"]
    library.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return LibraryTokenizer(library.to_str().encode())


def find_tokenizer(name: str) -> Tokenizer:
    """Loads the tokenizer a user names: gpt2, a file, a dataset or model, a run's model, or a model on the hub.

    Raises UserError if the name is none of these or the tokenizer is damaged.
    """
    if name == "gpt2":
        return BPETokenizer.gpt2()
    named = whole(Path(name)), Path(name, "best"), Path(name, "last"), whole(DATA_ROOT / name)
    for path in map(follow, named):
        if path.is_file() or holds_tokenizer(path):
            check_files(path if path.is_dir() else path.parent, sizes_only=(".safetensors", ".pt", ".bin"))
            return load_tokenizer(path)
    if hub.is_name(name):
        return load_tokenizer(hub.download(name, hub.CONFIG + hub.TOKENIZER))
    raise UserError(
        f"there is no tokenizer {name}: give gpt2 (or char, for prepare/text.py), the name of a dataset under "
        f"{DATA_ROOT}/, a run, a folder with {FILE_NAME}, vocab.json with merges.txt or {SENTENCEPIECE_FILE}, one of "
        "these files, or hf:OWNER/NAME for a model on the Hugging Face hub"
    )
