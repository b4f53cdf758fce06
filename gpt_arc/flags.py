"""The command line: tyro's, with a mistake told in one sentence."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import tyro

from gpt_arc.errors import UserError

T = TypeVar("T")


def parse_flags(
    cls: type[T],
    description: str | None,
    args: list[str],
    default: T | Any = tyro.MISSING_NONPROP,
    partly: bool = False,
) -> T:
    """An instance of the dataclass `cls` from `args`, flat: --n_layer=6, --n-layer 6, --compile=False.

    `default` gives the values of flags that are not named. Raises UserError; --help prints and exits. With `partly`,
    flags that are not those of `cls` are left to another call.
    """
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            parsed, unknown = tyro.cli(
                cls,
                description=description,
                args=args,
                default=default,
                return_unknown_args=True,
                use_underscores=True,
                add_help=not partly,
                config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_unboxed(shown.getvalue())) from None
    except ValueError as error:  # from a __post_init__: the values don't go together
        raise UserError(str(error)) from None
    if unknown and not partly:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UserError(f"the argument {flag} is not understood: write --name=value")
        name = flag.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, (known for known in _names(cls) if known != name), n=1)
        raise UserError(f"there is no flag {flag}; " + (f"did you mean --{near[0]}?" if near else "--help lists them"))
    return parsed


def _names(cls: type) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _names(field.type)
        else:
            yield field.name


def _unboxed(message: str) -> str:
    """The first part of a message that tyro has drawn a box around, in ASCII where it must, as a sentence."""
    lines = [line.strip("\u2502| ") for line in message.splitlines()[1:]]
    border = set("\u2500\u256d\u256e\u256f\u2570-+")
    lines = list(itertools.dropwhile(lambda line: set(line) <= border, lines))
    end = next((i for i, line in enumerate(lines) if set(line) <= border), len(lines))
    words = re.sub(r"^Error parsing (?!--)[^:]*: ", "", " ".join(lines[:end]))  # a table's name helps nobody
    words = words.removeprefix("Error parsing ")
    if wrong := re.match(
        r"(--\S+): (?:no type matching|Could not find|invalid literal|could not convert).*?('.*')", words
    ):
        words = f"{wrong[1]}: {wrong[2]} is not understood"  # in place of Python's types and functions
    return words.rstrip(".") + "; --help lists the flags and what they take"
