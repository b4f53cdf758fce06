"""What the training stages share: their settings, a run's folder and processes, its checkpoints, its end.

def train(options: Options, stage: Stage) -> int:
    model, tokenizer = load_model(stage.origin)
    ...                                       # data and plan
    stage.open(fingerprint)                   # the folder is the run's from here on
    replica = stage.place(model)              # on the device, one of several under torchrun
    updater = stage.updater(model, updates)
    stage.restore(updater, {})                # where a stopped run stood
    while stage.goes_on(updates):
        ...
        sums = stage.update(updater, rate, loss)
    ...

if __name__ == "__main__":
    entry_point(partial(run_stage, Options, __doc__, "sft", train))()
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from gpt_arc import distributed, runs, runtime
from gpt_arc.checkpoint import clean_run, load_state, save_checkpoint
from gpt_arc.config import TrainingConfig
from gpt_arc.distributed import IS_MAIN, LOCAL_RANK, RANK, WORLD_SIZE, say
from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.metrics import MetricsLog
from gpt_arc.optim import Updater, learning_rate_at
from gpt_arc.signals import StopSignal

O = TypeVar("O", bound="StageOptions")
E = TypeVar("E")


@dataclass(frozen=True)
class StageOptions:
    """The settings that every training stage has."""

    model: tyro.conf.Positional[str | None] = None
    """The model to start from: a run folder, a model directory, or a published model: gpt2, openai-gpt,
    hf:OWNER/NAME."""
    batch_size: int = 8
    """Examples that a process reads at a time, at most."""
    gradient_accumulation_steps: int = 1
    """Times batch_size, over all processes: the examples of an update."""
    learning_rate: float = 1e-5
    """The largest, after the warmup."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warmup."""
    final_learning_rate: float = 0.1
    """Share of the learning rate that is left at the end."""
    warmup: float = 0.0
    """Share of the updates in which the learning rate rises."""
    weight_decay: float = 0.0
    """Of tensors of two dimensions or more, decoupled from the gradient."""
    beta1: float = 0.9
    """Adam's decay of the mean of gradients."""
    beta2: float = 0.95
    """Adam's decay of the mean of squared gradients."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    grad_clip: float = 1.0
    """Gradients are shortened to this norm. 0: never."""
    activation_checkpointing: bool = False
    """Compute each block anew in the backward pass: less memory, a third slower."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of products. auto: what the hardware multiplies fastest."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication between processes under torchrun. auto: nccl on GPUs, gloo elsewhere."""
    seed: int = 1337
    """The source of all randomness."""
    out_dir: str | None = None
    """Folder of the run. None: out/STAGE, or out/STAGE-2, -3 ... where that is taken."""
    overwrite: bool = False
    """Delete the run that out_dir holds and start anew."""
    resume: bool = False
    """Go on with the run folder named as the model, as it was started; only device and backend may be others."""

    PATHS: ClassVar[tuple[str, ...]] = ("model",)  # settings that may be paths, beside those of the type Path

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps"):
            self.require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("weight_decay", "grad_clip", "seed"):
            self.require(name, 0 <= getattr(self, name) < 2**63, "zero or more, and less than 2^63")
        for name in ("learning_rate", "adam_eps"):
            self.require(name, 0 < getattr(self, name) < 1e9, "more than zero, and less than 1e9")
        for name in ("beta1", "beta2", "warmup"):
            self.require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self.require("final_learning_rate", 0 <= self.final_learning_rate <= 1, "a share: from 0 to 1")

    def require(self, name: str, holds: bool, what: str) -> None:
        """Raises ValueError where a setting isn't `what` it must be."""
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)} must be {what}")

    @property
    def examples_per_update(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    def training(self, updates: int) -> TrainingConfig:
        """What an optimizer and a learning rate over so many updates take."""
        same = ("learning_rate", "schedule", "weight_decay", "beta1", "beta2", "adam_eps", "grad_clip")
        return TrainingConfig(
            max_iters=max(updates, 1),
            warmup_iters=round(self.warmup * updates),
            min_lr=self.learning_rate * self.final_learning_rate,
            **{name: getattr(self, name) for name in same},
        )


@dataclass(frozen=True)
class ExampleOptions(StageOptions):
    """The further settings of stages that go through a file of examples, epoch after epoch."""

    train: Path | None = None
    """Examples to learn from (.jsonl, .csv, .tsv)."""
    val: Path | None = None
    """Examples to measure on; the epoch of the lowest loss is the best. None: val_fraction of the training ones."""
    val_fraction: float = 0.05
    """Share of the examples that is held out where there is no val. 0: none."""
    epochs: int = 1
    """Passes over the examples."""

    def __post_init__(self):
        super().__post_init__()
        self.require("epochs", self.epochs >= 1, "1 or more")
        self.require("val_fraction", 0 <= self.val_fraction < 1, "in [0, 1)")

    def splits(self, read: Callable[[Path], list[E]]) -> dict[str, list[E]]:
        """What `read` makes of the splits train and val. Raises UserError."""
        examples = read(self.train)
        if self.val:
            return {"train": examples, "val": read(self.val)}
        return held_out(examples, self.val_fraction, self.seed)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # updates made, or what else the stage counts
    skipped: int = 0  # updates left out because their gradient was not finite
    best: float | None = None  # the lowest loss of the val split
    best_step: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)  # whatever else a stage keeps


