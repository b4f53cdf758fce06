"""AdamW as the GPTs use it, and the learning rate over time."""

import math

import torch

from gpt_arc.config import TrainingConfig
from model import GPT


def build_optimizer(model: GPT, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on tensors of two or more dimensions, so not on biases and norms."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    assert len({id(p) for p in matrices + vectors}) == len(parameters) == len(matrices) + len(vectors)
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,  # which cpu, cuda and mps have
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Take the moments of a saved `state_dict`; rates, decay and betas stay those of the present settings."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of update `step` (0 is the first): a linear warmup, then the schedule down to `final_lr`."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return config.learning_rate
    if step >= config.decay_end:
        return config.final_lr
    progress = (step - config.warmup_iters) / (config.decay_end - config.warmup_iters)
    height = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + height * (config.learning_rate - config.final_lr)
