"""The losses of learning from preferences and rewards, against loops, closed forms and enumeration."""

import itertools
import math
import random

import pytest
import torch

from gpt_arc.alignment import losses as rl
from helpers import randomised
from model import GPT, GPTConfig


def mask_of(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def responses(seed=0, lengths=(5, 1, 3, 7, 2)):
    """Values per token (N, R), arbitrary where there is no token, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of(lengths)
    values = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    return torch.where(mask, values, 1e3), mask


# ---- preferences


@pytest.mark.parametrize(("gap", "loss"), [(3.5, 0.0298), (-2.0, 2.1269)])
def test_the_ranking_loss_matches_published_figures(gap, loss):
    actual = rl.ranking_loss(torch.tensor([1.0 + gap, 1.0]), torch.tensor([0]), torch.tensor([1]), torch.ones(1))
    assert actual.item() == pytest.approx(loss, abs=5e-5)


def test_a_ranking_s_loss_is_the_mean_over_its_pairs():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7, 5.0, 4.0])  # a ranking of four, a ranking of two
    pairs = [*itertools.combinations(range(4), 2), (4, 5)]
    weights = torch.tensor([1 / 6] * 6 + [1.0])
    expected = sum(-math.log(1 / (1 + math.exp(scores[j] - scores[i]))) for i, j in pairs[:6]) / math.comb(4, 2)
    expected += -math.log(1 / (1 + math.exp(scores[5] - scores[4])))
    better, worse = torch.tensor(pairs).T
    assert rl.ranking_loss(scores, better, worse, weights).item() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(rl.ranking_loss(1e4 * scores, worse, better, weights))


def test_direct_preference_optimisation_and_its_gradient():
    policy, reference = torch.tensor([-3.0, -5.0], requires_grad=True), torch.tensor([-4.0, -4.5])
    better, worse, beta = torch.tensor([0]), torch.tensor([1]), 0.3
    loss = rl.dpo_loss(policy - reference, better, worse, torch.ones(1), beta)
    margin = beta * ((-3.0 + 4.0) - (-5.0 + 4.5))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)))
    loss.backward()
    wrong = 1 / (1 + math.exp(margin))  # the weight of arXiv:2305.18290, section 4
    assert policy.grad.tolist() == pytest.approx([-beta * wrong, beta * wrong])


# ---- log-probabilities


def test_response_states_precede_each_token():
    hidden = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    states = rl.response_states(hidden, torch.tensor([2, 4]), 3)
    assert torch.equal(states[0], hidden[0, 1:4])
    assert torch.equal(states[1, :3], torch.stack([hidden[1, 3], hidden[1, 4], hidden[1, 5]]))
    assert torch.equal(rl.response_states(hidden, torch.tensor([5, 6]), 3)[1, 0], hidden[1, 5])


@pytest.mark.parametrize("settings", [{}, {"tied_head": False, "head_bias": True}])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_entropies_and_gradients(monkeypatch, settings, temperature):
    model = randomised(GPT(GPTConfig(16, 13, 1, 2, 8, **settings)))
    states, tokens = torch.randn(3, 5, 8), torch.randint(13, (3, 5))
    weights, expected = torch.randn(3, 5), torch.zeros(3, 5)
    ways = {}
    for at_once in (1 << 25, 4 * 13, 1):  # all rows at once, four, one
        monkeypatch.setattr(rl, "logits_at_once", lambda device, at_once=at_once: at_once)
        inputs = states.clone().requires_grad_(True)
        logs, entropies = rl.log_probabilities(model, inputs, tokens, temperature)
        model.zero_grad()
        (logs * weights).sum().backward()
        gradients = [inputs.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        ways[at_once] = [logs.detach(), entropies, *gradients]
        assert not entropies.requires_grad
    inputs = states.clone().requires_grad_(True)
    for i, j in itertools.product(range(3), range(5)):
        logits = model.logits(inputs[i, j]) / temperature
        p = logits.exp() / logits.exp().sum()
        expected[i, j] = p[tokens[i, j]].log()
        entropy = -sum(x * math.log(x) for x in p.tolist())
        assert ways[1][1][i, j].item() == pytest.approx(entropy, rel=1e-4)
    model.zero_grad()
    (expected * weights).sum().backward()
    reference = [inputs.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    for result in ways.values():
        torch.testing.assert_close(result[0], expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result[2:], reference, rtol=1e-4, atol=1e-5)


def test_kl_estimates_are_unbiased():
    p, q = (torch.randn(6, generator=torch.Generator().manual_seed(s)).double().softmax(0) for s in (1, 2))
    estimates = rl.kl_estimates(p.log() - q.log())
    kl = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    for name in ("k1", "k3"):
        assert (p * estimates[name]).sum().item() == pytest.approx(kl, rel=1e-12)
    assert (estimates["k3"] >= 0).all() and (estimates["k1"] < 0).any()


# ---- rewards and advantages


def test_the_score_is_at_the_last_token_and_every_token_pays_the_penalty():
    log_ratio, mask = responses()
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    actual = rl.penalised_rewards(scores, log_ratio, mask, 0.3)
    for i, length in enumerate((5, 1, 3, 7, 2)):
        for t in range(7):
            expected = -0.3 * log_ratio[i, t].item() if t < length else 0.0
            expected += scores[i].item() if t == length - 1 else 0.0
            assert actual[i, t].item() == pytest.approx(expected, abs=1e-12)


def test_whitening():
    values, mask = responses(3)
    values = torch.where(mask, 3 * values + 2, values)
    present = [v for row, m in zip(values.tolist(), mask.tolist()) for v, valid in zip(row, m) if valid]
    mean = sum(present) / len(present)
    variance = sum((v - mean) ** 2 for v in present) / len(present)
    expected = [(v - mean) / math.sqrt(variance + 1e-8) for v in present]
    actual = rl.whiten(values, mask)
    assert actual[mask].tolist() == pytest.approx(expected) and not actual[~mask].any()
    scale = math.sqrt(sum(v * v for v in present) / len(present))
    assert rl.whiten(values, mask, shift_mean=False)[mask].tolist() == pytest.approx([v / scale for v in present])


def test_whitening_rewards_keeps_sums_equal_across_lengths():
    """A reward of 1 per response keeps the same sum whatever its length: no constant is added per token."""
    draw = random.Random(0)
    lengths = [draw.randrange(1, 9) for _ in range(50)]
    mask = mask_of(lengths)
    rewards = rl.penalised_rewards(torch.ones(50), torch.zeros(mask.shape), mask, 0.1)
    sums = rl.whiten(rewards, mask, shift_mean=False).sum(1)
    torch.testing.assert_close(sums, sums[:1].expand(50))
    assert not rl.whiten(rewards, mask, shift_mean=False)[rewards == 0].any()
    alike = torch.full((4, 1), 0.5)  # one token each, all with the same reward
    assert rl.whiten(alike, alike > 0, shift_mean=False).flatten().tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(("gamma", "lambda_"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.0), (0.7, 0.5)])
def test_advantages_by_their_definition(gamma, lambda_):
    (rewards, mask), (values, _) = responses(1), responses(2)
    advantages, returns = rl.advantages(rewards, values, mask, gamma, lambda_)
    for i, length in enumerate((5, 1, 3, 7, 2)):
        value = [*values[i, :length].tolist(), 0.0]
        delta = [rewards[i, t].item() + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(7):
            expected = sum((gamma * lambda_) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[i, t].item() == pytest.approx(expected + (value[t] if t < length else 0), abs=1e-12)


# ---- proximal policy optimisation


def test_the_clipped_policy_loss():
    cases = [(math.log(r), a) for r in (0.5, 0.9, 1.0, 1.1, 1.5) for a in (-2.0, 3.0)]
    logs = torch.tensor([x for x, _ in cases], requires_grad=True)
    gains = torch.tensor([a for _, a in cases])
    losses, clipped = rl.policy_losses(logs + 0.3, torch.full((len(cases),), 0.3), gains, 0.2)
    losses.sum().backward()
    for i, (log_ratio, gain) in enumerate(cases):
        ratio = math.exp(log_ratio)
        assert losses[i].item() == pytest.approx(-min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain), rel=1e-5)
        outside = (ratio > 1.2 and gain > 0) or (ratio < 0.8 and gain < 0)
        assert clipped[i].item() == outside
        assert logs.grad[i].item() == pytest.approx(0.0 if outside else -ratio * gain, rel=1e-5)


def test_the_clipped_value_loss():
    for value, old, aim in itertools.product((-1.0, 0.1, 0.5, 2.0), (0.0, 0.4), (-0.5, 0.3, 3.0)):
        loss, clipped = rl.value_losses(*(torch.tensor([x]) for x in (value, old, aim)), 0.2)
        near = min(max(value, old - 0.2), old + 0.2)
        assert loss.item() == pytest.approx(0.5 * max((value - aim) ** 2, (near - aim) ** 2), rel=1e-5)
        assert clipped.item() == ((near - aim) ** 2 > (value - aim) ** 2 + 1e-6)


def test_explained_variance():
    returns = [1.0, 2.0, 3.0, 6.0]
    assert rl.explained_variance(returns, returns) == 1
    assert rl.explained_variance([5.0] * 4, returns) == pytest.approx(0)
    assert rl.explained_variance([r + 10 for r in returns], returns) == pytest.approx(1)
    assert rl.explained_variance([-r for r in returns], returns) == pytest.approx(1 - 4)
    assert math.isnan(rl.explained_variance([1.0, 2.0], [3.0, 3.0]))


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.00064), (60.0, 1.00128), (0.0, 0.99872), (5.4, 0.99936)]
)
def test_the_adaptive_coefficient(kl, factor):
    """clip(kl / 6 - 1, -.2, .2) * 64 / 10,000, by hand."""
    assert rl.adapted_kl_coefficient(0.15, kl, 6.0, 10_000, 64) == pytest.approx(0.15 * factor, rel=1e-9)
