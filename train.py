"""Train a GPT.

    python train.py configs/quickstart.toml                        on whatever this machine has
    python train.py configs/gpt2.toml --dataset=mytext --max_iters=2000
    python train.py --resume=out/quickstart                        continue a run that was stopped
    torchrun --standalone --nproc_per_node=8 train.py configs/gpt2.toml

Settings come from the config files named, later ones winning, and from flags, which win over files. A run writes
out/NAME/: config.toml, metrics.jsonl and checkpoints, to which `last` and `best` point.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401
    from gpt_arc.training.arguments import check_arguments

    check_arguments(__doc__)


import contextlib
import dataclasses
import itertools
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpt_arc import distributed
from gpt_arc.data.batches import Batch, blank_batch, evaluation_batches, prefetch, training_batches
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.in_training import TrainingSampler, make_sampler
from gpt_arc.device import autocast, device_name, resolve_device, set_up_device, to_device
from gpt_arc.distributed import IS_MAIN, LOCAL_RANK, RANK, WORLD_SIZE, say
from gpt_arc.errors import UserError, check_finite, entry_point, naming
from gpt_arc.next_steps import after_training
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.cost import peak_flops
from gpt_arc.settings import values_of
from gpt_arc.tables import counted
from gpt_arc.training.checkpoints import (
    clean_run,
    load_state,
    restore_state,
    resumable,
    save_checkpoint,
    training_state,
)
from gpt_arc.training.command_line import read_command_line
from gpt_arc.training.compile import try_compiling
from gpt_arc.training.evaluate import mean_loss
from gpt_arc.training.kernels import choose_kernels
from gpt_arc.training.log import Meter, MetricsLog, ProgressBar, Utilization, start_tracker
from gpt_arc.training.optim import Updater
from gpt_arc.training.pace import Pace
from gpt_arc.training.parallel import Parallel
from gpt_arc.training.parallel_modes import make_parallel
from gpt_arc.training.plan import Data, Plan, Progress, make_plan, print_plan, rehearse
from gpt_arc.training.routers import RouterMeter
from gpt_arc.training.runs import Lock, claim_new, hardware_of, read_record, write_record
from gpt_arc.training.saving import Saving
from gpt_arc.training.schedule import learning_rate_at
from gpt_arc.training.sentences import SentenceMeter
from gpt_arc.training.signals import StopSignal
from gpt_arc.training.spikes import Spikes
from gpt_arc.training.tensor_parallel import make_shares
from gpt_arc.training.weight_shares import WeightShares
from gpt_arc.weights.directory import load_model, save_model
from model import GPT

ASK_EVERY = 1 if WORLD_SIZE == 1 else 16  # batches of an evaluation, after which processes ask each other for signals


@dataclass
class Run:
    """A run under way: what the loop works on, and what it evaluates, saves and logs with."""

    plan: Plan
    data: Data
    directory: Path | None  # None for an evaluation alone of a model that isn't a run's
    lock: Lock | None  # holds the folder
    model: GPT
    replica: nn.Module  # the model, or the DistributedDataParallel to call instead
    tokenizer: Tokenizer | None
    parallel: Parallel
    sharing: WeightShares
    updater: Updater
    stop: StopSignal
    compiled: bool
    example: Batch  # of a batch
    sampler: TrainingSampler | None
    saving: Saving
    spikes: Spikes
    pace: Pace
    val_sentences: SentenceMeter  # of the last evaluation
    log: MetricsLog | None = None  # of the main process
    failure: Exception | None = None  # of this process's data, which stops all processes

    @property
    def folder(self) -> Path:
        assert self.directory is not None, "an evaluation alone writes nothing"
        return self.directory

    @property
    def progress(self) -> Progress:
        return self.plan.progress

    def val_loss(self) -> float | None:
        """Mean cross-entropy in nats over the same val windows every time; None if a signal came meanwhile."""
        self.saving.wait()
        self.pace.report(self.progress.seconds)
        plan, starts, block_size = self.plan, self.plan.val_starts, self.plan.config.model.block_size
        batches = evaluation_batches(self.data.val, starts, plan.micro_batch, block_size, RANK, WORLD_SIZE)
        count = math.ceil(len(starts) / (plan.micro_batch * WORLD_SIZE))  # in each process, even where data fail
        batches = itertools.islice(self.readable(prefetch(batches, plan.device)), count)
        with self.updater.averaged(), self.parallel.evaluating(self.model):
            hidden = plan.config.run.quiet or not IS_MAIN
            shown = tqdm(batches, "evaluating", count, leave=False, disable=hidden or None)
            loss = mean_loss(self.model, self.until_a_signal(shown), plan.device, plan.dtype, self.val_sentences)
        return None if self.stop.anywhere() else loss

    def until_a_signal(self, batches: Iterable[Batch]) -> Iterator[tuple[list[Tensor | None], float]]:
        """Yields batches on the device, each with the weight 1, until any process has received a signal."""
        for i, batch in enumerate(batches, 1):
            yield to_device(batch, self.plan.device), 1.0
            if i % ASK_EVERY == 0 and self.stop.anywhere():
                return

    def sample(self) -> None:
        """Print and log a text by the model as it was evaluated, in the main process, if one is due."""
        logging, step = self.plan.config.logging, self.progress.step
        if self.log and self.sampler and (self.plan.finished or step % logging.sample_interval < logging.eval_interval):
            with self.updater.averaged():
                text = self.sampler.sample()
            say(f"sample of step {step}:\n{text}\n")
            self.log.write_sample(step, text)

    def readable(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches. Raises UserError or OSError if one can't be read.

        Among several processes such a failure asks all of them to stop, and `example` stands in for the batches: the
        others wait for this process's part of the step, which isn't made.
        """
        try:
            yield from batches
        except (UserError, OSError) as error:
            if WORLD_SIZE == 1:
                raise
            self.failure, self.stop.received = error, signal.SIGTERM
            yield from itertools.repeat(self.example)

    def save(self, last: bool = False) -> None:
        """Writes a checkpoint. If it can't be written, the run goes on, except after the `last` one."""
        plan, progress = self.plan, self.progress
        if plan.config.training.compare_replicas:
            shared = [p for name, p in self.model.named_parameters() if name not in self.sharing.shares]
            self.parallel.check_replicas(shared, progress.step, self.resume)
        is_sharded = self.parallel.is_sharded and plan.config.training.checkpoint_format == "sharded"
        data = self.data.corpus.fingerprint
        state = training_state(
            progress, self.updater, plan.device, plan.dtype, data, gather=not is_sharded, compile=self.compiled
        )
        shards = self.updater.take_shards(state) if is_sharded else {}
        with self.updater.averaged():
            whole = self.sharing.whole(self.model, self.parallel)
        put = partial(save_model, whole, self.tokenizer)
        if not self.parallel.is_sharded:  # `whole` is the model itself, and averaged only in this context
            put = self.updater.averaged()(put)
        state, shards = self.saving.staged(state, shards)
        write = partial(
            save_checkpoint, self.folder, progress.step, progress.best_step, put, state, plan.config.logging.kept,
            shards, self.saving.group,
        )  # fmt: skip
        self.saving.attempt(write, last)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Runs the block so that an error of the data or of a disk loses no step of a single process."""
        try:
            yield
        except (UserError, OSError) as error:
            if WORLD_SIZE > 1 or self.saving.step == self.progress.step or not self.updater.finite():
                raise
            self.save(last=True)
            say(f"step {self.progress.step} is saved; resume with: {self.resume}")
            raise error
        except RuntimeError:  # such as the end of another process
            if WORLD_SIZE > 1 and self.saving.step:
                say(f"step {self.saving.step} is the last one saved; resume with: {self.resume}")
            raise

    @property
    def resume(self) -> str:
        """The command that resumes this run."""
        return distributed.launch_command(sys.argv[0], *self.plan.launch.files, f"--resume={self.folder}")


def build(plan: Plan) -> Run:
    """The model (new, resumed or imported), its optimizer and the run's folder. Raises UserError."""
    launch, config, state, progress = plan.launch, plan.config, plan.state, plan.progress
    training, device, dtype = config.training, plan.device, plan.dtype
    data = plan.data
    assert data is not None, "only a dry run goes without data"
    torch.manual_seed(training.seed)
    parallel = make_parallel(training, device, dtype)
    model, tokenizer = build_model(plan, parallel)
    sampler = make_sampler(config, model, tokenizer)
    folder, lock = launch.resumed, None
    if IS_MAIN and not config.run.eval_only:
        if folder:
            clean_run(folder, progress.step, progress.best_step)
        else:
            folder, lock = claim_new(
                config.run.out_dir, launch.run_name, config.run.overwrite or config.run.init_from == "auto"
            )
        say(f"run            {folder}" + (f", from step {progress.step}" if state else ""))
    folder = distributed.from_main(folder)

    set_up_device(device, dtype)
    sharing = make_shares(training, device)
    choose_kernels(model, training)
    replica = parallel.place(model, device, sharing=sharing)
    example = blank_batch(data.train, plan.micro_batch, config.model.block_size)
    compiled = plan.compile and try_compiling(model, replica, example, device, dtype, training.compile, parallel)
    updater = Updater(model, training, device, dtype, parallel, sharing)
    torch.manual_seed(training.seed + RANK)
    if state and launch.checkpoint:
        restore_state(updater, state, launch.checkpoint, device)
        plan.state = None  # as large as the model, twice
    background = training.async_save and parallel.is_sharded
    saving = Saving(progress, progress.step, config.logging.failed_saves, background)
    run = Run(
        plan, data, folder, lock, model, replica, tokenizer, parallel, sharing, updater,
        StopSignal(config.run.stop_after), compiled, example, sampler, saving,
        Spikes(training.spike_factor, folder, progress, updater, saving), Pace(device), SentenceMeter("val_"),
    )  # fmt: skip
    if IS_MAIN and not config.run.eval_only:
        tracker = start_tracker(folder, progress.step, config.logging, values_of(config))
        name = read_record(folder)[0] if launch.resumed else launch.name
        write_record(folder, config, name, launch.overrides, hardware_of(device, dtype))
        run.log = MetricsLog(folder, progress.step, tracker)
    return run


