"""A transformer learns linear functions in context as well as least squares does (Garg et al., arXiv:2208.01066).

    python examples/in_context_linear.py
    python examples/in_context_linear.py --max_iters=200 --functions=500 --output=out/try      a quick look

A sequence has points x_k and values y_k = w x_k + noise of one random linear function: x and w are normal in d
dimensions, and `noise` is a standard deviation. The model predicts each y_k from x_k and the k pairs before it,
k = 0, 1, 2 ... It has never seen the function and its weights don't change, so it can only infer w from the pairs.

On new functions, its squared error is compared with those of estimates of w from the same k pairs: ordinary least
squares (the shortest solution if k < d); ridge regression with the noise's variance as penalty, which is the posterior
mean of w, so no predictor has a lower expected error; the mean of y x over the pairs; and 1, 2, 4 or 8 steps of
gradient descent on the mean squared error, from w = 0, with the step size that is best for this number of steps and
pairs (von Oswald et al., arXiv:2212.07677). Errors are measured against the noisy y and, more strictly, against w x
without the noise. An estimate's distance is the mean square of the transformer's prediction minus its own.

The trunk is `model.py`'s GPT with its position embeddings, blocks and final norm. A linear layer replaces the token
embedding, and another the head. The script writes OUTPUT/figures.json and OUTPUT/errors.png.
"""

import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from tqdm import tqdm

from gpt_arc.errors import entry_point
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positive, Seed
from gpt_arc.tables import table, to_json
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from gpt_arc.training.schedule import learning_rate_at
from gpt_arc.training.signals import StopSignal
from model import GPT, GPTConfig

DESCENTS = {"1 step": 1, "2 steps": 2, "4 steps": 4, "8 steps": 8}  # of gradient descent
STEP_SIZES = torch.logspace(-2, 0.3, 40, dtype=torch.float64)  # to choose from
TUNING = 20_000  # functions to choose them by: with a large x, descent can diverge
NAMES = "transformer", "ridge", "least squares", "averaging", *DESCENTS


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    dimensions: Count = 5
    """d, the length of x and of w."""
    examples: Count = 20
    """Maximum pairs in context; a sequence has one more, which is predicted last."""
    noise: Positive = 0.5
    """Standard deviation of y about w x."""
    n_layer: Count = 4
    """Number of blocks."""
    n_head: Count = 4
    """Heads per attention layer."""
    n_embd: Count = 64
    """Width of the residual stream."""
    batch_size: Count = 64
    """Sequences per update, each with a different function."""
    max_iters: Count = 20_000
    """Updates."""
    learning_rate: Positive = 2e-3
    """Peak; rises over the first fiftieth of all updates, then falls to zero along a cosine."""
    functions: Annotated[int, Ge(2)] = 10_000
    """Test functions."""
    seed: Seed = 0
    """Random seed."""
    output: Path = Path("out/in_context_linear")
    """Folder for the results."""

    def __post_init__(self):
        if self.examples <= self.dimensions:
            raise ValueError(f"examples = {self.examples} must be more than dimensions = {self.dimensions}")
        assert self.model and self.training  # they raise ValueError for impossible settings

    @property
    def model(self) -> GPTConfig:
        size = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd")}
        return GPTConfig(block_size=self.examples + 1, vocab_size=1, **size)

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(
            max_iters=self.max_iters,
            warmup_iters=self.max_iters // 50,
            learning_rate=self.learning_rate,
            min_lr=0.0,
            weight_decay=0.0,
            beta2=0.99,
        )


