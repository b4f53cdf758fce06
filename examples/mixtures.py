"""The statistics of mixtures of experts: the formulas, checked numerically.

    python examples/mixtures.py                     all five parts, in a minute or two
    python examples/mixtures.py --plot=docs         also moe_em.png and moe_diversity.png (needs matplotlib)

A mixture is P(y | x) = sum_m g_m(x) P_m(y | x), where the gates g_m(x) >= 0 add up to 1 for every x. The parts:

1. the likelihood of a mixture of three small GPTs, each trained on a different language;
2. the error of a weighted mean, its members' errors and their ambiguity (Krogh & Vedelsby, 1994), for the model's
   `Experts`;
3. linear experts with softmax gates, fitted by EM (Jordan & Jacobs, 1994) and by Adam;
4. bagging and boosting, whose gates are the same for every x, against gates that depend on x;
5. ensembles of more and less diverse members.

Identities and inequalities are asserted in float64. Shapes: N points, D features, the first of which is 1, M members of
a mixture, T tokens, V vocabulary.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic.dataclasses import dataclass

from gpt_arc.errors import entry_point
from gpt_arc.extras import import_extra
from gpt_arc.files import replacing
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Seed

if TYPE_CHECKING:  # slow to import: only after the flags are read
    import torch

    from gpt_arc.nn.experts import Experts
    from model import GPT

EXACT = 1e-10  # relative, for sums of thousands of float64


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    plot: Path | None = None
    """Folder for the figures. None: no figures."""
    seed: Seed = 0
    """Random seed."""


def logsumexp(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis, keepdims=True)
    return np.log(np.exp(x - top).sum(axis)) + top.squeeze(axis)


def draw(probabilities: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draws an index (N,) from each row of probabilities (N, K)."""
    return (probabilities.cumsum(1)[:, :-1] <= random.random((len(probabilities), 1))).sum(1)


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean over the first axis and its standard error."""
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))


# ---- 1. the likelihood of a mixture


class Languages(NamedTuple):
    """One Markov chain of tokens for each language: the next token depends only on the last."""

    transitions: np.ndarray  # (M, V, V) probabilities of the next token (last axis)

    def texts(self, languages: np.ndarray, length: int, random: np.random.Generator) -> np.ndarray:
        """Draws texts (N, length) in the `languages` (N,). The first token is uniform."""
        tokens = np.empty((len(languages), length), np.int64)
        tokens[:, 0] = random.integers(self.transitions.shape[1], size=len(languages))
        for t in range(1, length):
            tokens[:, t] = draw(self.transitions[languages, tokens[:, t - 1]], random)
        return tokens


def train_gpt(texts: np.ndarray, vocab_size: int, seed: int, updates: int) -> "GPT":
    """Trains a GPT of one block on texts (N, T + 1), 64 for each update."""
    import torch

    from model import GPT, GPTConfig

    torch.manual_seed(seed)
    model = GPT(GPTConfig(texts.shape[1] - 1, vocab_size, n_layer=1, n_head=2, n_embd=32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(updates):
        batch = torch.from_numpy(texts[np.arange(64 * step, 64 * (step + 1)) % len(texts)])
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    return model.eval()


def token_log_probabilities(models: Sequence["GPT"], texts: np.ndarray) -> np.ndarray:
    """Returns each model's log-probabilities (M, N, T) in nats of all tokens of texts (N, T + 1) except the first."""
    import torch

    tokens = torch.from_numpy(texts)
    with torch.no_grad():
        logs = torch.stack([model(tokens[:, :-1]).double().log_softmax(-1) for model in models])  # (M, N, T, V)
    return np.take_along_axis(logs.numpy(), texts[None, :, 1:, None], axis=-1)[..., 0]


