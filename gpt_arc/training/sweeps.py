"""A sweep: one config trained at several sizes and budgets, each run once, for fitting scaling laws to the results."""

import itertools
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic.dataclasses
from pydantic import PositiveInt

from gpt_arc.data.datasets import open_corpus
from gpt_arc.errors import UserError
from gpt_arc.files import resource, write_file
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.cost import flops_per_token
from gpt_arc.planning.fits import FinishedRun
from gpt_arc.reading import read_toml
from gpt_arc.settings import STRICT, Count, NonNegative, Positive, Seed, build, read_value
from gpt_arc.training.config import SETTINGS, Config, DataConfig, build_config, read_settings, write_settings
from gpt_arc.training.log import read_metrics
from gpt_arc.training.runs import OUT_ROOT
from gpt_arc.weights.checkpoint_folders import named_checkpoint
from model import GPT

OF_THE_MACHINE = {"device", "backend", "threads"}  # settings that may change when a sweep goes on


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Sweep:
    """The table [sweep] of a sweep's file, whose other tables are settings of train.py."""

    layers: tuple[Count, ...] = ()
    """Depths to train."""
    aspect_ratio: Positive = 64.0
    """Width for each layer; the width is rounded to a multiple of head_width."""
    widths: tuple[Count, ...] = ()
    """Widths for each depth, instead of the aspect ratio's: all pairs of layers and widths are trained."""
    head_width: Count = 64
    """Width of a head; a model has width / head_width heads."""
    shapes: tuple[tuple[Count, ...], ...] = ()
    """Pairs of layers and width to train, instead of `layers`: [[1, 128], [4, 64], [16, 32]] are of one size."""
    tokens: tuple[PositiveInt, ...] = ()
    """Tokens to train on."""
    tokens_per_parameter: tuple[Positive, ...] = ()
    """Tokens to train on for each parameter, embeddings and head left out."""
    flops: tuple[Positive, ...] = ()
    """FLOPs of training: sizes of one budget make an isoFLOP curve."""
    seeds: tuple[Seed, ...] = (1337,)
    """Each size and budget is trained once for each seed."""
    rate_exponent: NonNegative = 0.0
    """Learning rates are multiplied by (smallest width / width) to this power."""
    rate_factors: tuple[Positive, ...] = (1.0,)
    """Each size, budget and seed is trained once with its learning rates times each of these; laws take the best."""

    def __post_init__(self):
        if not self.layers and not self.shapes:
            raise ValueError("layers is missing: name the depths to train, such as layers = [2, 4, 6, 8]")
        if self.shapes and (self.layers or self.widths):
            raise ValueError("shapes has the layers and widths of all models: leave out layers and widths, or shapes")
        for shape in self.shapes:
            if len(shape) != 2:
                raise ValueError(f"shapes has {list(shape)}: each shape is a pair of layers and width, such as [4, 64]")
        given = [name for name in ("tokens", "tokens_per_parameter", "flops") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"a sweep has budgets by one of tokens, tokens_per_parameter and flops, not by {' and '.join(given)}"
                if given
                else "budgets are missing: name tokens, tokens_per_parameter or flops, such as flops = [1e13, 3e13]"
            )

    def models(self) -> Iterator[tuple[int, int]]:
        """Yields the layers and the width of each model."""
        pairs = self.shapes or (
            (layers, width) for layers in self.layers for width in self.widths or (self.aspect_ratio * layers,)
        )
        for layers, width in pairs:
            yield layers, self.head_width * max(1, round(width / self.head_width))


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    folder: Path
    settings: dict[str, Any]  # of train.py
    parameters: int
    parameters_without_embeddings: int
    tokens: int
    flops: float

    @property
    def steps(self) -> int:
        return self.settings["max_iters"]

    @property
    def step(self) -> int:
        """The last step that was logged."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    @property
    def finished(self) -> bool:
        lines = read_metrics(self.folder / "metrics.jsonl")
        return bool(lines) and lines[-1]["step"] >= self.steps and "val_loss" in lines[-1]

    @property
    def resumable(self) -> bool:
        return named_checkpoint(self.folder, "last") is not None

    @property
    def config(self) -> Path:
        """The config file of this run, beside its folder."""
        return self.folder.with_name(self.name + ".toml")

    def changed(self) -> set[str]:
        """Returns the settings that differ from those that this run began with."""
        if not self.step or not self.config.exists():
            return set()
        begun = read_settings(self.config)
        names = (begun.keys() | self.settings.keys()) - OF_THE_MACHINE
        return {name for name in names if begun.get(name) != self.settings.get(name)}

    def command(self, launcher: str) -> list[str]:
        """The command that starts or resumes this run. Writes its config beside its folder."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.config, write_settings(self.settings))
        program = [sys.executable] if launcher == "python" else shlex.split(launcher)
        flags = [f"--resume={self.folder}"] if self.resumable else [f"--out_dir={self.folder}", "--overwrite"]
        return [*program, str(resource("train.py")), str(self.config), *flags]

    def result(self) -> FinishedRun:
        """The result of a finished run."""
        lines = [line for line in read_metrics(self.folder / "metrics.jsonl") if "val_loss" in line]
        last, settings = lines[-1], self.settings
        return FinishedRun(
            self.name, settings["n_layer"], settings["n_embd"], settings["seed"],
            self.parameters, self.parameters_without_embeddings, self.tokens, self.flops,
            last["val_loss"], last["seconds"], [(line["tokens"], line["val_loss"]) for line in lines if line["tokens"]],
            settings["learning_rate"],
        )  # fmt: skip