class Regressor(nn.Module):
    """A GPT from vectors to numbers: position k of N reads x_k and the pair before it, (x_{k-1}, y_{k-1})."""

    def __init__(self, config: GPTConfig, dimensions: int):
        super().__init__()
        self.trunk = GPT(config)
        self.trunk.token_embedding.requires_grad_(False)  # nothing here has token ids
        self.read_in = nn.Linear(2 * dimensions + 1, config.n_embd)
        self.read_out = nn.Linear(config.n_embd, 1)

    def forward(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Returns predictions (B, N) of ys (B, N), each from the xs (B, N, d) up to it and the ys before it."""
        pairs = torch.cat((xs, ys[..., None]), dim=-1)  # (B, N, d + 1)
        inputs = torch.cat((xs, F.pad(pairs[:, :-1], (0, 0, 1, 0))), dim=-1)  # (B, N, 2d + 1)
        x = self.read_in(inputs) + self.trunk.position_embedding.weight[: xs.size(1)]  # (B, N, C)
        for block in self.trunk.blocks:
            x = block(x, None, None)  # no rotary positions; without a mask attention is causal
        return self.read_out(self.trunk.final_norm(x))[..., 0]


def draw(options: Options, functions: int, generator: torch.Generator, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Returns xs (B, N, d) with deviation `scale`, noisy ys (B, N) and w x (B, N) for B functions."""
    shape = functions, options.examples + 1, options.dimensions
    xs = scale * torch.randn(shape, generator=generator)
    w = torch.randn(functions, options.dimensions, 1, generator=generator)
    clean = (xs @ w)[..., 0]
    return xs, clean + options.noise * torch.randn(clean.shape, generator=generator), clean


def descend(x: Tensor, y: Tensor, steps: int, step_sizes: Tensor) -> Tensor:
    """Returns w (B, d, S) after gradient descent from 0 on half the mean squared error of x (B, k, d) and y (B, k, 1).

    Each of the S step sizes gives one w.
    """
    w = torch.zeros(len(x), x.size(-1), len(step_sizes), dtype=x.dtype)
    for _ in range(steps):
        w = w + step_sizes * (x.mT @ (y - x @ w)) / x.size(1)
    return w


def best_step_sizes(xs: Tensor, ys: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """Returns, by number of steps, the step size (N,) for each number of pairs: the best for these functions."""
    xs, ys, clean = xs.double(), ys.double(), clean.double()
    best = {name: torch.zeros_like(ys[0]) for name in DESCENTS}
    for (name, steps), k in product(DESCENTS.items(), range(1, ys.size(1))):
        w = descend(xs[:, :k], ys[:, :k, None], steps, STEP_SIZES)
        errors = ((xs[:, k, None] @ w)[:, 0] - clean[:, k, None]).square().mean(0)
        best[name][k] = STEP_SIZES[errors.argmin()]
    return best


def estimates(xs: Tensor, ys: Tensor, noise: float, step_sizes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the predictions (B, N) of each kind of estimate; that of y_k uses the pairs before it."""
    xs, ys = xs.double(), ys.double()
    predictions = {name: torch.zeros_like(ys) for name in NAMES[1:]}  # without pairs w = 0
    penalty = noise**2 * torch.eye(xs.size(-1), dtype=xs.dtype)
    for k in range(1, ys.size(1)):
        x, y, query = xs[:, :k], ys[:, :k, None], xs[:, k, None]  # (B, k, d), (B, k, 1), (B, 1, d)
        weights = {
            "least squares": torch.linalg.lstsq(x, y, driver="gelsd").solution,
            "ridge": torch.linalg.solve(x.mT @ x + penalty, x.mT @ y),
            "averaging": x.mT @ y / k,
        }
        weights |= {name: descend(x, y, steps, step_sizes[name][k, None]) for name, steps in DESCENTS.items()}
        for name, w in weights.items():
            predictions[name][:, k] = (query @ w)[:, 0, 0]
    return predictions


def compared(errors: Tensor, baseline: Tensor) -> dict:
    """Returns ratios of mean errors (B, K) to a baseline's (B, K), for each k and averaged, with standard errors.

    Both use the same functions, so the standard errors are those of the difference errors - ratio x baseline.
    """
    ratios, root = errors.mean(0) / baseline.mean(0), len(errors) ** 0.5
    differences = (errors - ratios * baseline) / baseline.mean(0) / root  # (B, K)
    by_k = {"by_k": ratios.tolist(), "by_k_standard_error": differences.std(0).tolist()}
    return {"mean": ratios.mean().item(), "standard_error": differences.mean(1).std().item(), **by_k}


@torch.no_grad()
def test(model: Regressor, options: Options, step_sizes: dict[str, Tensor], scale: float = 1.0) -> dict:
    """Returns squared errors and distances by number of pairs, and ratios of errors for k > d."""
    xs, ys, clean = draw(options, options.functions, torch.Generator().manual_seed(options.seed + 1), scale)
    predictions = {"transformer": torch.cat([model(x, y) for x, y in zip(xs.split(500), ys.split(500))]).double()}
    predictions |= estimates(xs, ys, options.noise, step_sizes)
    report: dict = {"scale": scale, "k": list(range(options.examples + 1))}
    report["distance"] = {
        name: (predictions["transformer"] - predictions[name]).square().mean(0).tolist() for name in NAMES[1:]
    }
    for kind, truth in {"noisy": ys, "noise-free": clean}.items():
        errors = {name: (prediction - truth).square() for name, prediction in predictions.items()}  # (B, N)
        entry = report[kind] = {}
        for name, e in errors.items():
            entry[name] = {"error": e.mean(0).tolist(), "standard_error": (e.std(0) / len(e) ** 0.5).tolist()}
        for name in ("least squares", "ridge"):
            late = (errors[key][:, options.dimensions + 1 :] for key in ("transformer", name))
            entry[f"ratio to {name}"] = compared(*late)
    return report


def plot(report: dict, options: Options, path: Path) -> None:
    """Plots the squared error of the noisy y by number of pairs in context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    styles = {"averaging": "C7:", "least squares": "C1--", "ridge": "k-"}
    styles |= dict(zip(DESCENTS, ("C2:", "C2-.", "C2--", "C2-"))) | {"transformer": "C0o"}
    for name, style in styles.items():
        label = f"{name} of gradient descent" if name in DESCENTS else name
        axes.plot(report["k"], report["noisy"][name]["error"], style, markersize=4, label=label)
    axes.axhline(options.noise**2, color="C3", linewidth=0.8, label="the noise alone")
    axes.set(xlabel="pairs in context", ylabel="squared error", yscale="log")
    axes.set_xticks(report["k"][:: options.dimensions])
    axes.set_ylim(0.8 * options.noise**2, 3 * (options.dimensions + options.noise**2))
    axes.set_title(f"linear functions in {options.dimensions} dimensions, {options.functions:,} of them")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> int:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    torch.set_num_threads(1)  # a second gains little with models this small, and costs much on busy cores
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model, training = Regressor(options.model, options.dimensions), options.training
    updater = Updater(model, training, torch.device("cpu"), "float32")
    generator, stop = torch.Generator().manual_seed(options.seed), StopSignal()
    print(f"{sum(p.numel() for p in updater.parameters):,} parameters")

    # ---- training: a new function in every row of every batch
    recent, every = 0.0, max(options.max_iters // 30, 1)
    for step in (bar := tqdm(range(options.max_iters), unit="step", disable=None)):
        xs, ys, _ = draw(options, options.batch_size, generator)
        loss = (model(xs, ys) - ys).square().mean()
        updater.backward(loss)
        _, _, (value,) = updater.update(learning_rate_at(step, training), loss.detach())
        recent += value / every
        if (step + 1) % every == 0:
            tqdm.write(f"step {step + 1}: squared error {recent:.4f}")
            recent = 0.0
        if stop.anywhere():
            bar.close()
            print(f"stopped after {step + 1} updates; an unfinished run has no figures")
            return 128 + stop.number

    # ---- tests on new functions, first with x as in training, then with x of other scales
    report = {"options": asdict(options) | {"output": str(options.output)}, "torch": torch.__version__}
    step_sizes = best_step_sizes(*draw(options, TUNING, torch.Generator().manual_seed(options.seed + 2)))
    report["step_sizes"] = {name: sizes.tolist() for name, sizes in step_sizes.items()}
    report["tests"] = tests = [test(model, options, step_sizes, scale) for scale in (1.0, 0.5, 2.0, 3.0)]
    digits = json.loads(to_json(report), parse_float=lambda figure: float(f"{float(figure):.5g}"))
    write_file(options.output / "figures.json", json.dumps(digits) + "\n")
    plot(tests[0], options, options.output / "errors.png")
    for kind in ("noisy", "noise-free"):
        figures = tests[0][kind]
        columns = [tests[0]["k"], *(figures[name]["error"] for name in NAMES)]
        ratios = [[None] * (options.dimensions + 1) + figures[f"ratio to {name}"]["by_k"] for name in NAMES[1:3]]
        print(f"\nsquared error of the {kind} y after k pairs in context, and its ratio to two baselines; steps are")
        print("those of gradient descent")
        print(table([["k", *NAMES, *(f"over {name}" for name in NAMES[1:3])], *zip(*columns, *ratios)]))
    print("\nmean square of the transformer's prediction minus an estimate's")
    print(table([["k", *NAMES[1:]], *zip(tests[0]["k"], *(tests[0]["distance"][name] for name in NAMES[1:]))]))
    print(f"\nthe transformer's error over two baselines', mean of k = {options.dimensions + 1} .. {options.examples}")
    rows = [["x times", "y", *(f"over {name}" for name in NAMES[1:3])]]
    for entry, kind in product(tests, ("noisy", "noise-free")):
        ratios = [entry[kind][f"ratio to {name}"] for name in NAMES[1:3]]
        rows.append([f"{entry['scale']:g}", kind, *(f"{r['mean']:.3f} ± {r['standard_error']:.3f}" for r in ratios)])
    print(table(rows))
    return 0


if __name__ == "__main__":
    entry_point(main)()
