"""Weights of which each process has a share, while it has the others whole."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gpt_arc.distributed import IS_MAIN, WORLD_SIZE
from gpt_arc.nn.meta import meta_device
from model import GPT


class WeightShares:
    """Divides weights among the processes of a group, which together have a whole model.

    If a group has fewer processes than there are, the gradients of a share are summed over the groups.
    """

    def __init__(self, processes: int, device: torch.device):
        """A group has this many `processes`; 1 divides nothing."""
        self.processes, self.n_copies = processes, WORLD_SIZE // processes
        # the dimension that is divided, and the sizes of its sections, of each of which a process has an equal part
        self.shares: dict[Tensor, tuple[int, Sequence[int]]] = {}
        if processes > 1:
            mesh = init_device_mesh(device.type, (self.n_copies, processes), mesh_dim_names=("copies", "parts"))
            self.copies, self.group = mesh.get_group("copies"), mesh.get_group("parts")

    def divide(self, weight: Tensor, dim: int, sections: Sequence[int]) -> None:
        """Keeps this process's share of a whole weight."""
        self.shares[weight] = dim, sections
        weight.data = self.share_of(weight.data, weight)

    def hide_from_ddp(self, model: GPT) -> None:
        names = [name for name, parameter in model.named_parameters() if parameter in self.shares]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)

    def share_of(self, whole: Tensor, weight: Tensor) -> Tensor:
        """Returns this process's share of a tensor that is divided like `weight`."""
        (dim, sections), rank = self.shares[weight], dist.get_rank(self.group)
        return torch.cat([part.chunk(self.processes, dim)[rank] for part in whole.split(list(sections), dim)], dim)

    def gathered(self, share: Tensor, weight: Tensor) -> Tensor:
        """Gathers all shares of a tensor that is divided like `weight`.

        Returns the whole tensor, on the CPU, in the main process, and `share` in the others.
        """
        dim, sections = self.shares[weight]
        shares = [torch.empty_like(share) for _ in range(self.processes)]
        dist.all_gather(shares, share.contiguous(), group=self.group)
        parts = zip(*(each.split([size // self.processes for size in sections], dim) for each in shares))
        return torch.cat([part for section in parts for part in section], dim).cpu() if IS_MAIN else share

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of this process's shares."""
        return [p.grad for p in self.shares if p.grad is not None]

    def reduce_gradients(self) -> None:
        """Averages the gradients of this process's shares, as DistributedDataParallel does for all other parameters.

        A share has already seen the tokens of its whole group; the other groups hold the missing terms.
        """
        for gradient in self.gradients:
            gradient /= WORLD_SIZE
            if self.n_copies > 1:
                dist.all_reduce(gradient, group=self.copies)

    def whole(self, model: GPT) -> GPT:
        """Returns, in the main process, the whole model, to be saved. Every process must call this."""
        if not self.shares:
            return model
        tensors = model.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            tensors[name] = self.gathered(tensor.data, tensor) if tensor in self.shares else tensor.data
        if not IS_MAIN:
            return model
        with meta_device():
            whole = GPT(model.config)
        whole.load_state_dict(tensors, assign=True)
        return whole
