"""Sampling against exact distributions; generation, search and speculation against full forward passes."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_arc.decoding.beam import beam_search
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.probabilities import draw, filtered_probabilities, row_generators, sampling_probabilities
from gpt_arc.decoding.settings import Sampling
from gpt_arc.decoding.speculative import Acceptance, speculative
from gpt_arc.errors import UserError
from gpt_arc.settings import build
from model import GPT, GPTConfig
from stub_models import counting_model

LOGITS = [2.0, 1.5, 1.0, 1.0, 0.2, -0.3, -1.0, -4.0]
GREEDY = Sampling(temperature=0)


def exact(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, present=()):
    """The filters in numpy, one token at a time."""
    logits = [float(x) for x in logits]
    for i in set(present):
        logits[i] = logits[i] / repetition_penalty if logits[i] > 0 else logits[i] * repetition_penalty
    if temperature == 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    weights = {i: float(np.exp((x - max(logits)) / temperature)) for i, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: -weights[i])
    if top_k is not None:
        ranked = [i for i in ranked if weights[i] >= weights[ranked[min(top_k, len(ranked)) - 1]]]
    total = sum(weights[i] for i in ranked)
    if top_p is not None:
        selected, reached = [], 0.0
        for i in ranked:
            if reached >= top_p:
                break
            selected.append(i)
            reached += weights[i] / total
        ranked = selected
    if min_p is not None:
        ranked = [i for i in ranked if weights[i] >= min_p * weights[ranked[0]]]
    total = sum(weights[i] for i in ranked)
    return np.array([weights[i] / total if i in ranked else 0.0 for i in range(len(logits))])


def fits(counts, expected):
    """Whether counts fit the expected probabilities (Pearson's test); tokens of probability 0 must not occur."""
    from scipy.stats import chisquare

    counts, expected = np.asarray(counts), np.asarray(expected)
    support = expected > 0
    assert (counts[~support] == 0).all()
    return support.sum() == 1 or chisquare(counts[support], counts.sum() * expected[support]).pvalue > 1e-4


FILTERS = [
    {}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 3}, {"top_k": 2}, {"top_k": 100}, {"top_p": 0.7},
    {"top_p": 0.05}, {"top_p": 1.0}, {"temperature": 0.7, "top_k": 5}, {"top_k": 4, "top_p": 0.6},
    {"temperature": 1.5, "top_p": 0.9}, {"temperature": 0.9, "top_k": 5, "top_p": 0.8},
    {"min_p": 0.3}, {"min_p": 1.0}, {"min_p": 0.01}, {"temperature": 2.0, "min_p": 0.3}, {"top_p": 0.6, "min_p": 0.5},
    {"temperature": 1.2, "top_k": 6, "top_p": 0.95, "min_p": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_100_000_draws_follow_the_filtered_softmax(filters):
    expected = exact(LOGITS, **filters)
    probabilities = filtered_probabilities(torch.tensor(LOGITS), **filters)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(probabilities, 100_000, replacement=True, generator=generator)
    assert fits(np.bincount(drawn, minlength=len(LOGITS)), expected)


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=12),
    temperature=st.floats(0.2, 3.0),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.05, 0.95),
    min_p=st.none() | st.floats(0.01, 1),
)
def test_filters_match_a_loop_over_tokens(logits, temperature, top_k, top_p, min_p):
    actual = filtered_probabilities(torch.tensor(logits), temperature, top_k, top_p, min_p).double().numpy()
    expected = exact(logits, temperature, top_k, top_p, min_p)
    if top_p is not None:  # a sum within rounding of p may be on either side of it
        ranked = np.sort(exact(logits, temperature, top_k))[::-1].cumsum()
        if np.abs(ranked - top_p).min() < 1e-5:
            return
        actual, expected = np.sort(actual), np.sort(expected)  # which of two equal tokens crosses p is undefined
    if min_p is not None:
        ratios = exact(logits, temperature)
        if np.abs(ratios / ratios.max() - min_p).min() < 1e-5 and min_p < 1:
            return
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=16), min_size=2, max_size=9),
    present=st.sets(st.integers(0, 8)),
    penalty=st.floats(0.3, 3),
    temperature=st.floats(0.2, 3.0),
    top_k=st.none() | st.integers(1, 12),
)
def test_the_repetition_penalty_comes_before_temperature_and_filters(logits, present, penalty, temperature, top_k):
    present = [i for i in present if i < len(logits)]
    mask = torch.tensor([i in present for i in range(len(logits))])
    sampling = Sampling(temperature, top_k, repetition_penalty=penalty)
    actual = sampling_probabilities(sampling, torch.tensor(logits), mask)
    expected = exact(logits, temperature, None, repetition_penalty=penalty, present=present)
    if top_k is not None:
        kth = np.sort(expected)[::-1][min(top_k, len(logits)) - 1]
        if (np.abs(expected - kth) < 1e-5).sum() > 1:
            return
        expected = expected * (expected >= kth)
        expected /= expected.sum()
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_the_repetition_penalty_in_closed_form():
    present = torch.tensor([True, True, False, False])
    actual = sampling_probabilities(Sampling(repetition_penalty=2.0), torch.tensor([2.0, -1.0, 0.5, -3.0]), present)
    weights = np.exp([1.0, -2.0, 0.5, -3.0])
    np.testing.assert_allclose(actual, weights / weights.sum(), atol=1e-6)


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 20.0])
@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 0.999, 1.0])
def test_top_p_of_a_large_vocabulary_equals_the_full_sort(spread, top_p):
    logits = spread * torch.randn(3, 50_000, generator=torch.Generator().manual_seed(2))
    logits[1] = 0.0
    logits[1, 40_000:40_100] = 9.0
    actual = filtered_probabilities(logits, top_p=top_p).double()
    ordered, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(-1)
    for row in range(3):
        least = int((reached[row] < top_p - 1e-5).sum()) + 1
        most = int((reached[row] < top_p + 1e-5).sum()) + 1
        size = int((actual[row] > 0).sum())
        assert least <= size <= most
        np.testing.assert_allclose(
            actual[row].sort(descending=True).values[:size],
            ordered[row, :size] / reached[row, size - 1],
            rtol=2e-4,
            atol=1e-30,
        )
        if spread > 1 and row != 1:
            assert set(actual[row].nonzero()[:, 0].tolist()) == set(order[row, :size].tolist())


