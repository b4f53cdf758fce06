"""Pictures of a sweep and of the laws that were fitted to it, as PNG and SVG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_arc.extras import import_extra
from gpt_arc.planning.fits import FinishedRun, Laws, best_of_rates, best_rate, budgets, by_rate, grouped, size_of

JOINT = "L(N, D), Chinchilla's form"


def draw_all(runs: Sequence[FinishedRun], laws: Laws, folder: Path) -> list[Path]:
    """Draws every picture that the sweep has data for. Returns the files."""
    results = best_of_rates(runs)
    drawings: dict[str, Callable[[Any], None]] = {"compute": lambda axes: draw_compute(axes, results, laws)}
    if laws.parabolas:
        drawings["isoflop"] = lambda axes: draw_parabolas(axes, results, laws)
    if JOINT in laws.fits:
        drawings["residuals"] = lambda axes: draw_residuals(axes, results, laws)
        drawings["predicted"] = lambda axes: draw_predicted(axes, results, laws)
    if any(len({r.n_layer for r in group}) > 2 for group in same_size(results)):
        drawings["shape"] = lambda axes: draw_shapes(axes, results)
    if by_rate(runs):
        drawings["rates"] = lambda axes: draw_rates(axes, runs)
    figures = import_extra("matplotlib.figure")
    written = []
    for name, draw in drawings.items():
        figure = figures.Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if axes.get_xscale() == "log":  # or the labels of less than a decade overlap
            axes.xaxis.set_minor_locator(import_extra("matplotlib.ticker").LogLocator(subs=(2, 5)))
        for ending in ("png", "svg"):
            written.append(folder / f"{name}.{ending}")
            figure.savefig(written[-1], dpi=110)
    return written


def draw_compute(axes: Any, results: Sequence[FinishedRun], laws: Laws) -> None:
    """Loss against compute: a line for each run, and the law of the frontier."""
    for result in results:
        tokens = np.array([tokens for tokens, _ in result.curve])
        axes.plot(tokens * result.flops / result.tokens, [loss for _, loss in result.curve], "C7-", linewidth=0.6)
    sizes = [size_of(r, laws.embeddings) for r in results]
    points = axes.scatter([r.flops for r in results], [r.val_loss for r in results], c=np.log10(sizes), s=14, zorder=3)
    axes.figure.colorbar(points, label="log10 parameters")
    flops = np.geomspace(min(r.flops for r in results), max(r.flops for r in results))
    for name, style in (("L(C)", "k--"), ("L(C) with a floor", "k:")):
        if name in laws.fits:
            axes.plot(flops, laws.fits[name].law.loss(x=flops), style, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="val loss, nats a token")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def draw_parabolas(axes: Any, results: Sequence[FinishedRun], laws: Laws) -> None:
    """Loss against size at equal compute, with the fitted parabolas and their lowest points."""
    for number, rows in enumerate(budgets(results)):
        sizes = np.array([size_of(r, laws.embeddings) for r in rows])
        flops = float(np.exp(np.mean(np.log([r.flops for r in rows]))))
        axes.plot(sizes, [r.val_loss for r in rows], f"C{number % 10}o", markersize=4, label=f"{flops:.2g} FLOPs")
        if flops in laws.parabolas:
            curve = laws.parabolas[flops]
            between = np.geomspace(sizes.min(), sizes.max())
            axes.plot(between, curve(between), f"C{number % 10}-")
            axes.plot(curve.best, curve(curve.best), f"C{number % 10}*", markersize=10)
    axes.set(xscale="log", xlabel="parameters", ylabel="val loss, nats a token")
    axes.legend(fontsize="small")


def draw_residuals(axes: Any, results: Sequence[FinishedRun], laws: Laws) -> None:
    """How far each run is from Chinchilla's form, in percent of its loss."""
    points = axes.scatter(
        [r.flops for r in results], 100 * laws.fits[JOINT].residuals, c=np.log10([r.tokens for r in results]), s=14
    )
    axes.figure.colorbar(points, label="log10 tokens")
    axes.axhline(0, color="k", linewidth=0.6)
    axes.set(xscale="log", xlabel="FLOPs", ylabel="loss above the law, %")


def draw_predicted(axes: Any, results: Sequence[FinishedRun], laws: Laws) -> None:
    """Losses by Chinchilla's form against those that runs came to."""
    sizes, tokens = [size_of(r, laws.embeddings) for r in results], [r.tokens for r in results]
    actual = np.array([r.val_loss for r in results])
    axes.plot(laws.fits[JOINT].law.loss(n=sizes, d=tokens), actual, "C0o", markersize=4)
    ends = [actual.min(), actual.max()]
    axes.plot(ends, ends, "k-", linewidth=0.6)
    axes.set(xlabel="val loss by the law", ylabel="val loss of the run")


def draw_shapes(axes: Any, results: Sequence[FinishedRun]) -> None:
    """Loss against width over depth of runs with about equal parameters and equal tokens; a line of the seeds' mean."""
    for number, group in enumerate(group for group in same_size(results) if len({r.n_layer for r in group}) > 2):
        label = f"{np.mean([r.parameters_without_embeddings for r in group]):.2g} parameters"
        shapes = grouped(group, lambda r: r.n_embd / r.n_layer)
        ratios, losses = zip(*((rows[0].n_embd / rows[0].n_layer, [r.val_loss for r in rows]) for rows in shapes))
        axes.plot(ratios, [np.mean(each) for each in losses], f"C{number}-", label=label)
        for ratio, each in zip(ratios, losses):
            axes.plot([ratio] * len(each), each, f"C{number}o")
    axes.set(xscale="log", xlabel="width / depth", ylabel="val loss, nats a token")
    axes.legend()


def draw_rates(axes: Any, runs: Sequence[FinishedRun]) -> None:
    """Loss against learning rate, with a dotted line at the best."""
    for number, (run, losses) in enumerate(by_rate(runs)):
        label, color = f"{run.n_layer}x{run.n_embd}, {run.tokens:,} tokens", f"C{number % 10}"
        axes.plot(losses.keys(), losses.values(), f"{color}o-", markersize=4, label=label)
        if best := best_rate([*losses], [*losses.values()]):
            axes.axvline(best, color=color, linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="learning rate", ylabel="val loss, nats a token")
    axes.legend(fontsize="small")


def same_size(results: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """Groups runs of equal tokens whose parameters without embeddings are within a tenth of the smallest's."""
    groups: list[list[FinishedRun]] = []
    for rows in grouped(results, lambda r: r.tokens):
        rows = sorted(rows, key=lambda r: r.parameters_without_embeddings)
        start = 0
        for i, row in enumerate(rows):
            if row.parameters_without_embeddings > 1.1 * rows[start].parameters_without_embeddings:
                groups.append(rows[start:i])
                start = i
        groups.append(rows[start:])
    return groups
