"""The likeliest word against a search over all words, on models with known probabilities."""

import itertools
import math

import pytest
import torch

from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from gpt_arc.errors import UserError
from gpt_arc.evaluation.word_search import STOP_WORDS, WordTokens, length_batches, likeliest_words
from stub_models import bigrams


class Pieces(Tokenizer):
    """A tokenizer whose tokens are these texts; encoding takes the longest match each time."""

    end_of_text = None

    def __init__(self, *pieces):
        self.pieces, self.vocab_size = pieces, len(pieces)

    def encode(self, text):
        if not text:
            return []
        longest = max((piece for piece in self.pieces if piece and text.startswith(piece)), key=len)
        return [self.pieces.index(longest), *self.encode(text[len(longest) :])]

    def decode(self, tokens):
        return "".join(self.pieces[token] for token in tokens)

    def files(self):
        return {}


PIECES = Pieces(".", " the", "atre", " dog", "s", " don", "'t", "a", " a", "\n", "\ufffd", "")


def table_of(chances):
    """Returns the transition probabilities (from, to); the rest of each row goes to the full stop."""
    table = torch.full((PIECES.vocab_size,) * 2, 1e-6, dtype=torch.float64)
    for previous, row in chances.items():
        for following, chance in row.items():
            table[PIECES.pieces.index(previous), PIECES.pieces.index(following)] = chance
    table[:, 0] += 1 - table.sum(1)
    return table


def right_words(chances, words, excluded=STOP_WORDS, before="."):
    model = bigrams(table_of(chances))
    pairs = [(PIECES.encode(before), PIECES.encode(word)) for word in words]
    return [word for word, right in zip(words, likeliest_words(WordTokens(PIECES), model, pairs, excluded)) if right]


WORDS = [" the", " theatre", " dog", " dogs", " don", " don't", " a"]


@pytest.mark.parametrize(
    ("chances", "right"),
    [
        # the: 0.5 * 0.3, a stop word; theatre: 0.5 * 0.7; dog: 0.3 * 0.9
        ({".": {" the": 0.5, " dog": 0.3}, " the": {"atre": 0.7}, " dog": {"s": 0.1}}, " theatre"),
        # theatre: 0.5 * 0.4; dog: 0.3 * 0.9
        ({".": {" the": 0.5, " dog": 0.3}, " the": {"atre": 0.4}, " dog": {"s": 0.1}}, " dog"),
        # dog: 0.3 * 0.2; dogs: 0.3 * 0.8; theatre: 0.5 * 0.4
        ({".": {" the": 0.5, " dog": 0.3}, " the": {"atre": 0.4}, " dog": {"s": 0.8}}, " dogs"),
        # don't, its beginning don, the and a are stop words: dog with 0.05 is left
        ({".": {" don": 0.5, " the": 0.2, " a": 0.2, " dog": 0.05}, " don": {"'t": 0.9}}, " dog"),
        # part of a character ends a word: dog 0.2; dogs 0.1
        ({".": {" dog": 0.3}, " dog": {"\ufffd": 0.6, "s": 0.3}}, " dog"),
        # a token without a space continues the word before, so it is not a word
        ({".": {"s": 0.5, "a": 0.3, " dog": 0.1}}, " dog"),
    ],
)
def test_the_likeliest_word_that_is_not_a_stop_word(chances, right):
    assert right_words(chances, WORDS) == [right]


def test_without_stop_words_the_likeliest_word_is_right():
    chances = {".": {" don": 0.5, " the": 0.3}, " don": {"'t": 0.7}}
    assert right_words(chances, WORDS, ()) == [" don't"]
    assert right_words(chances, WORDS, {"don't"}) == [" the"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("before", ["b", " "])
def test_the_search_equals_a_search_over_all_words(seed, before):
    """All words of up to 7 letters under random transition probabilities; longer words are too unlikely to matter."""
    tokenizer = CharTokenizer(" .;abc")
    table = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    table[:, :3] += 0.4  # words end
    table /= table.sum(1, keepdim=True)
    rows = [dict(zip(tokenizer.characters, row)) for row in table.tolist()]
    chances_after = dict(zip(tokenizer.characters, rows))

    def chance(text, start=before):
        ends = sum(chances_after[text[-1]][end] for end in tokenizer.characters[:3])
        return math.prod(chances_after[a][b] for a, b in zip(start + text, text)) * ends

    space = " " if before == "b" else ""
    words = [space + "".join(part) for size in range(1, 8) for part in itertools.product("abc", repeat=size)]
    excluded = {"a", "b", "c", "ab", "ba"} if seed else {"c"}
    chances = {word: chance(word) for word in words if word.strip() not in excluded}
    ordered = sorted(chances, key=chances.get, reverse=True)
    answers = [*ordered[:20], f"{space}a", f"{space}c"]
    assert max(chances[word] for word in ordered if len(word.strip()) == 7) < chances[ordered[19]] / 4
    pairs = [(tokenizer.encode(before), tokenizer.encode(word)) for word in answers]
    model = bigrams(table, 64)
    for batch_tokens in (1, 1000):
        right = likeliest_words(WordTokens(tokenizer), model, pairs, excluded, batch_tokens)
        assert right == [word == ordered[0] for word in answers]


def test_gpt2_s_tokens_are_classified():
    try:
        tokenizer = BPETokenizer.gpt2()
    except UserError as error:
        pytest.skip(str(error))
    vocabulary = WordTokens(tokenizer)
    kinds = {name: set(getattr(vocabulary, name).tolist()) for name in ("bare", "spaced", "more")}
    number = {
        text: tokenizer.encode(text)[0] for text in (" the", "the", "'t", "'", ".", " ", "\n", " ...", " 12", '"')
    }
    assert {text for text, token in number.items() if token in kinds["spaced"]} == {" the", " ", " 12"}
    assert {text for text, token in number.items() if token in kinds["bare"]} == {"the"}
    assert {text for text, token in number.items() if token in kinds["more"]} == {"the", "'t"}
    assert {text for text, token in number.items() if vocabulary.ends[token]} == number.keys() - {"the", "'t"}
    assert vocabulary.ends[tokenizer.end_of_text]


def test_tokens_without_their_spaces_are_refused():
    class Spaceless(Pieces):
        def decode(self, tokens):
            return " ".join(self.pieces[token].strip() for token in tokens)

    with pytest.raises(UserError, match="stop_word_filter separates words by the spaces in their tokens"):
        WordTokens(Spaceless("a", " a", "."))


def test_batches_are_bounded_in_tokens():
    lengths = [3, 9, 1, 4, 4, 20, 2]
    batches = list(length_batches(lengths, 12))
    assert sorted(i for batch in batches for i in batch) == list(range(7)) and batches[0] == [5]
    assert all(len(batch) * max(lengths[i] for i in batch) <= 12 for batch in batches[1:]) and len(batches) == 4
