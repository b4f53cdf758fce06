"""From logits to tokens: pure functions that filter and draw, and the loop that appends."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gpt_arc.errors import UserError
from model import GPT


def filtered_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution to draw from, (..., V) float32: softmax after temperature, then top-k, then top-p.

    temperature 0 puts everything on the most likely token. top_k keeps the k most likely tokens and all that tie with
    the last of them. top_p (arXiv:1904.09751) keeps the most likely tokens up to and including the one that makes
    their sum reach p.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if top_k is not None:  # temperature keeps the order, so it may as well come after
        smallest = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0, however low the temperature
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # those more likely reach p already
        beyond[..., 0] = False
        ordered = ordered.masked_fill(beyond, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises UserError for settings that no distribution follows from."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature = {temperature} must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k = {top_k} must be at least 1, or left out to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p} must lie in (0, 1], or be left out to keep every token")


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue `tokens` (B, T) int64, T >= 1, yielding each next column (B,) as it is drawn.

    The model sees the last `block_size` tokens. `generator` is the source of chance; the model should be in eval mode.
    """
    check_sampling(temperature, top_k, top_p)
    for _ in range(max_new_tokens):
        tokens = tokens[:, -model.config.block_size :]
        probabilities = filtered_probabilities(model(tokens)[:, -1], temperature, top_k, top_p)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        yield drawn[:, 0]
        tokens = torch.cat((tokens, drawn), dim=1)
