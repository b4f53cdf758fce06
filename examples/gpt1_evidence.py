"""The evidence of GPT-1's paper on a small model: labels and the auxiliary loss, layers transferred, what is forgotten.

    bash examples/relatives_arc.sh                                      # trains the default model, out/relatives/gpt/1
    python examples/gpt1_data.py --output=data/gpt1_labels --train_size=5000
    python examples/gpt1_evidence.py
    python examples/gpt1_evidence.py --labels 50 500 --tasks package --seeds=1 --output=out/try         a quick look

The script fine-tunes the model as stages/finetune.py does and asks three questions:

1. How accurate is it after 50 to 5,000 labels, with and without the language-model loss beside the task's?
2. How accurate is it at `transfer_labels` labels if only the embeddings and the first blocks are transferred?
3. How well does the model of each run of 1. still predict the val split of its pre-training text?

A seed draws the labels, nested from the fewest to the most, their order, and the new weights. There is no val split of
the labels: the last epoch counts. The script writes OUTPUT/figures.json after each run and continues from it when
called again, also with further seeds, tasks or numbers of labels; then OUTPUT/tables.md and OUTPUT/evidence.png. ± is a
standard error over seeds, of differences seed by seed.
"""

import copy
import math
import random
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm import tqdm

from gpt_arc.data.datasets import open_dataset
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.device import autocast, resolve_device, resolve_dtype, to_device
from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.experiments import run_missing
from gpt_arc.evaluation.statistics import mean_and_error, standard_error
from gpt_arc.extras import import_extra
from gpt_arc.files import DATA_ROOT, replacing, write_file
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig, combined_loss, with_special_tokens
from gpt_arc.finetuning.encoding import encode_examples
from gpt_arc.finetuning.examples import Columns, classes_of, read_examples
from gpt_arc.finetuning.predictions import metrics_of, predict
from gpt_arc.flags import parse_flags
from gpt_arc.nn.names import TaskKind
from gpt_arc.settings import STRICT, Count, Positive
from gpt_arc.tables import markdown
from gpt_arc.training.epochs import epoch_batches
from gpt_arc.training.optim import Updater
from gpt_arc.training.stage_options import FinetuneOptions
from gpt_arc.weights.directory import load_text_model
from gpt_arc.weights.edit import transfer
from model import GPT

E = TypeVar("E")
KINDS: dict[str, TaskKind] = {
    "package": "classification", "follows": "entailment", "related": "similarity", "next_sentence": "multiple_choice"
}  # fmt: skip
WEIGHT = 0.5  # of the auxiliary loss, GPT-1's


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    model: Path = Path("out/relatives/gpt/1")
    """The pre-trained model."""
    dataset: str = "gpt1_text"
    """The dataset that it was trained on."""
    data: Path = DATA_ROOT / "gpt1_labels"
    """Folder of the labelled sets."""
    tasks: tuple[str, ...] = ("package", "follows")
    """Sets to fine-tune on."""
    labels: tuple[Count, ...] = (50, 150, 500, 1500, 5000)
    """Numbers of labels."""
    transfer_labels: Count = 500
    """Number of labels at which part of the model is transferred."""
    seeds: Count = 3
    """Runs of each kind."""
    examples: Count = 2500
    """Examples that a run reads, over all its epochs; more where that is less than two epochs."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    output: Path = Path("out/gpt1_evidence")
    """Folder for the results."""

    def __post_init__(self):
        if unknown := set(self.tasks) - set(KINDS):
            raise ValueError(f"tasks: {min(unknown)!r} is none of {', '.join(KINDS)}")


def grid(options: Options, blocks: int) -> list[dict[str, Any]]:
    """Returns all cases for a model with this many blocks, the first seed first. A case with None transfers nothing."""
    cases = [(labels, weight, blocks) for labels in options.labels for weight in (0.0, WEIGHT)]
    cases += [(options.transfer_labels, 0.0, kept) for kept in (None, *range(blocks + 1))]
    names = "task", "labels", "language_weight", "blocks", "seed"
    return [
        dict(zip(names, (task, *case, seed)))
        for seed, task, case in product(range(1, options.seeds + 1), options.tasks, dict.fromkeys(cases))
    ]


def drawn(examples: Sequence[E], labels: int, seed: int) -> list[E]:
    """Returns the examples that a seed draws; those for fewer labels are among those for more."""
    return random.Random(seed).sample(examples, len(examples))[:labels]


class Pretrained(NamedTuple):
    """A pre-trained model, and held-out text like that it was trained on."""

    model: GPT
    tokenizer: Tokenizer
    windows: Tensor  # (B, T + 1) tokens

    @torch.no_grad()
    def loss_of(self, model: GPT, device: torch.device, dtype: str) -> float:
        """Returns a model's loss on the held-out text in nats a token, among the tokens of pre-training alone."""
        total = 0.0
        for rows in self.windows.split(32):
            rows = rows.to(device)
            with autocast(device, dtype):
                logits = model.logits(model.hidden(rows[:, :-1]))[..., : self.model.config.vocab_size]
            total += F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        return total / self.windows[:, 1:].numel()


