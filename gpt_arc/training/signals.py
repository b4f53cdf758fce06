"""Ctrl-C, SIGTERM and a closed terminal: finish the step, save and exit."""

import signal

from gpt_arc import distributed


class StopSignal:
    """Records the first such signal, so that a loop can end cleanly; the same signal again ends the process."""

    number = 0  # of the signal received

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, self._record)

    def _record(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def anywhere(self) -> int:
        """Returns the number of a signal that any process has received, or 0. Every process must call this."""
        return max(distributed.gather(self.number))
