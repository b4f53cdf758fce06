"""The element-wise parts: the MLP's non-linearity, positions, n-gram ids, images' places, dropout and a norm."""

import math
from typing import assert_never

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt_arc.nn.names import Activation


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The MLP's non-linearity applied to x (..., M); for the gated ones x is (..., 2M), gate then value."""
    match activation:
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "gelu":
            return F.gelu(x)
        case "quick_gelu":  # CLIP's
            return x * torch.sigmoid(1.702 * x)
        case "relu":
            return F.relu(x)
        case "relu_squared":
            return F.relu(x).square()
        case "swiglu":
            gate, x = x.chunk(2, dim=-1)
            return F.silu(gate) * x
    assert_never(activation)


def frequencies(width: int, base: float | Tensor, device: torch.device) -> Tensor:
    """Radians per position (..., width / 2) of pairs of features, from 1 down to almost 1 / base (...), in float32.

    Computed where they are used: a buffer would lose precision in bfloat16 and be empty on the meta device.
    """
    return (base ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)).reciprocal()


def waves(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., F) of positions (...) at frequencies (F,) or (..., F), in float32."""
    angles = positions.float()[..., None] * frequencies
    return angles.cos(), angles.sin()


def sinusoids(positions: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., width / 2) of positions (...) at wavelengths from 2 pi to 2 pi base, in float32."""
    return waves(positions, frequencies(width, base, positions.device))


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864): turns features i and i + D/2 of x (B, H, T, D) as a pair.

    This is Hugging Face's layout.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    return turned.type_as(x)


def ngram_ids(tokens: Tensor, positions: Tensor, previous: Tensor | None, longest: int, rows: int) -> Tensor:
    """Ids (B, T, longest - 1), in one table, of the n-grams of 2 .. `longest` tokens that end at each of tokens (B, T).

    Each length has `rows` ids of its own, assigned by a polynomial hash that doesn't depend on the vocabulary.
    `previous` (B, T, longest - 1) holds the tokens before each one, the nearest first. None: `tokens` begin at position
    0, so the tokens before each are in the tensor. Whatever lies before position 0 counts as one extra token.
    """
    key, ids = tokens, []
    for k in range(1, longest):
        before = F.pad(tokens, (k, 0))[:, : tokens.size(1)] if previous is None else previous[..., k - 1]
        key = (key * 1_640_531_527 + before.where(positions >= k, -1) + 1) % (2**31 - 1)  # Knuth's multiplier, a prime
        ids.append(key % rows + (k - 1) * rows)
    return torch.stack(ids, dim=-1)


def put_images(x: Tensor, tokens: Tensor, images: Tensor) -> Tensor:
    """x (B, T, C) with row i of images (N, C) in the place of each of tokens (B, T) that is -1 - i.

    Selecting those tokens would wait for a GPU. Instead text looks up a row of zeros, which gets no gradient.
    """
    rows = F.embedding((-tokens).clamp(min=0), F.pad(images, (0, 0, 1, 0)), padding_idx=0)
    return torch.where((tokens < 0)[..., None], rows.type_as(x), x)


@torch.library.custom_op("gpt_arc::draw_kept", mutates_args=("mask",))
def draw_kept(mask: Tensor, rate: float) -> None:
    """Fill a dropout mask on a CPU: 0 with probability `rate`, else 1 / (1 - rate), to the nearest of 65,536 rates.

    One 64-bit random number serves four entries. torch's own dropout draws one number per entry in a single thread,
    and when compiled draws again in the backward pass. It is a custom operator because a compiler would otherwise
    merge two draws into one.
    """
    dropped = min(round(rate * 2**16), 2**16 - 1)
    bits = torch.empty(math.ceil(mask.numel() / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    torch.ge(bits[: mask.numel()].view(mask.shape), dropped - 2**15, out=mask)
    mask.mul_(2**16 / (2**16 - dropped))


@draw_kept.register_fake
def _(mask: Tensor, rate: float) -> None:
    pass


def dropout(x: Tensor, rate: float) -> Tensor:
    """x with each value set to 0 with probability `rate`, the others divided by 1 - rate."""
    if x.device.type != "cpu" or not rate:
        return F.dropout(x, rate)
    mask = torch.empty(x.shape, dtype=x.dtype)
    draw_kept(mask, rate)
    return x * mask


class Dropout(nn.Dropout):
    """torch's module, computed by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


class RMSNorm(nn.RMSNorm):
    """torch's, with its weight cast to the input's type on a CPU, whose fused kernel refuses two types under autocast.

    On a GPU autocast computes the norm in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.type_as(x) if x.device.type == "cpu" else self.weight
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)