def build_model(plan: Plan, parallel: Parallel) -> tuple[GPT, Tokenizer | None]:
    if parallel.is_sharded and not IS_MAIN:  # `place` gives it its shard of the main process's model
        with meta_device():
            return GPT(plan.config.model), plan.tokenizer
    if not plan.origin:
        return GPT(plan.config.model), plan.tokenizer
    model, trained_tokenizer = load_model(plan.origin, plan.config.model)
    plan.check_tokenizer(trained_tokenizer)
    return model, plan.tokenizer or trained_tokenizer


def evaluate_only(run: Run) -> int:
    val_loss = run.val_loss()
    if run.failure:
        raise run.failure
    if val_loss is None:
        return 128 + run.stop.anywhere()
    plan = run.plan
    windows = f"{counted(len(plan.val_starts), 'window')} of {plan.config.model.block_size}"
    which = f"step {plan.progress.step}" if plan.launch.resumed else plan.launch.imported or "an untrained model"
    with naming(which):
        check_finite([val_loss])
    say(f"{which}: val loss {val_loss:.4f} over {windows} in {counted(len(run.data.val), 'token')}")
    for name, value in run.val_sentences.take().items():
        say(f"{name.replace('_', ' ')} {value:.4f}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
def train(run: Run) -> int:
    """The training loop. Returns the exit code.

    A loss is a sum over tokens, divided by the scored tokens of the global batch; each process multiplies by the number
    of processes, since DistributedDataParallel averages their gradients.
    """
    plan, progress, model, updater = run.plan, run.progress, run.model, run.updater
    config, device, dtype = plan.config, plan.device, plan.dtype
    training, logging, block_size = config.training, config.logging, config.model.block_size
    sequences, tokens_per_step = config.sequences_per_step, plan.tokens_per_step
    scored_per_step = tokens_per_step * config.scored_share
    share = (plan.micro_batch, block_size, RANK, WORLD_SIZE)
    batches = training_batches(run.data.train, run.data.order, progress.consumed, sequences, *share)
    batches = run.pace.timed(run.readable(prefetch(batches, device)))
    meter, routers, sentences = Meter(), RouterMeter(model), SentenceMeter()
    measure_peak = partial(peak_flops, device, device_name(device), dtype)
    utilization = Utilization(measure_peak, plan.flops_per_token, WORLD_SIZE)
    learning_rate = grad_norm = None
    stopped = False
    bar = ProgressBar(training.max_iters, progress.step, "step", config.run.quiet)
    model.train()
    while True:
        # evaluate what is due, also where a signal cut an evaluation short; log; save
        done = plan.finished
        due = progress.evaluated_step != progress.step and (done or progress.step % logging.eval_interval == 0)
        val_loss = run.val_loss() if due and not stopped else None
        stopped = stopped or (due and val_loss is None)
        if (done or stopped or val_loss is not None) and not updater.finite(val_loss or 0.0):
            bar.close()
            return report_divergence(run, progress.step)
        if val_loss is not None:
            progress.evaluated(val_loss)
            done = done or plan.out_of_patience
        if run.log and (val_loss is not None or meter.tokens and (done or progress.step % logging.log_interval == 0)):
            train_loss, rate = meter.take()
            line = {
                "step": progress.step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens": progress.consumed * block_size,
                "tokens_per_second": rate,
                "seconds": progress.seconds,
                "mfu": utilization.at(rate),
                **progress.mishaps,
                **routers.take() | sentences.take() | run.val_sentences.take(),
            }
            run.log.write(line)
            bar.show(line)
        if val_loss is not None:
            run.save()
            run.sample()
        if done or stopped:
            break

        # forward and backward; processes share their gradients after the last micro-batch
        started = time.perf_counter()
        learning_rate = learning_rate_at(progress.step, training)
        step_loss = torch.zeros((), device=device)
        for i in range(1, plan.micro_steps + 1):
            batch = next(batches)
            with run.parallel.sharing_gradients(run.replica, i == plan.micro_steps):
                with autocast(device, dtype):
                    loss = run.replica(*to_device(batch, device))
                auxiliary: Tensor | float = sum(loss.auxiliary.values()) / plan.micro_steps  # means
                updater.backward(loss.total * (WORLD_SIZE / scored_per_step) + auxiliary)
            step_loss += loss.total.detach()
            routers.add()
            sentences.add(loss)
        if run.failure:  # the batch that stood in doesn't count: no process makes the update
            step_loss *= math.nan

        # the update, if everything is finite; has a process been asked to stop?
        finite, grad_norm, (loss_sum, stopped) = updater.update(learning_rate, step_loss, run.stop.number)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        routers.step(finite)
        sentences.step(finite)
        if finite or not stopped:  # otherwise the resumed run reads the batch again
            progress.consumed += sequences
        if finite:
            progress.step += 1
            meter.add(loss_sum / config.scored_share, tokens_per_step, seconds)
            if run.spikes.rewind_after(loss_sum / scored_per_step, run.log):
                meter.take()
            bar.update(progress.step - bar.n)
        elif not stopped:
            progress.skipped += 1
            say(f"step {progress.step + 1}: {updater.problem}; the batch is skipped")
            if updater.diverged:
                bar.close()
                return report_divergence(run, progress.step + 1)
    bar.close()
    code = finish(run, bool(stopped))
    distributed.from_main(None)  # torchrun ends all processes when one ends in an error
    if run.failure:
        raise run.failure
    return code


# ---------------------------------------------------------------------------------------------------------------------
def report_divergence(run: Run, step: int) -> int:
    run.saving.wait()
    kept = f"{run.folder}/last is the last good checkpoint" if run.saving.step else "there is no checkpoint yet"
    say(f"step {step} has diverged, {kept}: lower learning_rate, or set dtype = float32")
    return 1


def finish(run: Run, stopped: bool) -> int:
    """Save what isn't saved yet, and say how to resume or where the model is. Returns the exit code."""
    progress = run.progress
    run.saving.wait()
    if run.saving.step != progress.step:
        run.save(last=True)
    if run.log:
        run.log.close()
    if stopped:
        saved = f", saved; resume with: {run.resume}" if run.saving.step else ""
        say(f"stopped at step {progress.step}{saved}")
        return 128 + run.stop.anywhere()
    say(run.plan.summary(run.folder))
    dataset = run.plan.config.data.sources[0].name if run.tokenizer else None
    longer = f"{run.resume} --max_iters={2 * run.plan.config.training.max_iters}"
    say(after_training(run.folder, dataset, longer, run.plan.config.is_masked))
    return 0


def main() -> int:
    launch = read_command_line(sys.argv[1:], __doc__)
    trained_on, hold = None, None
    if launch.resumed:
        if launch.config.run.eval_only or launch.config.run.dry_run:
            hold = contextlib.ExitStack()  # the run may go on in another process
        elif IS_MAIN:
            lock = Lock(launch.resumed)  # noqa: F841  before its state is read, and until the process ends
        checkpoint = resumable(launch.resumed, hold)
        launch = dataclasses.replace(launch, checkpoint=checkpoint)
        trained_on = load_state(checkpoint, on_disk=True)["runtime"]["device"] if checkpoint else None
    device = resolve_device(launch.config.training.device, LOCAL_RANK, prefer=trained_on)
    training = launch.config.training
    with distributed.process_group(training.backend, device, training.timeout_minutes):
        plan = make_plan(launch, device)
        print_plan(plan)
        if launch.config.run.dry_run:
            sketch, tokenizer = rehearse(plan)
            if plan.data:
                make_sampler(plan.config, sketch, tokenizer)
            return 0
        run = build(plan)
        if launch.config.run.eval_only:
            return evaluate_only(run)
        if launch.resumed and plan.finished:
            setting = "patience" if plan.out_of_patience else "max_iters"
            value = getattr(plan.config.training, setting)
            say(f"{run.folder} is finished: a {setting} above {value} goes on, such as --{setting}={2 * value}")
        with run.keeping():
            return train(run)


if __name__ == "__main__":
    entry_point(main)()
