"""How several processes train one model: with a replica each, or each with a shard of every tensor."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from gpt_arc import distributed
from gpt_arc.device import align
from gpt_arc.distributed import WORLD_SIZE
from gpt_arc.errors import UserError
from gpt_arc.watch import WATCH

if TYPE_CHECKING:
    from gpt_arc.training.weight_shares import WeightShares
    from model import GPT

M = TypeVar("M", bound=nn.Module)


class Parallel:
    """One process that trains alone, or several with a replica of the model each (DistributedDataParallel).

    `gpt_arc.training.sharded.Sharded` overrides what differs under FSDP.
    """

    is_sharded = False
    muon: type[torch.optim.Muon] | None = None  # instead of the optimizer's choice
    _sum: Tensor | None = None  # of the gradients that this process has contributed to the present update

    def place(
        self, model: nn.Module, device: torch.device, unused: bool = False, sharing: "WeightShares | None" = None
    ) -> nn.Module:
        """Moves a model to the device. Returns the module to call: the model, or its replica.

        `unused`: the loss doesn't depend on all of the trained weights. `sharing` divides some of them first.
        """
        if sharing:
            sharing.divide(cast("GPT", model))
        align(model)
        model.to(device)
        if WORLD_SIZE == 1:
            return model
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=unused)
        replica.register_comm_hook(None, self._reduce)
        return replica

    def place_frozen(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Does what `place` does for a model that isn't trained. Returns the module to call."""
        align(model)
        return model.to(device).requires_grad_(False)

    def _reduce(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.contribute(bucket.buffer())
        return allreduce_hook(bucket=bucket, process_group=dist.distributed_c10d._get_default_group())

    def contribute(self, gradient: Tensor) -> None:
        """Takes note of a gradient that this process is about to add to those of the others."""
        WATCH.arrive()
        total = gradient.sum()  # is not finite if an element isn't
        self._sum = total if self._sum is None else self._sum + total

    def sources(self, loss: Tensor | float) -> list[int]:
        """Ranks of processes whose `loss` or part of the update's gradient is not finite.

        Every process must call this.
        """
        parts = [float(loss), 0.0 if self._sum is None else self._sum.item()]
        return [rank for rank, finite in enumerate(distributed.gather(all(map(math.isfinite, parts)))) if not finite]

    def forget(self) -> None:
        """Begins another update."""
        self._sum = None

    def sharing_gradients(self, replica: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Context for a forward and a backward pass; processes share their gradients in the `last` one of a step."""
        WATCH.arrive()
        is_replica = isinstance(replica, DistributedDataParallel)
        return replica.no_sync() if is_replica and not last else contextlib.nullcontext()

    def total_norm(self, tensors: Iterable[Tensor]) -> Tensor:
        """The norm () of all elements of `tensors`, which belong to one model. Every process must call this."""
        return get_total_norm(tensors)

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Runs the block with the model in evaluation mode."""
        training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(training)

    def gathered(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of the model or its optimizer, whole in the main process. Every process must call this."""
        return tensor

    def everywhere(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of the model whole, in every process. Every process must call this."""
        return tensor

    def shard_of(self, whole: Tensor, like: Tensor) -> Tensor:
        """Returns what this process keeps of a tensor, divided like the weight `like`."""
        return whole

    def held(self, weight: Tensor) -> tuple[int, Tensor]:
        """Returns the number of the part of a weight that this process has, and that part."""
        return 0, weight.detach()

    def differing(self, weights: Iterable[Tensor]) -> list[int]:
        """Ranks of processes whose weights aren't, to the bit, what most have that hold the same parts of a model.

        Every process must call this.
        """
        parts = [self.held(weight) for weight in weights]
        total = torch.stack([part.view(torch.int32).sum(dtype=torch.int64) for _, part in parts]).sum()
        sums = distributed.gather((parts[0][0], total.item()))
        usual = {number: Counter(x for i, x in sums if i == number).most_common(1)[0][0] for number, _ in sums}
        return [rank for rank, (number, x) in enumerate(sums) if x != usual[number]]

    def check_replicas(self, weights: Iterable[Tensor], step: int, resume: str) -> None:
        """Raises UserError, naming the command `resume`, if `differing` finds a process.

        Every process must call this.
        """
        if ranks := self.differing(weights):
            raise UserError(
                f"step {step} isn't saved, since the weights of process {', '.join(map(str, ranks))} have come to "
                f"differ from the others': test that machine's memory; resume with: {resume}"
            )

    def whole(self, model: M) -> M:
        """Returns the model to save, whole in the main process. Every process must call this."""
        return model


REPLICATED = Parallel()


def check_divides(setting: str, count: int, devices: int | None = None) -> None:
    """Raises UserError unless `count` divides the number of processes, or of the `devices` that a dry run plans for."""
    if devices and devices % count:
        raise UserError(
            f"{setting} = {count} does not divide devices = {devices}: plan for --devices={count}, or set {setting} = 1"
        )
    if not devices and WORLD_SIZE % count:
        raise UserError(
            f"{setting} = {count} does not divide the number of processes, {WORLD_SIZE}: start {count} with torchrun "
            f"--nproc_per_node={count}, or set {setting} = 1"
        )
