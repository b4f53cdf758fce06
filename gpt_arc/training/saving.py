"""Saving where a disk may be full or gone: a run goes on, and tries again."""

import copy
from collections.abc import Callable
from typing import Any

from gpt_arc import distributed
from gpt_arc.distributed import say
from gpt_arc.errors import UserError


class Saving:
    """What a run has saved, and how often in a row it couldn't."""

    def __init__(self, progress: Any, step: int | None, allowed: int):
        """`progress` is the run's, as at its start, and `step` that of its last checkpoint.

        More failures in a row than `allowed` end the run.
        """
        self.progress, self.step, self.allowed = progress, step, allowed
        self._saved, self._failures = copy.copy(progress), 0

    def attempt(self, write: Callable[[], None], last: bool = False) -> None:
        """Calls `write`, which raises UserError or OSError if it can't.

        Raises UserError after too many failures, and for the `last` checkpoint of a run. Every process must call this.
        """
        reason = None
        try:
            write()
        except (UserError, OSError) as error:
            reason = str(error)
        reasons = [reason for reason in distributed.gather(reason) if reason]
        if not reasons:
            self.step, self._saved, self._failures = self.progress.step, copy.copy(self.progress), 0
            return
        self._failures += 1
        if last or self._failures > self.allowed:
            raise UserError(reasons[0])
        for name in ("best", "best_val_loss", "best_step"):  # the best checkpoint is one that exists
            if hasattr(self._saved, name):
                setattr(self.progress, name, getattr(self._saved, name))
        say(f"{reasons[0]}; training goes on, and the next checkpoint is tried again")
