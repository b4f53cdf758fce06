"""An LSTM in place of a GPT's blocks: the comparison of GPT-1's paper (Radford et al. 2018, table 5)."""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from gpt_arc.nn.attention import KVCache
from gpt_arc.nn.cross_attention import EncoderStates
from gpt_arc.nn.experts import Experts
from model import GPT, GPTConfig


class LSTM(GPT):
    """A language model with a GPT's embedding and head, and one LSTM layer with as many weights as the blocks.

    H units have 4 H (C + H + 2) weights, and the projection back to the embedding's width has H C + C. There is no
    position embedding: the recurrence knows the order.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        size = sum(p.numel() for p in self.blocks.parameters())
        if config.positions == "learned":
            size += self.position_embedding.weight.numel()
            del self.position_embedding
        del self.blocks
        width = config.n_embd  # 4 H^2 + (5 C + 8) H + C = size
        linear = 5 * width + 8
        units = max(1, round((math.sqrt(linear**2 + 16 * (size - width)) - linear) / 8))
        self.lstm = nn.LSTM(width, units, batch_first=True)
        self.projection = nn.Linear(units, width)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)

    @property
    def experts(self) -> list[Experts]:
        return []

    def hidden(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
        previous: Tensor | None = None,
        lengths: Tensor | None = None,
        images: Tensor | None = None,
        types: Tensor | None = None,
        source: EncoderStates | None = None,
    ) -> Tensor:
        """Returns hidden states (B, T, C) before the head. Raises ValueError for more than block_size tokens."""
        assert all(extra is None for extra in (documents, cache, previous, images, types, source))
        if tokens.size(1) > self.config.block_size:
            raise ValueError(
                f"{tokens.size(1)} tokens are more than the context, block_size = {self.config.block_size}"
            )
        with torch.autocast(tokens.device.type, enabled=False):  # a CPU's LSTM has no 16-bit kernels
            states, _ = self.lstm(self.dropout(self.token_embedding(tokens)).type_as(self.lstm.weight_ih_l0))
        return self.final_norm(self.dropout(self.projection(states)))
