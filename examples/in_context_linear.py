"""A transformer learns linear functions in context as well as least squares does (Garg et al., arXiv:2208.01066).

    python examples/in_context_linear.py
    python examples/in_context_linear.py --max_iters=200 --functions=500 --output=out/try      a quick look

A sequence has points x_k and values y_k = w x_k + noise of one random linear function: x and w are normal in d
dimensions, and `noise` is a standard deviation. The model predicts each y_k from x_k and the k pairs before it,
k = 0, 1, 2 ... It has never seen the function and its weights don't change, so it can only infer w from the pairs.

On new functions, its squared error is compared with three estimates of w from the same k pairs: ordinary least squares
(the shortest solution if k < d); ridge regression with the noise's variance as penalty, which is the posterior mean of
w, so no predictor has a lower expected error; and the mean of y x over the pairs. Errors are measured against the noisy
y and, more strictly, against w x without the noise.

The trunk is `model.py`'s GPT with its position embeddings, blocks and final norm. A linear layer replaces the token
embedding, and another the head. The script writes OUTPUT/figures.json and OUTPUT/errors.png.
"""

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


def estimates(xs: Tensor, ys: Tensor, noise: float) -> dict[str, Tensor]:
    """Returns the predictions (B, N) of each kind of estimate; that of y_k uses the pairs before it."""
    xs, ys = xs.double(), ys.double()
    predictions = {
        name: torch.zeros_like(ys) for name in ("least squares", "ridge", "averaging")
    }  # without pairs w = 0
    penalty = noise**2 * torch.eye(xs.size(-1), dtype=xs.dtype)
    for k in range(1, ys.size(1)):
        x, y, query = xs[:, :k], ys[:, :k, None], xs[:, k, None]  # (B, k, d), (B, k, 1), (B, 1, d)
        weights = {
            "least squares": torch.linalg.lstsq(x, y, driver="gelsd").solution,
            "ridge": torch.linalg.solve(x.mT @ x + penalty, x.mT @ y),
            "averaging": x.mT @ y / k,
        }
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
def test(model: Regressor, options: Options, scale: float = 1.0) -> dict:
    """Returns squared errors of the model and the estimates by number of pairs, and their ratios for k > d."""
    xs, ys, clean = draw(options, options.functions, torch.Generator().manual_seed(options.seed + 1), scale)
    predictions = {"transformer": torch.cat([model(x, y) for x, y in zip(xs.split(500), ys.split(500))]).double()}
    predictions |= estimates(xs, ys, options.noise)
    report: dict = {"scale": scale, "k": list(range(options.examples + 1))}
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

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, style in {"averaging": "C7:", "least squares": "C1--", "ridge": "k-", "transformer": "C0o"}.items():
        axes.plot(report["k"], report["noisy"][name]["error"], style, markersize=4, label=name)
    axes.axhline(options.noise**2, color="C3", linewidth=0.8, label="the noise alone")
    axes.set(xlabel="pairs in context", ylabel="squared error", yscale="log")
    axes.set_xticks(report["k"][:: options.dimensions])
    axes.set_ylim(0.8 * options.noise**2, 4 * (options.dimensions + options.noise**2))
    axes.set_title(f"linear functions in {options.dimensions} dimensions, {options.functions:,} of them")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> int:
    options = parse_flags(Options, __doc__, sys.argv[1:])
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
    report["tests"] = tests = [test(model, options, scale) for scale in (1.0, 0.5, 2.0, 3.0)]
    write_file(options.output / "figures.json", to_json(report, indent=1) + "\n")
    plot(tests[0], options, options.output / "errors.png")
    names = "transformer", "ridge", "least squares", "averaging"
    for kind in ("noisy", "noise-free"):
        figures = tests[0][kind]
        columns = [tests[0]["k"], *(figures[name]["error"] for name in names)]
        ratios = [[None] * (options.dimensions + 1) + figures[f"ratio to {name}"]["by_k"] for name in names[1:3]]
        print(f"\nsquared error of the {kind} y after k pairs in context, and its ratio to two baselines")
        print(table([["k", *names, *(f"over {name}" for name in names[1:3])], *zip(*columns, *ratios)]))
    print(f"\nthe transformer's error over two baselines', mean of k = {options.dimensions + 1} .. {options.examples}")
    rows = [["x times", "y", *(f"over {name}" for name in names[1:3])]]
    for entry, kind in product(tests, ("noisy", "noise-free")):
        ratios = [entry[kind][f"ratio to {name}"] for name in names[1:3]]
        rows.append([f"{entry['scale']:g}", kind, *(f"{r['mean']:.3f} ± {r['standard_error']:.3f}" for r in ratios)])
    print(table(rows))
    return 0


if __name__ == "__main__":
    entry_point(main)()
