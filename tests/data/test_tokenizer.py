"""Tokenizers against the libraries that read the same files: `tokenizers`, transformers, `sentencepiece`."""

import contextlib
import json
import pickle
import random
import re
import sys
import time

import huggingface_hub
import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Reference

from gpt_arc.data import tokenizer as tokenizer_module
from gpt_arc.data.tokenizer import (
    END_OF_TEXT,
    LONGEST_TOKEN,
    WHITE_SPACE,
    BPETokenizer,
    CharTokenizer,
    LibraryTokenizer,
    SentencePieceTokenizer,
    find_tokenizer,
    load_tokenizer,
)
from gpt_arc.errors import UserError

CORPUS = [
    "The cat sat on the mat, didn't it? " * 3,
    "1234 + 5678 = 6912\n\n  indented\ttext",
    "naïve Ünïcödé 漢字 🙂🙃",
] * 20
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A byte-level BPE trained by the `tokenizers` library: its folder, and the library's tokenizer."""
    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    reference.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("trained")
    reference.save(str(folder / "tokenizer.json"))
    return folder, reference


@pytest.fixture(scope="module")
def loaded(trained):
    """The trained BPE as we read it."""
    return load_tokenizer(trained[0])


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_bpe_encodes_as_the_tokenizers_library_and_decodes_to_the_text(trained, loaded, text):
    _, reference = trained
    tokens = loaded.encode(text)
    assert tokens == reference.encode(text, add_special_tokens=False).ids
    assert loaded.decode(tokens) == text


def test_the_tokenizers_library_reads_a_saved_bpe(trained, tmp_path):
    folder, reference = trained
    load_tokenizer(folder).save(tmp_path)
    saved = Reference.from_file(str(tmp_path / "tokenizer.json"))
    assert saved.get_vocab() == reference.get_vocab()
    for text in CORPUS:
        assert saved.encode(text).ids == reference.encode(text).ids
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    trained_file = json.loads((folder / "tokenizer.json").read_text())
    assert written["model"]["merges"] == trained_file["model"]["merges"]


def test_text_that_spells_a_special_token_is_text(trained):
    tokenizer = load_tokenizer(trained[0])
    tokens = tokenizer.encode(END_OF_TEXT)
    assert tokenizer.end_of_text not in tokens and len(tokens) > 1
    assert tokenizer.decode(tokens) == END_OF_TEXT
    assert tokenizer.start_token == tokenizer.end_of_text


def test_cut_characters_decode_to_the_replacement_character(trained):
    tokenizer = load_tokenizer(trained[0])
    assert tokenizer.decode(tokenizer.encode("\U0001f9ff")[:-1]).endswith("\ufffd")


@pytest.fixture(scope="module")
def gpt2():
    try:
        return BPETokenizer.gpt2()
    except UserError as error:
        pytest.skip(f"GPT-2's merges are not at hand: {error}")  # they can be downloaded, and are not shipped


def test_gpt2_has_its_published_tokens(gpt2):
    assert gpt2.vocab_size == 50_257 and gpt2.end_of_text == 50_256
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("\n\n") == [628]


def test_a_saved_gpt2_loads_and_equals_the_tokenizers_library(gpt2, tmp_path):
    gpt2.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.ranks == gpt2.ranks and loaded.special == gpt2.special
    reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*CORPUS, " \t\n\r\u00a0x  y", "\u2028 I'll we've 'LL", "١٢٣ ½ ²", "a\u0301\u0300"]:
        assert loaded.encode(text) == gpt2.encode(text) == reference.encode(text).ids


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT.filter(bool))
def test_characters_equal_the_tokenizers_library_and_decode_to_the_text(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("characters")
    tokenizer = CharTokenizer.from_text(text)
    tokenizer.save(folder)
    loaded = load_tokenizer(folder)
    assert loaded.characters == sorted(set(text))
    tokens = loaded.encode(text)
    assert tokens == Reference.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert loaded.decode(tokens) == text


def test_an_unknown_character_is_named_with_its_position():
    tokenizer = CharTokenizer.from_text("abc\n")
    for text, expected in (("abxc", r"'x' \(U\+0078\) at position 2"), ("€", r"'€' \(U\+20AC\) at position 0")):
        with pytest.raises(UserError, match=expected):
            tokenizer.encode(text)
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.start_token == tokenizer.encode("\n")[0]
    assert CharTokenizer.from_text("abc").start_token == 0


# ---- arbitrary text

SPACES = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\v",
    "\x85",
    "\u00a0",
    "\u1680",
    "\u2003",
    "\u2028",
    "\u202f",
    "\u3000",
]
RANGES = [
    (0, 0x20), (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x370, 0x600), (0x900, 0xE00), (0x2000, 0x2070),
    (0x20D0, 0x2100), (0x3000, 0x9FFF), (0xAC00, 0xD7A4), (0xE000, 0xF900), (0xFE00, 0xFE10), (0x1F300, 0x1FB00),
    (0xE0000, 0xE01F0), (0, 0x110000),
]  # fmt: skip


