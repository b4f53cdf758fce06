"""Settings: frozen dataclasses, filled from TOML files and the command line, later ones winning.

A file has one table per dataclass ([model], [data], [training], [logging], [run]); since names are unique, a setting
may also stand outside any table. Every mistake is refused before anything starts.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w
import tyro

from gpt_arc.data.datasets import Source
from gpt_arc.errors import UserError
from model import GPTConfig


@dataclass(frozen=True)
class DataConfig:
    dataset: str | None = None
    """A prepared dataset: a name below data/, or the path of any folder that a prepare script wrote. A config file may
    mix several in its place, in tables [[data.mixture]] with name and weight. None: the mixture, or python_manual."""
    mixture: tyro.conf.Suppress[tuple[Source, ...]] = ()
    """Tables [[data.mixture]]; no flag."""
    document_mask: bool = False
    """Attend within documents alone, which end-of-text tokens begin. False: across them (GPT-2, GPT-3)."""
    batch_size: int = 12
    """Sequences in one micro-batch, the most that a device holds at once."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches in one step, over all processes. None: 1, or what tokens_per_step asks for."""
    tokens_per_step: int | None = None
    """Tokens in one optimizer step; gradient_accumulation_steps is derived from it. None: one derives it."""

    def __post_init__(self):
        _require(self, "batch_size", self.batch_size >= 1, "at least 1")
        for name in ("gradient_accumulation_steps", "tokens_per_step"):
            value = getattr(self, name)
            _require(self, name, value is None or value >= 1, "at least 1, or left out to be derived")
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


@dataclass(frozen=True)
class TrainingConfig:
    max_iters: int = 600_000
    """Optimizer steps in all."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon (Jordan et al. 2024) for matrices of blocks, but routers and stacked experts; AdamW for the rest."""
    muon_rate: float = 0.02
    """Muon's peak learning rate, on the schedule of learning_rate, which is AdamW's."""
    momentum: float = 0.95
    """Muon's decay rate of the gradients' mean."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after the warmup. wsd: constant, then a line over the last steps, see cooldown."""
    cooldown: float = 0.4
    """Share of the steps up to lr_decay_iters over which wsd falls to min_lr (arXiv:2405.18392)."""
    warmup_iters: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    lr_decay_iters: int | None = None
    """Step, the first being 0, at which the learning rate reaches min_lr. None: max_iters, which is after the last."""
    min_lr: float | None = None
    """Learning rate at the end of the decay. None: a tenth of learning_rate (Chinchilla, arXiv:2203.15556)."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on tensors of two or more dimensions only."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    adam_eps: float = 1e-8
    """Added to AdamW's denominator."""
    grad_clip: float = 1.0
    """Largest norm of the gradient, over all parameters. 0: no clipping."""
    ema_decay: float | None = None
    """Evaluate and save a moving average of the weights, of which an update replaces 1 - this. None: no average."""
    patience: int | None = None
    """Evaluations in a row without a lower val loss after which the run ends. None: it goes on to max_iters."""
    seed: int = 1337
    """The source of all randomness: weights, data order, dropout."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch's: cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the products. auto: bfloat16 where the hardware multiplies it natively, float16 on older GPUs."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model. auto: where it can work and the run is long enough to pay it back."""
    activation_checkpointing: bool = False
    """Compute each block anew in the backward pass instead of keeping what it computed: less memory, a third slower."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication between processes under torchrun. auto: nccl on GPUs, gloo elsewhere."""

    expert_processes: int = 1
    """Processes under torchrun among which the experts are shared out (expert parallelism). 1: each has all of them."""

    def __post_init__(self):
        _require(self, "max_iters", self.max_iters >= 1, "at least 1")
        _require(self, "expert_processes", self.expert_processes >= 1, "at least 1")
        for name in ("warmup_iters", "weight_decay", "grad_clip", "min_lr", "seed"):
            value = getattr(self, name)
            _require(self, name, value is None or 0 <= value < 2**63, "zero or more, and less than 2^63")
        for name in ("learning_rate", "muon_rate", "adam_eps", "lr_decay_iters", "patience"):
            value = getattr(self, name)
            _require(self, name, value is None or 0 < value < math.inf, "more than zero, and finite")
        for name in ("beta1", "beta2", "momentum", "ema_decay"):
            value = getattr(self, name)
            _require(self, name, value is None or 0 <= value < 1, "in [0, 1)")
        _require(self, "cooldown", 0 <= self.cooldown <= 1, "in [0, 1]")
        if self.ema_decay is not None and self.expert_processes > 1:
            raise ValueError("ema_decay averages what one process has: leave it out, or expert_processes")
        if self.final_lr > self.learning_rate:
            raise ValueError(f"min_lr = {self.min_lr} lies above learning_rate = {self.learning_rate}")

    @property
    def decay_end(self) -> int:
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def final_lr(self) -> float:
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True)
class LoggingConfig:
    eval_interval: int = 2000
    """Steps between evaluations; each writes a checkpoint. The last step is always evaluated."""
    eval_iters: int = 200
    """Batches of an evaluation, of fixed windows spread evenly over the val split. 0: the whole split."""
    log_interval: int = 1
    """Steps between lines of metrics.jsonl."""
    keep_all_checkpoints: bool = False
    """Keep the checkpoint of every evaluation. False: the last and the best."""
    wandb_log: bool = False
    """Log to Weights & Biases as well."""
    wandb_project: str = "gpt-arc"
    """Weights & Biases project."""
    wandb_run_name: str | None = None
    """Weights & Biases run name. None: the name of the run's folder."""

    def __post_init__(self):
        _require(self, "eval_interval", self.eval_interval >= 1, "at least 1")
        _require(self, "eval_iters", self.eval_iters >= 0, "zero (the whole val split) or more")
        _require(self, "log_interval", self.log_interval >= 1, "at least 1")


