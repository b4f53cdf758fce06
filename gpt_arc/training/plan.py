"""What a training run will do: settings, data, device and the state it resumes from, before a model is built."""

import dataclasses
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic.dataclasses
import torch
from pydantic import AllowInfNan

from gpt_arc import distributed
from gpt_arc.data.datasets import Corpus, Split, data_plan, open_corpus, prepare_missing
from gpt_arc.data.masking import Masking, mask_token, sentence_marks
from gpt_arc.data.next_sentence import SentencePairs, same_document
from gpt_arc.data.order import MixtureOrder, TrainingOrder
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.device import capability_of, device_name, memory_of, resolve_dtype
from gpt_arc.distributed import IS_MAIN, LOCAL_RANK, WORLD_SIZE, say
from gpt_arc.errors import UserError
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.budget import Hardware, accelerator_named
from gpt_arc.planning.cost import describe_parameters, flops_per_token, memory_estimate, peak_flops
from gpt_arc.planning.layout import MEMORY, Layout
from gpt_arc.reading import reading
from gpt_arc.settings import Natural, NonNegative
from gpt_arc.tables import counted, duration, human
from gpt_arc.training.checkpoints import ADVICE, CHECKED, load_state, state_file
from gpt_arc.training.command_line import Launch, check_same_model
from gpt_arc.training.compile import check_graphs, resolve_compile
from gpt_arc.training.config import Config
from gpt_arc.training.expert_parallel import check_expert_processes
from gpt_arc.training.kernels import check_flash_attention, check_float8, check_residual, choose_kernels
from gpt_arc.training.log import trained
from gpt_arc.training.offload import check_offload
from gpt_arc.training.optim import check_same_optimizer
from gpt_arc.training.parallel_modes import check_parallel
from gpt_arc.training.runs import check_out_dir
from gpt_arc.training.tensor_parallel import check_tensor_processes
from gpt_arc.training.threads import resolve_threads
from gpt_arc.weights.directory import check_model, load_config, local_directory
from gpt_arc.weights.huggingface import nearest_architecture
from model import GPT

MANY_EPOCHS = 400  # a model repeats the text long before


@pydantic.dataclasses.dataclass(config=CHECKED)
class Progress:
    """How far a run has come: with the weights, the optimizer and the generators, all that resuming needs."""

    step: Natural = 0  # optimizer updates made
    consumed: Natural = 0  # sequences read
    skipped: Natural = 0  # steps left out because their gradient was not finite
    rewinds: Natural = 0  # returns to a checkpoint after a spike of the loss
    seconds: NonNegative = 0.0  # of training, without evaluations and checkpoints
    evaluated_step: Natural = 0
    best_val_loss: Annotated[NonNegative, AllowInfNan(True)] = math.inf  # until an evaluation; NaN isn't at least 0
    best_step: Natural | None = None

    @property
    def mishaps(self) -> dict[str, int]:
        """What metrics.jsonl counts if it has happened."""
        return {name: count for name in ("skipped", "rewinds") if (count := getattr(self, name))}

    def evaluated(self, val_loss: float) -> None:
        """Records the val loss of the present step."""
        self.evaluated_step = self.step
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step = val_loss, self.step


class Data(NamedTuple):
    """What a run trains and evaluates on."""

    corpus: Corpus
    train: Split
    val: Split
    order: TrainingOrder | MixtureOrder  # of the training windows


