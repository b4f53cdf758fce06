"""Lenient and strict parsing of JSON: a line of a .jsonl file, a value of one type, a small file."""

import json
from pathlib import Path
from typing import Any, TypeVar

from gpt_arc.errors import UserError, first_line
from gpt_arc.reading import read_json

T = TypeVar("T", dict, list)
DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN and infinities, which JSON lacks, are null


def parse_line(line: str, place: str) -> Any:
    """Parse a line of JSON. Raises UserError naming `place` if it isn't valid."""
    try:
        return DECODER.decode(line)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise UserError(f"{place} is not a line of JSON: {first_line(error)}") from None


def parse_as(kind: type[T], text: str) -> T | None:
    """Parse JSON, a dict or a list. Returns None if `text` is anything else."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, kind) else None


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file. Returns None if the file is missing or holds anything else."""
    try:
        return read_json(path)
    except UserError:
        return None
