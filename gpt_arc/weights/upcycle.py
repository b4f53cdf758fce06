"""Sparse upcycling: turns a dense model into a mixture of experts."""

import dataclasses

import torch

from gpt_arc.nn.experts import Experts
from gpt_arc.nn.meta import meta_device
from model import GPT


def upcycled(model: GPT, n_experts: int, **settings: int) -> GPT:
    """Returns a mixture of experts whose experts are copies of the dense model's MLPs (arXiv:2212.05055).

    Routers and shared experts are new, the latter with projections of zero. So with gates that sum to 1, that is with
    experts_per_token >= 2, the mixture computes what the dense model does. `settings` are further fields of GPTConfig.
    """
    config = dataclasses.replace(model.config, n_experts=n_experts, **settings)
    with meta_device():
        mixture = GPT(config)
    tensors = model.state_dict()
    for i, block in enumerate(mixture.blocks):
        if isinstance(block.mlp, Experts):
            place = f"blocks.{i}.mlp."
            for name, dense_name in (("up", "up.weight"), ("projection", "projection.weight"),
                                     ("up_bias", "up.bias"), ("projection_bias", "projection.bias")):  # fmt: skip
                if place + dense_name in tensors:
                    dense = tensors.pop(place + dense_name)
                    tensors[place + name] = dense.expand(n_experts, *[-1] * dense.dim()).clone()
            tensors[f"{place}router.weight"] = 0.02 * torch.randn(n_experts, config.n_embd).to(model.head_weight)
            if config.balance_rate:
                tensors[f"{place}balance"] = torch.zeros(n_experts).to(model.head_weight)
            if block.mlp.shared is not None:
                for name, tensor in block.mlp.shared.state_dict(prefix=f"{place}shared.").items():
                    new = 0.02 * torch.randn(tensor.shape) if name.endswith("up.weight") else torch.zeros(tensor.shape)
                    tensors[name] = new.to(model.head_weight)
    mixture.load_state_dict(tensors, assign=True)
    return mixture
