"""The formulas of learning from preferences and rewards, each once.

Shapes: N responses of up to R tokens; tensors of tokens are (N, R), and `mask` tells which of them are there. Sums over
tokens are the caller's to divide, by how many there are in all processes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpt_arc.nn.head_loss import logits_at_once
from model import GPT


def ranking_loss(scores: Tensor, better: Tensor, worse: Tensor, weights: Tensor) -> Tensor:
    """Sum () of the negative log-likelihoods of pairs under Bradley and Terry's model, -log sigmoid(r_w - r_l).

    `better` and `worse` (P,) number the responses of each pair among `scores` (N,), and `weights` (P,) are 1 over the
    number of pairs of its prompt: InstructGPT's loss (arXiv:2203.02155, equation 1), summed over prompts.
    """
    return -(F.logsigmoid(scores[better] - scores[worse]) * weights).sum()


def dpo_loss(log_ratios: Tensor, better: Tensor, worse: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Sum () over pairs of the loss of direct preference optimisation (arXiv:2305.18290, equation 7).

    `log_ratios` (N,) are log pi(response) - log pi_ref(response): a `ranking_loss` whose reward is beta times these.
    """
    return ranking_loss(beta * log_ratios, better, worse, weights)


def response_states(hidden: Tensor, prompt_lengths: Tensor, tokens: int) -> Tensor:
    """The hidden states (N, R, C) from which R tokens after each prompt are predicted, of hidden states (N, T, C)."""
    places = prompt_lengths[:, None] - 1 + torch.arange(tokens, device=hidden.device)
    places = places.clamp(max=hidden.size(1) - 1)[..., None]
    return hidden.gather(1, places.expand(-1, -1, hidden.size(2)))


def log_probabilities(model: GPT, states: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of tokens (..., ) int64 that follow the hidden states (..., C), and the entropies there, both (...) float32.

    The distribution is the softmax of the logits over `temperature`, in nats. Logits exist for some states at a time
    only, and are computed anew in the backward pass.
    """
    flat, wanted = states.flatten(0, -2), tokens.flatten()
    rows = max(logits_at_once(states.device.type) // model.config.vocab_size, 1)

    def some(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logs = (model.logits(states).float() / temperature).log_softmax(-1)
        entropy = -(logs.detach().exp() * logs.detach()).sum(-1)
        return logs.gather(-1, tokens[:, None])[:, 0], entropy

    parts = []
    for part, own in zip(flat.split(rows), wanted.split(rows)):
        again = torch.is_grad_enabled() and len(flat) > rows
        parts.append(checkpoint(some, part, own, use_reentrant=False) if again else some(part, own))
    logs, entropies = (torch.cat(each).view(tokens.shape) for each in zip(*parts))
    return logs, entropies


def kl_estimates(log_ratio: Tensor) -> dict[str, Tensor]:
    """Estimates of KL(pi || pi_ref) from log pi - log pi_ref of tokens drawn from pi (joschu.net/blog/kl-approx.html).

    k1 is the log-ratio itself, unbiased and at times negative; k3, exp(-x) - 1 + x, is unbiased and never negative.
    """
    return {"k1": log_ratio, "k3": torch.expm1(-log_ratio) + log_ratio}


def penalised_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Rewards (N, R): -coefficient times log pi - log pi_ref at each token, and the score (N,) at the last one.

    As openai/lm-human-preferences train_policy.py:149-154.
    """
    lengths = mask.sum(1)
    last = torch.arange(mask.size(1), device=mask.device) == lengths[:, None] - 1
    return torch.where(mask, -coefficient * log_ratio, 0.0) + last * scores[:, None]


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Values (N, R) less their mean among those there, over their standard deviation; 0 elsewhere.

    Without `shift_mean` they are divided alone, by the root of their mean square. There openai/lm-human-preferences
    (utils/core.py; its epsilon is kept) takes the mean away, divides by the standard deviation and adds the mean again,
    which gives each token a constant reward: where responses differ in length that favours short or long ones, and the
    optimum is no longer pi_ref exp(r / beta). And that deviation is 0 where all responses are one token of one reward.
    """
    there = values[mask]
    mean = there.mean() if shift_mean else 0.0
    variance = (there - mean).square().mean()
    return torch.where(mask, (values - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lambda_: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (N, R) and the returns that values are to predict (arXiv:1506.02438).

    values (N, R) are of the states that each token is chosen in; after the last one there is nothing to come.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    following = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * following - values
    found = torch.zeros_like(rewards)
    carried = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.size(1) - 1, -1, -1):
        carried = deltas[:, t] + gamma * lambda_ * carried
        found[:, t] = carried
    return torch.where(mask, found, 0.0), torch.where(mask, found + values, 0.0)


def policy_losses(logs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss of each token, and where the clipped side counted: both (N, R)."""
    ratio = (logs - old).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the larger squared error of a value and of it kept within `clip` of the old one; where the latter counted.

    As openai/lm-human-preferences train_policy.py:343-347.
    """
    near = old + (values - old).clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def explained_variance(values: Sequence[float], returns: Sequence[float]) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant; nan for constant returns."""
    values, returns = torch.as_tensor(values).double(), torch.as_tensor(returns).double()
    variance = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / variance if variance > 0 else math.nan


def adapted(coefficient: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The KL coefficient after so many episodes of a mean KL of `kl` nats each, on its way to `target`.

    As openai/lm-human-preferences train_policy.py:120-124; Ziegler et al., arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * episodes / horizon)
