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


def measure(options: Options, name: str) -> dict:
    """Returns the figures of a model. Raises UserError if it hasn't been trained."""
    folder = options.results / name
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "val_loss" in line]
    if not lines:
        raise UserError(f"{folder} has no results: run bash examples/relatives_arc.sh first")
    model, tokenizer = load_text_model(folder, causal=False)
    size, causal = model.config.block_size, model.config.attention == "causal"
    split = open_dataset(options.dataset, tokenizer, "dataset").split("val", 1, model.config.vocab_size, False)
    windows = torch.tensor(split.read(0, len(split) // size * size)).view(-1, size)
    loss, accuracy = hidden_tokens(model.eval(), windows, mask_token(tokenizer))
    paths = {task: sorted((options.results / task / name).glob("*/report.json")) for task in TASKS}
    return {
        "parameters": model.num_parameters(),
        "tokens": lines[-1]["tokens"],
        "scored": 1.0 if causal else scored_tokens(options.mask_rate, size) / size,
        "val loss": lines[-1]["val_loss"],
        "hidden loss": loss,
        "hidden accuracy": accuracy,
        "tasks": {task: [read_json(path)["test"]["accuracy"] for path in paths[task]] for task in TASKS if paths[task]},
    }


def table(figures: dict[str, dict]) -> str:
    """Returns the markdown table."""
    rows = {
        "parameters": [f"{figure['parameters']:,}" for figure in figures.values()],
        "tokens read in pre-training": [f"{figure['tokens']:,}" for figure in figures.values()],
        "of these scored, %": [f"{100 * figure['scored']:.1f}" for figure in figures.values()],
        "val loss, nats a scored token": [f"{figure['val loss']:.3f}" for figure in figures.values()],
        "the same hidden tokens: loss": [f"{figure['hidden loss']:.3f}" for figure in figures.values()],
        "right, %": [f"{100 * figure['hidden accuracy']:.1f}" for figure in figures.values()],
    }
    by_task = {
        task: [[100 * value for value in figure["tasks"].get(task, [])] for figure in figures.values()]
        for task in TASKS
    }
    by_task = {task: values for task, values in by_task.items() if all(values)}
    for task, values in by_task.items():
        rows[f"`{task}`, test accuracy, % (by chance {100 / TASKS[task]:.0f})"] = [mean_and_error(v, 1) for v in values]
    if len(by_task) > 1:  # the mean of each seed, then over seeds
        means = [[*map(fmean, zip(*seeds))] for seeds in zip(*by_task.values())]
        rows["mean of these tasks"] = [mean_and_error(each, 1) for each in means]
    return markdown([["figure", *map(MODELS.__getitem__, figures)], *([name, *cells] for name, cells in rows.items())])


def draw(figures: dict[str, dict], path: Path) -> None:
    """Draws the accuracies of the tasks, with bars of a standard error, and what chance would give."""
    figure = import_extra("matplotlib.figure").Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    tasks = [task for task in TASKS if all(task in each["tasks"] for each in figures.values())]
    width = 0.8 / len(figures)
    for number, (name, each) in enumerate(figures.items()):
        values = [each["tasks"][task] for task in tasks]
        places = [i + width * (number + 0.5) - 0.4 for i in range(len(tasks))]
        axes.bar(places, [fmean(v) for v in values], 0.95 * width, yerr=[standard_error(v) for v in values], capsize=3,
                 label=MODELS[name])  # fmt: skip
    for i, task in enumerate(tasks):
        axes.hlines(1 / TASKS[task], i - 0.4, i + 0.4, color="black", linestyle=":", label=None if i else "chance")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("test accuracy")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    trained = [name for name in MODELS if (options.results / name).is_dir()]
    figures = {name: measure(options, name) for name in trained or MODELS}
    write_file(options.results / "figures.json", to_json(figures) + "\n")
    write_file(options.results / "table.md", table(figures) + "\n")
    print(table(figures))
    draw(figures, options.results / "accuracy.png")


if __name__ == "__main__":
    entry_point(main)()
