"""Around mixtures of experts: what their routers do, balance without a loss, and one made of a dense model."""

import dataclasses

import torch
from torch import Tensor

from gpt_arc import distributed
from gpt_arc.checkpoint import NothingDrawn
from model import GPT, Experts


class RouterMeter:
    """What the routers did since it was last asked, and the biases that balance them; of a dense model nothing."""

    def __init__(self, model: GPT):
        self.model, self.blocks = model, model.experts
        self._loads: list[Tensor] = []  # (blocks, E) of each batch of this step
        self._sums = torch.zeros(0)
        self._steps = 0

    @torch.no_grad()
    def add(self) -> None:
        """Count the batch that the model has just been trained on."""
        if self.blocks:
            figures = [torch.cat((r.load, torch.stack((r.entropy, r.dropped)))) for r in self.model.routings]
            self._loads.append(torch.stack(figures))

    @torch.no_grad()
    def step(self, made: bool) -> None:
        """The batches counted were those of a step: if its update was made, take their mean over the processes too, and
        move the biases; else forget them."""
        loads, self._loads = self._loads, []
        if not (loads and made):
            return
        means = distributed.sum_over_ranks(torch.stack(loads).mean(0)) / distributed.WORLD_SIZE
        self._sums = means.cpu() + (self._sums if self._steps else 0.0)
        self._steps += 1
        rate, experts = self.model.config.balance_rate, self.model.config.n_experts
        for block, load in zip(self.blocks, means[:, :experts]):
            if rate:
                block.balance += rate * (1 / experts - load).sign()

    def take(self) -> dict[str, float]:
        """Means over the updates since the last call, over blocks too; {} for a dense model.

        expert_cv: the standard deviation of the experts' loads over their mean. expert_max: the largest load over the
        mean, of all blocks. router_entropy in nats. dropped: share of choices beyond the capacity.
        """
        if not self._steps:
            return {}
        figures, self._steps = self._sums / self._steps, 0
        loads = figures[:, :-2] * self.model.config.n_experts
        return {
            "expert_cv": loads.std(dim=1, correction=0).mean().item(),
            "expert_max": loads.max().item(),
            "router_entropy": figures[:, -2].mean().item(),
            "dropped": figures[:, -1].mean().item(),
        }


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
