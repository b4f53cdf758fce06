"""Scores against one forward pass per request, exact probabilities, and the harness's windows."""

import math
import random

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gpt_arc.evaluation.score import Request, Score, rolling_windows, score_continuations, truncated
from helpers import randomised, without_float64
from model import GPT, GPTConfig
from stub_models import bigrams

SMALL = dict(block_size=24, vocab_size=37, n_layer=2, n_head=4, n_embd=32)
MODERN = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, n_kv_head=2, qk_norm=True)
ARCHITECTURES = {
    "gpt2": {},
    "gpt1": dict(norm_position="post", activation="gelu"),
    "modern": MODERN,
    "banded": dict(attention_band=5),
    "banded-modern": dict(**MODERN, attention_band=3),
    "sinusoidal": dict(positions="sinusoidal"),
    "bigrams": dict(ngrams=2, ngram_rows=40),
    "n-grams": dict(**MODERN, ngrams=4, ngram_rows=40),
    "untied": dict(tied_head=False, head_bias=True),
    "alibi": dict(positions="alibi", attention_band=5, n_kv_head=2),
    "lstm": dict(mixer="lstm"),
    "dynamic": dict(positions="rotary", rotary_scaling="dynamic", rotary_factor=3.0, rotary_context=6),
}


def make(**settings):
    return randomised(GPT(GPTConfig(**SMALL | settings)))


@pytest.fixture(scope="module")
def model():
    return make()


@torch.no_grad()
def slow(model, request):
    """The score by one pass over all tokens that fit into the context."""
    size = len(request.continuation)
    visible = [*request.context, *request.continuation][-(model.config.block_size + 1) :]
    logits = model(torch.tensor([visible[:-1]]))[0, -size:]
    targets = torch.tensor(visible[-size:])
    logs = logits.double().log_softmax(-1)[torch.arange(size), targets]
    return Score(logs.sum().item(), bool((logits.argmax(-1) == targets).all()), size)


@torch.no_grad()
def likeliest(model, context, length):
    """Returns the greedy continuation."""
    tokens = list(context)
    for _ in range(length):
        tokens.append(model(torch.tensor([tokens[-model.config.block_size :]]))[0, -1].argmax().item())
    return tokens[len(context) :]


def some_requests(model, seed=0, count=8):
    """Returns contexts of 1 token to twice block_size, with one or several options of 1 to block_size tokens."""
    rng, block = random.Random(seed), model.config.block_size
    requests = []

    def some(length):
        return [rng.randrange(model.config.vocab_size) for _ in range(length)]

    for number in range(count):
        context = some(rng.choice([1, 2, 7, block - 3, block, block + 1, 2 * block]))
        sizes = [rng.choice([1, 1, 2, 3, 6, block]) for _ in range(rng.choice([1, 1, 2, 4]))]
        requests += [Request(context, some(size)) for size in sizes]
        if number % 3 == 0:
            greedy = likeliest(model, context[-block:], min(3, block + 1 - min(len(context), block)))
            requests.append(Request(context, greedy))
    rng.shuffle(requests)
    return requests


