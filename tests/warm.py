"""Popen for scripts, without the seconds in which Python imports torch: a fork of one process that has imported it.

The forks differ from `python SCRIPT ARGS` in nothing that scripts see, except that these modules are in sys.modules,
that the CPU's speed has been measured, and that variables that the interpreter or these modules read when they start,
such as PYTHONPATH, are those of pytest.
"""

import atexit
import ctypes
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

IMPORTED = """
torch torch._dynamo torch.distributed.run torch.nn.attention.flex_attention
numpy numpy.random pydantic.dataclasses safetensors.torch tomli_w tqdm
gpt_arc.chat.format gpt_arc.data.datasets gpt_arc.decoding.decoder gpt_arc.training.config gpt_arc.weights.huggingface
""".split()  # without gpt_arc.distributed, which reads the environment of each process
PR_SET_CHILD_SUBREAPER = 36
ONE_REQUEST = threading.Lock()


@functools.cache
def warm_process() -> socket.socket:
    """The channel to the process that forks; it ends with this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # the forks become children of this process
    channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # a process of several threads can't be forked safely
        )
    return channel


class WarmPopen(subprocess.Popen):
    """A Popen of [sys.executable, SCRIPT or "-c", ...] that is a child of this process like any other."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
        restore_signals, gid, gids, uid, umask, start_new_session, *others,
    ):  # fmt: skip
        arguments, environment = [os.fspath(arg) for arg in args[1:]], dict(os.environ if env is None else env)
        request = json.dumps((arguments, os.fspath(cwd or os.getcwd()), environment, start_new_session)).encode()
        streams = [given if given >= 0 else inherited for inherited, given in enumerate((p2cread, c2pwrite, errwrite))]
        with ONE_REQUEST:
            channel = warm_process()
            socket.send_fds(channel, [request], streams)
            self.pid = int(channel.recv(100))
            assert channel.recv(100) == b"adopted"
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


if sys.platform != "linux":
    WarmPopen = subprocess.Popen


def forked(channel: socket.socket) -> tuple[list[str], str, dict[str, str], bool]:
    """Fork for each request: returns, in the fork, its arguments, folder, environment and start_new_session."""
    while True:
        request, streams, *_ = socket.recv_fds(channel, 1 << 20, 3)
        if not request:
            sys.exit()
        if not os.fork():
            if pid := os.fork():  # an orphan at once, which the subreaper adopts
                channel.send(str(pid).encode())
                os._exit(0)
            break
        os.wait()
        channel.send(b"adopted")
        for descriptor in streams:
            os.close(descriptor)
    channel.close()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return json.loads(request)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    for name in IMPORTED:
        __import__(name)
    import torch

    from gpt_arc.device import resolve_dtype
    from gpt_arc.planning import cost

    cost.measured_flops = functools.cache(cost.measured_flops)
    for dtype in {"float32", resolve_dtype("auto", torch.device("cpu"))}:
        cost.measured_flops(getattr(torch, dtype))
    assert "gpt_arc.distributed" not in sys.modules
    gc.freeze()  # otherwise a fork would visit all objects, and so copy their pages, when it ends
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    arguments, folder, environment, start_new_session = forked(socket.socket(fileno=int(sys.argv[1])))
    if start_new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin, sys.stdout = open(0, newline="\n"), open(1, "w", newline="\n")
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", newline="\n")
    script = arguments[0]
    source = arguments.pop(1) if script == "-c" else Path(script).read_bytes()
    sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.realpath(script)) if script != "-c" else ""
    sys.modules["__main__"] = ModuleType("__main__")
    if script != "-c":
        sys.modules["__main__"].__file__ = script
    status = 0
    try:
        exec(compile(source, script, "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as stop:
        status = stop.code or 0
    if isinstance(status, str) or threading.active_count() > 1 or "WORLD_SIZE" in environment:
        sys.exit(status)
    # The end spares the 0.3 s in which Python destroys all modules, except where that may hang or crash: with threads
    # or a process group.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
