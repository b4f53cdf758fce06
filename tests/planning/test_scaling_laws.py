"""Scaling laws: published figures, and constants that come back from losses made with them."""

import numpy as np
import pytest

from gpt_arc.planning import scaling_laws
from gpt_arc.planning.scaling_laws import (
    CHINCHILLA,
    KAPLAN,
    PF_DAY,
    POWER,
    POWER_AND_FLOOR,
    PUBLISHED,
    Curve,
    Law,
    fit,
    frontier,
    kaplan_optimum,
    optimum,
    parabola,
    trend,
)

pytest.importorskip("scipy")
BESIROGLU = PUBLISHED["besiroglu"]


def runs(count=240, seed=0):
    """Parameters and tokens of Hoffmann's range."""
    generator = np.random.default_rng(seed)
    n = np.exp(generator.uniform(np.log(4e7), np.log(1.6e10), count))
    return {"n": n, "d": np.exp(generator.uniform(np.log(3e9), np.log(5e11), count))}


@pytest.mark.parametrize(
    ("parameters", "loss"),
    [(125e6, 2.782), (350e6, 2.573), (760e6, 2.426), (1.3e9, 2.329), (2.7e9, 2.203), (6.7e9, 2.056), (13e9, 1.955),
     (175e9, 1.604)],
)  # fmt: skip
def test_kaplan_s_loss_at_gpt3_s_sizes(parameters, loss):
    assert round(float(PUBLISHED["kaplan_n"].loss(x=parameters)), 3) == loss


@pytest.mark.parametrize("pf_days", [1e-3, 1.0, 3640.0])
def test_gpt3_s_loss_by_compute(pf_days):
    assert PUBLISHED["gpt3_c"].loss(x=pf_days * PF_DAY) == pytest.approx(2.57 * pf_days**-0.048, rel=1e-12)


def test_kaplan_s_other_laws_by_hand():
    assert PUBLISHED["kaplan_d"].loss(x=300e9) == pytest.approx((5.4e13 / 300e9) ** 0.095)
    assert PUBLISHED["kaplan_c"].loss(x=10 * PF_DAY) == pytest.approx((3.1e8 / 10) ** 0.050)
    joint = ((6.4e13 / 1e9) ** (0.076 / 0.103) + 1.8e13 / 2e10) ** 0.103
    assert PUBLISHED["kaplan"].loss(n=1e9, d=2e10) == pytest.approx(joint)


@pytest.mark.parametrize(
    ("law", "billions", "tokens_per_parameter"), [("hoffmann", 32.19, 92.65), ("besiroglu", 72.25, 18.39)]
)
def test_chinchilla_s_budget_is_split_as_published(law, billions, tokens_per_parameter):
    """At Gopher's 5.76e23 FLOPs; the split is also the lowest of all by brute force."""
    law = PUBLISHED[law]
    best = optimum(law.constants, 5.76e23)
    assert best.n / 1e9 == pytest.approx(billions, rel=1e-3)
    assert best.tokens_per_parameter == pytest.approx(tokens_per_parameter, rel=1e-3)
    assert 6 * best.n * best.d == pytest.approx(5.76e23)
    sizes = best.n * np.geomspace(0.1, 10, 2001)
    losses = law.loss(n=sizes, d=5.76e23 / 6 / sizes)
    assert sizes[losses.argmin()] == pytest.approx(best.n, rel=2e-3)


def test_kaplan_s_split_gives_most_of_the_compute_to_the_size():
    small, large = kaplan_optimum(PF_DAY), kaplan_optimum(1000 * PF_DAY)
    assert small.n == pytest.approx(1.3e9) and large.n / small.n == pytest.approx(1000**0.73)


LAWS = {
    "power": Law(POWER, {"exponent": 0.076, "scale": 8.8e13}),
    "floor": Law(POWER_AND_FLOOR, {"exponent": 0.3, "scale": 1e7, "floor": 1.7}),
    "kaplan": PUBLISHED["kaplan"],
    "hoffmann": PUBLISHED["hoffmann"],
    "besiroglu": BESIROGLU,
}


@pytest.mark.parametrize("name", LAWS)
def test_constants_come_back_from_losses_without_noise(name):
    law, variables = LAWS[name], runs(60)
    variables = variables if law.form in (KAPLAN, CHINCHILLA) else {"x": variables["n"]}
    found = fit(law.form, variables, law.loss(**variables), resamplings=0)
    assert found.law.constants == pytest.approx(law.constants, rel=1e-6)
    assert np.abs(found.residuals).max() < 1e-9


def test_one_bad_run_hardly_moves_a_fit():
    variables = runs(60)
    losses = BESIROGLU.loss(**variables)
    losses[7] *= 1.5
    found = fit(CHINCHILLA, variables, losses, resamplings=0)
    assert found.law.constants["alpha"] == pytest.approx(0.3478, rel=0.01)
    assert found.residuals[7] == pytest.approx(np.log(1.5), rel=0.01)