def fuzz(size: int, seed: int) -> str:
    """At least `size` bytes from every plane: unassigned and private code points, marks, emoji, controls, white
    space."""
    draw, parts = random.Random(seed), []
    while size > 0:
        first, last = draw.choice(RANGES)
        codes = (draw.randrange(first, last) for _ in range(draw.randrange(1, 7)))
        parts += [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
        if draw.random() < 0.6:
            parts.append(
                draw.choice([*SPACES, "'s", "'ll", "'T", " '", "\u200b", "\u180e", "\ufeff", "\x1c", "\u200d"])
            )
        size -= 10  # less than a round adds on average
    return "".join(parts)


def pairs_of_spaces():
    """Every pair of white-space characters, between letters and at the end."""
    return "".join(f"{a}x{a}{b}y" for a in SPACES for b in SPACES) + " \n"


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([*CORPUS, fuzz(200_000, seed=1)], 1500)


def test_a_trained_tokenizer_has_bytes_merges_and_end_of_text(bpe):
    assert bpe.vocab_size == 1500 and bpe.end_of_text == bpe.start_token == 1499
    assert sorted(map(len, bpe.ranks))[:256] == [1] * 256 and min(bpe.ranks.values()) == 0
    assert bpe.decode([1499]) == END_OF_TEXT
    assert len(bpe.encode("The cat sat on the mat")) < 15
    assert BPETokenizer.train(iter([*CORPUS, fuzz(200_000, seed=1)]), 1500) == bpe


def test_a_small_corpus_makes_a_smaller_vocabulary():
    tokenizer = BPETokenizer.train(["aaaa", "aa b"], 1000)
    assert tokenizer.vocab_size < 265 and tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.encode("aaaa") == [tokenizer.ranks[b"aaaa"]]
    assert BPETokenizer.train([], 257).vocab_size == 257
    with pytest.raises(UserError, match="a vocabulary of 256 is too small"):
        BPETokenizer.train(CORPUS, 256)


def test_very_long_texts_and_words_are_trained_on():
    text = "x" * 200_000 + " y" * 100_000
    tokenizer = BPETokenizer.train([text], 300)
    assert 64 <= max(map(len, tokenizer.ranks)) <= 128
    assert tokenizer.encode(text) == Reference.from_buffer(tokenizer.files()["tokenizer.json"]).encode(text).ids


def test_a_megabyte_of_unicode_encodes_as_the_tokenizers_library(bpe):
    text = fuzz(1_000_000, seed=2) + pairs_of_spaces()
    assert len(text.encode()) > 1_000_000
    tokens = bpe.encode_array(text)
    reference = Reference.from_buffer(bpe.files()["tokenizer.json"])
    assert tokens.tolist() == reference.encode(text, add_special_tokens=False).ids
    assert bpe.decode(tokens) == text


@pytest.mark.parametrize("kind", [r"\p{L}", r"\p{N}", r"\s"])
def test_both_regex_engines_agree_on_character_classes(kind):
    """tiktoken's engine and that of `tokenizers` each have their own version of the Unicode tables."""
    codes = (*range(0xD800), *range(0xE000, 0x33500), *range(0xE0000, 0xE0200))  # nothing is assigned beyond
    every = "".join(map(chr, codes))
    bytes_alone = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("kind", pat_str=kind, mergeable_ranks=bytes_alone, special_tokens={})
    matched = bytes(encoding.encode_ordinary(every)).decode()
    unmatched = pre_tokenizers.Split(Regex(kind), "removed").pre_tokenize_str(every)
    assert set(matched) == set(every) - set("".join(part for part, _ in unmatched))
    if kind == r"\s":
        assert matched == "".join(re.findall(f"[{WHITE_SPACE}]", every))


@settings(max_examples=300, deadline=None)
@given(before=ANY_TEXT, after=ANY_TEXT, space=st.sampled_from(SPACES), kind=st.sampled_from(["bpe", "characters"]))
def test_text_may_be_cut_before_white_space(bpe, before, after, space, kind):
    if before and before[-1] in "".join(SPACES):
        before += "."
    after = space + after
    tokenizer = bpe if kind == "bpe" else CharTokenizer.from_text(before + after)
    assert tokenizer.cuts_at_space
    assert tokenizer.encode(before) + tokenizer.encode(after) == tokenizer.encode(before + after)


def test_a_million_spaces(bpe):
    """More than tiktoken's regex engine can backtrack through."""
    reference = Reference.from_buffer(bpe.files()["tokenizer.json"])
    for text in ("x" + " " * 1_200_000 + "y z", "\n" * 1_100_000, " " * 600_000 + "a" + "\t" * 1_100_000 + "!"):
        tokens = bpe.encode_array(text)
        assert bpe.decode(tokens) == text
        if len(text) < 1_150_000:
            assert tokens.tolist() == reference.encode(text).ids


def test_lone_surrogates_become_the_replacement_character(bpe):
    text, mended = "a\ud800b \udfff", "a\ufffdb \ufffd"
    library = LibraryTokenizer(bpe.files()["tokenizer.json"])
    for tokenizer in (bpe, library, CharTokenizer.from_text(mended)):
        assert tokenizer.encode(text) == tokenizer.encode(mended) == tokenizer.encode_array(text).tolist()
        assert tokenizer.decode(tokenizer.encode(text)) == mended
    assert CharTokenizer.from_text(text).characters == sorted(set(mended))
    assert BPETokenizer.train([text], 300).decode(bpe.encode(text)) is not None


@pytest.mark.parametrize("make", ["bpe", "characters", "library", "sentencepiece"])
def test_every_tokenizer_encodes_arrays_and_survives_saving_and_pickling(make, bpe, sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    library = LibraryTokenizer(bpe.files()["tokenizer.json"]).declare(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = {
        "bpe": bpe,
        "characters": CharTokenizer.from_text("The cat.\n"),
        "library": library,
        "sentencepiece": SentencePieceTokenizer(sentencepiece_model),
    }[make]
    array = tokenizer.encode_array("The cat.")
    assert array.dtype == np.uint32 and array.tolist() == tokenizer.encode("The cat.")
    assert len(tokenizer.encode_array("")) == 0 and tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    tokenizer.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == tokenizer.files()
    unpickled = pickle.loads(pickle.dumps(tokenizer))
    assert unpickled == tokenizer and unpickled.encode("The cat.") == array.tolist()
    if make != "characters":
        assert unpickled.encode(f"a{END_OF_TEXT}</s>") == tokenizer.encode(f"a{END_OF_TEXT}</s>")
        assert tokenizer.end_of_text not in unpickled.encode(f"a{END_OF_TEXT}</s>")
    if make != "library":  # the saved file loads as a BPETokenizer
        assert load_tokenizer(tmp_path) == tokenizer
    assert tokenizer != CharTokenizer("xyz") and tokenizer != "xyz"


# ---- tokenizers that come with models


def library_bpe(pre_tokenizer, *, normalizer=None, vocab=None, **settings):
    """A small byte-level BPE of the library's, with other settings."""
    tokenizer = Reference(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[])
    )
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    table = json.loads(tokenizer.to_str())
    table["model"] |= settings
    return table


QWEN = (  # the pattern of Qwen's tokenizers
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def foreign():
    byte_level = pre_tokenizers.ByteLevel
    qwen = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), byte_level(False, use_regex=False)])
    tables = {
        "qwen": library_bpe(qwen, normalizer=normalizers.NFC()),
        "no pattern": library_bpe(byte_level(False, use_regex=False)),
        "prefix space": library_bpe(byte_level(True)),
        "normalized": library_bpe(byte_level(False), normalizer=normalizers.Lowercase()),
        "whole words first": library_bpe(byte_level(False), ignore_merges=True),
        "another order": library_bpe(byte_level(False)),
        "unreachable": library_bpe(byte_level(False)),
    }
    vocab = tables["another order"]["model"]["vocab"]
    last = sorted(vocab, key=vocab.get)[-2:]
    vocab[last[0]], vocab[last[1]] = vocab[last[1]], vocab[last[0]]
    tables["unreachable"]["model"]["merges"].pop()
    return tables


