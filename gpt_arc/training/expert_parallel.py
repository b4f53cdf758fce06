"""Expert parallelism: the experts of a mixture shared out among processes, to which the others send their tokens.

After GShard (arXiv:2006.16668). Everything but the experts is in every process, as without. With fewer sharing than
there are processes, each such group has all the experts, and what belongs together over the groups is added up.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gpt_arc.distributed import IS_MAIN, WORLD_SIZE
from gpt_arc.errors import UserError
from gpt_arc.nn.experts import take_rows
from gpt_arc.weights.meta import meta_device
from model import GPT


class AllToAll(torch.autograd.Function):
    """Rows x (N, C), those for the first process first: what the processes sent to this one, in their order.

    `sent` and `received` are rows to and from each. The gradients go the same ways back.
    """

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.ways = received, sent, group
        return exchanged(x, sent, received, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return exchanged(gradient, *ctx.ways), None, None, None


def exchanged(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    rows = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(rows, x.contiguous(), received, sent, group=group)
    return rows


class ExpertParallel:
    """Who has which experts. Made of a whole model, of which it leaves this process its share."""

    def __init__(self, model: GPT, processes: int, device: torch.device):
        """Share the experts of `model`, which will be on `device`, among so many processes; 1 leaves all as it is."""
        self.processes, self.n_copies = processes, WORLD_SIZE // processes
        self.shares: dict[nn.Parameter, None] = {}  # of which this process has a part, along their first dimension
        if processes == 1:
            return
        mesh = init_device_mesh(device.type, (self.n_copies, processes), mesh_dim_names=("copies", "experts"))
        self.copies, self.group = mesh.get_group("copies"), mesh.get_group("experts")
        for experts in model.experts:
            experts.exchange = self.exchange
            for parameter in experts.parameters(recurse=False):
                parameter.data = self.own(parameter.data)
                self.shares[parameter] = None
        names = [name for name, parameter in model.named_parameters() if parameter in self.shares]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)

    def own(self, whole: Tensor) -> Tensor:
        """This process's share of a tensor of all experts."""
        return whole.chunk(self.processes)[dist.get_rank(self.group)].clone()

    def gathered(self, share: Tensor) -> Tensor:
        """The tensor of all experts, on the CPU; each process gives its share, and the main one alone gets all."""
        parts = [torch.empty_like(share) for _ in range(self.processes)]
        dist.all_gather(parts, share.contiguous(), group=self.group)
        return torch.cat(parts).cpu() if IS_MAIN else share

    @torch.compiler.disable
    def exchange(self, compute: Callable[[Tensor, Tensor], Tensor], x: Tensor, ends: Tensor) -> Tensor:
        """What `Experts.compute` is for all experts, where this process computes its own and sends away the rest.

        Of rows x (N, C) that lie expert by expert, up to `ends` (E,), as much.
        """
        asked = ends.diff(prepend=ends.new_zeros(1))
        given = torch.empty_like(asked)
        dist.all_to_all_single(given, asked, group=self.group)
        asked, given = asked.view(self.processes, -1), given.view(self.processes, -1)  # (P, E / P) rows of P processes
        sent, received = asked.sum(1).tolist(), given.sum(1).tolist()
        rows = AllToAll.apply(x, sent, received, self.group)  # process by process, and each expert by expert
        expert = torch.arange(given.size(1), device=x.device).expand_as(given).flatten()
        order = expert.repeat_interleave(given.flatten()).argsort(stable=True)
        back = order.argsort()
        outputs = compute(take_rows(rows, order, back), given.sum(0).cumsum(0))
        return AllToAll.apply(take_rows(outputs, back, order), received, sent, self.group)

    def reduce_gradients(self) -> None:
        """Complete the gradients of this process's experts, as DistributedDataParallel does those of the rest: a mean.

        An expert has met the tokens of all processes that share it, and what is missing is in the copies.
        """
        for parameter in self.shares:
            parameter.grad /= WORLD_SIZE
            if self.n_copies > 1:
                dist.all_reduce(parameter.grad, group=self.copies)

    def whole(self, model: GPT) -> GPT:
        """The model with all its experts, to be saved by the main process. Every process has to ask."""
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

    def reshaped(
        self, optimizer: torch.optim.Optimizer, state: dict, change: Callable[[Tensor], Tensor]
    ) -> dict[int, dict[str, Tensor]]:
        """The `state` of a `state_dict` of the optimizer, with `change` made to the moments of what is shared out."""
        parameters: Iterable[nn.Parameter] = (p for group in optimizer.param_groups for p in group["params"])
        shared = {i for i, parameter in enumerate(parameters) if parameter in self.shares}
        return {
            i: {name: change(x) if i in shared and x.dim() else x for name, x in moments.items()}
            for i, moments in state.items()
        }


def check_expert_processes(processes: int, n_experts: int, dtype: str) -> None:
    """Raises UserError where the experts, or the processes, can't be shared out so."""
    if processes > 1 and dtype == "float16":
        raise UserError("each process would find a float16 loss scale of its own experts: use dtype = bfloat16")
    if processes > 1 and not n_experts:
        raise UserError(f"expert_processes = {processes} shares out experts, and the model has none: set n_experts")
    if n_experts % processes:
        raise UserError(f"expert_processes = {processes} does not divide n_experts = {n_experts}")
    if WORLD_SIZE % processes:
        raise UserError(
            f"expert_processes = {processes} does not divide the {WORLD_SIZE} processes there are: "
            f"torchrun --nproc_per_node={processes} starts as many; expert_processes = 1 goes without"
        )