def finetune(
    options: Options, base: Pretrained, task: str, labels: int, language_weight: float, blocks: int | None, seed: int
) -> dict[str, Any]:
    """Fine-tunes one model. Returns its test accuracy and, if everything was transferred, its loss on the text of
    pre-training. Raises UserError."""
    kind, device = KINDS[task], resolve_device("auto")
    columns, dtype = Columns.usual(kind), resolve_dtype("auto", device)
    every, test = (read_examples(options.data / task / f"{name}.jsonl", kind, columns) for name in ("train", "test"))
    if labels > len(every):
        again = f"python examples/gpt1_data.py --output={options.data} --train_size={labels}"
        raise UserError(f"{options.data / task}/train.jsonl has {len(every)} labels, not {labels}: {again}")
    stage = FinetuneOptions(
        epochs=max(2, options.examples // labels), learning_rate=options.learning_rate, warmup=0.1, seed=seed,
        language_weight=language_weight,
    )  # fmt: skip
    torch.manual_seed(seed)
    trunk, special = with_special_tokens(copy.deepcopy(base.model))
    classes = None if kind == "multiple_choice" else classes_of(every)
    config = ClassifierConfig(kind, classes, special, columns, trunk.config.block_size, stage.classifier_dropout)
    classifier = Classifier(transfer(trunk, blocks), config).to(device)
    encoded = encode_examples(drawn(every, labels, seed), config, base.tokenizer)
    training = stage.training(stage.epochs * math.ceil(labels / stage.batch_size))
    updater = Updater(classifier, training, device, dtype)
    torch.manual_seed(seed)
    batches = (
        encoded.batch(rows)
        for epoch in range(stage.epochs)
        for rows in epoch_batches(encoded.lengths, stage.batch_size, seed, epoch, stage.group_by_length)
    )
    name = f"{task}, {labels} labels, weight {language_weight:g}, {blocks} blocks, seed {seed}"
    for step, batch in enumerate(tqdm(batches, name, training.max_iters, unit="step", disable=None)):
        with autocast(device, dtype):
            outcome = classifier(*to_device(batch, device), with_language=language_weight > 0)
        loss = combined_loss(outcome.task_loss, outcome.language_loss, language_weight)
        updater.backward(loss / len(batch.labels))
        updater.update(stage.rate(step, training), loss.detach())
    predictions = predict(classifier, encode_examples(test, config, base.tokenizer), stage.batch_size, device, dtype)
    result = {"accuracy": metrics_of(predictions, config)["accuracy"]}
    if blocks == trunk.config.n_layer:
        result["loss"] = base.loss_of(trunk.eval(), device, dtype)
    return result


class Results:
    """The results of all runs, and the tables and the picture of them."""

    def __init__(self, before: float, blocks: int, transfer_labels: int, runs: list[dict[str, Any]]):
        self.before, self.blocks, self.transfer_labels, self.runs = before, blocks, transfer_labels, runs
        self.tasks = list(dict.fromkeys(run["task"] for run in runs))
        self.labels = sorted({run["labels"] for run in runs})

    def of(self, name: str, **case: Any) -> dict[int, float]:
        """Returns the figure `name` of the runs of a case by seed; accuracies in percent."""
        factor = 100 if name == "accuracy" else 1
        return {run["seed"]: factor * run[name] for run in self.runs if case.items() <= run.items()}

    def curve(self, name: str, task: str, weight: float) -> list[dict[int, float]]:
        """Returns the figure `name` of the whole model by number of labels."""
        case = {"task": task, "language_weight": weight, "blocks": self.blocks}
        return [self.of(name, labels=labels, **case) for labels in self.labels]

    def transfers(self, task: str) -> dict[str, dict[int, float]]:
        """Returns accuracies by what is transferred, from nothing to everything."""
        names: dict[int | None, str] = {None: "nothing", 0: "embeddings"}
        names |= {count: f"{count} of {self.blocks} blocks" for count in range(1, self.blocks)}
        names |= {self.blocks: "everything"}
        case = {"task": task, "labels": self.transfer_labels, "language_weight": 0.0}
        return {name: self.of("accuracy", blocks=count, **case) for count, name in names.items()}

    def tables(self) -> str:
        """Returns the three tables as markdown."""
        header = ["", *(f"{labels:,} labels" for labels in self.labels)]
        accuracies, losses = [["test accuracy, %", *header[1:]]], [["loss on the text of pre-training", *header[1:]]]
        for task in self.tasks:
            without, aided = (self.curve("accuracy", task, weight) for weight in (0.0, WEIGHT))
            gains = [{seed: b[seed] - a[seed] for seed in a.keys() & b.keys()} for a, b in zip(without, aided)]
            accuracies.append([f"`{task}`, task's loss alone", *(cell(values, 1) for values in without)])
            accuracies.append([f"`{task}`, and language-model loss", *(cell(values, 1) for values in aided)])
            accuracies.append(["what that gains", *(cell(values, 1) for values in gains)])
            for weight, name in ((0.0, "task's loss alone"), (WEIGHT, "and language-model loss")):
                losses.append([f"`{task}`, {name}", *(cell(v, 3) for v in self.curve("loss", task, weight))])
        curves = {task: self.transfers(task) for task in self.tasks}
        transfers = [["transferred", *(f"`{task}`" for task in curves)]]
        for part, *values in zip(curves[self.tasks[0]], *(curve.values() for curve in curves.values())):
            if any(values):
                transfers.append([part, *(cell(each, 1) for each in values)])
        return "\n\n".join(map(markdown, (accuracies, transfers, losses)))

    def draw(self, path: Path) -> None:
        """Draws accuracies by labels and by what is transferred, and losses by labels."""
        figure = import_extra("matplotlib.figure").Figure(figsize=(12, 4), layout="constrained")
        by_labels, by_blocks, forgotten = figure.subplots(1, 3)
        for color, task in enumerate(self.tasks):
            for weight, line in ((0.0, "o-"), (WEIGHT, "s--")):
                name = f"{task}, " + ("with the language-model loss" if weight else "task's loss alone")
                for axes, figure_name in ((by_labels, "accuracy"), (forgotten, "loss")):
                    points = zip(self.labels, self.curve(figure_name, task, weight))
                    errorbar(axes, [(x, v) for x, v in points if v], line, color=f"C{color}", label=name)
            curve = self.transfers(task)
            errorbar(by_blocks, [(i, v) for i, v in enumerate(curve.values()) if v], "o-", color=f"C{color}")
            by_blocks.set_xticks(range(len(curve)), curve, rotation=30)
        for axes in (by_labels, forgotten):
            axes.set_xscale("log")
            axes.set_xticks(self.labels, [f"{labels:,}" for labels in self.labels])
            axes.minorticks_off()
            axes.set_xlabel("labels")
        forgotten.axhline(self.before, color="black", linestyle=":", label="before fine-tuning")
        forgotten.set_ylabel("loss on pre-training text, nats a token")
        by_labels.set_ylabel("test accuracy, %")
        by_blocks.set(ylabel="test accuracy, %", xlabel=f"transferred, {self.transfer_labels} labels")
        figure.legend(*forgotten.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=80)


def errorbar(axes: Any, points: list[tuple[Any, dict[int, float]]], line: str, **style: Any) -> None:
    """Draws the means of points (x, values by seed), with bars of a standard error."""
    values = [list(by_seed.values()) for _, by_seed in points]
    errors = [standard_error(each) for each in values]
    axes.errorbar([x for x, _ in points], [*map(fmean, values)], errors, fmt=line, markersize=4, capsize=2, **style)


def cell(values: dict[int, float], digits: int) -> str:
    return mean_and_error(list(values.values()), digits) if values else ""


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    torch.set_num_threads(1)  # a second gains little with models this small, and costs much on busy cores
    model, tokenizer = load_text_model(options.model)
    size, blocks = model.config.block_size + 1, model.config.n_layer
    split = open_dataset(options.dataset, tokenizer, "dataset").split("val", size - 1, model.config.vocab_size, False)
    windows = torch.tensor(split.read(0, len(split) // size * size)).view(-1, size)
    base, device = Pretrained(model, tokenizer, windows), resolve_device("auto")
    before = round(base.loss_of(model.eval().to(device), device, resolve_dtype("auto", device)), 3)
    settings = {name: str(getattr(options, name)) for name in ("model", "dataset", "data")}
    settings |= {name: getattr(options, name) for name in ("examples", "learning_rate", "transfer_labels")}
    settings |= {"blocks": blocks, "loss before": before}
    runs = run_missing(
        options.output / "figures.json", settings, grid(options, blocks), partial(finetune, options, base)
    )
    results = Results(before, blocks, options.transfer_labels, runs)
    write_file(options.output / "tables.md", results.tables() + "\n")
    print(f"\nloss on the text of pre-training before fine-tuning: {before:.3f}\n\n{results.tables()}")
    results.draw(options.output / "evidence.png")


if __name__ == "__main__":
    entry_point(main)()