def test_byte_level_bpe_with_gpt2_s_pattern_loads_as_bpe(tmp_path):
    table = library_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    table["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    # as in GPT-2's file on the hub
    table["model"]["merges"] = [" ".join(pair) for pair in table["model"]["merges"]]
    table["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    table["added_tokens"][0]["normalized"] = True
    del table["pre_tokenizer"]["use_regex"], table["model"]["type"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, BPETokenizer) and tokenizer.end_of_text is None
    text = fuzz(20_000, seed=5)
    assert tokenizer.encode(text) == Reference.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids


@pytest.mark.parametrize(
    "name",
    ["qwen", "no pattern", "prefix space", "normalized", "whole words first", "another order", "unreachable"],
)
def test_other_tokenizers_use_the_library(foreign, name, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(foreign[name]))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(tokenizer, LibraryTokenizer) and not tokenizer.cuts_at_space
    reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
    text = fuzz(20_000, seed=6) + CORPUS[0]
    tokens = tokenizer.encode(text)
    assert tokens == reference.encode(text).ids
    assert tokenizer.decode(tokens) == reference.decode(tokens, skip_special_tokens=False)
    assert tokenizer.vocab_size == reference.get_vocab_size() and tokenizer.end_of_text is None
    special = reference.token_to_id("<|im_end|>")
    spelled = tokenizer.encode("a<|im_end|>")
    assert special not in spelled and tokenizer.decode([special, 9999]) == "<|im_end|>"
    tokenizer.save(tmp_path / ".")
    assert load_tokenizer(tmp_path) == tokenizer


def test_text_that_a_vocabulary_lacks_is_named_and_never_dropped():
    """Where the library's tokens don't spell the text, or it has none."""
    suffixed = Reference(models.BPE({"a": 0, "b": 1, "ab": 2, "b</w>": 3}, [("a", "b")], end_of_word_suffix="</w>"))
    spaced = Reference(models.BPE({"Ġ": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    lower = Reference(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    words = Reference(models.WordLevel({"a": 0, "b": 1, "ab": 2}))
    unigram = Reference(models.Unigram([("a", -1.0), ("b", -1.0)]))
    suffixed.pre_tokenizer = words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lower.normalizer = normalizers.Lowercase()
    known, without_spaces = {spaced: "ab ", lower: "abAB"}, {suffixed, words}
    draw, outcomes = random.Random(0), set()
    for _ in range(400):
        text = "".join(draw.choice("aabBä x"[: draw.choice((3, 7))]) for _ in range(draw.randrange(1, 6)))
        for library in (suffixed, spaced, lower, words, unigram):
            try:
                spelled = "".join(library.encode(text).tokens).replace("</w>", "").replace("Ġ", " ")
                expected = text.replace(" ", "") if library in without_spaces else text
                whole = spelled == (expected.lower() if library is lower else expected)
            except Exception:  # the library's own type
                whole = False
            outcomes.add((library, whole))
            tokenizer = LibraryTokenizer(library.to_str().encode())
            if whole:
                assert tokenizer.encode(text) == library.encode(text).ids
                continue
            with pytest.raises(UserError) as refused:
                tokenizer.encode(text)
            assert "of the text is not in the tokenizer's vocabulary, which has no token for unknown" in str(
                refused.value
            )
            if library in known:
                place = next(i for i, character in enumerate(text) if character not in known[library])
                assert str(refused.value).startswith(f"{text[place]!r} (U+{ord(text[place]):04X}) at position {place} ")
    assert len(outcomes) == 10
    with pytest.raises(UserError, match=r"'a' \(U\+0061\) at position 1 "):  # there is no a</w>
        LibraryTokenizer(suffixed.to_str().encode()).encode("ba")


def test_truncation_padding_and_templates_of_a_file_are_ignored(foreign, tmp_path):
    reference = Reference.from_str(json.dumps(foreign["qwen"]))
    plain = reference.encode("The cat sat on the mat").ids
    reference.enable_truncation(3)
    reference.enable_padding(length=50)
    reference.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 400)])
    assert LibraryTokenizer(reference.to_str().encode()).encode("The cat sat on the mat") == plain


def test_a_tokenizer_saved_by_transformers_is_still_equal(bpe, foreign, tmp_path):
    """transformers adds empty templates and settings; the ids stay the same, so prepared datasets still fit."""
    from transformers import PreTrainedTokenizerFast

    library = LibraryTokenizer(json.dumps(foreign["qwen"]).encode())
    for i, tokenizer in enumerate((bpe, library)):
        (tmp_path / f"{i}").mkdir()
        tokenizer.save(tmp_path / f"{i}")
        transformed = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / f"{i}" / "tokenizer.json"))
        transformed.save_pretrained(tmp_path / f"{i}-saved")
        loaded = load_tokenizer(tmp_path / f"{i}-saved")
        assert loaded == tokenizer
    changed = json.loads(json.dumps(foreign["qwen"]))
    changed["normalizer"] = {"type": "Lowercase"}
    assert LibraryTokenizer(json.dumps(changed).encode()) != library


@pytest.mark.parametrize(
    ("declared", "end"),
    [
        ({}, None),
        ({"eos_token": "<|im_end|>"}, "<|im_end|>"),
        ({"eos_token": {"content": "<|im_start|>", "lstrip": False}}, "<|im_start|>"),
        ({"eos_token": None, "bos_token": "<|im_start|>"}, None),
        ({"eos_token": "unheard of"}, None),
    ],
)
def test_the_end_of_text_is_declared_and_never_guessed(foreign, tmp_path, declared, end):
    for name in ("qwen", "plain"):
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        table = foreign["qwen"] if name == "qwen" else library_bpe(byte_level)
        (tmp_path / "tokenizer.json").write_text(json.dumps(table))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared | {"chat_template": "kept"}))
        tokenizer = load_tokenizer(tmp_path)
        expected = {token["content"]: token["id"] for token in table["added_tokens"]}.get(end)
        assert tokenizer.end_of_text == expected
        if end is not None:
            assert tokenizer.start_token == expected
            (tmp_path / "copy").mkdir(exist_ok=True)
            tokenizer.save(tmp_path / "copy")
            copy = load_tokenizer(tmp_path / "copy")
            assert copy == tokenizer and copy.end_of_text == expected
            assert "kept" in (tmp_path / "copy" / "tokenizer_config.json").read_text()


