"""What model.py is written in: positions, runs of tokens and, as the hardware at hand computes them fastest,
attention, its cache, dropout, experts and the head's loss.

Shapes: B batch, T time, S keys, C width, H query heads, K key/value heads, D head size, V vocabulary, N tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

IGNORED = -1  # a target that is not scored: padding, prompts, the far side of a mask
FLEX_DEVICES = ("cuda",)  # where compiled masked attention is flex_attention's
SCORES_KEPT = 1 << 25  # attention weights, B H T T, that a CPU may keep for a layer's backward pass: 64 MiB in 16 bits


class KVCache(NamedTuple):
    """What one block keeps of the tokens read so far, so that each is read once: token i of row b has the slot i."""

    keys: Tensor  # (B, K, S, D), after norm and rotation
    values: Tensor  # (B, K, S, D)
    positions: Tensor | None  # (B, T) slots of the tokens now being read; None: they are the first, 0 .. T - 1

    def add(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep key and value (B, K, T, D), and return those to attend to."""
        if self.positions is None:
            self.keys[:, :, : key.size(2)] = key
            self.values[:, :, : value.size(2)] = value
            return key, value
        rows = torch.arange(key.size(0), device=key.device)[:, None]
        self.keys[rows, :, self.positions] = key.transpose(1, 2).type_as(self.keys)
        self.values[rows, :, self.positions] = value.transpose(1, 2).type_as(self.values)
        return self.keys, self.values


def causal_mask(earliest: Tensor, band: int | None, dropout: float) -> Tensor | BlockMask:
    """Attention in which query i of row b sees the keys earliest[b, i] .. i. `earliest` is (B, T).

    A tensor of truth values (B, 1, T, T). Where queries see at most W = `band` keys and 2W are fewer than T, they go in
    n chunks of W, each with the keys of its own chunk and the one before: (B n, 1, W, 2W), whose cost grows with T W.
    In compiled CUDA code the tiles that `flex_attention` has to visit; it has no dropout, and no backward on CPUs.
    """
    (batch, length), device = earliest.shape, earliest.device
    if device.type in FLEX_DEVICES and torch.compiler.is_compiling() and not dropout:
        earliest = earliest.contiguous()
        return create_block_mask(
            lambda b, h, query, key: (key <= query) & (key >= earliest[b, query]),
            batch, None, length, length, device=device,
        )  # fmt: skip
    queries = keys = torch.arange(length, device=device)
    if band is not None and 2 * band < length:
        chunks = math.ceil(length / band)
        queries = torch.arange(chunks * band, device=device).unflatten(0, (chunks, band))  # (n, W)
        keys = queries[:, :1] - band + torch.arange(2 * band, device=device)  # (n, 2W)
        earliest = F.pad(earliest, (0, chunks * band - length)).unflatten(1, (chunks, band))
    allowed = (keys[..., None, :] <= queries[..., None]) & (keys[..., None, :] >= earliest[..., None])
    return allowed.flatten(0, -3)[:, None]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, K, S, D), each head repeated for the query heads that it serves: (B, heads, S, D)."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask | None, dropout: float) -> Tensor:
    """Attention of query (B, H, T, D) to key and value (B, K, S, D), each head of these serving H / K of those.

    `mask` is from `causal_mask`, or (B, 1, T, S); None: S = T, and every query sees the keys up to its own place.
    """
    if query.size(2) == 1 and query.device.type == "cpu" and torch.compiler.is_compiling() and not dropout:
        return attend_once(query, key, value, mask)
    if isinstance(mask, Tensor) and query.device.type == "cuda":
        key, value = (repeat_heads(x, query.size(1)) for x in (key, value))  # no fused kernel has masks and groups
    settings = {"dropout_p": dropout, "enable_gqa": query.size(1) != key.size(1)}
    dense = mask is None or (isinstance(mask, Tensor) and mask.size(-1) == mask.size(-2) == query.size(2))
    if dense and query.device.type == "cpu" and value.dtype != torch.float32:
        if query.shape[:3].numel() * key.size(2) <= SCORES_KEPT:
            return attend_by_products(query, key, value, mask, dropout)
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
    if isinstance(mask, BlockMask):
        query, key = query.type_as(value), key.type_as(value)  # autocast leaves normed heads in float32
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=settings["enable_gqa"])
    batch, length, band = query.size(0), query.size(2), mask.size(-2)
    if band == length:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)
    chunks = math.ceil(length / band)
    beyond = chunks * band - length
    query = F.pad(query, (0, 0, 0, beyond)).unflatten(2, (chunks, band)).transpose(1, 2).flatten(0, 1)  # (B n, H, W, D)
    key, value = (
        F.pad(x, (0, 0, band, beyond)).unfold(2, 2 * band, band).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for x in (key, value)
    )  # (B n, K, 2W, D)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)
    return mixed.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Causal `attend` by batched matrix products, for a CPU, whose fused kernel takes up to five times as long.

    The queries go in up to four chunks, each with the keys up to its end: little of the square is computed in vain.
    """
    batch, heads, length, size = query.shape
    query, key, value = (repeat_heads(x, heads).flatten(0, 1) for x in (query, key, value))  # (B H, T, D)
    width, mixed = max(128, math.ceil(length / 4)), []
    for start in range(0, length, width):
        stop = min(start + width, length)
        if mask is None:
            hidden = torch.full((stop - start, stop), -math.inf, dtype=value.dtype, device=query.device).triu(start + 1)
        else:
            seen = mask[:, :, start:stop, :stop]
            hidden = torch.zeros_like(seen, dtype=value.dtype).masked_fill(~seen, -math.inf)
            hidden = hidden.expand(-1, heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(hidden, query[:, start:stop], key[:, :stop].mT, alpha=1 / math.sqrt(size))
        mixed.append(drop(scores.softmax(-1), dropout) @ value[:, :stop])
    return torch.cat(mixed, dim=1).unflatten(0, (batch, heads))


def attend_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` for one query (B, H, 1, D) as two sums, from which a compiler makes one pass over keys and values."""
    torch._check(value.size(-1) == query.size(-1))  # so that a compiler that takes sizes as variable knows this one
    query = query.float().unflatten(1, (key.size(1), -1))  # (B, K, H / K, 1, D)
    scores = (query * key[:, :, None].float()).sum(-1) / math.sqrt(query.size(-1))  # (B, K, H / K, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    mixed = (weights[..., None] * value[:, :, None].float()).sum(-2) / weights.sum(-1, keepdim=True)  # (B, K, H / K, D)
    return mixed.flatten(1, 2)[:, :, None]


