"""What pre-training alone teaches, update by update: two tasks by the probability of texts, without fine-tuning.

    bash examples/relatives_arc.sh                       # trains the models and keeps their checkpoints
    python examples/gpt1_zero_shot.py
    python examples/gpt1_zero_shot.py --models gpt --seeds 1 --steps 100 600 --output=out/try      a quick look

This is figure 2 (right) of GPT-1's paper on a small scale: a GPT, a solid line, beside an LSTM, a dashed one, and a GPT
whose sentences were in random order. The answers are

`next_sentence`: the option with the highest mean log-probability a token after its context. The figure is the share
that is right; 25% by chance.
`follows`: the second half of a sentence is in order if its mean log-probability a token after the first half is high.
The figure needs no threshold: it is the share of pairs, of a sentence in order and a shuffled one, in which the former
scores higher (the area under the ROC curve); 50% by chance.

The script writes OUTPUT/figures.json after each checkpoint and continues from it when called again, then
OUTPUT/table.md and OUTPUT/zero_shot.png. ± is a standard error over seeds of pre-training.
"""

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.experiments import run_missing
from gpt_arc.evaluation.items import load_items
from gpt_arc.evaluation.metrics import choice_accuracy
from gpt_arc.evaluation.reader import Reader
from gpt_arc.evaluation.statistics import mean_and_error, standard_error
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
    seeds: tuple[int, ...] = (1, 2, 3)
    """Their seeds."""
    steps: tuple[Count, ...] = (100, 200, 300, 400, 500, 600)
    """Updates after which the checkpoints were written."""
    data: Path = DATA_ROOT / "gpt1_arc"
    """Folder of the labelled sets."""
    output: Path = Path("out/gpt1_zero_shot")
    """Folder for the results."""


def ranked(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Returns the share of pairs, one of each, in which `higher` is, equals as half: the area under the ROC curve."""
    wins = torch.heaviside(torch.tensor(higher)[:, None] - torch.tensor(lower), torch.tensor(0.5))
    return wins.double().mean().item()


def next_sentence(reader: Reader, data: Path) -> float:
    """Returns the share of right answers to `next_sentence`."""
    items = load_items(NEXT_SENTENCE, "test", data / "next_sentence/test.jsonl", seed=0)
    return fmean(choice_accuracy(NEXT_SENTENCE, reader, [(NEXT_SENTENCE.question(item), "") for item in items]))


def follows(reader: Reader, data: Path) -> float:
    """Returns the share of pairs of `follows` in which the sentence in order scores higher."""
    examples = read_examples(data / "follows/test.jsonl", "entailment", Columns.usual("entailment"))
    scores = reader.score([(first, f" {second}") for first, second in (each.texts for each in examples)], "follows")
    by_label: dict[str | None, list[float]] = {"yes": [], "no": []}
    for example, score in zip(examples, scores):
        by_label[example.label].append(score.log_probability / score.tokens)
    return ranked(by_label["yes"], by_label["no"])


def measure(options: Options, model: str, seed: int, step: int) -> dict[str, Any]:
    """Returns the figures of a checkpoint. Raises UserError if it isn't there."""
    run = options.results / model / str(seed)
    if not (checkpoint := run / step_name(step)).is_dir():
        raise UserError(f"{run} has no checkpoint of step {step}: run bash examples/relatives_arc.sh first")
    gpt, tokenizer = load_text_model(checkpoint)
    reader = Reader(gpt.eval(), tokenizer, batch_tokens=8192)
    lines = (line for line in read_metrics(run / "metrics.jsonl") if line["step"] == step and "val_loss" in line)
    tasks = {"next_sentence": next_sentence(reader, options.data), "follows": follows(reader, options.data)}
    return {"val loss": next(lines)["val_loss"], **tasks}


def curves(runs: list[dict[str, Any]], model: str, figure: str, scale: float = 1) -> dict[int, list[float]]:
    """Returns a figure of a model's seeds, times `scale`, by step."""
    values: dict[int, list[float]] = {}
    for run in sorted(runs, key=lambda run: run["step"]):
        if run["model"] == model:
            values.setdefault(run["step"], []).append(scale * run[figure])
    return values


def table(runs: list[dict[str, Any]]) -> str:
    """Returns the markdown table."""
    steps = sorted({run["step"] for run in runs})
    rows = [["after updates", *(f"{step:,}" for step in steps)]]
    models = [model for model in LINES if any(run["model"] == model for run in runs)]
    for (name, title, scale, digits), model in product(
        (
            ("val loss", "val loss", 1, 3),
            ("next_sentence", "`next_sentence`, % right", 100, 1),
            ("follows", "`follows`, % of pairs", 100, 1),
        ),
        models,
    ):
        cells = curves(runs, model, name, scale)
        texts = (mean_and_error(cells[step], digits) if step in cells else "" for step in steps)
        rows.append([f"{title}: {MODELS[model]}", *texts])
    return markdown(rows)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draws both tasks by updates, with bars of a standard error, and what chance would give."""
    figure = import_extra("matplotlib.figure").Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (task, chance) in zip(panels, CHANCE.items()):
        for model, line in LINES.items():
            if points := curves(runs, model, task, 100):
                means, errors = map(fmean, points.values()), map(standard_error, points.values())
                axes.errorbar([*points], [*means], [*errors], fmt=line, markersize=4, capsize=2, label=MODELS[model])
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
    grid = product(options.models, options.seeds, options.steps)
    cases = [{"model": model, "seed": seed, "step": step} for model, seed, step in grid]
    runs = run_missing(options.output / "figures.json", settings, cases, partial(measure, options))
    write_file(options.output / "table.md", table(runs) + "\n")
    print(table(runs))
    draw(runs, options.output / "zero_shot.png")


if __name__ == "__main__":
    entry_point(main)()