def read_sweep(path: Path) -> tuple[Sweep, dict[str, Any]]:
    """Reads a sweep's file: the table [sweep], and the settings of train.py. Raises UserError."""
    tables, source = read_toml(path), str(path)
    own = tables.pop("sweep", None)
    if not isinstance(own, dict):
        raise UserError(f"{path} has no table [sweep], which names the sizes and budgets to train")
    values = {name: read_value(Sweep, name, value, source) for name, value in own.items()}
    settings = {}
    for table, entries in tables.items():
        if not isinstance(entries, dict):
            raise UserError(
                f"{path}: {table} stands in no table: write it below [sweep], [data], [model] or [training]"
            )
        settings |= {name: read_value(Config, name, value, source) for name, value in entries.items()}
    for name in {"n_layer", "n_embd", "n_head", "max_iters", "seed"} & settings.keys():
        raise UserError(f"{path}: {name} follows from the table [sweep]: leave it out")
    return build(Sweep, values, dict.fromkeys(values, source)), settings


def sweep_runs(path: Path) -> list[SweepRun]:
    """The runs of a sweep's file, from the smallest to the largest, each in a folder of out/NAME. Raises UserError."""
    sweep, common = read_sweep(path)
    shapes = list(sweep.models())
    narrowest = min(width for _, width in shapes)
    budgets = sweep.tokens or sweep.tokens_per_parameter or sweep.flops
    runs = []
    data = build(DataConfig, {name: value for name, value in common.items() if SETTINGS[name].table == "data"})
    corpus = open_corpus(data.sources)
    if corpus and corpus.tokenizer:  # train.py gives a model the vocabulary of its dataset
        common["vocab_size"] = corpus.tokenizer.vocab_size
    for (layers, width), budget, seed, factor in itertools.product(shapes, budgets, sweep.seeds, sweep.rate_factors):
        shape = {"n_layer": layers, "n_embd": width, "n_head": width // sweep.head_width, "seed": seed}
        config = build_config(common | shape, str(path))
        with meta_device():
            model = GPT(config.model)
        sizes = model.num_parameters(), model.num_parameters(embeddings=False)
        cost = flops_per_token(model)
        wanted = budget if sweep.tokens else budget * sizes[1] if sweep.tokens_per_parameter else budget / cost
        step = config.sequences_per_step * config.model.block_size
        steps = max(1, round(wanted / step))
        scale = factor * (narrowest / width) ** sweep.rate_exponent
        rates = {name: scale * getattr(config.training, name) for name in ("learning_rate", "muon_rate")}
        if config.training.min_lr:
            rates["min_lr"] = scale * config.training.min_lr
        name = f"{layers}x{width}-{steps}" + (f"-{seed}" if len(sweep.seeds) > 1 else "")
        name += f"-rate{factor:g}" if len(sweep.rate_factors) > 1 else ""
        evaluations = {"eval_interval": max(1, steps // 4), "max_iters": steps}
        settings = evaluations | common | shape | rates
        runs.append(SweepRun(name, OUT_ROOT / path.stem / name, settings, *sizes, steps * step, steps * step * cost))
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two runs are {name}: a shape or a budget stands there twice")
    for run in runs:
        if changed := run.changed():
            raise UserError(
                f"{run.folder} was begun with another {', '.join(sorted(changed))} than {path} has now: give the file "
                f"another name, or delete {run.folder.parent} to train all its runs again"
            )
    return sorted(runs, key=lambda run: run.flops)


def write_table(results: list[FinishedRun]) -> str:
    """Returns results as JSON, a run a line."""
    return "[\n" + ",\n".join(json.dumps(result._asdict()) for result in results) + "\n]\n"
