"""The mean loss over a split, in all processes together."""

from collections.abc import Iterable
from typing import Any

import torch

from gpt_arc import distributed
from gpt_arc.device import autocast
from gpt_arc.training.sentences import SentenceMeter


@torch.no_grad()
def mean_loss(
    model: Any,
    batches: Iterable[tuple[list[Any], float]],
    device: torch.device,
    dtype: str,
    sentences: SentenceMeter | None = None,
) -> float:
    """Returns the mean cross-entropy in nats over the targets in the batches of all processes.

    A batch is the model's arguments, on the device, and its weight: 0 if it only keeps processes in step, otherwise 1.
    `sentences`, if given, collects next sentences.
    """
    sentences = sentences or SentenceMeter()
    sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for batch, weight in batches:
        with autocast(device, dtype):
            loss = model(*batch)
        sums += weight * torch.stack((loss.total, loss.count))
        sentences.add(loss)
    sentences.step(True)
    total, count = distributed.sum_over_ranks(sums).tolist()
    return total / count