def assert_close(scores, expected, tolerance=1e-5):
    """Asserts equality within an absolute and a relative `tolerance`."""
    assert [score[1:] for score in scores] == [score[1:] for score in expected]
    logs = [score.log_probability for score in scores]
    assert logs == pytest.approx([score.log_probability for score in expected], abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_one_pass_for_each_request_in_any_batches(name):
    model = make(**ARCHITECTURES[name])
    requests = some_requests(model)
    expected = [slow(model, request) for request in requests]
    assert any(score.is_greedy for score in expected) and not all(score.is_greedy for score in expected)
    for batch_tokens in (1, 60, 10**6):
        assert_close(score_continuations(model, requests, batch_tokens), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_in_16_bits_are_close(name, dtype):
    model = GPT(GPTConfig(**SMALL | ARCHITECTURES[name])).eval()  # as initialised
    requests = some_requests(model, count=6)
    scores, expected = score_continuations(model, requests, 100, dtype), [slow(model, request) for request in requests]
    for score, right in zip(scores, expected):
        assert score.log_probability == pytest.approx(right.log_probability, abs=0.02 * right.tokens)


def test_a_model_with_16_bit_weights_is_scored():
    model = GPT(GPTConfig(**SMALL)).eval().bfloat16()
    requests = some_requests(model, count=6)
    for score, request in zip(score_continuations(model, requests, 100), requests):
        assert score.log_probability == pytest.approx(slow(model, request).log_probability, abs=0.02 * score.tokens)


@pytest.mark.parametrize("seed", range(3))
def test_random_mixtures_of_requests(model, seed):
    requests = some_requests(model, 100 + seed)
    requests += random.Random(seed).sample(requests, 5)  # some occur twice
    expected = [slow(model, request) for request in requests]
    for batch_tokens in (1, 200):
        assert_close(score_continuations(model, iter(requests), batch_tokens), expected)


def test_scores_are_added_up_on_the_cpu(model, monkeypatch):
    requests = some_requests(model)
    expected = list(score_continuations(model, requests))
    without_float64(monkeypatch)
    assert list(score_continuations(model, requests)) == expected


def test_no_requests_give_no_scores(model):
    assert score_continuations(model, []) == []


def test_equal_requests_get_equal_scores_in_order(model):
    pair, single = Request([1, 2, 3], [4, 5]), Request((1, 2, 3), (6,))
    scores = score_continuations(model, [pair, single, pair, single, pair])
    assert scores[0] == scores[2] == scores[4] and scores[1] == scores[3] and scores[0] != scores[1]
    assert_close(scores[:2], [slow(model, pair), slow(model, single)])


def test_a_long_context_is_cut_at_the_start(model):
    block = model.config.block_size
    context = [n % 37 for n in range(2 * block)]
    assert truncated(Request(context, [1]), block) == tuple(context[-block:])
    assert truncated(Request(context, [1, 2, 3]), block) == tuple(context[-block + 2 :])
    assert truncated(Request(context, [1] * block), block) == (context[-1],)
    assert truncated(Request(context[:5], [1]), block) == tuple(context[:5])
    for size in (1, 2, block - 1, block):
        request = Request(context, [n % 5 for n in range(size)])
        short = Request(truncated(request, block), request.continuation)
        assert len(short.context) + size == block + 1
        assert score_continuations(model, [request]) == score_continuations(model, [short])
        assert_close(score_continuations(model, [request]), [slow(model, short)])


@pytest.mark.parametrize("context, continuation", [([1], [1] * 25), ([], [1]), ([1], [])])
def test_bad_requests_are_refused(model, context, continuation):
    with pytest.raises(ValueError, match="exceeds the context of 24|needs at least one token"):
        score_continuations(model, [Request([1], [2]), Request(context, continuation)])


def count_tokens(model, monkeypatch):
    """Returns a list to which every call of `model.hidden` appends its shape (rows, tokens), padding included."""
    calls, hidden = [], model.hidden

    def counted(tokens, *args, **kwargs):
        calls.append(tuple(tokens.shape))
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", counted)
    return calls


def test_a_shared_context_is_read_once(model, monkeypatch):
    calls = count_tokens(model, monkeypatch)
    requests = [Request(list(range(16)), [option, 1, 2, 3]) for option in range(5)]
    score_continuations(model, requests)
    assert calls == [(1, 16), (5, 3)]
    calls.clear()
    score_continuations(model, [Request(request.context, request.continuation[:1]) for request in requests])
    assert calls == [(1, 16)]
    calls.clear()
    score_continuations(model, [Request(request.context, request.continuation) for request in requests[:1]])
    assert calls == [(1, 19)]


def test_a_batch_is_bounded_even_if_all_requests_share_a_context(model, monkeypatch):
    """As with empty contexts, or texts that begin after the same token."""
    calls = count_tokens(model, monkeypatch)
    requests = [Request([0], [n % 37] * (1 + n % 12)) for n in range(100)]
    scores = score_continuations(model, requests, batch_tokens=60)
    assert max(rows * length for rows, length in calls) <= 60
    assert sum(rows * length for rows, length in calls) < 1.3 * sum(len(request.continuation) for request in requests)
    assert_close(scores, [slow(model, request) for request in requests])


def test_little_is_padding_when_lengths_differ(monkeypatch):
    model = make(block_size=128, n_layer=1, n_head=1, n_embd=4)
    calls, rng = count_tokens(model, monkeypatch), random.Random(0)
    requests, needed = [], 0
    for _ in range(400):
        context = [rng.randrange(37) for _ in range(rng.randint(60, 100))]
        options = [[rng.randrange(37)] * rng.randint(5, 20) for _ in range(4)]
        requests += [Request(context, option) for option in options]
        needed += len(context) + sum(len(option) - 1 for option in options)
    score_continuations(model, requests)
    assert max(rows * length for rows, length in calls) <= 8192
    assert needed < sum(rows * length for rows, length in calls) < 1.12 * needed


# P(next token | token): halving, a tie of the first three, near certainty, uniform
BIGRAMS = torch.tensor(
    [
        [1 / 2, 1 / 4, 1 / 8, 1 / 8],
        [1 / 3 - 1e-3, 1 / 3 - 1e-3, 1 / 3 - 1e-3, 3e-3],
        [2**-11, 2**-11, 1 - 3 * 2**-11, 2**-11],
        [1 / 4, 1 / 4, 1 / 4, 1 / 4],
    ],
    dtype=torch.float64,
)


@pytest.fixture(scope="module")
def bigram_model():
    return bigrams(BIGRAMS, block_size=8)


def chance(before, tokens):
    """The log-probability by BIGRAMS of tokens after the token `before`."""
    return sum(BIGRAMS[a, b].log().item() for a, b in zip([before, *tokens], tokens))


def test_exact_probabilities(bigram_model):
    requests = [Request([3, 0], [0, 1, 3]), Request([3, 0], [2]), Request([1], [3, 2, 2]), Request([2] * 20, [2] * 8)]
    scores = score_continuations(bigram_model, requests)
    assert scores[0].log_probability == pytest.approx(math.log(1 / 2 * 1 / 4 * (3e-3)), abs=1e-6)
    assert scores[1].log_probability == pytest.approx(math.log(1 / 8), abs=1e-6)
    assert scores[2].log_probability == pytest.approx(math.log(3e-3 * 1 / 4 * (1 - 3 * 2**-11)), abs=1e-6)
    assert scores[3].log_probability == pytest.approx(8 * math.log(1 - 3 * 2**-11), abs=1e-6)
    assert [score.tokens for score in scores] == [3, 1, 3, 8]


def test_greedy_means_the_likeliest_and_the_first_of_equals(bigram_model):
    greedy = {(0, 0): True, (0, 1): False, (1, 0): True, (1, 1): False, (1, 2): False, (2, 2): True, (3, 0): True}
    greedy |= {(3, 1): False, (3, 2): False, (3, 3): False}
    for batch_tokens in (1, 1000):
        scores = score_continuations(bigram_model, [Request([a], [b]) for a, b in greedy], batch_tokens)
        assert [score.is_greedy for score in scores] == list(greedy.values())
    longer = [Request([2], [2, 2, 2]), Request([2], [2, 2, 1]), Request([2], [1, 0, 0]), Request([3], [0, 0, 0])]
    assert [score.is_greedy for score in score_continuations(bigram_model, longer)] == [True, False, False, True]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 8])
