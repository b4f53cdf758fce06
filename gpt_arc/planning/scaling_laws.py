"""Scaling laws: formulas for the loss, published constants, fits with intervals, and the best use of a compute budget.

Losses are in nats a token. N counts parameters, D tokens and C FLOPs of training; C = 6 N D where a law needs one.
Kaplan counts N without embeddings, Hoffmann and GPT-3's table with them.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt_arc.extras import import_extra

PF_DAY = 1e15 * 86_400  # FLOPs
HUBER = 1e-3  # log-residuals beyond it count linearly, as in arXiv:2203.15556, D.3
STARTS = 8  # of the grid, the best of which are followed to their minimum
STEP = 1e-20  # imaginary, of derivatives by complex steps, which are exact


class Form(NamedTuple):
    """A formula for the loss.

    `log_loss` takes the values to fit, one for each of `constants`, as logarithms for those in `scales`, and then the
    logarithms of `variables`. `starts` has the values, as fitted, from which a fit searches.
    """

    constants: tuple[str, ...]
    scales: frozenset[str]
    variables: tuple[str, ...]
    log_loss: Callable[..., Any]
    starts: Mapping[str, Sequence[float]]


def log_sum_exp(*terms: Any) -> Any:
    """Logarithm of a sum of exponentials; of complex numbers, for derivatives by complex steps."""
    largest = functools.reduce(np.maximum, (np.real(term) for term in terms))
    return largest + np.log(sum(np.exp(term - largest) for term in terms))


def _power(theta: Any, x: Any) -> Any:
    exponent, scale = theta
    return exponent * (scale - x)


def _power_and_floor(theta: Any, x: Any) -> Any:
    exponent, scale, floor = theta
    return log_sum_exp(exponent * (scale - x), floor)


def _kaplan(theta: Any, n: Any, d: Any) -> Any:
    a_n, a_d, n_c, d_c = theta
    return a_d * log_sum_exp(a_n / a_d * (n_c - n), d_c - d)


def _chinchilla(theta: Any, n: Any, d: Any) -> Any:
    e, a, b, alpha, beta = theta
    return log_sum_exp(e, a - alpha * n, b - beta * d)


EXPONENTS = (0.05, 0.1, 0.2, 0.4, 0.7)
# L = (scale / x)^exponent, of one variable x; and the same above a floor, the loss that no size or compute removes
POWER = Form(
    ("exponent", "scale"), frozenset({"scale"}), ("x",), _power, {"exponent": EXPONENTS, "scale": (5, 15, 30, 50)}
)
POWER_AND_FLOOR = Form(
    ("exponent", "scale", "floor"),
    frozenset({"scale", "floor"}),
    ("x",),
    _power_and_floor,
    {**POWER.starts, "floor": (-2, -1, 0, 0.5, 1)},
)
# L = [(n_c / N)^(a_n / a_d) + d_c / D]^a_d (arXiv:2001.08361, eq. 1.5)
KAPLAN = Form(
    ("a_n", "a_d", "n_c", "d_c"),
    frozenset({"n_c", "d_c"}),
    ("n", "d"),
    _kaplan,
    {"a_n": EXPONENTS[:4], "a_d": EXPONENTS[:4], "n_c": (10, 20, 30, 40), "d_c": (10, 20, 30, 40)},
)
# L = E + A / N^alpha + B / D^beta (arXiv:2203.15556, eq. 10)
CHINCHILLA = Form(
    ("E", "A", "B", "alpha", "beta"),
    frozenset({"E", "A", "B"}),
    ("n", "d"),
    _chinchilla,
    {
        "E": (-1, 0, 0.5, 1),
        "A": (0, 5, 10, 15, 20),
        "B": (0, 5, 10, 15, 20),
        "alpha": (0.1, 0.3, 0.5, 0.8),
        "beta": (0.1, 0.3, 0.5, 0.8),
    },
)


@dataclass(frozen=True)
class Law:
    """A form with constants. `source` says where they come from."""

    form: Form
    constants: Mapping[str, float]
    source: str = ""

    def loss(self, **variables: ArrayLike) -> Any:
        """Returns the loss for variables by name, numbers or arrays."""
        named = ((name, self.constants[name]) for name in self.form.constants)
        theta = [np.log(value) if name in self.form.scales else value for name, value in named]
        return np.exp(self.form.log_loss(theta, *(np.log(variables[name]) for name in self.form.variables)))


KAPLAN_SOURCE = "Kaplan et al., arXiv:2001.08361"
PUBLISHED = {
    "kaplan_n": Law(POWER, {"exponent": 0.076, "scale": 8.8e13}, KAPLAN_SOURCE),  # x: parameters
    "kaplan_d": Law(POWER, {"exponent": 0.095, "scale": 5.4e13}, KAPLAN_SOURCE),  # x: tokens
    "kaplan_c": Law(POWER, {"exponent": 0.050, "scale": 3.1e8 * PF_DAY}, KAPLAN_SOURCE),  # x: FLOPs, best spent
    "kaplan": Law(KAPLAN, {"a_n": 0.076, "a_d": 0.103, "n_c": 6.4e13, "d_c": 1.8e13}, KAPLAN_SOURCE),
    "gpt3_c": Law(POWER, {"exponent": 0.048, "scale": 2.57 ** (1 / 0.048) * PF_DAY}, "GPT-3, arXiv:2005.14165"),
    "hoffmann": Law(
        CHINCHILLA,
        {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
        "Hoffmann et al., arXiv:2203.15556, approach 3",
    ),
    "besiroglu": Law(
        CHINCHILLA,
        {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
        "Besiroglu et al., arXiv:2404.10102",
    ),
}


class Optimum(NamedTuple):
    """The parameters and tokens that reach the lowest loss with C = 6 N D FLOPs."""

    n: float
    d: float

    @property
    def tokens_per_parameter(self) -> float:
        return self.d / self.n


def optimum(constants: Mapping[str, float], flops: float) -> Optimum:
    """The best split of `flops` by a law of the form CHINCHILLA (arXiv:2203.15556, eq. 4)."""
    alpha, beta = constants["alpha"], constants["beta"]
    g = (alpha * constants["A"] / (beta * constants["B"])) ** (1 / (alpha + beta))
    n = g * (flops / 6) ** (beta / (alpha + beta))
    return Optimum(n, flops / 6 / n)


def kaplan_optimum(flops: float) -> Optimum:
    """The best split by Kaplan's table 6: N = 1.3e9 C^.73, C in PF-days, here with D = C / 6 N."""
    n = 1.3e9 * (flops / PF_DAY) ** 0.73
    return Optimum(n, flops / 6 / n)


