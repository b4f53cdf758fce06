"""Statistics of next sentences."""

import torch
from torch import Tensor

from gpt_arc import distributed
from model import Loss


class SentenceMeter:
    """Collects the next-sentence losses and choices of batches. Does nothing for a model that makes none."""

    def __init__(self, prefix: str = ""):
        """`prefix` begins the names of the figures."""
        self._prefix = prefix
        self._batches: Tensor | None = None  # (3,) sums over this step's batches, in this process
        self._sums = torch.zeros(3)  # over steps and processes

    def add(self, loss: Loss) -> None:
        """Adds a batch."""
        if loss.sentences is not None:
            self._batches = loss.sentences.detach() + (0.0 if self._batches is None else self._batches)

    def step(self, made: bool) -> None:
        """Ends a step. If its update was made, adds the batches of all processes, which must all call this."""
        sums, self._batches = self._batches, None
        if sums is not None and made:
            self._sums = self._sums.to(sums.device) + distributed.sum_over_ranks(sums)

    def take(self) -> dict[str, float]:
        """Returns means over pairs since the last call, of the loss in nats and of right choices; {} without any."""
        (loss, right, pairs), self._sums = self._sums.tolist(), torch.zeros(3)
        if not pairs:
            return {}
        name = f"{self._prefix}next_sentence"
        return {f"{name}_loss": loss / pairs, f"{name}_accuracy": right / pairs}
