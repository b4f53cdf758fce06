"""Sparse upcycling: a mixture of experts that begins as a dense model."""

import dataclasses

import torch

from gpt_arc.nn.experts import Experts
from gpt_arc.weights.directory import NothingDrawn
from model import GPT


def upcycled(model: GPT, n_experts: int, **settings: int) -> GPT:
    """A mixture of experts each of which begins as the dense model's MLP; the routers are new (arXiv:2212.05055).

    With gates that add up to 1, so with experts_per_token of 2 or more, it computes what the dense model does: shared
    experts are new, and silent at first, their projections being zero. `settings` are further ones of GPTConfig.
    """
    config = dataclasses.replace(model.config, n_experts=n_experts, **settings)
    with torch.device("meta"), NothingDrawn():
        mixture = GPT(config)
    tensors = model.state_dict()
    for i, block in enumerate(mixture.blocks):
        if isinstance(block.mlp, Experts):
            place = f"blocks.{i}.mlp."
            for name, own in (("up", "up.weight"), ("projection", "projection.weight"),
                              ("up_bias", "up.bias"), ("projection_bias", "projection.bias")):  # fmt: skip
                if place + own in tensors:
                    tensors[place + name] = (
                        tensors.pop(place + own).expand(n_experts, *[-1] * (2 if "bias" not in name else 1)).clone()
                    )
            tensors[f"{place}router.weight"] = 0.02 * torch.randn(n_experts, config.n_embd).to(model.head_weight)
            if config.balance_rate:
                tensors[f"{place}balance"] = torch.zeros(n_experts).to(model.head_weight)
            if block.mlp.shared is not None:
                for name, tensor in block.mlp.shared.state_dict(prefix=f"{place}shared.").items():
                    new = 0.02 * torch.randn(tensor.shape) if name.endswith("up.weight") else torch.zeros(tensor.shape)
                    tensors[name] = new.to(model.head_weight)
    mixture.load_state_dict(tensors, assign=True)
    return mixture
