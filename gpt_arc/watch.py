"""Names the processes of a run that hang while the others wait for them, each with what it was doing.

Every process counts how often it has come to where processes wait for one another. A thread in it writes the count to
the store of the process group. If nothing has moved for a while, those with the lowest count keep the others waiting.
"""

import faulthandler
import socket
import sys
import threading
import time
import traceback
from typing import Any

import torch.distributed as dist

LONGEST_BEAT = 30  # seconds


class Watch:
    """The watch of this process, which `start` begins."""

    arrivals = 0
    _since = 0.0

    def arrive(self) -> None:
        """Counts that this process is about to wait for the others."""
        self.arrivals += 1
        self._since = time.monotonic()

    def start(self, patience: float) -> None:
        """Begins to watch, in a thread: where nothing moves for `patience` seconds, standard error names who hangs."""
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # with a connection of its own
        self._rank, self._processes, self._patience = dist.get_rank(), dist.get_world_size(), patience
        self._since = time.monotonic()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        beat, reported = min(LONGEST_BEAT, self._patience / 4), 0.0
        while True:
            try:
                self._store.set(self._key(self._rank), f"{self.arrivals} {time.time()} {socket.gethostname()}")
                if reported != self._since and time.monotonic() - self._since > self._patience:
                    reported = self._since
                    time.sleep(beat)  # until the others have written where they are
                    if reported == self._since:
                        self._report(beat)
            except (RuntimeError, OSError):  # the store is gone, and with it the run or its main process
                return
            if sys.__stderr__:  # this is printed where the thread can't: a call that never lets Python go on
                faulthandler.dump_traceback_later(self._patience + 2 * beat, file=sys.__stderr__)
            time.sleep(beat)

    def _report(self, beat: float) -> None:
        """Says which processes are behind: they themselves with their stacks, and the first of the others for all."""
        started = [rank for rank in range(self._processes) if self._store.check([self._key(rank)])]
        states = {rank: self._store.get(self._key(rank)).decode().split(" ") for rank in started}
        furthest = max(int(count) for count, *_ in states.values())
        behind = [rank for rank, (count, *_) in states.items() if int(count) < furthest]
        unheard = {rank: time.time() - float(heard) for rank, (_, heard, _) in states.items()}
        standstill = f"for {time.monotonic() - self._since:.0f} s"
        if self._rank in behind or not behind:
            reason = "while others wait for it" if behind else "and no process is behind the others"
            place = f"process {self._rank} on {socket.gethostname()}"
            say(f"{place} has not moved {standstill} {reason}; it is at:\n{main_stack()}")
        elif self._rank == min(rank for rank in states if rank not in behind):
            for rank in behind:
                silent = f", nor shown a sign of life for {unheard[rank]:.0f} s" * (unheard[rank] > 3 * beat)
                say(f"process {rank} on {states[rank][2]} keeps the others waiting {standstill}{silent}")

    def _key(self, rank: int) -> str:
        return f"gpt_arc/watch/{rank}"


WATCH = Watch()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main_stack() -> str:
    """Returns where the main thread is, as a traceback."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return "".join(traceback.format_stack(frame))
