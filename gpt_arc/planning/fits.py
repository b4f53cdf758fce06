"""Laws fitted to the results of a sweep: which runs each law takes, and its figures as JSON."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pydantic import PositiveInt

from gpt_arc.planning.scaling_laws import (
    CHINCHILLA,
    KAPLAN,
    POWER,
    POWER_AND_FLOOR,
    Curve,
    Fit,
    Form,
    Parabola,
    Trend,
    fit,
    frontier,
    parabola,
    trend,
)
from gpt_arc.settings import Count, Positive

EQUAL = 1.05  # runs whose FLOPs differ by less have one budget


class FinishedRun(NamedTuple):
    """What a finished run of a sweep came to. Losses are in nats a token."""

    run: str
    n_layer: Count
    n_embd: Count
    seed: int
    parameters: PositiveInt
    parameters_without_embeddings: PositiveInt
    tokens: PositiveInt
    flops: Positive
    val_loss: Positive
    seconds: float
    curve: list[tuple[PositiveInt, Positive]]  # tokens and val loss of each evaluation
    learning_rate: Positive | None = None  # None: an older version's


@dataclass(frozen=True)
class Laws:
    """What was fitted to a sweep. A law that the runs can't determine is in `missing`, with the reason."""

    embeddings: bool  # whether N counts embeddings and the head
    runs: int
    fits: dict[str, Fit]
    trends: dict[str, Trend]  # the best N by C, by approach
    parabolas: dict[float, Parabola]  # by FLOPs
    missing: dict[str, str]

    def figures(self) -> dict[str, Any]:
        """The figures as JSON."""
        return {
            "embeddings": self.embeddings,
            "runs": self.runs,
            "laws": {
                name: {
                    "constants": each.law.constants,
                    "intervals": each.intervals if each.draws else {},
                    "error": float(np.sqrt(np.mean(each.residuals**2))),
                    "draws": [list(law.constants.values()) for law in each.draws],
                }
                for name, each in self.fits.items()
            },
            "best_size": {name: each._asdict() for name, each in self.trends.items()},
            "parabolas": [{"flops": flops, "best": curve.best} for flops, curve in self.parabolas.items()],
            "missing": self.missing,
        }


def size_of(result: FinishedRun, embeddings: bool) -> int:
    return result.parameters if embeddings else result.parameters_without_embeddings


def same_but_rate(result: FinishedRun) -> tuple[int, ...]:
    """What runs have in common that differ in nothing but the learning rate."""
    return result.tokens, result.n_layer, result.n_embd, result.seed


