"""What pre-training alone teaches, update by update: two tasks by the probability of texts, without fine-tuning.

    bash examples/relatives_arc.sh                       # trains the models and keeps their checkpoints
    python examples/gpt1_zero_shot.py
    python examples/gpt1_zero_shot.py --models gpt --steps 100 600 --output=out/try       a quick look

This is figure 2 (right) of GPT-1's paper on a small scale: a GPT, a solid line, beside an LSTM, a dashed one, and a GPT
whose sentences were in random order. The answers are

`next_sentence`: the option with the highest mean log-probability a token after its context. The figure is the share
that is right; 25% by chance.
`follows`: the second half of a sentence is in order if its mean log-probability a token after the first half is high.
The figure needs no threshold: it is the share of pairs, of a sentence in order and a shuffled one, in which the former
scores higher (the area under the ROC curve); 50% by chance.

The script writes OUTPUT/figures.json after each checkpoint and continues from it when called again, then
OUTPUT/table.md and OUTPUT/zero_shot.png. ± is a standard error over the 1,000 test examples.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.experiments import run_missing
from gpt_arc.evaluation.items import load_items
from gpt_arc.evaluation.metrics import choice_accuracy
from gpt_arc.evaluation.reader import Reader
from gpt_arc.evaluation.statistics import standard_error
from gpt_arc.evaluation.tasks import Task
from gpt_arc.extras import import_extra
from gpt_arc.files import DATA_ROOT, replacing, write_file
from gpt_arc.finetuning.examples import Columns, read_examples
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count
from gpt_arc.tables import markdown
from gpt_arc.training.checkpoints import step_name
from gpt_arc.training.log import read_metrics
from gpt_arc.weights.directory import load_text_model
from relatives_report import MODELS

LINES = {"gpt": "o-", "lstm": "s--", "shuffled": "^:"}
CHANCE = {"next_sentence": 25, "follows": 50}
NEXT_SENTENCE = Task(
    "next_sentence", "which of four sentences comes after two", "choice", context="{context}", continuation=" {option}",
    options="options", answer="{label}", normalise="token",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    results: Path = Path("out/relatives")
    """Folder with the runs of the models."""
    models: tuple[Literal["gpt", "lstm", "shuffled"], ...] = ("gpt", "lstm", "shuffled")
    """Runs to read."""
    steps: tuple[Count, ...] = (100, 200, 300, 400, 500, 600)
    """Updates after which the checkpoints were written."""
    data: Path = DATA_ROOT / "gpt1_arc"
    """Folder of the labelled sets."""
    output: Path = Path("out/gpt1_zero_shot")
    """Folder for the results."""


def ranked(higher: Sequence[float], lower: Sequence[float]) -> tuple[float, float]:
    """Returns the share of pairs, one of each, in which `higher` is, and its standard error; equals count half.

    This is the area under the ROC curve, with the error of DeLong et al. (1988).
    """
    wins = torch.heaviside(torch.tensor(higher)[:, None] - torch.tensor(lower), torch.tensor(0.5)).double()
    return wins.mean().item(), math.hypot(*(standard_error(wins.mean(dim).tolist()) for dim in (0, 1)))


def next_sentence(reader: Reader, data: Path) -> tuple[float, float]:
    """Returns the share of right answers to `next_sentence` and its standard error."""
    items = load_items(NEXT_SENTENCE, "test", data / "next_sentence/test.jsonl", seed=0)
    right = choice_accuracy(NEXT_SENTENCE, reader, [(NEXT_SENTENCE.question(item), "") for item in items])
    return sum(right) / len(right), standard_error(right)


def follows(reader: Reader, data: Path) -> tuple[float, float]:
    """Returns the share of pairs of `follows` in which the sentence in order scores higher, and its standard error."""
    examples = read_examples(data / "follows/test.jsonl", "entailment", Columns.usual("entailment"))
    scores = reader.score([(first, f" {second}") for first, second in (each.texts for each in examples)], "follows")
    by_label: dict[str | None, list[float]] = {"yes": [], "no": []}
    for example, score in zip(examples, scores):
        by_label[example.label].append(score.log_probability / score.tokens)
    return ranked(by_label["yes"], by_label["no"])


def measure(options: Options, model: str, step: int) -> dict[str, Any]:
    """Returns the figures of a checkpoint. Raises UserError if it isn't there."""
    run = options.results / model
    if not (checkpoint := run / step_name(step)).is_dir():
        raise UserError(f"{run} has no checkpoint of step {step}: run bash examples/relatives_arc.sh first")
    gpt, tokenizer = load_text_model(checkpoint)
    reader = Reader(gpt.eval(), tokenizer, batch_tokens=8192)
    lines = (line for line in read_metrics(run / "metrics.jsonl") if line["step"] == step and "val_loss" in line)
    measured: dict[str, Any] = {"val loss": next(lines)["val_loss"]}
    for name, of in (("next_sentence", next_sentence), ("follows", follows)):
        measured[name], measured[f"{name} error"] = of(reader, options.data)
    return measured


def curve(runs: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """Returns the figures of a model by step."""
    return sorted((run for run in runs if run["model"] == model), key=lambda run: run["step"])


def table(runs: list[dict[str, Any]]) -> str:
    """Returns the markdown table."""
    steps = sorted({run["step"] for run in runs})
    rows = [["after updates", *(f"{step:,}" for step in steps)]]
    models = [model for model in LINES if curve(runs, model)]
    for name, model in product(("val loss", *CHANCE), models):
        cells = {run["step"]: run for run in curve(runs, model)}
        title = f"`{name}`, % right" if name == "next_sentence" else f"`{name}`, % of pairs" if name in CHANCE else name
        texts = [
            f"{100 * run[name]:.1f} ± {100 * run[f'{name} error']:.1f}" if name in CHANCE else f"{run[name]:.3f}"
            for run in cells.values()
        ]
        by_step = dict(zip(cells, texts))
        rows.append([f"{title}: {MODELS[model]}", *(by_step.get(step, "") for step in steps)])
    return markdown(rows)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draws both tasks by updates, with bars of a standard error, and what chance would give."""
    figure = import_extra("matplotlib.figure").Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (task, chance) in zip(panels, CHANCE.items()):
        for model, line in LINES.items():
            points = curve(runs, model)
            means, errors = ([100 * run[key] for run in points] for key in (task, f"{task} error"))
            if points:
                axes.errorbar([run["step"] for run in points], means, errors, fmt=line, markersize=4, capsize=2,
                              label=MODELS[model])  # fmt: skip
        axes.axhline(chance, color="grey", linewidth=1, label="chance")
        axes.set(title=task, xlabel="updates of pre-training")
    panels[0].set_ylabel("% right")
    panels[1].set_ylabel("% of pairs ranked rightly")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    torch.set_num_threads(1)  # a second gains little with models this small, and costs much on busy cores
    settings = {name: str(getattr(options, name)) for name in ("results", "data")}
    cases = [{"model": model, "step": step} for model, step in product(options.models, options.steps)]
    runs = run_missing(options.output / "figures.json", settings, cases, partial(measure, options))
    write_file(options.output / "table.md", table(runs) + "\n")
    print(table(runs))
    draw(runs, options.output / "zero_shot.png")


if __name__ == "__main__":
    entry_point(main)()
