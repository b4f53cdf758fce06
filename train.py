"""Train a GPT.

    python train.py configs/quickstart.toml                        on whatever this machine has
    python train.py configs/gpt2.toml --dataset=mytext --max_iters=2000
    python train.py --resume=out/quickstart                 resume a run
    torchrun --standalone --nproc_per_node=8 train.py configs/gpt2.toml

Settings come from the config files named, later ones winning, and from flags, which win over files. A run writes
out/NAME/: config.toml, metrics.jsonl and checkpoints, to which `last` and `best` point.
"""

import contextlib
import dataclasses
import itertools
import math
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from gpt_arc import distributed
from gpt_arc.data.batches import evaluation_batches, prefetch, training_batches
from gpt_arc.data.datasets import data_plan, open_corpus, prepare_missing
from gpt_arc.device import (
    autocast,
    device_name,
    resolve_device,
    resolve_dtype,
    rng_state,
    set_rng_state,
    set_up_device,
    to_device,
)
from gpt_arc.distributed import IS_MAIN, LOCAL_RANK, RANK, WORLD_SIZE, say
from gpt_arc.errors import UserError, entry_point
from gpt_arc.planning.cost import describe_parameters, flops_per_token, memory_estimate, peak_flops
from gpt_arc.settings import values_of
from gpt_arc.tables import human
from gpt_arc.training import checkpoints, runs
from gpt_arc.training.command_line import Launch, check_same_model, read_command_line
from gpt_arc.training.compile import compile_in_place, resolve_compile
from gpt_arc.training.expert_parallel import ExpertParallel, check_expert_processes
from gpt_arc.training.log import Meter, MetricsLog
from gpt_arc.training.optim import Updater, check_same_optimizer
from gpt_arc.training.routers import RouterMeter
from gpt_arc.training.schedule import learning_rate_at
from gpt_arc.training.signals import StopSignal
from gpt_arc.weights.directory import load_config, load_model, save_model
from model import GPT


@dataclass
class Progress:
    """How far a run has come: with the weights, the optimizer and the generators, all that resuming takes."""

    step: int = 0  # optimizer updates made
    consumed: int = 0  # sequences read
    skipped: int = 0  # steps left out because their gradient was not finite
    seconds: float = 0.0  # of training; evaluation and checkpoints left out
    evaluated_step: int = 0
    best_val_loss: float = math.inf
    best_step: int | None = None


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[tuple[Tensor, ...]], device: torch.device, dtype: str, stop: StopSignal
) -> float | None:
    """Mean cross-entropy in nats over the batches of all processes; None if a signal came meanwhile."""
    sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    model.eval()
    for batch in tqdm(batches, "evaluating", leave=False, disable=None if IS_MAIN else True):
        with autocast(device, dtype):
            loss = model(*to_device(batch, device))
        sums += torch.stack((loss.total, loss.count))
        if stop.anywhere():
            break
    model.train()
    total, count = distributed.sum_over_ranks(sums).tolist()
    return None if stop.anywhere() else total / count