@dataclass
class Plan:
    """What a run will do. `config` has the dataset's vocabulary."""

    launch: Launch
    config: Config
    data: Data | None  # None where a dry run finds no dataset
    device: torch.device
    dtype: str
    compile: bool
    why_compile: str
    state: dict[str, Any] | None  # of the run that is resumed
    progress: Progress
    micro_steps: int  # forward and backward passes of this process in a step
    micro_batch: int  # sequences in each
    flops_per_token: int

    @property
    def tokens_per_step(self) -> int:
        return self.config.sequences_per_step * self.config.model.block_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The dataset's."""
        return self.data and self.data.corpus.tokenizer

    @property
    def origin(self) -> Path | str | None:
        """The model to start from."""
        return self.launch.checkpoint or self.launch.imported

    @property
    def val_starts(self) -> np.ndarray:
        """Where the windows begin that are evaluated, in the val split."""
        assert self.data is not None
        windows = self.config.logging.eval_iters * self.config.data.batch_size
        return self.data.val.evaluation_starts(self.config.model.block_size, windows)

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations were no better than an earlier one."""
        patience = self.config.training.patience
        waited = self.progress.evaluated_step - (self.progress.best_step or 0)
        return patience is not None and waited >= patience * self.config.logging.eval_interval

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.config.training.max_iters or self.out_of_patience

    def summary(self, folder: Path) -> str:
        """Returns what a finished run, in `folder`, reached, and in how long."""
        progress, planned = self.progress, self.config.training.max_iters
        early = f" of {planned}, by patience = {self.config.training.patience}" * (progress.step < planned)
        best = f"best val loss {progress.best_val_loss:.4f} at step {progress.best_step}"
        time = trained(progress.seconds, progress.consumed * self.config.model.block_size)
        return f"finished step {progress.step}{early}: {best}; {folder}/best, {folder}/last\n{time}"

    def check_tokenizer(self, trained: Tokenizer | None) -> None:
        """Raises UserError if the dataset has another tokenizer than `trained`, the one of `origin`."""
        if self.tokenizer and trained and self.tokenizer != trained:
            raise UserError(
                f"the dataset has another tokenizer than {self.origin}: prepare it with --tokenizer "
                f"{shlex.quote(str(self.origin))}"
            )


def make_plan(launch: Launch, device: torch.device) -> Plan:
    """Open the data and the state of a resumed run, and resolve every "auto". Raises UserError."""
    config, state, progress = launch.config, None, Progress()
    planned = config.run.planned_accelerator
    if planned:
        accelerator_named(planned)  # refused before anything is printed
    for prepares in (IS_MAIN, LOCAL_RANK == 0):  # other machines prepare what they don't find on the main one's disk
        if prepares and not config.run.dry_run:
            prepare_missing(config.data.sources)
        distributed.from_main(None)  # the other processes wait for the data
    corpus = open_corpus(config.data.sources, config.run.verify)

    # a dataset's vocabulary replaces a preset's; a trained model keeps its own
    vocab_size, block_size = config.model.vocab_size, config.model.block_size
    trained = load_config(launch.checkpoint) if launch.checkpoint else None
    if corpus and corpus.tokenizer and not launch.imported:
        vocab_size = trained.vocab_size if trained else least_vocabulary(config, corpus.tokenizer)
    if vocab_size != config.model.vocab_size:
        added = "tokens to hide others and around texts" if config.model.next_sentence else "a token to hide others"
        dataset = f"the dataset with {added}" if config.is_masked else "the dataset"
        say(f"vocabulary     {vocab_size}, as in {dataset}, instead of {config.model.vocab_size}")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    data = None
    if corpus:
        maskings = masking_of(config, corpus), masking_of(config, corpus, evaluating=True)
        train, val = (
            corpus.split(name, block_size, vocab_size, config.data.document_mask, masking)
            for name, masking in zip(("train", "val"), maskings)
        )
        data = Data(corpus, train, val, train.training_order(block_size, config.training.seed))
        check_documents(data)

    # a resumed run keeps the precision, compilation and threads that "auto" meant when it started
    training = config.training
    dtype, compile_setting, threads = training.dtype, training.compile, None
    if launch.checkpoint and launch.resumed and trained:
        # a GPU copies it from the disk, and under fsdp each process takes its shard; else it is what the run changes
        on_disk = device.type == "cuda" or training.parallel == "fsdp"
        state = load_state(launch.checkpoint, on_disk=on_disk)
        with reading(state_file(launch.checkpoint), ADVICE):
            progress = Progress(**state["progress"])
        if training.max_iters < progress.step:
            raise UserError(
                f"max_iters = {training.max_iters} lies below step {progress.step}, which the run {launch.resumed} has "
                "reached: name a larger one to go on"
            )
        check_same_model(config.model, trained, launch.resumed)
        check_same_optimizer(training.optimizer, state)
        if corpus and corpus.fingerprint != state["data"]:
            say(f"the data of {', '.join(corpus.names)} differ from what the run has seen so far")
            progress.best_val_loss = math.inf  # losses on other texts don't compare
        if state["runtime"]["device"] == ("cuda" if planned else device.type):
            dtype = state["runtime"]["dtype"] if dtype == "auto" else dtype
            compile_setting = state["runtime"].get("compile", False) if compile_setting == "auto" else compile_setting
            threads = state["runtime"].get("threads", torch.get_num_threads())
    elif training.warmup_steps >= training.max_iters:
        raise UserError(
            f"the warmup takes {counted(training.warmup_steps, 'step')} and the run has {training.max_iters:,}, so the "
            "learning rate never reaches its peak: --warmup=0.02 makes it 2% of the run"
        )
    dtype = resolve_products(config, dtype, device)
    check_parallel(training, config.run.planned_devices)
    check_expert_processes(training.expert_processes, config.model.n_experts, dtype, config.run.planned_devices)
    check_tensor_processes(config, dtype)
    with meta_device():
        flops = flops_per_token(GPT(config.model))
    steps_left = training.max_iters - progress.step
    flops_left = flops * config.sequences_per_step * block_size * steps_left
    compiled, why = False, "tensor_processes is set"
    if planned:
        check_graphs(compile_setting, config.run.devices, planned, is_gpu=True)
    elif training.tensor_processes == 1 or training.compile != "auto":
        compiled, why = resolve_compile(compile_setting, device, flops_left)
    micro_steps, micro_batch = distributed.split_batch(config.sequences_per_step, config.data.batch_size)
    if not planned:
        torch.set_num_threads(resolve_threads(config, threads, micro_batch, flops, device, dtype))
    return Plan(
        launch=launch,
        config=config,
        data=data,
        device=device,
        dtype=dtype,
        compile=compiled,
        why_compile=why,
        state=state,
        progress=progress,
        micro_steps=micro_steps,
        micro_batch=micro_batch,
        flops_per_token=flops,
    )


def resolve_products(config: Config, setting: str, device: torch.device) -> str:
    """Returns the precision of matrix products by the setting of `dtype`.

    Raises UserError if what is set is not for the device, or the accelerator that a dry run plans for.
    """
    training, planned = config.training, config.run.planned_accelerator
    if planned:
        accelerator = accelerator_named(planned)
        dtype = accelerator.native_dtype if setting == "auto" else setting
        capability, name = accelerator.capability, planned
    else:
        dtype = resolve_dtype(setting, device)
        capability, name = capability_of(device), device_name(device)
        check_offload(training, device)
    check_float8(training, capability, name)
    check_flash_attention(training, dtype, capability, name)
    check_residual(training, dtype)
    return dtype


def least_vocabulary(config: Config, tokenizer: Tokenizer) -> int:
    """The tokenizer's vocabulary, with [MASK] if something must be hidden, and [CLS] and [SEP] if pairs are read."""
    if not config.is_masked:
        return tokenizer.vocab_size
    marks = sentence_marks(tokenizer, True) if config.model.next_sentence else None
    return 1 + max(tokenizer.vocab_size - 1, mask_token(tokenizer), *(marks or ()))


