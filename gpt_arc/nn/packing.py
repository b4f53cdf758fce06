"""Attention within documents that share rows, by flash attention for sequences of different lengths."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from model import GPTConfig


class Packed(NamedTuple):
    """Documents of B rows of T tokens, and where they lie when all rows are laid end to end."""

    documents: Tensor  # (B, T) the document of each token, as any number that changes at boundaries
    ends: Tensor  # (N + 1,) int32: 0, then the end of each document
    longest: int
    band: int | None = None  # most keys that a query sees, its own included


def packed(documents: Tensor) -> Packed:
    """Finds the ends of documents (B, T). On a GPU this would wait for the device."""
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    ends = F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=begins.numel())
    return Packed(documents, ends.int(), int(ends.diff().max()))


def can_pack(config: "GPTConfig", device: torch.device, dtype: str) -> bool:
    """Whether flash attention suits the model and the device: in 16 bits, on NVIDIA's GPUs from the A100 on."""
    if device.type != "cuda" or not torch.version.cuda or dtype not in ("bfloat16", "float16"):
        return False
    plain = (
        config.mixer == "attention"
        and config.attention == "causal"
        and config.positions != "alibi"
        and not config.attention_sinks
    )
    plain = plain and not config.dropout_of("attention")
    fits = config.head_width % 8 == 0 and config.head_width <= 256
    return plain and fits and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_packed(query: Tensor, key: Tensor, value: Tensor, mask: Packed) -> Tensor:
    """Attention of query, key and value (B, H, T, D), in which a query sees its document up to its own place."""
    from torch.nn.attention.varlen import varlen_attn  # slow to import

    (batch, _, length, _), window = query.shape, -1 if mask.band is None else mask.band - 1
    query, key, value = (x.type_as(value).transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B T, H, D)
    sizes = mask.ends, mask.ends, mask.longest, mask.longest
    mixed = varlen_attn(query, key, value, *sizes, window_size=(window, 0))
    assert isinstance(mixed, Tensor)  # nothing else was asked for
    return mixed.unflatten(0, (batch, length)).transpose(1, 2)