def train(launch: Launch, device: torch.device) -> int:
    config = launch.config
    training, logging = config.training, config.logging

    # ---- data: what is missing and small is prepared; a dataset's vocabulary replaces a preset's
    if IS_MAIN and not config.run.dry_run:
        prepare_missing(config.data.sources)
    distributed.from_main(None)  # others wait for it
    corpus = open_corpus(config.data.sources)
    tokenizer = corpus and corpus.tokenizer
    vocab_size, block_size = config.model.vocab_size, config.model.block_size
    trained = load_config(launch.resumed / "last") if launch.resumed else None
    if tokenizer and not launch.imported:
        vocab_size = trained.vocab_size if trained else tokenizer.vocab_size
    if vocab_size != config.model.vocab_size:
        say(f"vocabulary     {vocab_size}, as the dataset has it, in place of {config.model.vocab_size}")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    masked = config.data.document_mask
    train_tokens, val_tokens = (corpus and corpus.split(s, block_size, vocab_size, masked) for s in ("train", "val"))
    order = corpus and train_tokens.training_order(block_size, training.seed)

    # ---- what "auto" means here; a resumed run keeps what it meant at first
    state, progress = None, Progress()
    dtype_setting, compile_setting = training.dtype, training.compile
    if launch.resumed:
        state = checkpoints.load_state(launch.resumed / "last")
        progress = Progress(**state["progress"])
        check_same_model(config.model, trained, launch.resumed)
        check_same_optimizer(training.optimizer, state)
        if corpus and corpus.fingerprint != state["data"]:
            say(f"the data of {', '.join(corpus.names)} are not those that the run has seen so far")
        if state["runtime"]["device"] == device.type:
            dtype_setting = state["runtime"]["dtype"] if dtype_setting == "auto" else dtype_setting
            compile_setting = state["runtime"]["compile"] if compile_setting == "auto" else compile_setting
    dtype = resolve_dtype(dtype_setting, device)
    check_expert_processes(training.expert_processes, config.model.n_experts, dtype)
    micro_steps, micro_batch = distributed.split_batch(config.sequences_per_step, config.data.batch_size)
    tokens_per_step = config.sequences_per_step * block_size
    with torch.device("meta"):
        sketch = GPT(config.model)
    flops_per_step = flops_per_token(sketch) * tokens_per_step
    steps_left = training.max_iters - progress.step
    compiled, why = resolve_compile(compile_setting, device, flops_per_step * steps_left)
    name = device_name(device)
    peak = peak_flops(device, name, dtype)

    # ---- the plan in figures
    if launch.adopted:
        say(f"architecture   of {launch.imported}: {', '.join(f'{n} = {v}' for n, v in launch.adopted.items())}")
    say(
        f"parameters     {describe_parameters(sketch)} ({sketch.num_parameters(embeddings=False):,} without embeddings)"
    )
    say(f"operations     {human(flops_per_step / tokens_per_step, 'FLOP')} a token, forward and backward")
    say(f"tokens a step  {tokens_per_step:,} = {WORLD_SIZE} x {micro_steps} batches of {micro_batch} x {block_size}")
    say(f"steps          {training.max_iters:,}")
    for line in data_plan(config.data.sources, train_tokens, training.max_iters * tokens_per_step):
        say(f"data           {line}")
    memory = memory_estimate(
        sketch, micro_batch, dtype, device.type, training.activation_checkpointing, training.expert_processes
    )
    say(f"memory         about {human(memory, 'B')} on each device")
    say(f"device         {device} ({name}), {dtype}, {'compiled' if compiled else 'not compiled'}: {why}")
    if config.run.dry_run:
        return 0

    # ---- the model: new, resumed or imported
    torch.manual_seed(training.seed)
    origin = launch.resumed / "last" if state else launch.imported
    if origin:
        model, its_tokenizer = load_model(origin, config.model)
        if tokenizer and its_tokenizer and tokenizer != its_tokenizer:
            raise UserError(f"the dataset has another tokenizer than {origin}: prepare it with --tokenizer {origin}")
        tokenizer = tokenizer or its_tokenizer
    else:
        model = GPT(config.model)

    # ---- the run's folder, held from here on
    run = launch.resumed
    if IS_MAIN and not config.run.eval_only:
        if run:
            checkpoints.clean_run(run, progress.step, progress.best_step)
        else:
            run, lock = runs.claim_new(config.run.out_dir, launch.name, config.run.overwrite)  # noqa: F841  by name
        say(f"run            {run}" + (f", from step {progress.step}" if state else ""))
    run = distributed.from_main(run)

    # ---- where and how it runs, optimizer, random generators
    set_up_device(device, dtype)
    sharing = ExpertParallel(model, training.expert_processes, device)
    model.to(device).activation_checkpointing = training.activation_checkpointing
    replica = model if WORLD_SIZE == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)
    if compiled:
        say("compiling      takes a minute or so")
        example = [torch.zeros(micro_batch, block_size, dtype=torch.int64)] * (3 if masked else 2)
        failure = compile_in_place(model, replica, example, device, dtype)
        if failure and training.compile is True:
            raise UserError(f"compile = true can't work here; --compile=False goes without it: {failure}")
        if failure:
            say(f"not compiled   {failure}")
            compiled = False
    updater = Updater(model, training, device, dtype, sharing)
    torch.manual_seed(training.seed + RANK)
    if state:
        updater.load_state_dict(state)
        if RANK < len(state["generators"]):
            set_rng_state(state["generators"][RANK], device)
        del state  # as large as the model, twice

    # ---- evaluation: the same windows every time
    stop = StopSignal()
    val_starts = val_tokens.evaluation_starts(block_size, logging.eval_iters * config.data.batch_size)

    @updater.averaged()
    def val_loss_now() -> float | None:
        batches = evaluation_batches(val_tokens, val_starts, micro_batch, block_size, RANK, WORLD_SIZE)
        return evaluate(model, prefetch(batches, device), device, dtype, stop)

    if config.run.eval_only:
        val_loss = val_loss_now()
        if val_loss is None:
            return 128 + stop.anywhere()
        windows = f"{len(val_starts):,} windows of {block_size} in {len(val_tokens):,} tokens"
        which = f"step {progress.step}" if run else launch.imported or "an untrained model"
        say(f"{which}: val loss {val_loss:.4f} over {windows}")
        return 0

    # ---- what is written
    log = wandb_run = None
    if IS_MAIN and logging.wandb_log:
        import wandb

        wandb_name = logging.wandb_run_name or run.name
        try:
            wandb_run = wandb.init(project=logging.wandb_project, name=wandb_name, config=values_of(config), dir=run)
        except wandb.errors.Error as error:
            raise UserError(f"Weights & Biases: {error}; WANDB_MODE=offline logs without an account") from None
    if IS_MAIN:
        name = runs.read_record(run)[0] if launch.resumed else launch.name
        runs.write_record(run, config, name, launch.overrides)
        log = MetricsLog(run, progress.step)

    def tired() -> bool:
        """Whether the last `patience` evaluations were no better than one before them."""
        waited = progress.evaluated_step - (progress.best_step or 0)
        return training.patience is not None and waited >= training.patience * logging.eval_interval

    def save() -> None:
        state = {
            "progress": dataclasses.asdict(progress),
            **updater.state_dict(),
            "generators": distributed.gather(rng_state(device)),
            "runtime": {"device": device.type, "dtype": dtype, "compile": compiled},
            "data": corpus.fingerprint,
        }
        whole = sharing.whole(model)
        if IS_MAIN:
            write = updater.averaged()(partial(save_model, whole, tokenizer))
            keep_all = logging.keep_all_checkpoints
            checkpoints.save_checkpoint(run, progress.step, progress.best_step, write, state, keep_all)

    # -----------------------------------------------------------------------------------------------------------------
    # The training loop. A loss is a sum over tokens, divided by the tokens of the global batch; each process multiplies
    # by the number of processes, since DistributedDataParallel averages their gradients.
    sequences = config.sequences_per_step
    batches = training_batches(
        train_tokens, order, progress.consumed, sequences, micro_batch, block_size, RANK, WORLD_SIZE
    )
    batches = prefetch(batches, device)
    meter, routers = Meter(), RouterMeter(model)
    learning_rate = grad_norm = None
    saved_step, stopped, not_finite = progress.step, False, 0  # not_finite: steps in a row
    bar = tqdm(total=training.max_iters, initial=progress.step, unit="step", disable=None if IS_MAIN else True)
    model.train()
    while True:
        # evaluate what is due, also where a signal cut an evaluation short; log; save
        done = progress.step >= training.max_iters or tired()
        due = progress.evaluated_step != progress.step and (done or progress.step % logging.eval_interval == 0)
        val_loss = val_loss_now() if due and not stopped else None
        if val_loss is not None:
            progress.evaluated_step = progress.step
            if val_loss < progress.best_val_loss:
                progress.best_val_loss, progress.best_step = val_loss, progress.step
            done = done or tired()
        if IS_MAIN and (val_loss is not None or meter.tokens and (done or progress.step % logging.log_interval == 0)):
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
                "mfu": rate * flops_per_step / tokens_per_step / (peak * WORLD_SIZE) if peak and rate else None,
                "skipped": progress.skipped or None,
                **routers.take(),
            }
            line = {name: value for name, value in line.items() if value is not None}
            log.write(line)
            if wandb_run:
                wandb_run.log(line, step=progress.step)
            figures = {"loss": (train_loss, ".4f"), "val": (val_loss, ".4f"), "rate": (learning_rate, ".2e")}
            shown = ", ".join(f"{name} {value:{form}}" for name, (value, form) in figures.items() if value is not None)
            bar.set_postfix_str(shown)
            if bar.disable or val_loss is not None:
                say(f"step {progress.step}: {shown}" + (f", {rate:,.0f} tokens/s" if rate else ""))
        if val_loss is not None:
            save()
            saved_step = progress.step
        stopped = stopped or (due and val_loss is None)
        if done or stopped:
            break

        # forward and backward; processes share their gradients after the last micro-batch
        started = time.perf_counter()
        learning_rate = learning_rate_at(progress.step, training)
        step_loss = torch.zeros((), device=device)
        for i, batch in enumerate(itertools.islice(batches, micro_steps), start=1):
            more_to_come = WORLD_SIZE > 1 and i < micro_steps
            with replica.no_sync() if more_to_come else contextlib.nullcontext():
                with autocast(device, dtype):
                    loss = replica(*to_device(batch, device))
                routing = sum(loss.auxiliary.values()) / micro_steps  # of routers: a mean over batches and processes
                updater.backward(loss.total * (WORLD_SIZE / tokens_per_step) + routing)
            step_loss += loss.total.detach()
            routers.add()
        progress.consumed += sequences

        # the update, if all is finite; has a process been asked to stop?
        finite, grad_norm, (loss_sum, stopped) = updater.update(learning_rate, step_loss, stop.number)
        took = time.perf_counter() - started
        progress.seconds += took
        routers.step(finite)
        if finite:
            progress.step += 1
            not_finite = 0
            meter.add(loss_sum, tokens_per_step, took)
            bar.update()
            continue

        # float16 finds its loss scale by overflowing; otherwise two steps in a row won't mend themselves
        progress.skipped += 1
        not_finite += 1
        say(f"step {progress.step + 1}: the loss or its gradient is not finite; the batch is skipped")
        if not_finite == (20 if updater.scaler.is_enabled() else 2):
            bar.close()
            kept = f"{run}/last is the last good checkpoint" if saved_step else "there is no checkpoint yet"
            say(f"step {progress.step + 1} has diverged, {kept}: lower learning_rate, or set dtype = float32")
            return 1
    bar.close()
    # -----------------------------------------------------------------------------------------------------------------

    if saved_step != progress.step:
        save()
    if wandb_run:
        wandb_run.finish()
    if stopped:
        resume = shlex.join((sys.argv[0], *launch.files, f"--resume={run}"))
        python = "python" if WORLD_SIZE == 1 else f"torchrun --standalone --nproc_per_node={WORLD_SIZE}"
        say(f"stopped at step {progress.step}, saved; go on with: {python} {resume}")
        return 128 + stop.anywhere()
    early = f" of {training.max_iters}, by patience = {training.patience}" * (progress.step < training.max_iters)
    best = f"best val loss {progress.best_val_loss:.4f} at step {progress.best_step}"
    say(f"finished step {progress.step}{early}: {best}; {run}/best, {run}/last")
    return 0


def main() -> int:
    launch = read_command_line(sys.argv[1:], __doc__)
    began_on = None
    if launch.resumed:
        if IS_MAIN and not (launch.config.run.eval_only or launch.config.run.dry_run):
            lock = runs.Lock(launch.resumed)  # noqa: F841  before its state is read, and until the process ends
        began_on = checkpoints.load_state(launch.resumed / "last", peek=True)["runtime"]["device"]
    device = resolve_device(launch.config.training.device, LOCAL_RANK, prefer=began_on)
    with distributed.process_group(launch.config.training.backend, device):
        return train(launch, device)


if __name__ == "__main__":
    entry_point(main)()
