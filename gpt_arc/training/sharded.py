"""Fully sharded data parallelism (FSDP2): every process keeps a shard of each weight, gradient and moment.

A block's weights are gathered while it computes. Gradients are summed where their shards are.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt_arc import distributed
from gpt_arc.device import DTYPES
from gpt_arc.distributed import IS_MAIN, WORLD_SIZE
from gpt_arc.training.expert_parallel import exchanged
from gpt_arc.training.parallel import M, Parallel
from gpt_arc.training.weight_shares import WeightShares
from gpt_arc.watch import WATCH
from model import GPT, Block

NORMS = nn.LayerNorm, nn.RMSNorm


class ShardedMuon(torch.optim.Muon):
    """torch's Muon for matrices divided by rows: each process orthogonalises every n-th of them, whole."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            steps = [self._momentum(p, group["momentum"]) for p in matrices]
            while matrices:
                count = dist.get_world_size(shard_group(matrices[0]))
                self._round(matrices[:count], steps[:count], group)
                matrices, steps = matrices[count:], steps[count:]

    def _momentum(self, matrix: DTensor, decay: float) -> Tensor:
        """Adds this step's gradient to its moving average. Returns the shard of Nesterov's."""
        mean = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
        gradient: Any = matrix.grad
        mean.lerp_(gradient, 1 - decay)
        return gradient.lerp(mean, decay).to_local()

    def _round(self, matrices: Sequence[DTensor], steps: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Updates as many matrices as there are processes, or fewer; process r orthogonalises number r."""
        processes = shard_group(matrices[0])
        rank, count = dist.get_rank(processes), dist.get_world_size(processes)
        sent = [step.numel() for step in steps] + [0] * (count - len(steps))
        received = [0] * count
        whole = torch.zeros(matrices[rank].shape if rank < len(matrices) else (0, 0), device=steps[0].device)
        if rank < len(matrices):
            rows, columns = whole.shape
            share = -(-rows // count)
            received = [columns * max(0, min(share, rows - i * share)) for i in range(count)]
        gradient = exchanged(torch.cat([step.flatten() for step in steps]), sent, received, processes)
        if rank < len(matrices):  # a step from 0, without memory, is the orthogonalised gradient
            parameter = nn.Parameter(whole)
            parameter.grad = gradient.view_as(whole)
            torch.optim.Muon([parameter], lr=group["lr"], weight_decay=0.0, momentum=0.0, nesterov=False).step()
            whole = parameter.detach()
        changes = exchanged(whole.flatten(), received, sent, processes).split(sent)
        for matrix, change in zip(matrices, changes):
            local = matrix.to_local()
            local.mul_(1 - group["lr"] * group["weight_decay"]).add_(change.view_as(local))


class AllGather:
    """How FSDP gathers weights, watched."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        WATCH.arrive()
        return distributed.all_gather_single(output_tensor, input_tensor, group, async_op)


class ReduceScatter(AllGather):
    """How FSDP adds up gradients, after `contribute` has seen this process's."""

    def __init__(self, contribute: Callable[[Tensor], None]):
        self._contribute = contribute

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self._contribute(input_tensor)
        return distributed.reduce_scatter_single(output_tensor, input_tensor, op, group, async_op)


def shard_group(tensor: DTensor) -> dist.ProcessGroup:
    """The processes that have the shards of a tensor, one each."""
    return tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1)