def test_extremes_are_greedy_in_the_limit():
    for extreme in ({"temperature": 1e-40}, {"top_p": 1e-300}, {"temperature": 1e-3, "top_p": 1e-9}, {"min_p": 1.0}):
        assert filtered_probabilities(torch.tensor(LOGITS), **extreme).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_temperature_zero_is_greedy():
    probabilities = filtered_probabilities(torch.tensor([LOGITS, LOGITS[::-1]]), temperature=0)
    assert probabilities.argmax(-1).tolist() == [0, 7] and probabilities.max(-1).values.tolist() == [1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": 0},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"min_p": 0.0}, {"min_p": 1.1}, {"min_p": -0.1},
        {"repetition_penalty": 0.0}, {"repetition_penalty": -1.0}, {"repetition_penalty": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        build(Sampling, settings)


# ---- drawing


@pytest.mark.parametrize("probabilities", [[0.2, 0.3, 0.5], [0.0, 0.9, 0.0, 0.09, 0.01, 0.0], [0.125] * 8], ids=str)
def test_draws_follow_the_probabilities(probabilities):
    source = torch.Generator().manual_seed(3)
    drawn = draw(torch.tensor(probabilities).expand(30_000, -1), [source] * 30_000).tolist()
    assert fits(np.bincount(drawn, minlength=len(probabilities)), probabilities)


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1 - 2**-53, 3)])
def test_extreme_random_numbers_draw_no_token_of_probability_0(monkeypatch, uniform, expected):
    monkeypatch.setattr(torch, "rand", lambda *size, **settings: torch.full(size, uniform, dtype=torch.float64))
    probabilities = torch.tensor([[0.0, 0.1, 0.6, 0.3, 0.0, 0.0]])
    assert draw(probabilities, [None]).tolist() == [expected]


