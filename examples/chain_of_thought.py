"""Chain of thought against direct answers: one model, the same problems, with the steps written first or not.

    python examples/chain_of_thought.py
    python examples/chain_of_thought.py --widths 8 16 --seeds=1 --max_iters=20 --output=out/try      a quick look

A problem is worked from left to right, and only last digits count: 7+5*3-2 makes 2, 6 and 4. Factors are 3, 7 and 9, so
that every operation matters to the answer. An operation such as "+5" is one token. The document of a problem is of one
of these kinds, which the token after the problem tells:

    direct          7+5*3-2=4
    steps           7+5*3-2>264=4
    dots            7+5*3-2....=4       as many tokens as with steps, and no content
    random digits   7+5*3-2?380=4       as many tokens, and nothing that helps

Problems have one to eight operations, and are filled up with blanks to the length of eight; so a step always stands as
far after its operation. A tenth of all problems, by their checksum, are never trained on and are the test. A mixed
model trains on all four kinds in equal shares, and answers each test problem in all four ways. McNemar's exact test
compares the steps with each other way. A model of direct documents alone has as many tokens an update. Dots and random
digits stand in the prompt; the model writes the rest, and only what it writes is scored in training.

Wei et al. (arXiv:2201.11903) find that chains help with several steps, in large models only, and that dots don't help.
The script writes OUTPUT/figures.json after each run, continues from it when called again, and draws
OUTPUT/accuracy.png.
"""

import operator
import random
import sys
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm import tqdm

from gpt_arc.errors import entry_point
from gpt_arc.evaluation.experiments import run_missing
from gpt_arc.evaluation.statistics import mean_and_error, paired_p_value, standard_error
from gpt_arc.extras import import_extra
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positive
from gpt_arc.tables import table
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from gpt_arc.training.schedule import learning_rate_at
from model import GPT, GPTConfig

DIGITS = "0123456789"
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
OPERATIONS = [sign + digit for sign in OPERATORS for digit in ("379" if sign == "*" else DIGITS)]
MOST = 8  # operations in a problem
KINDS = "direct", "steps", "dots", "random digits"
STYLES: dict[str, str] = dict(zip(KINDS, ("o-", "s-", "^--", "v--")))
MIXES = {"mixed": KINDS, "direct alone": ("direct",)}
BLANK = "_"
VOCABULARY = [*DIGITS, *OPERATIONS, *"=>.?", BLANK]
IDS = {token: number for number, token in enumerate(VOCABULARY)}
HEAD = 8  # width of a head
HELD_OUT = 10  # one of so many problems is for testing


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    widths: tuple[Count, ...] = (8, 16, 32)
    """Widths of the mixed models, of two blocks with heads of 8. The last is also that of the direct models."""
    max_iters: Count = 800
    """Updates of each model."""
    tokens: Count = 1000
    """Tokens of each update, about: a mix of longer documents has fewer."""
    learning_rate: Positive = 3e-3
    """Peak of AdamW's, which trains embeddings and head; Muon trains the matrices of blocks, at .02. Both rise over the
    first twentieth of the updates, then fall to zero along a cosine."""
    problems: Count = 200
    """Test problems of each number of operations; equal ones count once."""
    seeds: Count = 3
    """Runs of each model."""
    output: Path = Path("out/chain_of_thought")
    """Folder for the results."""

    def __post_init__(self):
        for width in self.widths:
            if width % HEAD:
                raise ValueError(f"width = {width} must be a multiple of {HEAD}, the width of a head")


def draw_problem(count: int, held_out: bool, rng: random.Random) -> tuple[str, ...]:
    """Returns the tokens of a problem with `count` operations, of the test or not."""
    while True:
        tokens = (rng.choice(DIGITS), *rng.choices(OPERATIONS, k=count))
        if (zlib.crc32("".join(tokens).encode()) % HELD_OUT == 0) == held_out:
            return tokens


