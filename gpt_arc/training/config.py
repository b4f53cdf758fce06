"""The settings of train.py, read from TOML files and flags; later ones win.

A file has one table per dataclass ([model], [data], [training], [logging], [run]). Names are unique, so a setting may
also stand outside any table. All mistakes are reported before anything starts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import tomli_w
from annotated_types import Gt
from pydantic.dataclasses import dataclass

from gpt_arc.data.datasets import Source
from gpt_arc.errors import UserError
from gpt_arc.model_config import GPTConfig
from gpt_arc.nn.names import Checkpointing
from gpt_arc.nn.relations import MARKS
from gpt_arc.settings import (
    STRICT,
    Count,
    Hidden,
    Natural,
    NonNegative,
    Positive,
    PositiveShare,
    Seed,
    Share,
    Threads,
    UnitInterval,
    build,
    read_file,
    seconds_in,
    settings_in,
)

OWN_RUNS = ("scratch", "resume", "auto")  # values of init_from that name no model
LARGEST_UPDATE = 2**20  # examples
LARGEST_MICRO_BATCH = 2**24  # tokens that a device processes at once


def check_batch(name: str, size: int, most: int = LARGEST_UPDATE) -> None:
    """Raises ValueError for a batch that no machine holds, as in a damaged file."""
    if size > most:
        raise ValueError(f"{name} = {size} is more than {most}: lower batch_size")


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    dataset: str | None = None
    """A prepared dataset: a name below data/, or the path of any folder that a prepare script wrote. A config file can
    instead mix several, in tables [[data.mixture]] with name and weight. None: the mixture, or python_manual."""
    mixture: Hidden[tuple[Source, ...]] = ()
    """Tables [[data.mixture]]; no flag."""
    document_mask: bool = False
    """Attend only within a document, which an end-of-text token begins. False: across documents (GPT-2, GPT-3)."""
    batch_size: Count = 12
    """Sequences in one micro-batch, which a device processes at once."""
    gradient_accumulation_steps: Count | None = None
    """Micro-batches in one step, over all processes. None: 1, or what tokens_per_step asks for."""
    tokens_per_step: Count | None = None
    """Tokens in one optimizer step; gradient_accumulation_steps is derived from it.
    None: it follows from gradient_accumulation_steps instead."""

    def __post_init__(self):
        names = [source.name for source in self.mixture]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the mixture names {name} twice")
        if self.mixture and self.dataset is not None:
            raise ValueError(f"dataset = {self.dataset} contradicts the mixture of {', '.join(names)}: leave one out")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The mixture, or the one dataset."""
        return self.mixture or (Source(self.dataset or "python_manual", 1.0),)


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    objective: Literal["next", "masked"] | None = None
    """What the model learns. next: to predict each token from those before it. masked: to predict tokens hidden among
    the others (BERT, arXiv:1810.04805) and, with next_sentence, whether one text follows another. None: masked where
    attention is bidirectional, else next."""
    mask_rate: PositiveShare = 0.15
    """Share of the tokens that masked predicts; of these 80% are hidden, 10% replaced by random tokens, 10% shown."""
    max_iters: Count = 600_000
    """Optimizer steps in all."""
    learning_rate: Positive = 6e-4
    """Peak learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon (Jordan et al. 2024) for block matrices except routers and stacked experts; AdamW for the rest."""
    muon_rate: Positive = 0.02
    """Muon's peak learning rate, on the same schedule as learning_rate, which AdamW uses."""
    momentum: Share = 0.95
    """Muon's decay rate for the mean of gradients."""
    offload_optimizer: bool = False
    """Keep AdamW's moments in the CPU's memory and update the weights there, which halves what weights, gradients and
    moments take of a GPU's. Under fsdp, the shards of weights and gradients lie there too."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after the warmup. wsd: constant, then linear decay at the end, see cooldown.
    inverse_sqrt: over the square root of the step, without an end (arXiv:1706.03762)."""
    cooldown: UnitInterval = 0.4
    """Share of the steps up to lr_decay_iters over which wsd falls to min_lr (arXiv:2405.18392)."""
    warmup_iters: Natural = 0
    """Steps over which the learning rate rises linearly to its peak."""
    warmup: Share | None = None
    """Share of max_iters over which the learning rate rises. None: warmup_iters."""
    lr_decay_iters: Count | None = None
    """Step, counted from 0, at which the learning rate reaches min_lr. None: max_iters, just after the last step."""
    min_lr: NonNegative | None = None
    """Learning rate at the end of the decay. None: a tenth of learning_rate (Chinchilla, arXiv:2203.15556)."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay, on tensors of two or more dimensions only."""
    beta1: Share = 0.9
    """AdamW's decay rate for the first moment."""
    beta2: Share = 0.95
    """AdamW's decay rate for the second moment."""
    adam_eps: Positive = 1e-8
    """Added to AdamW's denominator."""
    grad_clip: NonNegative = 1.0
    """Maximum norm of the gradient, over all parameters. 0: no clipping."""
    spike_factor: Annotated[float, Gt(1)] | None = None
    """After a step whose loss is more than this many times the median of the last 100, go back to the last checkpoint
    and on with the batches that follow, without those read since then (PaLM, arXiv:2204.02311). None: never."""
    ema_decay: Share | None = None
    """Evaluate and save a moving average of the weights with this decay rate. None: no average."""
    patience: Count | None = None
    """End the run after this many evaluations in a row without a lower val loss. None: run to max_iters."""
    seed: Seed = 1337
    """The source of all randomness: weights, data order, dropout."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a torch device: cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products. auto: bfloat16 if the hardware supports it natively, float16 on older GPUs.
    tf32: float32 rounded to 10 bits of mantissa, on NVIDIA's GPUs."""
    compile: bool | Literal["auto", "blocks", "graphs"] = "auto"
    """torch.compile the model. auto: if it can work and the run is long enough for it to pay off. blocks: one block,
    whose code the others share, which takes a small part of the time and gives slower code. graphs: also launch each
    pass as one CUDA graph, for small models on one GPU, whose kernels take less time than their launches."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Type of the residual stream. bfloat16 halves what norms and sums read and write, and rounds every sum."""
    flash_attention: Literal["2", "3", "4"] = "2"
    """Version of flash attention on GPUs. 3 (for Hopper) and 4 (for Hopper, Blackwell) need packages of their own."""
    float8: bool = False
    """Multiply the blocks' matrices in 8 bits, on GPUs from Hopper on. Needs torchao."""
    threads: Threads | Literal["auto"] = "auto"
    """CPU threads of a process. auto: OMP_NUM_THREADS or, if that isn't set, more than one only where a measurement of
    up to a second shows that they pay."""
    activation_checkpointing: Checkpointing = False
    """Recompute each block in the backward pass instead of storing its activations: less memory, a third slower.
    selective: keep attention and the narrow products, which saves less memory and costs a ninth."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication between processes under torchrun. auto: nccl on GPUs, gloo elsewhere."""
    timeout_minutes: Positive = 60
    """How long a process under torchrun waits for the others, such as for a checkpoint, before the run fails. After
    half that time, those that hang are named, with their stacks."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How processes share the work. ddp: each has the whole model; fsdp: each has a shard of every weight, gradient and
    moment; auto: none for one process, else ddp."""
    reshard_after_forward: bool = True
    """Under fsdp, drop a block's gathered weights until its backward pass: less memory, more communication."""
    replicas: Count = 1
    """Under fsdp, the number of whole models, each divided among an equal part of the processes."""
    compare_replicas: bool = False
    """Stop before a checkpoint if processes that should have the same weights differ by a bit, as after a fault of a
    machine's memory."""
    checkpoint_format: Literal["whole", "sharded"] = "whole"
    """How checkpoints hold the moments. whole: in one file, all in the main process's memory; sharded: under fsdp, in
    one file per process. Any number of processes can resume from either."""
    async_save: bool = False
    """Write sharded checkpoints while training goes on, from a copy of them in memory. A failure is reported before the
    next evaluation."""
    tensor_processes: Count = 1
    """Divide the heads and MLPs of every block among this many torchrun processes (tensor parallelism). Under fsdp, the
    processes that have the same part divide it again. 1: each process has all of them."""
    expert_processes: Count = 1
    """Split the experts among this many torchrun processes (expert parallelism). 1: each process has all of them."""

    def __post_init__(self):
        if self.warmup is not None and self.warmup_iters:
            raise ValueError(
                f"warmup = {self.warmup} and warmup_iters = {self.warmup_iters} both set the warmup: leave one out, or "
                "set warmup_iters = 0"
            )
        if self.ema_decay is not None and self.expert_processes > 1:
            raise ValueError("ema_decay can't average experts split among processes: leave out one of the two settings")
        if self.parallel == "fsdp" and self.expert_processes > 1:
            raise ValueError("parallel = fsdp shards the experts too: leave out expert_processes")
        is_sharded = self.parallel == "fsdp" and self.checkpoint_format == "sharded"
        unsuited = {"checkpoint_format = sharded": is_sharded, "expert_processes": self.expert_processes > 1}
        unsuited |= {f"replicas = {self.replicas}": self.replicas > 1}
        unsuited |= {"optimizer = muon": self.optimizer == "muon", "ema_decay": self.ema_decay is not None}
        unsuited |= {"float8": self.float8, "offload_optimizer": self.offload_optimizer}
        for name in (name for name, is_set in unsuited.items() if is_set and self.tensor_processes > 1):
            raise ValueError(
                f"tensor_processes = {self.tensor_processes} doesn't suit {name}: leave out one of the two"
            )
        if self.async_save and (self.parallel != "fsdp" or self.checkpoint_format != "sharded"):
            raise ValueError(
                "async_save needs parallel = fsdp and checkpoint_format = sharded: set both, or leave it out"
            )
        if self.replicas > 1 and self.parallel != "fsdp":
            raise ValueError(f"replicas = {self.replicas} is for parallel = fsdp: under ddp each process has a replica")
        if self.offload_optimizer and self.optimizer == "muon":
            raise ValueError(
                "offload_optimizer is for AdamW, since Muon's matrix products would take too long on a CPU: set "
                "offload_optimizer = false, or optimizer = adamw"
            )
        if self.final_lr > self.learning_rate:
            raise ValueError(f"min_lr = {self.min_lr} lies above learning_rate = {self.learning_rate}")

    @property
    def warmup_steps(self) -> int:
        return self.warmup_iters if self.warmup is None else round(self.warmup * self.max_iters)

    @property
    def decay_end(self) -> int:
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def final_lr(self) -> float:
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True, config=STRICT)
class LoggingConfig:
    eval_interval: Count = 2000
    """Steps between evaluations; each writes a checkpoint. The last step is always evaluated."""
    eval_iters: Natural = 200
    """Batches per evaluation; their fixed windows are spread evenly over the val split. 0: the whole split."""
    log_interval: Count = 1
    """Steps between lines of metrics.jsonl."""
    sample_interval: Natural = 0
    """Steps between samples of some 200 characters, each after an evaluation; they are printed and written to
    samples.txt. 0: none."""
    sample_start: str = ""
    """The prompt of the samples. Empty: start from nothing."""
    keep_all_checkpoints: bool = False
    """Keep the checkpoint of every evaluation. False: the newest ones and the best."""
    keep_checkpoints: Count = 1
    """How many of the newest checkpoints to keep, beside the best."""
    failed_saves: Natural = 3
    """Checkpoints in a row that may fail, as on a full disk, while the run goes on; the next evaluation tries again. 0:
    the first failure ends the run."""
    logger: Literal["none", "wandb", "tensorboard", "trackio"] = "none"
    """Also log to Weights & Biases, to TensorBoard's files in the run's folder, or to Trackio."""
    wandb_log: bool = False
    """The same as logger = wandb."""
    wandb_project: str = "gpt-arc"
    """Project of Weights & Biases or Trackio."""
    wandb_run_name: str | None = None
    """Name of the run there. None: the name of the run's folder."""

    def __post_init__(self):
        if self.keep_all_checkpoints and self.keep_checkpoints > 1:
            raise ValueError(f"keep_all_checkpoints contradicts keep_checkpoints = {self.keep_checkpoints}: choose one")

    @property
    def kept(self) -> int | None:
        """How many of the newest checkpoints to keep. None: all."""
        return None if self.keep_all_checkpoints else self.keep_checkpoints


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """What this one invocation does; not recorded with the run."""

    out_dir: str | None = None
    """Folder of the run. None: out/NAME after the config file, out/NAME-DATASET if a flag names another dataset
    than the config, or with -2, -3 ... at the end if that is taken."""
    init_from: str = "scratch"
    """scratch; resume: resume out_dir, or the newest run of the config; auto: resume out_dir if it has a checkpoint,
    else start it from scratch, so that one command serves every restart; or a model to start from: gpt2, gpt2-medium,
    gpt2-large, gpt2-xl, openai-gpt, hf:OWNER/NAME from the Hugging Face hub, or any model directory."""
    extend_context: bool = False
    """Train the model of init_from at this block_size, even if it is longer than the model's, and with this
    rotary_scaling, if there is one. False: at its own context or a shorter one."""
    resume: str | None = None
    """Run folder to resume; config files, if any are named, and flags may change its settings."""
    overwrite: bool = False
    """Delete the run in out_dir and start again."""
    eval_only: bool = False
    """Evaluate and stop."""
    dry_run: bool = False
    """Print what would be run, or why it would be refused, and stop."""
    accelerator: str | None = None
    """Accelerator whose days of training, and price, a dry run prints: h100, a100, rtx 4090 ..."""
    devices: Count = 1
    """How many of them."""
    device_mfu: PositiveShare = 0.4
    """Share of their peak that training is expected to reach."""
    device_price: Positive | None = None
    """Price of an hour of one, in any currency."""
    stop_after: str | None = None
    """Save and stop after this time, such as 3h59m or 90m, counted from the start of the program; --resume goes on."""
    quiet: bool = False
    """Show no progress, neither a bar nor lines: only the plan, warnings, samples and the end."""
    verify: bool = False
    """Compare all token files with their checksums first; without it only their sizes."""

    def __post_init__(self):
        if self.overwrite and (self.resume or self.init_from in ("resume", "auto")):
            raise ValueError("overwrite deletes the run that resume or init_from would continue: choose one")
        if self.init_from == "auto" and self.out_dir is None:
            raise ValueError("init_from = auto needs out_dir: without it every run gets a new folder")
        if self.resume and self.init_from not in OWN_RUNS:
            raise ValueError(f"resume = {self.resume} and init_from = {self.init_from} name two models: choose one")
        if self.resume and self.out_dir and Path(self.resume).resolve() != Path(self.out_dir).resolve():
            raise ValueError(f"resume = {self.resume} and out_dir = {self.out_dir} name two runs: leave out_dir out")
        if self.extend_context and self.init_from in OWN_RUNS:
            raise ValueError("extend_context needs init_from, the model whose context it extends")
        if self.stop_after is not None:
            seconds_in(self.stop_after)
        if self.overwrite and self.out_dir is None:
            raise ValueError("overwrite needs out_dir: without it every run gets a new folder")

    @property
    def planned_accelerator(self) -> str | None:
        """The accelerator that a dry run plans for; None: this run's device."""
        return self.accelerator if self.dry_run else None

    @property
    def planned_devices(self) -> int | None:
        """How many accelerators a dry run plans for; None: this run's processes."""
        return self.devices if self.planned_accelerator else None

    @property
    def resumes(self) -> bool:
        """Whether to resume a run. init_from = auto does if out_dir has a checkpoint."""
        if self.init_from == "auto" and self.out_dir:
            from gpt_arc.weights.checkpoint_folders import named_checkpoint  # imports torch

            return named_checkpoint(Path(self.out_dir), "last") is not None
        return bool(self.resume) or self.init_from == "resume"