def test_each_seed_and_row_has_its_own_generator():
    draws = [torch.rand(1, generator=source).item() for seed in (0, 1) for source in row_generators(seed, range(50))]
    assert len(set(draws)) == 100
    repeated = [torch.rand(1, generator=source).item() for source in row_generators(1, [7, 3])]
    assert repeated == [draws[57], draws[53]]


# ---- models checked by full forward passes

VARIANTS = {
    "gpt2": dict(seed=2),
    "gpt1": dict(seed=0, norm_position="post", init="gpt1"),
    "banded": dict(seed=4, attention_band=3, positions="sinusoidal"),
    "n-grams": dict(seed=3, ngrams=3, ngram_rows=30, positions="rotary"),
    "modern": dict(norm="rmsnorm", positions="rotary", n_kv_head=2, activation="swiglu", qk_norm=True, bias=False),
}


def small_gpt(seed=0, vocab=13, context=12, n_layer=2, **settings):
    """A random model whose predictions depend on position."""
    model = GPT(GPTConfig(context, vocab, n_layer, 4, 16, tied_head=False, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm.weight" in name else (1.5 if "embed" in name else 0.4) * noise)
    return model.eval()


def window(model, text, prompt_length):
    """The tokens that the model attends to before the next one; see decoding/decoder.py on texts beyond the context."""
    context = model.config.block_size
    visible = list(text[:prompt_length][-context:])
    for token in text[prompt_length:]:
        visible = [*(visible[max(context // 4, 1) :] if len(visible) == context else visible), token]
    return visible


@torch.no_grad()
def next_logits(model, prompt, tokens):
    """The logits after a prompt and tokens, by a full forward pass over the window."""
    return model(torch.tensor([window(model, [*prompt, *tokens], len(prompt))]))[0, -1].float()


def replay(model, prompt, count, sampling=GREEDY, source=None):
    """One row's expected tokens and log-probabilities, by the loop over tokens and one random number per step."""
    tokens, logs = [], []
    for _ in range(count):
        logits = next_logits(model, prompt, tokens)
        probabilities = exact(logits, **dataclasses.asdict(sampling), present=[*prompt, *tokens])
        uniform = 0.0 if source is None else torch.rand(1, generator=source, dtype=torch.float64).item()
        tokens.append(int(np.searchsorted(probabilities.cumsum(), uniform * probabilities.sum(), side="right")))
        logs.append(logits.double().log_softmax(-1)[tokens[-1]].item())
    return tokens, logs


def log_probabilities_of(model, prompt, tokens):
    logits = [next_logits(model, prompt, tokens[:i]).double().log_softmax(-1) for i in range(len(tokens))]
    return [log[token].item() for log, token in zip(logits, tokens)]


def gathered(steps, rows):
    """Tokens and log-probabilities by row."""
    tokens, logs = [[] for _ in range(rows)], [[] for _ in range(rows)]
    for step in steps:
        for row, token, log in zip(*step):
            tokens[row].append(token)
            logs[row].append(log)
    return tokens, logs


def watched(model):
    """The model, and a list that collects the shapes of its inputs."""
    shapes, hidden = [], model.hidden

    def watching(tokens, **settings):
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, **settings)

    model.hidden = watching
    return model, shapes


RAGGED = [
    [3, 4, 5],
    [7],
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    [0] * 7,
    [8, 10, 2, 11, *[5, 6] * 7],
    [3, 4, 5],
    [2, 9, 2, 9, 4],
]


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_greedy_is_the_argmax_of_the_full_forward(settings):
    model = small_gpt(**settings)
    tokens, logs = gathered(generate(model, RAGGED, 20, GREEDY), len(RAGGED))
    for prompt, row, log in zip(RAGGED, tokens, logs):
        expected, expected_log = replay(model, prompt, 20)
        assert row == expected
        np.testing.assert_allclose(log, expected_log, atol=1e-4)
    assert len({tuple(row) for row in tokens}) == 6 and len(set(tokens[0])) > 3  # the outputs vary


SAMPLINGS = [
    Sampling(), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(1.5, min_p=0.1),
    Sampling(1.2, repetition_penalty=1.8), Sampling(0, repetition_penalty=3.0),
    Sampling(1.4, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=0.6),
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sampled_rows_follow_their_generators_and_the_filters(sampling):
    model = small_gpt(seed=1)
    sources = row_generators(5, range(len(RAGGED)))
    tokens, logs = gathered(generate(model, RAGGED, 20, sampling, generators=sources), len(RAGGED))
    for row, source in enumerate(row_generators(5, range(len(RAGGED)))):
        expected, expected_log = replay(model, RAGGED[row], 20, sampling, source)
        assert tokens[row] == expected
        np.testing.assert_allclose(logs[row], expected_log, atol=1e-4)


def test_rows_are_independent_of_each_other():
    model, rows = small_gpt(seed=2), range(len(RAGGED))
    sampling = Sampling(1.3, repetition_penalty=1.2)
    steps = generate(model, RAGGED, 20, sampling, generators=row_generators(9, rows))
    together, logs = gathered(steps, len(RAGGED))
    for row, prompt in enumerate(RAGGED):
        (single,), (log,) = gathered(generate(model, [prompt], 20, sampling, generators=row_generators(9, [row])), 1)
        assert single == together[row]
        np.testing.assert_allclose(log, logs[row], atol=1e-4)
    counts = [0] * len(RAGGED)

    def stopped(row, token):
        counts[row] += 1
        return counts[row] == 3 * row + 1

    steps = generate(model, RAGGED, 20, sampling, generators=row_generators(9, rows), stopped=stopped)
    shorter, _ = gathered(steps, len(RAGGED))
    assert shorter == [tokens[: 3 * row + 1] for row, tokens in enumerate(together)]


def test_equal_prompts_are_read_once_and_finished_rows_cost_nothing():
    model, shapes = watched(small_gpt())
    prompts = [[1, 2, 3, 4, 5]] * 3 + [[6, 7, 8, 9, 10]] * 2
    counts = [0] * 5

    def stopped(row, token):
        counts[row] += 1
        return counts[row] == row + 1

    steps = list(generate(model, prompts, 7, Sampling(1.5), stopped=stopped))
    assert shapes == [(2, 5), (4, 1), (3, 1), (2, 1), (1, 1)]
    assert [step.rows for step in steps] == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [2, 3, 4], [3, 4], [4]]


def test_steps_are_lazy():
    model, shapes = watched(small_gpt())
    steps = generate(model, [[1, 2]], 5, GREEDY)
    assert not shapes
    for count in range(1, 6):
        next(steps)
        assert len(shapes) == count
    assert next(steps, None) is None and len(shapes) == 5


def test_no_new_tokens_and_no_prompt():
    model, shapes = watched(small_gpt())
    assert list(generate(model, [[1]], 0)) == [] and shapes == []
    with pytest.raises(ValueError, match="start_token"):
        next(generate(model, [[1], []], 1))


def test_prompts_may_be_a_tensor_and_a_decoder_may_be_reused():
    model = small_gpt()
    decoder, prompts = Decoder(model), torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = list(generate(model, prompts.tolist(), 8))
    assert list(generate(model, prompts, 8)) == expected
    next(generate(decoder, [[5] * 12] * 3, 8))
    assert gathered(generate(decoder, prompts, 8), 2)[0] == gathered(expected, 2)[0]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=1), Sampling(top_p=0.5), Sampling(min_p=0.5), Sampling()])
def test_continuations_of_a_known_model(sampling):
    model, shapes = watched(counting_model(10, 4).eval())
    tokens, logs = gathered(generate(model, torch.tensor([[3, 4, 5, 6, 7], [0, 0, 0, 0, 1]]), 6, sampling), 2)
    assert tokens == [[8, 9, 0, 1, 2, 3], [2, 3, 4, 5, 6, 7]]
    assert max(length for _, length in shapes) == 4  # never more than the context
    assert np.abs(logs).max() < 1e-6


def test_only_the_generators_decide():
    model = small_gpt(vocab=30)

    def sampled(seed):
        torch.rand(seed)  # the global generator must not matter
        return gathered(generate(model, [[0], [0]], 20, generators=row_generators(seed, [0, 1])), 2)[0]

    assert sampled(1) == sampled(1) != sampled(2) and sampled(1)[0] != sampled(1)[1]
    assert list(generate(model, [[0], [0]], 9)) == list(
        generate(model, [[0], [0]], 9, generators=row_generators(0, [0, 1]))
    )


def joint(logits_after, vocab, prompt, sampling, length=3):
    """The exact probability of every continuation of this length, in the order of `itertools.product`."""
    probabilities = {(): 1.0}
    for _ in range(length):
        longer = {}
        for tokens, probability in probabilities.items():
            logits = logits_after([*prompt, *tokens])
            following = exact(logits, **dataclasses.asdict(sampling), present=[*prompt, *tokens])
            longer |= {(*tokens, token): probability * following[token] for token in range(vocab)}
        probabilities = longer
    return np.array(list(probabilities.values()))


def counted(continuations, vocab):
    """The count of each continuation, in the order of `joint`."""
    numbers = [int("".join(map(str, tokens)), vocab) for tokens in continuations]
    return np.bincount(numbers, minlength=vocab ** len(continuations[0]))


JOINT = [Sampling(2.0), Sampling(1.5, top_k=2), Sampling(1.5, repetition_penalty=1.6), Sampling(2.0, top_p=0.8)]


@pytest.mark.parametrize("sampling", JOINT, ids=str)
def test_continuations_have_their_joint_probabilities(sampling):
    model = small_gpt(seed=3, vocab=3, context=5)
    sources = row_generators(11, range(5_000))
    tokens, _ = gathered(generate(model, [[1, 2]] * 5_000, 3, sampling, generators=sources), 5_000)
    expected = joint(lambda text: next_logits(model, text[:2], text[2:]), 3, [1, 2], sampling)
    assert fits(counted(tokens, 3), expected)


# ---- beam search


@torch.no_grad()
def every_continuation(model, prompt, length, stop_tokens):
    """All continuations and the sums of their log-probabilities."""
    continuations = torch.cartesian_prod(*[torch.arange(model.config.vocab_size)] * length)
    texts = torch.cat([torch.tensor([prompt]).expand(len(continuations), -1), continuations], dim=1)
    logs = model(texts).double().log_softmax(-1)[:, len(prompt) - 1 : -1].gather(-1, continuations[..., None])[..., 0]
    totals = {}
    for tokens, values in zip(continuations.tolist(), logs.tolist()):
        end = next((i + 1 for i, token in enumerate(tokens) if token in stop_tokens), length)
        totals[tuple(tokens[:end])] = sum(values[:end])
    return totals


@pytest.mark.parametrize("stop_tokens", [[], [2], [0, 1]], ids=str)
@pytest.mark.parametrize(("vocab", "length"), [(3, 4), (4, 3)])
def test_the_widest_beams_equal_brute_force(vocab, length, stop_tokens):
    prompt, beams = [1, 0, 2], vocab ** (length - 1)
    for seed in range(4):
        model = small_gpt(seed, vocab, context=9)
        sums = every_continuation(model, prompt, length, stop_tokens)
        for length_penalty in (0.0, 0.5, 1.0, 2.0):
            scores = {tokens: total / len(tokens) ** length_penalty for tokens, total in sums.items()}
            expected = sorted(scores, key=scores.get, reverse=True)[:beams]
            results = beam_search(model, prompt, length, beams, length_penalty, stop_tokens)
            assert [tuple(result.tokens) for result in results] == expected
            np.testing.assert_allclose([result.score for result in results], [scores[t] for t in expected], atol=1e-4)
            log_sums = [sum(result.log_probabilities) for result in results]
            np.testing.assert_allclose(log_sums, [sums[tokens] for tokens in expected], atol=1e-4)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_narrow_beams_return_the_model_s_log_probabilities(length_penalty):
    model = small_gpt(seed=6)
    for prompt, beams, stop_tokens in (([3], 4, [1]), ([1, 2, 3], 3, [4, 5, 6]), ([7] * 12, 5, []), ([2, 4], 30, [0])):
        results = beam_search(model, prompt, 9, beams, length_penalty, stop_tokens)
        assert len(results) == beams == len({tuple(result.tokens) for result in results})
        assert [result.score for result in results] == sorted((result.score for result in results), reverse=True)
        for result in results:
            logs = log_probabilities_of(model, prompt, result.tokens)
            np.testing.assert_allclose(result.log_probabilities, logs, atol=1e-4)
            assert result.score == pytest.approx(sum(logs) / len(logs) ** length_penalty, abs=1e-4)
            assert not set(result.tokens[:-1]) & set(stop_tokens)
            assert len(result.tokens) == 9 or result.tokens[-1] in stop_tokens


def slow_beam_search(model, prompt, length, beams, length_penalty, stop_tokens):
    """Beam search by definition, without early stopping: (score, tokens), best first."""
    alive, finished = [(0.0, [])], []
    for step in range(1, length + 1):
        longer = []
        for total, tokens in alive:
            logs = next_logits(model, prompt, tokens).double().log_softmax(-1).tolist()
            longer += [(total + log, [*tokens, token]) for token, log in enumerate(logs)]
        finished += [(s / step**length_penalty, t) for s, t in longer if t[-1] in stop_tokens or step == length]
        alive = sorted((beam for beam in longer if beam[1][-1] not in stop_tokens), reverse=True)[:beams]
    return sorted(finished, reverse=True)[:beams]


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 3.0])
def test_stopping_early_loses_nothing(length_penalty):
    for seed, beams in itertools.product(range(6), (1, 2, 3)):
        model = small_gpt(seed, vocab=6)
        expected = slow_beam_search(model, [seed % 6], 8, beams, length_penalty, [1, 5])
        results = beam_search(model, [seed % 6], 8, beams, length_penalty, [1, 5])
        assert [result.tokens for result in results] == [tokens for _, tokens in expected]