class Stage:
    """One run of a training stage."""

    def __init__(
        self, name: str, options: StageOptions, device: torch.device, run: Path | None, lock: runs.Lock | None
    ):
        self.name, self.options, self.device = name, options, device
        self.dtype = runtime.resolve_dtype(options.dtype, device)
        self.run, self._lock = run, lock
        self.progress = Progress()
        self._state: dict[str, Any] | None = None
        if run and (run / "last").exists():
            self._state = load_state(run / "last")
            self.progress = Progress(**self._state["progress"])
        self.stop = StopSignal()
        self.stopped = 0  # the number of a signal that came to any process
        self._not_finite = 0  # updates in a row
        self._new = False  # whether this process has made the folder
        self._saved = self.progress.step if self._state else None
        self.bar: tqdm | None = None
        torch.manual_seed(options.seed)

    @property
    def origin(self) -> str:
        """The model to load: the last checkpoint of a run that goes on, or the one named."""
        return str(self.run / "last") if self._state else self.options.model

    def open(self, fingerprint: str) -> None:
        """Make the run's folder, or clean up that of a run that goes on. Raises UserError if its data were others."""
        self.fingerprint = fingerprint
        if self._state and self._state["data"] != fingerprint:
            raise UserError(f"{self.run} was started on other data or another model: start a new run")
        if IS_MAIN:
            if self.run is None:
                self._refuse_own_folder()
                resume = f"python {sys.argv[0]} {self.options.out_dir} --resume=True"
                where = self.options.out_dir, self.name, self.options.overwrite, self.name, resume
                self.run, self._lock = runs.claim_new(*where)
                self._new = True
                write_record(self.run, self.name, self.options)
            clean_run(self.run, self.progress.step, self.progress.best_step)
            self._log = MetricsLog(self.run, self.progress.step)
        self.run = distributed.from_main(self.run)
        say(f"device         {self.device} ({runtime.device_name(self.device)}), {self.dtype}")
        say(f"run            {self.run}" + (f", from step {self.progress.step}" if self._state else ""))

    def _refuse_own_folder(self) -> None:
        out_dir = self.options.out_dir
        for name in self.options.PATHS:
            value = getattr(self.options, name)
            if out_dir and value and Path(out_dir).resolve() in (Path(value) / "model").resolve().parents:
                raise UserError(f"out_dir = {out_dir} holds the model that {name} names: name another")

    def place(self, module: nn.Module) -> nn.Module:
        """Put a module on the device, to be trained: itself, or under torchrun the replica to call in its place."""
        runtime.set_up(self.device, self.dtype)
        module.to(self.device)
        return module if WORLD_SIZE == 1 else DistributedDataParallel(module, gradient_as_bucket_view=True)

    def updater(self, module: nn.Module, updates: int) -> Updater:
        """The optimizer, whose learning rate runs over so many updates."""
        self._training = self.options.training(updates)
        return Updater(module, self._training, self.device, self.dtype)

    def restore(self, updater: Updater, parts: dict[str, nn.Module]) -> None:
        """Put back the optimizer, the `parts` that were saved with it and the random generators, if the run goes on."""
        self._updater, self._parts = updater, parts
        torch.manual_seed(self.options.seed + RANK)
        if self._state is None:
            return
        updater.load_state_dict(self._state)
        for name, part in parts.items():
            part.load_state_dict(self._state["parts"][name])
        if RANK < len(self._state["generators"]):
            runtime.set_rng_state(self._state["generators"][RANK], self.device)
        self._state = {}  # as large as the model, twice

    def save(self, write: Callable[[Path], None], best: float | None = None) -> None:
        """Write a checkpoint, whose model `write` puts into a folder; it is the best so far if `best` is the lowest."""
        progress = self.progress
        if best is not None and (progress.best is None or best < progress.best):
            progress.best, progress.best_step = best, progress.step
        state = {
            "progress": dataclasses.asdict(progress),
            **self._updater.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "generators": distributed.gather(runtime.rng_state(self.device)),
            "runtime": {"device": self.device.type, "dtype": self.dtype},
            "data": self.fingerprint,
        }
        if IS_MAIN:
            save_checkpoint(self.run, progress.step, progress.best_step, write, state, keep_all=False)
        self._saved = progress.step

    def goes_on(self, steps: int, unit: str = "update") -> bool:
        """Whether there are steps left, and no signal has come."""
        if self.bar is None:
            self.bar = tqdm(total=steps, initial=self.progress.step, unit=unit, disable=None if IS_MAIN else True)
        return self.progress.step < steps and not self.stopped

    def last_sync(self, replica: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """In which a backward pass shares gradients between processes only if it is the update's last."""
        return contextlib.nullcontext() if last or WORLD_SIZE == 1 else replica.no_sync()

    def update(self, updater: Updater, step: int, *sums: Tensor | float) -> tuple[float, float, list[float]] | None:
        """Update `step` (from 0): learning rate, gradient norm, `sums` over the processes; None if not finite.

        The first of `sums` must be finite too. Raises UserError when it fails again and again.
        """
        rate = learning_rate_at(step, self._training)
        finite, norm, (*sums, stopped) = updater.update(rate, *sums, self.stop.number)
        self.stopped = int(stopped) and self.stop.anywhere()
        if finite:
            self._not_finite = 0
            return rate, norm, sums
        self.progress.skipped += 1
        self._not_finite += 1
        if self._not_finite == (20 if updater.scaler.is_enabled() else 2):
            raise UserError(f"update {step + 1} is not finite: lower learning_rate, or set dtype = float32")
        return None

    def tell(self, line: dict[str, float | None], shown: str, steps: int) -> None:
        """A line of metrics.jsonl, and `shown` beside the progress bar, or now and then where there is none."""
        step = self.progress.step
        if IS_MAIN:
            self._log.write({"step": step, **{name: value for name, value in line.items() if value is not None}})
        self.bar.set_postfix_str(shown)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and step % max(1, steps // 20) == 0:
            say(f"step {step:,} of {steps:,}: {shown}")

    @property
    def _resume(self) -> str:
        python = "python" if WORLD_SIZE == 1 else f"torchrun --standalone --nproc_per_node={WORLD_SIZE}"
        return f"{python} {sys.argv[0]} {self.run} --resume=True"

    @contextlib.contextmanager
    def keeping(self, write: Callable[[Path], None]) -> Iterator[None]:
        """In which a user's mistake, such as a reward that fails, loses none of the steps made by a single process."""
        try:
            yield
        except UserError as error:
            if WORLD_SIZE > 1 or not self.progress.step:
                raise
            self.bar.close()
            if self._saved != self.progress.step:
                self.save(write)
            raise UserError(f"{error}; step {self.progress.step} is saved, go on by: {self._resume}") from None

    def abandon(self) -> None:
        """Remove the folder of a new run that ends without a checkpoint."""
        if IS_MAIN and self._new and not (self.run / "last").exists():
            for name in ("run.json", "metrics.jsonl"):
                (self.run / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # where something else is in it
                self.run.rmdir()

    def finish(self, write: Callable[[Path], None]) -> int:
        """Save what isn't saved yet, say how to go on or where the model is: the exit code."""
        self.bar.close()
        if self._saved != self.progress.step:
            self.save(write)
        if self.stopped:
            say(f"stopped after step {self.progress.step}, saved; go on by: {self._resume}")
            return 128 + self.stopped
        best = "" if self.progress.best_step is None else f"{self.run}/best (step {self.progress.best_step}), "
        say(f"finished step {self.progress.step}: {best}{self.run}/last")
        return 0


class EpochOrder:
    """Which examples make up which update: every one once an epoch, in an order that the seed and the epoch decide."""

    def __init__(self, count: int, size: int, seed: int):
        self.count, self.size, self.seed = count, size, seed
        self.per_epoch = math.ceil(count / size)  # updates, the last of them smaller

    def updates(self, epochs: int) -> int:
        return self.per_epoch * epochs

    def rows(self, update: int) -> list[int]:
        """The numbers of the examples of an update, counted from 0 over all epochs."""
        epoch, place = divmod(update, self.per_epoch)
        return self.take(epoch * self.count + place * self.size, min(self.size, self.count - place * self.size))

    def take(self, first: int, count: int) -> list[int]:
        """The numbers of `count` examples from the `first` on, counted from 0 over all epochs."""
        epochs = range(first // self.count, (first + count - 1) // self.count + 1)
        orders = [np.random.default_rng((self.seed, epoch)).permutation(self.count) for epoch in epochs]
        start = first % self.count
        return np.concatenate(orders)[start : start + count].tolist()


def held_out(examples: Sequence[E], fraction: float, seed: int) -> dict[str, list[E]]:
    """The splits train and val, to which goes a `fraction` drawn by the seed; without val where that is none."""
    count = round(fraction * len(examples))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = [examples[i] for i in order]
    return {"train": mixed[count:], "val": mixed[:count]} if count else {"train": list(examples)}


def digest(content: Any) -> str:
    """A hash of whatever JSON can express."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def micro_batches(rows: Sequence[int], size: int) -> Iterator[tuple[list[int], float]]:
    """This process's part of the rows of an update, at most `size` at a time, and what it counts: 1.

    Every process gets as many parts; where there are no rows left for one it is a row that counts 0.
    """
    together = size * WORLD_SIZE
    for first in range(0, len(rows), together):
        own = list(rows[first : first + together][RANK::WORLD_SIZE])
        yield (own, 1.0) if own else ([rows[0]], 0.0)


def read_options(cls: type[O], description: str | None, args: list[str]) -> O:
    """Options from files of settings (.toml), which come first, and flags, which win. Raises UserError."""
    defaults = tyro.MISSING_NONPROP
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    while args and args[0].endswith(".toml"):
        path, args = Path(args[0]), args[1:]
        try:
            settings = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(f"there is no file {path}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid TOML: {error}") from None
        flags = []
        for name, value in settings.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise UserError(f"{path}: there is no setting {name}" + (f"; did you mean {near[0]}?" if near else ""))
            is_list = any(typing.get_origin(kind) is tuple for kind in (hints[name], *typing.get_args(hints[name])))
            if isinstance(value, dict) or isinstance(value, list) != is_list:
                raise UserError(f"{path}: {name} = {json.dumps(value)} must be {'a list' if is_list else 'one value'}")
            if name == "model":
                flags.insert(0, str(value))
            else:
                flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        try:
            defaults = parse_flags(cls, None, flags, defaults)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return parse_flags(cls, description, args, defaults)


def run_stage(cls: type[O], description: str | None, name: str, train: Callable[[O, Stage], int]) -> int:
    """Read the command line and run a stage's `train`, among the processes that torchrun started: the exit code."""
    options = read_options(cls, description, sys.argv[1:])
    if options.model is None:
        raise UserError(f"name a model to start from: python stages/{name}.py MODEL; --help tells more")
    run, lock = None, None
    if options.resume:
        allowed = {"model", "resume", "device", "backend"}
        refuse_others(options, allowed, "can't be changed: --resume=True goes on as the run was started")
        run = Path(options.model)
        recorded = recorded_options(run, cls, name)
        options = dataclasses.replace(recorded, device=options.device, backend=options.backend, resume=True)
        lock = runs.Lock(run) if IS_MAIN else None
    else:
        options = located(options)
    device = runtime.resolve_device(options.device, LOCAL_RANK)
    with distributed.process_group(options.backend, device):
        stage = Stage(name, options, device, run, lock)
        try:
            return train(options, stage)
        except UserError:
            stage.abandon()
            raise


def refuse_others(options: Any, allowed: set[str], why: str) -> None:
    """Raises UserError for an option that is set and not `allowed`."""
    for one in dataclasses.fields(options):
        if one.name not in allowed and getattr(options, one.name) != one.default:
            raise UserError(f"--{one.name} {why}")


def located(options: O) -> O:
    """The options, what is on this disk of the models in them by its absolute path: the same when a run goes on."""
    named = {name: getattr(options, name) for name in options.PATHS}
    whole = {name: str(Path(value).resolve()) for name, value in named.items() if value and Path(value).exists()}
    return dataclasses.replace(options, **whole)


def write_record(run: Path, stage: str, options: Any) -> None:
    """run.json: the options that a run was started with, paths made absolute."""
    recorded = dataclasses.asdict(options)
    for name, value in recorded.items():
        may_be_path = name in getattr(options, "PATHS", ("model",))
        if value is not None and (isinstance(value, Path) or may_be_path and Path(value).exists()):
            recorded[name] = str(Path(value).resolve())
    content = {"stage": stage, "config": stage, "overrides": {}, "options": recorded}
    write_file(run / "run.json", json.dumps(content, default=str, indent=1) + "\n")


def recorded_options(run: Path, cls: type[O], stage: str) -> O:
    """What `write_record` wrote. Raises UserError."""
    path, hints = run / "run.json", typing.get_type_hints(cls)
    try:
        content = json.loads(path.read_text())
        if content.get("stage", "train") != stage:
            raise ValueError(f"it is a run of {content.get('stage', 'train')}.py")
        values = content["options"]
        for name, value in values.items():
            hint = hints[name]
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            if Path in kinds and value is not None:
                values[name] = Path(value)
            elif isinstance(value, list):
                values[name] = tuple(value)
        return cls(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run} is not a run of {stage}.py that could go on ({path}: {error})") from None
