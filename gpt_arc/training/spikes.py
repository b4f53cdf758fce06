"""Spikes of the loss: back to the last checkpoint, and on without the batches read since (PaLM, arXiv:2204.02311)."""

import math
import statistics
from collections import deque
from pathlib import Path

from gpt_arc import distributed
from gpt_arc.distributed import say
from gpt_arc.errors import NotFinite
from gpt_arc.training.checkpoints import load_state, restore_state
from gpt_arc.training.log import MetricsLog
from gpt_arc.training.optim import Updater
from gpt_arc.training.plan import Progress
from gpt_arc.training.saving import Saving
from gpt_arc.weights.checkpoint_folders import named_checkpoint
from gpt_arc.weights.directory import load_model

RECENT, LEAST = 100, 10  # losses to compare with, at most and at least
MOST = 3  # returns to one checkpoint


class Spikes:
    """Compares each loss of a run with the recent ones."""

    def __init__(self, factor: float | None, folder: Path | None, progress: Progress, updater: Updater, saving: Saving):
        """A loss above `factor` times the median of the recent ones is a spike. None: no loss is."""
        self.factor = math.inf if factor is None else factor
        self.folder, self.progress, self.updater, self.saving = folder, progress, updater, saving
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._step, self._returns = -1, 0  # of the last return

    def rewind_after(self, loss: float, log: MetricsLog | None) -> bool:
        """Goes back to the last checkpoint if the last step's loss is a spike, and on with other batches.

        Returns whether it was. Raises NotFinite after several returns to one checkpoint. Every process must call this.
        """
        progress = self.progress
        usual = statistics.median(self._recent) if len(self._recent) >= LEAST else math.inf
        checkpoint = None
        if loss > self.factor * usual and self.folder:
            self.saving.wait()
            checkpoint = distributed.from_main(named_checkpoint(self.folder, "last"))
        if checkpoint is None:
            self._recent.append(loss)
            return False
        spike = f"step {progress.step}: the loss, {loss:.4f}, is {loss / usual:.1f} times the usual one"
        self._rewind(checkpoint)
        self._recent.clear()
        if log:
            log.rewind(progress.step)
        say(f"{spike}: back to step {progress.step}, and on without the batches read since")
        self._step, self._returns = progress.step, self._returns + 1 if progress.step == self._step else 1
        if self._returns > MOST:
            raise NotFinite(f"the loss has spiked {self._returns} times after step {self._step}: lower learning_rate")
        return True

    def _rewind(self, checkpoint: Path) -> None:
        """Restores what a checkpoint holds, except the counts of what has been done since."""
        state = load_state(checkpoint, on_disk=True)
        self.updater.put_weights(load_model(checkpoint)[0])
        restore_state(self.updater, state, checkpoint, self.updater.device)
        kept = {name: getattr(self.progress, name) for name in ("consumed", "skipped", "seconds")}
        vars(self.progress).update(state["progress"] | kept, rewinds=self.progress.rewinds + 1)