def masking_of(config: Config, corpus: Corpus, evaluating: bool = False) -> Masking | None:
    """How the objective hides tokens; None for `next`. An evaluation hides the same ones in every run."""
    if not config.is_masked:
        return None
    if corpus.tokenizer is None:
        raise UserError(
            f"objective = masked hides tokens by one more token than the vocabulary has, and {corpus.directories[0]} "
            "has no tokenizer that says how many these are: prepare the text with one"
        )
    token, rate = mask_token(corpus.tokenizer), config.training.mask_rate
    if token >= config.model.vocab_size:
        raise UserError(
            f"objective = masked hides tokens by token {token}, and the model has {config.model.vocab_size:,} tokens"
        )
    seed = 0 if evaluating else config.training.seed
    pairs = None
    if config.model.next_sentence and (marks := sentence_marks(corpus.tokenizer, True)):
        if max(marks) >= config.model.vocab_size:
            raise UserError(
                f"next_sentence puts the tokens {marks[0]} and {marks[1]} around texts, and the model has "
                f"{config.model.vocab_size:,} tokens: train a new one, without init_from"
            )
        pairs = SentencePairs(*marks, corpus.separator("next_sentence"), seed)
    return Masking(token, corpus.tokenizer.text_size, rate, seed, pairs)


def check_documents(data: Data) -> None:
    """Raises UserError if next_sentence finds no second document in a dataset."""
    for name, split in (("train", data.train), ("val", data.val)):
        pairs = split.masking and split.masking.pairs
        for first, last, directory in zip(split.bounds, split.bounds[1:] - 2, data.corpus.directories):
            if pairs and same_document(split, int(first), int(last), pairs.separator):
                raise UserError(
                    f"next_sentence draws texts from other documents, and the {name} split of {directory} is a single "
                    "one: prepare more documents, or set next_sentence = false"
                )