def mixture_log_likelihood(gates: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Returns log sum_m g_m P_m (...) for log-probabilities (M, ...) and gates of that shape or (M, 1, ...)."""
    return logsumexp(np.log(gates) + logs, 0)


def posterior_gates(prior: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Returns each member's probability (M, N, T) given the tokens before, by Bayes' rule from the prior (M,)."""
    before = np.cumsum(logs, axis=-1) - logs  # log P_m of the tokens before
    joint = np.log(prior)[:, None, None] + before
    return np.exp(joint - logsumexp(joint, 0))


def draw_from_mixture(
    gates: np.ndarray, members: np.ndarray, draws: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws members (draws,) by their gates (M,), then a token (draws,) from each one's probabilities (M, V)."""
    chosen = draw(np.broadcast_to(gates, (draws, len(gates))), random)
    return chosen, draw(members[chosen], random)


def show_likelihood(seed: int, updates: int = 300) -> None:
    import torch

    from gpt_arc.tables import table

    random, vocab_size, length, count = np.random.default_rng(seed), 8, 17, 3
    languages = Languages(random.dirichlet(np.full(vocab_size, 0.5), size=(count, vocab_size)))
    models = []
    for m in range(count):
        models.append(train_gpt(languages.texts(np.full(6400, m), length, random), vocab_size, seed + m, updates))
    prior = np.full(count, 1 / count)
    spoken = random.integers(count, size=3000)
    texts = languages.texts(spoken, length, random)
    logs = token_log_probabilities(models, texts)  # (M, N, T)
    by_text = mixture_log_likelihood(prior[:, None], logs.sum(-1))  # (N,)
    by_token = mixture_log_likelihood(prior[:, None, None], logs).sum(-1)
    posterior = posterior_gates(prior, logs)
    by_posterior = mixture_log_likelihood(posterior, logs).sum(-1)
    np.testing.assert_allclose(by_posterior, by_text, rtol=EXACT)
    mean = prior @ logs.sum(-1)
    assert (by_text >= mean).all() and (by_token >= mean).all()  # Jensen: the logarithm is concave
    assert (by_text >= logs.sum(-1).max(0) - math.log(count) - EXACT).all()  # a sum is no less than its largest term

    nats = {f"GPT {m + 1} alone": logs[m].sum(-1) for m in range(count)}
    nats |= {"mean of the three": mean, "mixture, equal gates at every token": by_token}
    nats |= {"mixture, one member for each text": by_text, "mixture, gates by Bayes at every token": by_posterior}
    nats |= {"the GPT of the text's language": logs.sum(-1)[spoken, np.arange(len(texts))]}
    rows = [["", *(f"language {m + 1}" for m in range(count)), "all"]]
    for name, logs_of_texts in nats.items():
        per_token = -logs_of_texts / (length - 1)
        rows.append([name, *(f"{per_token[spoken == m].mean():.3f}" for m in range(count)), f"{per_token.mean():.3f}"])
    print("nats per token of texts in three languages\n" + table(rows))
    true_gates = posterior[spoken, np.arange(len(texts))].mean(0)  # (T,)
    print(f"mean gate of that GPT at tokens 1, 2, 4, 8, 16: {np.round(true_gates[[0, 1, 3, 7, 15]], 3).tolist()}")

    gates = np.array([0.5, 0.3, 0.2])
    with torch.no_grad():
        start = torch.from_numpy(texts[:1, :4])
        members = np.concatenate([model(start)[:, -1].double().softmax(-1).numpy() for model in models])  # (M, V)
    expected, draws = gates @ members, 200_000
    _, tokens = draw_from_mixture(gates, members, draws, random)
    frequencies = np.bincount(tokens, minlength=vocab_size) / draws
    chi_square = (draws * (frequencies - expected) ** 2 / expected).sum()
    print(f"{draws:,} draws of a member with gates {gates.tolist()}, then of one of its tokens:")
    rows = [["mixture", *(f"{p:.4f}" for p in expected)], ["frequency", *(f"{p:.4f}" for p in frequencies)]]
    print(table([["token", *range(vocab_size)], *rows]))
    print(f"chi-square {chi_square:.1f} with {vocab_size - 1} degrees of freedom")


# ---- 2. the error of a weighted mean


def expert_outputs(experts: "Experts", x: "torch.Tensor") -> "torch.Tensor":
    """Returns each expert's output (M, N, C) for every row of x (N, C)."""
    import torch

    count = experts.config.n_experts
    ends = len(x) * torch.arange(1, count + 1)
    return experts.compute(x.repeat(count, 1), ends).unflatten(0, (count, len(x)))


def expert_gates(experts: "Experts", x: "torch.Tensor") -> "torch.Tensor":
    """Returns each expert's gate (M, N) for every row of x (N, C), 0 if it isn't chosen."""
    import torch

    chosen, gates, logits = experts.route(x)
    return torch.zeros_like(logits).scatter(-1, chosen, gates).T


class Errors(NamedTuple):
    """Squared errors (...) of a weighted mean fbar = sum g f; mean error = error + ambiguity."""

    error: np.ndarray  # (y - fbar)^2
    mean_error: np.ndarray  # sum g (y - f)^2
    ambiguity: np.ndarray  # sum g (f - fbar)^2


def decomposed(gates: np.ndarray, outputs: np.ndarray, y: np.ndarray) -> Errors:
    """Returns the errors for gates (M, ...) that add up to 1, outputs (M, ...) and targets y (...)."""
    mean = (gates * outputs).sum(0)
    mean_error = (gates * (y - outputs) ** 2).sum(0)
    return Errors((y - mean) ** 2, mean_error, (gates * (outputs - mean) ** 2).sum(0))


def show_identity(seed: int) -> None:
    import torch

    from gpt_arc.tables import table
    from model import GPTConfig, make_experts

    generator = torch.Generator().manual_seed(seed)
    config = GPTConfig(n_head=1, n_embd=16, mlp_size=32, n_experts=4, experts_per_token=4)
    experts = make_experts(config).double().eval()
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    x, y = (torch.randn(1000, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    drawn = experts.router.weight.data.clone()
    rows = [["gates", "error of the mean", "mean error", "ambiguity", "mean error - ambiguity - error"]]
    for name, scale in {"equal": 0.0, "by the router": 1.0, "by the router, logits times 10": 10.0}.items():
        experts.router.weight.data.copy_(scale * drawn)
        with torch.no_grad():
            gates, outputs = expert_gates(experts, x)[..., None].numpy(), expert_outputs(experts, x).numpy()
            mixed = experts(x).numpy()
        errors = decomposed(gates, outputs, y.numpy())
        np.testing.assert_allclose((y.numpy() - mixed) ** 2, errors.error, rtol=1e-8, atol=EXACT)
        np.testing.assert_allclose(errors.mean_error, errors.error + errors.ambiguity, rtol=EXACT)
        remainder = np.abs(errors.mean_error - errors.error - errors.ambiguity).max()
        rows.append([name, *(f"{e.mean():.4f}" for e in errors), f"{remainder:.1e} at most"])
    print("squared errors of four random MLPs as experts, for random targets\n" + table(rows))


# ---- 3. linear experts, softmax gates, EM


class Mixture(NamedTuple):
    """For points x (N, D): gates softmax(x router), and experts with y normal around x weights."""

    router: np.ndarray  # (D, M)
    weights: np.ndarray  # (D, M)
    variances: np.ndarray  # (M,)


def log_gates(router: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns the logarithms of the gates (N, M)."""
    logits = x @ router
    return logits - logsumexp(logits, 1)[:, None]


def mixture_mean(mixture: Mixture, x: np.ndarray) -> np.ndarray:
    """Returns the expectation (N,) of y at x (N, D)."""
    return (np.exp(log_gates(mixture.router, x)) * (x @ mixture.weights)).sum(1)


def log_joint(mixture: Mixture, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns log g_m(x) P_m(y | x), (N, M)."""
    squares = (y[:, None] - x @ mixture.weights) ** 2 / mixture.variances
    return log_gates(mixture.router, x) - (squares + np.log(2 * np.pi * mixture.variances)) / 2


def log_likelihood(mixture: Mixture, x: np.ndarray, y: np.ndarray) -> float:
    return logsumexp(log_joint(mixture, x, y), 1).sum()


def responsibilities(mixture: Mixture, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Does the E step: returns each expert's posterior probability (N, M). Unlike the gates it depends on y."""
    joint = log_joint(mixture, x, y)
    return np.exp(joint - logsumexp(joint, 1)[:, None])


def fitted_experts(x: np.ndarray, y: np.ndarray, shares: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Does the experts' M step: least squares weighted by `shares` (N, M), and residual variances of at least `floor`.

    Without a floor the likelihood is unbounded: the variance of an expert through a single point goes to 0.
    """
    roots = np.sqrt(shares)
    weights = [np.linalg.lstsq(root[:, None] * x, root * y)[0] for root in roots.T]
    weights = np.stack(weights, axis=1)
    squares = (shares * (y[:, None] - x @ weights) ** 2).sum(0)
    return weights, np.maximum(squares / np.maximum(shares.sum(0), np.finfo(float).tiny), floor)


def improved_router(router: np.ndarray, x: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Does the gates' M step: one Newton step to increase sum shares log g, halved until it doesn't decrease it.

    It is a step of multinomial logistic regression on shares (N, M) by iteratively reweighted least squares. It need
    not reach the maximum: EM only needs an increase (generalised EM: Dempster, Laird & Rubin, 1977).
    """
    gates, count = np.exp(log_gates(router, x)), router.shape[1]
    slope = x.T @ (shares - gates)  # (D, M)
    between = gates[:, :, None] * (np.eye(count) - gates[:, None, :])  # (N, M, M)
    curvature = np.einsum("nd,nmk,ne->dmek", x, between, x, optimize=True).reshape(slope.size, slope.size)
    # Adding one vector to all experts' logits has no effect: the curvature is singular; lstsq ignores that direction.
    step = np.linalg.lstsq(curvature, slope.ravel())[0].reshape(slope.shape)
    before = (shares * log_gates(router, x)).sum()
    for halvings in range(40):
        moved = router + step / 2**halvings
        if (shares * log_gates(moved, x)).sum() >= before:
            return moved
    return router  # at the maximum up to rounding


def random_start(x: np.ndarray, y: np.ndarray, members: int, random: np.random.Generator) -> Mixture:
    """Returns equal gates, and random lines around the least-squares line, as spread out as the data."""
    line, deviation = np.linalg.lstsq(x, y)[0], y.std()
    weights = line[:, None] + deviation * random.standard_normal((x.shape[1], members))
    return Mixture(np.zeros((x.shape[1], members)), weights, np.full(members, deviation**2))


def em(
    start: Mixture, x: np.ndarray, y: np.ndarray, iterations: int = 2000, floor: float = 1e-4, gain: float = 1e-8
) -> tuple[Mixture, list[float]]:
    """Runs EM until an iteration gains less than `gain` nats; returns the mixture and all log-likelihoods."""
    mixture, history = start, [log_likelihood(start, x, y)]
    while len(history) <= iterations:
        shares = responsibilities(mixture, x, y)
        mixture = Mixture(improved_router(mixture.router, x, shares), *fitted_experts(x, y, shares, floor))
        history.append(log_likelihood(mixture, x, y))
        assert history[-1] >= history[-2] - EXACT * abs(history[-2]), f"iteration {len(history) - 1}: {history[-2:]}"
        if history[-1] - history[-2] < gain:
            break
    return mixture, history


def fit(
    x: np.ndarray, y: np.ndarray, members: int, starts: int, random: np.random.Generator, **settings
) -> tuple[Mixture, list[float]]:
    """Returns the likeliest of the mixtures that EM finds from several starts."""
    ends = (em(random_start(x, y, members, random), x, y, **settings) for _ in range(starts))
    return max(ends, key=lambda end: end[1][-1])


def torch_log_likelihood(parameters: Sequence["torch.Tensor"], x: "torch.Tensor", y: "torch.Tensor") -> "torch.Tensor":
    """Returns `log_likelihood` with gradients, for router (D, M), weights (D, M) and log variances (M,)."""
    import torch

    router, weights, logs = parameters
    experts = torch.distributions.Normal(x @ weights, (logs / 2).exp())
    return ((x @ router).log_softmax(-1) + experts.log_prob(y[:, None])).logsumexp(-1).sum()


def by_adam(
    start: Mixture, x: np.ndarray, y: np.ndarray, updates: int, learning_rate: float = 0.05
) -> tuple[Mixture, list[float]]:
    """Runs Adam on all points, with cosine decay to zero; returns the mixture and all log-likelihoods."""
    import torch

    parameters = [torch.from_numpy(p.copy()).requires_grad_() for p in (*start[:2], np.log(start.variances))]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    xs, ys, history = torch.from_numpy(x), torch.from_numpy(y), []
    for _ in range(updates):
        value = torch_log_likelihood(parameters, xs, ys)
        history.append(value.item())
        optimizer.zero_grad()
        (-value / len(y)).backward()
        optimizer.step()
        schedule.step()
    router, weights, logs = (p.detach().numpy() for p in parameters)
    mixture = Mixture(router, weights, np.exp(logs))
    return mixture, [*history, log_likelihood(mixture, x, y)]


def standard_errors(mixture: Mixture, x: np.ndarray, y: np.ndarray) -> Mixture:
    """Returns the parameters' standard errors, from the curvature at the maximum. The last router column must be 0."""
    import torch

    assert not mixture.router[:, -1].any()
    numbers = mixture.router[:, :-1], mixture.weights, np.log(mixture.variances)
    free = [torch.from_numpy(p.copy()) for p in numbers]
    sizes = [p.numel() for p in free]
    xs, ys = torch.from_numpy(x), torch.from_numpy(y)

    def value(flat: torch.Tensor) -> torch.Tensor:
        router, weights, logs = (part.view_as(p) for part, p in zip(flat.split(sizes), free))
        return torch_log_likelihood((torch.nn.functional.pad(router, (0, 1)), weights, logs), xs, ys)

    information = -torch.autograd.functional.hessian(value, torch.cat([p.flatten() for p in free]))
    errors = torch.linalg.inv(information).diagonal().sqrt().split(sizes)
    router, weights, logs = (e.view_as(p).numpy() for e, p in zip(errors, free))
    return Mixture(np.pad(router, ((0, 0), (0, 1))), weights, logs * mixture.variances)


def ordered(mixture: Mixture, order: Sequence[int]) -> Mixture:
    """Reorders the experts, and shifts the router so that its last column is 0, which leaves the gates unchanged."""
    router, weights, variances = (p[..., list(order)] for p in mixture)
    return Mixture(router - router[:, -1:], weights, variances)


TRUTH = Mixture(
    np.array([[0.0, 2.0, 0.0], [-4.0, -2.0, 0.0]]),  # gates: left, middle, right
    np.array([[2.0, 0.0, -1.0], [1.5, -2.0, 1.0]]),  # intercepts, slopes
    np.array([0.3, 0.5, 0.4]) ** 2,
)


def drawn_from(mixture: Mixture, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draws an expert for each x by the gates, then y from the expert."""
    chosen = draw(np.exp(log_gates(mixture.router, x)), random)
    means = (x @ mixture.weights)[np.arange(len(x)), chosen]
    return means + np.sqrt(mixture.variances[chosen]) * random.standard_normal(len(x))


class Fitted(NamedTuple):
    """The results of EM and Adam on the same data from the same starts."""

    x: np.ndarray
    y: np.ndarray
    mixture: Mixture  # the likeliest of EM's results
    by_em: list[list[float]]  # log-likelihoods from each start
    by_adam: list[list[float]]


def show_em(seed: int, count: int = 2000, restarts: int = 10, updates: int = 1000) -> Fitted:
    from gpt_arc.tables import table

    random = np.random.default_rng(seed)
    x = np.stack((np.ones(count), random.uniform(-3, 3, count)), axis=1)
    y = drawn_from(TRUTH, x, random)
    starts = [random_start(x, y, 3, random) for _ in range(restarts)]
    ends = [em(start, x, y) for start in starts]
    others = [by_adam(start, x, y, updates) for start in starts]
    rows: list[list[Any]] = [["start", "EM", "iterations", "Adam", "updates"]]
    for i, ((_, by_em), (_, adam)) in enumerate(zip(ends, others)):
        rows.append([str(i + 1), f"{by_em[-1]:.4f}", len(by_em) - 1, f"{adam[-1]:.4f}", len(adam) - 1])
    print(
        f"log-likelihood in nats of {count:,} points by a mixture of three lines, from the same starts\n" + table(rows)
    )
    mixture, history = max(ends, key=lambda end: end[1][-1])
    best = max(history[-1] for _, history in others)
    print(f"the truth has {log_likelihood(TRUTH, x, y):.4f}; best of EM minus best of Adam {history[-1] - best:.1e}")

    gates = np.exp(log_gates(mixture.router, x))
    mixture = ordered(mixture, np.argsort((gates * x[:, 1:]).sum(0) / gates.sum(0)).tolist())  # from left to right
    rows = [["", "true", "fitted", "standard error", "z"]]
    for name, *values in zip(Mixture._fields, TRUTH, mixture, standard_errors(mixture, x, y)):
        for index in np.ndindex(values[0].shape):
            true, fitted, error = (float(v[index]) for v in values)
            if error:  # not the router's last column, which is 0
                place = ", ".join(str(i + 1) for i in index)
                rows.append([f"{name} {place}", true, fitted, error, f"{(fitted - true) / error:+.1f}"])
    print("\nparameters, with their deviation in standard errors (z)\n" + table(rows))
    return Fitted(x, y, mixture, [history for _, history in ends], [history for _, history in others])


# ---- 4. gates that are the same for every x


class TreeSplit(NamedTuple):
    """A regression tree: `below` if the feature is at most the threshold, else `above`. A leaf is a number."""

    feature: int
    threshold: float
    below: "TreeSplit | float"
    above: "TreeSplit | float"


def grow(x: np.ndarray, y: np.ndarray, depth: int) -> TreeSplit | float:
    """Grows a tree for y (N,) from x (N, D) by the splits that reduce the squared error most, up to `depth` (CART)."""
    best, place = 0.0, None
    counts = np.arange(1, len(y))
    for feature in range(x.shape[1] if depth else 0):
        order = x[:, feature].argsort(kind="stable")
        values, sums = x[order, feature], (y[order] - y.mean()).cumsum()[:-1]
        gains = np.where(values[1:] > values[:-1], sums**2 / counts + sums**2 / counts[::-1], -1.0)
        if len(gains) and gains.max() > max(best, EXACT):
            at = gains.argmax()
            best, place = gains[at], (feature, (values[at] + values[at + 1]) / 2)
    if place is None:
        return float(y.mean())
    below = x[:, place[0]] <= place[1]
    return TreeSplit(*place, grow(x[below], y[below], depth - 1), grow(x[~below], y[~below], depth - 1))


def predicted(tree: TreeSplit | float, x: np.ndarray) -> np.ndarray:
    """Returns the tree's predictions (N,) for x (N, D)."""
    if not isinstance(tree, TreeSplit):
        return np.full(len(x), tree)
    below, y = x[:, tree.feature] <= tree.threshold, np.empty(len(x))
    y[below], y[~below] = predicted(tree.below, x[below]), predicted(tree.above, x[~below])
    return y


def boosted(x: np.ndarray, y: np.ndarray, members: int, depth: int, rate: float) -> list[TreeSplit | float]:
    """Grows each tree on the residual of y after `rate` times the sum of the trees before (L2 boosting).

    Friedman, 2001; Buehlmann & Yu, 2003. The rate is every member's weight, for every x.
    """
    trees, residual = [], y.copy()
    for _ in range(members):
        trees.append(grow(x, residual, depth))
        residual -= rate * predicted(trees[-1], x)
    return trees


def as_experts(router: np.ndarray, weights: np.ndarray, experts_per_token: int | None = None) -> "Experts":
    """Returns the model's `Experts` whose first output at x (N, D) is the gated mean of linear experts.

    An expert has two hidden units, its weight (D,) and the negative, since relu(a) - relu(-a) = a. With the router that
    EM finds, the output is `mixture_mean`; with zeros it is bagging; with log weights in the row of the constant
    feature it is a fixed weighted mean. experts_per_token = None chooses all.
    """
    import torch

    from model import GPTConfig, make_experts

    width, count = weights.shape
    config = GPTConfig(
        n_head=1, n_embd=width, mlp_size=2, n_experts=count, experts_per_token=experts_per_token or count,
        activation="relu", bias=False,
    )  # fmt: skip
    experts = make_experts(config).double().eval()
    with torch.no_grad():
        experts.router.weight.copy_(torch.from_numpy(router.T))
        experts.up.copy_(torch.from_numpy(np.stack((weights.T, -weights.T), axis=1)))  # (M, 2, D)
        experts.projection.zero_()[:, 0] = torch.tensor([1.0, -1.0])
    return experts


def pieces(x: np.ndarray) -> np.ndarray:
    """Returns three linear functions of x (N, 3), each in its part of the square."""
    region = (x @ [[0.0, 0.2, 0.0], [-2.0, 0.0, 2.0], [-1.0, 2.0, -1.0]]).argmax(1)
    return (x @ [[1.0, -1.0, 0.0], [3.0, 0.0, -3.0], [0.0, 2.0, 3.0]])[np.arange(len(x)), region]


def smooth(x: np.ndarray) -> np.ndarray:
    """Returns waves across the square, a function of x (N, 3)."""
    return 2 * np.sin(3 * x[:, 1]) + np.cos(4 * x[:, 2]) + 2 * x[:, 1] * x[:, 2]


def points(count: int, random: np.random.Generator) -> np.ndarray:
    """Draws points (N, 3): 1, and a position in the square from -1 to 1."""
    return np.concatenate((np.ones((count, 1)), random.uniform(-1, 1, (count, 2))), axis=1)


NOISE = 0.5  # standard deviation of y around the functions above
MEMBERS = 50


def compared(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Fits each kind of learner to x (N, 3) and y (N,), and returns its predictions at `test_x`."""
    resampled = [random.integers(len(x), size=len(x)) for _ in range(MEMBERS)]
    lines = np.stack([np.linalg.lstsq(x[rows], y[rows])[0] for rows in resampled], axis=1)  # (3, M)
    bagged = as_experts(np.zeros_like(lines), lines)
    mixture, _ = fit(x, y, 3, 10, random, gain=1e-3, floor=0.01)
    fixed = np.exp(log_gates(mixture.router, x)).mean(0)
    gated = as_experts(mixture.router, mixture.weights)
    constant = np.log(fixed) * np.array([[1.0], [0.0], [0.0]])
    np.testing.assert_allclose(first_output(bagged, test_x), (test_x @ lines).mean(1), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(first_output(gated, test_x), mixture_mean(mixture, test_x), rtol=1e-8, atol=1e-10)
    trees = boosted(x, y, MEMBERS, 3, 0.1)
    return {
        "one line": test_x @ np.linalg.lstsq(x, y)[0],
        f"{MEMBERS} lines, bagged": first_output(bagged, test_x),
        "one tree of depth 6": predicted(grow(x, y, 6), test_x),
        f"{MEMBERS} trees of depth 6, bagged": np.mean([predicted(grow(x[r], y[r], 6), test_x) for r in resampled], 0),
        f"{MEMBERS} trees of depth 3, boosted": 0.1 * np.sum([predicted(t, test_x) for t in trees], axis=0),
        "3 lines, gates by x (EM)": first_output(gated, test_x),
        "the same lines, averaged gates": first_output(as_experts(constant, mixture.weights), test_x),
        "the same lines, the likeliest only": first_output(as_experts(mixture.router, mixture.weights, 1), test_x),
    }


def first_output(experts: "Experts", x: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return experts(torch.from_numpy(x))[:, 0].numpy()


def show_fixed_gates(seed: int, repeats: int = 20, count: int = 300) -> None:
    from gpt_arc.tables import table

    columns = {}
    for function in (pieces, smooth):
        random, errors = np.random.default_rng(seed), []
        for _ in range(repeats):
            x, test_x = points(count, random), points(2000, random)
            y = function(x) + NOISE * random.standard_normal(count)
            predictions = compared(x, y, test_x, random)
            errors.append([np.mean((values - function(test_x)) ** 2) for values in predictions.values()])
        columns[function.__name__] = [f"{m:.3f} ± {e:.3f}" for m, e in zip(*mean_and_error(np.array(errors)))]
    print(f"squared error against the noise-free values after {count} points; mean of {repeats} data sets")
    print(table([["", *columns], *zip(predictions, *columns.values())]))


# ---- 5. diversity against error


def diverse_errors(
    x: np.ndarray, y: np.ndarray, test_x: np.ndarray, truth: np.ndarray, share: float, depth: int,
    members: int, random: np.random.Generator,
) -> list[float]:  # fmt: skip
    """Returns error, mean error and ambiguity of trees that each see a share of the points, without repetition."""
    size = max(round(share * len(x)), 1)
    samples = [
        np.sort(random.permutation(len(x))[:size]) for _ in range(members)
    ]  # sorted, so that ties are split alike
    outputs = np.stack([predicted(grow(x[rows], y[rows], depth), test_x) for rows in samples])  # (M, N)
    errors = decomposed(np.full((members, 1), 1 / members), outputs, truth)
    np.testing.assert_allclose(errors.error, errors.mean_error - errors.ambiguity, rtol=1e-8, atol=EXACT)
    return [each.mean() for each in errors]


SHARES = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 1.0]
DEPTHS = [1, 2, 3, 4, 5, 6, 8, 10]


class Diversity(NamedTuple):
    """Error, mean error and ambiguity (K, 3), averaged over data sets, with their standard errors (K, 3)."""

    by_share: tuple[np.ndarray, np.ndarray]  # of trees of depth 10, K SHARES
    by_depth: tuple[np.ndarray, np.ndarray]  # of trees that see half of the points, K DEPTHS


def show_diversity(seed: int, repeats: int = 10, count: int = 300, members: int = 20) -> Diversity:
    from gpt_arc.tables import table

    random, by_share, by_depth = np.random.default_rng(seed), [], []
    for _ in range(repeats):
        x, test_x = points(count, random), points(1000, random)
        y = smooth(x) + NOISE * random.standard_normal(count)
        data = (x, y, test_x, smooth(test_x))
        by_share.append([diverse_errors(*data, share, 10, members, random) for share in SHARES])
        by_depth.append([diverse_errors(*data, 0.5, depth, members, random) for depth in DEPTHS])
    diversity = Diversity(mean_and_error(np.array(by_share)), mean_and_error(np.array(by_depth)))
    print(
        f"squared error of {members} trees against the noise-free values; mean of {repeats} data sets of {count} points"
    )
    for name, places, (means, errors) in zip(("share", "depth"), (SHARES, DEPTHS), diversity):
        rows = [[name, *(each.replace("_", " ") for each in Errors._fields)]]
        for place, *values in zip(places, means, errors):
            rows.append([str(place), *(f"{m:.3f} ± {e:.3f}" for m, e in zip(*values))])
        print(table(rows))
    return diversity


# ---- figures


def plot_em(fitted: Fitted, path: Path) -> None:
    """Plots some data with the fitted lines, and each start's log-likelihood relative to the best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    shares = responsibilities(fitted.mixture, fitted.x, fitted.y).argmax(1)
    places = np.stack((np.ones(200), np.linspace(-3, 3, 200)), axis=1)
    gates = np.exp(log_gates(fitted.mixture.router, places))
    for m, line in enumerate((places @ fitted.mixture.weights).T):
        rows = shares[:500] == m  # few enough points to see the lines
        left.plot(fitted.x[:500][rows, 1], fitted.y[:500][rows], f"C{m}.", markersize=2)
        left.plot(places[:, 1], np.where(gates[:, m] > 0.02, line, np.nan), f"C{m}", linewidth=2)
    left.set(xlabel="x", ylabel="y", title="experts where their gate is above .02")
    best = max(max(history) for history in (*fitted.by_em, *fitted.by_adam))
    for name, color, histories in (("Adam", "C7", fitted.by_adam), ("EM", "C0", fitted.by_em)):
        for i, history in enumerate(histories):
            places = np.arange(1, len(history))  # without the start, for the logarithmic axis
            right.plot(places, best - np.array(history[1:]), color, linewidth=0.9, label=None if i else name)
    right.set(xlabel="iterations or updates", ylabel="nats below the best", xscale="log", yscale="log")
    right.set_ylim(bottom=1e-6)
    right.set_title("log-likelihood, ten starts")
    right.legend()
    save(figure, path)


def plot_diversity(diversity: Diversity, path: Path) -> None:
    """Plots the errors against the share of points and the depth of the trees."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels = "ensemble", "mean of members", "ambiguity"
    names = "share of the points that each tree sees", "depth of the trees"
    for axes, name, places, (means, errors) in zip(panels, names, (SHARES, DEPTHS), diversity):
        for label, style, m, e in zip(labels, ("C0o-", "C1s:", "C2^--"), means.T, errors.T):
            axes.errorbar(places, m, e, fmt=style, markersize=3.5, linewidth=1.2, label=label)
        axes.set(xlabel=name, ylim=(0, 2))
    panels[0].set_ylabel("squared error")
    panels[0].legend()
    save(figure, path)


def save(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    parts: dict[str, Callable] = {
        "the likelihood of a mixture": show_likelihood,
        "the error of a weighted mean": show_identity,
        "linear experts by EM": show_em,
        "gates that are the same for every x": show_fixed_gates,
        "diversity against error": show_diversity,
    }
    if options.plot is not None:
        import_extra("matplotlib")
        options.plot.mkdir(parents=True, exist_ok=True)
    results = {}
    for number, (title, show) in enumerate(parts.items(), 1):
        print(f"\n{number}. {title}\n")
        results[show] = show(options.seed)
    if options.plot is not None:
        plot_em(results[show_em], options.plot / "moe_em.png")
        plot_diversity(results[show_diversity], options.plot / "moe_diversity.png")


if __name__ == "__main__":
    entry_point(main)()