def test_the_search_ends_when_no_better_result_is_possible():
    model, shapes = watched(counting_model(10, 16).eval())
    best = beam_search(model, [3], 12, 1, 1.0, stop_tokens=[6])[0]
    assert best.tokens == [4, 5, 6] and len(shapes) < 12


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_one_beam_is_greedy(settings):
    model = small_gpt(**settings)
    for prompt in RAGGED[:5]:  # all that differ in their kind
        (result,) = beam_search(model, prompt, 15, 1)
        (tokens,), (logs,) = gathered(generate(model, [prompt], 15, GREEDY), 1)
        assert result.tokens == tokens
        np.testing.assert_allclose(result.log_probabilities, logs, atol=1e-4)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
def test_beams_equal_transformers(tmp_path, length_penalty):
    import transformers

    from gpt_arc.weights.directory import load_model

    config = transformers.GPT2Config(
        vocab_size=23, n_positions=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(7)
    reference = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)[0].eval()
    for prompt in ([1, 2, 3], [9], [4, 22, 4, 22]):
        outputs = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            max_new_tokens=10, num_beams=5, num_return_sequences=5, length_penalty=length_penalty, eos_token_id=None,
            pad_token_id=0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        results = beam_search(model, prompt, 10, 5, length_penalty)
        assert [result.tokens for result in results] == outputs.sequences[:, len(prompt) :].tolist()
        np.testing.assert_allclose([result.score for result in results], outputs.sequences_scores, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [((0, 2), "max_new_tokens = 0"), ((3, 0), "num_beams = 0"), ((3, 2, -1.0), "length_penalty = -1.0"),
     ((3, 2, float("nan")), "length_penalty = nan")],
)  # fmt: skip
def test_impossible_searches_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        beam_search(small_gpt(), [1], *settings)


