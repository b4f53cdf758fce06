"""What a run logs: means between lines, and metrics.jsonl."""

import contextlib
import json
from pathlib import Path
from typing import Any

from gpt_arc.files import write_file


class Meter:
    """Mean loss and rate since they were last taken."""

    loss_sum, tokens, seconds = 0.0, 0, 0.0

    def add(self, loss_sum: float, tokens: int, seconds: float) -> None:
        self.loss_sum += loss_sum
        self.tokens += tokens
        self.seconds += seconds

    def take(self) -> tuple[float, float] | tuple[None, None]:
        """Mean loss in nats a token, and tokens a second, None if there were none; starts anew."""
        loss_sum, tokens, seconds = self.loss_sum, self.tokens, self.seconds
        self.loss_sum, self.tokens, self.seconds = 0.0, 0, 0.0
        return (loss_sum / tokens, tokens / seconds) if tokens else (None, None)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, in the order of steps."""

    def __init__(self, directory: Path, keep_until: int):
        """Append to the run's file, dropping what a killed run logged after step `keep_until`."""
        self.path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= keep_until]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "step" in line]