def write_vocab_and_merges(folder, vocab, merges):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    return folder


def test_gpt1_s_files_load_as_in_transformers(tmp_path):
    from transformers import OpenAIGPTTokenizer

    trained = Reference(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>")
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    write_vocab_and_merges(tmp_path / "gpt1", model["vocab"], model["merges"])
    tokenizer = load_tokenizer(tmp_path / "gpt1")
    reference = OpenAIGPTTokenizer.from_pretrained(tmp_path / "gpt1")
    for text in (*CORPUS[:3], "The CAT's naïve unk <unk> \u4e00z", fuzz(20_000, seed=7)):
        tokens = tokenizer.encode(text)
        assert tokens == reference(text, split_special_tokens=True)["input_ids"]
    tokens = tokenizer.encode("The cat sat on the mat")
    assert tokenizer.decode(tokens) == reference.decode(tokens) == "the cat sat on the mat"
    assert tokenizer.end_of_text is None and tokenizer.vocab_size == len(model["vocab"])
    assert tokenizer.encode("\n") == [] and tokenizer.start_token == 0
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path) == tokenizer


def test_gpt2_s_files_load_as_in_transformers(bpe, tmp_path):
    from transformers import GPT2Tokenizer

    model = json.loads(bpe.files()["tokenizer.json"])["model"]
    folder = write_vocab_and_merges(tmp_path / "gpt2", model["vocab"], model["merges"])
    assert load_tokenizer(folder) == bpe
    text = fuzz(20_000, seed=8) + pairs_of_spaces()
    assert bpe.encode(text) == GPT2Tokenizer.from_pretrained(folder)(text)["input_ids"]
    assert find_tokenizer(str(folder / "vocab.json")) == bpe
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UserError, match="don't describe a Qwen2Tokenizer: save it as tokenizer.json"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match="gpt2 has no merges.txt"):
        load_tokenizer(folder)


