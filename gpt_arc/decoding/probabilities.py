"""From logits to a sampled token: temperature, top-k, top-p, min-p and penalties."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from gpt_arc.decoding.settings import Sampling
from gpt_arc.device import send
from gpt_arc.errors import check_finite


def sampling_probabilities(sampling: Sampling, logits: Tensor, seen: Tensor | None = None) -> Tensor:
    """The distribution to draw from, (..., V) float32; `seen` (..., V) marks the tokens that occurred before."""
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return filtered_probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


def tokens_seen(sampling: Sampling, sequences: Sequence[Sequence[int]], logits: Tensor) -> Tensor | None:
    """Marks the tokens of each sequence, (B, V) like the logits; None if no setting needs them."""
    if sampling.repetition_penalty == 1:
        return None
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    for row, sequence in enumerate(sequences):
        seen[row, send([token for token in sequence if token >= 0], logits.device)] = True  # others are images
    return seen


def filtered_probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Returns probabilities (..., V) float32: temperature, then top-k, top-p and min-p, see `Sampling`."""
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if top_k is not None:  # temperature doesn't change the order, so it may come later
        smallest = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    scores, temperature = logits, max(temperature, 1e-37)  # in float32 a smaller divisor counts as 0
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0, however low the temperature
    probabilities = logits.exp()  # not softmax, whose sum is off by up to 4e-5 on some CPUs
    probabilities /= probabilities.sum(-1, keepdim=True)
    if top_p is not None:
        size = probabilities.size(-1)
        most = min(size, 1024) if probabilities.device.type == "cpu" else size  # a GPU sorts faster than it answers
        order = scores.topk(most, dim=-1).indices  # probabilities may be equal where scores aren't
        if most < size and (probabilities.gather(-1, order).sum(-1) < top_p).any():  # rare, so few sorts of everything
            order = scores.sort(dim=-1, descending=True, stable=True).indices
        ordered = probabilities.gather(-1, order)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # more likely tokens already reach p
        beyond[..., 0] = False
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered.masked_fill(beyond, 0.0))
    if min_p is not None:
        least = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def row_generators(seed: int, rows: Iterable[int]) -> list[torch.Generator]:
    """Returns a generator for each row number, so that a row's draws don't depend on other rows."""
    states = (np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)[0] for row in rows)
    return [torch.Generator().manual_seed(int(state) >> 1) for state in states]


def draw(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws a token (B,) for each row of probabilities (B, V), with one uniform number from that row's generator."""
    uniform = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    probabilities = probabilities.cpu() if probabilities.device.type == "mps" else probabilities  # mps has no float64
    cumulative = probabilities.double().cumsum(-1)
    reached = cumulative[:, -1:] * send(uniform, cumulative.device)
    return torch.searchsorted(cumulative, reached, right=True)[:, 0].clamp(max=probabilities.size(-1) - 1)


def with_log_probabilities(logits: Tensor, tokens: Tensor) -> tuple[list[int], list[float]]:
    """Reads one token (B,) for each row of logits (B, V), and its log-probability. Raises NotFinite.

    Both come from the device in one copy, the only time in a decoding step that the host waits for it.
    """
    logs = (logits.gather(-1, tokens.to(logits.device)[:, None]) - logits.logsumexp(-1, keepdim=True))[:, 0]
    numbers, values = torch.stack((tokens.to(logs), logs)).tolist()  # float32 is exact up to 2^24
    check_finite(values)
    return [int(number) for number in numbers], values
