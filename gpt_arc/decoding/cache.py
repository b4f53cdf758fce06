"""Caches of keys and values, for decoding and for scoring."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from gpt_arc.nn.attention import KVCache
from model import GPT


class BlockCache(nn.Module):
    """The keys and values of one block, (B, K, S, D) each: room for S tokens of B rows.

    In 8 bits, each key and value has a scale. They are buffers so that CUDA graphs, which write to fixed addresses,
    treat them like weights.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, model: GPT, rows: int, slots: int, dtype: torch.dtype):
        super().__init__()
        shape, device = (rows, model.config.kv_heads, slots), model.token_embedding.weight.device
        for name in ("keys", "values"):
            zeros = torch.zeros(*shape, model.config.head_width, dtype=dtype, device=device)
            self.register_buffer(name, zeros, persistent=False)
            if dtype == torch.int8:
                self.register_buffer(f"{name}_scales", torch.zeros(*shape, 1, device=device), persistent=False)

    def view(self, rows: int, slots: int, positions: Tensor | None) -> KVCache:
        """Returns the first rows and slots, to read tokens at `positions` (B, T); None: at 0 .. T - 1."""
        parts = {name: kept[:rows, :, :slots] for name, kept in self.named_buffers()}
        scales = (parts["keys_scales"], parts["values_scales"]) if "keys_scales" in parts else None
        return KVCache(parts["keys"], parts["values"], positions, scales)


def empty_cache(model: GPT, rows: int, slots: int, dtype: torch.dtype) -> Sequence[BlockCache]:
    """Returns a `BlockCache` for each block of the model, in a `ModuleList`."""
    blocks = nn.ModuleList(BlockCache(model, rows, slots, dtype) for _ in model.blocks)
    return cast(Sequence[BlockCache], blocks)  # torch doesn't type the elements


def buffers_of(cache: Sequence[BlockCache]) -> list[Tensor]:
    """Returns all tensors of a cache, (B, K, S, ...) each."""
    return [kept for part in cache for kept in part.buffers()]
