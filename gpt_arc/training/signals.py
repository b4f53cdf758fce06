"""Ctrl-C, SIGTERM, a closed terminal and the end of torchrun: finish the step, save and exit."""

import os
import signal

import torch.distributed as dist

from gpt_arc import distributed

PARENT = os.getppid()  # torchrun's agent, if it started this process


class StopSignal:
    """Records the first such signal, so that a loop can end cleanly; the same signal again ends the process."""

    received = 0

    def __init__(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):  # ignored under nohup
                signal.signal(number, self._record)

    def _record(self, number, frame):
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    @property
    def number(self) -> int:
        """The number of the signal received, SIGTERM if torchrun was killed and can't send one, or 0."""
        if not self.received and dist.is_torchelastic_launched() and os.getppid() != PARENT:
            self.received = signal.SIGTERM
        return self.received

    def anywhere(self) -> int:
        """Returns the number of a signal that any process has received, or 0. Every process must call this."""
        return max(distributed.gather(self.number))
