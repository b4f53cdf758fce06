"""Imported first by scripts: Ctrl-C while they import torch and others ends them with 130, and without a traceback."""

import signal

from gpt_arc.errors import stop_at_once

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_at_once)  # until `entry_point`
