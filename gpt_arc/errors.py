"""How scripts end: a user's mistake prints one paragraph and exits with code 2, a bug keeps its traceback."""

import contextlib
import errno
import functools
import io
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn


class UserError(ValueError):
    """The user asked for something impossible. The message says what is wrong, where, and how to fix it."""


class NotFinite(UserError):
    """A model computed NaN or infinity, training diverged, or a type can't hold a weight. The exit code is 1."""


def check_finite(numbers: Iterable[float]) -> None:
    """Raises NotFinite if a number that a model computed is NaN or infinite."""
    if not all(map(math.isfinite, numbers)):
        raise NotFinite("the model computes numbers that are not finite: use another checkpoint, or --dtype=float32")


@contextlib.contextmanager
def naming(model: object) -> Iterator[None]:
    """Runs the block so that a `NotFinite` names the model."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{model}: {error}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which may be empty."""
    return next(iter(str(error).strip().splitlines()), "")


def mute() -> None:
    """Redirect standard output to /dev/null, once its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_has_lost_output = False


def lose_output(error: OSError) -> None:
    """Handles a failed write to standard output by a run that must go on.

    If the reader has gone (`| head`), all further output is dropped. Otherwise, such as on a full disk, one line on
    standard error says so, and later lines are tried again.
    """
    global _has_lost_output
    if isinstance(error, BrokenPipeError):
        mute()
    elif not _has_lost_output:
        _complain(f"standard output can't be written ({error.strerror}): the run goes on, later lines are tried again")
    _has_lost_output = True


def _complain(message: str) -> None:
    """Print a line to standard error, which may be closed too."""
    with contextlib.suppress(OSError):
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)


def _mend(error: OSError) -> str:
    """How to mend what the system refused, to be appended to its message."""
    if error.errno == errno.EROFS:
        return ": work in a folder that can be written"
    if error.errno in (errno.EACCES, errno.EPERM):
        return ": change the permissions of this file or of the folder it is in, or work in another folder"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return ": a file has the name that a folder needs; rename it, or work in another folder"
    return ""


OUT_OF_MEMORY = "out of memory: a smaller batch, context or model takes less"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python, torch on a GPU, torch on a CPU and C++ each report it in their own way."""
    words = "DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", "Storage size calculation overflowed"
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def is_lost_process(error: BaseException) -> bool:
    """Whether another process ended while this one waited for it, as gloo reports it: it has printed why."""
    words = "Connection reset by peer", "Connection closed by peer"
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def check_early(check: Callable[[], Any]) -> None:
    """Runs `check` while a script still imports what it needs. An error ends the script as in `entry_point`."""
    try:
        check()
    except Exception as error:
        failure = error
    else:
        return

    def fail() -> NoReturn:
        raise failure

    entry_point(fail)()


def entry_point(main: Callable[[], int | None]) -> Callable[[], None]:
    """Wrap a script's `main`: exit with its return value, or with a code by error.

    2: UserError or OSError; 1: NotFinite; 130: Ctrl-C.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # by `startup`
            signal.signal(signal.SIGINT, signal.default_int_handler)
        is_distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
        message = None
        sys.stdout = sys.stdout or open(os.devnull, "w")  # if it was closed
        sys.stderr = sys.stderr or open(os.devnull, "w")  # otherwise a newly opened file could become its target
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a path may have characters that it can't encode
        try:
            code = main() or 0
        except BrokenPipeError:  # the reader of our output (head, less) has gone: exit quietly, as SIGPIPE would
            mute()
            sys.exit(128 + getattr(signal, "SIGPIPE", 13))  # Windows has none
        except UserError as error:
            message, code = str(error), 1 if isinstance(error, NotFinite) else 2
        except OSError as error:
            place = f"{error.filename}: " if error.filename is not None else ""
            message, code = f"{place}{error.strerror or error}{_mend(error)}", 2
        except KeyboardInterrupt as interrupt:
            message, code = str(interrupt) or "interrupted", 130
        except Exception as error:
            if is_out_of_memory(error):
                message, code = f"{OUT_OF_MEMORY} ({first_line(error) or 'Python has none left'})", 2
            elif not is_distributed:
                raise
            elif is_lost_process(error):
                message, code = "lost its connection to a process that ended: see the message of that one", 1
            else:
                message, code = traceback.format_exc(), 1
        try:
            sys.stdout.flush()
        except OSError as error:  # what is left can't be written, and Python would try again
            mute()
            if message is None and not _has_lost_output:
                message, code = f"standard output: {error.strerror}", 2
        if message is not None:
            _complain(message)
        # After an error, an orderly exit would wait for processes that are waiting for this one. After a run, gloo's
        # threads may release their last tensors when the interpreter is already gone, which aborts the process.
        if is_distributed:
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)

    return wrapped