def test_sentencepiece_models_load_unchanged(sentencepiece_model, tmp_path):
    from sentencepiece import SentencePieceProcessor

    (tmp_path / "my.model").write_bytes(sentencepiece_model)
    tokenizer = find_tokenizer(str(tmp_path / "my.model"))
    reference = SentencePieceProcessor(model_file=str(tmp_path / "my.model"))
    assert tokenizer.vocab_size == reference.vocab_size()
    assert (tokenizer.end_of_text, tokenizer.start_token) == (reference.eos_id(), reference.bos_id()) == (2, 1)
    assert not tokenizer.cuts_at_space
    for text in ("3 times 4 is 12.", "naïve 漢字 🙂 </s> <s>", fuzz(20_000, seed=9)):
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text))
    assert tokenizer.decode([999]) == "" and tokenizer.encode("\ud800") == tokenizer.encode("\ufffd")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path) == tokenizer and (tmp_path / "tokenizer.model").read_bytes() == sentencepiece_model


def test_a_missing_library_is_reported_with_its_install_command(sentencepiece_model, monkeypatch, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[sentencepiece\]'"):
        load_tokenizer(tmp_path)


def test_tokenizers_are_found_by_name(bpe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    bpe.save(tmp_path / "data" / "mine")
    downloads = []

    def download(repository, allow_patterns):
        downloads.append((repository, allow_patterns))
        return str(tmp_path / "data" / "mine")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("mine", "data/mine", "data/mine/tokenizer.json", str(tmp_path / "data" / "mine"), "hf:a/b"):
        assert find_tokenizer(name) == bpe
    assert find_tokenizer("openai-gpt") == bpe
    bpe.save((tmp_path / "data" / "mine").rename(tmp_path / "data" / "gpt2"))  # a local folder can't take the name gpt2
    with contextlib.suppress(UserError):  # the merges may not be at hand
        assert find_tokenizer("gpt2") != bpe
    assert [repository for repository, _ in downloads] == ["a/b", "openai-community/openai-gpt"]
    assert "tokenizer.json" in downloads[0][1] and not any("safetensors" in pattern for pattern in downloads[0][1])
    with pytest.raises(
        UserError, match="no tokenizer nonesuch: give gpt2 .or char, for prepare/text.py., the name of a dataset"
    ):
        find_tokenizer("nonesuch")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}', '{"model": 3, "added_tokens": []}'])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        load_tokenizer(tmp_path)


def test_a_missing_or_unknown_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        '{"model": {"type": "Unheard"}, "added_tokens": [], "pre_tokenizer": null}'
    )
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="tokenizer.model is damaged"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_without_the_unknown_token_it_names_is_read():
    """Such a vocabulary has whole words only, and not the letter by which a prefix is looked for."""
    content = {"model": {"type": "WordLevel", "vocab": {"good": 0, "bad": 1}, "unk_token": "[UNK]"}}
    tokenizer = LibraryTokenizer(json.dumps({"added_tokens": [], **content}).encode())
    assert tokenizer.prefix == () and tokenizer.encode("bad") == [1]
    with pytest.raises(UserError, match="'a.*' .*is not in the tokenizer's vocabulary"):
        tokenizer.encode("a")


