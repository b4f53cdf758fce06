"""The curves of a report: which metrics share a chart, their points, and pictures of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_arc.extras import import_extra
from gpt_arc.reports.attention import draw_attention_maps
from gpt_arc.reports.content import RunContent
from gpt_arc.training.log import METRICS

AXES = ("step", "tokens", "seconds")  # what a curve may be drawn against
TOGETHER = {  # chart -> its title and metrics; every other metric gets a separate chart
    "loss": ("loss, nats a token", ("train_loss", "val_loss")),
    "learning_rate": ("learning rate", ("learning_rate",)),
    "grad_norm": ("gradient norm", ("grad_norm",)),
    "tokens_per_second": ("tokens a second", ("tokens_per_second",)),
    "mfu": ("model FLOPs utilization", ("mfu",)),
    "language_loss": ("loss of the texts, nats a token", ("language_loss", "val_language_loss", "pretraining_loss")),
    "accuracy": ("accuracy", ("accuracy", "val_accuracy")),
    "reward": ("reward", ("score", "reward", "monitored")),
    "kl": ("KL to the reference, nats", ("kl_k1", "kl_k3")),
    "experts": ("experts' load over the mean: deviation and largest", ("expert_cv", "expert_max")),
    "router_entropy": ("routers' entropy, nats", ("router_entropy",)),
    "clipped": ("share that is clipped", ("clip_fraction", "value_clip_fraction")),
}
NOT_DRAWN = {*AXES, "epoch", "episodes"}
MOST_POINTS = 2000  # of a curve
SMOOTHED = 0.02  # of a curve's points, over which a smoothed one averages


class RunCurve(NamedTuple):
    """One metric of one run; `axes` has the coordinates by name, where the run has recorded them."""

    run: int
    metric: str
    values: list[float]
    axes: dict[str, list[float]]

    @property
    def is_noisy(self) -> bool:
        """Whether smoothing makes it clearer: the mean over a split is no sample."""
        return self.metric not in ("learning_rate", "kl_coef", "epoch") and not self.metric.startswith("val_")


class Chart(NamedTuple):
    name: str
    title: str
    curves: list[RunCurve]


def charts_of(runs: Sequence[RunContent]) -> list[Chart]:
    """Returns the charts that the runs have metrics for."""
    recorded = {name: None for run in runs for line in run.summary.metrics for name in line}
    grouped = {name for _, names in TOGETHER.values() for name in names}
    alone = {
        name: (f"{name}: {METRICS[name]}" if name in METRICS else name, (name,))
        for name in recorded
        if name not in grouped | NOT_DRAWN
    }
    charts = []
    for chart, (title, names) in (TOGETHER | alone).items():
        curves = [
            curve_of(number, run.summary.metrics, name)
            for name in names
            for number, run in enumerate(runs)
            if any(name in line for line in run.summary.metrics)
        ]
        if curves:
            charts.append(Chart(chart, title, curves))
    return charts


def curve_of(run: int, lines: Sequence[dict[str, Any]], metric: str) -> RunCurve:
    """Returns a metric's curve. A line without `tokens` or `seconds` has those of the line before it."""
    latest: dict[str, float] = {}
    points = []
    for line in lines:
        latest |= {axis: line[axis] for axis in AXES if axis in line}
        if metric in line:
            points.append((line[metric], dict(latest)))
    points = thinned(points)
    axes = {axis: [place[axis] for _, place in points if axis in place] for axis in AXES}
    whole = {axis: places for axis, places in axes.items() if len(places) == len(points)}
    return RunCurve(run, metric, [value for value, _ in points], whole)


