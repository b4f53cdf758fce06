"""Few-shot accuracy against size: exact match rises sharply, the log-probability of the same answers smoothly.

    python examples/in_context_sizes.py
    python examples/in_context_sizes.py --widths 8 16 --max_iters=100 --output=out/try      a quick look

Each sequence hides a mapping of ten letters and shows it in words whose letters are followed by their images: if a
becomes d and b becomes g, "ab" is "adbg". In the task `permutation` the mapping is any one-to-one mapping; in `shift`
it moves every letter by the same distance around the alphabet. A sequence has seventeen words of four letters, so
images in word k are predicted after k demonstrations, for all k at once. Half of the training sequences show each task.
They use two to ten different letters, which makes the rule easier to discover; test sequences use ten.

The models differ only in width. An n-gram embedding shows them the pair of letters that ends at each token; without it,
models this small need much more training to find the pairs.

An answer is an exact match if its four images are all the most likely ones. Whether abilities emerge depends on the
metric (Schaeffer et al., arXiv:2304.15004): if one image is right with probability p, four are with about p^4. The
script writes OUTPUT/figures.json and OUTPUT/accuracy.png.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm import tqdm

from gpt_arc.errors import entry_point
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positive, Seed
from gpt_arc.tables import counted, table
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from gpt_arc.training.schedule import learning_rate_at
from model import GPT, GPTConfig

LETTERS = 10
LENGTH = 4  # of a word
WORDS = 17  # in a sequence
SHOTS = 0, 1, 4, 16
TASKS = "permutation", "shift"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    widths: tuple[Count, ...] = (4, 6, 8, 10, 12, 16)
    """Width of each model."""
    n_layer: Count = 2
    """Blocks of each model."""
    batch_size: Count = 4
    """Sequences of each task per update, each with its own mapping."""
    max_iters: Count = 600
    """Updates of each model."""
    learning_rate: Positive = 8e-3
    """Peak; rises over the first twentieth of the updates, then falls to zero along a cosine."""
    sequences: Count = 1000
    """Test sequences of each task."""
    seed: Seed = 0
    """Random seed."""
    output: Path = Path("out/in_context_sizes")
    """Folder for the results."""

    def __post_init__(self):
        assert all(self.model(width) for width in self.widths)  # raises ValueError for impossible settings

    def model(self, width: int) -> GPTConfig:
        return GPTConfig(
            block_size=2 * LENGTH * WORDS, vocab_size=LETTERS, n_layer=self.n_layer, n_head=1, n_embd=width, ngrams=2,
            ngram_rows=512, positions="rotary", norm="rmsnorm", qk_norm=True, bias=False, activation="relu_squared",
            tied_head=False,
        )  # fmt: skip


def mappings(task: str, sequences: int, generator: torch.Generator) -> Tensor:
    """Returns the images (B, LETTERS) of all letters in each sequence."""
    if task == "shift":
        return (torch.arange(LETTERS) + torch.randint(LETTERS, (sequences, 1), generator=generator)) % LETTERS
    return torch.rand(sequences, LETTERS, generator=generator).argsort(-1)


def draw(images: Tensor, generator: torch.Generator, fewest: int = LETTERS) -> Tensor:
    """Returns sequences (B, T) of letters, each followed by its image. `fewest` letters or more occur in a sequence."""
    letters = torch.rand(images.shape, generator=generator).argsort(-1)
    number = torch.randint(fewest, LETTERS + 1, (len(images), 1), generator=generator)
    chosen = (torch.rand(len(images), LENGTH * WORDS, generator=generator) * number).long()
    text = letters.gather(1, chosen)
    return torch.stack((text, images.gather(1, text)), dim=-1).flatten(1)


def train(width: int, options: Options) -> GPT:
    torch.manual_seed(options.seed)
    model, steps = GPT(options.model(width)), options.max_iters
    config = TrainingConfig(
        max_iters=steps, warmup_iters=steps // 20, learning_rate=options.learning_rate, min_lr=0.0, weight_decay=0.0
    )
    updater = Updater(model, config, torch.device("cpu"), "float32")
    generator = torch.Generator().manual_seed(options.seed)
    for step in tqdm(range(steps), desc=f"width {width}", unit="step", disable=None):
        images = torch.cat([mappings(task, options.batch_size, generator) for task in TASKS])
        tokens = draw(images, generator, fewest=2)
        targets = tokens[:, 1:].clone()
        targets[:, 1::2] = -1  # the letters of words are random, only their images are worth predicting
        loss = model(tokens[:, :-1], targets)
        updater.backward(loss.total / loss.count)
        updater.update(learning_rate_at(step, config), loss.total.detach())
    return model


@torch.no_grad()
def test(model: GPT, task: str, options: Options) -> dict:
    """Returns each metric and its standard error, a list by SHOTS."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    tokens = draw(mappings(task, options.sequences, generator), generator)
    logits = torch.cat([model(batch) for batch in tokens[:, :-1].split(100)])[:, ::2]  # (B, WORDS * LENGTH, LETTERS)
    images = tokens[:, 1::2]
    words = len(tokens), WORDS, LENGTH
    right = (logits.argmax(-1) == images).view(words)[:, SHOTS]  # (B, S, LENGTH)
    scores = -F.cross_entropy(logits.mT, images, reduction="none").view(words)[:, SHOTS]
    metrics = {"exact match": right.all(-1), "letters right": right.double().mean(-1)}
    metrics["log-probability"] = scores.mean(-1)
    report: dict = {"task": task, "width": model.config.n_embd, "parameters": model.num_parameters(embeddings=False)}
    for name, values in metrics.items():
        mean, deviation = values.double().mean(0), values.double().std(0)
        report[name] = {"mean": mean.tolist(), "standard error": (deviation / len(tokens) ** 0.5).tolist()}
    return report


def plot(reports: list[dict], path: Path) -> None:
    """Plots exact match and log-probability side by side, with bars of two standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    for line, task in zip(panels, TASKS):
        chosen = [report for report in reports if report["task"] == task]
        sizes = [report["parameters"] for report in chosen]
        for axes, name in zip(line, ("exact match", "log-probability")):
            means, errors = (zip(*(report[name][key] for report in chosen)) for key in ("mean", "standard error"))
            for shots, mean, error in zip(SHOTS, means, errors):
                axes.errorbar(sizes, mean, [2 * e for e in error], fmt="o-", markersize=4, capsize=2,
                              label=counted(shots, "demonstration"))  # fmt: skip
            axes.set(xscale="log", title=f"{task}: {name}", xlabel="parameters without embeddings")
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.minorticks_off()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SHOTS))
    figure.savefig(path, dpi=80)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    options.output.mkdir(parents=True, exist_ok=True)
    models = [train(width, options) for width in options.widths]
    reports = [test(model, task, options) for task in TASKS for model in models]
    rounded = json.loads(json.dumps(reports), parse_float=lambda figure: round(float(figure), 4))
    write_file(options.output / "figures.json", json.dumps(rounded) + "\n")
    plot(reports, options.output / "accuracy.png")
    for task in TASKS:
        print(f"\n{task}: exact match, and log-probability of a letter, by number of demonstrations")
        rows = [
            [report["parameters"], *report["exact match"]["mean"], *report["log-probability"]["mean"]]
            for report in reports
            if report["task"] == task
        ]
        print(table([["parameters", *SHOTS, *SHOTS], *rows]))


if __name__ == "__main__":
    entry_point(main)()
