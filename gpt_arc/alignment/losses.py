"""Losses and estimators for learning from preferences and from rewards.

Shapes: N responses of up to R tokens. Per-token tensors are (N, R), and `mask` (N, R) is True for tokens, False for
padding. Losses are sums or per token; the caller divides by the number of tokens or prompts in all processes.
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
    """Returns the negative log-likelihood () of P pairs under the Bradley-Terry model: -log sigmoid(r_w - r_l), summed.

    `better` and `worse` (P,) index `scores` (N,). Each of `weights` (P,) is 1 / (pairs of the same prompt), which gives
    InstructGPT's loss (arXiv:2203.02155, equation 1) summed over prompts.
    """
    return -(F.logsigmoid(scores[better] - scores[worse]) * weights).sum()


def agreement(gaps: Tensor) -> Tensor:
    """Returns 1 where the gap is positive (the better response scores higher), 0 where it is negative, 0.5 where 0."""
    return (gaps.sign() + 1) / 2


def dpo_loss(log_ratios: Tensor, better: Tensor, worse: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Returns the DPO loss (), summed over pairs (arXiv:2305.18290, equation 7).

    `log_ratios` (N,) are log pi(response) - log pi_ref(response). It is the `ranking_loss` of the rewards
    beta * log_ratios.
    """
    return ranking_loss(beta * log_ratios, better, worse, weights)


def response_states(hidden: Tensor, prompt_lengths: Tensor, tokens: int) -> Tensor:
    """Selects from hidden states (N, T, C) the (N, R, C) that predict the R tokens after each prompt."""
    positions = prompt_lengths[:, None] - 1 + torch.arange(tokens, device=hidden.device)
    positions = positions.clamp(max=hidden.size(1) - 1)[..., None]
    return hidden.gather(1, positions.expand(-1, -1, hidden.size(2)))


def log_probabilities(model: GPT, states: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities of tokens (...) given hidden states (..., C), and entropies, both (...) float32.

    In nats, of the softmax of logits / temperature. To save memory, logits are computed for a chunk of states at a
    time and recomputed in the backward pass.
    """
    flat_states, flat_tokens = states.flatten(0, -2), tokens.flatten()
    rows = max(logits_at_once(states.device.type) // model.config.vocab_size, 1)

    def chunk(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logs = (model.logits(states).float() / temperature).log_softmax(-1)
        entropy = -(logs.detach().exp() * logs.detach()).sum(-1)
        return logs.gather(-1, tokens[:, None])[:, 0], entropy

    recompute = torch.is_grad_enabled() and len(flat_states) > rows
    chunks = [
        checkpoint(chunk, *inputs, use_reentrant=False) if recompute else chunk(*inputs)
        for inputs in zip(flat_states.split(rows), flat_tokens.split(rows))
    ]
    logs, entropies = (torch.cat(each).view(tokens.shape) for each in zip(*chunks))
    return logs, entropies


def kl_estimates(log_ratio: Tensor) -> dict[str, Tensor]:
    """Estimates KL(pi || pi_ref) from x = log pi - log pi_ref of tokens drawn from pi (joschu.net/blog/kl-approx.html).

    k1 = x is unbiased but can be negative; k3 = exp(-x) - 1 + x is unbiased and never negative.
    """
    return {"k1": log_ratio, "k3": torch.expm1(-log_ratio) + log_ratio}


def penalised_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Returns rewards (N, R): a KL penalty of -coefficient * log_ratio at each token, plus the score (N,) at the last.

    log_ratio is log pi - log pi_ref. As openai/lm-human-preferences train_policy.py:149-154.
    """
    lengths = mask.sum(1)
    last = torch.arange(mask.size(1), device=mask.device) == lengths[:, None] - 1
    return torch.where(mask, -coefficient * log_ratio, 0.0) + last * scores[:, None]


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Normalises values (N, R) to mean 0 and standard deviation 1 over the mask; padding becomes 0.

    Without `shift_mean`, divides by the root mean square instead. openai/lm-human-preferences (utils/core.py; its
    epsilon is kept) subtracts the mean, divides by the standard deviation and adds the mean back in that case. That
    gives every token a constant reward, which favours short or long responses where lengths differ, so the optimum is
    no longer pi_ref exp(r / beta). Its deviation is also 0 when all responses are one token with the same reward.
    """
    unpadded = values[mask]
    mean = unpadded.mean() if shift_mean else 0.0
    variance = (unpadded - mean).square().mean()
    return torch.where(mask, (values - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lambda_: float) -> tuple[Tensor, Tensor]:
    """Returns generalised advantage estimates (N, R) and the returns (N, R) that values learn (arXiv:1506.02438).

    `values` (N, R) belong to the states before each token; the state after the last token is worth 0.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    next_values = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values
    estimates = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.size(1) - 1, -1, -1):
        following = deltas[:, t] + gamma * lambda_ * following
        estimates[:, t] = following
    return torch.where(mask, estimates, 0.0), torch.where(mask, estimates + values, 0.0)


def policy_losses(logs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Returns PPO's clipped surrogate loss of each token, and whether clipping was active, both (N, R)."""
    ratio = (logs - old).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Returns the clipped value loss of each token, and whether clipping was active, both (N, R).

    The loss is half the larger squared error of the value and of the value clipped to within `clip` of the old one, as
    in openai/lm-human-preferences train_policy.py:343-347.
    """
    clipped_values = old + (values - old).clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (clipped_values - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def explained_variance(values: Sequence[float] | Tensor, returns: Sequence[float] | Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 is a constant's; nan if the returns are constant."""
    values, returns = torch.as_tensor(values).double(), torch.as_tensor(returns).double()
    variance = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / variance if variance > 0 else math.nan


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """Returns the KL coefficient after `episodes` more episodes of mean KL `kl`, moved to bring the KL to `target`.

    As openai/lm-human-preferences train_policy.py:120-124; Ziegler et al., arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * episodes / horizon)
