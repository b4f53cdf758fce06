"""Checkpoints of a run: folders `step-00002000`, complete or absent, with the links `last` and `best` to them.

A step that is saved again becomes `step-00002000.1`, since nothing replaces a folder in one step; then the links move
and the older folder is deleted. checkpoints.json lists the folders that the run wrote: no others are deleted.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NotRequired
from zipfile import ZIP_STORED, ZipFile

import torch
import torch.distributed as dist
from pydantic import ConfigDict, with_config
from torch import Tensor
from typing_extensions import TypedDict  # pydantic's condition before Python 3.12

from gpt_arc import distributed
from gpt_arc.device import rng_state, set_rng_state
from gpt_arc.distributed import IS_MAIN, RANK, say
from gpt_arc.errors import UserError
from gpt_arc.files import discard, follow, locked, new_directory, point, write_file
from gpt_arc.manifest import DamagedFile, record_files
from gpt_arc.reading import adapter_of, open_plain, read_json, reading
from gpt_arc.settings import Threads
from gpt_arc.training.optim import Updater
from gpt_arc.weights.checkpoint_folders import (
    ATTEMPTS,
    CHECKPOINT,
    SHARDS,
    check_checkpoint,
    checkpoints,
    deleted_too_soon,
    named_checkpoint,
    step_of,
    undamaged_before,
)
from gpt_arc.weights.tensor_files import ADVICE, open_tensors

CHECKED = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
RECORD = "checkpoints.json"
RUN_FILES = (
    "last", "best", "config.toml", "metrics.jsonl", "samples.txt", "report.json", "report", RECORD, "run.json",
    "wandb", "tensorboard", "trackio",
)  # fmt: skip
STRAY = re.compile(rf"\.({'|'.join(map(re.escape, RUN_FILES))}|{CHECKPOINT.pattern})\.\w+")  # left by killed writers
Tensors = dict[str, Tensor]


@with_config(CHECKED)
class OptimizerState(TypedDict):
    state: dict[int, Tensors]
    param_groups: list[dict[str, Any]]


@with_config(CHECKED)
class Runtime(TypedDict):
    device: str
    dtype: Literal["float32", "tf32", "bfloat16", "float16"]
    compile: NotRequired[bool]
    threads: NotRequired[Threads]


@with_config(CHECKED)
class TrainingState(TypedDict):
    """The content of training_state.pt, see docs/architecture.md. Shapes are checked where it is used."""

    progress: dict[str, Any]
    optimizer: OptimizerState
    muon: NotRequired[OptimizerState]
    optimizer_name: NotRequired[str]
    scaler: dict[str, float | int]
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
    keep: int | None,
    shards: Tensors | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes the checkpoint of `step`, points `last` to it, and `best` if that is `best_step`; deletes the others.

    It keeps the `keep` newest ones, None: all. `save` writes the model into a folder. Every process must call this;
    only the `shards` are written by all, which communicate in `group`. If it is killed, `last` still names a complete
    checkpoint. Raises UserError or OSError if the checkpoint can't be written.
    """
    if not IS_MAIN:
        return write_shards(shards, group=group) if shards else None
    directory, previous, waiting = run / step_name(step), named_checkpoint(run, "last"), bool(shards)
    try:
        if not run.is_dir():
            raise UserError(f"the run folder {run} has been deleted or moved, so step {step} can't be saved")
        directory = run / _unused_name(run, step)
        with new_directory(directory) as temporary:
            if shards:
                waiting = False
                write_shards(shards, temporary, group)
            save(temporary)
            torch.save(state, temporary / "training_state.pt")
            record_files(temporary, "training_state.pt")
            written = [*recorded(run), directory.name]
            write_file(run / RECORD, json.dumps(written) + "\n")
    except OSError as error:
        reason = f" ({error.strerror})" if error.errno else ""
        then = "earlier checkpoints are kept" if recorded(run) else "mend that, or write elsewhere with --out_dir"
        raise UserError(f"the checkpoint {directory} can't be written{_free(run)}{reason}; {then}") from None
    finally:
        if waiting:  # the other processes, for the folder
            distributed.from_main(None, group)
    point(run / "last", directory.name)
    if best_step == step:
        point(run / "best", directory.name)
    best = named_checkpoint(run, "best") if best_step is not None else None
    superseded = previous if previous and step_of(previous) == step else None
    newest = [path for name in written if (path := run / name) != superseded][-keep if keep else None :]
    for other in (run / name for name in written):
        if other not in (directory, best, *newest):
            with contextlib.suppress(OSError), locked(other):  # a reader may hold it: the next checkpoint tries again
                discard(other)


def _free(folder: Path) -> str:
    """Says how much room there is on a folder's disk, if that is to be learned."""
    try:
        return f", with {shutil.disk_usage(folder).free / 1e6:,.0f} MB free on its disk"
    except OSError:
        return ""


def training_state(
    progress: Any, updater: Updater, device: torch.device, dtype: str, data: str, gather: bool = True, **runtime: Any
) -> dict[str, Any]:
    """Returns the training state to save: complete in the main process or, without `gather`, divided as it is.

    `data` is the fingerprint of the data, and `runtime` is recorded beside the device. Every process must call this.
    """
    return {
        "progress": dataclasses.asdict(progress),
        **updater.state_dict(gather),
        "generators": distributed.gather(rng_state(device)),
        "runtime": {"device": device.type, "dtype": dtype, "threads": torch.get_num_threads(), **runtime},
        "data": data,
    }


