"""Imported first by scripts.

Ctrl-C while they import torch and others ends them at once, without a traceback; in the tenth of a second before, while
Python itself starts, Python prints one. Memory of a GPU grows in segments that can be extended, so that batches of
different lengths leave fewer holes; PYTORCH_ALLOC_CONF, if it is set, wins.
"""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `entry_point`: an exception in an import could be lost
if hasattr(signal, "pthread_sigmask"):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # `cli.run` blocks it while Python starts
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
