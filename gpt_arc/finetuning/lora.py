"""LoRA (Hu et al., arXiv:2106.09685): each linear layer learns a product of two thin matrices beside its frozen weight.

add_adapters(model.blocks, rank=8, alpha=16)    # now these alone learn
merge_adapters(model.blocks)                    # added to the weights: a model like any other
"""

import copy
import math

import torch
import torch.nn as nn
from torch import Tensor


class LowRankLinear(nn.Module):
    """`linear`, frozen, plus alpha / rank times the product of `up` (out, rank) and `down` (rank, in).

    `up` begins as zeros, so that nothing is changed at first; `down` as torch draws a linear layer.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = alpha / rank
        weight = linear.weight
        self.down = nn.Parameter(weight.new_empty(rank, weight.size(1)))
        self.up = nn.Parameter(weight.new_zeros(weight.size(0), rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * nn.functional.linear(nn.functional.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear layer that computes the same."""
        self.linear.weight += self.scale * (self.up @ self.down)
        return self.linear.requires_grad_()


def add_adapters(module: nn.Module, rank: int, alpha: float) -> None:
    """Put a `LowRankLinear` in the place of every linear layer inside `module`, and freeze all else there.

    Experts and their routers are among what is frozen.
    """
    module.requires_grad_(False)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "router":
                setattr(parent, name, LowRankLinear(child, rank, alpha))


def merge_adapters(module: nn.Module) -> None:
    """Undo `add_adapters`, with what was learned in the weights."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankLinear):
                setattr(parent, name, child.merged())


def with_merged_adapters(module: nn.Module) -> nn.Module:
    """A copy of `module` after `merge_adapters`; itself where it has none."""
    if not any(isinstance(part, LowRankLinear) for part in module.modules()):
        return module
    merged = copy.deepcopy(module)
    merge_adapters(merged)
    return merged
