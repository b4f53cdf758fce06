"""Run folders: names, locks, the settings that runs were started with, and summaries."""

import contextlib
import itertools
import json
import os
import shlex
import stat
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NotRequired

import torch
from typing_extensions import TypedDict

from gpt_arc.device import device_name
from gpt_arc.distributed import WORLD_SIZE
from gpt_arc.errors import UserError
from gpt_arc.files import command, discard, release, take_lock, write_file
from gpt_arc.reading import read_json
from gpt_arc.settings import build, read_files, read_value, values_of
from gpt_arc.training.checkpoints import RUN_FILES, STRAY, recorded, remove_strays
from gpt_arc.training.config import SETTINGS, Config, write_settings
from gpt_arc.training.log import read_metrics
from gpt_arc.weights.checkpoint_folders import named_checkpoint, step_of

OUT_ROOT = Path("out")
TRIAL_STEPS = 50  # a run whose last checkpoint has fewer is a trial


class Record(TypedDict):
    """The content of run.json."""

    config: str
    overrides: dict[str, Any]  # settings of train.py that came from flags
    stage: NotRequired[str]
    options: NotRequired[dict[str, Any]]  # all settings of a stage
    steps: NotRequired[int]  # of a stage, in all
    hardware: NotRequired[str]  # what it runs on, with the type of its numbers


def run_folder(name: str) -> Path:
    """Returns the folder of a run: one under out/, or a path. Raises UserError if there is none."""
    for folder in (OUT_ROOT / name, Path(name)):
        if (folder / "run.json").is_file():
            return folder
    names = ", ".join(sorted(path.parent.name for path in OUT_ROOT.glob("*/run.json")))
    raise UserError(f"there is no run {name}; the runs under {OUT_ROOT}/ are: {names or 'none'}")


def newest_run(name: str | None = None) -> Path:
    """Returns the run below out/ with the newest checkpoint, of config `name` if given. Raises UserError if none.

    Trials are taken only if there are no other runs.
    """
    written = {}  # of each run: whether it is more than a trial, and the time of its newest checkpoint
    for run in OUT_ROOT.glob("*/"):
        last = named_checkpoint(run, "last")
        if last and (not last.exists() or (last / "config.json").exists()) and stage_of(run) == "train":
            step = step_of(last)
            written[run] = step is None or step >= TRIAL_STEPS, _time_of(last)
    for run in sorted(written, key=written.__getitem__, reverse=True):
        with contextlib.suppress(UserError):  # a damaged run can't be resumed
            if name is None or read_record(run)[0] == name:
                return run
    kind = f"run of {name}" if name else "run"
    raise UserError(
        f"there is no {kind} below {OUT_ROOT}/ with a checkpoint: train one first, for instance with "
        f"`{command('train.py', 'configs/quickstart.toml')}`, or name its folder"
    )


@dataclass(frozen=True)
class Summary:
    """What the files of a run folder say about the run."""

    folder: Path
    stage: str
    origin: str  # the config of train.py, or the model that a stage started from
    data: str
    settings: dict[str, Any]
    step: int  # of the last checkpoint
    steps: int | None  # in all; None if that isn't recorded
    metrics: list[dict[str, Any]]
    written: float  # time
    size: int  # bytes
    hardware: str | None = None  # what it runs on, with the type of its numbers

    @property
    def val_loss(self) -> float | None:
        """The lowest."""
        return min((line["val_loss"] for line in self.metrics if "val_loss" in line), default=None)

    @property
    def finished(self) -> bool | None:
        """Whether the run has come to its end, by its steps or by its patience; None if its end isn't recorded."""
        if self.steps is None:
            return None
        evaluated = [(line["val_loss"], line["step"]) for line in self.metrics if "val_loss" in line]
        patience = self.settings.get("patience")
        if patience and evaluated:
            waited = evaluated[-1][1] - min(evaluated)[1]
            return self.step >= self.steps or waited >= patience * self.settings["eval_interval"]
        return self.step >= self.steps


def summary(run: Path) -> Summary:
    """Reads a run folder. Raises UserError if run.json or config.toml is missing or damaged."""
    record, metrics = read_json(run / "run.json", Record), read_metrics(run / "metrics.jsonl")
    options = record.get("options")
    if options is None:
        config = build(Config, read_files(Config, [str(run / "config.toml")])[0])
        settings, origin, steps = values_of(config), record["config"], config.training.max_iters
        data = ", ".join(source.name for source in config.data.sources)
    else:
        settings, origin, steps = options, shortened(options.get("model")), record.get("steps")
        data = shortened(options.get("train") or options.get("prompts"))
    last = named_checkpoint(run, "last")
    step = step_of(last) if last else 0
    if step is None:  # the checkpoint has another name
        step = metrics[-1]["step"] if metrics else 0
    return Summary(
        run, record.get("stage", "train"), origin, data, settings, step, steps, metrics,
        _time_of(last or run / "run.json"), size_of(run), record.get("hardware"),
    )  # fmt: skip


def _time_of(path: Path) -> float:
    """Returns when a file or folder was written: now if it is a checkpoint that its run has just deleted."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def size_of(folder: Path) -> int:
    """Returns the bytes of the files in a folder, some of which may be deleted meanwhile."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                file = os.lstat(Path(place, name))
                size += file.st_size if stat.S_ISREG(file.st_mode) else 0
    return size


def shortened(path: str | None) -> str:
    """Returns a recorded path relative to the current folder if it is below it."""
    if path is None:
        return ""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


