"""Writes the table and the picture of `bash examples/relatives_arc.sh`.

    python examples/relatives_report.py --results out/relatives

Beside the losses of the val split and the accuracies of the four tasks, it measures all models on the same tokens: in
each window of the val split one token at a time is hidden, at a quarter, half and three quarters of its length. BERT
predicts it from both sides, the others from the left. The script writes table.md, figures.json and accuracy.png.
"""

import sys
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from gpt_arc.data.datasets import open_dataset
from gpt_arc.data.masking import mask_token, scored_tokens
from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.statistics import mean_and_error, standard_error
from gpt_arc.extras import import_extra
from gpt_arc.files import replacing, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.reading import read_json
from gpt_arc.settings import STRICT
from gpt_arc.tables import markdown, to_json
from gpt_arc.training.log import read_metrics
from gpt_arc.weights.directory import load_text_model
from model import GPT

MODELS = {"gpt": "GPT", "bert": "BERT", "lstm": "LSTM", "shuffled": "GPT, sentences shuffled"}
TASKS = {"package": 7, "follows": 2, "related": 2, "next_sentence": 4}  # and between how many answers they choose


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    results: Path = Path("out/relatives")
    """Folder with the models and reports; the table is written there."""
    dataset: str = "gpt1_text"
    """The dataset that the models were trained on."""
    mask_rate: float = 0.15
    """Share of tokens that BERT's training scored."""


@torch.no_grad()
def hidden_tokens(model: GPT, windows: Tensor, token: int) -> tuple[float, float]:
    """Returns the loss in nats and the accuracy at tokens of windows (B, T), each hidden in turn by `token`."""
    size = windows.size(1)
    logits = []
    for place in (places := [size // 4, size // 2, 3 * size // 4]):
        if model.config.attention == "causal":
            hidden = model.hidden(windows[:, :place])[:, -1]
        else:
            hidden = model.hidden(windows.index_fill(1, torch.tensor(place), token))[:, place]
        logits.append(model.logits(hidden))
    scores, targets = torch.stack(logits, 1).flatten(0, 1), windows[:, places].flatten()
    return F.cross_entropy(scores, targets).item(), (scores.argmax(-1) == targets).double().mean().item()


def measure(options: Options, folder: Path) -> dict:
    """Returns the figures of one pre-trained model. Raises UserError if it hasn't been trained."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "val_loss" in line]
    if not lines:
        raise UserError(f"{folder} has no results: run bash examples/relatives_arc.sh first")
    model, tokenizer = load_text_model(folder, causal=False)
    size, causal = model.config.block_size, model.config.attention == "causal"
    split = open_dataset(options.dataset, tokenizer, "dataset").split("val", 1, model.config.vocab_size, False)
    windows = torch.tensor(split.read(0, len(split) // size * size)).view(-1, size)
    loss, accuracy = hidden_tokens(model.eval(), windows, mask_token(tokenizer))
    reports = {task: options.results / task / folder.parent.name / folder.name / "report.json" for task in TASKS}
    return {
        "parameters": model.num_parameters(),
        "tokens": lines[-1]["tokens"],
        "scored": 1.0 if causal else scored_tokens(options.mask_rate, size) / size,
        "val loss": lines[-1]["val_loss"],
        "hidden loss": loss,
        "hidden accuracy": accuracy,
        "tasks": {task: read_json(path)["test"]["accuracy"] for task, path in reports.items() if path.exists()},
    }


def accuracies(seeds: list[dict], task: str) -> list[float]:
    """Returns the accuracies of a model's seeds in percent, without those that weren't fine-tuned on the task."""
    return [100 * each["tasks"][task] for each in seeds if task in each["tasks"]]


def measured_tasks(figures: dict[str, list[dict]]) -> list[str]:
    """Returns the tasks that each model was fine-tuned on."""
    return [task for task in TASKS if all(accuracies(seeds, task) for seeds in figures.values())]


def table(figures: dict[str, list[dict]]) -> str:
    """Returns the markdown table of each model's seeds."""
    first = [seeds[0] for seeds in figures.values()]
    rows = {
        "parameters": [f"{figure['parameters']:,}" for figure in first],
        "tokens read in pre-training": [f"{figure['tokens']:,}" for figure in first],
        "of these scored, %": [f"{100 * figure['scored']:.1f}" for figure in first],
    }
    for title, name, scale, digits in (
        ("val loss, nats a scored token", "val loss", 1, 3),
        ("the same hidden tokens: loss", "hidden loss", 1, 3),
        ("right, %", "hidden accuracy", 100, 1),
    ):
        rows[title] = [mean_and_error([scale * each[name] for each in seeds], digits) for seeds in figures.values()]
    tasks = measured_tasks(figures)
    for task in tasks:
        title = f"`{task}`, test accuracy, % (by chance {100 / TASKS[task]:.0f})"
        rows[title] = [mean_and_error(accuracies(seeds, task), 1) for seeds in figures.values()]
    if len(tasks) > 1:  # the mean of each seed, then over seeds
        by_seed = [zip(*(accuracies(seeds, task) for task in tasks)) for seeds in figures.values()]
        rows["mean of these tasks"] = [mean_and_error([*map(fmean, seeds)], 1) for seeds in by_seed]
    return markdown([["figure", *map(MODELS.__getitem__, figures)], *([name, *cells] for name, cells in rows.items())])


def draw(figures: dict[str, list[dict]], path: Path) -> None:
    """Draws the accuracies of the tasks, with bars of a standard error, and what chance would give."""
    figure = import_extra("matplotlib.figure").Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    tasks = measured_tasks(figures)
    width = 0.8 / len(figures)
    for number, (name, seeds) in enumerate(figures.items()):
        values = [accuracies(seeds, task) for task in tasks]
        places = [i + width * (number + 0.5) - 0.4 for i in range(len(tasks))]
        axes.bar(places, [fmean(v) for v in values], 0.95 * width, yerr=[standard_error(v) for v in values], capsize=3,
                 label=MODELS[name])  # fmt: skip
    for i, task in enumerate(tasks):
        axes.hlines(100 / TASKS[task], i - 0.4, i + 0.4, color="black", linestyle=":", label=None if i else "chance")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("test accuracy, %")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    trained = [name for name in MODELS if (options.results / name).is_dir()]
    figures = {}
    for name in trained or MODELS:
        folders = sorted((options.results / name).glob("[0-9]*")) or [options.results / name / "1"]
        figures[name] = [measure(options, folder) for folder in folders]
    write_file(options.results / "figures.json", to_json(figures) + "\n")
    write_file(options.results / "table.md", table(figures) + "\n")
    print(table(figures))
    draw(figures, options.results / "accuracy.png")


if __name__ == "__main__":
    entry_point(main)()
