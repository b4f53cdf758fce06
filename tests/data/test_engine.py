"""The fast engine gives the ids of tiktoken and `tokenizers`, and says so where it doesn't."""

import json
import random
import sys
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from gpt_arc.data import engine
from gpt_arc.data.engine import FastEncoder, corpus_encoder
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer
from gpt_arc.errors import UserError

# the patterns of Qwen3 and Llama 3
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
COMBINING = [chr(code) for code in range(0x300, 0x370) if unicodedata.combining(chr(code))]


def split_by(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    spelling = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, spelling]}


def added(id, content, **flags):
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **usual, **flags}


@pytest.fixture(scope="module")
def table():
    """The tokenizer.json of a vocabulary trained on code and on text in several scripts."""
    words = "größer 漢字かな交じり文 Привет, мир 🌧️🌧️ e\u0301e\u0301 def __init__" * 30
    trained = BPETokenizer.train([Path(random.__file__).read_text(), words, " ".join(map(str, range(3000)))], 2000)
    return json.loads(trained.files()["tokenizer.json"])


KINDS = {
    "gpt2": {},
    "llama": {"pre_tokenizer": split_by(LLAMA), "ignore_merges": True},
    "qwen": {
        "pre_tokenizer": split_by(QWEN),
        "normalizer": {"type": "NFC"},
        "added_tokens": [added(1999, "<|endoftext|>"), added(2000, "<tool_call>", special=False)],
    },
}


@pytest.fixture
def tokenizer(request, table, tmp_path):
    changed = dict(KINDS[request.param])
    model = table["model"] | {"ignore_merges": changed.pop("ignore_merges", False)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table | changed | {"model": model}))
    return load_tokenizer(tmp_path)


def fuzzed(size, seed=0):
    """Texts of about `size` bytes in all: runs of characters from every plane, beside words, code and white space."""
    rng = np.random.default_rng(seed)
    blocks = [
        *((0, 128), (0, 0x250), (0x300, 0x370), (0x400, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x1100, 0x1200)),
        *((0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFB00, 0xFFFE), (0x1F000, 0x1FAFF)),
        *((0x20000, 0x2A6DF), (0xE0000, 0xE01EF), (0xE000, 0x110000)),
    ]
    code = Path(random.__file__).read_text()
    spaces = [" ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x0b", "\x1c", "\u200b", "\ufeff"]
    words = [
        "'s",
        "'LL",
        "’ve",
        " 'd",
        "<|endoftext|>",
        "<tool_call>",
        "http://x.y/",
        "٣½²㊿",
        "ǅⅷ",
        "👩‍👧",
        *COMBINING,
    ]
    while size > 0:
        pieces = []
        for _ in range(60):
            low, high = blocks[rng.integers(len(blocks))]
            codes = rng.integers(low, high, rng.integers(1, 80)).astype("<u4")
            start = rng.integers(len(code))
            pieces += [
                codes[(codes < 0xD800) | (codes > 0xDFFF)].tobytes().decode("utf-32-le"),
                spaces[rng.integers(len(spaces))] * int(rng.integers(1, 20)),
                code[start : start + rng.integers(200)],
                words[rng.integers(len(words))],
                COMBINING[rng.integers(len(COMBINING))] * int(rng.integers(0, 3)),
            ]
        text = "".join(pieces)
        size -= len(text.encode())
        yield text


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
@pytest.mark.parametrize("size", [300_000, pytest.param(5_000_000, marks=pytest.mark.slow)])
def test_both_engines_give_the_same_ids(tokenizer, size):
    encode, texts = corpus_encoder(tokenizer), list(fuzzed(size))
    assert isinstance(encode, FastEncoder)
    texts += ["", "\u0301", "e\u0301", "\u0e49\u0c3c", ">\u0338", "a" * 100_000, " " * 70_000 + "x", "\n" * 70_000]
    for start in range(0, len(texts), 40):
        batch = texts[start : start + 40]
        ids, counts = encode(batch)
        expected = [tokenizer.encode(text) for text in batch]
        assert counts.tolist() == list(map(len, expected)) and ids.tolist() == sum(expected, [])


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["gpt2"], indirect=True)
def test_a_run_of_a_million_characters(tokenizer):
    encode = corpus_encoder(tokenizer)
    for run in ("a" * 1_000_000, "漢" * 1_000_000, "".join(random.Random(0).choices("abc", k=1_000_000))):
        assert encode([run])[0].tolist() == tokenizer.encode(run)


@pytest.mark.parametrize("tokenizer", ["gpt2"], indirect=True)
def test_caches_are_dropped_and_threads_have_their_own(tokenizer, monkeypatch):
    monkeypatch.setattr(engine, "RENEW_AFTER", 10_000)
    monkeypatch.setattr(engine, "MEMORY", 0)
    monkeypatch.setattr(engine, "ENGINE_MEMORY", 0)
    encode, texts = corpus_encoder(tokenizer), list(fuzzed(100_000))
    loads, load = [], encode._load
    encode._load = lambda content: loads.append(threading.get_ident()) or load(content)
    results = {}

    def work(number):
        results[number] = [encode([text])[0].tolist() for text in texts]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == results[2] == [tokenizer.encode(text) for text in texts]
    assert len(set(loads)) == 3 and len(loads) > 9


@pytest.mark.parametrize("tokenizer", ["gpt2"], indirect=True)
def test_a_difference_is_refused_in_the_first_batch_and_later(tokenizer):
    encode = corpus_encoder(tokenizer)
    other = corpus_encoder(BPETokenizer(dict(list(tokenizer.ranks.items())[:500]), {}))
    texts = ["the first", "self.random", "the third"]
    encode(texts)
    for changed in (encode, corpus_encoder(tokenizer)):
        changed._content, changed._spare = other._content, []
        changed._thread.engine = None
        changed([])
        with pytest.raises(UserError, match="gigatoken encodes .* differently .* --fast=False"):
            changed(texts)


@pytest.mark.parametrize("tokenizer", ["gpt2"], indirect=True)
def test_a_panic_leaves_the_batch_to_the_tokenizer(tokenizer):
    class PanicException(BaseException):
        pass

    class Engine:
        def encode_batch(self, texts, parallel):
            raise PanicException("index out of bounds")

    encode = corpus_encoder(tokenizer)
    encode._spare = [Engine()]
    assert encode(["a text"])[0].tolist() == tokenizer.encode("a text")


@pytest.mark.parametrize("tokenizer", ["gpt2", "qwen"], indirect=True)
def test_without_gigatoken_the_tokenizer_encodes(tokenizer, monkeypatch):
    expected = corpus_encoder(tokenizer)(["a text", "ünd"])[0].tolist()
    assert corpus_encoder(tokenizer, fast=False) == tokenizer.encode_batch
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    encode = corpus_encoder(tokenizer)
    assert encode == tokenizer.encode_batch and encode(["a text", "ünd"])[0].tolist() == expected


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": split_by(r"\w+|\W+")},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}},
        {"added_tokens": [added(2000, "word", special=False, single_word=True)]},
        {"dropout": 0.1},
        {"unk_token": "a"},
    ],
)
def test_tokenizers_that_gigatoken_would_encode_differently_are_left_to_their_library(table, tmp_path, change):
    in_model = {key: value for key, value in change.items() if key in table["model"]}
    changed = table | {"added_tokens": []} | ({} if in_model else change) | {"model": table["model"] | in_model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert corpus_encoder(tokenizer) == tokenizer.encode_batch
    characters = CharTokenizer("ab")
    assert corpus_encoder(characters) == characters.encode_batch