def shard(
    model: nn.Module, dtype: torch.dtype, reshard_after_forward: bool, sharing: WeightShares, **settings: Any
) -> None:
    """Divides a model. The blocks' matrices are gathered in `dtype`, block by block, the rest at once and as it is.

    The rest includes the blocks' norms and routers, which compute in float32: gathered in their block, they would
    interrupt its compiled code. autocast alone would keep a copy in `dtype` of each gathered matrix until the whole
    forward pass ends. Shares of the blocks' matrices are divided among the processes that have the same ones.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    shares = {p for name, p in model.named_parameters() if name in sharing.shares}
    matrices = shares or {p for block in blocks for p in block.parameters()}
    if dtype != torch.float32:
        matrices -= {p for block in blocks for p in exact_parameters(block)}
    fully_shard(model, ignored_params=matrices, **settings)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings |= {"mp_policy": policy, "reshard_after_forward": reshard_after_forward}
    settings |= {"mesh": sharing.copies} if shares else {}
    for block in blocks:
        fully_shard(block, ignored_params={*block.parameters()} - matrices, **settings)


def exact_parameters(block: Block) -> Iterator[nn.Parameter]:
    for name, module in block.named_modules():
        if isinstance(module, NORMS) or name.endswith("router"):
            yield from module.parameters()


class Sharded(Parallel):
    """Processes with a shard each; with several `replicas`, as many groups of processes each divide a whole model."""

    is_sharded = True
    muon = ShardedMuon

    def __init__(
        self,
        device: torch.device,
        dtype: str = "float32",
        reshard_after_forward: bool = True,
        replicas: int = 1,
        offload: bool = False,
    ):
        """`offload` keeps the shards in the CPU's memory, where the optimizer updates them."""
        self.dtype, self.reshard_after_forward = DTYPES[dtype], reshard_after_forward
        shape, names = (replicas, WORLD_SIZE // replicas), ("replicas", "shards")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self.mesh = mesh if replicas > 1 else mesh["shards"]
        self.offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
        self.shards_on = torch.device("cpu") if offload else device

    def place(
        self, model: nn.Module, device: torch.device, unused: bool = False, sharing: WeightShares | None = None
    ) -> nn.Module:
        """Divides the main process's model among all. The others need not have weights: see `meta_device`."""
        whole = model.state_dict() if IS_MAIN else model.to("meta").state_dict()
        self._skeleton = copy.deepcopy(model.to("meta"))  # undivided, without weights
        sharing = sharing or WeightShares(1, device)
        sharing.divide(cast(GPT, model))
        return self._divide(model, whole, device, sharing)

    def place_frozen(self, model: nn.Module, device: torch.device) -> nn.Module:
        whole = model.state_dict() if IS_MAIN else model.to("meta").state_dict()
        return self._divide(model.to("meta").requires_grad_(False), whole, device, WeightShares(1, device))

    def _divide(
        self, model: nn.Module, whole: dict[str, Tensor], device: torch.device, sharing: WeightShares
    ) -> nn.Module:
        shard(model, self.dtype, self.reshard_after_forward, sharing, mesh=self.mesh, offload_policy=self.offload)
        model.to_empty(device=self.shards_on)
        for name, tensor in model.state_dict().items():
            value = whole[name].to(device) if IS_MAIN else torch.empty_like(whole[name], device=device)
            value = value.contiguous()
            dist.broadcast(value, 0)
            tensor.copy_(self.shard_of(sharing.share_of(value, name), tensor))
        for module in model.modules():  # the blocks find their buffers where they compute
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        gather, scatter = cast(Any, AllGather()), cast(Any, ReduceScatter(self.contribute))
        for module in [module for module in model.modules() if isinstance(module, FSDPModule)]:
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatter)
        return model

    def sharing_gradients(self, replica: FSDPModule, last: bool) -> contextlib.AbstractContextManager:
        """Every backward pass adds to the shards, as whole gradients may not fit; replicas share them in the last."""
        replica.set_requires_all_reduce(last)
        return contextlib.nullcontext()

    def total_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        norm: Any = super().total_norm(tensors)
        return norm.full_tensor()

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        with super().evaluating(model):
            try:
                yield
            finally:  # without a backward pass, gathered weights stay, and outlive the shards' next update
                for module in model.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    def gathered(self, tensor: Tensor) -> Tensor:
        whole = self.everywhere(tensor)
        return whole.cpu() if IS_MAIN and whole is not tensor else tensor

    def everywhere(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def held(self, weight: DTensor) -> tuple[int, Tensor]:
        return dist.get_rank(shard_group(weight)), weight.to_local().detach()

    def shard_of(self, whole: Tensor, like: Tensor) -> Tensor:
        if isinstance(whole, DTensor) or not isinstance(like, DTensor):  # read from shards; a buffer
            return whole
        shard = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to(like.device)
        return shard.clone()  # instead of a view, which would keep the whole

    def whole(self, model: M) -> M:
        tensors = {
            name: self.gathered(tensor) if isinstance(tensor, DTensor) else tensor.clone()  # a buffer
            for name, tensor in model.state_dict().items()
        }
        if not IS_MAIN:
            return model
        whole: Any = copy.deepcopy(self._skeleton)
        whole.load_state_dict(tensors, assign=True)
        return whole
