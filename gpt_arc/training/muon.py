"""Muon for GPUs: the matrices of one shape are orthogonalised together, and shared among processes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt_arc import distributed


class BatchedMuon(torch.optim.Muon):
    """torch's Muon, which updates one matrix at a time, with a few products for all matrices of a shape.

    Each process orthogonalises a share of them and sends the result to the others; all need to have all gradients.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for shape in dict.fromkeys(p.shape for p in matrices):
                self._step_together([p for p in matrices if p.shape == shape], group)

    def _step_together(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in matrices if p.grad is not None]
        means = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in matrices]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        steps = torch._foreach_lerp(gradients, means, group["momentum"])  # Nesterov's
        rows, columns = matrices[0].shape
        rate = group["lr"] * math.sqrt(max(1, rows / columns))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(shared(list(steps), group)), alpha=-rate)


def shared(steps: list[Tensor], group: dict[str, Any]) -> Tensor:
    """Orthogonalises N matrices (M, C) in all processes together: (N, M, C) bfloat16."""
    processes, size = distributed.WORLD_SIZE, math.ceil(len(steps) / distributed.WORLD_SIZE)
    share = torch.zeros(size, *steps[0].shape, dtype=torch.bfloat16, device=steps[0].device)
    if part := steps[distributed.RANK * size : (distributed.RANK + 1) * size]:
        share[: len(part)] = orthogonalised(torch.stack(part), group)
    if processes == 1:
        return share
    whole = share.new_empty(processes * size, *share.shape[1:])
    distributed.all_gather_single(whole, share)
    return whole[: len(steps)]


def orthogonalised(x: Tensor, group: dict[str, Any]) -> Tensor:
    """The orthogonal matrices nearest to x (N, M, C), roughly, by Newton and Schulz's iteration in bfloat16."""
    a, b, c = group["ns_coefficients"]
    is_tall = x.size(-2) > x.size(-1)
    x = x.bfloat16().mT if is_tall else x.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        products = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(products, products, products, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