def thinned(points: list[tuple[float, Any]], most: int = MOST_POINTS) -> list[tuple[float, Any]]:
    """Returns at most `most` points: the first and last, and the lowest and highest value of each stretch between."""
    if len(points) <= most:
        return points
    stretches = (most - 2) // 2
    bounds = [1 + i * (len(points) - 2) // stretches for i in range(stretches + 1)]
    kept = {0, len(points) - 1}
    for start, stop in zip(bounds, bounds[1:]):
        kept |= {choose(range(start, stop), key=lambda i: points[i][0]) for choose in (min, max)}
    return [points[i] for i in sorted(kept)]


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """Returns the exponential moving average over a share of the points, without a bias towards 0 at its beginning."""
    weight = 1 - 1 / max(1.0, share * len(values))
    averages, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        averages.append(total / norm)
    return averages


def draw_all(runs: Sequence[RunContent], charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Draws each chart, confusion matrix and attention map as a PNG.

    Returns the files. Raises UserError without matplotlib.
    """
    figures = import_extra("matplotlib.figure")
    names = [run.name.replace("$", r"\$") for run in runs]  # which would begin a formula
    written = []

    def save(figure: Any, name: str, number: int | None = None) -> None:
        """`number` of the run, for what is drawn of each."""
        written.append(folder / (f"{name}.png" if number is None or len(runs) == 1 else f"{name}_{number + 1}.png"))
        figure.savefig(written[-1], dpi=110)

    for number, chart in enumerate(charts):
        figure = figures.Figure(figsize=(6, 4), layout="constrained")
        draw(figure.subplots(), chart, names)
        save(figure, chart.name if chart.name in METRICS or chart.name in TOGETHER else f"metric_{number}")
    for number, run in enumerate(runs):
        if matrix := confusion_matrix(run):
            figure = figures.Figure(figsize=(5, 4.5), layout="constrained")
            draw_confusion(figure.subplots(), *matrix)
            save(figure, "confusion_matrix", number)
        if run.attention:
            layers, heads = run.attention.maps.shape[:2]
            figure = figures.Figure(figsize=(1.5 + 0.7 * heads, 1.2 + 0.7 * layers), layout="constrained")
            draw_attention_maps(figure.subplots(), run.attention.maps)
            save(figure, "attention", number)
    return written


def draw(axes: Any, chart: Chart, names: Sequence[str]) -> None:
    """Draws a chart by steps: noisy curves pale, with their smoothed ones over them."""
    metrics = list(dict.fromkeys(curve.metric for curve in chart.curves))
    for curve in chart.curves:
        place = metrics.index(curve.metric)
        color, dashes = (f"C{curve.run % 10}", ("-", "--", ":")[place % 3]) if len(names) > 1 else (f"C{place}", "-")
        label = f"{names[curve.run]} {curve.metric}" if len(names) > 1 else curve.metric
        steps, values = curve.axes["step"], curve.values
        marker = "o" if len(values) == 1 else None
        if curve.is_noisy and len(values) > 2:
            axes.plot(steps, values, color=color, linestyle=dashes, linewidth=0.7, alpha=0.3)
            values = smoothed(values, SMOOTHED)
        axes.plot(steps, values, color=color, linestyle=dashes, marker=marker, label=label)
    axes.set(xlabel="step", title=chart.title)
    if chart.name == "loss" and all(value > 0 for curve in chart.curves for value in curve.values):
        axes.set(xscale="symlog" if any(0 in curve.axes["step"] for curve in chart.curves) else "log", yscale="log")
        if axes.get_xscale() == "log":
            axes.xaxis.set_major_locator(import_extra("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter("")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:.3g}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")


def confusion_matrix(run: RunContent) -> tuple[list[str], list[list[int]]] | None:
    """Returns the classes and the counts, a row for each actual class; None if report.json has none that is whole."""
    classes, matrix = run.figures.get("classes"), run.figures.get("confusion_matrix")
    if not isinstance(classes, list) or not isinstance(matrix, list) or len(matrix) != len(classes):
        return None
    for row in matrix:
        if not isinstance(row, list) or len(row) != len(classes) or not all(type(n) is int and n >= 0 for n in row):
            return None
    return [str(name) for name in classes], matrix


LABELLED = 20  # classes whose counts fit a picture


def draw_confusion(axes: Any, classes: list[str], matrix: list[list[int]]) -> None:
    axes.imshow(matrix, cmap="Blues")
    most = max(max(row) for row in matrix)
    for i, row in enumerate(matrix):
        for j, count in enumerate(row if len(row) <= LABELLED else []):
            axes.text(j, i, f"{count:,}", ha="center", va="center", color="white" if 2 * count > most else "black")
    labels = [name.replace("$", r"\$") for name in classes]
    axes.set(xlabel="predicted", ylabel="actual", title="confusion matrix of the test split")
    axes.set_xticks(range(len(classes)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), labels)
