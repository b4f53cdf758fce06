"""A user's mistake is one paragraph and exit code 2; a bug of ours keeps its traceback."""

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable


class UserError(ValueError):
    """What the user asked for can't be done. The message says what, where and how to mend it."""


def first_line(error: BaseException) -> str:
    """What an error says first, which may be nothing."""
    return next(iter(str(error).strip().splitlines()), "")


def mute() -> None:
    """Send standard output nowhere from here on, once nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


LESS_MEMORY = "out of memory: a smaller batch, context or model takes less"


def is_of_memory(error: Exception) -> bool:
    """Whether there was not enough memory, as Python says it, torch of a GPU, torch of a CPU, or C++."""
    words = "DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", "Storage size calculation overflowed"
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def entry_point(main: Callable[[], int | None]) -> Callable[[], None]:
    """Wrap a script's `main`: exit with its return value, 2 on a mistake of the user's or the disk's, 130 on Ctrl-C."""

    @functools.wraps(main)
    def wrapped() -> None:
        among_several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        message = None
        sys.stdout = sys.stdout or open(os.devnull, "w")  # where it was closed
        sys.stderr = sys.stderr or open(os.devnull, "w")  # or what is printed there would go to standard output
        try:
            code = main() or 0
        except BrokenPipeError:  # the reader of our output (head, less) has gone: end as SIGPIPE would, quietly
            mute()
            sys.exit(128 + signal.SIGPIPE)
        except UserError as error:
            message, code = str(error), 2
        except OSError as error:
            place = f"{error.filename}: " if error.filename is not None else ""
            message, code = f"{place}{error.strerror or error}", 2
        except KeyboardInterrupt as interrupt:
            message, code = str(interrupt) or "interrupted", 130
        except Exception as error:
            if is_of_memory(error):
                message, code = f"{LESS_MEMORY} ({first_line(error) or 'Python has none left'})", 2
            elif not among_several:
                raise
            else:
                message, code = traceback.format_exc(), 1
        if message is not None:
            print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
        # An orderly exit would, after an error, wait for processes that wait for this one; and after a run, gloo's
        # threads may let go of their last tensors only when Python can no longer take them, which aborts the process.
        if among_several:
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)

    return wrapped
