"""LoRA (Hu et al., arXiv:2106.09685): each linear layer learns a product of two thin matrices beside its frozen weight.

add_adapters(model.blocks, rank=8, alpha=16)    # now only the adapters learn
learn_new_tokens(model, 3)                      # and the embeddings of the last three tokens
merge_adapters(model)                           # adds both to the weights: an ordinary model again
"""

import copy
import math
from typing import TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from model import GPT

M = TypeVar("M", bound=nn.Module)


class LowRankLinear(nn.Module):
    """`linear`, frozen, plus alpha / rank times the product of `up` (out, rank) and `down` (rank, in).

    `up` starts at zero, so the output is unchanged at first. `down` is initialized like torch's linear layers.
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
        """Adds the product to the weight of `linear` and returns it, trainable: the same function as this layer."""
        self.linear.weight += self.scale * (self.up @ self.down)
        return self.linear.requires_grad_()


class NewRows(nn.Module):
    """An embedding, or a linear layer without bias, that is frozen except for the last `count` rows of its weight."""

    def __init__(self, module: nn.Embedding | nn.Linear, count: int):
        super().__init__()
        self.module = module.requires_grad_(False)
        self.rows = nn.Parameter(module.weight[-count:].detach().clone())

    @property
    def weight(self) -> Tensor:
        return torch.cat((self.module.weight[: -len(self.rows)], self.rows))

    def forward(self, x: Tensor) -> Tensor:
        apply = nn.functional.embedding if isinstance(self.module, nn.Embedding) else nn.functional.linear
        return apply(x, self.weight)

    @torch.no_grad()
    def merged(self) -> nn.Embedding | nn.Linear:
        """Puts the rows into the weight of `module` and returns it, trainable: the same function as this layer."""
        self.module.weight[-len(self.rows) :] = self.rows
        return self.module.requires_grad_()


def learn_new_tokens(model: GPT, count: int) -> None:
    """Freezes the embedding of a model, and its head if that isn't tied, except for the last `count` tokens."""
    for name in ("token_embedding",) if model.config.tied_head else ("token_embedding", "head"):
        setattr(model, name, NewRows(getattr(model, name), count))


def add_adapters(module: nn.Module, rank: int, alpha: float) -> None:
    """Replaces every linear layer inside `module` by a `LowRankLinear`, and freezes everything else in it.

    Experts and their routers are frozen, too.
    """
    module.requires_grad_(False)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "router":
                setattr(parent, name, LowRankLinear(child, rank, alpha))


def merge_adapters(module: nn.Module) -> None:
    """Undoes `add_adapters` and `learn_new_tokens`, keeping in the weights what was learned."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankLinear | NewRows):
                setattr(parent, name, child.merged())


def with_merged_adapters(module: M) -> M:
    """Returns a copy of `module` with its adapters merged, or `module` if it has none."""
    if not any(isinstance(part, LowRankLinear) for part in module.modules()):
        return module
    merged = copy.deepcopy(module)
    merge_adapters(merged)
    return merged