@pytest.mark.slow
def test_noisy_losses_give_predictions_and_intervals_that_hold():
    """240 runs with 1% of noise, 20 draws: loss within .5%, the best size within 10%, truth in 90% of intervals.

    The budget lies among the runs' own, 7e17 to 5e22 FLOPs. The Cramer-Rao bound of N* is 2.8% there, but 5.2% at 5e21.
    """
    variables, budget, figures = runs(), 5e20, {}
    for name in BESIROGLU.constants:
        figures[name] = lambda law, name=name: law.constants[name]
    figures["loss"] = lambda law: float(law.loss(n=5e9, d=1e11))
    figures["N*"] = lambda law: optimum(law.constants, budget).n
    covered = dict.fromkeys(figures, 0)
    for draw in range(20):
        noise = np.random.default_rng(100 + draw).normal(0, 0.01, 240)
        found = fit(CHINCHILLA, variables, BESIROGLU.loss(**variables) * np.exp(noise), resamplings=200, seed=draw)
        assert figures["loss"](found.law) == pytest.approx(figures["loss"](BESIROGLU), rel=0.005)
        assert figures["N*"](found.law) == pytest.approx(figures["N*"](BESIROGLU), rel=0.10)
        for name, figure in figures.items():
            low, high = found.interval(figure)
            covered[name] += low <= figure(BESIROGLU) <= high
    assert min(covered.values()) >= 18


def test_the_next_run_s_interval_has_the_runs_own_noise():
    """Of a law that is known exactly, it is that of the residuals, scaled for the constants fitted to them."""
    noise = np.random.default_rng(0).normal(0, 0.01, 4000)
    exact = scaling_laws.Fit(BESIROGLU, [BESIROGLU] * 20, noise)
    low, high = exact.next_run(lambda law: 2.0)
    assert np.log([low / 2, high / 2]) == pytest.approx([-0.0196, 0.0196], rel=0.05)
    few = scaling_laws.Fit(BESIROGLU, [BESIROGLU] * 4000, noise[:6])  # one degree of freedom
    low, high = few.next_run(lambda law: 2.0)
    assert np.log(high / low) == pytest.approx(6**0.5 * np.ptp(noise[:6]), rel=1e-6)


def test_bad_runs_are_refused():
    with pytest.raises(ValueError, match="2 runs can't determine the 3 constants"):
        fit(POWER_AND_FLOOR, {"x": [1.0, 2.0]}, [3.0, 2.0])
    for losses in ([3.0, np.nan, 2.0], [3.0, 0.0, 2.0]):
        with pytest.raises(ValueError, match="positive, finite"):
            fit(POWER, {"x": [1.0, 2.0, 3.0]}, losses)


def test_derivatives_by_complex_steps_equal_differences():
    x = np.log(np.stack(list(runs(5).values())))
    theta = np.array([0.5, 6.0, 7.0, 0.34, 0.28])
    exact = scaling_laws._jacobian(CHINCHILLA, theta, x)
    for i, step in enumerate(1e-6 * np.eye(5)):
        difference = CHINCHILLA.log_loss(theta + step, *x) - CHINCHILLA.log_loss(theta - step, *x)
        assert exact[:, i] == pytest.approx(difference / 2e-6, rel=1e-5)


def test_the_frontier_and_parabolas_find_the_best_size_of_a_known_law():
    """Approaches 1 and 2 on exact losses against the closed form."""
    constants = BESIROGLU.constants
    budgets, exponent = [1e19, 1e20, 1e21], constants["beta"] / (constants["alpha"] + constants["beta"])
    bests = []
    for flops in budgets:
        sizes = optimum(constants, flops).n * np.geomspace(0.7, 1.4, 7)
        bests.append(parabola(sizes, BESIROGLU.loss(n=sizes, d=flops / 6 / sizes)).best)
        assert bests[-1] == pytest.approx(optimum(constants, flops).n, rel=0.02)
    assert trend(budgets, bests).exponent == pytest.approx(exponent, rel=0.01)
    flops = np.geomspace(1e18, 1e22, 400)
    curves = [Curve(n, flops, BESIROGLU.loss(n=n, d=flops / 6 / n)) for n in np.geomspace(1e7, 1e11, 81)]
    reached, best = frontier(curves)
    assert trend(reached, best).exponent == pytest.approx(exponent, rel=0.02)
    assert best == pytest.approx([optimum(constants, c).n for c in reached], rel=0.07)  # sizes are 12% apart


def test_parabolas_need_a_minimum_between_their_sizes():
    with pytest.raises(ValueError, match="three sizes"):
        parabola([1e6, 1e6, 2e6], [3.0, 3.0, 2.9])
    with pytest.raises(ValueError, match="add sizes on that side"):
        parabola([1e6, 2e6, 4e6, 8e6], [3.0, 2.5, 2.2, 2.1])
    with pytest.raises(ValueError, match="two different budgets"):
        trend([1e6, 1e6], [1, 2])
