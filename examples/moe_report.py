"""Writes the table and the figure of `bash examples/moe_arc.sh`.

    python examples/moe_report.py --results out/moe_arc
    python examples/moe_report.py --results out/moe_arc --plot docs/results/moe_training.png

Runs are in VARIANT/SEED. Losses are the lowest of a run's evaluations, in nats per character of the whole val split;
differences are taken seed by seed, with their standard error. Load balance is averaged over blocks, seeds and the last
tenth of the updates; on the val split, over the blocks in the use.json that tools/expert_use.py wrote into the run's
folder. The script writes table.md and, with matplotlib, a figure.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import replacing, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT
from gpt_arc.tables import markdown
from gpt_arc.training.log import read_metrics

TITLES = {
    "mixture": "mixture, 2 of 8 experts",
    "dense": "dense, equal cost",
    "without_losses": "mixture without its losses",
    "less_balance": "mixture, balance_loss .01",
    "balance_rate": "mixture balanced by biases",
    "top_1": "mixture, 1 of 8 experts",
    "top_1_without_losses": "1 of 8 without its losses",
}
DRAWN = ("mixture", "dense", "without_losses", "top_1_without_losses")
POINTS = 40  # of a curve, approximately
Run = list[dict[str, Any]]  # lines of metrics.jsonl


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    results: Path = Path("out/moe_arc")
    """Folder with the runs; table.md is written there."""
    plot: Path | None = None
    """File for the figure. None: training.png next to the table."""


def best_loss(run: Run) -> float:
    return min(line["val_loss"] for line in run if "val_loss" in line)


def late(run: Run, name: str) -> float:
    """Returns a metric's mean over the last tenth of the updates."""
    return statistics.fmean(line[name] for line in run if name in line and line["step"] > 0.9 * run[-1]["step"])


def mean_and_error(values: Sequence[float]) -> str:
    """Returns the mean, with its standard error if there are two or more values."""
    if len(values) < 2:
        return f"{statistics.fmean(values):+.4f}"
    return f"{statistics.fmean(values):+.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def val_cv(folder: Path) -> float | None:
    """Returns the blocks' mean CV of the loads on the val split; None without use.json."""
    path = folder / "use.json"
    if not path.exists():
        return None
    return statistics.fmean(block["cv"] for block in json.loads(path.read_text())["blocks"])


def read_runs(folder: Path) -> dict[str, dict[str, Run]]:
    """Returns the finished runs by variant and seed. Raises UserError if there are none."""
    runs_of: dict[str, dict[str, Run]] = {}
    for variant in TITLES:
        for path in sorted(folder.glob(f"{variant}/*/metrics.jsonl")):
            if run := read_metrics(path):
                runs_of.setdefault(variant, {})[path.parent.name] = run
    last = max((run[-1]["step"] for runs in runs_of.values() for run in runs.values()), default=0)
    runs_of = {
        variant: {s: run for s, run in runs.items() if run[-1]["step"] == last} for variant, runs in runs_of.items()
    }
    runs_of = {variant: runs for variant, runs in runs_of.items() if runs}
    if not runs_of:
        raise UserError(f"{folder} has no runs: run bash examples/moe_arc.sh first")
    return runs_of


def table(runs_of: dict[str, dict[str, Run]], folder: Path) -> str:
    """Returns the markdown table."""
    seeds = list(dict.fromkeys(seed for runs in runs_of.values() for seed in runs))
    names = [
        *(f"seed {seed}" for seed in seeds),
        "below dense",
        "CV",
        "largest load",
        "router entropy",
        "CV, val",
    ]
    rows = [["val loss", *names]]
    for variant, runs in runs_of.items():
        cells = [TITLES[variant], *(f"{best_loss(runs[seed]):.4f}" if seed in runs else "" for seed in seeds)]
        if variant == "dense":
            cells += [""] * 5
        else:
            dense = runs_of.get("dense", {})
            gains = [best_loss(dense[seed]) - best_loss(runs[seed]) for seed in runs if seed in dense]
            cells.append(mean_and_error(gains) if gains else "")
            figures = [
                [late(run, name) for run in runs.values()] for name in ("expert_cv", "expert_max", "router_entropy")
            ]
            cells += [f"{statistics.fmean(values):.3f}" for values in figures]
            on_val = [cv for seed in runs if (cv := val_cv(folder / variant / seed)) is not None]
            cells.append(f"{statistics.fmean(on_val):.3f}" if on_val else "")
        rows.append(cells)
    return markdown(rows)


def curve(run: Run, name: str) -> tuple[list[float], list[float]]:
    """Returns updates and values of a metric, averaged over groups of lines if there are many."""
    lines = [line for line in run if name in line]
    size = max(1, len(lines) // POINTS)
    groups = [lines[i : i + size] for i in range(0, len(lines), size)]
    steps, values = ([statistics.fmean(line[key] for line in group) for group in groups] for key in ("step", name))
    return steps, values


def draw(runs_of: dict[str, dict[str, Run]], path: Path) -> None:
    """Plots means over seeds with a band from the lowest to the highest."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the figure needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    losses = figure.add_subplot(1, 2, 1, xlabel="updates", ylabel="val loss, nats a character")
    balance = figure.add_subplot(1, 2, 2, xlabel="updates", ylabel="CV of the experts' load", yscale="log")
    drawn = {variant: runs_of[variant] for variant in DRAWN if variant in runs_of}
    for place, (variant, runs) in enumerate(drawn.items()):
        for axes, name in ((losses, "val_loss"), (balance, "expert_cv")):
            curves = [curve(run, name) for run in runs.values()]
            values = list(zip(*(seed_values for _, seed_values in curves)))  # update by update
            if values:
                steps, means = curves[0][0], [statistics.fmean(seeds) for seeds in values]
                axes.plot(steps, means, color=f"C{place}", label=TITLES[variant])
                lowest, highest = ([pick(seeds) for seeds in values] for pick in (min, max))
                axes.fill_between(steps, lowest, highest, color=f"C{place}", alpha=0.2, linewidth=0)
    lowest = min(best_loss(run) for runs in drawn.values() for run in runs.values())
    losses.set_ylim(lowest - 0.01, lowest + 0.3)
    balance.set_ylim(0.02, 3)  # eight experts allow at most the root of 7
    balance.axhline(0.1, color="grey", linewidth=0.8, linestyle=":")
    figure.legend(
        *losses.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize="small"
    )
    for axes in (losses, balance):
        axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80, pil_kwargs={"optimize": True})


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    runs_of = read_runs(options.results)
    shown = table(runs_of, options.results)
    write_file(options.results / "table.md", shown + "\n")
    print(shown)
    draw(runs_of, options.plot or options.results / "training.png")


if __name__ == "__main__":
    entry_point(main)()