def test_windows_score_each_token_once_with_full_context(block):
    for length in range(3 * block + 3):
        tokens = [100 + place for place in range(length)]
        for stride in (None, *range(1, block + 1)):
            windows = list(rolling_windows(tokens, 7, block, stride))
            assert [token for window in windows for token in window.continuation] == tokens
            for number, (context, continuation) in enumerate(windows):
                end = tokens.index(continuation[-1]) + 1
                assert len(continuation) <= (block if number == 0 else stride or block)
                together = [*context, *continuation]
                assert together == ([7, *tokens[:end]] if number == 0 else tokens[end - block - 1 : end])
                assert truncated(Request(context, continuation), block) == tuple(context)


@pytest.mark.parametrize("block", [1, 2, 5, 8])
def test_windows_equal_the_harness_ones(block):
    for length in range(4 * block + 2):
        tokens = list(range(length))
        expected = [make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, 99, block, 1)]
        assert [tuple(map(list, window)) for window in rolling_windows(tokens, 99, block)] == expected


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_beyond_the_context_is_refused(stride):
    with pytest.raises(ValueError, match="between 1 and the context"):
        list(rolling_windows([1, 2], 0, 8, stride))


@pytest.mark.parametrize("stride", [None, 1, 3, 8])
@pytest.mark.parametrize("length", [1, 8, 9, 50])
def test_perplexity_of_bigrams_depends_on_one_token_of_context(bigram_model, stride, length):
    tokens = torch.randint(4, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    scores = score_continuations(bigram_model, rolling_windows(tokens, 3, 8, stride), batch_tokens=20)
    assert sum(score.tokens for score in scores) == length
    perplexity = math.exp(-sum(score.log_probability for score in scores) / length)
    assert perplexity == pytest.approx(math.exp(-chance(3, tokens) / length), rel=1e-6)
