"""Reads small files that others may have written: plain, bounded in size and checked against a schema.

    record = read_json(run / "run.json", Record)      # a dataclass of pydantic's, or a type such as dict[str, int]
    with reading(path):                               # whatever goes wrong in the block becomes a sentence
        state = torch.load(path, weights_only=True)

Both raise UserError, which names the file and tells a missing file from an unreadable, a damaged and a too large one.
"""

import contextlib
import functools
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from gpt_arc.errors import UserError, first_line, is_out_of_memory

LIMIT = 4 << 20  # bytes of a file of settings
FINITE = ConfigDict(allow_inf_nan=False)
EXPECTED = {  # by pydantic's type of error
    **{"string_type": "a text", "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false"},
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "dataclass_type"), "a table"),
}


@contextlib.contextmanager
def reading(path: Path | str, advice: str = "") -> Iterator[None]:
    """Runs the block, which reads the file `path`, and turns its errors into UserErrors that name their cause.

    A UserError of the block passes. `advice` says what to do about a damaged file.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {(error.strerror or first_line(error)).lower()}") from None
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # pyo3's, of a Rust library
            raise
        if is_out_of_memory(error):
            raise UserError(f"{path} can't be read: out of memory") from None
        raise UserError(f"{path} is damaged{advice and f', {advice}'}: {_reason(error)}") from None


def open_plain(path: Path | str) -> Any:
    """Opens a file to read its bytes. Raises UserError for a pipe, a device or a folder, whose reading may never end.

    Raises OSError if it can't be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a plain file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path | str, limit: int = LIMIT) -> bytes:
    """Returns the content of a plain file. Raises UserError if it is larger than `limit` bytes or can't be read."""
    with reading(path), open_plain(path) as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"{path} has more than {limit:,} bytes, the most that such a file may have")
        return content


def read_json(path: Path | str, schema: Any = dict[str, Any], limit: int = LIMIT) -> Any:
    """Returns the JSON in a file as an instance of `schema`. Raises UserError naming the file, key and value."""
    content = read_bytes(path, limit)
    with reading(path):
        return adapter_of(schema).validate_json(content, strict=True)


def read_toml(path: Path | str) -> dict[str, Any]:
    """Returns the content of a TOML file. Raises UserError if it can't be read or isn't valid."""
    content = read_bytes(path)
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        words = re.findall(rb"(?m)^\s*\w+\s*=\s*(True|False|None)\b", content)
        hint = "; TOML writes true and false in lower case, and leaves out what is None" if words else ""
        raise UserError(f"{path} is not valid TOML: {_reason(error)}{hint}") from None


@functools.cache
def adapter_of(schema: Any) -> TypeAdapter:
    """Returns pydantic's validator of a type, which takes longer to build than to use."""
    try:
        return TypeAdapter(schema, config=FINITE)
    except PydanticUserError:  # a dataclass or a TypedDict has a config of its own
        return TypeAdapter(schema)


def _reason(error: BaseException) -> str:
    """Returns what a damaged file has wrong, in a line."""
    if isinstance(error, ValidationError):
        return mistake_in(error)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, KeyError):
        return f"it lacks {first_line(error)}"
    return first_line(error) or type(error).__name__


def mistake_in(error: ValidationError) -> str:
    """Returns the first mistake in a file: its key, its value and what it must be."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "json_invalid":
        return f"it is not JSON: {first.get('ctx', {}).get('error')}"
    if first["type"] == "missing":
        return f"it lacks {key}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"it has the unknown key {key}"
    place = f"{key} = {json.dumps(first['input'], default=repr)[:60]}" if key else "it"
    if first["type"] == "value_error":
        problem = first.get("ctx", {}).get("error")
        return f"{place}: {problem}" if key else str(problem)
    rule = re.sub(r"^\w+ should", "must", first["msg"])  # such as "List should have at least 1 item"
    return f"{place} must be {EXPECTED[first['type']]}" if first["type"] in EXPECTED else f"{place} {rule}"
