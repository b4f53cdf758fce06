"""Checkpoints of a run: folders `step-00002000`, complete or absent, with the links `last` and `best` to them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NotRequired
from zipfile import ZIP_STORED, ZipFile

import torch
from pydantic import ConfigDict, TypeAdapter, with_config
from torch import Tensor
from typing_extensions import TypedDict  # pydantic's condition before Python 3.12

from gpt_arc.errors import UserError, first_line
from gpt_arc.files import is_failed_write, new_directory, point
from gpt_arc.reading import open_plain, reading

ADVICE = "use another checkpoint"
CHECKED = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
Tensors = dict[str, Tensor]


@with_config(CHECKED)
class OptimizerState(TypedDict):
    state: dict[int, Tensors]
    param_groups: list[dict[str, Any]]


@with_config(CHECKED)
class Runtime(TypedDict):
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    compile: NotRequired[bool]


@with_config(CHECKED)
class TrainingState(TypedDict):
    """The content of training_state.pt, see docs/architecture.md. Shapes are checked where it is used."""

    progress: dict[str, Any]
    optimizer: OptimizerState
    muon: NotRequired[OptimizerState]
    optimizer_name: NotRequired[str]
    scaler: dict[str, int | float]
    weights: NotRequired[list[Tensor]]
    parts: NotRequired[dict[str, Tensors]]
    learned: NotRequired[Tensors]
    generators: list[Tensors] | Tensors
    runtime: Runtime
    data: str


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(
    run: Path,
    step: int,
    best_step: int | None,
    save: Callable[[Path], None],
    state: dict[str, Any],
    keep_all: bool,
) -> None:
    """Writes the checkpoint of `step`, points `last` to it and `best` to that of `best_step`, and deletes the others.

    `save` writes the model into a folder. If the process is killed, `last` still points to a complete checkpoint.
    Raises UserError if it can't be written.
    """
    directory = run / step_name(step)
    try:
        with new_directory(directory) as temporary:
            save(temporary)
            torch.save(state, temporary / "training_state.pt")
    except Exception as error:
        if not is_failed_write(error):
            raise
        free = shutil.disk_usage(run).free / 1e6
        raise UserError(
            f"the checkpoint {directory} can't be written, with {free:,.0f} MB free on its disk ({first_line(error)}); "
            "earlier checkpoints are kept"
        ) from None
    kept = {directory.name}
    point(run / "last", directory.name)
    if best_step is not None:
        point(run / "best", step_name(best_step))
        kept.add(step_name(best_step))
    for other in run.glob("step-*"):
        if not keep_all and other.name not in kept:
            shutil.rmtree(other)


def clean_run(run: Path, step: int, best_step: int | None) -> None:
    """Prepares to resume from `step`: removes unfinished and later checkpoints, and points `best` to `best_step`."""
    for leftover in (*run.glob(".step-*"), *(d for d in run.glob("step-*") if d.name > step_name(step))):
        shutil.rmtree(leftover)
    if best_step is not None:
        point(run / "best", step_name(best_step))


def load_state(directory: Path, peek: bool = False) -> dict[str, Any]:
    """Returns the training state of a checkpoint, on the CPU. Raises UserError if it is missing or damaged.

    With `peek`, tensors stay on disk until they are used.
    """
    path = state_file(directory)
    if not path.exists():
        raise UserError(f"{path} is missing: {directory} is a model but not a checkpoint to resume from")
    with reading(path, ADVICE):
        with open_plain(path) as file, ZipFile(file) as archive:
            if any(entry.compress_type != ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its parts are compressed, which torch.save doesn't do")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=peek)
        return dict(TypeAdapter(TrainingState).validate_python(state))


def state_file(directory: Path) -> Path:
    return directory / "training_state.pt"
