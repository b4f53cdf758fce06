"""Random labels in demonstrations, for tasks that training has shown over and over and for new ones.

    python examples/in_context_labels.py
    python examples/in_context_labels.py --seeds=1 --max_iters=20 --output=out/try      a quick look

A task has eight of twenty-four letters and gives each a label, one of eight. A sequence has one task: seventeen
letters, each followed by its label. Thirty-two tasks form a pool that training returns to; all others are new each
time. Letters and labels of a sequence both tell which task of the pool it is: few tasks have all the letters seen.

Models train on the pool alone, or on new tasks as well in every second sequence; and with right labels, or with half of
them random, as in text with mistakes. Tests ask for the label of a letter after sixteen demonstrations with their right
labels, after the same letters with random labels, and after none, for tasks of the pool and for new ones.

Min et al. (arXiv:2202.12837) find that large models lose little by random labels: demonstrations show them what the
inputs look like. The script writes OUTPUT/figures.json after each run, continues from it when called again, and draws
OUTPUT/labels.png.
"""

import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm import tqdm

from gpt_arc.errors import entry_point
from gpt_arc.evaluation.experiments import run_missing
from gpt_arc.evaluation.statistics import mean_and_error, standard_error
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positive, Share
from gpt_arc.tables import table
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from gpt_arc.training.schedule import learning_rate_at
from model import GPT, GPTConfig

LETTERS, CHOSEN, LABELS = 24, 8, 8  # all letters, those of a task, labels
SHOTS = 16
TRAINED_ON = "pool", "pool and new"
TASKS = "pool", "new"
DEMONSTRATIONS = "right", "random", "none"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    pool: Count = 32
    """Tasks that training returns to."""
    width: Count = 32
    """Width of each model, of two blocks with two heads."""
    noise: Share = 0.5
    """Share of labels that are random in the training of the noisy models."""
    max_iters: Count = 300
    """Updates of each model."""
    batch_size: Count = 32
    """Sequences per update, each with a task."""
    learning_rate: Positive = 3e-3
    """Peak of AdamW's, which trains embeddings and head; Muon trains the matrices of blocks, at .02. Both rise over the
    first twentieth of the updates, then fall to zero along a cosine."""
    sequences: Count = 1000
    """Test sequences of each kind."""
    seeds: Count = 3
    """Runs of each model."""
    output: Path = Path("out/in_context_labels")
    """Folder for the results."""

    def __post_init__(self):
        self.model()  # raises ValueError for impossible settings

    def model(self) -> GPTConfig:
        return GPTConfig(
            block_size=2 * SHOTS + 2, vocab_size=LETTERS + LABELS, n_layer=2, n_head=2, n_embd=self.width, ngrams=2,
            ngram_rows=1024, positions="rotary", norm="rmsnorm", qk_norm=True, bias=False, activation="relu_squared",
            tied_head=False,
        )  # fmt: skip


def random_labels(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Returns the tokens of random labels."""
    return torch.randint(LETTERS, LETTERS + LABELS, shape, generator=generator)


def new_tasks(number: int, generator: torch.Generator) -> Tensor:
    """Draws tasks (N, CHOSEN, 2): letters and their labels."""
    letters = torch.rand(number, LETTERS, generator=generator).argsort(-1)[:, :CHOSEN]
    return torch.stack((letters, random_labels((number, CHOSEN), generator)), dim=-1)


def draw(tasks: Tensor, generator: torch.Generator) -> Tensor:
    """Returns letters and labels (N, SHOTS + 1, 2), a row for each task (N, CHOSEN, 2)."""
    chosen = torch.randint(CHOSEN, (len(tasks), SHOTS + 1), generator=generator)
    return tasks[torch.arange(len(tasks))[:, None], chosen]


def with_noise(pairs: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Returns letters and labels (N, T, 2) with a share of the labels random."""
    letters, labels = pairs.unbind(-1)
    random = torch.rand(labels.shape, generator=generator) < noise
    return torch.stack((letters, random_labels((labels.size(0), labels.size(1)), generator).where(random, labels)), -1)


def train(options: Options, trained_on: str, noise: float, pool: Tensor, seed: int) -> GPT:
    torch.manual_seed(seed)
    model, steps = GPT(options.model()), options.max_iters
    config = TrainingConfig(
        max_iters=steps, warmup=0.05, learning_rate=options.learning_rate, min_lr=0.0, weight_decay=0.0,
        optimizer="muon",
    )  # fmt: skip
    updater, generator = Updater(model, config, torch.device("cpu"), "float32"), torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps), desc=f"{trained_on}, noise {noise:g}, seed {seed}", unit="step", disable=None):
        tasks = pool[torch.randint(len(pool), (options.batch_size,), generator=generator)]
        if trained_on == "pool and new":
            tasks[::2] = new_tasks(options.batch_size, generator)[::2]
        tokens = with_noise(draw(tasks, generator), noise, generator).flatten(1)
        targets = tokens[:, 1:].clone()
        targets[:, 1::2] = -1  # letters are random, only labels are worth predicting
        loss = model(tokens[:, :-1], targets)
        updater.backward(loss.total / loss.count)
        updater.update(learning_rate_at(step, config), loss.total.detach())
    return model.eval()


