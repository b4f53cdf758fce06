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
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from gpt_arc import distributed
from gpt_arc.device import device_name, resolve_dtype, rng_state, set_rng_state, set_up_device
from gpt_arc.distributed import IS_MAIN, RANK, WORLD_SIZE, say
from gpt_arc.errors import UserError
from gpt_arc.training import runs
from gpt_arc.training.checkpoints import clean_run, load_state, save_checkpoint
from gpt_arc.training.log import MetricsLog
from gpt_arc.training.optim import Updater
from gpt_arc.training.options import StageOptions, record_options
from gpt_arc.training.schedule import learning_rate_at
from gpt_arc.training.signals import StopSignal


@dataclass
class StageProgress:
    """How far a run has come."""

    step: int = 0  # updates made, or what else the stage counts
    skipped: int = 0  # updates left out because their gradient was not finite
    best: float | None = None  # the lowest loss of the val split
    best_step: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)  # whatever else a stage keeps


class StageRun:
    """One run of a training stage."""

    def __init__(
        self,
        name: str,
        options: StageOptions,
        device: torch.device,
        run: Path | None,
        lock: runs.Lock | None,
        script: str | None = None,
    ):
        self.script = script or f"stages/{name}.py"
        self.name, self.options, self.device = name, options, device
        self.dtype = resolve_dtype(options.dtype, device)
        self.run, self._lock = run, lock
        self.progress = StageProgress()
        self._state: dict[str, Any] | None = None
        if run and (run / "last").exists():
            self._state = load_state(run / "last")
            self.progress = StageProgress(**self._state["progress"])
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
                resume = shlex.join(("python", self.script, f"--resume={self.options.out_dir}"))
                where = self.options.out_dir, self.name, self.options.overwrite, self.name, resume
                self.run, self._lock = runs.claim_new(*where)
                self._new = True
                record_options(self.run, self.name, self.options)
            clean_run(self.run, self.progress.step, self.progress.best_step)
            self._log = MetricsLog(self.run, self.progress.step)
        self.run = distributed.from_main(self.run)
        say(f"device         {self.device} ({device_name(self.device)}), {self.dtype}")
        say(f"run            {self.run}" + (f", from step {self.progress.step}" if self._state else ""))

    def _refuse_own_folder(self) -> None:
        out_dir = self.options.out_dir
        for name in self.options.PATHS:
            value = getattr(self.options, name)
            if out_dir and value and Path(out_dir).resolve() in (Path(value) / "model").resolve().parents:
                raise UserError(f"out_dir = {out_dir} holds the model that {name} names: name another")

    def place(self, module: nn.Module) -> nn.Module:
        """Put a module on the device, to be trained: itself, or under torchrun the replica to call in its place."""
        set_up_device(self.device, self.dtype)
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
            set_rng_state(self._state["generators"][RANK], self.device)
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
            "generators": distributed.gather(rng_state(self.device)),
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
        return f"{python} {shlex.join((self.script, f'--resume={self.run}'))}"

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