def best_of_rates(results: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Returns, of runs that differ in nothing but the learning rate, the one with the lowest loss."""
    return [min(group, key=lambda r: r.val_loss) for group in grouped(results, same_but_rate)]


def by_rate(results: Sequence[FinishedRun]) -> list[tuple[FinishedRun, dict[float, float]]]:
    """Returns one of the runs that differ only in their rates, of three or more, and their losses by ascending rate."""
    losses = [
        (rows[0], dict(sorted((row.learning_rate, row.val_loss) for row in rows if row.learning_rate)))
        for rows in grouped(results, same_but_rate)
    ]
    return [(run, each) for run, each in losses if len(each) > 2]


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The learning rate of the lowest loss: of the parabola through the lowest loss and the two beside it.

    None if the lowest loss has the smallest or the largest of the rates, which ascend.
    """
    lowest = int(np.argmin(losses))
    around = slice(lowest - 1, lowest + 2)
    return parabola(rates[around], losses[around]).best if 0 < lowest < len(rates) - 1 else None


def fit_laws(results: Sequence[FinishedRun], embeddings: bool, resamplings: int = 200, seed: int = 0) -> Laws:
    """Fits every law that the results of a sweep determine. N counts `embeddings` and head, or doesn't."""
    sizes = [size_of(result, embeddings) for result in results]
    most = [max(group, key=lambda r: r.tokens) for group in grouped(results, lambda r: size_of(r, embeddings))]
    best = unbeaten(results, lambda r: r.tokens)
    reached = unbeaten(results, lambda r: r.flops)
    fits: dict[str, Fit] = {}
    missing: dict[str, str] = {}

    def attempt(name: str, form: Form, rows: Sequence[FinishedRun], variables: Mapping[str, Sequence[float]]) -> None:
        if any(len(set(values)) < 3 for values in variables.values()):
            missing[name] = "it needs three values or more of each of its variables"
            return
        try:
            each = fit(form, variables, [row.val_loss for row in rows], resamplings, seed)
        except ValueError as error:
            missing[name] = str(error)
            return
        if each.law.constants.get("exponent", 1) <= 0:  # of runs with equal FLOPs, L(N) has too few tokens at each N
            missing[name] = "the losses of these runs don't fall as it grows"
        else:
            fits[name] = each

    for name, rows, x in (
        ("N", most, [size_of(r, embeddings) for r in most]),
        ("D", best, [r.tokens for r in best]),
        ("C", reached, [r.flops for r in reached]),
    ):
        attempt(f"L({name})", POWER, rows, {"x": x})
        attempt(f"L({name}) with a floor", POWER_AND_FLOOR, rows, {"x": x})
    pairs = {"n": sizes, "d": [r.tokens for r in results]}
    attempt("L(N, D), Kaplan's form", KAPLAN, results, pairs)
    attempt("L(N, D), Chinchilla's form", CHINCHILLA, results, pairs)
    trends, parabolas = best_sizes(results, embeddings, missing)
    if (law := fits.get("L(N, D), Chinchilla's form")) is not None:
        alpha, beta = law.law.constants["alpha"], law.law.constants["beta"]
        g = (alpha * law.law.constants["A"] / (beta * law.law.constants["B"])) ** (1 / (alpha + beta))
        exponent = beta / (alpha + beta)
        trends["approach 3"] = Trend(g / 6**exponent, exponent)
    return Laws(embeddings, len(results), fits, trends, parabolas, missing)


def unbeaten(results: Sequence[FinishedRun], cost: Callable[[FinishedRun], float]) -> list[FinishedRun]:
    """Returns the runs with a lower loss than every run that costs as little or less."""
    return [r for r in results if all(r.val_loss <= s.val_loss for s in results if cost(s) <= cost(r))]


def best_sizes(
    results: Sequence[FinishedRun], embeddings: bool, missing: dict[str, str]
) -> tuple[dict[str, Trend], dict[float, Parabola]]:
    """Chinchilla's approaches 1 and 2: the best N as a power of C."""
    trends: dict[str, Trend] = {}
    parabolas: dict[float, Parabola] = {}
    curves = [
        Curve(
            size_of(r, embeddings),
            np.array([tokens * r.flops / r.tokens for tokens, _ in r.curve]),
            np.array([loss for _, loss in r.curve]),
        )
        for r in results
        if len(r.curve) > 1
    ]
    try:
        if not curves:
            raise ValueError("runs were evaluated at their ends only: lower eval_interval")
        flops, best = frontier(curves)
        if len(set(best)) < 2:
            raise ValueError("one size is the best at every budget")
        trends["approach 1"] = trend(flops, best)
    except ValueError as error:
        missing["approach 1"] = str(error)
    for rows in budgets(results):
        budget = float(np.exp(np.mean(np.log([r.flops for r in rows]))))
        if len({size_of(r, embeddings) for r in rows}) < 3:
            continue
        try:
            parabolas[budget] = parabola([size_of(r, embeddings) for r in rows], [r.val_loss for r in rows])
        except ValueError as error:
            missing[f"the parabola of {budget:.2g} FLOPs"] = str(error)
    try:
        if len(parabolas) < 2:
            raise ValueError("it needs the parabolas of two budgets or more, of three sizes each")
        trends["approach 2"] = trend(list(parabolas), [curve.best for curve in parabolas.values()])
    except ValueError as error:
        missing["approach 2"] = str(error)
    return trends, parabolas


def grouped(results: Sequence[FinishedRun], key: Callable[[FinishedRun], Any]) -> list[list[FinishedRun]]:
    return [list(group) for _, group in itertools.groupby(sorted(results, key=key), key)]


def budgets(results: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """Groups the runs of about equal FLOPs."""
    groups: list[list[FinishedRun]] = []
    for result in sorted(results, key=lambda r: r.flops):
        if groups and result.flops <= EQUAL * groups[-1][0].flops:
            groups[-1].append(result)
        else:
            groups.append([result])
    return groups
