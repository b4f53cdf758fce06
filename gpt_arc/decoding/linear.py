"""Linear layers laid out for decoding, which is bound by reading each weight once per token.

With few rows, a CPU's matrix product spends more time on repacking the weight than on multiplying. So the weight is
packed once for all calls. For a single row, compiled code instead sums products in one pass over the unpacked weight,
at memory speed. Rounding weights to 8 bits halves what that pass reads.
"""

import itertools
import weakref
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT

Layout = Literal["plain", "packed", "int8"]
PACKED_FROM = 1 << 18  # weights of a layer; calling a packed layer costs 10 us more
_packed: dict[int, tuple[Tensor, Tensor | None]] = {}  # weights in oneDNN's layout, and biases
_keys = itertools.count()


torch.library.define("gpt_arc::packed_linear", "(Tensor x, Tensor key, int width) -> Tensor")


@torch.library.impl("gpt_arc::packed_linear", "cpu")  # `custom_op` would be shorter, but 15 us slower per call
def packed_linear(x: Tensor, key: Tensor, width: int) -> Tensor:
    """Applies the packed layer `key` (), of `width` outputs: compiled code can't take tensors in oneDNN's layout."""
    weight, bias = _packed[int(key)]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("gpt_arc::packed_linear")
def _(x: Tensor, key: Tensor, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


class InferenceLinear(nn.Module):
    """x (..., K) -> (..., N), for constant weight (N, K) and bias (N,)."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, layout: Layout):
        super().__init__()
        if layout == "packed" and weight.numel() < PACKED_FROM:
            layout = "plain"
        self.width, self.layout = len(weight), layout
        bias, scale = None if bias is None else bias.detach(), None
        weight = weight.detach()
        if layout == "packed":
            key = next(_keys)
            _packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight, 16), bias
            weakref.finalize(self, _packed.pop, key)
            weight = torch.tensor(key)
        elif layout == "int8":  # symmetric, one scale per output
            scale = weight.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
            weight = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if self.layout == "packed":
            if compiling:
                return torch.ops.gpt_arc.packed_linear(x, self.weight, self.width)
            return torch.ops.mkldnn._linear_pointwise(x, *_packed[int(self.weight)], "none", [], "")
        if compiling and x.numel() == x.size(-1) and x.device.type == "cpu":
            # as_strided makes inductor compute x once; it would redo a norm or activation for each output
            row = x.flatten().float().as_strided((x.size(-1),), (1,))
            y = (self.weight.float() * row).sum(-1)
            y = y if self.scale is None else y * self.scale
            y = y if self.bias is None else y + self.bias
            return y.type_as(x).expand(*x.shape[:-1], -1)
        weight = self.weight if self.scale is None else (self.weight * self.scale[:, None]).type_as(x)
        return F.linear(x, weight, self.bias)


def packable(dtype: torch.dtype) -> bool:
    """Whether this CPU's library packs weights of this type."""
    library = torch.ops.mkldnn  # a private API of torch.compile; without it decoding is slower
    if not (torch.backends.mkldnn.is_available() and hasattr(library, "_reorder_linear_weight")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def for_inference(model: GPT, layout: Layout) -> InferenceLinear:
    """Replaces the blocks' linear layers by `InferenceLinear`s, in place, and returns the head as one.

    The model can't be trained or saved any more.
    """
    for module in list(model.blocks.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and name != "router":  # the router multiplies in float32
                setattr(module, name, InferenceLinear(layer.weight, layer.bias, layout))
    weight = model.token_embedding.weight if model.config.tied_head else model.head.weight
    return InferenceLinear(weight, model.head_bias, layout)
