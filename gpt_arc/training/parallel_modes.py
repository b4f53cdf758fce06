"""What the setting `parallel` means for the processes of a run."""

import torch

from gpt_arc.distributed import WORLD_SIZE
from gpt_arc.errors import UserError
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.parallel import REPLICATED, Parallel, check_divides


def make_parallel(config: TrainingConfig, device: torch.device, dtype: str) -> Parallel:
    """Returns what the setting `parallel` means for this number of processes."""
    if config.parallel != "fsdp" or WORLD_SIZE == 1:
        return REPLICATED
    from gpt_arc.training.sharded import Sharded  # takes a second to import

    return Sharded(device, dtype, config.reshard_after_forward, config.replicas, config.offload_optimizer)


def check_parallel(config: TrainingConfig, devices: int | None = None) -> None:
    """Raises UserError if the processes can't be divided as set. `devices`: see `check_divides`."""
    if config.parallel == "none" and WORLD_SIZE > 1:
        raise UserError(f'parallel = "none" is for one process, and torchrun started {WORLD_SIZE}: use ddp or fsdp')
    check_divides("replicas", config.replicas, devices)