class Lock:
    """Locks a run folder, by a file in it, until this object is deleted or the process ends, in whatever way."""

    FILE = ".lock"

    def __init__(self, directory: Path):
        """Raises UserError if another process holds the folder."""
        try:
            path = directory / self.FILE
            self._release = partial(release, path, take_lock(path))
        except BlockingIOError:
            message = f"another process is training in {directory}: wait for it, or name another --out_dir"
            raise UserError(message) from None

    def __del__(self):
        if hasattr(self, "_release"):
            self._release()


def is_running(run: Path) -> bool:
    """Whether a process is training in a run folder; False where there are no locks."""
    if not (run / Lock.FILE).exists():
        return False
    try:
        Lock(run)
    except UserError:
        return True
    return False


def claim_new(
    out_dir: str | None, name: str, overwrite: bool, stage: str = "train", resume: str | None = None
) -> tuple[Path, Lock]:
    """Creates and locks the folder of a new run: `out_dir`, or the first free one of out/NAME, out/NAME-2 ...

    Raises UserError if `out_dir` is in use, unless `overwrite` allows deleting the run of the same `stage` in it.
    """
    if out_dir is not None:
        directory = _create(Path(out_dir))
        lock = Lock(directory)
        _refuse_used(directory, overwrite, stage, resume)
        clear(directory)
        return directory, lock
    for number in itertools.count(1):
        directory = OUT_ROOT / (name if number == 1 else f"{name}-{number}")
        if directory.is_file() or directory.exists() and not _is_free(directory):
            continue
        _create(directory)
        with contextlib.suppress(UserError):  # locked by a run that has written nothing yet
            lock = Lock(directory)
            clear(directory)
            return directory, lock
    raise AssertionError("unreachable")


def _is_free(directory: Path) -> bool:
    """Whether a folder holds nothing, or only unfinished files of a run that was killed before it had written any."""
    return all(STRAY.fullmatch(path.name) or path.name == Lock.FILE for path in directory.iterdir())


def check_out_dir(out_dir: str, overwrite: bool) -> None:
    """Raises UserError where `claim_new` would, and writes nothing."""
    directory = Path(out_dir)
    _refuse_place(directory)
    if (directory / Lock.FILE).exists():
        Lock(directory)
    if directory.exists():
        _refuse_used(directory, overwrite)


def _refuse_used(directory: Path, overwrite: bool, stage: str = "train", resume: str | None = None) -> None:
    """Raises UserError unless a folder is free or `overwrite` allows deleting what it holds.

    `resume` is what resumes a run in it, by default a flag.
    """
    if _is_free(directory):
        return
    resume = resume or f"--resume={shlex.quote(str(directory))}"
    if not (directory / "run.json").exists():
        raise UserError(f"out_dir = {directory} is in use, and not by a run: name another")
    if stage_of(directory) != stage:
        raise UserError(f"out_dir = {directory} holds a run of {stage_of(directory)}.py: name another")
    if overwrite:
        return
    if named_checkpoint(directory, "last"):
        raise UserError(
            f"out_dir = {directory} is in use: resume it with {resume}, delete the run it holds with "
            "--overwrite=True, or name another"
        )
    raise UserError(
        f"out_dir = {directory} is in use by a run without a checkpoint: start it over with --overwrite=True, or name "
        "another"
    )


def clear(directory: Path) -> None:
    """Deletes what a run wrote, and nothing else: run.json last, since a folder without it is no run's."""
    remove_strays(directory)
    for name in (*recorded(directory), *RUN_FILES):
        path = directory / name
        discard(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def stage_of(run: Path) -> str:
    """Returns the name of the script that wrote a run folder."""
    with contextlib.suppress(UserError):
        return str(read_json(run / "run.json").get("stage", "train"))
    return "train"


def _create(directory: Path) -> Path:
    _refuse_place(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _refuse_place(directory: Path) -> None:
    """Raises UserError unless a folder can be created and written."""
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists() or path.is_symlink())
    if not place.is_dir():
        raise UserError(f"out_dir = {directory} can't be created: a file is in the way")
    if not os.access(place, os.W_OK):
        raise UserError(f"out_dir = {directory} can't be written, since {place} is read-only: name another")


def hardware_of(device: torch.device, dtype: str) -> str:
    """Describes what a run computes on, for run.json."""
    return f"{WORLD_SIZE} x {device_name(device)}, {dtype}"


def write_record(
    directory: Path, config: Config, name: str, overrides: dict[str, Any], hardware: str | None = None
) -> None:
    """Writes run.json, the config's name and the settings that came from flags, and config.toml, with all settings.

    `hardware` is what `hardware_of` returned.
    """
    settings = {name: value for name, value in values_of(config).items() if SETTINGS[name].table != "run"}
    record = {"config": name, "overrides": overrides} | ({"hardware": hardware} if hardware else {})
    write_file(directory / "run.json", json.dumps(record, indent=1) + "\n")
    write_file(directory / "config.toml", write_settings(settings))


def read_record(directory: Path) -> tuple[str, dict[str, Any]]:
    """Returns the name of a run's config and the settings from flags. Raises UserError if they are missing."""
    path = directory / "run.json"
    try:
        record = read_json(path, Record)
    except UserError as error:
        mend = f"--init_from={directory} starts another run from its weights"
        raise UserError(f"{error}, so the run's settings are unknown: {mend}") from None
    overrides = {name: read_value(Config, name, value, str(path)) for name, value in record["overrides"].items()}
    for name in overrides:
        if SETTINGS[name].table == "run":
            raise UserError(f"{path} is damaged: {name} is never recorded")
    return record["config"], overrides
