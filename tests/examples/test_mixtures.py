"""examples/mixtures.py against closed forms, enumeration, scipy and scikit-learn."""

import functools
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from sklearn.ensemble import BaggingRegressor, GradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.tree import DecisionTreeRegressor

import mixtures
from helpers import ROOT, randomised, refusal
from mixtures import Mixture
from model import GPT, GPTConfig, make_experts

EXACT = dict(rtol=1e-9, atol=1e-10)


@pytest.fixture
def random():
    return np.random.default_rng(0)


# ---- 1. the likelihood of a mixture


@pytest.fixture(scope="module")
def gpts():
    """Three GPTs of four tokens that differ widely."""
    config = GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=2, n_embd=8)
    return [randomised(GPT(config), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def every_text():
    """Each text of five tokens that begins with token 2."""
    return np.array([(2, *tokens) for tokens in itertools.product(range(4), repeat=4)])


def test_token_log_probabilities_match_the_models(gpts, every_text):
    actual = mixtures.token_log_probabilities(gpts, every_text)
    for m, n, t in itertools.product(range(3), (0, 77, 255), range(4)):
        tokens = torch.from_numpy(every_text[n : n + 1])
        logits = gpts[m](tokens[:, : t + 1])[0, -1].double()
        assert actual[m, n, t] == pytest.approx(logits.log_softmax(0)[tokens[0, t + 1]].item(), abs=1e-5)


def test_a_mixture_of_gpts_gives_all_texts_a_probability_of_one(gpts, every_text):
    logs, prior = mixtures.token_log_probabilities(gpts, every_text), np.array([0.5, 0.3, 0.2])
    by_text = mixtures.mixture_log_likelihood(prior[:, None], logs.sum(-1))
    by_token = mixtures.mixture_log_likelihood(prior[:, None, None], logs).sum(-1)
    for actual, expected in (
        (by_text, sum(g * np.exp(member).prod(-1) for g, member in zip(prior, logs))),
        (by_token, sum(g * np.exp(member) for g, member in zip(prior, logs)).prod(-1)),
    ):
        np.testing.assert_allclose(np.exp(actual), expected, **EXACT)
        assert np.exp(actual).sum() == pytest.approx(1, abs=1e-6)
    assert abs(by_text - by_token).max() > 0.1  # the two mixtures differ


def test_bayes_gates_at_every_token_equal_one_member_for_each_text(gpts, every_text):
    logs, prior = mixtures.token_log_probabilities(gpts, every_text), np.array([0.5, 0.3, 0.2])
    gates = mixtures.posterior_gates(prior, logs)
    np.testing.assert_allclose(gates[:, :, 0], np.broadcast_to(prior[:, None], (3, 256)), **EXACT)
    joint = prior[:, None] * np.exp(logs[:, :, 0]) * np.exp(logs[:, :, 1])  # before the third token
    np.testing.assert_allclose(gates[:, :, 2], joint / joint.sum(0), **EXACT)
    together = mixtures.mixture_log_likelihood(gates, logs).sum(-1)
    np.testing.assert_allclose(together, np.log(prior @ np.exp(logs.sum(-1))), **EXACT)


def test_the_gap_of_jensen_s_inequality_is_a_kl_divergence(gpts, every_text):
    """log sum g P - sum g log P = KL(g || responsibilities) >= 0."""
    logs, gates = mixtures.token_log_probabilities(gpts, every_text).sum(-1), np.array([0.5, 0.3, 0.2])
    gap = mixtures.mixture_log_likelihood(gates[:, None], logs) - gates @ logs
    after = special.softmax(np.log(gates)[:, None] + logs, axis=0)
    np.testing.assert_allclose(gap, stats.entropy(gates[:, None], after, axis=0), **EXACT)
    assert gap.min() > 0
    alike = np.broadcast_to(logs[:1], logs.shape)
    np.testing.assert_allclose(mixtures.mixture_log_likelihood(gates[:, None], alike), logs[0], **EXACT)


def test_drawing_a_member_then_a_token_draws_from_the_mixture(random):
    gates, members = np.array([0.6, 0.0, 0.4]), random.dirichlet(np.ones(5), size=3)
    chosen, tokens = mixtures.draw_from_mixture(gates, members, 50_000, random)
    assert not (chosen == 1).any()
    actual = np.bincount(tokens, minlength=5)
    assert stats.chisquare(actual, 50_000 * gates @ members).pvalue > 0.001
    assert stats.chisquare(actual, 50_000 * members[0]).pvalue < 1e-6
    counts = np.histogram2d(chosen, tokens, bins=(3, 5))[0][[0, 2]]
    assert stats.chisquare(counts.ravel(), 50_000 * (gates[:, None] * members)[[0, 2]].ravel()).pvalue > 0.001


def test_texts_have_the_frequencies_of_their_language(random):
    languages = mixtures.Languages(random.dirichlet(np.ones(3), size=(2, 3)))
    texts = languages.texts(np.repeat([0, 1], 5000), 4, random)
    for language, member in enumerate((texts[:5000], texts[5000:])):
        for token in range(3):
            after = member[:, 1:][member[:, :-1] == token]
            counts = np.bincount(after, minlength=3)
            assert stats.chisquare(counts, len(after) * languages.transitions[language, token]).pvalue > 0.001


# ---- 2. the error of a weighted mean


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_gates_and_outputs_sum_to_the_experts_output(chosen, random):
    """A single chosen expert has its probability as gate, so the gates sum to less than 1."""
    config = GPTConfig(n_head=1, n_embd=6, mlp_size=5, n_experts=4, experts_per_token=chosen, activation="gelu")
    experts = randomised(make_experts(config)).double()
    x = torch.from_numpy(random.standard_normal((9, 6)))
    with torch.no_grad():
        outputs, gates = mixtures.expert_outputs(experts, x), mixtures.expert_gates(experts, x)
        for e in range(4):
            hidden = torch.nn.functional.gelu(x @ experts.up[e].T + experts.up_bias[e])
            torch.testing.assert_close(outputs[e], hidden @ experts.projection[e].T + experts.projection_bias[e])
        torch.testing.assert_close((gates[..., None] * outputs).sum(0), experts(x))
    assert ((gates > 0).sum(0) == chosen).all()


def test_error_and_ambiguity_sum_to_the_mean_error(random):
    config = GPTConfig(n_head=1, n_embd=6, mlp_size=5, n_experts=4, experts_per_token=4)
    experts = randomised(make_experts(config)).double()
    x, y = torch.from_numpy(random.standard_normal((7, 6))), random.standard_normal((7, 6))
    with torch.no_grad():
        outputs, gates = mixtures.expert_outputs(experts, x).numpy(), mixtures.expert_gates(experts, x).numpy()
        actual = mixtures.decomposed(gates[..., None], outputs, y)
        np.testing.assert_allclose(actual.error, (y - experts(x).numpy()) ** 2, **EXACT)
    np.testing.assert_allclose(actual.mean_error, actual.error + actual.ambiguity, **EXACT)
    for n, c in np.ndindex(y.shape):
        member, weights = outputs[:, n, c], gates[:, n]
        assert actual.mean_error[n, c] == pytest.approx(np.average((y[n, c] - member) ** 2, weights=weights))
        assert actual.ambiguity[n, c] == pytest.approx(np.cov(member, aweights=weights, ddof=0))
    assert actual.ambiguity.min() > 0


# ---- 3. linear experts, softmax gates, EM


@pytest.fixture
def data(random):
    """300 points of the known mixture."""
    x = np.stack((np.ones(300), random.uniform(-3, 3, 300)), axis=1)
    return x, mixtures.drawn_from(mixtures.TRUTH, x, random)


@pytest.fixture
def unrelated(random):
    """A mixture of three experts unrelated to the data."""
    return Mixture(random.standard_normal((2, 3)), random.standard_normal((2, 3)), np.array([0.5, 1.0, 2.0]))


def likelihood_by_scipy(mixture, x, y):
    gates = special.softmax(x @ mixture.router, axis=1)
    return np.log((gates * stats.norm.pdf(y[:, None], x @ mixture.weights, np.sqrt(mixture.variances))).sum(1)).sum()


def test_the_likelihood_equals_scipy_s_and_torch_s(data, unrelated):
    expected = likelihood_by_scipy(unrelated, *data)
    assert mixtures.log_likelihood(unrelated, *data) == pytest.approx(expected, rel=1e-12)
    parameters = [torch.from_numpy(p) for p in (*unrelated[:2], np.log(unrelated.variances))]
    actual = mixtures.torch_log_likelihood(parameters, *map(torch.from_numpy, data))
    assert actual.item() == pytest.approx(expected, rel=1e-12)


def test_responsibilities_follow_bayes_rule(data, unrelated):
    x, y = data
    actual = mixtures.responsibilities(unrelated, x, y)
    for n in range(5):
        joint = [
            special.softmax(x[n] @ unrelated.router)[m]
            * stats.norm(x[n] @ unrelated.weights[:, m], math.sqrt(unrelated.variances[m])).pdf(y[n])
            for m in range(3)
        ]
        np.testing.assert_allclose(actual[n], np.array(joint) / sum(joint), **EXACT)


def test_experts_are_weighted_least_squares(data, random):
    x, y = data
    shares = random.dirichlet(np.ones(3), size=300)
    weights, variances = mixtures.fitted_experts(x, y, shares, floor=1e-6)
    for m in range(3):
        line = LinearRegression().fit(x[:, 1:], y, sample_weight=shares[:, m])
        np.testing.assert_allclose(weights[:, m], [line.intercept_, *line.coef_], **EXACT)
        assert variances[m] == pytest.approx(np.average((y - line.predict(x[:, 1:])) ** 2, weights=shares[:, m]))
    assert mixtures.fitted_experts(x, y, shares, floor=2.5)[1].min() == 2.5


def test_the_router_s_newton_steps_converge_to_logistic_regression(random):
    x = np.concatenate((np.ones((400, 1)), random.standard_normal((400, 2))), axis=1)
    truth = random.standard_normal((3, 3))
    labels = mixtures.draw(special.softmax(x @ truth, axis=1), random)
    router = np.zeros((3, 3))
    for _ in range(15):
        router = mixtures.improved_router(router, x, np.eye(3)[labels])
    expected = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(x[:, 1:], labels)
    logits = router - router.mean(1, keepdims=True)
    expected_logits = np.concatenate((expected.intercept_[None], expected.coef_.T))
    np.testing.assert_allclose(logits, expected_logits - expected_logits.mean(1, keepdims=True), rtol=1e-5, atol=1e-5)


def test_a_newton_step_that_lowers_the_likelihood_is_halved(random):
    x = np.stack((np.ones(50), np.linspace(-3, 3, 50)), axis=1)
    shares = np.eye(2)[(x[:, 1] > 0.5).astype(int)] * 0.9 + 0.05
    start = np.array([[0.0, 0.0], [4.0, -4.0]])  # confidently wrong

    def value(router):
        return (shares * special.log_softmax(x @ router, axis=1)).sum()

    gates = special.softmax(x @ start, axis=1)[:, 0]
    curvature = (x * (gates * (1 - gates))[:, None]).T @ x
    whole = np.linalg.solve(curvature, x.T @ (shares[:, 0] - gates))  # of the logits' difference
    assert value(start + np.stack((whole, np.zeros(2)), axis=1)) < value(start)
    router, history = start, [value(start)]
    for _ in range(30):
        router = mixtures.improved_router(router, x, shares)
        history.append(value(router))
    assert (np.diff(history) > -1e-9).all()
    best = optimize.minimize(lambda v: -value(np.stack((v, np.zeros(2)), axis=1)), np.zeros(2), tol=1e-10)
    assert history[-1] == pytest.approx(-best.fun, abs=1e-6)


def test_em_never_lowers_the_likelihood_and_ends_where_its_slope_is_zero(data, random):
    x, y = data
    for _ in range(3):
        start = mixtures.random_start(x, y, 3, random)
        actual, history = mixtures.em(start, x, y)
        assert (np.diff(history) > -1e-8).all() and history[-1] > history[0] + 100
        assert history[1] == pytest.approx(likelihood_by_scipy(mixtures.em(start, x, y, 1)[0], x, y))
        flat, shapes = np.concatenate([p.ravel() for p in actual]), [p.shape for p in actual]

        def value(flat, shapes=shapes):
            parts = np.split(flat, np.cumsum([math.prod(s) for s in shapes])[:-1])
            return likelihood_by_scipy(Mixture(*(p.reshape(s) for p, s in zip(parts, shapes))), x, y)

        slope = optimize.approx_fprime(flat, value, 1e-6)
        slope_at_start = optimize.approx_fprime(np.concatenate([p.ravel() for p in start]), value, 1e-6)
        assert abs(slope).max() < 0.02 and abs(slope_at_start).max() > 10


def test_em_of_one_expert_is_least_squares_with_its_standard_errors(data):
    x, y = data
    start = Mixture(np.zeros((2, 1)), np.zeros((2, 1)), np.ones(1))
    actual, _ = mixtures.em(start, x, y)
    line = LinearRegression().fit(x[:, 1:], y)
    np.testing.assert_allclose(actual.weights[:, 0], [line.intercept_, *line.coef_], **EXACT)
    variance = np.mean((y - line.predict(x[:, 1:])) ** 2)
    errors = mixtures.standard_errors(actual, x, y)
    np.testing.assert_allclose(errors.weights[:, 0] ** 2, variance * np.linalg.inv(x.T @ x).diagonal(), **EXACT)
    np.testing.assert_allclose(errors.variances, variance * math.sqrt(2 / 300), **EXACT)


def test_em_recovers_a_known_mixture(random):
    x = np.stack((np.ones(3000), random.uniform(-3, 3, 3000)), axis=1)
    y = mixtures.drawn_from(mixtures.TRUTH, x, random)
    actual, history = mixtures.fit(x, y, 3, 3, random)
    assert history[-1] > likelihood_by_scipy(mixtures.TRUTH, x, y)
    orders = [mixtures.ordered(actual, order) for order in itertools.permutations(range(3))]
    actual = min(orders, key=lambda candidate: abs(candidate.weights - mixtures.TRUTH.weights).sum())
    for true, member, error in zip(mixtures.TRUTH, actual, mixtures.standard_errors(actual, x, y)):
        assert (abs(member - true) <= 4 * error).all()
        assert (error[:, :-1] > 0).all() if error.ndim == 2 else (error > 0).all()
        assert error.max() < 0.3


def test_em_ends_no_lower_than_adam_and_bfgs(data, random):
    """At the best of a few starts; from a single start each may reach another local maximum."""
    x, y = data

    def cost(flat):
        router, weights, logs = np.split(flat, [6, 12])
        return -likelihood_by_scipy(Mixture(router.reshape(2, 3), weights.reshape(2, 3), np.exp(logs)), x, y)

    ends = []
    for start in [mixtures.random_start(x, y, 3, random) for _ in range(3)]:
        mixture, adam = mixtures.by_adam(start, x, y, updates=300)
        assert adam[-1] == pytest.approx(likelihood_by_scipy(mixture, x, y)) and adam[-1] > adam[0]
        flat = np.concatenate((start.router.ravel(), start.weights.ravel(), np.log(start.variances)))
        ends.append((mixtures.em(start, x, y)[1][-1], adam[-1], -optimize.minimize(cost, flat, tol=1e-3).fun))
    member, adam, bfgs = np.max(ends, axis=0)
    assert member > max(adam, bfgs) - 1e-4 and max(adam, bfgs) > member - 1  # the same maximum


# ---- 4. gates that are the same for every x


def test_a_tree_equals_scikit_learn_s(random):
    x, test_x = mixtures.points(120, random), mixtures.points(200, random)
    x[:, 2] = x[:, 2].round(1)  # ties, which no threshold may separate
    y = mixtures.smooth(x) + random.standard_normal(120)
    for depth in (0, 1, 3):
        expected = DecisionTreeRegressor(max_depth=depth or None, min_samples_leaf=1 if depth else 120).fit(x, y)
        np.testing.assert_allclose(mixtures.predicted(mixtures.grow(x, y, depth), test_x), expected.predict(test_x))
    x = random.permutation(50.0 * np.arange(60)).reshape(20, 3)
    whole = mixtures.grow(x, y[:20], 20)
    np.testing.assert_allclose(mixtures.predicted(whole, x), y[:20])  # a leaf for every point
    assert mixtures.grow(np.ones((5, 3)), y[:5], 3) == y[:5].mean()


def test_bagged_trees_equal_scikit_learn_s(random):
    x, test_x = mixtures.points(80, random), mixtures.points(100, random)
    y = mixtures.smooth(x) + random.standard_normal(80)
    expected = BaggingRegressor(DecisionTreeRegressor(max_depth=3), n_estimators=12, random_state=0).fit(x, y)
    member = [mixtures.predicted(mixtures.grow(x[r], y[r], 3), test_x) for r in expected.estimators_samples_]
    np.testing.assert_allclose(np.mean(member, 0), expected.predict(test_x))


def test_boosting_equals_scikit_learn_s(random):
    x, test_x = mixtures.points(150, random)[:, :2], mixtures.points(100, random)[:, :2]  # one feature: no ties
    y = np.sin(5 * x[:, 1]) + random.standard_normal(150)
    settings = dict(n_estimators=15, max_depth=2, learning_rate=0.3, init="zero")
    expected = GradientBoostingRegressor(**settings).fit(x, y)
    trees = mixtures.boosted(x, y, 15, 2, 0.3)
    np.testing.assert_allclose(0.3 * sum(mixtures.predicted(t, test_x) for t in trees), expected.predict(test_x))


def test_experts_with_a_router_of_zeros_are_bagging(random):
    x, test_x = mixtures.points(60, random), mixtures.points(50, random)
    y = mixtures.pieces(x) + random.standard_normal(60)
    bagging = BaggingRegressor(LinearRegression(), n_estimators=7, random_state=0).fit(x[:, 1:], y)
    weights = np.stack([[e.intercept_, *e.coef_] for e in bagging.estimators_], axis=1)
    actual = mixtures.first_output(mixtures.as_experts(np.zeros((3, 7)), weights), test_x)
    np.testing.assert_allclose(actual, bagging.predict(test_x[:, 1:]), rtol=1e-6, atol=1e-6)


def test_experts_with_other_routers_are_mixtures_and_fixed_weights(random):
    x, weights, router = mixtures.points(50, random), random.standard_normal((3, 4)), random.standard_normal((3, 4))
    fixed = random.dirichlet(np.ones(4))
    gates = special.softmax(x @ router, axis=1)
    actual = mixtures.first_output(mixtures.as_experts(router, weights), x)
    np.testing.assert_allclose(actual, (gates * (x @ weights)).sum(1), **EXACT)
    np.testing.assert_allclose(mixtures.mixture_mean(Mixture(router, weights, np.ones(4)), x), actual, **EXACT)
    constant = np.outer([1, 0, 0], np.log(fixed))
    actual = mixtures.first_output(mixtures.as_experts(constant, weights), x)
    np.testing.assert_allclose(actual, (x @ weights) @ fixed, **EXACT)


def test_gates_by_x_help_on_a_piecewise_function(random):
    """A fixed weighting of lines is never closer than the closest line."""
    x, test_x = mixtures.points(300, random), mixtures.points(1000, random)
    y = mixtures.pieces(x) + mixtures.NOISE * random.standard_normal(300)
    errors = {
        name: np.mean((p - mixtures.pieces(test_x)) ** 2) for name, p in mixtures.compared(x, y, test_x, random).items()
    }
    line = LinearRegression().fit(test_x[:, 1:], mixtures.pieces(test_x)).predict(test_x[:, 1:])
    nearest = np.mean((line - mixtures.pieces(test_x)) ** 2)
    single, lines, tree, bagged, boosted, gated, fixed, _ = errors.values()
    assert nearest <= min(single, lines, fixed) and gated < 0.2 * nearest
    assert max(bagged, boosted) < tree
    assert gated < min(bagged, boosted)


# ---- 5. diversity against error


def test_error_is_mean_error_less_ambiguity_by_brute_force(random):
    x, test_x = mixtures.points(40, random)[:, :2], mixtures.points(30, random)[:, :2]
    y, truth = np.sin(5 * x[:, 1]) + random.standard_normal(40), np.sin(5 * test_x[:, 1])
    error, mean_error, ambiguity = mixtures.diverse_errors(x, y, test_x, truth, 0.5, 3, 5, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    outputs = []
    for _ in range(5):
        rows = np.sort(rng.permutation(40)[:20])
        outputs.append(DecisionTreeRegressor(max_depth=3).fit(x[rows], y[rows]).predict(test_x))
    mean = np.mean(outputs, axis=0)
    assert error == pytest.approx(np.mean((mean - truth) ** 2))
    assert mean_error == pytest.approx(np.mean([np.mean((o - truth) ** 2) for o in outputs]))
    assert ambiguity == pytest.approx(np.mean(np.var(outputs, axis=0)))
    assert error == pytest.approx(mean_error - ambiguity) and ambiguity > 0.01


def test_identical_members_gain_nothing_and_diverse_members_do(random):
    x, test_x = mixtures.points(100, random), mixtures.points(200, random)
    y, truth = mixtures.smooth(x) + mixtures.NOISE * random.standard_normal(100), mixtures.smooth(test_x)
    error, mean_error, ambiguity = mixtures.diverse_errors(x, y, test_x, truth, 1.0, 10, 5, random)
    tree = mixtures.predicted(mixtures.grow(x, y, 10), test_x)
    assert ambiguity < 1e-20 and error == pytest.approx(mean_error) == pytest.approx(np.mean((tree - truth) ** 2))
    half, mean_half, _ = mixtures.diverse_errors(x, y, test_x, truth, 0.5, 10, 20, random)
    assert half < error < mean_half


# ---- the script


@pytest.mark.slow
def test_the_script_shows_all_parts_and_writes_two_figures(tmp_path, monkeypatch, capsys):
    smaller = {
        "show_likelihood": dict(updates=20),
        "show_em": dict(count=200, restarts=2, updates=50),
        "show_fixed_gates": dict(repeats=2, count=60),
        "show_diversity": dict(repeats=2, count=60, members=3),
    }
    for name, settings in smaller.items():
        monkeypatch.setattr(mixtures, name, functools.partial(getattr(mixtures, name), **settings))
    monkeypatch.setattr(mixtures, "MEMBERS", 3)
    monkeypatch.setattr(sys, "argv", ["mixtures.py", f"--plot={tmp_path / 'figures'}"])
    mixtures.main()
    output = capsys.readouterr().out
    assert [line[0] for line in output.splitlines() if line[1:3] == ". "] == list("12345")
    assert "nan" not in output
    for name in ("moe_em.png", "moe_diversity.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_help_needs_neither_torch_nor_matplotlib():
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print(sorted({'torch', 'matplotlib', 'sklearn', 'scipy'} & sys.modules.keys())))\n"
        "sys.argv = ['mixtures.py', '--help']\n"
        f"runpy.run_path({str(ROOT / 'examples/mixtures.py')!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--plot" in result.stdout and result.stdout.endswith("[]\n")


def test_an_unknown_flag_is_refused():
    assert "did you mean --plot" in refusal("examples/mixtures.py", "--plots=x")
