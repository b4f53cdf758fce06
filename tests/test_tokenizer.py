"""Tokenizers against the `tokenizers` library reading the same files."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt_arc.errors import UserError
from gpt_arc.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, load_tokenizer

CORPUS = [
    "The cat sat on the mat, didn't it? " * 3,
    "1234 + 5678 = 6912\n\n  indented\ttext",
    "naïve Ünïcödé 漢字 🙂🙃",
] * 20
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A byte-level BPE that the `tokenizers` library trained: its folder, and the library's own tokenizer."""
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


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_bpe_encodes_as_the_tokenizers_library_and_comes_back(trained, text):
    folder, reference = trained
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode(text)
    assert tokens == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokens) == text


def test_saved_bpe_is_read_by_the_tokenizers_library(trained, tmp_path):
    folder, reference = trained
    load_tokenizer(folder).save(tmp_path)
    ours = Reference.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.get_vocab() == reference.get_vocab()
    for text in CORPUS:
        assert ours.encode(text).ids == reference.encode(text).ids
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


def test_gpt2_saves_and_comes_back_and_equals_the_tokenizers_library(gpt2, tmp_path):
    gpt2.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.ranks == gpt2.ranks and again.special == gpt2.special
    reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*CORPUS, " \t\n\r\u00a0x  y", "\u2028 I'll we've 'LL", "١٢٣ ½ ²", "a\u0301\u0300"]:
        assert again.encode(text) == gpt2.encode(text) == reference.encode(text).ids


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT.filter(bool))
def test_characters_equal_the_tokenizers_library_and_come_back(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("characters")
    tokenizer = CharTokenizer.from_text(text)
    tokenizer.save(folder)
    again = load_tokenizer(folder)
    assert again.characters == sorted(set(text))
    tokens = again.encode(text)
    assert tokens == Reference.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert again.decode(tokens) == text


def test_an_unknown_character_is_named_with_its_position():
    tokenizer = CharTokenizer.from_text("abc\n")
    for text, expected in (("abxc", r"'x' \(U\+0078\) at position 2"), ("€", r"'€' \(U\+20AC\) at position 0")):
        with pytest.raises(UserError, match=expected):
            tokenizer.encode(text)
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.start_token == tokenizer.encode("\n")[0]
    assert CharTokenizer.from_text("abc").start_token == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}', '{"model": 3, "added_tokens": []}'])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        load_tokenizer(tmp_path)


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}, "added_tokens": []}')
    with pytest.raises(UserError, match="of the kind Unigram"):
        load_tokenizer(tmp_path)