def test_training_takes_an_even_sample_of_a_long_text(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TRAINING_SAMPLE", 1000)
    monkeypatch.setattr(tokenizer_module, "TRAINING_PIECE", 50)
    for count, stride in ((20, 1), (21, 2), (40, 2), (41, 4), (1000, 64)):
        pieces = [f"{number:050}" for number in range(count)]
        assert tokenizer_module._sample(iter(pieces)) == pieces[::stride]
    many = "".join(f"{number:050}" for number in range(800))
    few = [f"{number:050}" for number in range(0, 800, 64)]
    assert BPETokenizer.train([many], 300) == BPETokenizer.train(few, 300)
    assert tokenizer_module._sample(["x" * 5000, "y"]) == ["x" * 5000]


def test_training_on_a_run_without_spaces_is_quick():
    """Of 100,000 letters a token has at most 128; nothing else changes."""
    letters = "".join(random.Random(0).choices("acgt", k=100_000))
    began = time.process_time()
    trained = BPETokenizer.train([letters, "7" * 100_000], 1000)
    assert time.process_time() - began < 3  # 12 s if the run were one word
    assert max(map(len, trained.ranks)) == LONGEST_TOKEN and b"7" * 128 in trained.ranks
    for text in ("a" * 128, "word " * 100, "a-" * 100, "1a" * 500):
        assert list(tokenizer_module._without_long_runs(text)) == [text]
    assert list(map(len, tokenizer_module._without_long_runs("x " + "=" * 300 + "y"))) == [2, 128, 128, 45]


@pytest.mark.parametrize("order", [sorted, lambda characters: sorted(characters, reverse=True)])
@pytest.mark.parametrize("others", [0, 100, 127, 128, 1000])
def test_characters_have_their_ids_whether_a_text_is_ascii_or_not(order, others):
    characters = order([*map(chr, range(128)), *map(chr, range(0x400, 0x400 + others))])
    tokenizer, ids = CharTokenizer(characters), {character: id for id, character in enumerate(characters)}
    for text in ("".join(map(chr, range(128))), "a\u0400b" if others else "ab", "\x7f\0"):
        assert tokenizer.encode(text) == [ids[character] for character in text]
    without = CharTokenizer([character for character in characters if character != "q"])
    for text in ("ab q", "ab q\u0401" if others > 1 else "ab q"):
        with pytest.raises(UserError, match=r"the character 'q' \(U\+0071\) at position 3 of the text"):
            without.encode(text)


@pytest.mark.parametrize("size", [2, 200, 256, 40_000, 70_000])
def test_characters_are_encoded_in_batches_by_their_place_in_the_vocabulary(size):
    rng = random.Random(size)
    codes = [code for code in range(rng.randrange(0x20), 0x12000) if not 0xD800 <= code < 0xE000]
    characters = [chr(code) for code in sorted(rng.sample(codes[:300], min(size, 200)) + codes[300:][: size - 200])]
    tokenizer, places = CharTokenizer(characters), {character: id for id, character in enumerate(characters)}
    ascii_only = [character for character in characters if character.isascii()] or characters
    texts = ["".join(rng.choices(chosen, k=k)) for k in range(12) for chosen in (characters, ascii_only)]
    ids, counts = tokenizer.encode_batch(texts)
    assert ids.dtype == (np.uint16 if len(characters) < 2**16 else np.uint32)
    assert ids.tolist() == [places[character] for text in texts for character in text]
    assert counts.tolist() == list(map(len, texts))
    unknown = next(chr(code) for code in codes if chr(code) not in places)
    with pytest.raises(UserError, match="at position 1 of the text"):
        tokenizer.encode_batch([characters[0], characters[-1] + unknown])


@pytest.mark.parametrize("space, joins", [("Ġ", True), ("▁", True), (" ", True), ("", False)])
def test_whether_tokens_hold_the_space_before_a_word(space, joins):
    words = ["[UNK]", "Ġ", "▁", "▁▁", " ", "a", f"{space}a"]
    library = Reference(models.WordLevel({word: id for id, word in enumerate(dict.fromkeys(words))}, "[UNK]"))
    library.add_special_tokens(["[UNK]", "▁a special token"])
    assert LibraryTokenizer(library.to_str().encode()).joins_space is joins
    assert BPETokenizer.train(["a a a"], 258 if joins else 257).joins_space is joins
