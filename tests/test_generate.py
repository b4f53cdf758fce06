"""Sampling against exact distributions, and generation with a model whose continuations are known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_arc.errors import UserError
from gpt_arc.generate import filtered_probabilities, generate
from model import GPT, GPTConfig

LOGITS = [2.0, 1.5, 1.0, 1.0, 0.2, -0.3, -1.0, -4.0]


def exact(logits, temperature=1.0, top_k=None, top_p=None):
    """The filters again, one token at a time."""
    weights = {i: float(np.exp(x / temperature)) for i, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: -weights[i])
    if top_k is not None:
        ranked = [i for i in ranked if weights[i] >= weights[ranked[min(top_k, len(ranked)) - 1]]]
    total = sum(weights[i] for i in ranked)
    if top_p is not None:
        kept, reached = [], 0.0
        for i in ranked:
            if reached >= top_p:
                break
            kept.append(i)
            reached += weights[i] / total
        ranked = kept
    total = sum(weights[i] for i in ranked)
    return np.array([weights[i] / total if i in ranked else 0.0 for i in range(len(logits))])


FILTERS = [
    {}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 3}, {"top_k": 2}, {"top_k": 100}, {"top_p": 0.7},
    {"top_p": 0.05}, {"top_p": 1.0}, {"temperature": 0.7, "top_k": 5}, {"top_k": 4, "top_p": 0.6},
    {"temperature": 1.5, "top_p": 0.9}, {"temperature": 0.9, "top_k": 5, "top_p": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_100_000_draws_follow_the_filtered_softmax(filters):
    from scipy.stats import chisquare

    expected = exact(LOGITS, **filters)
    probabilities = filtered_probabilities(torch.tensor(LOGITS), **filters)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(probabilities, 100_000, replacement=True, generator=generator)
    counts = np.bincount(drawn, minlength=len(LOGITS))
    assert (counts[expected == 0] == 0).all()
    support = expected > 0
    if support.sum() > 1:
        assert chisquare(counts[support], 100_000 * expected[support]).pvalue > 1e-4


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=12),
    temperature=st.floats(0.2, 3.0),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.05, 0.95),
)
def test_filters_equal_a_loop_over_tokens(logits, temperature, top_k, top_p):
    ours = filtered_probabilities(torch.tensor(logits), temperature, top_k, top_p).double().numpy()
    expected = exact(logits, temperature, top_k, top_p)
    if top_p is not None:  # a sum within rounding of p may fall on either side
        ranked = np.sort(exact(logits, temperature, top_k))[::-1].cumsum()
        if np.abs(ranked - top_p).min() < 1e-5:
            return
        ours, expected = np.sort(ours), np.sort(expected)  # which of two equals crosses p is not defined
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_extremes_are_greedy_in_the_limit():
    for extreme in ({"temperature": 1e-40}, {"top_p": 1e-300}, {"temperature": 1e-3, "top_p": 1e-9}):
        assert filtered_probabilities(torch.tensor(LOGITS), **extreme).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_temperature_zero_is_greedy():
    probabilities = filtered_probabilities(torch.tensor([LOGITS, LOGITS[::-1]]), temperature=0)
    assert probabilities.argmax(-1).tolist() == [0, 7] and probabilities.max(-1).values.tolist() == [1, 1]


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        next(generate(GPT(GPTConfig(4, 5, 1, 1, 8)), torch.zeros(1, 1, dtype=torch.int64), 1, **settings))


class NextIsPreviousPlusOne(torch.nn.Module):
    """A model that knows what comes next, and how much context it was shown."""

    def __init__(self, vocab, block_size):
        super().__init__()
        self.config = GPTConfig(block_size, vocab, 1, 1, 8)
        self.longest = 0

    def forward(self, tokens):
        self.longest = max(self.longest, tokens.size(1))
        return 100.0 * torch.nn.functional.one_hot((tokens + 1) % self.config.vocab_size, self.config.vocab_size)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0.5}, {}])
def test_continuations_of_a_known_model(settings):
    model = NextIsPreviousPlusOne(vocab=10, block_size=4)
    columns = list(generate(model, torch.tensor([[3, 4, 5, 6, 7], [0, 0, 0, 0, 1]]), 6, **settings))
    assert torch.stack(columns, dim=1).tolist() == [[8, 9, 0, 1, 2, 3], [2, 3, 4, 5, 6, 7]]
    assert model.longest == 4  # never more than the context


def test_the_generator_alone_decides():
    model = GPT(GPTConfig(8, 30, 1, 2, 16)).eval()
    start = torch.zeros(2, 1, dtype=torch.int64)

    def draw(seed):
        torch.rand(seed)  # the global generator is no part of it
        columns = generate(model, start, 20, generator=torch.Generator().manual_seed(seed))
        return torch.stack(list(columns)).tolist()

    assert draw(1) == draw(1) != draw(2)