# ---- fits


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs, with the constants of `draws`, resamplings of the runs, for intervals."""

    law: Law
    draws: Sequence[Law]
    residuals: NDArray[np.float64] = field(repr=False)  # log(loss / fitted loss) of each run

    def interval(self, figure: Callable[[Law], float], share: float = 0.95) -> tuple[float, float]:
        """Returns the bounds that hold the middle `share` of a figure over the resamplings (percentile bootstrap)."""
        values = [figure(law) for law in self.draws]
        low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)

    def next_run(self, figure: Callable[[Law], float], share: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Returns the bounds of a run's loss, which differs from the law's `figure` as the fitted runs' losses do."""
        freedom = len(self.residuals) - len(self.law.constants)
        residuals = self.residuals * np.sqrt(len(self.residuals) / max(freedom, 1))
        noise = np.random.default_rng(seed).choice(residuals, (len(self.draws), len(residuals)))
        losses = np.array([figure(law) for law in self.draws])[:, None] * np.exp(noise)
        low, high = np.quantile(losses, [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95% interval of each constant."""
        return {name: self.interval(lambda law, name=name: law.constants[name]) for name in self.law.constants}


def fit(
    form: Form, variables: Mapping[str, ArrayLike], losses: ArrayLike, resamplings: int = 200, seed: int = 0
) -> Fit:
    """Fits the constants of `form` to the losses (R,) of runs, whose `variables` are (R,) each.

    Minimises the sum of Huber losses of the logarithms' differences: by L-BFGS from the best points of a grid, then by
    Gauss-Newton steps from the lowest end to full precision. Raises ValueError for fewer runs than constants, and for
    values that aren't positive.
    """
    values = np.stack([np.asarray(variables[name], dtype=float) for name in form.variables])
    target = np.asarray(losses, dtype=float)
    if target.size < len(form.constants):
        raise ValueError(f"{target.size} runs can't determine the {len(form.constants)} constants {form.constants}")
    if not all(np.isfinite(each).all() and (each > 0).all() for each in (values, target)):
        raise ValueError("losses, parameters, tokens and FLOPs of a fit must be positive, finite numbers")
    x, y = np.log(values), np.log(target)
    theta = _polished(form, x, y, _searched(form, x, y))
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(resamplings):
        rows = generator.integers(len(y), size=len(y))
        draws.append(_law(form, _polished(form, x[:, rows], y[rows], theta)))
    return Fit(_law(form, theta), draws, y - form.log_loss(theta, *x))


def _law(form: Form, theta: NDArray[np.float64]) -> Law:
    with np.errstate(over="ignore"):  # a resampling of few runs may leave a scale undetermined
        constants = {n: float(np.exp(v) if n in form.scales else v) for n, v in zip(form.constants, theta)}
    return Law(form, constants, "a fit")


def _jacobian(form: Form, theta: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Derivatives (R, P) of the logarithms of R losses by P constants."""
    steps = theta + 1j * STEP * np.eye(len(theta))
    return np.stack([np.imag(form.log_loss(step, *x)) / STEP for step in steps], axis=1)


def _searched(form: Form, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    optimize = import_extra("scipy.optimize")

    def objective(theta: NDArray[np.float64]) -> float:
        residuals = np.abs(form.log_loss(theta, *x) - y)
        return float(np.where(residuals < HUBER, residuals**2 / 2, HUBER * (residuals - HUBER / 2)).sum()) / HUBER

    def gradient(theta: NDArray[np.float64]) -> NDArray[np.float64]:
        residuals = form.log_loss(theta, *x) - y
        return np.clip(residuals, -HUBER, HUBER) @ _jacobian(form, theta, x) / HUBER

    grid = [np.array(start, dtype=float) for start in itertools.product(*(form.starts[n] for n in form.constants))]
    starts = sorted(grid, key=objective)[:STARTS]
    ends = [optimize.minimize(objective, start, jac=gradient, method="L-BFGS-B") for start in starts]
    return min(ends, key=lambda end: end.fun).x


def _polished(
    form: Form, x: NDArray[np.float64], y: NDArray[np.float64], theta: NDArray[np.float64]
) -> NDArray[np.float64]:
    optimize = import_extra("scipy.optimize")
    return optimize.least_squares(
        lambda theta: form.log_loss(theta, *x) - y,
        theta,
        jac=lambda theta: _jacobian(form, theta, x),
        loss="huber",
        f_scale=HUBER,
        x_scale="jac",
        **dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14),
    ).x


# ---- the best size at a budget, without a formula for the loss (arXiv:2203.15556, approaches 1 and 2)


class Trend(NamedTuple):
    """y = factor * x^exponent, a straight line of logarithms by least squares."""

    factor: float
    exponent: float

    def __call__(self, x: ArrayLike) -> Any:
        return self.factor * np.asarray(x, dtype=float) ** self.exponent


def trend(x: ArrayLike, y: ArrayLike) -> Trend:
    """Fits a `Trend` to two points or more. Raises ValueError for fewer."""
    x, y = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    if len(set(x.tolist())) < 2:
        raise ValueError("a trend needs two different budgets or more")
    exponent, factor = np.polyfit(x, y, 1)
    return Trend(float(np.exp(factor)), float(exponent))


class Curve(NamedTuple):
    """The loss of a run of `n` parameters after `flops`, ascending."""

    n: float
    flops: NDArray[np.float64]
    losses: NDArray[np.float64]


def frontier(curves: Sequence[Curve], budgets: int = 100) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Approach 1: for logarithmically spaced FLOPs, the size whose curve is the lowest there.

    Returns FLOPs (S,) and sizes (S,). Curves are straight lines of logarithms between their points.
    """
    low, high = min(c.flops[0] for c in curves), max(c.flops[-1] for c in curves)
    flops = np.geomspace(low, high, budgets)
    losses = np.stack(
        [np.interp(np.log(flops), np.log(c.flops), np.log(c.losses), left=np.inf, right=np.inf) for c in curves]
    )
    reached = np.isfinite(losses.min(0))
    return flops[reached], np.array([c.n for c in curves])[losses.argmin(0)][reached]


class Parabola(NamedTuple):
    """loss = a (log N)^2 + b log N + c of runs of equal FLOPs."""

    a: float
    b: float
    c: float

    @property
    def best(self) -> float:
        """The size of the lowest loss."""
        return float(np.exp(-self.b / (2 * self.a)))

    def __call__(self, n: ArrayLike) -> Any:
        return np.polyval(self, np.log(np.asarray(n, dtype=float)))


def parabola(n: ArrayLike, losses: ArrayLike) -> Parabola:
    """Approach 2: the parabola through the losses of sizes that were trained with equal FLOPs.

    Raises ValueError for fewer than three sizes, and where the lowest loss isn't between the smallest and the largest.
    """
    n = np.asarray(n, dtype=float)
    if len(set(n.tolist())) < 3:
        raise ValueError(f"a parabola needs three sizes or more, and there are {len(set(n.tolist()))}")
    a, b, c = np.polyfit(np.log(n), np.asarray(losses, dtype=float), 2)
    curve = Parabola(float(a), float(b), float(c))
    if a <= 0 or not n.min() < curve.best < n.max():
        raise ValueError("the lowest loss is not between the smallest and the largest size: add sizes on that side")
    return curve
