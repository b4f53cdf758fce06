"""Expert parallelism: splits the experts of a mixture among processes, which send each other the tokens.

Follows GShard (arXiv:2006.16668). Every process holds everything except the experts. If a group that splits the experts
is smaller than the number of processes, each group has all the experts, and their gradients are summed over the groups.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gpt_arc.distributed import IS_MAIN, WORLD_SIZE
from gpt_arc.errors import UserError
from gpt_arc.nn.experts import product_dtype, take_rows
from gpt_arc.nn.meta import meta_device
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


class ExpertParallel:
    """Assigns experts to processes. Built from a whole model, in which it keeps only this process's share of them."""

    def __init__(self, model: GPT, processes: int, device: torch.device):
        """Splits the experts of `model`, which will run on `device`, among `processes`; 1 changes nothing."""
        self.processes, self.n_copies = processes, WORLD_SIZE // processes
        self.shares: dict[nn.Parameter, None] = {}  # split along the first dimension
        if processes == 1:
            return
        mesh = init_device_mesh(device.type, (self.n_copies, processes), mesh_dim_names=("copies", "experts"))
        self.copies, self.group = mesh.get_group("copies"), mesh.get_group("experts")
        for experts in model.experts:
            experts.exchange = torch.compiler.disable(self.exchange)  # as a decorator it would slow every import
            for parameter in experts.parameters(recurse=False):
                parameter.data = self.share_of(parameter.data)
                self.shares[parameter] = None
        names = [name for name, parameter in model.named_parameters() if parameter in self.shares]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)

    def share_of(self, whole: Tensor) -> Tensor:
        """Returns this process's share of a tensor that covers all experts."""
        return whole.chunk(self.processes)[dist.get_rank(self.group)].clone()

    def gathered(self, share: Tensor) -> Tensor:
        """Gathers all shares. Returns the whole tensor, on the CPU, in the main process, and `share` in the others."""
        parts = [torch.empty_like(share) for _ in range(self.processes)]
        dist.all_gather(parts, share.contiguous(), group=self.group)
        return torch.cat(parts).cpu() if IS_MAIN else share

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

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of this process's experts."""
        return [p.grad for p in self.shares if p.grad is not None]

    def reduce_gradients(self) -> None:
        """Averages the gradients of this process's experts, as DistributedDataParallel does for all other parameters.

        An expert has already seen the tokens of its whole group; the other groups hold the missing terms.
        """
        for gradient in self.gradients:
            gradient /= WORLD_SIZE
            if self.n_copies > 1:
                dist.all_reduce(gradient, group=self.copies)

    def whole(self, model: GPT) -> GPT:
        """Returns, in the main process, the model with all its experts, to be saved. Every process must call this."""
        if not self.shares:
            return model
        tensors = model.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            tensors[name] = self.gathered(tensor.data) if tensor in self.shares else tensor.data
        if not IS_MAIN:
            return model
        with meta_device():
            whole = GPT(model.config)
        whole.load_state_dict(tensors, assign=True)
        return whole


def check_expert_processes(processes: int, n_experts: int, dtype: str) -> None:
    """Raises UserError if the experts or the processes can't be split this way."""
    if processes > 1 and dtype == "float16":
        raise UserError("each process would adapt the float16 loss scale to its own experts: use dtype = bfloat16")
    if processes > 1 and not n_experts:
        raise UserError(f"expert_processes = {processes} splits experts, and the model has none: set n_experts")
    if n_experts % processes:
        raise UserError(f"expert_processes = {processes} does not divide n_experts = {n_experts}")
    if WORLD_SIZE % processes:
        raise UserError(
            f"expert_processes = {processes} does not divide the number of processes, {WORLD_SIZE}: "
            f"start {processes} with torchrun --nproc_per_node={processes}, or set expert_processes = 1"
        )
