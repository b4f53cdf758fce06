"""Imported first by scripts.

Ctrl-C while they import torch and others ends them at once, without a traceback; in the tenth of a second before, while
Python itself starts, Python prints one. Memory of a GPU grows in segments that can be extended, so that batches of
different lengths leave fewer holes; PYTORCH_ALLOC_CONF, or its older name PYTORCH_CUDA_ALLOC_CONF, wins if it is set.
A Python without torch, as in a terminal where the environment isn't active, gets one sentence.
"""

import importlib.util
import os
import signal
import sys

if importlib.util.find_spec("torch") is None:
    print(
        f"{sys.executable} has no torch: activate the environment that gpt-arc is installed in "
        "(source .venv/bin/activate), or install it: pip install -e .",
        file=sys.stderr,
    )
    sys.exit(2)

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `entry_point`: an exception in an import could be lost
if hasattr(signal, "pthread_sigmask"):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # `cli.run` blocks it while Python starts
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
