"""One run of a training stage: its folder and lock, checkpoints, stop signals, updates and log.

def train(options: Options, run: StageRun) -> int:
    model, tokenizer = load_model(run.origin)
    ...                                       # data and plan
    run.fit(model.config)
    run.open(fingerprint)                     # from here on this process holds the folder
    replica = run.place(model)                # on the device; under torchrun one of several
    updater = run.updater(model, updates)
    run.restore(updater, {})                  # continues a stopped run
    while run.goes_on(updates):
        ...
        result = run.update(updater, run.progress.step, loss)
    ...
    return run.finish(write)                  # write(model, folder) saves the model
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from typing_extensions import TypeVar  # whose default comes with Python 3.13

from gpt_arc import distributed
from gpt_arc.device import device_name, resolve_dtype, set_up_device
from gpt_arc.distributed import IS_MAIN, RANK, WORLD_SIZE, say
from gpt_arc.errors import NotFinite, UserError
from gpt_arc.next_steps import next_steps
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.cost import flops_per_token
from gpt_arc.reading import read_json, reading
from gpt_arc.settings import Natural, NonNegative
from gpt_arc.tables import counted
from gpt_arc.training import runs
from gpt_arc.training.checkpoints import (
    ADVICE,
    CHECKED,
    clean_run,
    load_state,
    restore_state,
    resumable,
    save_checkpoint,
    state_file,
    training_state,
)
from gpt_arc.training.config import Config
from gpt_arc.training.log import MetricsLog, ProgressBar, movement, read_metrics, start_tracker, trained
from gpt_arc.training.optim import Updater
from gpt_arc.training.options import StageOptions
from gpt_arc.training.parallel_modes import check_parallel, make_parallel
from gpt_arc.training.saving import Saving
from gpt_arc.training.signals import StopSignal
from gpt_arc.training.stage_record import record_options, record_steps, resume_command
from gpt_arc.training.threads import resolve_threads
from gpt_arc.weights.tensor_files import check_tensors
from model import GPT, GPTConfig

Write = Callable[[Any, Path], None]  # puts what was placed, whole, into a folder
LEAST_LOSSES = 15  # updates in the first tenth of a run, after the warmup, for their losses to show anything


@dataclass(config=CHECKED)
class StageProgress:
    """How far a run has come."""

    step: Natural = 0  # updates made, or whatever the stage counts
    skipped: Natural = 0  # updates skipped because their gradient was not finite
    seconds: NonNegative = 0.0  # of training, without evaluations and checkpoints
    best: float | None = None  # the lowest loss on the val split, or what else chooses the best checkpoint
    best_step: Natural | None = None
    numbers: dict[str, float] = field(default_factory=dict)  # whatever else a stage keeps


P = TypeVar("P", bound=StageProgress, default=StageProgress)


class Part(Protocol):
    """What a checkpoint holds besides the model: a module, or something with a state like one."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor], /) -> Any: ...