def sinusoids(positions: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., width / 2) of positions (...) at wavelengths from 2 pi up to 2 pi base, in float32.

    Computed where they are used: no buffer that a cast to bfloat16 would spoil or a meta device would leave empty.
    """
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions.float()[..., None] * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions: x (B, H, T, D) with features i and i + D/2 turned as a pair (Hugging Face's layout)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    return turned.type_as(x)


def run_rows(tokens: Tensor, positions: Tensor, previous: Tensor | None, longest: int, rows: int) -> Tensor:
    """Rows (B, T, n - 1), in a table of embeddings, of the runs of 2 .. n tokens that end with each of tokens (B, T).

    Each length has `rows` rows of its own, to which a polynomial hash sends its runs: the same whatever the vocabulary.
    `previous` (B, T, n - 1) has the tokens before each, the nearest first; None: `tokens` are whole sequences, or their
    parts that begin at the position 0. What lies before `positions` (B, T) or (T,) 0 is as it were a token of its own.
    """
    key, found = tokens, []
    for k in range(1, longest):
        before = F.pad(tokens, (k, 0))[:, : tokens.size(1)] if previous is None else previous[..., k - 1]
        key = (key * 1_640_531_527 + before.where(positions >= k, -1) + 1) % (2**31 - 1)  # Knuth's multiplier, a prime
        found.append(key % rows + (k - 1) * rows)
    return torch.stack(found, dim=-1)


@torch.library.custom_op("gpt_arc::draw_kept", mutates_args=("mask",))
def draw_kept(mask: Tensor, rate: float) -> None:
    """Fill a mask of dropout on a CPU: 0 at the rate, else the inverse of the rest, to the nearest of 65,536 rates.

    Four entries are of one number of 64 bits. torch's own draws one for each, in one thread, and when compiled another
    in the backward pass. An operator of its own since compilers would take two drawings for one computation.
    """
    dropped = min(round(rate * 2**16), 2**16 - 1)
    bits = torch.empty(math.ceil(mask.numel() / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    torch.ge(bits[: mask.numel()].view(mask.shape), dropped - 2**15, out=mask)
    mask.mul_(2**16 / (2**16 - dropped))


@draw_kept.register_fake
def _(mask: Tensor, rate: float) -> None:
    pass


def drop(x: Tensor, rate: float) -> Tensor:
    """x with each value 0 at the rate, and else divided by the rest."""
    if x.device.type != "cpu" or not rate:
        return F.dropout(x, rate)
    mask = torch.empty(x.shape, dtype=x.dtype)
    draw_kept(mask, rate)
    return x * mask


class Dropout(nn.Dropout):
    """torch's, by `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


