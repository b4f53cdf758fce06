"""AdamW that works in the CPU's memory, for models whose moments don't fit in the GPU's beside them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gpt_arc.errors import UserError
from gpt_arc.training.config import TrainingConfig


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW that keeps its moments in the CPU's memory and updates there, while weights and gradients stay on a GPU.

    All copies to the CPU are queued at once. It updates each weight as soon as that weight and its gradient have
    arrived, and the copy back runs during the next weight's update. On a CPU nothing is copied.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        arriving = [
            (group, parameter, *fetched(parameter, parameter.grad))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for group, parameter, weight, gradient, arrival in arriving:
            if arrival:
                arrival.synchronize()
            self._update(group, parameter, weight, gradient)
            parameter.copy_(weight, non_blocking=True)

    def _update(self, group: dict[str, Any], parameter: nn.Parameter, weight: Tensor, gradient: Tensor) -> None:
        """Updates `weight`, which is the `parameter` on the CPU."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {moment: torch.zeros_like(weight) for moment in ("exp_avg", "exp_avg_sq")}
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a `state_dict`, without moving the moments to the GPU, as other optimizers would."""
        super().load_state_dict(state_dict | {"state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, moments in state_dict["state"].items():
            self.state[parameters[i]] = {name: moment.to("cpu", copy=True) for name, moment in moments.items()}


def check_offload(config: TrainingConfig, device: torch.device) -> None:
    """Raises UserError if the device has no memory apart from the CPU's that could be saved."""
    if config.offload_optimizer and device.type == "mps":
        raise UserError("offload_optimizer saves nothing on mps, which shares the CPU's memory: leave it out")


def fetched(weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, torch.Event | None]:
    """Starts copying both to pinned memory. Returns the copies and their completion, or the same tensors of a CPU."""
    copies = weight.detach().to("cpu", non_blocking=True), gradient.to("cpu", non_blocking=True)
    return *copies, torch.cuda.current_stream().record_event() if weight.is_cuda else None