@dataclass(frozen=True, config=STRICT)
class Config:
    """All settings of train.py."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    LISTED: ClassVar[str] = "--help-all"
    INSTEAD: ClassVar[dict[str, str]] = {
        **{"mixture": "dataset", "dataset": "mixture"},
        **{"warmup": "warmup_iters", "warmup_iters": "warmup"},
        **{"tokens_per_step": "gradient_accumulation_steps", "gradient_accumulation_steps": "tokens_per_step"},
    }

    @property
    def is_masked(self) -> bool:
        """Whether the objective is masked."""
        return self.model.attention == "bidirectional"

    @property
    def scored_share(self) -> float:
        """Share of the tokens whose predictions are scored."""
        if not self.is_masked:
            return 1.0
        from gpt_arc.data.masking import scored_tokens  # imports torch

        length = self.model.block_size - (MARKS if self.model.next_sentence else 0)
        return scored_tokens(self.training.mask_rate, length) / self.model.block_size

    @property
    def sequences_per_step(self) -> int:
        """Sequences of the global batch, over all micro-batches and processes."""
        if self.data.tokens_per_step is None:
            return self.data.batch_size * (self.data.gradient_accumulation_steps or 1)
        return self.data.tokens_per_step // self.model.block_size

    def __post_init__(self):
        tokens, steps = self.data.tokens_per_step, self.data.gradient_accumulation_steps
        micro_batch = self.data.batch_size * self.model.block_size
        check_batch("batch_size x block_size", micro_batch, LARGEST_MICRO_BATCH)
        check_batch("batch_size x gradient_accumulation_steps", self.sequences_per_step)
        training, interval = self.training, self.logging.sample_interval
        if training.objective not in (None, "masked" if self.is_masked else "next"):
            fitting = "bidirectional" if training.objective == "masked" else "causal"
            raise ValueError(
                f"objective = {training.objective} contradicts attention = {self.model.attention}: it needs attention "
                f"= {fitting}"
            )
        if self.model.next_sentence and self.data.document_mask:
            raise ValueError(
                "document_mask hides one text of a pair from the other, and next_sentence compares them: leave out one "
                "of the two"
            )
        if self.model.encoder_layers:
            raise ValueError(
                f"encoder_layers = {self.model.encoder_layers} makes a model of sources and targets, which "
                "stages/translate.py trains"
            )
        if interval and self.is_masked:
            raise ValueError(
                f"sample_interval = {interval} continues a text, which a bidirectional model can't: set it to 0"
            )
        if tokens is not None and tokens % micro_batch:
            nearest = max(1, round(tokens / micro_batch)) * micro_batch
            raise ValueError(
                f"tokens_per_step = {tokens} is not a multiple of batch_size x block_size = {self.data.batch_size} x "
                f"{self.model.block_size} = {micro_batch}: the nearest is {nearest}"
            )
        if tokens is not None and steps is not None and tokens != steps * micro_batch:
            raise ValueError(
                f"tokens_per_step = {tokens} contradicts gradient_accumulation_steps = {steps} of {micro_batch} "
                f"tokens each, {steps * micro_batch} in all: leave one of the two out"
            )


TABLES: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Config)}
SETTINGS = settings_in(Config)  # setting -> its table and type


class Dependence(NamedTuple):
    """Settings that have an effect only beside another."""

    names: tuple[str, ...]
    needed: str
    value: str  # that it needs, or "" if any but the default will do
    applies: Callable[[Config], bool]  # whether the needed setting has it


DEPENDENCES = (
    Dependence(("rotary_base",), "positions", "rotary", lambda config: config.model.positions == "rotary"),
    Dependence(
        ("rotary_context", "rotary_fast", "rotary_slow", "rotary_attention_factor"), "rotary_scaling", "",
        lambda config: config.model.rotary_scaling is not None,
    ),
    Dependence(("attention_dropout",), "mixer", "attention", lambda config: config.model.mixer == "attention"),
    Dependence(
        (
            "experts_per_token", "expert_interval", "shared_experts", "expert_selection", "capacity_factor",
            "router_jitter", "expert_dropout", "balance_loss", "router_z_loss", "balance_rate",
        ), "n_experts", "", lambda config: config.model.n_experts > 0,
    ),
    Dependence(("ngram_rows",), "ngrams", "", lambda config: config.model.ngrams > 1),
    Dependence(("mask_rate",), "attention", "bidirectional", lambda config: config.is_masked),
    Dependence(("muon_rate", "momentum"), "optimizer", "muon", lambda config: config.training.optimizer == "muon"),
    Dependence(("cooldown",), "schedule", "wsd", lambda config: config.training.schedule == "wsd"),
    Dependence(("devices", "device_price"), "accelerator", "", lambda config: config.run.accelerator is not None),
    Dependence(("accelerator", "device_mfu"), "dry_run", "true", lambda config: config.run.dry_run),
)  # fmt: skip


def check_effects(config: Config, flags: Mapping[str, Any]) -> None:
    """Raises UserError for one of the `flags` that has no effect in `config`.

    Files may have such settings: another file or a flag replaces what they belong to, and a run records them.
    """
    for names, needed, value, applies in DEPENDENCES:
        for name in (name for name in names if name in flags and flags[name] != SETTINGS[name].default):
            if not applies(config):
                needs = f"{needed} = {value}" if value else needed
                raise UserError(f"--{name} = {flags[name]} has no effect without {needs}: set it, or leave {name} out")


def build_config(settings: dict[str, Any], source: str) -> Config:
    """Builds a `Config` from flat settings, with defaults for the rest. Raises UserError naming `source`."""
    return build(Config, settings, dict.fromkeys(settings, source))


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings of a TOML file by flat name. Raises UserError for a bad file, unknown key or bad value."""
    return read_file(Config, path)


def write_settings(settings: dict[str, Any]) -> str:
    """Returns settings as TOML, by table. Leaves out those that are None, since TOML has no null."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if name == "mixture":
            value = [dataclasses.asdict(source) for source in value] or None
        table = SETTINGS[name].table
        if table and value is not None:
            tables.setdefault(table, {})[name] = value
    return tomli_w.dumps(tables)