def steps_of(problem: Sequence[str]) -> list[str]:
    """Returns the digit after each operation; the last is the answer."""
    first, *operations = problem
    values = accumulate(operations, lambda value, o: OPERATORS[o[0]](value, int(o[1])) % 10, initial=int(first))
    return [str(value) for value in values][1:]


def document(problem: Sequence[str], kind: str, rng: random.Random) -> tuple[list[str], list[str]]:
    """Returns the tokens of the prompt, and those that the model writes."""
    steps, prompt = steps_of(problem), [*problem, *BLANK * (MOST + 1 - len(problem))]
    if kind == "steps":
        return [*prompt, ">"], [*steps, "=", steps[-1]]
    filler = {
        "direct": [],
        "dots": ["."] * (len(steps) + 1),
        "random digits": ["?", *rng.choices(DIGITS, k=len(steps))],
    }
    return [*prompt, *filler[kind], "="], [steps[-1]]


def length(kind: str) -> float:
    """Returns the mean number of tokens of a document."""
    return MOST + 3 + (0 if kind == "direct" else 1 + (1 + MOST) / 2)


def encode(tokens: Iterable[str]) -> list[int]:
    return [IDS[token] for token in tokens]


def batch(kinds: Sequence[str], documents: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Returns tokens and targets (B, T) of new training documents; targets in the prompts are -1."""
    tokens, targets = (torch.full((documents, 2 * MOST + 4), value) for value in (IDS[BLANK], -1))
    for i in range(documents):
        prompt, written = document(draw_problem(rng.randint(1, MOST), False, rng), kinds[i % len(kinds)], rng)
        row = torch.tensor(encode([*prompt, *written]))
        tokens[i, : len(row)] = row
        targets[i, len(prompt) : len(row)] = row[len(prompt) :]
    return tokens[:, :-1], targets[:, 1:]


def train(options: Options, mix: str, width: int, seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            block_size=2 * MOST + 4, vocab_size=len(VOCABULARY), n_layer=2, n_head=width // HEAD, n_embd=width,
            positions="rotary", norm="rmsnorm", qk_norm=True, bias=False, activation="relu_squared", tied_head=False,
        )
    )  # fmt: skip
    config = TrainingConfig(
        max_iters=options.max_iters, warmup=0.05, learning_rate=options.learning_rate, min_lr=0.0, weight_decay=0.0,
        optimizer="muon",
    )  # fmt: skip
    updater, rng = Updater(model, config, torch.device("cpu"), "float32"), random.Random(seed)
    documents = max(round(options.tokens / fmean(map(length, MIXES[mix]))), 1)
    for step in tqdm(range(options.max_iters), desc=f"{mix}, width {width}, seed {seed}", unit="step", disable=None):
        loss = model(*batch(MIXES[mix], documents, rng))
        updater.backward(loss.total / loss.count)
        updater.update(learning_rate_at(step, config), loss.total.detach())
    return model.eval()


@torch.no_grad()
def answers_right(model: GPT, problems: Sequence[Sequence[str]], kind: str, rng: random.Random) -> list[int]:
    """Returns which problems, all of as many operations, the model answers right, the most likely token each time."""
    documents = [document(problem, kind, rng) for problem in problems]
    tokens = torch.tensor([encode(prompt) for prompt, _ in documents])
    for _ in documents[0][1]:
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return [int(VOCABULARY[row[-1]] == written[-1]) for row, (_, written) in zip(tokens.tolist(), documents)]


def measure(options: Options, mix: str, width: int, seed: int) -> dict:
    """Trains and tests a model. Returns, by kind, the accuracy and McNemar's p beside the steps, by operations."""
    model, rng = train(options, mix, width, seed), random.Random(seed + 1000)
    result: dict = {kind: {"accuracy": [], "p": []} for kind in MIXES[mix]}
    for count in range(1, MOST + 1):
        drawn = {draw_problem(count, True, rng): None for _ in range(options.problems)}
        right = {kind: answers_right(model, [*drawn], kind, rng) for kind in result}
        for kind, values in right.items():
            result[kind]["accuracy"].append(fmean(values))
            result[kind]["p"].append(paired_p_value(values, right.get("steps", values)))
    return {"parameters": model.num_parameters(), **result}


def lines(results: list[dict]) -> Iterable[tuple[str, int, str, list[dict]]]:
    """Yields the mix, width, kind and runs of each line of the table and the plot."""
    for mix, width in dict.fromkeys((result["mix"], result["width"]) for result in results):
        runs = [result for result in results if (result["mix"], result["width"]) == (mix, width)]
        for kind in MIXES[mix]:
            yield mix, width, kind, [run[kind] for run in runs]


def rows(results: list[dict]) -> list[list]:
    """Returns the table of accuracy in percent, by operations."""
    body = []
    for mix, width, kind, runs in lines(results):
        columns = zip(*(run["accuracy"] for run in runs))
        body.append([width, mix, kind, *(mean_and_error([100 * value for value in column], 0) for column in columns)])
    return [["width", "trained on", "answers", *range(1, MOST + 1)], *body]


def p_rows(results: list[dict]) -> list[list]:
    """Returns the table of the seeds' largest p: are answers after the steps right as often as answers of a kind?"""
    body = []
    for mix, width, kind, runs in lines(results):
        if mix == "mixed" and kind != "steps":
            body.append([width, kind, *(f"{max(column):.0e}" for column in zip(*(run["p"] for run in runs)))])
    return [["width", "steps against", *range(1, MOST + 1)], *body]


def plot(results: list[dict], path: Path) -> None:
    """Plots accuracy by operations, a panel for each model, with bars of a standard error."""
    from matplotlib.figure import Figure

    models = [*dict.fromkeys((mix, width) for mix, width, *_ in lines(results))]
    figure = Figure(figsize=(3 * len(models), 3.5), layout="constrained")
    panels = dict(zip(models, figure.subplots(1, len(models), sharey=True, squeeze=False)[0]))
    for mix, width, kind, runs in lines(results):
        columns = [*zip(*(run["accuracy"] for run in runs))]
        means, errors = [fmean(column) for column in columns], [standard_error(column) for column in columns]
        panels[mix, width].errorbar(range(1, MOST + 1), means, errors, fmt=STYLES[kind], markersize=4, capsize=2,
                                    label=kind, color=f"C{KINDS.index(kind)}")  # fmt: skip
    for (mix, width), axes in panels.items():
        axes.axhline(0.1, color="grey", linestyle=":")
        axes.set(title=f"{mix}, width {width}", xlabel="operations", ylim=(-0.03, 1.03))
    panels[models[0]].set_ylabel("share of answers right")
    figure.legend(*panels[models[0]].get_legend_handles_labels(), loc="outside upper center", ncols=len(KINDS))
    figure.savefig(path, dpi=80)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    torch.set_num_threads(1)  # a second gains little with models this small, and costs much on busy cores
    import_extra("scipy.stats")
    models = [*(("mixed", width) for width in options.widths), ("direct alone", options.widths[-1])]
    cases = [
        {"mix": mix, "width": width, "seed": seed} for seed in range(1, options.seeds + 1) for mix, width in models
    ]
    settings = {name: getattr(options, name) for name in ("max_iters", "tokens", "learning_rate", "problems")}
    results = run_missing(options.output / "figures.json", settings, cases, partial(measure, options))
    print(table(rows(results)))
    print("\nlargest p of the seeds by McNemar's exact test")
    print(table(p_rows(results)))
    print("mean tokens of a document: " + ", ".join(f"{kind} {length(kind):g}" for kind in KINDS))
    plot(results, options.output / "accuracy.png")


if __name__ == "__main__":
    entry_point(main)()
