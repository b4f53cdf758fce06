"""Writes the table and the plot of `bash examples/instructgpt_arc.sh`.

    python examples/instructgpt_report.py --results out/instructgpt

A seed covers everything after pre-training. Differences from supervised fine-tuning are taken seed by seed, with
Student's 95% interval. The script writes table.md and, with matplotlib, hacking.png: the learned reward and the true
utility against the square root of the policy's KL divergence, as in Gao et al. (arXiv:2210.10760).
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
from gpt_arc.tables import counted
from instruction_judge import bayes_accuracy

ROWS = {
    "sft": "supervised fine-tuning",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "dpo": "DPO",
}
SMOOTHED = 2  # iterations averaged in each point of the plot


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    results: Path = Path("out/instructgpt")
    """Folder with the runs; table.md and hacking.png are written there."""


def interval(values: Sequence[float]) -> str:
    """Returns the mean with Student's 95% interval."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.3f} ± {half:.3f}"


def text_loss(path: Path) -> float:
    """Returns nats per character of the held-out pre-training text."""
    return math.log(json.loads(path.read_text())["models"][0]["texts"]["instructgpt_text"]["perplexity"])


def rewards(folders: Sequence[Path]) -> str:
    """Returns a table of the reward models against the best possible predictor."""
    rows = ["| rankings | seed | pairs held out | accuracy, % | best possible, % | difference |", "|---" * 6 + "|"]
    for name, rankings in (("reward", "5,000"), ("reward_10k", "10,000, twice")):
        differences = []
        for folder in folders:
            accuracy = json.loads((folder / name / "report.json").read_text())["accuracy"]
            lines = (folder / "held_out.jsonl").read_text().splitlines()
            best, pairs = bayes_accuracy([json.loads(line) for line in lines])
            differences.append(100 * (accuracy - best))
            cells = [rankings, folder.name, f"{pairs:,}", f"{100 * accuracy:.2f}", f"{100 * best:.2f}"]
            rows.append("| " + " | ".join([*cells, f"{differences[-1]:+.2f}"]) + " |")
        rows.append(f"| {rankings} | mean | | | | {interval(differences)} |")
    return "\n".join(rows)


def policies(folders: Sequence[Path]) -> str:
    """Returns a table of utility and loss for each kind of policy."""
    figures = {name: [json.loads((folder / f"{name}.utility.json").read_text()) for folder in folders] for name in ROWS}
    losses = {name: [text_loss(folder / f"{name}.text.json") for folder in folders] for name in ROWS}
    before = text_loss(folders[0].parent / "base.text.json")
    rows = ["| model | true utility (0-10) | gain over SFT | right, % | loss on prose, nats | increase over SFT |"]
    rows += ["|---|---|---|---|---|---|", f"| pre-trained | | | | {before:.3f} | |"]
    for name, title in ROWS.items():
        utilities = [figure["utility"] for figure in figures[name]]
        gains = [a - b["utility"] for a, b in zip(utilities, figures["sft"])]
        increases = [a - b for a, b in zip(losses[name], losses["sft"])]
        right = 100 * statistics.fmean(figure["right"] for figure in figures[name])
        baseline = name == "sft"
        cells = [title, f"{statistics.fmean(utilities):.3f}", "" if baseline else interval(gains), f"{right:.1f}"]
        cells += [f"{statistics.fmean(losses[name]):.3f}", "" if baseline else interval(increases)]
        rows.append("| " + " | ".join(cells) + " |")
    prompts = figures["sft"][0]["prompts"]
    return "\n".join([*rows, "", f"{counted(prompts, 'held-out prompt')} each, {counted(len(folders), 'seed')}"])


def curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the metrics.jsonl lines of the runs on the flawed reward, by kl_coef."""
    runs = {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*/metrics.jsonl")
        if path.parent.name != "reward"
    }
    return dict(sorted(runs.items(), key=lambda item: float(item[0])))


def mean_of(lines: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(line[name] for line in lines)


def hacking(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Returns a table of the flawed (proxy) reward and the true utility during training."""
    rows = ["| kl_coef | proxy, first to last | true utility, first, highest and last | KL, nats | letters |"]
    rows.append("|---|---|---|---|---|")
    for coefficient, lines in runs.items():
        first, last = lines[:1], lines[-SMOOTHED:]
        highest = max(mean_of(lines[i : i + SMOOTHED], "monitored") for i in range(len(lines) - SMOOTHED + 1))
        true = f"{mean_of(first, 'monitored'):.2f}, {highest:.2f}, {mean_of(last, 'monitored'):.2f}"
        proxy = f"{mean_of(first, 'score'):+.2f} to {mean_of(last, 'score'):+.2f}"
        cells = [
            coefficient,
            proxy,
            true,
            f"{mean_of(last, 'kl_k1'):.1f}",
            f"{mean_of(last, 'response_tokens') - 1:.1f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([*rows, "", f"last: mean of the last {SMOOTHED} iterations"])


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plots both rewards against the root of the KL divergence."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = {"score": "learned reward (flawed)", "monitored": "true utility"}
    for place, (name, title) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, 2, place, xlabel="√KL, nats", ylabel=title)
        for coefficient, lines in runs.items():
            groups = [lines[i : i + SMOOTHED] for i in range(0, len(lines) - SMOOTHED + 1, SMOOTHED)]
            roots = [math.sqrt(max(mean_of(group, "kl_k1"), 0)) for group in groups]
            axes.plot(roots, [mean_of(group, name) for group in groups], marker=".", label=f"kl_coef {coefficient}")
        axes.grid(alpha=0.3)
        if place == 2:
            axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    folders = sorted(path.parent for path in options.results.glob("*/dpo.text.json"))
    if not folders:
        raise UserError(f"{options.results} has no runs: run bash examples/instructgpt_arc.sh first")
    runs = curves(options.results / "flawed")
    table = "\n\n".join([rewards(folders), policies(folders), *([hacking(runs)] if runs else [])])
    write_file(options.results / "table.md", table + "\n")
    print(table)
    if runs:
        draw(runs, options.results / "hacking.png")


if __name__ == "__main__":
    entry_point(main)()
