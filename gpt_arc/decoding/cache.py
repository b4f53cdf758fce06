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

    They are buffers so that CUDA graphs, which write to fixed addresses, treat them like weights.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, model: GPT, rows: int, slots: int, dtype: torch.dtype):
        super().__init__()
        shape = rows, model.config.kv_heads, slots, model.config.head_width
        for name in ("keys", "values"):
            zeros = torch.zeros(shape, dtype=dtype, device=model.token_embedding.weight.device)
            self.register_buffer(name, zeros, persistent=False)

    def view(self, rows: int, slots: int, positions: Tensor | None) -> KVCache:
        """Returns the first rows and slots, to read tokens at `positions` (B, T); None: at 0 .. T - 1."""
        return KVCache(self.keys[:rows, :, :slots], self.values[:rows, :, :slots], positions)


def empty_cache(model: GPT, rows: int, slots: int, dtype: torch.dtype) -> Sequence[BlockCache]:
    """Returns a `BlockCache` for each block of the model, in a `ModuleList`."""
    blocks = nn.ModuleList(BlockCache(model, rows, slots, dtype) for _ in model.blocks)
    return cast(Sequence[BlockCache], blocks)  # torch doesn't type the elements