def restore_state(updater: Updater, state: dict[str, Any], checkpoint: Path, device: torch.device) -> None:
    """Restores the optimizer, and this process's random generators, from a checkpoint and the state in it.

    Every process must call this. Raises UserError if it is damaged.
    """
    generators = state["generators"]
    generators = [generators] if isinstance(generators, dict) else generators  # fine-tuning once kept one process's
    with reading(state_file(checkpoint), ADVICE):
        if (checkpoint / SHARDS).is_dir():
            read_shards(updater.put_shards(state), checkpoint)
        updater.load_state_dict(state)
        if RANK < len(generators):
            set_rng_state(generators[RANK], device)


def write_shards(shards: Tensors, directory: Path | None = None, group: dist.ProcessGroup | None = None) -> None:
    """Writes the processes' shards of the tensors into `directory`, which the main process names.

    Every process must call this, and they communicate in `group`. Raises OSError in all of them if one can't write.
    """
    from torch.distributed import checkpoint  # takes a second to import

    place = distributed.from_main(directory, group)
    if place is None:
        raise OSError("the main process can't make the checkpoint's folder")
    folder = place / SHARDS
    with _distributed_checkpoint():
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        checkpoint.save(shards, storage_writer=writer, process_group=group)
    if directory:
        record_files(folder, *(path.name for path in folder.iterdir()))


def read_shards(shards: Tensors, directory: Path) -> None:
    """Fills the tensors, which may be divided otherwise than they were saved. Every process must call this.

    Raises UserError if one is missing or damaged.
    """
    from torch.distributed import checkpoint

    folder = directory / SHARDS
    for path in folder.glob("*.safetensors"):
        open_tensors(path, ADVICE)
    with reading(folder, ADVICE), _distributed_checkpoint():
        checkpoint.load(shards, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)))


@contextlib.contextmanager
def _distributed_checkpoint() -> Iterator[None]:
    """Runs the block so that a failure raises what it raised in the first process that failed."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in a single process
            yield
    except CheckpointException as error:  # which isn't an Exception
        raise error.failures[min(error.failures)][0] from None


def _unused_name(run: Path, step: int) -> str:
    names = [path.name for path in run.glob(f"{step_name(step)}*")]
    versions = [int(match[2] or 0) for name in names if (match := CHECKPOINT.fullmatch(name)) and int(match[1]) == step]
    return step_name(step) + (f".{max(versions) + 1}" if versions else "")


def recorded(run: Path) -> list[str]:
    """Returns the names of the checkpoints that the run wrote and that are still there."""
    if not (run / RECORD).exists():  # a run of an older version
        names = [directory.name for directory in checkpoints(run)]
    else:
        names = []
        with contextlib.suppress(UserError):  # it is damaged
            names = [name for name in read_json(run / RECORD, list[str]) if CHECKPOINT.fullmatch(name)]
    return [name for name in names if (run / name).is_dir() and not (run / name).is_symlink()]


def remove_strays(run: Path) -> None:
    """Removes the unfinished files that killed processes left."""
    for path in run.iterdir():
        if STRAY.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def clean_run(run: Path, step: int, best_step: int | None) -> None:
    """Prepares to resume from `step`: removes unfinished files and points `last` and `best` to their checkpoints."""
    remove_strays(run)
    for name, wanted in (("last", step), ("best", best_step)):
        link = run / name
        if wanted is None:
            continue
        if link.is_dir() and not link.is_symlink() and not (run / step_name(wanted)).exists():
            link.rename(run / step_name(wanted))  # a copy that followed links, without what they named
        directories = [path for path in checkpoints(run) if step_of(path) == wanted]
        if directories and follow(link) not in directories:
            point(link, directories[-1].name)


def resumable(run: Path, hold: contextlib.ExitStack | None = None) -> Path | None:
    """Returns the checkpoint to resume from: `last` or, if that is damaged, the newest one before it that isn't.

    Returns None if the run has no checkpoint. Raises DamagedFile if all are damaged. A run that goes on doesn't delete
    `last` until `hold` is closed.
    """
    for _ in range(ATTEMPTS):
        last = named_checkpoint(run, "last")
        if last is None:
            return None
        try:
            if hold:
                hold.enter_context(locked(last, shared=True))
            check_checkpoint(last)
            if last.exists():  # otherwise its run has deleted it
                return last
        except (BlockingIOError, FileNotFoundError):
            continue
        except DamagedFile as error:
            if not last.exists():
                continue
            older = undamaged_before(last)
            if older is None:
                raise
            say(f"{error}; resuming from {older}")
            return older
    raise deleted_too_soon(run)


def load_state(directory: Path, on_disk: bool = False) -> dict[str, Any]:
    """Returns the training state of a checkpoint, on the CPU. Raises UserError if it is missing or damaged.

    With `on_disk`, tensors stay there until they are used, so that a machine's processes share one copy in memory.
    """
    path = state_file(directory)
    if not path.exists():
        raise UserError(f"{path} is missing: {directory} is a model but not a checkpoint to resume from")
    with reading(path, ADVICE):
        with open_plain(path) as file, ZipFile(file) as archive:
            if any(entry.compress_type != ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its parts are compressed, which torch.save doesn't do")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=on_disk)
        return dict(adapter_of(TrainingState).validate_python(state))


def state_file(directory: Path) -> Path:
    return directory / "training_state.pt"
