"""What a run under FSDP needs on each of its accelerators, and the smallest number of them that holds it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from gpt_arc.nn.head_loss import logits_at_once
from gpt_arc.nn.names import Checkpointing
from gpt_arc.planning.cost import activation_bytes
from gpt_arc.tables import human
from model import GPT

FLOAT32 = 4  # bytes
ROOM = 0.9  # share of an accelerator's memory that tensors can fill; the rest is for its context, NCCL and gaps
# Bytes of memory, from data sheets; of the larger variant where there are several.
MEMORY = {
    "h200 nvl": 141e9,
    "h200": 141e9,
    "h100 nvl": 94e9,
    "h100 pcie": 80e9,
    "h100": 80e9,
    "h800": 80e9,
    "h20": 96e9,
    "a100": 80e9,
    "a800": 80e9,
    "a40": 48e9,
    "l40s": 48e9,
    "l40": 48e9,
    "l4": 24e9,
    "a10": 24e9,
    "v100": 32e9,
    "t4": 16e9,
    "mi300x": 192e9,
    "mi325x": 256e9,
    "mi250x": 128e9,
    "rtx 5090": 32e9,
    "rtx 4090": 24e9,
    "rtx 3090": 24e9,
}


@dataclass(frozen=True)
class Layout:
    """A model divided among `devices`, each of which computes at most `batch_size` sequences at once."""

    model: GPT  # on the meta device
    accelerator: str
    devices: int
    sequences_per_step: int
    batch_size: int
    dtype: str
    checkpointing: Checkpointing = False
    reshard: bool = True  # gathered blocks are dropped between forward and backward pass
    average: bool = False  # a moving average of the weights is kept
    offloaded: bool = False  # the shards lie in the CPU's memory, with their gradients and moments
    tensor_processes: int = 1  # which have a share of the blocks' matrices each, and divide it among devices
    replicas: int = 1  # whole models, each divided among an equal part of the devices

    def _divided(self, module: nn.Module) -> int:
        """Number of a module's weights that `tensor_processes` divide, or all if there is one."""
        return sum(p.numel() for p in module.parameters() if p.dim() > 1 or self.tensor_processes == 1)

    @property
    def share(self) -> int:
        """Sequences of a step that a device computes."""
        return math.ceil(self.sequences_per_step / self.devices)

    @property
    def micro_batch(self) -> int:
        """Sequences that a device computes at once."""
        return max(n for n in range(1, min(self.batch_size, self.share) + 1) if self.share % n == 0)

    @property
    def memory(self) -> dict[str, float]:
        """Bytes on each device at the peak of a step, by what they hold. Of AdamW's moments; Muon has fewer."""
        config = self.model.config
        blocks = [self._divided(block) / self.tensor_processes for block in self.model.blocks]
        outside, block = self.model.num_parameters() - self._divided(self.model.blocks), max(blocks)
        head, tokens = config.vocab_size * config.n_embd, self.micro_batch * config.block_size
        size = 2 if self.dtype in ("bfloat16", "float16") else 4
        logits = min(tokens * config.vocab_size, logits_at_once("cuda"))
        kept, recomputed = activation_bytes(config, tokens, size, self.checkpointing, self.tensor_processes)
        gathered = FLOAT32 * outside + size * (2 * block if self.reshard else sum(blocks))
        phases = [
            {  # the head's loss, with a copy of the head, and the logits, their logarithms and their gradients
                "gathered weights": gathered - self.reshard * size * 2 * block,
                "whole gradients": FLOAT32 * head,
                "activations": kept,
                "logits": logits * (2 * size + FLOAT32) + size * head,
            },
            {  # the backward pass of the last block, while the next one is gathered
                "gathered weights": gathered,
                "whole gradients": FLOAT32 * (head + block) + size * block,
                "activations": kept + recomputed,
            },
            {"gathered weights": FLOAT32 * outside, "whole gradients": 3 * FLOAT32 * outside},  # its end
        ]
        return ({} if self.offloaded else self.state) | max(phases, key=lambda phase: sum(phase.values()))

    @property
    def state(self) -> dict[str, float]:
        """Bytes of a device's shards, by what they hold."""
        shard = FLOAT32 * self.model.num_parameters() * self.replicas / self.devices
        return {"weights": shard * (2 if self.average else 1), "gradients": shard, "moments": 2 * shard}

    @property
    def communicated(self) -> float:
        """Bytes that each device receives in a step: in a micro-batch weights once or twice, and float32 gradients.

        With `tensor_processes` also the inputs of both sublayers, their outputs, and the gradients of both. `replicas`
        sum their shards' gradients once, in a ring.
        """
        config, others = self.model.config, self.tensor_processes - 1
        size = 2 if self.dtype in ("bfloat16", "float16") else 4
        gathers = (2 if self.reshard else 1) * size
        shards = self.devices / self.replicas
        received = self.model.num_parameters() * (shards - 1) / shards
        received -= self._divided(self.model.blocks) * others / self.tensor_processes
        states = others * self.micro_batch * config.block_size * config.n_embd
        exchanged = config.n_layer * states * size * (12 if self.checkpointing else 8)
        summed = 2 * FLOAT32 * self.model.num_parameters() / shards * (self.replicas - 1) / self.replicas
        return self.share // self.micro_batch * ((gathers + FLOAT32) * received + exchanged) + summed

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, two moments, and the average if there is one."""
        return self.model.num_parameters() * FLOAT32 * (4 if self.average else 3)

    def smallest(self) -> "Layout | None":
        """Returns the layout of the fewest devices that it fits, or None if no number of them suffices.

        The devices divide the sequences of a step, and are whole nodes of 8 if there are more than 8.
        """
        for devices in range(1, self.sequences_per_step + 1):
            divides = self.sequences_per_step % devices == 0 and devices % (self.tensor_processes * self.replicas) == 0
            if divides and (devices < 8 or devices % 8 == 0):
                layout = replace(self, devices=devices)
                if layout.fits:
                    return layout
        return None

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= ROOM * MEMORY[self.accelerator]

    def lines(self) -> Iterator[str]:
        """Yields what to print about the layout."""
        parts = ", ".join(f"{name} {human(size, 'B')}" for name, size in self.memory.items())
        beside = f"; and {human(sum(self.state.values()), 'B')} of the CPU's for each" if self.offloaded else ""
        yield f"memory         {human(sum(self.memory.values()), 'B')} on each device: {parts}{beside}"
        if self.accelerator in MEMORY:
            smallest, verdict = self.smallest(), "yes" if self.fits else "no"
            fewest = f"{smallest.devices:,} devices are enough" if smallest else "no number of devices is enough"
            room = f"{ROOM:.0%} of the {human(MEMORY[self.accelerator], 'B')} of each {self.accelerator}"
            yield f"fits           {verdict}, in {room}; {fewest}"
        yield f"communication  {human(self.communicated, 'B')} to each device a step"
        yield f"checkpoint     {human(self.checkpoint, 'B')}"
        if self.sequences_per_step % self.devices:
            yield (
                f"warning        {self.devices:,} devices can't divide the {self.sequences_per_step:,} sequences of a "
                "step equally: training needs a number that does"
            )