@torch.no_grad()
def test(model: GPT, tasks: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Returns, by demonstrations, the share of tasks whose last letter gets its label."""
    right = draw(tasks, generator)
    prompts = {"right": right, "random": with_noise(right, 1.0, generator), "none": right[:, -1:]}
    answers = {name: model(prompts[name].flatten(1)[:, :-1])[:, -1].argmax(-1) for name in DEMONSTRATIONS}
    return {name: (answer == right[:, -1, 1]).double().mean().item() for name, answer in answers.items()}


def measure(options: Options, trained_on: str, noise: float, seed: int) -> dict:
    """Trains a model. Returns its accuracies by task and demonstrations."""
    generator = torch.Generator().manual_seed(seed + 1000)
    pool = new_tasks(options.pool, generator)
    model = train(options, trained_on, noise, pool, seed)
    drawn = pool[torch.randint(len(pool), (options.sequences,), generator=generator)]
    new = new_tasks(options.sequences, generator)
    return {name: test(model, tasks, generator) for name, tasks in zip(TASKS, (drawn, new))}


def lines(results: list[dict]) -> Iterator[tuple[str, float, str, dict[str, list[float]]]]:
    """Yields what was trained on, the noise, the tasks and the seeds' accuracies in percent of each line."""
    for trained_on, noise in dict.fromkeys((result["trained_on"], result["noise"]) for result in results):
        runs = [result for result in results if (result["trained_on"], result["noise"]) == (trained_on, noise)]
        for tasks in TASKS:
            yield trained_on, noise, tasks, {name: [100 * run[tasks][name] for run in runs] for name in DEMONSTRATIONS}


def rows(results: list[dict]) -> list[list[str]]:
    """Returns the table: accuracies by demonstrations, and what random labels lose."""
    body = []
    for trained_on, noise, tasks, accuracies in lines(results):
        lost = [right - random for right, random in zip(accuracies["right"], accuracies["random"])]
        cells = [mean_and_error(values, 1) for values in (*accuracies.values(), lost)]
        body.append([trained_on, f"{noise:g}", tasks, *cells])
    return [["trained on", "noise", "tasks", *DEMONSTRATIONS, "lost by random"], *body]


def plot(results: list[dict], path: Path) -> None:
    """Plots accuracy by demonstrations, with bars of a standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    found = [*lines(results)]
    for i, name in enumerate(DEMONSTRATIONS):
        columns = [accuracies[name] for *_, accuracies in found]
        axes.bar([place + 0.27 * (i - 1) for place in range(len(found))], [fmean(column) for column in columns], 0.25,
                 yerr=[standard_error(column) for column in columns], capsize=2, label=f"labels: {name}")  # fmt: skip
    names = [f"{trained_on},\nnoise {noise:g},\ntest: {tasks}" for trained_on, noise, tasks, _ in found]
    axes.set_xticks(range(len(found)), names, fontsize="x-small")
    axes.axhline(100 / LABELS, color="grey", linestyle=":", label="chance")
    axes.set_ylabel("labels right, %")
    axes.legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    torch.set_num_threads(1)  # a second gains little with models this small, and costs much on busy cores
    cases = [
        {"trained_on": trained_on, "noise": noise, "seed": seed}
        for seed in range(1, options.seeds + 1)
        for noise, trained_on in product((0.0, options.noise), TRAINED_ON)
    ]
    names = "pool", "width", "max_iters", "batch_size", "learning_rate", "sequences"
    settings = {name: getattr(options, name) for name in names}
    results = run_missing(options.output / "figures.json", settings, cases, partial(measure, options))
    print(table(rows(results)))
    plot(results, options.output / "labels.png")


if __name__ == "__main__":
    entry_point(main)()
