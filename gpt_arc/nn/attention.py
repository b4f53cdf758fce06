"""Self-attention: the cache of keys and values, which keys a query sees, and the fastest kernel for the device.

Shapes: B batch, T time, S keys, H query heads, K key/value heads, D head size.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.overrides import handle_torch_function, has_torch_function_unary

from gpt_arc.nn.functional import dropout
from gpt_arc.nn.packing import Packed, attend_packed
from gpt_arc.nn.positions import alibi_bias, alibi_slopes

if TYPE_CHECKING:
    from model import GPTConfig

FLEX_DEVICES = ("cuda",)  # where compiled masked attention is flex_attention's
SCORES_KEPT = 1 << 25  # attention weights, B H T T, that a CPU may keep for a layer's backward pass: 64 MiB in 16 bits


class KVCache(NamedTuple):
    """The keys and values of one block for the tokens read so far. Token i of row b has slot i."""

    keys: Tensor  # (B, K, S, D), after norm and rotation
    values: Tensor  # (B, K, S, D)
    positions: Tensor | None  # (B, T) slots of the tokens being read now; None: these are the first, 0 .. T - 1
    scales: tuple[Tensor, Tensor] | None = None  # (B, K, S, 1) of keys and values in 8 bits

    def add(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value (B, K, T, D); returns the keys and values to attend to."""
        if self.scales is None:
            self.put(self.keys, key)
            self.put(self.values, value)
        else:
            for kept, scales, new in zip((self.keys, self.values), self.scales, (key, value)):
                scale = new.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
                self.put(scales, scale)
                self.put(kept, (new / scale).round())
        if self.positions is None:
            return key, value
        if self.scales is None:
            return self.keys, self.values
        keys, values = (kept * scales for kept, scales in zip((self.keys, self.values), self.scales))
        return keys.type_as(key), values.type_as(value)

    def put(self, kept: Tensor, new: Tensor) -> None:
        """Store `new` (B, K, T, N) in the slots of the tokens being read."""
        if self.positions is None:
            kept[:, :, : new.size(2)] = new
        else:
            rows = torch.arange(new.size(0), device=new.device)[:, None]
            kept[rows, :, self.positions] = new.transpose(1, 2).type_as(kept)


class PrefixMask(NamedTuple):
    """A mask in which images are read as a whole: their tokens see keys beyond their own place."""

    allowed: Tensor  # (B, 1, T, T)


# None: every query sees the keys up to its own place or, in bidirectional attention, all. Numbers are added to scores
Mask = Tensor | BlockMask | PrefixMask | Packed | None


