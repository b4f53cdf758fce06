"""Attention of a decoder to what an encoder read (arXiv:1706.03762).

Shapes: B batch, T time, S tokens of a source, C width, H query heads, K key/value heads, D head size.
"""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from gpt_arc.nn.attention import attend
from gpt_arc.nn.functional import Dropout

if TYPE_CHECKING:
    from model import GPTConfig


class EncoderStates(NamedTuple):
    """What an encoder makes of B sources of up to S tokens; B = 1 stands for any number of equal ones."""

    states: Tensor  # (B, S, C)
    mask: Tensor | None  # (B, 1, 1, S), False for padding; None: there is none


class CrossAttention(nn.Module):
    """Attention to the states of a source; `key_value` stacks K key heads, then K value heads."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.config = config
        heads, kv_heads, size = config.n_head, config.kv_heads, config.head_width
        self.query = nn.Linear(config.n_embd, heads * size, bias=config.bias)
        self.key_value = nn.Linear(config.n_embd, 2 * kv_heads * size, bias=config.bias)
        self.projection = nn.Linear(heads * size, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout_of("residual"))

    def forward(self, x: Tensor, source: EncoderStates) -> Tensor:
        """Returns a tensor shaped like x (B, T, C)."""
        config = self.config
        query = self.query(x).unflatten(-1, (config.n_head, config.head_width)).transpose(1, 2)  # (B, H, T, D)
        pair = self.key_value(source.states).unflatten(-1, (2 * config.kv_heads, config.head_width)).transpose(1, 2)
        key, value = pair.expand(len(x), -1, -1, -1).chunk(2, dim=1)  # (B, K, S, D)
        dropout = config.dropout_of("attention") if self.training else 0.0
        mixed = attend(query, key, value, source.mask, dropout, causal=False)
        return self.dropout(self.projection(mixed.transpose(1, 2).flatten(2)))