def rehearse(plan: Plan) -> tuple[GPT, Tokenizer | None]:
    """Refuses what `build` in train.py would, for a dry run. Returns the model, without weights, and its tokenizer.

    Fetches and prepares nothing and reads no weights into memory. With `accelerator` the run is for another machine,
    whose packages aren't looked for here.
    """
    config, tokenizer = plan.config, plan.tokenizer
    if plan.origin and local_directory(plan.origin):
        trained = check_model(plan.origin)
        plan.check_tokenizer(trained)
        tokenizer = tokenizer or trained
    if config.run.out_dir and not (plan.launch.resumed or config.run.eval_only):
        check_out_dir(config.run.out_dir, config.run.overwrite or config.run.init_from == "auto")
    with meta_device():
        sketch = GPT(config.model)
    if not config.run.planned_accelerator:
        choose_kernels(sketch, config.training)
    return sketch, tokenizer


def print_plan(plan: Plan) -> None:
    """Print what the run is about to do, one line a subject."""
    config, launch, block_size = plan.config, plan.launch, plan.config.model.block_size
    with meta_device():
        sketch = GPT(config.model)
    run, planned = config.run, config.run.planned_accelerator
    if len(launch.files) > 1:
        say(f"settings       of {', then '.join(launch.files)}, which wins")
    if launch.adopted:
        say(f"architecture   of {launch.imported}: {', '.join(f'{n} = {v}' for n, v in launch.adopted.items())}")
    without_embeddings = sketch.num_parameters(embeddings=False)
    say(f"parameters     {describe_parameters(sketch)} ({without_embeddings:,} without embeddings)")
    say(f"operations     {human(plan.flops_per_token, 'FLOP')} a token, forward and backward")
    batches = f"{WORLD_SIZE} x {plan.micro_steps} batches of {plan.micro_batch} x {block_size}"
    say(f"tokens a step  {plan.tokens_per_step:,} = {batches}")
    if config.is_masked:
        pairs = ", and whether a text follows another" if config.model.next_sentence else ""
        say(f"objective      masked: {config.scored_share:.1%} of the tokens are predicted{pairs}")
    say(f"steps          {config.training.max_iters:,}")
    flops = config.training.max_iters * plan.tokens_per_step * plan.flops_per_token
    if planned:
        hardware = Hardware(planned, run.devices, run.device_mfu, run.device_price, plan.dtype)
        say(f"cost           {flops:.3g} FLOPs: {hardware.cost(flops)}")
    elif run.dry_run and (peak := peak_flops(plan.device, device_name(plan.device), plan.dtype)):
        seconds = flops / (WORLD_SIZE * peak * run.device_mfu)
        share = f"{run.device_mfu:.0%} of the device's {human(peak, 'FLOP')} a second"
        say(f"time           about {duration(seconds)} at {share}")
    train = plan.data and plan.data.train
    for line in data_plan(config.data.sources, train, config.training.max_iters * plan.tokens_per_step):
        say(f"data           {line}")
    checkpointing = config.training.activation_checkpointing
    sharing = config.training.expert_processes, config.training.tensor_processes
    if config.training.parallel == "fsdp":
        layout = layout_of(plan, sketch)
        memory = 0 if planned else sum(layout.memory.values())
        for line in layout.lines():
            say(line)
    else:
        device = "cuda" if planned else plan.device.type
        offloaded = config.training.offload_optimizer and device == "cuda"
        averaged = config.training.ema_decay is not None
        memory = memory_estimate(
            sketch, plan.micro_batch, plan.dtype, device, checkpointing, *sharing, plan.compile, offloaded, averaged
        )
        beside = f", and {human(16 * sketch.num_parameters(), 'B')} of the CPU's for each" if offloaded else ""
        say(f"memory         about {human(memory, 'B')} on each device{beside}")
    if config.training.offload_optimizer and plan.device.type == "cpu" and not planned:
        say("settings       offload_optimizer has no effect on a CPU, whose memory holds the moments anyway")
    for line in doubts(plan, memory):
        say(f"warning        {line}")
    kind, foreign = nearest_architecture(config.model)
    if foreign and not (launch.imported or launch.resumed):
        flags = " ".join(f"--{name}={value}" for name, value in foreign.items())
        say(f"export         not to transformers, except as a {kind}: {flags}")
    if planned:
        say(f"device         {planned}, {plan.dtype}")
    else:
        compiled = "compiled" if plan.compile else "not compiled"
        say(f"device         {plan.device} ({device_name(plan.device)}), {plan.dtype}, {compiled}: {plan.why_compile}")


