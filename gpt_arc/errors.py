"""A user's mistake is one paragraph and exit code 2; a bug of ours keeps its traceback."""

import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """What the user asked for can't be done. The message says what, where and how to mend it."""


def entry_point(main: Callable[[], int | None]) -> Callable[[], None]:
    """Wrap a script's `main`: exit with its return value, 2 on a mistake of the user's or the disk's, 130 on Ctrl-C."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            sys.exit(main() or 0)
        except BrokenPipeError:  # the reader of our output (head, less) has gone: nothing left to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except UserError as error:
            message, code = str(error), 2
        except OSError as error:
            place = f"{error.filename}: " if error.filename is not None else ""
            message, code = f"{place}{error.strerror or error}", 2
        except KeyboardInterrupt:
            message, code = "interrupted", 130
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(code)

    return wrapped
