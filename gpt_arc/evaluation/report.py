"""The results of an evaluation as tables and as a plot, and the hash that identifies a model's weights."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt_arc.evaluation.measure import Result, TaskItems
from gpt_arc.extras import import_extra
from gpt_arc.files import write_file
from gpt_arc.tables import counted, table

SHARES = ("accuracy", "exact match")  # the metrics that are shares of the items


def weight_hash(directory: Path) -> str:
    """Returns the SHA-256 of a model directory's weights."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def display(value: float | None, metric: str) -> float | None:
    """Returns a figure as it is shown: in per cent, except a perplexity."""
    return value if value is None or metric == "perplexity" else value * 100


def percent(value: float | None) -> str | None:
    """Returns a share in per cent, as text."""
    return None if value is None else f"{100 * value:.4g}%"


def cells(metric: str, *values: float | None) -> list[Any]:
    """Returns figures as the cells of a table. BLEU and ROUGE are out of 100, not per cent."""
    return [percent(value) if metric in SHARES else display(value, metric) for value in values]


def result_tables(tasks: Sequence[TaskItems], results: Sequence[Result]) -> Iterator[str]:
    """Yields the table of figures, and a second one of clean and dirty items if there is training text."""
    published = {task_items.task.name: task_items.task.published for task_items in tasks}
    rows: list[list[Any]] = [["task", "shots", "metric", "value", "±", "items", "chance", "p", "published"]]
    for r in results:
        unit = "%" * (r.metric in SHARES)
        known = ", ".join(f"{name} {value:g}{unit}" for name, value in published[r.task].get(r.metric, {}).items())
        figures = cells(r.metric, r.value, r.standard_error)
        rows.append([r.task, r.shots, r.metric, *figures, r.items, percent(r.chance), r.p_value, known])
    filled = [column for column in zip(*rows) if any(value not in (None, "") for value in column[1:])]
    shown = [table([*zip(*filled)]), "±: standard error"]
    shown += ["chance: the accuracy of guessing"] * any(r.chance is not None for r in results)
    shown += [
        f"p: probability of a difference from {counted(results[0].shots, 'shot')} as large as this one if there were "
        "none (McNemar's exact test)"
    ] * any(r.p_value is not None for r in results)
    yield "\n".join(shown)
    rows = [["task", "shots", "metric", "all", "clean", "±", "items", "dirty", "±", "items", "words compared"]]
    for r in results:
        if r.overlap is None:
            continue
        parts: list[Any] = cells(r.metric, r.value)
        for figures in (r.overlap["clean"], r.overlap["dirty"]):
            parts += [*cells(r.metric, figures["value"], figures["standard_error"]), figures["items"]]
        rows.append([r.task, r.shots, r.metric, *parts, r.overlap["words"]])
    if len(rows) > 1:
        yield table(rows)


def plot_checkpoints(report: dict[str, Any], path: Path) -> None:
    """Plots each task's figures and each text's perplexity over training, as in GPT-1's paper (figure 2).

    Figures of tasks have error bars of one standard error. Perplexities have a logarithmic panel to themselves.
    """
    curves: dict[str, dict[str, list[tuple[int, float | None, float | None]]]] = {"per cent": {}, "perplexity": {}}
    for model in report["models"]:
        update = int(Path(model["model"]).name.removeprefix("step-"))
        points = [
            (f"{r['task']}, {counted(r['shots'], 'shot')}, {r['metric']}", r["metric"], r["value"], r["standard_error"])
            for r in model["tasks"]
        ]
        points += [(name, "perplexity", figures["perplexity"], 0.0) for name, figures in model["texts"].items()]
        for name, metric, value, error in points:
            axis = curves["perplexity" if metric == "perplexity" else "per cent"]
            axis.setdefault(name, []).append((update, display(value, metric), display(error, metric)))
    kinds = [kind for kind in curves if curves[kind]]
    figure = import_extra("matplotlib.figure").Figure(figsize=(7 * len(kinds), 5), layout="constrained")
    for panel, kind in enumerate(kinds, start=1):
        axes = figure.add_subplot(1, len(kinds), panel, xlabel="updates", ylabel=kind)
        if kind == "perplexity":
            axes.set_yscale("log")
        for name, points in curves[kind].items():
            updates, values, errors = zip(*points)
            axes.errorbar(updates, values, yerr=errors, marker="o", capsize=3, label=name)
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_file(path, image.getvalue())