def layout_of(plan: Plan, sketch: GPT) -> Layout:
    """How FSDP divides the model among the accelerators that a dry run names, or among this run's processes."""
    config, training, run = plan.config, plan.config.training, plan.config.run
    accelerator, devices = (run.planned_accelerator or "").lower(), run.planned_devices or WORLD_SIZE
    return Layout(
        sketch, accelerator, devices, config.sequences_per_step, config.data.batch_size, plan.dtype,
        training.activation_checkpointing, training.reshard_after_forward, training.ema_decay is not None,
        training.offload_optimizer and devices > 1, training.tensor_processes, min(training.replicas, devices),
    )  # fmt: skip


def doubts(plan: Plan, memory: float) -> Iterator[str]:
    """Yields what in a plan is hardly meant, with the flags that mend it. `memory` in bytes is what a device needs."""
    accelerator, steps = plan.config.run.planned_accelerator, plan.config.training.max_iters
    room = MEMORY.get(accelerator.lower()) if accelerator else memory_of(plan.device)
    if room and memory > room:
        less = ["a smaller model"]
        less += ["a smaller --batch_size"] * (plan.micro_batch > 1)
        less += ["--activation_checkpointing"] * (not plan.config.training.activation_checkpointing)
        on_gpu = accelerator is not None or plan.device.type == "cuda"
        can_offload = on_gpu and plan.config.training.optimizer == "adamw"
        less += ["--offload_optimizer"] * (can_offload and not plan.config.training.offload_optimizer)
        devices = plan.config.run.planned_devices or WORLD_SIZE
        less += ["--parallel=fsdp"] * (devices > 1 and plan.config.training.parallel != "fsdp")
        yield f"the {accelerator or 'device'} has {human(room, 'B')} of memory: {' or '.join(less)} takes less"
    tokens = len(plan.data.train) if plan.data else 0
    epochs = steps * plan.tokens_per_step / tokens if tokens else 0
    if epochs > MANY_EPOCHS:
        fewer = math.ceil(20 / epochs * steps)
        mend = f"--max_iters={fewer} makes about 20, or " if fewer > 1 else ""
        yield f"{epochs:,.0f} passes over {tokens:,} tokens: {mend}prepare more text"
