"""Run folders: names, locks, and the settings that runs were started with."""

import contextlib
import fcntl
import itertools
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.reading import read_json
from gpt_arc.settings import read_value, values_of
from gpt_arc.training.config import SETTINGS, Config, write_settings

OUT_ROOT = Path("out")


class Record(TypedDict):
    """The content of run.json."""

    config: str
    overrides: dict[str, Any]  # settings of train.py that came from flags
    stage: NotRequired[str]
    options: NotRequired[dict[str, Any]]  # all settings of a stage


# Everything that a run writes: --overwrite=True deletes only these, and only in a folder that holds a run.
CONTENTS = ("config.toml", "run.json", "metrics.jsonl", "report.json", "last", "best", "step-*", ".step-*", "wandb")


def newest_run(name: str | None = None) -> Path:
    """Returns the run below out/ with the newest checkpoint, of config `name` if given. Raises UserError if none."""
    links = [link for link in OUT_ROOT.glob("*/last") if (link / "config.json").exists()]
    links = [link for link in links if stage_of(link.parent) == "train"]
    for link in sorted(links, key=lambda link: link.lstat().st_mtime_ns, reverse=True):
        with contextlib.suppress(UserError):  # a damaged run can't be resumed
            if name is None or read_record(link.parent)[0] == name:
                return link.parent
    kind = f"run of {name}" if name else "run"
    raise UserError(
        f"there is no {kind} below {OUT_ROOT}/ with a checkpoint: train one first, for instance with "
        "`python train.py configs/quickstart.toml`, or name its folder"
    )


class Lock:
    """Locks a run folder until this object is deleted or the process ends, in whatever way."""

    _descriptor: int | None = None

    def __init__(self, directory: Path):
        """Raises UserError if another process holds the folder."""
        self._descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another process is training in {directory}: wait for it, or name another --out_dir"
            raise UserError(message) from None

    def __del__(self):
        if self._descriptor is not None:
            os.close(self._descriptor)


def claim_new(
    out_dir: str | None, name: str, overwrite: bool, stage: str = "train", resume: str | None = None
) -> tuple[Path, Lock]:
    """Creates and locks the folder of a new run: `out_dir`, or the first free one of out/NAME, out/NAME-2 ...

    Raises UserError if `out_dir` is in use, unless `overwrite` allows deleting the run of the same `stage` in it.
    """
    if out_dir is not None:
        resume = resume or f"--resume={shlex.quote(out_dir)}"
        directory = _create(Path(out_dir))
        lock = Lock(directory)
        if any(directory.iterdir()):
            if not (directory / "run.json").exists():
                raise UserError(f"out_dir = {out_dir} is in use, and not by a run: name another")
            if stage_of(directory) != stage:
                raise UserError(f"out_dir = {out_dir} holds a run of {stage_of(directory)}.py: name another")
            if not overwrite:
                raise UserError(
                    f"out_dir = {out_dir} is in use: resume it with {resume}, delete the run it holds with "
                    "--overwrite=True, or name another"
                )
        for pattern in CONTENTS:
            for path in directory.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return directory, lock
    for number in itertools.count(1):
        directory = OUT_ROOT / (name if number == 1 else f"{name}-{number}")
        if directory.is_file() or any(directory.glob("*")):
            continue
        _create(directory)
        with contextlib.suppress(UserError):  # locked by a run that has written nothing yet
            return directory, Lock(directory)
    raise AssertionError("unreachable")


def stage_of(run: Path) -> str:
    """Returns the name of the script that wrote a run folder."""
    with contextlib.suppress(UserError):
        return str(read_json(run / "run.json").get("stage", "train"))
    return "train"


def _create(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"out_dir = {directory} can't be created: a file is in the way") from None
    return directory


def write_record(directory: Path, config: Config, name: str, overrides: dict[str, Any]) -> None:
    """Writes config.toml, with all settings, and run.json: the config's name and the settings that came from flags."""
    settings = {name: value for name, value in values_of(config).items() if SETTINGS[name].table != "run"}
    write_file(directory / "config.toml", write_settings(settings))
    write_file(directory / "run.json", json.dumps({"config": name, "overrides": overrides}, indent=1) + "\n")


def read_record(directory: Path) -> tuple[str, dict[str, Any]]:
    """Returns the name of a run's config and the settings from flags. Raises UserError if they are missing."""
    path = directory / "run.json"
    try:
        record = read_json(path, Record)
    except UserError as error:
        raise UserError(f"{error}, so the run's settings are unknown") from None
    overrides = {name: read_value(Config, name, value, str(path)) for name, value in record["overrides"].items()}
    for name in overrides:
        if SETTINGS[name].table == "run":
            raise UserError(f"{path} is damaged: {name} is never recorded")
    return record["config"], overrides
