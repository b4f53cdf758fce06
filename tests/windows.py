"""A process without what Windows lacks: modules, functions, signals, links.

    python tests/windows.py FOLDER        prepares text, trains, resumes and samples there
    python -m pytest -p windows FILES     runs tests; with tests/ in PYTHONPATH

Libraries are imported before, since they expect those things on Linux; os.geteuid and os.O_NONBLOCK stay for filelock.
"""

import concurrent.futures.process  # noqa: F401
import multiprocessing.managers  # noqa: F401
import os
import runpy
import signal
import sys
from pathlib import Path

import filelock.asyncio  # noqa: F401
import pydantic.dataclasses  # noqa: F401
import safetensors.torch  # noqa: F401
import tiktoken  # noqa: F401
import tokenizers  # noqa: F401
import torch.distributed.run
import torch.utils.flop_counter  # noqa: F401
from tqdm import tqdm  # noqa: F401

ROOT = Path(__file__).parents[1]
MODULES = "fcntl grp pty pwd resource termios tty".split()
SIGNALS = "SIGALRM SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2".split()
FUNCTIONS = """
chown fchmod fchown fork forkpty getgid getpgid getuid killpg mkfifo posix_fallocate posix_spawn pread preadv
pwrite pwritev register_at_fork sched_getaffinity setsid statvfs sync symlink sysconf
""".split()

for name in MODULES:
    sys.modules[name] = None
for module, names in ((os, FUNCTIONS), (signal, SIGNALS)):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)


def run(script, *arguments):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (script, arguments, stop.code)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    sys.path[:0] = [str(ROOT)]
    run("prepare/text.py", "--input", "book.txt", "--name=book", "--tokenizer=char")
    flags = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=2 --eval_iters=1 --warmup_iters=1".split()
    run("train.py", "book.toml", *flags, "--max_iters=2", "--device=cpu", "--compile=False", "--threads=1")
    run("train.py", "--resume=out/book", "--max_iters=3")
    run("sample.py", "out/book", "--start=FILE:start.txt", "--max_new_tokens=20", "--temperature=2", "--device=cpu")
