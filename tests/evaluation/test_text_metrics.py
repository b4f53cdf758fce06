"""BLEU, ROUGE and sentence splitting against hand calculations and the libraries' corpus scores."""

import math
import statistics
import sys

import pytest
import sacrebleu

from gpt_arc.errors import UserError
from gpt_arc.evaluation.text_metrics import bleu, bleu_counts, first_sentences, rouge

PAIRS = [
    ("The cat sat on the mat.", "The cat sat on the mat."),
    ("A dog is here", "The dog is not here"),
    ("", "Nothing at all"),
    ("It's 3.5 degrees, isn't it?", "It's 3.5 degrees; is it not?"),
]


def test_bleu_equals_the_corpus_score():
    counts = [bleu_counts(*pair) for pair in PAIRS]
    texts, references = zip(*PAIRS)
    value, error = bleu(counts)
    assert 0.3 < value < 0.6 and value == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score / 100)
    leave_one_out = [bleu(counts[:i] + counts[i + 1 :])[0] for i in range(4)]
    assert error == pytest.approx(
        math.sqrt(9 / 4) * statistics.stdev(leave_one_out)
    )  # the jackknife sums 3/4 of the squares, stdev 1/3
    assert bleu(counts[:1]) == (pytest.approx(1), 0) and bleu(counts[2:3]) == (0, 0)


def test_bleu_by_hand():
    """5 of 6, 4 of 5, 3 of 4 and 2 of 3 n-grams match; 6 words against 7."""
    counts = bleu_counts("a b c d e x", "a b c d e f g")
    assert counts == [5, 4, 3, 2, 6, 5, 4, 3, 6, 7]
    expected = math.exp(1 - 7 / 6) * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert bleu([counts])[0] == pytest.approx(expected)


def test_rouge_by_hand():
    """The words the, cat(s), sit match: 3 of 4 and 3 of 5; pairs: 1 of 3 and 1 of 4. Lines are compared one by one."""
    scores = rouge([("the cats sit down", "the cat often sits there"), ("one two\nthree four", "three four\none two")])
    assert scores["ROUGE-1"] == pytest.approx([2 * 3 / 9, 1])
    assert scores["ROUGE-2"] == pytest.approx([2 * 1 / 7, 2 * 2 / 6])
    assert scores["ROUGE-L"] == pytest.approx([2 * 3 / 9, 1])


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        (" One. Two! Three? Four.", 3, "One.\nTwo!\nThree?"),
        ('He said "No." Then 3.5 more', 1, 'He said "No."'),
        ("a line\n\nanother one. And", 2, "a line\nanother one."),
        ("no end", 3, "no end"),
        ("", 2, ""),
        ("e.g.this (it is one.) Yes", 1, "e.g.this (it is one.)"),
    ],
)
def test_the_first_sentences(text, count, expected):
    assert first_sentences(text, count) == expected


@pytest.mark.parametrize(
    ("module", "call"), [("sacrebleu", bleu_counts), ("rouge_score", lambda a, b: rouge([(a, b)]))]
)
def test_a_missing_library_is_named(monkeypatch, module, call):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module.replace('_', '-')} is not installed: `pip install -e '.\[eval\]'`"):
        call("a", "a")