class StageRun(Generic[P]):
    """One run of a training stage."""

    folder: Path  # a new run's only after `open`
    progress: P
    bar: ProgressBar  # from the first call of `goes_on`

    def __init__(
        self,
        name: str,
        options: StageOptions,
        device: torch.device,
        folder: Path | None,
        lock: runs.Lock | None,
        progress: type[P],
        script: str | None = None,
    ):
        """`folder` and its `lock` belong to a run that is resumed; `script` is the command that resumes it."""
        self.script = script or f"stages/{name}.py"
        self.name, self.options, self.device = name, options, device
        self.dtype = resolve_dtype(options.dtype, device)
        check_parallel(options.dividing)
        self.parallel = make_parallel(options.dividing, device, self.dtype)
        self._resumed, self._lock = folder is not None, lock
        if folder:
            self.folder = folder
        self.progress = progress()
        self._state: dict[str, Any] = {}
        self.checkpoint = resumable(folder) if folder else None
        if self.checkpoint:
            self._state = load_state(self.checkpoint)
            with reading(state_file(self.checkpoint), ADVICE):
                self.progress = progress(**self._state["progress"])
        self.stop = StopSignal(options.stop_after)
        self.seconds = 0.0  # that the last update took, with its data
        self._new = False  # whether this process made the folder
        self.stopped = 0  # number of the signal that any process received
        self.saving = Saving(self.progress, self.progress.step if self._state else None, options.failed_saves)
        torch.manual_seed(options.seed)

    @property
    def origin(self) -> str:
        """The model to load: the last checkpoint of a resumed run, or the model named."""
        return str(self.checkpoint or self.options.model)

    def fit(self, model: GPTConfig) -> None:
        """Choose the learning rate, where `options` has none, and the number of CPU threads for training this model.

        A resumed run keeps those it began with.
        """
        with meta_device():
            shape = GPT(model)
        self.options = self.options.with_rate(shape.num_parameters(embeddings=False, active=True))
        runtime = self._state.get("runtime", {})
        saved = None
        if runtime.get("device") == self.device.type:
            saved = runtime.get("threads", torch.get_num_threads())
        config = Config(model=model, training=self.options.training(1))
        batch, flops = self.options.batch_size, flops_per_token(shape)
        with torch.random.fork_rng(devices=[]):
            threads = resolve_threads(config, saved, batch, flops, self.device, self.dtype)
        torch.set_num_threads(threads)

    def open(self, fingerprint: str) -> None:
        """Make the run's folder, or clean up that of a resumed run. Raises UserError if the run had other data."""
        self.fingerprint = fingerprint
        if self._state and self._state["data"] != fingerprint:
            raise UserError(f"{self.folder} was started on other data or another model: start a new run")
        if IS_MAIN:
            if not self._resumed:
                self._refuse_own_folder()
                resume = self.options.out_dir and resume_command(self.script, self.options.out_dir, self.options)
                where = self.options.out_dir, self.name, self.options.overwrite, self.name, resume
                self.folder, self._lock = runs.claim_new(*where)
                self._new = True
                record_options(self.folder, self.name, self.options, runs.hardware_of(self.device, self.dtype))
            clean_run(self.folder, self.progress.step, self.progress.best_step)
            settings = read_json(self.folder / "run.json", runs.Record)["options"]
            tracker = start_tracker(self.folder, self.progress.step, self.options, settings)
            self._log = MetricsLog(self.folder, self.progress.step, tracker)
        self.folder = distributed.from_main(self.folder if IS_MAIN else None)
        say(f"device         {self.device} ({device_name(self.device)}), {self.dtype}")
        say(f"run            {self.folder}" + (f", from step {self.progress.step}" if self._state else ""))

    def _refuse_own_folder(self) -> None:
        out_dir = self.options.out_dir
        for name in self.options.PATHS:
            value = getattr(self.options, name)
            if out_dir and value and Path(out_dir).resolve() in (Path(value) / "model").resolve().parents:
                raise UserError(f"out_dir = {out_dir} holds the model that {name} names: name another")

    def place(self, module: nn.Module, unused: bool = False) -> nn.Module:
        """Move a module to the device. Returns the module to call: itself, or its replica under torchrun.

        `unused`: the loss doesn't depend on all of the trained weights.
        """
        set_up_device(self.device, self.dtype)
        self._module = module
        return self.parallel.place(module, self.device, unused)

    def updater(self, module: nn.Module, updates: int) -> Updater:
        """The optimizer, with a learning rate scheduled over this many updates."""
        self._training = self.options.training(updates)
        return Updater(module, self._training, self.device, self.dtype, self.parallel)

    def restore(self, updater: Updater, parts: Mapping[str, Part]) -> None:
        """Restore the optimizer, the `parts` saved with it and the random generators, if the run is resumed."""
        self._updater, self._parts = updater, parts
        torch.manual_seed(self.options.seed + RANK)
        if not self.checkpoint:
            return
        saved = self._state.get("parts", self._state)  # fine-tuning once kept its part beside the others
        restore_state(updater, self._state, self.checkpoint, self.device)
        with reading(state_file(self.checkpoint), ADVICE):
            for name, part in parts.items():
                kept = part.state_dict()
                check_tensors(saved[name], kept, f"{name}.")
                part.load_state_dict({key: self.parallel.shard_of(x, kept[key]) for key, x in saved[name].items()})
        self._state = {}  # as large as the model, twice

    def save(self, write: Write, best: float | None = None, last: bool = False) -> None:
        """Write a checkpoint, whose model `write` puts into a folder; the best if `best` is the lowest so far.

        If it can't be written, the run goes on, except after the `last` one.

        Raises NotFinite, and writes nothing, if a weight or `best` is not finite.
        """
        progress, options = self.progress, self.options
        self.check_finite(*progress.numbers.values(), best or 0.0)
        if best is not None and (progress.best is None or best < progress.best):
            progress.best, progress.best_step = best, progress.step
        state = training_state(progress, self._updater, self.device, self.dtype, self.fingerprint)
        gathered = self.parallel.gathered
        state["parts"] = {
            name: {key: gathered(x) for key, x in part.state_dict().items()} for name, part in self._parts.items()
        }
        put = partial(write, self.parallel.whole(self._module))
        step = progress.step, progress.best_step
        self.saving.attempt(partial(save_checkpoint, self.folder, *step, put, state, options.keep_checkpoints), last)

    def check_finite(self, *figures: float) -> None:
        """Raises NotFinite if a weight or one of `figures`, such as the val loss, is not finite."""
        if not self._updater.finite(*figures):
            self._diverge(self.progress.step, "left weights or a val loss that are not finite")

    def _diverge(self, update: int, problem: str) -> NoReturn:
        last = self.folder / "last"
        kept = f"{last} is the last good checkpoint" if last.exists() else "there is no checkpoint yet"
        raise NotFinite(f"update {update} {problem}, {kept}: lower learning_rate, or set dtype = float32")

    def goes_on(self, steps: int, unit: str = "update") -> bool:
        """Whether steps are left and no stop signal has come."""
        if not hasattr(self, "bar"):
            if IS_MAIN:
                record_steps(self.folder, steps)
            if self.progress.step >= steps:
                say(
                    f"{self.folder} is finished after {counted(steps, unit)}: to train it further, "
                    "start a new run from it"
                )
            self.bar = ProgressBar(steps, self.progress.step, unit, self.options.quiet)
        self._since = time.perf_counter()
        return self.progress.step < steps and not self.stopped

    def update(self, updater: Updater, step: int, *sums: Tensor | float) -> tuple[float, float, list[float]] | None:
        """Make update number `step`, counted from 0, at the schedule's learning rate.

        Returns the learning rate, the gradient's norm and `sums` over the processes; None if the gradient or the first
        of `sums` wasn't finite. Raises NotFinite if that happens again and again.
        """
        rate = self.options.rate(step, self._training)
        finite, norm, (*totals, stopped) = updater.update(rate, *sums, self.stop.number)
        self.stopped = int(stopped) and self.stop.anywhere()
        now = time.perf_counter()
        self.seconds, self._since = now - self._since, now
        self.progress.seconds += self.seconds
        if finite:
            return rate, norm, totals
        self.progress.skipped += 1
        if updater.diverged:
            self._diverge(step + 1, "is not finite")
        say(f"update {step + 1}: {updater.problem}; it is skipped")
        return None

    def log(self, line: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl; METRICS lists its keys."""
        if IS_MAIN:
            progress = self.progress
            common = {"seconds": progress.seconds, "skipped": progress.skipped or None}
            self._log.write({"step": progress.step, **line, **common})

    def tell(self, line: Mapping[str, float | None], shown: str, steps: int) -> None:
        """Log a line, and show `shown` beside the progress bar, or sometimes without a bar."""
        step = self.progress.step
        self.log(line)
        self.bar.set_figures(shown, line)
        self.bar.update(step - self.bar.n)
        if self.bar.writes_lines and step % max(1, steps // 20) == 0:
            say(f"step {step:,} of {steps:,}: {shown}")
        if IS_MAIN and step == round((self.options.warmup + 0.1) * steps):
            self._doubt_learning_rate()

    def _doubt_learning_rate(self) -> None:
        """Say which learning rate to try if the loss hasn't fallen so far."""
        lines = [line for line in read_metrics(self._log.path) if "grad_norm" in line]  # finetune.py has others
        losses, rate = [line["train_loss"] for line in lines if "train_loss" in line], self._training.learning_rate
        change = movement(losses) if len(losses) >= LEAST_LOSSES else -1
        updates = f"in {counted(len(losses), 'update')}"
        if change == 0:
            say(f"the loss hasn't moved {updates}: if it stays so, try --learning_rate={10 * rate:g}")
        elif change > 0:
            say(f"the loss has risen {updates}: if it goes on rising, try --learning_rate={rate / 10:g}")

    @property
    def _resume(self) -> str:
        return resume_command(self.script, self.folder, self.options)

    @contextlib.contextmanager
    def keeping(self, write: Write) -> Iterator[None]:
        """Runs the block so that an error of data or of a reward in any process loses no step.

        The block mustn't wait for other processes: they stop after it.
        """
        failure = ""
        try:
            yield
        except (UserError, OSError) as error:
            if WORLD_SIZE == 1 and not self.progress.step:
                raise
            failure = str(error)
        failure = next(filter(None, distributed.gather(failure)), "")
        if not failure:
            return
        self.bar.close()
        if self.progress.step:
            if self.saving.step != self.progress.step:
                self.save(write, last=True)
            failure += f"; step {self.progress.step} is saved, resume with: {self._resume}"
        distributed.from_main(None)  # torchrun ends all processes when one ends in an error
        raise UserError(failure)

    def say_saved(self) -> None:
        """Say what is saved, after an error that ends the run."""
        if self.saving.step:
            say(f"step {self.saving.step} is the last one saved; resume with: {self._resume}")

    def abandon(self) -> None:
        """Remove the folder of a new run that ended without a checkpoint."""
        if IS_MAIN and self._new and self.saving.step is None:
            runs.clear(self.folder)
            with contextlib.suppress(OSError):  # the folder holds something else
                self.folder.rmdir()

    def close(self) -> None:
        """Close the progress bar and the log."""
        self.bar.close()
        if IS_MAIN:
            self._log.close()

    def finish(self, write: Write, steps: dict[str, str] | None = None) -> int:
        """Save what isn't saved yet, and say how to resume or where the model is. Returns the exit code.

        `steps`: commands to type next, with what each is for.
        """
        self.bar.close()
        if self.saving.step != self.progress.step:
            self.save(write, last=True)
        self.close()
        if self.stopped:
            say(f"stopped after step {self.progress.step}, saved; resume with: {self._resume}")
            return 128 + self.stopped
        if IS_MAIN:
            say(self._summary())
        if steps:
            say(next_steps(steps))
        return 0

    def _summary(self) -> str:
        """Returns what a finished run reached, and in how long."""
        progress, lines = self.progress, read_metrics(self._log.path)
        losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        val_loss = f"; best val loss {losses[progress.best_step]:.4f}" if progress.best_step in losses else ""
        best = "" if progress.best_step is None else f"{self.folder}/best (step {progress.best_step}), "
        time = trained(progress.seconds, max((line.get("tokens", 0) for line in lines), default=None))
        return f"finished step {progress.step}: {best}{self.folder}/last{val_loss}\n{time}"
