"""Settings of the training stages, from files and flags. Nothing here imports torch."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError
from gpt_arc.nn.names import Checkpointing
from gpt_arc.settings import (
    STRICT,
    Count,
    Natural,
    NonNegative,
    Positional,
    Positive,
    Seed,
    Share,
    Threads,
    UnitInterval,
    build,
    seconds_in,
    values_of,
)
from gpt_arc.training.config import TrainingConfig, check_batch
from gpt_arc.training.schedule import PublishedRate, learning_rate_at

O = TypeVar("O", bound="StageOptions")
E = TypeVar("E")


@dataclass(frozen=True, config=STRICT)
class StageOptions:
    """The settings that every training stage has."""

    model: Positional[str | None] = None
    """The model to start from: a run folder, a model directory, or a published model: gpt2, openai-gpt,
    hf:OWNER/NAME."""
    batch_size: Count = 8
    """Examples that a process reads at a time, at most."""
    gradient_accumulation_steps: Count = 1
    """Times batch_size, over all processes: the examples of an update."""
    learning_rate: Positive | None = None
    """Peak learning rate, after the warmup. None: by the model's size."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warmup."""
    min_lr: NonNegative | None = None
    """Learning rate at the end. None: a tenth of learning_rate."""
    warmup: Share = 0.0
    """Share of the updates in which the learning rate rises."""
    weight_decay: NonNegative = 0.0
    """Of tensors of two dimensions or more, decoupled from the gradient."""
    beta1: Share = 0.9
    """Adam's decay of the mean of gradients."""
    beta2: Share = 0.95
    """Adam's decay of the mean of squared gradients."""
    adam_eps: Positive = 1e-8
    """Adam's epsilon."""
    grad_clip: NonNegative = 1.0
    """Gradients are shortened to this norm. 0: never."""
    activation_checkpointing: Checkpointing = False
    """Compute each block anew in the backward pass: less memory, a third slower. selective: keep attention and the
    narrow products, which saves less memory and costs a ninth."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch's."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Precision of products. auto: what the hardware multiplies fastest."""
    threads: Threads | Literal["auto"] = "auto"
    """CPU threads of a process. auto: OMP_NUM_THREADS or, if that isn't set, more than one only where a measurement of
    up to a second shows that they pay."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication between processes under torchrun. auto: nccl on GPUs, gloo elsewhere."""
    timeout_minutes: Positive = 60
    """How long a process under torchrun waits for the others, such as for a checkpoint, before the run fails. After
    half that time, those that hang are named, with their stacks."""
    seed: Seed = 1337
    """The source of all randomness."""
    out_dir: str | None = None
    """Folder of the run. None: out/STAGE, or out/STAGE-2, -3 ... where that is taken."""
    overwrite: bool = False
    """Delete the run that out_dir holds and start anew."""
    logger: Literal["none", "wandb", "tensorboard", "trackio"] | None = None
    """Also log to Weights & Biases, to TensorBoard's files in the run's folder, or to Trackio. None: as the run did
    that is resumed, otherwise not."""
    wandb_log: bool | None = None
    """The same as logger = wandb."""
    wandb_project: str = "gpt-arc"
    """Project of Weights & Biases or Trackio."""
    wandb_run_name: str | None = None
    """Name of the run there. None: the name of the run's folder."""
    keep_checkpoints: Count = 1
    """How many of the newest checkpoints to keep, beside the best."""
    failed_saves: Natural = 3
    """Checkpoints in a row that may fail, as on a full disk, while the run goes on; the next one is tried again. 0: the
    first failure ends the run."""
    stop_after: str | None = None
    """Save and stop after this time, such as 3h59m or 90m, counted from the start of the program; --resume goes on."""
    quiet: bool = False
    """Show no progress, neither a bar nor lines: only the plan, warnings and the end."""
    resume: str | None = None
    """Run folder to resume with its original settings; only device, backend, stop_after, quiet, logger and wandb_log
    may change."""

    FIRST: ClassVar[tuple[str, ...]] = ("train", "val", "epochs", "learning_rate", "batch_size", "out_dir", "resume")

    PUBLISHED: ClassVar[PublishedRate]  # from which learning_rate follows where it is None

    PATHS: ClassVar[tuple[str, ...]] = ("model",)  # settings that may be paths, beside those of the type Path

    OLD: ClassVar[dict[str, Any]] = {"final_learning_rate": UnitInterval, "resume": bool | str | None}
    INSTEAD: ClassVar[dict[str, str]] = {"min_lr": "final_learning_rate", "final_learning_rate": "min_lr"}

    @classmethod
    def translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Settings by present names: final_learning_rate was a share of learning_rate, resume a truth value.

        Beside a final_learning_rate, learning_rate has the default of that time.
        """
        if "final_learning_rate" in values:
            share = values.pop("final_learning_rate")
            values["learning_rate"] = values.get("learning_rate") or cls.PUBLISHED.rate
            values["min_lr"] = values["learning_rate"] * share
        if isinstance(values.get("resume"), bool):
            values["resume"] = str(values["resume"])
        if values.get("resume") == "False":
            values["resume"] = None
        return values

    def __post_init__(self):
        check_batch("batch_size x gradient_accumulation_steps", self.examples_per_update)
        if self.stop_after is not None:
            seconds_in(self.stop_after)
        if self.min_lr is not None and self.learning_rate is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr = {self.min_lr} lies above learning_rate = {self.learning_rate}")

    @property
    def base_model(self) -> str:
        """The model, which the command line or the record of a resumed run names."""
        assert self.model is not None
        return self.model

    @property
    def start(self) -> str | None:
        """What a new run starts from; None if the command line doesn't say."""
        return self.model

    @property
    def code(self) -> dict[str, str]:
        """The settings that name Python code. A run records them to be shown; only the command line's are imported."""
        return {}

    @property
    def examples_per_update(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def dividing(self) -> TrainingConfig:
        """Settings of how processes divide the model."""
        return TrainingConfig()

    def with_rate(self: O, parameters: int) -> O:
        """Returns the options with the rate for a model of so many parameters without embeddings, if they have none.

        Raises UserError.
        """
        if self.learning_rate is not None:
            return self
        from gpt_arc.distributed import say  # imports torch

        rate = self.PUBLISHED.at(parameters)
        say(f"learning rate  {rate:g}, by the model's {parameters:,} parameters without embeddings")
        return build(type(self), values_of(self) | {"learning_rate": rate})

    def training(self, updates: int) -> TrainingConfig:
        """Settings of the optimizer and of the learning rate over `updates` updates, by options that have a rate."""
        assert self.learning_rate is not None, "with_rate gives it"
        same = ("learning_rate", "schedule", "weight_decay", "beta1", "beta2", "adam_eps", "grad_clip", "threads")
        return TrainingConfig(
            max_iters=max(updates, 1),
            warmup_iters=round(self.warmup * updates),
            min_lr=self.learning_rate * 0.1 if self.min_lr is None else self.min_lr,
            **{name: getattr(self, name) for name in same},
        )

    def rate(self, update: int, training: TrainingConfig) -> float:
        """Returns the learning rate of an update, counted from 0, by the settings that `training` returned."""
        return learning_rate_at(update, training)


@dataclass(frozen=True, config=STRICT)
class ExampleOptions(StageOptions):
    """The further settings of stages that go through a file of examples, epoch after epoch."""

    train: Path | None = None
    """Examples to learn from (.jsonl, .json, .csv, .tsv, .parquet), or hf:OWNER/NAME:SPLIT on the hub."""
    val: Path | None = None
    """Examples to measure on; the epoch of the lowest loss is the best. None: val_fraction of the training ones."""
    val_fraction: Share = 0.05
    """Share of the examples that is held out where there is no val. 0: none."""
    epochs: Count = 1
    """Passes over the examples."""

    def splits(self, read: Callable[[Path], list[E]]) -> dict[str, list[E]]:
        """What `read` makes of the splits train and val. Raises UserError."""
        if self.train is None:
            raise UserError("name the examples to learn from by --train")
        examples = read(self.train)
        if self.val:
            return {"train": examples, "val": read(self.val)}
        from gpt_arc.training.epochs import held_out  # imports torch

        return held_out(examples, self.val_fraction, self.seed)


@dataclass(frozen=True, config=STRICT)
class DividedOptions(StageOptions):
    """The further settings of stages whose processes may divide the model."""

    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """What processes under torchrun divide. ddp: the examples; fsdp: also weights, gradients and moments. auto: ddp for
    several processes."""
    replicas: Count = 1
    """fsdp: groups of processes that divide a whole model each."""

    @property
    def dividing(self) -> TrainingConfig:
        return TrainingConfig(parallel=self.parallel, replicas=self.replicas)


@dataclass(frozen=True, config=STRICT)
class ChatOptions(DividedOptions, ExampleOptions):
    """The further settings of stages that learn from conversations or rankings."""

    columns: tuple[str, ...] = ()
    """Columns of train and val that have other names than ours: prompt=question response=answer."""
    preview: Natural = 0
    """Print this many rows of train as tokens, with those that are scored in colour or in brackets, and stop."""


def refuse_others(options: Any, allowed: set[str], why: str) -> None:
    """Raises UserError for an option that is set and not `allowed`."""
    for one in dataclasses.fields(options):
        if one.name not in allowed and getattr(options, one.name) != one.default:
            raise UserError(f"--{one.name} {why}")