class TakeRows(torch.autograd.Function):
    """`take_rows`. Indexing would add up the rows' gradients one by one, on a GPU in any order."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.times = len(order) // max(len(x), 1) or 1
        return x[order // ctx.times]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows = gradient[ctx.saved_tensors[0]]
        return rows if ctx.times == 1 else rows.unflatten(0, (-1, ctx.times)).sum(1), None, None


def take_rows(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Rows x (N, C), each k times, in some order: (N k, C).

    `order` (N k,) has every number below N k once, that of row i and its copy j being i k + j; `back` is its inverse.
    """
    return TakeRows.apply(x, order, back)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """Rows x (N, C), those before ends[0] times weight[0] (M, C), those before ends[1] times weight[1] ...: (N, M).

    `weight` (E, M, C) and `bias` (E, M) are of E groups, `ends` (E,) int64 where their rows end; a group may have none.
    """
    device, counts = x.device.type, ends.diff(prepend=ends.new_zeros(1))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    aligned = all(size * dtype.itemsize % 16 == 0 for size in weight.shape[1:])
    if aligned and dtype == torch.bfloat16 and device in ("cpu", "cuda"):  # a GPU isn't asked for the counts
        product = F.grouped_mm(x, weight.mT, offs=ends.int())
        return product if bias is None else product + bias.repeat_interleave(counts, dim=0, output_size=len(x))
    groups = zip(x.split(counts.tolist()), weight, [None] * len(weight) if bias is None else bias)
    return torch.cat([F.linear(*group) for group in groups])


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of every process's x, without a gradient; every process that trains has to ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def logits_at_once(device: str) -> int:
    """Numbers of which `HeadLoss` has a copy or two in float32: a GPU likes large products, a CPU its caches."""
    return 1 << 28 if device == "cuda" else 1 << 25


class HeadLoss(torch.autograd.Function):
    """Sum () of the cross-entropies in nats of hidden (N, C) times head (V, C), plus bias (V,), at the targets (N,).

    Each is multiplied by its weight (N,), if there are any, and not counted where its target is -1.
    The logits, with their gradients the largest tensors of all, exist for some rows at a time only: the gradients of
    `hidden`, `head` and `bias` are computed along with the loss, and multiplied by the loss's own when that is known.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None,
        with_gradients: bool,
    ) -> Tensor:  # fmt: skip
        device, vocabulary = hidden.device.type, len(head)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        weight, offset = head.to(dtype), None if bias is None else bias.to(dtype)
        scored, targets = (targets != IGNORED).to(exact)[:, None], targets.clamp(min=0)[:, None]
        scored = scored if weights is None else scored * weights[:, None]
        total, gradients = torch.zeros((), dtype=exact, device=hidden.device), []
        head_gradient = torch.zeros_like(head) if with_gradients and ctx.needs_input_grad[1] else None
        bias_gradient = torch.zeros_like(bias) if with_gradients and bias is not None else None
        # a sum over many rows overflows in float16, before the loss's scale is known: it is taken of a 64th
        shrunk = 2**-6 if dtype == torch.float16 else 1.0
        chunks = math.ceil(len(hidden) * vocabulary / logits_at_once(device))
        rows = math.ceil(len(hidden) / max(chunks, 1)) or 1  # chunks of one size, so that one compiled code fits all
        for x, target, counts in zip(hidden.split(rows), targets.split(rows), scored.split(rows)):
            x = x.to(dtype)
            logs = F.linear(x, weight, offset).to(exact).log_softmax(-1)  # (rows, V)
            chosen = logs.gather(1, target)
            total -= chosen.mul(counts).sum()
            if with_gradients:
                counts = counts.to(dtype)
                # the logits' gradient: softmax, less 1 at the target; what doesn't count is left out afterwards
                gradient = logs.exp_().to(dtype).scatter_(1, target, chosen.expm1().to(dtype))
                gradients.append((gradient @ weight).mul(counts).type_as(hidden))
                if head_gradient is not None:
                    head_gradient.add_(gradient.mT @ (x * (counts * shrunk)), alpha=1 / shrunk)
                if bias is not None:
                    bias_gradient += gradient.mul(counts).sum(0, dtype=exact)
        if with_gradients:
            ctx.save_for_backward(torch.cat(gradients), head_gradient, bias_gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else x * gradient for x in ctx.saved_tensors), None, None, None
