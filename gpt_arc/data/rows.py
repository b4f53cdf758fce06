"""Rows of .jsonl, .csv and .tsv files, each parsed by a caller; a bad row is refused by file and line."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from gpt_arc.data.documents import read_text
from gpt_arc.errors import UserError

FORMATS = (".jsonl", ".csv", ".tsv")
T = TypeVar("T")


def parsed_rows(path: Path, parse: Callable[[dict[str, Any], str], T]) -> list[T]:
    """What `parse` makes of each row of a file and its place, "FILE, line N"; it raises ValueError for a bad one.

    Raises UserError naming file and line of the first bad row, and how many more there are.
    """
    found, first, bad = [], None, 0
    for place, row in _rows(path):
        try:
            if row is None:
                raise ValueError("the line is not a JSON object")
            if None in row:  # where `_rows` puts what has no column
                raise ValueError("the row has more columns than the first line names")
            found.append(parse(row, place))
        except ValueError as error:
            first, bad = first or f"{place}: {error}", bad + 1
    if first:
        more = f"; {bad - 1} more rows of {len(found) + bad} can't be used" if bad > 1 else ""
        raise UserError(f"{first}{more}")
    if not found:
        raise UserError(f"{path} holds no examples")
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Place and content of each row; None for a line of JSON that is no object. Raises UserError."""
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise UserError(f"{path}: labelled examples are read from {', '.join(FORMATS)} files")
    csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
            if kind == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}, line {number}", _json_object(line)
                return
            # a .tsv has no quotation marks of its own, as GLUE's files have none
            style = {"dialect": "excel"} if kind == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            reader = csv.reader(file, **style)
            columns, before = next(reader, []), reader.line_num
            twice = next((name for name in columns if columns.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{path}: two columns have the name {twice!r}")
            for cells in reader:
                if cells:
                    row = dict(itertools.zip_longest(columns, cells[: len(columns)]))
                    more = {None: cells[len(columns) :]} if len(cells) > len(columns) else {}
                    yield f"{path}, line {before + 1}", row | more
                before = reader.line_num
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except UnicodeDecodeError:  # which counts bytes from the piece that was read
        read_text(path)
        raise
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def text_of(row: dict[str, Any], column: str) -> str:
    """The text or number in a column. Raises ValueError saying what there is instead."""
    value = row.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(_absent(row, column) if value is None else f"{column} = {_shown(value)} is not a text")
    return value


def _absent(row: dict[str, Any], column: str) -> str:
    if column in row:
        return f"{column} is empty"
    return f"there is no column {column}; those there are: {', '.join(row) or 'none'}"


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def _json_list(text: str) -> list | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None
