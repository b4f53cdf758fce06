"""Weights of which each process has a share, while it has the others whole."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gpt_arc.distributed import IS_MAIN, WORLD_SIZE
from gpt_arc.nn.meta import meta_device
from gpt_arc.training.parallel import Parallel
from model import GPT


class WeightShares:
    """Divides weights among the processes of a group, which together have a whole model.

    With several groups, one process in each has the same share. Under ddp each has a copy, whose gradients are summed
    over the groups; under fsdp they divide it again.
    """

    def __init__(self, processes: int, device: torch.device):
        """A group has this many `processes`; 1 divides nothing."""
        self.processes, self.n_copies = processes, WORLD_SIZE // processes
        # by name, the dimension that is divided, and the sizes of its sections; a process has an equal part of each
        self.shares: dict[str, tuple[int, Sequence[int]]] = {}
        if processes > 1:
            mesh = init_device_mesh(device.type, (self.n_copies, processes), mesh_dim_names=("copies", "parts"))
            self.copies, self.group = mesh["copies"], mesh.get_group("parts")

    def divide(self, model: GPT) -> None:
        """Keeps this process's shares of a whole model's weights."""
        for name, weight in model.named_parameters():
            if name in self.shares:
                weight.data = self.share_of(weight.data, name)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(self.shares))

    def share_of(self, whole: Tensor, name: str | None) -> Tensor:
        """Returns this process's share of a tensor that is divided like the weight `name`."""
        if name not in self.shares:
            return whole
        (dim, sections), rank = self.shares[name], dist.get_rank(self.group)
        return torch.cat([part.chunk(self.processes, dim)[rank] for part in whole.split(list(sections), dim)], dim)

    def gathered(self, tensor: Tensor, name: str, parallel: Parallel) -> Tensor:
        """Gathers a tensor that is divided like the weight `name`. Every process must call this.

        Returns the whole tensor, on the CPU, in the main process, and `tensor` in the others.
        """
        if name not in self.shares:
            return parallel.gathered(tensor)
        (dim, sections), share = self.shares[name], parallel.everywhere(tensor)
        shares = [torch.empty_like(share) for _ in range(self.processes)]
        dist.all_gather(shares, share.contiguous(), group=self.group)
        parts = zip(*(each.split([size // self.processes for size in sections], dim) for each in shares))
        return torch.cat([part for section in parts for part in section], dim).cpu() if IS_MAIN else tensor

    def reduce_gradients(self, gradients: Iterable[Tensor], parallel: Parallel) -> None:
        """Averages the gradients of this process's shares, as `parallel` does for all others.

        A share has already seen the tokens of its whole group; the other groups hold the missing terms.
        """
        for gradient in gradients:
            if parallel.is_sharded:  # fsdp has averaged it over the groups
                gradient /= self.processes
                continue
            parallel.contribute(gradient)
            gradient /= WORLD_SIZE
            if self.n_copies > 1:
                dist.all_reduce(gradient, group=self.copies.get_group())

    def whole(self, model: GPT, parallel: Parallel) -> GPT:
        """Returns, in the main process, the whole model, to be saved. Every process must call this."""
        if not self.shares:
            return parallel.whole(model)
        tensors = model.state_dict()
        for name, tensor in tensors.items():
            tensors[name] = self.gathered(tensor, name, parallel)
        if not IS_MAIN:
            return model
        with meta_device():
            whole = GPT(model.config)
        whole.load_state_dict(tensors, assign=True)
        return whole
