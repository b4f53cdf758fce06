"""Learning rates: their schedules, and what suits a model of some size."""

import math
from typing import NamedTuple

from gpt_arc.training.config import TrainingConfig

HIGHEST = 0.01  # that follows from a model's size


class PublishedRate(NamedTuple):
    """A published learning rate, and how many parameters without embeddings the model has that it was published for."""

    rate: float
    parameters: float

    def at(self, parameters: int) -> float:
        """Returns the rate for a model of another size, in two digits. docs/results/learning_rates.md has measurements.

        A smaller model's is higher, up to HIGHEST; a larger one keeps the published rate, as InstructGPT's of 6B
        parameters kept that of 1.3B.
        """
        growth = math.sqrt(max(self.parameters / parameters, 1.0))
        return self.rate if growth == 1 else float(f"{min(self.rate * growth, HIGHEST):.2g}")


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Returns the learning rate of update `step`, from 0: linear warmup, then the schedule down to `final_lr`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "inverse_sqrt":
        return config.learning_rate * math.sqrt((config.warmup_steps + 1) / (step + 1))
    if step >= config.decay_end:
        return config.final_lr
    if config.schedule == "wsd":
        left = (config.decay_end - step) / (config.cooldown * config.decay_end) if config.cooldown else 1.0
        return config.final_lr + min(left, 1.0) * (config.learning_rate - config.final_lr)
    progress = (step - config.warmup_steps) / (config.decay_end - config.warmup_steps)
    height = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + height * (config.learning_rate - config.final_lr)


def warmup_linear(progress: float, warmup: float) -> float:
    """Returns the learning rate factor at `progress` (0 to 1): a rise to 1 at `warmup`, times a linear decay to 0.

    GPT-1 was fine-tuned this way (openai/finetune-transformer-lm opt.py).
    """
    return min(progress / warmup, 1.0) * (1 - progress)
