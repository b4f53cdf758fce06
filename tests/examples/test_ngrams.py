"""Kneser-Ney n-grams against the formula written out with dictionaries."""

import math
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

import ngrams
from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.errors import UserError
from ngrams import KneserNey

VOCABULARY = 6


def kneser_ney(tokens, order):
    """Returns p(token, context) by Chen and Goodman's definition, for contexts of order - 1 tokens."""
    grams = {n: Counter(zip(*(tokens[i:] for i in range(n)))) for n in range(1, order + 1)}
    counts = {order: grams[order]}
    for n in range(1, order):
        counts[n] = Counter(gram[1:] for gram in grams[n + 1])
    by_context = {n: defaultdict(list) for n in counts}
    for n, table in counts.items():
        for gram, count in table.items():
            by_context[n][gram[:-1]].append(count)

    def p(token, context, n):
        if n == 0:
            return 1 / VOCABULARY
        context = context[len(context) - n + 1 :]
        lower = p(token, context[1:] if n > 1 else (), n - 1)
        following = by_context[n][context]
        if not following:
            return lower
        once, twice = (sum(count == k for count in counts[n].values()) for k in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.0
        kept = max(counts[n][(*context, token)] - discount, 0) if (*context, token) in counts[n] else 0
        return (kept + discount * len(following) * lower) / sum(following)

    return lambda token, context: p(token, context, order)


def test_probabilities_are_those_of_the_definition():
    generator = np.random.default_rng(0)
    tokens = generator.choice(VOCABULARY - 1, size=200, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    targets = generator.integers(0, VOCABULARY, 50)  # with a token that was never seen
    by_order = KneserNey(tokens, VOCABULARY, 4).probabilities(targets)
    assert len(by_order) == 4
    for order, probabilities in enumerate(by_order, 1):
        p = kneser_ney(tokens.tolist(), order)
        for i in range(order - 1, len(targets)):
            expected = p(int(targets[i]), tuple(targets[i - order + 1 : i].tolist()))
            assert probabilities[i] == pytest.approx(expected, rel=1e-12), (order, i)


def test_probabilities_sum_to_one():
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 300)
    model = KneserNey(tokens, VOCABULARY, 3)
    for context in ((0, 1), (5, 5), (2, 4)):
        last = [model.probabilities(np.array([*context, token]))[-1][-1] for token in range(VOCABULARY)]
        assert sum(last) == pytest.approx(1, abs=1e-12)


def test_a_prepared_dataset_has_a_floor(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ngrams.py", "sums", "--order=3"])
    ngrams.main()
    shown = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in shown[-3:]]
    corpus = open_corpus([Source("sums", 1.0)])
    assert losses[1] < losses[0] < math.log(corpus.tokenizer.vocab_size)


def test_missing_datasets_and_short_ones_are_named(workplace):
    with pytest.raises(UserError, match="there is no prepared dataset nowhere: prepare/text.py makes one"):
        ngrams.losses(ngrams.Options("nowhere"))
    with pytest.raises(UserError, match="fewer tokens than order = 5 needs"):
        ngrams.losses(ngrams.Options("sums", val_tokens=3))
