"""Saving where a disk may be full or gone: a run goes on, and tries again."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

from gpt_arc import distributed
from gpt_arc.distributed import say
from gpt_arc.errors import UserError


class Saving:
    """What a run has saved, and how often in a row it couldn't."""

    def __init__(self, progress: Any, step: int | None, allowed: int, background: bool = False):
        """`progress` is the run's, as at its start, and `step` that of its last checkpoint.

        More failures in a row than `allowed` end the run. In the `background`, a thread writes checkpoints while
        training goes on, and the processes' threads communicate in `group`.
        """
        self.progress, self.step, self.allowed = progress, step, allowed
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if background else None
        self._saved, self._failures = copy.copy(progress), 0
        self._writing = copy.copy(progress)  # of the checkpoint that is being written
        self._end: Callable[[], None] | None = None  # waits for it
        self._thread = ThreadPoolExecutor(1) if background else None

    def staged(self, state: dict[str, Any], shards: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns copies, in the CPU's memory, if training goes on while they are written; else the arguments."""
        if self._thread is None:
            return state, shards
        from torch.distributed.checkpoint import staging  # takes a second to import

        stager = staging.DefaultStager(staging.StagingOptions(False, False, False, False))
        try:
            return copy.deepcopy(state), cast(Any, stager.stage(shards))
        finally:
            stager.close()

    def attempt(self, write: Callable[[], None], last: bool = False) -> None:
        """Calls `write`, which raises UserError or OSError if it can't.

        Raises UserError after too many failures, and for the `last` checkpoint of a run. Every process must call this.
        """
        self.wait()
        self._writing = copy.copy(self.progress)
        self._end = self._thread.submit(write).result if self._thread else write
        if last or not self._thread:
            self.wait(last)

    def wait(self, last: bool = False) -> None:
        """Waits until the checkpoint of `attempt` is written; raises what that raises. Every process must call this."""
        if self._end is None:
            return
        end, self._end, reason = self._end, None, None
        try:
            end()
        except (UserError, OSError) as error:
            reason = str(error)
        reasons = [reason for reason in distributed.gather(reason) if reason]
        if not reasons:
            self.step, self._saved, self._failures = self._writing.step, self._writing, 0
            return
        self._failures += 1
        if last or self._failures > self.allowed:
            raise UserError(reasons[0])
        for name in ("best", "best_val_loss", "best_step"):  # the best checkpoint is one that exists
            if hasattr(self._saved, name):
                setattr(self.progress, name, getattr(self._saved, name))
        say(f"{reasons[0]}; the run goes on, and tries again")
