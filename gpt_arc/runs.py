"""Run folders: their names, who holds them, and the settings that they were started with."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_arc.config import (
    SETTINGS,
    Config,
    build_config,
    check_setting,
    config_files,
    parse_arguments,
    read_settings,
    settings_of,
    write_settings,
)
from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from model import GPTConfig

OUT_ROOT = Path("out")
# What a run writes: all that --overwrite=True may delete.
CONTENTS = ("config.toml", "overrides.json", "metrics.jsonl", "last", "best", "step-*", ".step-*", "wandb")


def runs(root: Path = OUT_ROOT) -> Iterator[Path]:
    """The runs below `root` that have a checkpoint, newest checkpoint first."""
    found = [path.parent for path in root.glob("*/last") if (path / "config.json").exists()]
    yield from sorted(found, key=lambda run: (run / "last").lstat().st_mtime_ns, reverse=True)


def newest_run(name: str | None = None) -> Path:
    """The newest run, of the config `name` if one is given. Raises UserError if there is none."""
    of_config = re.compile(rf"{re.escape(name)}(-\d+)?" if name else ".*")
    for run in runs():
        if of_config.fullmatch(run.name):
            return run
    what = f"run of {name}" if name else "run"
    raise UserError(
        f"there is no {what} below {OUT_ROOT}/ with a checkpoint: train one first, for instance with "
        "`python train.py configs/quickstart.toml`, or say where it lies"
    )


class Lock:
    """Holds a run folder until the process ends, however it ends, or forgets this object."""

    def __init__(self, directory: Path):
        """Raises UserError if another process holds the folder."""
        self._descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {directory}: wait for it, or name another --out_dir"
            ) from None

    def __del__(self):
        os.close(self._descriptor)


def claim_new(out_dir: str | None, name: str, overwrite: bool) -> tuple[Path, Lock]:
    """Make and hold the folder of a new run: `out_dir`, or out/NAME, out/NAME-2 ... the first that is free.

    Raises UserError for an `out_dir` in use, unless `overwrite`, which deletes the run it holds.
    """
    if out_dir is not None:
        directory = _made(Path(out_dir))
        if any(directory.iterdir()) and not overwrite:
            raise UserError(
                f"out_dir = {out_dir} is in use: go on with it by --init_from=resume, delete the run it holds by "
                "--overwrite=True, or name another"
            )
        lock = Lock(directory)
        for pattern in CONTENTS:
            for path in directory.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return directory, lock
    for number in itertools.count(1):
        directory = OUT_ROOT / (name if number == 1 else f"{name}-{number}")
        if directory.is_file() or any(directory.glob("*")):
            continue
        with contextlib.suppress(UserError):  # held by a run that has written nothing yet
            return _made(directory), Lock(directory)
    raise AssertionError("unreachable")


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"out_dir = {directory} can't be made: a file is in its way") from None
    return directory


@dataclass(frozen=True)
class Launch:
    """What a command line of train.py asks for."""

    config: Config
    name: str  # of the config file, and so of the run
    files: tuple[str, ...]
    overrides: dict[str, Any]  # settings that differ from the files'
    resumed: Path | None  # the run to go on with


def read_command_line(args: list[str], description: str | None) -> Launch:
    """Settings from files and flags; on resume also the flags that the run was started with, below the present ones.

    So `--init_from=resume` alone goes on as before, an edited config file and a new flag both take effect, and what
    contradicts the model is found by comparing with the checkpoint. Raises UserError.
    """
    files = config_files(args)
    name = Path(files[-1]).stem if files else ""
    config = parse_arguments(args, description, [Path(file) for file in files], {})
    resumed, recorded = None, {}
    if config.run.init_from == "resume":
        resumed = newest_run(name or None) if config.run.out_dir is None else Path(config.run.out_dir)
        if not (resumed / "last" / "config.json").exists():
            raise UserError(f"there is no checkpoint to resume from in {resumed}: it has no last/")
        if not files:
            files = [str(resumed / "config.toml")]
        recorded = read_overrides(resumed)
        config = parse_arguments(args, description, [Path(file) for file in files], recorded)
    elif not files:
        raise UserError("name a config file, for instance: python train.py configs/quickstart.toml")
    of_files: dict[str, Any] = {}
    for file in files:
        of_files |= read_settings(Path(file))
    of_files = settings_of(build_config(of_files, ", ".join(files)))
    overrides = {
        setting: value
        for setting, value in settings_of(config).items()
        if value != of_files[setting] and SETTINGS[setting][0] != "run"
    }
    return Launch(config, name, tuple(files), overrides, resumed)


def check_same_model(asked: GPTConfig, trained: GPTConfig, run: Path) -> None:
    """Raises UserError if a run can't go on with the settings `asked` for; dropout alone is free to change."""
    for field in dataclasses.fields(GPTConfig):
        wanted, has = getattr(asked, field.name), getattr(trained, field.name)
        if wanted != has and not field.name.endswith("dropout"):
            raise UserError(
                f"{field.name} = {wanted} contradicts the run {run}, whose model has {field.name} = {has}: leave it "
                "as it was to resume, or start a new run"
            )


def record_settings(directory: Path, config: Config, overrides: dict[str, Any]) -> None:
    """Write what the run is made of: config.toml, whole, and overrides.json, the part that its files did not say."""
    settings = {name: value for name, value in settings_of(config).items() if SETTINGS[name][0] != "run"}
    write_file(directory / "config.toml", write_settings(settings))
    write_file(directory / "overrides.json", json.dumps(overrides, indent=1) + "\n")


def read_overrides(directory: Path) -> dict[str, Any]:
    path = directory / "overrides.json"
    try:
        overrides = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged, so the run's settings are not known: {error}") from None
    for name, value in overrides.items():
        check_setting(name, value, f"{path}: ")
    return overrides
