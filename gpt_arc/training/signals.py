"""Ctrl-C, SIGTERM, a closed terminal, the end of torchrun and of the time allowed: finish the step, save and exit."""

import math
import os
import signal
import time

import torch.distributed as dist

from gpt_arc import distributed
from gpt_arc.settings import seconds_in

START = time.monotonic()  # of the program, nearly
PARENT = os.getppid()  # torchrun's agent, if it started this process


class StopSignal:
    """Records the first such signal, so that a loop can end cleanly; the same signal again ends the process."""

    received = 0

    def __init__(self, after: str | None = None):
        """`after` a time, such as 3h59m, the loop ends as if SIGTERM had come."""
        self._end = math.inf if after is None else START + seconds_in(after)
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):  # ignored under nohup
                signal.signal(number, self._record)

    def _record(self, number, frame):
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    @property
    def number(self) -> int:
        """The number of the signal received, SIGTERM if time is up or torchrun was killed and can't send one, or 0."""
        is_orphan = dist.is_torchelastic_launched() and os.getppid() != PARENT
        if not self.received and (is_orphan or time.monotonic() > self._end):
            self.received = signal.SIGTERM
        return self.received

    def anywhere(self) -> int:
        """Returns the number of a signal that any process has received, or 0. Every process must call this."""
        return max(distributed.gather(self.number))
