"""Runs without a folder, for the tests of reports."""

from pathlib import Path

from gpt_arc.reports.content import RunContent
from gpt_arc.training import runs


def content(name="a", metrics=(), settings=None, **others):
    """A run without a folder."""
    about = runs.Summary(Path(name), "train", "o", "d", settings or {}, 1, 1, list(metrics), 0.0, 0)
    values = {"parameters": None, "data": {}, "samples": [], "checkpoints": [], "figures": {}, "problems": []}
    return RunContent(about, "finished", **values | others)
