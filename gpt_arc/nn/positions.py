"""Positions for contexts longer than the trained one: rotary positions that stretch, and ALiBi's biases.

Shapes: B batch, T time, S keys, H query heads, D head size.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_arc.nn.functional import frequencies, waves
from gpt_arc.nn.names import Stretch

if TYPE_CHECKING:
    from gpt_arc.model_config import GPTConfig

FAST_TURNS = {"yarn": 32.0, "llama3": 4.0}  # the defaults of `RotaryScaling.fast`


class RotaryScaling(NamedTuple):
    """How rotary positions stretch from a trained `context` to `factor` times its length, with transformers' meanings.

    linear: all frequencies over the factor (arXiv:2306.15595). ntk: a larger base, which leaves the highest frequency
    as it is and divides the lowest. dynamic: ntk whose factor follows the length of the text. yarn and llama3: the
    frequencies with more than `fast` turns over the context stay, those with fewer than `slow` are divided, and those
    between are mixed, by yarn (arXiv:2309.00071) evenly over features, by llama3 (arXiv:2407.21783) over turns.
    """

    kind: Stretch
    factor: float
    context: int
    fast: float
    slow: float
    attention_factor: float  # multiplies rotated queries and keys

    def waves(self, positions: Tensor, lengths: Tensor | None, width: int, base: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines (..., T, D / 2) of positions (T,) or (B, T) for heads of `width` D.

        `lengths` (B,): see `text_lengths`.
        """
        texts = text_lengths(positions, lengths) if self.kind == "dynamic" else None
        cosines, sines = waves(positions, self.frequencies(texts, width, base, positions.device))
        return cosines * self.attention_factor, sines * self.attention_factor

    def frequencies(self, lengths: Tensor | None, width: int, base: float, device: torch.device) -> Tensor:
        """Radians per token (D / 2,); for dynamic (..., D / 2), by the `lengths` (...) of the tokens' texts."""
        factor: float | Tensor = self.factor
        if lengths is not None:
            factor = (factor * lengths / self.context - (factor - 1)).clamp(min=1)[..., None]
        if self.kind in ("ntk", "dynamic"):
            return frequencies(width, base * factor ** (width / (width - 2)), device)
        plain = frequencies(width, base, device)
        if self.kind == "linear":
            return plain / factor
        if self.kind == "llama3":
            slowed = (self.fast - plain * self.context / (2 * math.pi)) / (self.fast - self.slow)
        else:
            first, last = (self.feature(turns, width, base) for turns in (self.fast, self.slow))
            first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
            slowed = (torch.arange(width // 2, device=device) - first) / max(last - first, 0.001)
        slowed = slowed.clamp(0, 1)
        return plain / factor * slowed + plain * (1 - slowed)

    def feature(self, turns: float, width: int, base: float) -> float:
        """Number of the feature, a fraction, that turns this often over the context."""
        return width * math.log(self.context / (turns * 2 * math.pi)) / (2 * math.log(base))


def rotary_scaling(config: "GPTConfig") -> RotaryScaling | None:
    """Returns how rotary positions are scaled, with all defaults filled in.

    Raises ValueError for settings that don't fit together.
    """
    kind, factor, context = config.rotary_scaling, config.rotary_factor, config.rotary_context
    attention_factor, slow = config.rotary_attention_factor, config.rotary_slow
    if kind is None:
        if factor != 1:
            raise ValueError(f"rotary_factor = {factor} stretches nothing: choose a rotary_scaling")
        return None
    if kind in ("dynamic", "yarn", "llama3") and context is None:
        raise ValueError(f'rotary_scaling = "{kind}" needs rotary_context, the context of the model that it stretches')
    if kind in ("ntk", "dynamic") and config.head_width == 2:
        raise ValueError(f'rotary_scaling = "{kind}" slows every pair of features except the first: 2 are too few')
    if attention_factor is not None and kind != "yarn":
        raise ValueError(f'rotary_attention_factor is for rotary_scaling = "yarn", not "{kind}"')
    fast = FAST_TURNS.get(kind, math.inf) if config.rotary_fast is None else config.rotary_fast
    if fast <= slow:
        raise ValueError(f"rotary_fast = {fast} must be more than rotary_slow = {slow}")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1 if kind == "yarn" else 1.0
    return RotaryScaling(kind, factor, context or 1, fast, slow, attention_factor)


def rotary_waves(config: "GPTConfig", positions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines (..., 1, T, D / 2) of positions (..., T), shared by all heads; None for other encodings.

    `lengths` (B,): see `text_lengths`.
    """
    if config.positions != "rotary":
        return None
    width, base, scaling = config.head_width, config.rotary_base, rotary_scaling(config)
    if scaling is None:
        cosines, sines = waves(positions, frequencies(width, base, positions.device))
    else:
        cosines, sines = scaling.waves(positions, lengths, width, base)
    return cosines.unsqueeze(-3), sines.unsqueeze(-3)


def text_lengths(positions: Tensor, lengths: Tensor | None) -> Tensor:
    """Returns for each of positions (T,) or (B, T) how many tokens its text has: one more than its last position.

    A text ends where positions start again at 0. `lengths` (B,) is the number of tokens before the padding of a row.
    """
    size = positions.size(-1)
    places = torch.arange(size, device=positions.device)
    begins = F.pad(torch.where(positions == 0, places, size)[..., 1:], (0, 1), value=size)
    ends = begins.flip(-1).cummin(-1).values.flip(-1)  # of each token's text
    ends = ends if lengths is None else ends.minimum(lengths[:, None]).maximum(places + 1)
    return positions + ends - places


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of ALiBi (arXiv:2108.12409): a geometric series that ends at 2^-8, shared out as in BLOOM and MPT."""
    power = 2 ** (heads - 1).bit_length()
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes if power == heads else [*slopes[1::2], *slopes[::2]][:heads]


def alibi_bias(allowed: Tensor, slopes: Sequence[float], queries: Tensor | None = None) -> Tensor:
    """Returns the biases (B, H, T, S) on scores where a mask (B, 1, T, S) allows attention, -inf elsewhere.

    `queries` (B, T) are the places of the queries among the keys. None: the last T.
    """
    (length, keys), device = allowed.shape[-2:], allowed.device
    if queries is None:
        queries = torch.arange(keys - length, keys, device=device)
    distances = (queries[..., None] - torch.arange(keys, device=device)).unsqueeze(-3)  # (B, 1, T, S) or (1, T, S)
    factors = torch.tensor(slopes, device=device)[:, None, None]
    return torch.where(allowed, -factors * distances, -math.inf)
