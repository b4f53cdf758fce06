"""Numbers as text: in tables, aligned or for Markdown, and as JSON."""

import json
import math
from collections.abc import Sequence
from typing import Any


def human(value: float, unit: str = "") -> str:
    """Format a number with a metric prefix: 1234567 becomes 1.23M."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{prefix}{unit}"
    return f"{value:.3g}{unit}"


def amount(value: float) -> str:
    """Format a large number as papers write it: 124M, 1.56B, 300B, 15T."""
    return human(value).replace("G", "B").replace("k", "K")


def counted(number: float, noun: str, form: str = ",") -> str:
    """Format a number and what it counts: "1 thread", "1,200 pairs". `noun` is singular and takes an s."""
    text = format(number, form)
    return f"{text} {noun}" + "s" * (text != "1")


def duration(seconds: float) -> str:
    """Format a time in the largest unit that it has two of: "40 seconds", "2.5 hours", "1,200 days"."""
    units = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))
    size, unit = next((each for each in units if seconds >= 2 * each[0]), units[-1])
    return counted(seconds / size, unit, ",.0f" if seconds >= 10 * size else ".2g")


def cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Sequence[Any]], widths: Sequence[int] | None = None) -> str:
    """Format rows as text, the first column aligned left and the others right. None becomes an empty cell.

    `widths` overrides the column widths, by default those of the widest cells.
    """
    cells = [[cell(value) for value in row] for row in rows]
    widths = widths or [max(map(len, column)) for column in zip(*cells)]
    aligned = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))] for row in cells]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as a Markdown table, the first as its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def to_json(value: Any, **options: Any) -> str:
    """Returns `value` as JSON. NaN and infinity, such as a correlation of constants, become null: JSON has neither.

    `options` are those of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
