"""Expert parallelism: splits the experts of a mixture among processes, which send each other the tokens.

Follows GShard (arXiv:2006.16668). Every process holds everything except the experts. If a group that splits the experts
is smaller than the number of processes, each group has all the experts, and their gradients are summed over the groups.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from gpt_arc.errors import UserError
from gpt_arc.nn.experts import Experts, product_dtype, take_rows
from gpt_arc.training.parallel import check_divides
from gpt_arc.training.weight_shares import WeightShares
from gpt_arc.watch import WATCH
from model import GPT


class AllToAll(torch.autograd.Function):
    """Sends rows x (N, C), ordered by destination process, and returns the rows received, ordered by source process.

    `sent` and `received` count the rows to and from each process. Gradients travel back along the same routes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.routes = received, sent, group
        return exchanged(x, sent, received, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return exchanged(gradient, *ctx.routes), None, None, None


def exchanged(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    WATCH.arrive()
    rows = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(rows, x.contiguous(), received, sent, group=group)
    return rows


class ExpertParallel(WeightShares):
    """Assigns experts to processes."""

    def divide(self, model: GPT) -> None:
        if self.processes == 1:
            return
        for module_name, module in model.named_modules():
            if isinstance(module, Experts):
                module.exchange = torch.compiler.disable(self.exchange)  # as a decorator it would slow every import
                for name, _ in module.named_parameters(module_name, recurse=False):
                    self.shares[name] = 0, [model.config.n_experts]
        super().divide(model)

    def exchange(self, compute: Callable[[Tensor, Tensor], Tensor], x: Tensor, ends: Tensor) -> Tensor:
        """Replaces `Experts.compute`: sends rows to the processes that hold their experts, and the outputs back.

        The rows x (N, C) are grouped by expert; `ends` (E,) is where each group ends. Returns a tensor shaped like x.
        """
        outgoing = ends.diff(prepend=ends.new_zeros(1))
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        both = torch.stack((outgoing, incoming)).view(2, self.processes, -1)  # (2, P, E / P)
        sent, received = both.sum(2).tolist()  # the host waits here, since it has to know the sizes
        incoming = both[1]
        x = x.to(product_dtype(x))  # as the experts' products would round it
        rows = AllToAll.apply(x, sent, received, self.group)  # grouped by process, then by expert
        expert = torch.arange(incoming.size(1), device=x.device).expand_as(incoming).flatten()
        order = expert.repeat_interleave(incoming.flatten()).argsort(stable=True)
        back = order.argsort()
        outputs = compute(take_rows(rows, order, back), incoming.sum(0).cumsum(0))
        return AllToAll.apply(take_rows(outputs, back, order), received, sent, self.group)


def check_expert_processes(processes: int, n_experts: int, dtype: str, devices: int | None = None) -> None:
    """Raises UserError if the experts or the processes can't be split this way."""
    if processes > 1 and dtype == "float16":
        raise UserError("each process would adapt the float16 loss scale to its own experts: use dtype = bfloat16")
    if processes > 1 and not n_experts:
        raise UserError(f"expert_processes = {processes} splits experts, and the model has none: set n_experts")
    if n_experts % processes:
        raise UserError(f"expert_processes = {processes} does not divide n_experts = {n_experts}")
    check_divides("expert_processes", processes, devices)
