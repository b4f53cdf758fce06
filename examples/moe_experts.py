"""Losses by number of experts, 1 to 128, at equal active parameters; effects of the balance loss and of noise.

    python examples/moe_experts.py
    python examples/moe_experts.py --experts 1 4 --compared=4 --seeds=1 --max_iters=20 --output=out/try    a quick look

All models have two blocks of width 32. A character uses two experts of 64 hidden units each, or the only one of 128, so
the active parameters are equal except for the routers'. The models read the same characters of Python's manual several
times over, so experts that remember the text show in the gap between the losses of training text and held-out text.
Both are measured in evaluation mode, without dropout and noise.

At one number of experts, further runs change one setting each: no balance loss, dropout inside the experts, noise on
the routers' inputs. Differences from the unchanged run are taken seed by seed; ± is a standard error over seeds. The
script writes OUTPUT/figures.json after each run, continues from it when called again, also with further seeds or
numbers of experts, and draws OUTPUT/losses.png.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Annotated

import torch
from annotated_types import Ge
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm import tqdm

from gpt_arc.errors import entry_point
from gpt_arc.evaluation.experiments import run_missing
from gpt_arc.evaluation.statistics import mean_and_error, standard_error
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positive
from gpt_arc.tables import table
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from gpt_arc.training.routers import RouterMeter
from gpt_arc.training.schedule import learning_rate_at
from model import GPT, GPTConfig

CONTEXT, BATCH = 64, 16
CHANGES = {"balance_loss": 0.0, "expert_dropout": 0.2, "router_jitter": 0.1}  # each in a run of its own
METRICS = "train loss", "val loss", "gap", "load CV"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    experts: tuple[Count, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Numbers of experts per block."""
    compared: Count = 8
    """Number of experts at which settings are changed."""
    seeds: Count = 3
    """Runs of each model."""
    max_iters: Count = 1000
    """Updates of each run, of 1,024 characters."""
    learning_rate: Positive = 4e-3
    """Peak; rises over the first twentieth of the updates, then falls to zero along a cosine."""
    characters: Annotated[int, Ge(5000)] = 200_000
    """Length of the text; every fifth thousand is held out."""
    output: Path = Path("out/moe_experts")
    """Folder for the results."""

    def __post_init__(self):
        if self.compared not in self.experts:
            raise ValueError(f"compared = {self.compared} must be one of experts = {list(self.experts)}")


def read_text(characters: int) -> tuple[Tensor, Tensor, int]:
    """Returns training and held-out text as ids of characters, and the number of different characters."""
    text = "".join(topics[name] for name in sorted(topics))[:characters]
    alphabet = sorted(set(text))
    pieces = torch.tensor([alphabet.index(character) for character in text]).split(1000)
    return torch.cat([p for i, p in enumerate(pieces) if i % 5 < 4]), torch.cat(pieces[4::5]), len(alphabet)


def windows(tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns tokens and targets (B, CONTEXT) from the starts (B,)."""
    rows = tokens[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def mean_loss(model: GPT, tokens: Tensor) -> float:
    """Returns nats per character of the whole text, in windows that don't overlap."""
    model.eval()
    batches = torch.arange(0, len(tokens) - CONTEXT, CONTEXT).split(64)
    losses = [model(*windows(tokens, starts)) for starts in batches]
    return sum(loss.total.item() for loss in losses) / sum(loss.count.item() for loss in losses)


def train(options: Options, experts: int, change: str, seed: int) -> dict:
    """Trains one model and returns its results."""
    training, held_out, vocabulary = read_text(options.characters)
    torch.manual_seed(seed)
    used = min(2, experts)
    architecture = GPTConfig(
        block_size=CONTEXT, vocab_size=vocabulary, n_layer=2, n_head=2, n_embd=32, mlp_size=128 // used,
        n_experts=experts, experts_per_token=used, positions="rotary", norm="rmsnorm", activation="relu_squared",
        bias=False,
    )  # fmt: skip
    if change:
        architecture = replace(architecture, **{change: CHANGES[change]})
    model = GPT(architecture)
    steps = options.max_iters
    config = TrainingConfig(
        max_iters=steps, warmup_iters=steps // 20, learning_rate=options.learning_rate, min_lr=0.0, beta2=0.99
    )
    updater, meter = Updater(model, config, torch.device("cpu"), "float32"), RouterMeter(model)
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps), desc=f"{experts} experts {change} seed {seed}", unit="step", disable=None):
        starts = torch.randint(len(training) - CONTEXT, (BATCH,), generator=generator)
        loss = model(*windows(training, starts))
        meter.add()
        updater.backward(loss.total / loss.count + sum(loss.auxiliary.values()))
        updater.update(learning_rate_at(step, config), loss.total.detach())
        meter.step(made=True)
    result: dict = {"load CV": meter.take()["expert_cv"]}
    result |= {"parameters": model.num_parameters(), "active": model.num_parameters(active=True)}
    result |= {"train loss": mean_loss(model, training), "val loss": mean_loss(model, held_out)}
    return result | {"gap": result["val loss"] - result["train loss"]}


def show(results: list[dict], compared: int) -> None:
    """Prints both tables."""
    rows, changes = [], []
    for experts in sorted({result["experts"] for result in results}):
        runs = [result for result in results if result["experts"] == experts and not result["change"]]
        sizes = [runs[0]["parameters"], runs[0]["active"]]
        rows.append([experts, *sizes, len(runs), *(mean_and_error([run[name] for run in runs]) for name in METRICS)])
    print(table([["experts", "parameters", "active", "seeds", *METRICS], *rows]))
    at_compared = [result for result in results if result["experts"] == compared]
    plain = {run["seed"]: run for run in at_compared if not run["change"]}
    for change, value in CHANGES.items():
        pairs = [(run, plain[run["seed"]]) for run in at_compared if run["change"] == change]
        differences = [mean_and_error([run[name] - base[name] for run, base in pairs]) for name in METRICS]
        changes.append([f"{change} = {value:g}", len(pairs), *differences])
    print(f"\ndifferences from the unchanged run of {compared} experts, seed by seed")
    print(table([["change", "seeds", *METRICS], *changes]))


def plot(results: list[dict], path: Path) -> None:
    """Plots means of the losses over seeds by number of experts, with bars of a standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    numbers = sorted({result["experts"] for result in results})
    for name in METRICS[:2]:
        losses = [[r[name] for r in results if r["experts"] == n and not r["change"]] for n in numbers]
        errors = [standard_error(each) for each in losses]
        axes.errorbar(numbers, [fmean(each) for each in losses], errors, fmt="o-", markersize=4, capsize=2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set(xlabel="experts, of which a character uses two", ylabel="nats a character")
    axes.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    settings = {name: getattr(options, name) for name in ("max_iters", "learning_rate", "characters")}
    models = [{"experts": experts, "change": ""} for experts in options.experts]
    models += [{"experts": options.compared, "change": change} for change in CHANGES]
    cases = [model | {"seed": seed} for seed in range(1, options.seeds + 1) for model in models]
    results = run_missing(options.output / "figures.json", settings, cases, partial(train, options))
    show(results, options.compared)
    plot(results, options.output / "losses.png")


if __name__ == "__main__":
    entry_point(main)()
