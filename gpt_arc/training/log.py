"""What a run logs: means between lines, metrics.jsonl, Weights & Biases."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from gpt_arc.distributed import say
from gpt_arc.errors import UserError, first_line
from gpt_arc.files import write_file
from gpt_arc.reading import open_plain, reading
from gpt_arc.tables import to_json
from gpt_arc.training.config import LoggingConfig


class Meter:
    """Mean loss and rate since the last `take`."""

    loss_sum, tokens, seconds = 0.0, 0, 0.0

    def add(self, loss_sum: float, tokens: int, seconds: float) -> None:
        self.loss_sum += loss_sum
        self.tokens += tokens
        self.seconds += seconds

    def take(self) -> tuple[float, float] | tuple[None, None]:
        """Returns the mean loss in nats a token and the tokens a second, None without any, and resets both."""
        loss_sum, tokens, seconds = self.loss_sum, self.tokens, self.seconds
        self.loss_sum, self.tokens, self.seconds = 0.0, 0, 0.0
        return (loss_sum / tokens, tokens / seconds) if tokens else (None, None)


class MetricsLog:
    """metrics.jsonl: one JSON object per line, in the order of steps. Also goes to Weights & Biases if wanted."""

    def __init__(self, directory: Path, keep_until: int, wandb: Any = None):
        """Append to the run's file, after dropping what a killed run logged beyond step `keep_until`.

        `wandb` is what `start_wandb` returned.
        """
        self.path, self._wandb = directory / "metrics.jsonl", wandb
        kept = [line for line in read_metrics(self.path) if line["step"] <= keep_until]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "ab", buffering=0)
        self._unwritten = b""
        self._warned = False

    def write(self, line: dict[str, Any]) -> None:
        """Write a line, without numbers that are not finite: JSON has none.

        If the disk is full, lines are kept until there is room: a log doesn't end a run.
        """
        finite = {name: v for name, v in line.items() if not isinstance(v, float) or math.isfinite(v)}
        self._unwritten += (to_json(finite) + "\n").encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                say(f"{self.path} can't be written ({error.strerror}): training goes on, later lines are tried again")
            self._warned = True
        if self._wandb:
            try:
                self._wandb.log(line, step=line["step"])
            except Exception as error:  # whatever kind it is, a log doesn't end a run
                say(f"Weights & Biases: {first_line(error)}; training goes on without it")
                self._wandb = None

    def close(self) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without those that are cut short or damaged."""
    if not path.exists():
        return []
    lines = []
    with reading(path), open_plain(path) as file:
        text = file.read().decode(errors="replace")
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and type(line.get("step")) is int]


def start_wandb(logging: LoggingConfig, settings: dict[str, Any], folder: Path) -> Any:
    """A run of Weights & Biases that keeps its files in `folder`. Raises UserError."""
    import wandb

    name = logging.wandb_run_name or folder.name
    try:
        return wandb.init(project=logging.wandb_project, name=name, config=settings, dir=folder)
    except wandb.Error as error:
        raise UserError(f"Weights & Biases: {error}; WANDB_MODE=offline logs without an account") from None