# ---- speculation


@pytest.mark.parametrize(
    ("name", "draft_tokens"),
    [("gpt2", 1), ("gpt2", 3), ("gpt2", 20), ("gpt1", 4), ("banded", 7), ("modern", 2)],
)
def test_greedy_speculation_is_greedy_with_any_draft_and_beyond_the_context(name, draft_tokens):
    model = small_gpt(**VARIANTS[name])
    drafts = small_gpt(seed=8, n_layer=1), small_gpt(seed=9, context=5, n_layer=1), copy.deepcopy(model)
    for prompt in ([7], [3, 4, 5], list(range(12))):
        tokens, logs = replay(model, prompt, 16)
        for draft in drafts:
            steps = list(speculative(model, draft, prompt, 16, GREEDY, draft_tokens=draft_tokens))
            assert [step.rows for step in steps] == [[0]] * 16
            assert [step.tokens for step in steps] == [[token] for token in tokens]
            np.testing.assert_allclose([step.log_probabilities[0] for step in steps], logs, atol=1e-4)


@pytest.mark.parametrize("prompt", [list(range(13)), [5, 6] * 9])
def test_speculation_cuts_a_long_prompt_as_generation_does(prompt):
    model, draft = small_gpt(), small_gpt(seed=8)
    steps = speculative(model, draft, prompt, 10, GREEDY)
    tokens, logs = replay(model, prompt, 10)
    actual, actual_logs = gathered(steps, 1)
    assert actual == [tokens]
    np.testing.assert_allclose(actual_logs[0], logs, atol=1e-4)