@dataclass(frozen=True)
class RunConfig:
    """What this one invocation does; not recorded with the run."""

    out_dir: str | None = None
    """Folder of the run. None: out/NAME of the config file, or out/NAME-2, -3 ... where that is taken."""
    init_from: str = "scratch"
    """scratch; resume: go on with out_dir, or with the newest run of the config named; or a model to start from: gpt2,
    gpt2-medium, gpt2-large, gpt2-xl, openai-gpt, hf:OWNER/NAME of the Hugging Face hub, or any model directory."""
    overwrite: bool = False
    """Delete the run that out_dir holds and start anew."""
    eval_only: bool = False
    """Evaluate and stop."""
    dry_run: bool = False
    """Print what would be run and stop."""

    def __post_init__(self):
        if self.overwrite and self.init_from == "resume":
            raise ValueError("overwrite deletes the run that init_from = resume would go on with: choose one")
        if self.overwrite and self.out_dir is None:
            raise ValueError("overwrite needs out_dir: without it every run gets a new folder")


@dataclass(frozen=True)
class Config:
    """Everything that train.py is told."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def sequences_per_step(self) -> int:
        """Sequences of the global batch, over all micro-batches and processes."""
        if self.data.tokens_per_step is None:
            return self.data.batch_size * (self.data.gradient_accumulation_steps or 1)
        return self.data.tokens_per_step // self.model.block_size

    def __post_init__(self):
        tokens, steps = self.data.tokens_per_step, self.data.gradient_accumulation_steps
        micro_batch = self.data.batch_size * self.model.block_size
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


def _require(config: Any, name: str, holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {getattr(config, name)} must be {what}")


TABLES: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Config)}
SETTINGS: dict[str, tuple[str, Any]] = {  # setting -> its table and type
    f.name: (table, f.type) for table, cls in TABLES.items() for f in dataclasses.fields(cls)
}


def settings_of(config: Config) -> dict[str, Any]:
    """Every setting of `config` by its flat name."""
    return {name: getattr(getattr(config, table), name) for name, (table, _) in SETTINGS.items()}


def build_config(settings: dict[str, Any], source: str) -> Config:
    """A `Config` from flat settings, the rest at their defaults. Raises UserError, naming `source`, if it can't be."""
    try:
        by_table: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
        for name, value in settings.items():
            by_table[SETTINGS[name][0]][name] = value
        return Config(**{table: TABLES[table](**values) for table, values in by_table.items()})
    except (ValueError, OverflowError) as error:
        raise UserError(f"{source}: {error}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a TOML file by their flat names. Raises UserError for a bad file, unknown key or wrong type."""
    try:
        content = tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1, cutoff=0.4)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ", configs/ has those that come with gpt-arc"
        raise UserError(f"there is no config file {path}{hint}") from None
    except OSError as error:
        raise UserError(f"the config file {path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    settings: dict[str, Any] = {}
    for key, value in content.items():
        entries = {key: value}
        if isinstance(value, dict):
            if key not in TABLES:
                raise UserError(f"{path}: there is no table [{key}]; the tables are [{'], ['.join(TABLES)}]")
            entries = value
        for name, entry in entries.items():
            check_setting(name, entry, f"{path}: ")
            table = SETTINGS[name][0]
            if entries is value and table != key:
                raise UserError(f"{path}: {name} stands in [{key}] and belongs in [{table}]")
            if name in settings:
                raise UserError(f"{path}: {name} is set twice")
            settings[name] = _mixture(entry, path) if name == "mixture" else entry
    return settings


def _mixture(tables: Any, path: Path) -> tuple[Source, ...]:
    """The sources of [[data.mixture]]. Raises UserError naming the first table that is not one."""
    form = 'write [[data.mixture]], then name = "..." and weight = ...'
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path}: mixture must be a list of tables: {form}")
    for number, table in enumerate(tables, start=1):
        fits = isinstance(table, dict) and table.keys() == {"name", "weight"}
        if not fits or not _conforms(table["name"], str) or not _conforms(table["weight"], float):
            shown = json.dumps(table, default=str)
            raise UserError(f"{path}: number {number} of the mixture, {shown}, is not understood: {form}")
    try:
        return tuple(Source(**table) for table in tables)
    except ValueError as error:
        raise UserError(f"{path}: mixture: {error}") from None


