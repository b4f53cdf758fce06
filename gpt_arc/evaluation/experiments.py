"""Experiments of several runs, which continue where they stopped."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.reading import read_json
from gpt_arc.tables import to_json


def run_missing(
    file: Path, settings: dict[str, Any], cases: Iterable[dict[str, Any]], run: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """Runs the cases that the JSON `file` has no result for, and returns all results of the file, old and new.

    A result is a case, updated by what `run(**case)` returns. The file is written after each run. Raises UserError if
    it has results with other settings.
    """
    report = read_json(file) if file.exists() else {"settings": settings, "runs": []}
    if report["settings"] != settings:
        raise UserError(f"{file} has runs with {report['settings']}, not {settings}: name another --output")
    file.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if not any(case.items() <= result.items() for result in report["runs"]):
            report["runs"].append(case | run(**case))
            write_file(file, to_json(report) + "\n")
    return report["runs"]