def test_a_draft_may_have_a_context_of_one_token():
    model = counting_model(13, 12).eval()
    for draft in (small_gpt(seed=8, context=1), counting_model(13, 1).eval()):
        steps = speculative(model, draft, [1, 2, 3], 20, GREEDY, draft_tokens=3)
        assert gathered(steps, 1)[0] == [[i % 13 for i in range(4, 24)]]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0, repetition_penalty=3.0)], ids=str)
def test_an_equal_draft_is_always_accepted_and_saves_forward_passes(sampling):
    model, shapes = watched(small_gpt(context=40))
    acceptance = Acceptance()
    steps = speculative(model, small_gpt(context=40), [1, 2, 3], 12, sampling, draft_tokens=3, acceptance=acceptance)
    assert len(list(steps)) == 12
    assert shapes == [(1, 2), (1, 4), (1, 4), (1, 4)]
    assert (acceptance.proposed, acceptance.accepted, acceptance.rate) == (9, 9, 1.0)
    assert math.isnan(Acceptance().rate)


def test_the_draft_reads_its_own_tokens_once():
    draft, shapes = watched(small_gpt(context=40))
    list(speculative(small_gpt(context=40), draft, [1, 2, 3], 12, GREEDY, draft_tokens=3))
    assert shapes == [(1, 2), (1, 1), (1, 1), (1, 1), (1, 2), (1, 1), (1, 1), (1, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize("draft_tokens", [1, 2, 5])
def test_acceptance_is_counted(draft_tokens):
    model = small_gpt(context=40)
    draft = small_gpt(context=40)
    with torch.no_grad():
        draft.head.weight += 0.4 * torch.randn(draft.head.weight.shape, generator=torch.Generator().manual_seed(0))
    acceptance, prompt = Acceptance(proposed=100, accepted=50), [3, 1]
    tokens = gathered(
        speculative(model, draft, prompt, 25, GREEDY, draft_tokens=draft_tokens, acceptance=acceptance), 1
    )[0][0]
    done = proposed = accepted = 0
    while done < 25:
        count = min(draft_tokens, 25 - done - 1)
        proposal = replay(draft, prompt + tokens[:done], count)[0] if count else []
        agreeing = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(proposal, tokens[done:])))
        done, proposed, accepted = done + agreeing + 1, proposed + count, accepted + agreeing
    assert 0 < accepted < proposed
    assert (acceptance.proposed, acceptance.accepted) == (100 + proposed, 50 + accepted)


