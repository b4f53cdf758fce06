"""Imported first by scripts.

Ctrl-C while they import torch and others ends them with 130, and without a traceback. Memory of a GPU grows in segments
that can be extended, so that batches of different lengths leave fewer holes; PYTORCH_ALLOC_CONF, if it is set, wins.
"""

import os
import signal

from gpt_arc.errors import stop_at_once

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_at_once)  # until `entry_point`
