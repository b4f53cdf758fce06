"""What a report says about a run, read from its folder. Files may be missing, damaged or still growing."""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt_arc.data.datasets import find_dataset, recorded_tokens
from gpt_arc.errors import UserError
from gpt_arc.files import follow
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.reading import read_bytes, read_json
from gpt_arc.reports.attention import PromptAttention, prompt_attention
from gpt_arc.reports.images import ShownImage, first_images, learns_images
from gpt_arc.training.runs import Summary, is_running, size_of, summary
from gpt_arc.weights.checkpoint_folders import checkpoints, named_checkpoint, step_of
from gpt_arc.weights.directory import load_config, reads_images
from model import GPT

SAMPLE = re.compile(r"^--- step (\d+)\n", re.MULTILINE)  # see `MetricsLog.write_sample`
SAMPLES = 200  # the latest ones are shown
SAMPLES_LIMIT = 64 << 20  # bytes of samples.txt


class Sample(NamedTuple):
    step: int
    text: str


class Checkpoint(NamedTuple):
    name: str
    step: int | None
    written: float  # time
    size: int  # bytes
    links: str  # last, best, or both


@dataclass(frozen=True)
class RunContent:
    """A run, as a report shows it."""

    summary: Summary
    state: str
    parameters: str | None  # None before the first checkpoint
    data: dict[str, str]  # by dataset
    samples: list[Sample]
    checkpoints: list[Checkpoint]
    figures: dict[str, Any]  # of report.json
    problems: list[str]  # why something isn't shown
    attention: PromptAttention | None = None
    images: Sequence[ShownImage] = ()

    @property
    def name(self) -> str:
        return self.summary.folder.name

    @property
    def best(self) -> tuple[float, int] | None:
        """The lowest val loss and its step."""
        lines = self.summary.metrics
        return min(((line["val_loss"], line["step"]) for line in lines if "val_loss" in line), default=None)

    def last(self, metric: str) -> float | None:
        """Returns the latest value of a metric."""
        return next((line[metric] for line in reversed(self.summary.metrics) if metric in line), None)


def read_run(folder: Path, prompt: str | None = None) -> RunContent:
    """Reads a run folder, and its model's attention in a prompt.

    Raises UserError if what started the run, run.json or config.toml, can't be read.
    """
    running = is_running(folder)
    run, problems = summary(folder), []

    def attempt(read: Any, default: Any) -> Any:
        """Returns what `read` returns, or `default` after noting why it can't."""
        try:
            return read()
        except UserError as error:
            problems.append(str(error))
            return default

    last = named_checkpoint(folder, "last")
    samples, figures = folder / "samples.txt", folder / "report.json"
    pictures = learns_images(run.stage, run.settings, last is not None and reads_images(last))
    return RunContent(
        run,
        "running" if running else {True: "finished", False: "stopped", None: ""}[run.finished],
        attempt(lambda: _parameters(last), None) if last else None,
        {name: attempt(lambda name=name: _data(name), "") for name in filter(None, run.data.split(", "))},
        attempt(lambda: read_samples(samples), []) if samples.exists() else [],
        read_checkpoints(folder),
        attempt(lambda: read_json(figures), {}) if figures.exists() else {},
        problems,
        attempt(lambda: prompt_attention(folder, prompt), None) if prompt else None,
        attempt(lambda: first_images(pictures), []) if pictures else [],
    )


def read_samples(path: Path) -> list[Sample]:
    """Returns the latest texts of a samples.txt. Raises UserError if it can't be read."""
    text = read_bytes(path, SAMPLES_LIMIT).decode(errors="replace")
    _, *parts = SAMPLE.split(text)
    steps, texts = parts[::2], parts[1::2]
    return [Sample(int(step), text.strip("\n")) for step, text in zip(steps, texts)][-SAMPLES:]


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """Returns the checkpoints of a run, the newest last, of which some may be deleted meanwhile."""
    links = {name: follow(folder / name).name for name in ("last", "best")}
    present = []
    for path in checkpoints(folder):
        named = " and ".join(link for link, target in links.items() if target == path.name)
        with contextlib.suppress(FileNotFoundError):
            present.append(Checkpoint(path.name, step_of(path), path.stat().st_mtime, size_of(path), named))
    return present


def _parameters(checkpoint: Path) -> str:
    config = load_config(checkpoint)
    with meta_device():
        return describe_parameters(GPT(config))


def _data(name: str) -> str:
    """Returns the tokens of a prepared dataset by split; "" for other data."""
    directory = find_dataset(name)
    tokens = recorded_tokens(directory) if directory else {}
    return ", ".join(f"{count:,} tokens in {split}" for split, count in tokens.items())


def setting_text(value: Any) -> str:
    """Returns a setting's value as a report shows it."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