def test_a_stop_ends_speculation_within_a_proposal():
    model, calls = small_gpt(), []

    def stopped(row, token):
        calls.append((row, token))
        return len(calls) == 6

    steps = speculative(model, copy.deepcopy(model), [1, 2], 30, GREEDY, draft_tokens=4, stopped=stopped)
    tokens = replay(model, [1, 2], 6)[0]
    assert gathered(steps, 1)[0] == [tokens] and calls == [(0, token) for token in tokens]
    assert list(speculative(model, copy.deepcopy(model), [1, 2], 0)) == []


class Table(Decoder):
    """Logits from a table indexed by the last two tokens: fast enough to draw thousands of texts."""

    def __init__(self, vocab, seed, spread, context=64):
        super().__init__(GPT(GPTConfig(context, vocab, 1, 1, 2)))
        generator = torch.Generator().manual_seed(seed)
        self.table = spread * torch.randn(vocab, vocab, vocab, generator=generator)

    def read(self, prompts, room=None):
        self.sequences = [list(prompt) for prompt in prompts]

    def clear(self, rows, room=None):
        self.sequences = [[] for _ in range(rows)]

    def extend(self, chunks):
        before = len(self.sequences[0])
        self.sequences[0] += chunks[0]
        return torch.stack([self.after(self.sequences[0][: i + 1]) for i in range(before, len(self.sequences[0]))])[
            None
        ]

    def after(self, text):
        return self.table[text[-2] if len(text) > 1 else 0, text[-1]]


