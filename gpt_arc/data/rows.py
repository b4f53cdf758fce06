"""Rows of .jsonl, .json, .csv, .tsv and .parquet files, or of data sets on the hub, parsed by the caller.

Errors name the file and the bad row.

A .json file holds a list of objects, or lines as in a .jsonl.
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from gpt_arc.data.documents import read_text
from gpt_arc.data.formats import table_rows
from gpt_arc.data.hub_sets import hub_rows, names_hub_set
from gpt_arc.data.json_lines import parse_as
from gpt_arc.errors import UserError, first_line
from gpt_arc.extras import import_extra
from gpt_arc.tables import counted

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PARQUET_ROWS = 128  # held at a time
T = TypeVar("T")


def parsed_rows(path: Path, parse: Callable[[dict[str, Any], str], T]) -> list[T]:
    """Call `parse` with each row and its place, "FILE, line N"; it raises ValueError for a bad row.

    Returns the results. Raises UserError naming the file and line of the first bad row, and the number of others.
    """
    parsed, first, bad = [], None, 0
    for place, row in _rows(path):
        try:
            if row is None:
                raise ValueError("the line is not a JSON object")
            if None in row:  # `_rows` puts surplus cells there
                raise ValueError("the row has more columns than the first line")
            row = {name: None if value != value else value for name, value in row.items()}  # NaN is a missing value
            parsed.append(parse(row, place))
        except ValueError as error:
            first, bad = first or f"{place}: {error}", bad + 1
    if first:
        more = f"; {counted(bad - 1, 'more row')} of {len(parsed) + bad} can't be used" if bad > 1 else ""
        raise UserError(f"{first}{more}")
    if not parsed:
        raise UserError(f"{path} holds no examples")
    return parsed


def first_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Returns the rows among a file's first `count` that are objects. Raises UserError if it can't be read."""
    return [row for _, row in islice(_rows(path), count) if row]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yields the place and content of each row; the content of a JSON line that isn't an object is None."""
    if names_hub_set(path):
        yield from hub_rows(path)
        return
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise UserError(f"{path}: examples are read from {', '.join(FORMATS)} files, or from the hub: hf:OWNER/NAME")
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with open(path, encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
            if kind in (".jsonl", ".json"):
                items = parse_as(list, file.read()) if kind == ".json" else None
                for number, item in enumerate(items or (), start=1):
                    yield f"{path}, item {number}", item if isinstance(item, dict) else None
                if items is not None:
                    return
                file.seek(0)
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}, line {number}", parse_as(dict, line)
                return
            for number, row in table_rows(file, path):
                yield f"{path}, line {number}", row
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except UnicodeDecodeError:  # its offset counts from the block that was read; read_text gives the file's
        read_text(path)
        raise


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    parquet, arrow = import_extra("pyarrow.parquet"), import_extra("pyarrow")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with parquet.ParquetFile(path) as file:
            groups = ([group] for group in range(file.num_row_groups))  # all are held if several are asked for at once
            batches = (batch for group in groups for batch in file.iter_batches(PARQUET_ROWS, group, use_threads=False))
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
                yield f"{path}, row {number}", row
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as parquet: {first_line(error)}") from None


def text_of(row: dict[str, Any], column: str) -> str:
    """The text in a column; a number is converted. Raises ValueError saying what the column holds instead."""
    value = row.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(missing_column(row, column) if value is None else f"{column} = {shown(value)} is not a text")
    return value


def missing_column(row: dict[str, Any], column: str) -> str:
    """The message for a column that is empty or missing."""
    if column in row:
        return f"{column} is empty"
    return f"there is no column {column}; the columns are: {', '.join(row) or 'none'}"


def shown(value: Any) -> str:
    """The beginning of a value as JSON, for messages."""
    return json.dumps(value, default=str)[:60]  # a .parquet has dates and bytes
