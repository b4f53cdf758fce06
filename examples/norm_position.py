"""Pre-norm against post-norm: how many runs fail, by depth and learning rate.

    python examples/norm_position.py
    python examples/norm_position.py --depths 2 4 --seeds=1 --max_iters=20 --output=out/try      a quick look

Narrow GPTs read characters of Python's manual with AdamW at a constant learning rate, without a warmup. They differ in
depth, in the learning rate, and in where the norm stands: pre-norm is x + f(norm(x)) with a final norm, post-norm is
norm(x + f(x)). A run fails if it is not finite, or if its mean loss over the last ten updates is above the entropy of
the characters' frequencies: it then knows nothing that counting characters wouldn't tell.

Xiong et al. (arXiv:2002.04745) find that post-norm needs a warmup and pre-norm doesn't. The script writes
OUTPUT/figures.json after each run, continues from it when called again, and draws OUTPUT/failures.png.
"""

import sys
from collections import Counter
from functools import partial
from itertools import product
from math import log
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from gpt_arc.errors import entry_point
from gpt_arc.evaluation.experiments import run_missing
from gpt_arc.evaluation.statistics import mean_and_error
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positive
from gpt_arc.tables import counted, table
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from model import GPT, GPTConfig

CONTEXT, BATCH, HEAD = 32, 8, 16
NORMS: tuple[Literal["pre", "post"], ...] = "pre", "post"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    depths: tuple[Count, ...] = (4, 12, 24, 48)
    """Numbers of blocks."""
    learning_rates: tuple[Positive, ...] = (1e-3, 3e-3, 1e-2)
    """Constant learning rates."""
    seeds: Count = 3
    """Runs of each model at each rate."""
    max_iters: Count = 100
    """Updates of each run, of 256 characters."""
    width: Count = 32
    """Width of each model, in heads of 16."""
    output: Path = Path("out/norm_position")
    """Folder for the results."""

    def __post_init__(self):
        if self.width % HEAD:
            raise ValueError(f"width = {self.width} must be a multiple of {HEAD}, the width of a head")


def read_text() -> bytes:
    return "".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")


def entropy(text: bytes) -> float:
    """Returns the nats per character of the best prediction that ignores the context."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * log(share) for share in shares)


def train(options: Options, norm_position: Literal["pre", "post"], depth: int, learning_rate: float, seed: int) -> dict:
    """Trains one model. Returns its loss, None if it isn't finite, and whether it failed."""
    torch.manual_seed(seed)
    text = read_text()
    tokens, width = torch.tensor(list(text)), options.width
    model = GPT(
        GPTConfig(
            block_size=CONTEXT, vocab_size=128, n_layer=depth, n_head=width // HEAD, n_embd=width,
            norm_position=norm_position,
        )
    )  # fmt: skip
    config = TrainingConfig(max_iters=options.max_iters, learning_rate=learning_rate, schedule="constant")
    updater, losses = Updater(model, config, torch.device("cpu"), "float32"), []
    name = f"{norm_position}-norm, {depth} blocks, rate {learning_rate:g}, seed {seed}"
    for _ in tqdm(range(options.max_iters), desc=name, unit="step", disable=None):
        rows = tokens[torch.randint(len(tokens) - CONTEXT, (BATCH, 1)) + torch.arange(CONTEXT + 1)]
        loss = model(rows[:, :-1], rows[:, 1:])
        updater.backward(loss.total / loss.count)
        finite, _, (total,) = updater.update(learning_rate, loss.total.detach())
        losses.append(total / loss.count.item())
        if not finite:
            return {"loss": None, "failed": True}
    mean = fmean(losses[-10:])
    return {"loss": mean, "failed": mean > entropy(text)}


def runs_of(results: list[dict], norm: str, depth: int, learning_rate: float) -> list[dict]:
    case = {"norm_position": norm, "depth": depth, "learning_rate": learning_rate}
    return [result for result in results if case.items() <= result.items()]


def rows(results: list[dict], options: Options) -> list[list]:
    """Returns the table: runs that failed, and the losses of the others."""
    header = ["blocks", "norm", *(f"rate {rate:g}" for rate in options.learning_rates)]
    body = []
    for depth, norm in product(options.depths, NORMS):
        cells = []
        for rate in options.learning_rates:
            runs = runs_of(results, norm, depth, rate)
            losses = [run["loss"] for run in runs if not run["failed"]]
            cells.append(
                f"{len(runs) - len(losses)} of {len(runs)}" + (f", {mean_and_error(losses)}" if losses else "")
            )
        body.append([depth, f"{norm}-norm", *cells])
    return [header, *body]


def plot(results: list[dict], options: Options, path: Path) -> None:
    """Plots the share of runs that failed by learning rate, a panel for each norm and a line for each depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    panels = figure.subplots(1, len(NORMS), sharey=True)
    for axes, norm in zip(panels, NORMS):
        for depth in options.depths:
            shares = [
                fmean(run["failed"] for run in runs_of(results, norm, depth, rate)) for rate in options.learning_rates
            ]
            axes.plot(options.learning_rates, shares, "o-", markersize=4, label=counted(depth, "block"))
        axes.set(xscale="log", title=f"{norm}-norm", xlabel="learning rate", ylim=(-0.05, 1.05))
    panels[0].set_ylabel("share of runs that fail")
    panels[0].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    torch.set_num_threads(1)  # a second gains little with models this small, and costs much on busy cores
    cases = [
        {"norm_position": norm, "depth": depth, "learning_rate": rate, "seed": seed}
        for seed in range(1, options.seeds + 1)
        for depth, norm, rate in product(options.depths, NORMS, options.learning_rates)
    ]
    settings = {"max_iters": options.max_iters, "width": options.width}
    results = run_missing(options.output / "figures.json", settings, cases, partial(train, options))
    print("runs that fail, and the mean loss of the others in nats a character")
    print(table(rows(results, options)))
    plot(results, options, options.output / "failures.png")


if __name__ == "__main__":
    entry_point(main)()
