"""Folders of checkpoints in a run folder, and the links `last` and `best` to them."""

import re
from pathlib import Path

from gpt_arc.errors import UserError
from gpt_arc.files import follow
from gpt_arc.manifest import DamagedFile, check_files

SHARDS = "shards"  # folder in a checkpoint for tensors of the training state that each process saved a part of
CHECKPOINT = re.compile(r"step-(\d{8,})(?:\.(\d+))?")  # the step, and which time it was saved
ATTEMPTS = 20  # to read a checkpoint that a run deletes meanwhile


def step_of(directory: Path) -> int | None:
    """Returns the step in the name of a checkpoint's folder, or None if it isn't such a name."""
    match = CHECKPOINT.fullmatch(directory.name)
    return int(match[1]) if match else None


def checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoints in a run folder, the newest last."""
    matches = ((path, CHECKPOINT.fullmatch(path.name)) for path in run.glob("step-*") if path.is_dir())
    numbers = {path: tuple(int(part or 0) for part in match.groups()) for path, match in matches if match}
    return sorted(numbers, key=lambda path: numbers[path])


def named_checkpoint(run: Path, link: str) -> Path | None:
    """Returns the checkpoint that `last` or `best` names. Without `last`, it is the newest one that is complete."""
    directory = follow(run / link)
    if directory.is_dir():
        return directory
    complete = (path for path in reversed(checkpoints(run)) if _is_undamaged(path, sizes_only=("",)))
    return next(complete, None) if link == "last" else None


def deleted_too_soon(run: Path | str) -> UserError:
    """The error after ATTEMPTS."""
    return UserError(f"the checkpoints of {run} are deleted before they are read: try again when the run has ended")


def undamaged_before(directory: Path) -> Path | None:
    """Returns the newest checkpoint of the same run before this one whose files are as they were written."""
    others = checkpoints(directory.parent)
    older = others[: others.index(directory)] if directory in others else others
    return next(filter(_is_undamaged, reversed(older)), None)


def check_checkpoint(directory: Path, sizes_only: tuple[str, ...] = ()) -> None:
    """`check_files` for a checkpoint and its shards, which have a manifest of their own. Raises DamagedFile."""
    check_files(directory, sizes_only)
    if (directory / SHARDS).is_dir():
        check_files(directory / SHARDS, sizes_only)


def _is_undamaged(directory: Path, sizes_only: tuple[str, ...] = ()) -> bool:
    """Whether the files of a checkpoint are there, as they were written."""
    try:
        check_checkpoint(directory, sizes_only)
    except DamagedFile:
        return False
    return (directory / "training_state.pt").exists()