def check_setting(name: str, value: Any, where: str) -> None:
    if name not in SETTINGS:
        raise UserError(f"{where}there is no setting {name}{_nearest(name)}")
    expected = SETTINGS[name][1]
    if name != "mixture" and not _conforms(value, expected):
        raise UserError(f"{where}{name} = {json.dumps(value, default=str)}: {name} must be {_describe(expected)}")


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), SETTINGS, n=1)
    return f"; did you mean {near[0]}?" if near else "; python train.py --help lists them all"


def _conforms(value: Any, expected: Any) -> bool:
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        return any(_conforms(value, option) for option in typing.get_args(expected))
    if typing.get_origin(expected) is Literal:
        return value in typing.get_args(expected)
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _describe(expected: Any) -> str:
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in typing.get_args(expected) if option is not types.NoneType)
    if typing.get_origin(expected) is Literal:
        return "one of " + ", ".join(f'"{option}"' for option in typing.get_args(expected))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes"}
    return names[expected]


def write_settings(settings: dict[str, Any]) -> str:
    """Settings as TOML, by table; what is None is left out, for that is how TOML says it."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if name == "mixture":
            value = [dataclasses.asdict(source) for source in value] or None
        if value is not None:
            tables.setdefault(SETTINGS[name][0], {})[name] = value
    return tomli_w.dumps(tables)


def read_files(files: list[str]) -> dict[str, Any]:
    """The settings of several files, later ones winning."""
    settings: dict[str, Any] = {}
    for file in files:
        settings = merge(settings, read_settings(Path(file)))
    return settings


def merge(settings: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `later` ones over them; one dataset and a mixture take each other's place."""
    replaced = {"mixture": "dataset", "dataset": "mixture"}
    gone = {other for name, other in replaced.items() if name in later and other not in later}
    return {name: value for name, value in settings.items() if name not in gone} | later
