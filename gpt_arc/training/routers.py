"""Routers of mixtures of experts: statistics, and balancing without an auxiliary loss."""

import torch
from torch import Tensor

from gpt_arc import distributed
from model import GPT

ROUNDING = 1e-6  # of a mean of loads, which depends on the number of processes and mustn't move a bias


def freeze_routers(model: GPT) -> None:
    """Takes the routers out of training. Does nothing for a dense model."""
    for experts in model.experts:
        experts.router.weight.requires_grad_(False)


class RouterMeter:
    """Collects statistics of the routers and updates the biases that balance them. Does nothing for a dense model."""

    def __init__(self, model: GPT, frozen: bool = False):
        """`frozen`: routers and biases stay as they are, so that only the other weights change a token's experts."""
        self.model, self.blocks, self.frozen = model, model.experts, frozen
        for experts in self.blocks:
            experts.observed = frozen
        if frozen:
            freeze_routers(model)
        self._loads: list[Tensor] = []  # (blocks, E) of each batch of this step
        self._sums = torch.zeros(0)
        self._steps = 0

    @torch.no_grad()
    def add(self) -> None:
        """Adds the batch that the model has just been trained on."""
        if self.model.routings:
            figures = [torch.cat((r.load, torch.stack((r.entropy, r.dropped)))) for r in self.model.routings]
            self._loads.append(torch.stack(figures))

    @torch.no_grad()
    def step(self, made: bool) -> None:
        """Ends a step. If its update was made, averages its batches over all processes and moves the biases; otherwise
        discards them."""
        loads, self._loads = self._loads, []
        if not (loads and made):
            return
        means = distributed.sum_over_ranks(torch.stack(loads).mean(0)) / distributed.WORLD_SIZE
        self._sums = means + (self._sums if self._steps else 0.0)
        self._steps += 1
        rate, experts = self.model.config.balance_rate, self.model.config.n_experts
        for block, load in zip(self.blocks, means[:, :experts]):
            if rate and not self.frozen:
                excess = load * experts - 1
                block.balance -= rate * torch.where(excess.abs() > ROUNDING, excess.sign(), 0.0)

    def take(self) -> dict[str, float]:
        """Returns means over blocks and over the updates since the last call; {} for a dense model.

        expert_cv: standard deviation of the experts' loads divided by their mean. expert_max: largest load in any block
        divided by the mean. router_entropy: in nats. dropped: share of choices beyond the capacity.
        """
        if not self._steps:
            return {}
        figures, self._steps = self._sums.cpu() / self._steps, 0
        loads = figures[:, :-2] * self.model.config.n_experts
        return {
            "expert_cv": loads.std(dim=1, correction=0).mean().item(),
            "expert_max": loads.max().item(),
            "router_entropy": figures[:, -2].mean().item(),
            "dropped": figures[:, -1].mean().item(),
        }
