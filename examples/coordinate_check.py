"""The coordinate check of muP (arXiv:2203.03466): how far a few steps move a model's outputs, by its width.

    python examples/coordinate_check.py
    python examples/coordinate_check.py --widths 64 256 --rate=0.01 --output=out/check

With base_width a step moves hidden states and logits by as much at any width, so one learning rate suits all; without,
the logits move farther in wider models. Writes coordinate_check.png to the output folder.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import MinLen
from pydantic.dataclasses import dataclass

from gpt_arc.errors import entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positive
from gpt_arc.tables import table
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from model import GPT, GPTConfig

HEAD = 16  # width of an attention head, at every width of the model
SMALL = GPTConfig(
    block_size=16, vocab_size=40, n_layer=2, n_head=4, n_embd=64, tied_head=False, positions="rotary", base_width=64
)


@dataclass(frozen=True, config=STRICT)
class Options:
    widths: Annotated[tuple[Count, ...], MinLen(1)] = (64, 128, 256, 512, 1024)
    """Widths of the residual stream, multiples of 16."""
    rate: Positive = 0.02
    """AdamW's learning rate."""
    steps: Count = 4
    """Updates on one batch."""
    output: Path = Path("out/coordinate_check")
    """Folder of the picture."""

    def __post_init__(self):
        if odd := [width for width in self.widths if width % HEAD]:
            raise ValueError(f"--widths: {odd[0]} is not a multiple of {HEAD}, the width of a head")


def at(width: int, config: GPTConfig = SMALL) -> GPTConfig:
    """Returns `config` at another width, with more heads of the same size."""
    return dataclasses.replace(config, n_embd=width, n_head=width // HEAD)


def changes(config: GPTConfig, rate: float = 0.02, steps: int = 4) -> tuple[float, float]:
    """Root mean squares of what a few steps of AdamW on one batch change in hidden states and logits."""
    torch.manual_seed(0)
    model, cpu = GPT(config), torch.device("cpu")
    tokens, targets = torch.randint(40, (2, 4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.hidden(tokens), model(tokens)
    updater = Updater(model, TrainingConfig(learning_rate=rate, weight_decay=0.0, warmup_iters=0), cpu, "float32")
    for _ in range(steps):
        loss = model(tokens, targets)
        updater.backward(loss.total / loss.count)
        updater.update(rate, loss.total.detach())
    with torch.no_grad():
        after = model.hidden(tokens), model(tokens)
    hidden, logits = ((new - old).square().mean().sqrt().item() for new, old in zip(after, before))
    return hidden, logits


def plot(widths: tuple[int, ...], figures: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Plots the changes by width, hidden states and logits side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for i, (axes, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("hidden states", "logits"))):
        for label, values in figures.items():
            axes.plot(widths, [value[i] for value in values], "o-", label=label)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", title=f"change of {title}", xlabel="width")
        axes.set_xticks(widths, map(str, widths))
        axes.legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    settings = {"with base_width = 64": SMALL, "without": dataclasses.replace(SMALL, base_width=None)}
    figures = {
        label: [changes(at(width, config), options.rate, options.steps) for width in options.widths]
        for label, config in settings.items()
    }
    options.output.mkdir(parents=True, exist_ok=True)
    plot(options.widths, figures, options.output / "coordinate_check.png")
    for i, title in enumerate(("hidden states", "logits")):
        rows = [[label, *(f"{value[i]:.2f}" for value in values)] for label, values in figures.items()]
        print(table([[f"change of {title}", *options.widths], *rows]), end="\n\n")
    print(f"drawn in {options.output / 'coordinate_check.png'}")


if __name__ == "__main__":
    entry_point(main)()
