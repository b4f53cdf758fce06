"""Text to token ids and back: characters, or byte-level BPE.

Every tokenizer saves itself whole as `tokenizer.json` in the schema of Hugging Face's `tokenizers`, so a model
directory needs nothing else, and that library reads the file as it is.

    tokenizer = CharTokenizer.from_text(text)     # or BPETokenizer.gpt2()
    tokenizer.save(directory)
    tokenizer = load_tokenizer(directory)
    tokenizer.decode(tokenizer.encode("a prompt")) == "a prompt"
"""

import abc
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpt_arc.errors import UserError
from gpt_arc.files import write_file

FILE_NAME = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text before merging (openai/gpt-2 src/encoder.py:53); `tokenizers` calls it ByteLevel with use_regex.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer(abc.ABC):
    """What every tokenizer offers."""

    vocab_size: int
    end_of_text: int | None  # the id that separates documents, None where the vocabulary has none
    cuts_at_space = False  # whether text cut between white space and what precedes it encodes to the same ids

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises UserError where the vocabulary can't express it."""

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as an array of uint32, without the cost of a list."""
        return np.array(self.encode(text), dtype=np.uint32)

    @abc.abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the ids."""

    @property
    def start_token(self) -> int:
        """What an empty prompt begins with: the token between documents, else a newline, else the first token."""
        if self.end_of_text is not None:
            return self.end_of_text
        try:
            return self.encode("\n")[0]
        except UserError:
            return 0

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json."""

    def save(self, directory: Path) -> None:
        """Write tokenizer.json into `directory`."""
        write_file(Path(directory) / FILE_NAME, json.dumps(self.to_json(), ensure_ascii=False, indent=1))


class CharTokenizer(Tokenizer):
    """One token per Unicode character, numbered by code point order."""

    end_of_text = None
    cuts_at_space = True

    def __init__(self, characters: Iterable[str]):
        self.characters = list(characters)
        if not self.characters:
            raise ValueError("a vocabulary needs one character at least")
        self.vocab_size = len(self.characters)
        codes = np.array([ord(c) for c in self.characters], dtype=np.uint32)
        self._order = np.argsort(codes)
        self._codes = codes[self._order]  # sorted, for look-up by bisection

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        if not text:
            raise UserError("the text is empty: it has no characters to make a vocabulary of")
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """Ids of the characters. Raises UserError naming the first character that is not in the vocabulary."""
        if not text:
            return []
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        places = np.searchsorted(self._codes, codes).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self._codes[places] != codes)
        if len(unknown):
            character = text[unknown[0]]
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) at position {unknown[0]} of the text is not "
                f"among the {self.vocab_size} characters that this tokenizer knows"
            )
        return self._order[places].tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.characters[token] for token in tokens)

    def to_json(self) -> dict[str, Any]:
        return _schema(
            model={"type": "WordLevel", "vocab": {c: i for i, c in enumerate(self.characters)}, "unk_token": "[UNK]"},
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            decoder={"type": "Fuse"},
        )


class BPETokenizer(Tokenizer):
    """Byte-level BPE, as GPT-2's; encoding is tiktoken's.

    `ranks` maps each token's bytes to its id, in the order of the merges; `special` maps special tokens to ids. Text
    that merely spells a special token is encoded as text.
    """

    cuts_at_space = True

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int]):
        self.ranks, self.special = ranks, special
        self.vocab_size = max((*ranks.values(), *special.values())) + 1
        self.end_of_text = special.get(END_OF_TEXT)

    @cached_property
    def _encoding(self):
        import tiktoken

        return tiktoken.Encoding(
            "gpt-arc", pat_str=GPT2_PATTERN, mergeable_ranks=self.ranks, special_tokens=self.special
        )

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """GPT-2's 50,257 tokens, which tiktoken downloads once. Raises UserError where it can't."""
        import requests
        import tiktoken

        try:
            encoding = tiktoken.get_encoding("gpt2")
        except requests.RequestException as error:
            raise UserError(
                "GPT-2's merges can't be downloaded: connect once, or set TIKTOKEN_CACHE_DIR to a folder that holds "
                f"them ({type(error).__name__})"
            ) from None
        return cls(encoding._mergeable_ranks, encoding._special_tokens)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8, as a cut character's, become U+FFFD."""
        return self._encoding.decode(list(tokens))

    def to_json(self) -> dict[str, Any]:
        printable = _byte_alphabet()
        spelled = {token: "".join(printable[b] for b in token) for token in self.ranks}
        merges = [[spelled[a], spelled[b]] for a, b in merges_of(self.ranks)]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return _schema(
            model={
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {spelled[token]: id for token, id in self.ranks.items()} | self.special,
                "merges": merges,
            },
            pre_tokenizer=byte_level,
            decoder=byte_level,
            special=self.special,
        )


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind `ranks`, in order: each token of several bytes is the last merge of its own encoding."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[first] >= rank:
                raise UserError(f"the token {token!r} (id {rank}) can't be made by merging earlier tokens")
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (openai/gpt-2 src/encoder.py:9)."""
    kept = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(moved)) for b in range(256)]


def _schema(model: dict, pre_tokenizer: dict, decoder: dict, special: dict[str, int] | None = None) -> dict[str, Any]:
    added = [
        {
            "id": id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for text, id in (special or {}).items()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `directory` holds. Raises UserError if there is none, or of a kind that is not known."""
    path = Path(directory) / FILE_NAME
    try:
        content = json.loads(path.read_text("utf-8"))
        model, special = content["model"], {token["content"]: token["id"] for token in content["added_tokens"]}
        kind, vocab = model["type"], model["vocab"]
        if kind == "WordLevel":
            return CharTokenizer(sorted(vocab, key=vocab.__getitem__))
        if kind == "BPE" and content["pre_tokenizer"]["type"] == "ByteLevel":
            byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
            ranks = {
                bytes(byte_of[character] for character in spelled): id
                for spelled, id in vocab.items()
                if spelled not in special
            }
            return BPETokenizer(ranks, special)
    except FileNotFoundError:
        raise UserError(f"{directory} has no {FILE_NAME}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or not ours: {type(error).__name__}: {error}") from None
    raise UserError(f"{path} holds a tokenizer of the kind {kind}, not characters or byte-level BPE")


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a user names: gpt2, a folder or file that holds one, or the name of a folder below data/."""
    if name == "gpt2":
        return BPETokenizer.gpt2()
    return load_tokenizer(Path(name))