SPECULATED = [
    pytest.param(Sampling(), 1, marks=pytest.mark.slow),
    (Sampling(1.3, repetition_penalty=2.0), 2),
    pytest.param(Sampling(1.6), 2, marks=pytest.mark.slow),
    pytest.param(Sampling(), 4, marks=pytest.mark.slow),
    pytest.param(Sampling(top_k=2), 2, marks=pytest.mark.slow),
    pytest.param(Sampling(0.8, top_p=0.9, repetition_penalty=0.7), 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sampling", "draft_tokens"), SPECULATED, ids=str)
def test_speculated_continuations_have_the_model_s_probabilities(sampling, draft_tokens):
    model, draft = Table(3, 20, 1.0), Table(3, 21, 1.0)
    source, continuations = torch.Generator().manual_seed(draft_tokens), []
    for _ in range(2_500):
        steps = speculative(model, draft, [2], 3, sampling, draft_tokens=draft_tokens, generator=source)
        continuations.append([step.tokens[0] for step in steps])
    assert fits(counted(continuations, 3), joint(model.after, 3, [2], sampling))


@pytest.mark.slow
def test_speculated_continuations_of_gpts_have_the_model_s_probabilities():
    model, draft = small_gpt(3, vocab=3, context=4, n_layer=1), small_gpt(5, vocab=3, context=3, n_layer=1)
    readers, source, continuations = (Decoder(model), Decoder(draft)), torch.Generator().manual_seed(4), []
    for _ in range(600):
        steps = speculative(*readers, [1, 2, 0], 3, Sampling(2.0), draft_tokens=2, generator=source)
        continuations.append([step.tokens[0] for step in steps])
    expected = joint(lambda text: next_logits(model, text[:3], text[3:]), 3, [1, 2, 0], Sampling(2.0))
    assert fits(counted(continuations, 3), expected)


def test_impossible_speculation_is_refused():
    with pytest.raises(UserError, match="the draft has 12 tokens and the model 13"):
        next(speculative(small_gpt(), small_gpt(vocab=12), [1], 5))
    with pytest.raises(UserError, match="draft_tokens = 0"):
        next(speculative(small_gpt(), small_gpt(), [1], 5, draft_tokens=0))
    dynamic = small_gpt(positions="rotary", rotary_scaling="dynamic", rotary_factor=2.0, rotary_context=4)
    with pytest.raises(UserError, match="dynamic.*leave the draft out"):
        next(speculative(dynamic, small_gpt(), [1], 5))


def test_extreme_temperatures_give_distributions():
    assert filtered_probabilities(torch.tensor(LOGITS), temperature=1e-50).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="repetition_penalty"):
        Sampling(repetition_penalty=1e-300)


def test_a_repeated_stop_token_counts_once():
    model = GPT(GPTConfig(8, 4, 1, 1, 8)).eval()
    assert beam_search(model, [1], 3, 4, stop_tokens=[2, 2]) == beam_search(model, [1], 3, 4, stop_tokens=[2])
