"""Ctrl-C, SIGTERM and a closed terminal: finish the step, save, leave."""

import signal

from gpt_arc import distributed


class StopSignal:
    """Notes the first such signal, so that a loop can end in good order; the same one again ends the process."""

    number = 0  # of the signal that came

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, self._note)

    def _note(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def anywhere(self) -> int:
        """The number of a signal that came to any of the processes, 0 if none did. All of them have to ask."""
        return max(distributed.gather(self.number))