def positions_and_masks(
    config: "GPTConfig",
    tokens: Tensor,
    documents: Tensor | Packed | None,
    cache: Sequence[KVCache] | None,
    lengths: Tensor | None,
    dropout_rate: float,
    prefix_attention: bool = False,
) -> tuple[Tensor, tuple[Mask, Mask]]:
    """Positions (T,) or (B, T) of tokens (B, T), and the masks of even and of odd blocks.

    Causal attention of odd blocks sees the last attention_band positions only, their own included, if there is a band,
    and the first attention_sinks of the text. `documents` (B, T) restarts positions and attention at each document;
    `Packed`, where `can_pack` allows it, is the masks too. `cache`, one per block, continues the tokens that were read
    before. With ALiBi the masks are biases on the scores of each head. `lengths`: see
    `bidirectional_mask`. With `prefix_attention` the tokens of an image, which are below 0, see each other both ways;
    it goes with neither a band nor ALiBi, and a cache doesn't cut images.
    """
    band, slopes = config.attention_band, alibi_slopes(config.n_head) if config.positions == "alibi" else None
    biased = slopes is not None
    (batch, length), device = tokens.shape, tokens.device
    positions = torch.arange(length, device=device)
    if cache is not None and cache[0].positions is not None:
        positions, slots = cache[0].positions, torch.arange(cache[0].keys.size(2), device=device)
        mask = (slots <= positions[..., None])[:, None]  # (B, 1, T, S)
        recent = mask
        if band is not None:
            recent = slots > positions[..., None] - band
            recent = mask & (recent | (slots < config.attention_sinks) if config.attention_sinks else recent)[:, None]
        if slopes:
            mask, recent = (alibi_bias(allowed, slopes, positions) for allowed in (mask, recent))
        return positions, (mask, recent)
    mask, first, packed = None, None, None
    if isinstance(documents, Packed):
        documents, packed = documents.documents, documents
    if documents is not None:
        begins = documents != F.pad(documents[:, :-1], (1, 0))
        first = torch.where(begins, positions, 0).cummax(dim=1).values  # (B, T) where each token's document begins
    if config.attention == "bidirectional":
        mask = bidirectional_mask(tokens, documents, lengths)
        return positions if first is None else positions - first, (mask, mask)
    if first is not None and packed is not None:
        return positions - first, (packed, packed._replace(band=band))
    if first is not None:
        mask = causal_mask(first, None, dropout_rate, batch, biased)
    elif biased:
        mask = causal_mask(torch.zeros_like(positions)[None], None, dropout_rate, 1, biased)
    if prefix_attention:
        assert band is None and not biased
        mask = prefix_mask(tokens, torch.zeros_like(tokens) if first is None else first)
    recent = mask
    if band is not None and band < length:
        earliest = (positions - band + 1).clamp(min=0)[None]  # the same for all rows, unless they have documents
        earliest = earliest if first is None else torch.maximum(earliest, first)
        recent = causal_mask(earliest, band, dropout_rate, batch, biased, config.attention_sinks, first)
    if slopes:
        assert isinstance(mask, Tensor) and isinstance(recent, Tensor)
        mask, recent = (alibi_bias(allowed, slopes) for allowed in (mask, recent))
    return positions if first is None else positions - first, (mask, recent)


def causal_mask(
    earliest: Tensor,
    band: int | None,
    dropout_rate: float,
    batch: int,
    biased: bool = False,
    sinks: int = 0,
    first: Tensor | None = None,
) -> Tensor | BlockMask:
    """The mask in which query i of row b sees the keys earliest[b, i] .. i; `earliest` is (B, T), or (1, T) for all B.

    It also sees the `sinks` keys from first[b, i] on; None stands for 0. Returns booleans (B, 1, T, T). Where a query
    sees at most W = `band` keys and 2W < T, queries go in n chunks of W, each with the sinks and the keys of its own
    chunk and the one before: (B n, 1, W, sinks + 2W), whose cost grows with T W, not T T. In compiled CUDA code it is
    the tiles that `flex_attention` visits, which has no dropout, and no backward on CPUs. `biased` keeps it booleans,
    to which biases are added.
    """
    (rows, length), device = earliest.shape, earliest.device
    begins = None  # where the sinks begin
    if sinks:
        begins = torch.zeros_like(earliest) if first is None else first
    if device.type in FLEX_DEVICES and torch.compiler.is_compiling() and not (dropout_rate or biased):
        own = int(rows > 1)  # else all rows share the first, whatever their number

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = key >= earliest[own * b, query]
            if begins is not None:
                begin = begins[own * b, query]
                seen = seen | (key >= begin) & (key < begin + sinks)
            return (key <= query) & seen

        return create_block_mask(visible, rows if rows > 1 else None, None, length, length, device=device)
    earliest = earliest.expand(batch, length)
    queries = keys = torch.arange(length, device=device)
    if band is None or 2 * band >= length or (sinks and first is not None):  # documents' sinks lie at many places
        seen = keys >= earliest[..., None]
        if begins is not None:
            seen = seen | (keys >= begins[..., None]) & (keys < begins[..., None] + sinks)
        return ((keys <= queries[:, None]) & seen)[:, None]
    chunks = math.ceil(length / band)
    queries = torch.arange(chunks * band, device=device).unflatten(0, (chunks, band))  # (n, W)
    keys = queries[:, :1] - band + torch.arange(2 * band, device=device)  # (n, 2W)
    earliest = F.pad(earliest, (0, chunks * band - length)).unflatten(1, (chunks, band))
    allowed = (keys[:, None] <= queries[..., None]) & (keys[:, None] >= earliest[..., None])  # (B, n, W, 2W)
    if sinks:
        far = (torch.arange(sinks, device=device) < earliest[..., None]).expand(batch, -1, -1, -1)  # before the band
        allowed = torch.cat((far, allowed), dim=-1)
    return allowed.flatten(0, 1)[:, None]


