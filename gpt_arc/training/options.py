"""Settings of the training stages, from files and flags, and their record in run.json."""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tyro

from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.epochs import held_out

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


def record_options(run: Path, stage: str, options: Any) -> None:
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