def prefix_mask(tokens: Tensor, earliest: Tensor) -> PrefixMask:
    """The mask in which query i of row b sees the keys earliest[b, i] .. i and the whole run of image tokens around it.

    `tokens` and `earliest` are (B, T). A run is one of adjacent tokens below 0 with the same `earliest`.
    """
    places, in_image = torch.arange(tokens.size(1), device=tokens.device), tokens < 0
    goes_on = in_image[:, :-1] & in_image[:, 1:] & (earliest[:, :-1] == earliest[:, 1:])
    ends = torch.where(F.pad(goes_on, (0, 1)), tokens.size(1), places)
    latest = ends.flip(1).cummin(dim=1).values.flip(1)  # (B, T) where the run of each token ends
    return PrefixMask(((places <= latest[..., None]) & (places >= earliest[..., None]))[:, None])


def bidirectional_mask(tokens: Tensor, documents: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The mask (B, 1, T, T) in which each of tokens (B, T) sees all of its document in `documents` (B, T).

    None is one document. No token sees the padding after `lengths` (B,), if they are given. Where there is neither,
    the mask is None.
    """
    mask = None if documents is None else (documents[:, None] == documents[..., None])[:, None]
    if lengths is None:
        return mask
    real = torch.arange(tokens.size(1), device=tokens.device) < lengths[:, None].clamp(min=1)  # one key, or no softmax
    real = real[:, None, None].expand(-1, -1, tokens.size(1), -1)
    return real if mask is None else mask & real


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeats each head of x (B, K, S, D) for the query heads it serves: (B, heads, S, D)."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout_rate: float, causal: bool = True) -> Tensor:
    """Attention of query (B, H, T, D) to key and value (B, K, S, D), whose heads serve H / K query heads each.

    `mask` comes from `causal_mask` or `prefix_mask`, or is (B, 1, T, S), or has ALiBi's biases (B, H, T, S), with which
    GPUs use SDPA's memory-efficient kernel instead of the flash kernel. None: S = T, and every query sees the keys up
    to its own place, or all keys if the attention isn't `causal`.
    """
    if has_torch_function_unary(value):  # a mode such as `AttentionWeights`
        return handle_torch_function(attend, (value,), query, key, value, mask, dropout_rate, causal)
    if isinstance(mask, Packed):
        key, value = (repeat_heads(x, query.size(1)) for x in (key, value))
        return attend_packed(query, key, value, mask)
    if isinstance(mask, PrefixMask):
        mask, causal = mask.allowed, False
    if isinstance(mask, Tensor) and mask.is_floating_point():
        mask = mask.type_as(value)
    if not causal:
        assert not isinstance(mask, BlockMask)  # causal_mask alone makes them
        key, value = (repeat_heads(x, query.size(1)) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_rate)
    if query.size(2) == 1 and query.device.type == "cpu" and torch.compiler.is_compiling() and not dropout_rate:
        assert not isinstance(mask, BlockMask)  # these are made on GPUs
        return attend_once(query, key, value, mask)
    heads = query.size(1)
    if heads != key.size(1) and query.device.type == "cuda" and not isinstance(mask, BlockMask):
        if query.size(2) == 1 and mask is not None:
            return attend_by_groups(query, key, value, mask, dropout_rate)
        # only flash attention knows groups; it is for 16 bits, on GPUs with bfloat16, and older ones compile in float16
        is_old = not torch.compiler.is_compiling() and torch.cuda.get_device_capability(value.device) < (8, 0)
        if mask is not None or value.dtype != torch.bfloat16 or is_old:
            key, value = (repeat_heads(x, heads) for x in (key, value))
    settings = {"dropout_p": dropout_rate, "enable_gqa": query.size(1) != key.size(1)}
    dense = mask is None or (isinstance(mask, Tensor) and mask.size(-1) == mask.size(-2) == query.size(2))
    if not isinstance(mask, BlockMask) and dense and query.device.type == "cpu" and value.dtype != torch.float32:
        if query.shape[:3].numel() * key.size(2) <= SCORES_KEPT:
            return attend_by_products(query, key, value, mask, dropout_rate)
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
    sinks = mask.size(-1) - 2 * band
    sunk = [x[:, :, :sinks].repeat_interleave(chunks, dim=0) for x in (key, value) if sinks]
    key, value = (
        F.pad(x, (0, 0, band, beyond)).unfold(2, 2 * band, band).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for x in (key, value)
    )  # (B n, K, 2W, D)
    if sinks:
        key, value = (torch.cat(pair, dim=2) for pair in zip(sunk, (key, value)))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)
    return mixed.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_rate: float) -> Tensor:
    """Causal `attend` by batched matrix products, for CPUs, whose fused kernel takes up to five times as long.

    The queries go in up to four chunks, each with the keys up to its end, so little of the square is wasted.
    """
    batch, heads, length, size = query.shape
    query, key, value = (repeat_heads(x, heads).flatten(0, 1) for x in (query, key, value))  # (B H, T, D)
    width, mixed = max(128, math.ceil(length / 4)), []
    for start in range(0, length, width):
        stop = min(start + width, length)
        if mask is None:
            hidden = torch.full((stop - start, stop), -math.inf, dtype=value.dtype, device=query.device).triu(start + 1)
        else:
            hidden = mask[:, :, start:stop, :stop]
            if hidden.dtype == torch.bool:
                hidden = torch.zeros_like(hidden, dtype=value.dtype).masked_fill(~hidden, -math.inf)
            hidden = hidden.expand(batch, heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(hidden, query[:, start:stop], key[:, :stop].mT, alpha=1 / math.sqrt(size))
        mixed.append(dropout(scores.softmax(-1), dropout_rate) @ value[:, :stop])
    return torch.cat(mixed, dim=1).unflatten(0, (batch, heads))


def attend_by_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_rate: float) -> Tensor:
    """`attend` for one query (B, H, 1, D). The queries of a group see the same keys, so they can pass as one head's."""
    grouped = query.unflatten(1, (key.size(1), -1)).squeeze(3)  # (B, K, H / K, D)
    mask = mask if mask.size(1) == 1 else mask.unflatten(1, (key.size(1), -1)).squeeze(3)  # (B, K, H / K, S)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, dropout_p=dropout_rate)
    return mixed.flatten(1, 2).unsqueeze(2)


def attend_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` for one query (B, H, 1, D) as two sums, which a compiler fuses into one pass over keys and values."""
    torch._check(value.size(-1) == query.size(-1))  # so that a compiler that takes sizes as variable knows this one
    query = query.float().unflatten(1, (key.size(1), -1))  # (B, K, H / K, 1, D)
    scores = (query * key[:, :, None].float()).sum(-1) / math.sqrt(query.size(-1))  # (B, K, H / K, S)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.unflatten(1, (key.size(1), -1)).squeeze(3)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    mixed = (weights[..., None] * value[:, :, None].float()).sum(-2) / weights.sum(-1, keepdim=True)  # (B, K, H / K, D)
    return mixed.flatten(1, 2)[:, :, None]
