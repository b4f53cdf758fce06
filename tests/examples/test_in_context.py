"""examples/in_context_*.py: held-out mappings, baselines, causality, and the commands."""

import json
from itertools import permutations

import numpy as np
import pytest
import torch

import in_context_data
import in_context_linear
import in_context_report
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import entry_point
from gpt_arc.evaluation.items import demonstrations, load_items
from gpt_arc.evaluation.tasks import load_task
from gpt_arc.training.config import build_config, read_settings
from helpers import ROOT, randomised
from model import GPTConfig

TASK = str(ROOT / "examples" / "in_context.toml")


@pytest.fixture
def written(tmp_path, monkeypatch, output_of):
    """The folder of a small run of examples/in_context_data.py."""
    monkeypatch.chdir(tmp_path)
    flags = "--documents=3000", "--held_out=4", "--most_equal=3", "--items=6", "--pool=20", "--output=mappings"
    output_of(entry_point(in_context_data.main), "in_context_data.py", *flags)
    return tmp_path / "mappings"


def lines_of(text):
    return [line.split(">") for line in text.splitlines() if line]


def test_no_document_is_close_to_a_held_out_mapping(written):
    held_out = json.loads((written / "mappings.json").read_text())
    assert len(set(held_out)) == 4 and all(sorted(mapping) == list("abcdefghij") for mapping in held_out)
    counts, nearest, texts = [0, 0, 0], 0, set()
    for row in (written / "corpus.jsonl").read_text().splitlines():
        text = json.loads(row)["text"]
        texts.add(text)
        lines = lines_of(text)
        mapping = {}
        for word, image in lines:
            assert len(word) == len(image) == len(lines[0][0])
            for letter, target in zip(word, image):
                assert mapping.setdefault(letter, target) == target
        assert len(set(mapping.values())) == len(mapping), "not a permutation"
        assert len(lines) == 17 and text.endswith("\n\n")
        counts[len(lines[0][0]) - 1] += 1
        equal = [sum(mapping.get(a) == b for a, b in zip("abcdefghij", images)) for images in held_out]
        assert max(equal) <= 3
        nearest = max(nearest, *equal)
    assert nearest == 3 and sum(counts) == len(texts) == 3000 and min(counts) > 850


def test_items_and_pool_are_different_words_of_one_mapping(written):
    for number, mapping in enumerate(json.loads((written / "mappings.json").read_text())):
        rows = [
            json.loads(r)
            for n in ("items", "pool")
            for r in (written / f"{number}/{n}.jsonl").read_text().split("\n")
            if r
        ]
        assert len({row["input"] for row in rows}) == len(rows) == 26
        for row in rows:
            assert row["output"] == "".join(mapping["abcdefghij".index(letter)] for letter in row["input"])


def test_prompts_have_the_form_of_the_corpus(written):
    """Prompts of stages/eval.py have the form and the characters of the corpus."""
    task = load_task(TASK)
    items, pool = (load_items(task, "", written / "0" / f"{name}.jsonl", 0) for name in ("items", "pool"))
    question = task.question(items[0])
    prompt = demonstrations(task, pool, 0, 16, 0, False) + question.contexts[0] + question.continuations[0]
    assert [len(part) for line in lines_of(prompt) for part in line] == [3] * 34
    corpus = "".join(json.loads(row)["text"] for row in (written / "corpus.jsonl").read_text().splitlines())
    tokenizer = CharTokenizer.from_text(corpus)
    config = build_config(read_settings(ROOT / "configs" / "in_context.toml"), "")
    assert len(tokenizer.encode(prompt)) < config.model.block_size and tokenizer.vocab_size == config.model.vocab_size


def test_the_same_seed_gives_the_same_files_and_another_does_not(written, output_of):
    flags = "--documents=3000", "--held_out=4", "--most_equal=3", "--items=6", "--pool=20", "--output=again"
    output_of(entry_point(in_context_data.main), "in_context_data.py", *flags)
    original, repeated = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.json*")}
        for folder in (written, written.parent / "again")
    )
    assert original == repeated and len(original) == 10
    output_of(entry_point(in_context_data.main), "in_context_data.py", *flags, "--seed=1")
    assert (written.parent / "again" / "mappings.json").read_bytes() != (written / "mappings.json").read_bytes()


@pytest.mark.parametrize(
    "shown, word", [("", "abc"), ("", "aba"), ("ab>cd", "abc"), ("ab>cd\ncd>ab", "abd"), ("ab>cd", "cde")]
)
def test_the_best_learner_by_brute_force(shown, word, monkeypatch):
    """The most frequent image's share over all mappings of five letters that fit the demonstrations."""
    monkeypatch.setattr(in_context_report, "LETTERS", 5)
    images = []
    for mapping in permutations("abcde"):
        apply = str.maketrans("abcde", "".join(mapping))
        if all(line.split(">")[0].translate(apply) == line.split(">")[1] for line in shown.split()):
            images.append(word.translate(apply))
    best = max(images.count(image) for image in images) / len(images)
    assert in_context_report.best_chance(shown, word) == pytest.approx(best)


def test_the_report_gathers_values_by_mapping(written, output_of):
    results = written.parent / "actual" / "results"
    results.mkdir(parents=True)
    for number in range(4):
        for ending, values in ((".json", [1, 1, 1, 0, 0, 0]), (".shuffled.json", [0, 0, 0, 0, 0, float(number == 0)])):
            zero = {"metric": "accuracy", "shots": 0, "values": [0.0] * 6}
            sixteen = {"metric": "accuracy", "shots": 16, "values": values}
            report = {"options": {"seed": 0}, "models": [{"tasks": [zero, {**zero, "metric": "perplexity"}, sixteen]}]}
            (results / f"{number}{ending}").write_text(json.dumps(report))
    output = output_of(
        entry_point(in_context_report.main), "in_context_report.py", f"--data={written}", f"--results={results}"
    )
    figures = {(f["of"], f["shots"]): f for f in json.loads((results.parent / "figures.json").read_text())}
    assert figures["model", 16]["accuracy"] == 50 and figures["model", 16]["standard_error"] == 0
    shuffled = figures["answers shuffled", 16]  # means by mapping: 1/6, 0, 0, 0
    assert shuffled["accuracy"] == pytest.approx(100 / 24) and shuffled["standard_error"] == pytest.approx(100 / 24)
    assert figures["model", 16]["p"] == pytest.approx(2 * 0.5**12)  # twelve better, none worse
    assert figures["best possible", 0]["accuracy"] < 1.5 < 90 < figures["best possible", 16]["accuracy"]
    assert "50.0 ± 0.0" in output and (results.parent / "accuracy.png").stat().st_size > 5000


def test_estimates_are_numpys_least_squares_and_the_posterior_mean():
    options = in_context_linear.Options(dimensions=3, examples=6, noise=0.7)
    xs, ys, clean = in_context_linear.draw(options, 4, torch.Generator().manual_seed(0))
    step_sizes = {name: torch.full((7,), 0.3) for name in in_context_linear.DESCENTS}
    predictions = in_context_linear.estimates(xs, ys, options.noise, step_sizes)
    x, y = xs.double().numpy(), ys.double().numpy()
    for row in range(4):
        for k in range(7):
            shortest = np.linalg.lstsq(x[row, :k], y[row, :k], rcond=None)[0] if k else np.zeros(3)
            assert predictions["least squares"][row, k].item() == pytest.approx(x[row, k] @ shortest, abs=1e-9)
            # the mean of y_k given the y before it, all of them jointly normal with covariance x x' + noise^2 I
            covariance = x[row, : k + 1] @ x[row, : k + 1].T + options.noise**2 * np.eye(k + 1)
            expected = covariance[k, :k] @ np.linalg.solve(covariance[:k, :k], y[row, :k]) if k else 0.0
            assert predictions["ridge"][row, k].item() == pytest.approx(expected, abs=1e-9)
            average = np.mean([y[row, i] * x[row, i] for i in range(k)], axis=0) if k else np.zeros(3)
            assert predictions["averaging"][row, k].item() == pytest.approx(x[row, k] @ average, abs=1e-9)
            # gradient descent from 0 is least squares with each component shrunk by (1 - step size x eigenvalue)^steps
            eigenvalues, directions = np.linalg.eigh(x[row, :k].T @ x[row, :k] / k) if k else (np.zeros(3), np.eye(3))
            for name, steps in in_context_linear.DESCENTS.items():
                shrunk = directions * (1 - (1 - np.float32(0.3) * eigenvalues) ** steps) @ directions.T @ shortest
                assert predictions[name][row, k].item() == pytest.approx(x[row, k] @ shrunk, abs=1e-9)
    assert (ys - clean).std().item() == pytest.approx(0.7, rel=0.4)


def test_the_best_step_size_of_one_step_is_that_of_the_closed_form():
    """E (w x - s x b)^2, with b the mean of y x over k pairs, is least at s = k / (k + d + 1 + noise^2)."""
    options = in_context_linear.Options(dimensions=2, examples=6, noise=0.7)
    functions = in_context_linear.draw(options, 4000, torch.Generator().manual_seed(0))
    best = in_context_linear.best_step_sizes(*functions)
    for k in (1, 2, 4, 6):
        assert best["1 step"][k].item() == pytest.approx(k / (k + 2 + 1 + 0.49), rel=0.15)  # sizes are 15% apart
    assert best["1 step"][0] == 0 and (best["8 steps"][1:] <= best["1 step"][1:]).all()


def test_predictions_are_causal():
    config = GPTConfig(block_size=6, vocab_size=1, n_layer=2, n_head=2, n_embd=16)
    model = randomised(in_context_linear.Regressor(config, 3))
    xs, ys = torch.randn(1, 6, 3, requires_grad=True), torch.randn(1, 6, requires_grad=True)
    predictions = model(xs, ys)
    assert predictions.shape == (1, 6)
    for k in range(6):
        of_x, of_y = torch.autograd.grad(predictions[0, k], (xs, ys), retain_graph=True)
        assert torch.equal(of_x[0].abs().sum(-1) > 0, torch.arange(6) <= k)
        assert torch.equal(of_y[0].abs() > 0, torch.arange(6) < k)


def test_ratio_and_its_standard_error_against_a_bootstrap():
    chance = np.random.default_rng(0)
    baseline = chance.exponential(size=(400, 3))
    errors = baseline * 1.2 + 0.3 * chance.exponential(size=(400, 3)) * [1, 2, 3]
    actual = in_context_linear.compared(torch.tensor(errors), torch.tensor(baseline))
    drawn = []
    for _ in range(2000):
        rows = chance.integers(400, size=400)
        drawn.append(errors[rows].mean(0) / baseline[rows].mean(0))
    assert actual["by_k"] == pytest.approx(errors.mean(0) / baseline.mean(0))
    assert actual["mean"] == pytest.approx(np.mean(actual["by_k"]))
    assert actual["by_k_standard_error"] == pytest.approx(np.std(drawn, axis=0), rel=0.1)
    assert actual["standard_error"] == pytest.approx(np.mean(drawn, axis=1).std(), rel=0.1)


def test_a_short_training_run_learns_in_context(tmp_path, monkeypatch, output_of):
    """One dimension is learnt in a hundred updates: with examples the error falls, though the weights don't change."""
    monkeypatch.chdir(tmp_path)
    flags = "--dimensions=1 --examples=4 --n_layer=2 --n_head=1 --n_embd=16 --max_iters=150 --functions=600".split()
    output = output_of(
        entry_point(in_context_linear.main), "in_context_linear.py", *flags, "--learning_rate=1e-2", "--output=out/tiny"
    )
    report = json.loads((tmp_path / "out" / "tiny" / "figures.json").read_text())
    errors = report["tests"][0]["noisy"]["transformer"]["error"]
    assert len(errors) == 5 and errors[4] < 0.75 * errors[0]
    noisy = report["tests"][0]["noisy"]
    assert noisy["ridge"]["error"][4] < errors[4] * 1.02  # the posterior mean is optimal
    assert noisy["ridge"]["error"][4] < noisy["1 step"]["error"][4] < noisy["1 step"]["error"][0]
    assert report["tests"][0]["distance"]["ridge"][4] > 0
    assert [entry["scale"] for entry in report["tests"]] == [1.0, 0.5, 2.0, 3.0]
    assert "squared error" in output and (tmp_path / "out" / "tiny" / "errors.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "module, flag, reason",
    [
        (in_context_linear, "--examples=5", "must be more than dimensions = 5"),
        (in_context_linear, "--n_layer=0", "--n_layer = 0 must be at least 1"),
        (in_context_linear, "--functions=1", "--functions = 1 must be at least 2"),
        (in_context_linear, "--noise=0", "--noise = 0 must be more than 0"),
        (in_context_linear, "--n_head=7", "does not divide n_embd"),
        (in_context_linear, "--max_iter=7", "did you mean --max_iters"),
        (in_context_data, "--most_equal=10", "--most_equal = 10 must be between 0 and 10, 10 excluded"),
        (in_context_data, "--pool=990", "at most 1000 words together"),
        (in_context_report, "--data=nowhere", "nowhere"),
    ],
)
def test_mistakes_are_refused(module, flag, reason, tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    assert reason in output_of(entry_point(module.main), "script.py", flag)
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_errors_of_the_run_beside_gradient_descent():
    results = ROOT / "docs/results"
    report = json.loads((results / "in_context_descent.json").read_text())
    page = (results / "in_context.md").read_text().split("### Steps of gradient descent")[1]
    options = report["options"]
    flags = ("dimensions", "examples", "n_embd", "max_iters", "functions")
    assert all(f"--{name}={options[name]}" in page for name in flags) and options["learning_rate"] == 4e-3
    figures, names = report["tests"][0], ("1 step", "2 steps", "4 steps", "8 steps", "ridge", "least squares")
    errors = {name: figures["noise-free"][name]["error"] for name in ("transformer", *names)}
    rows = [row.strip("| ").split(" | ") for row in page.splitlines()]
    for columns, numbers in ((errors, (0, 1, 2, 3, 4, 5, 6, 8, 10, 12)), (figures["distance"], (1, 2, 4, 6, 8, 12))):
        for k in numbers:
            values = [columns[name][k] for name in ("transformer", *names) if name in columns]
            assert [str(k), *(f"{value:.3f}" if value < 1000 else f"{value:,.0f}" for value in values)] in rows
    for k in range(1, 13):
        assert errors["ridge"][k] < errors["transformer"][k]
        assert all(errors["transformer"][k] < errors[name][k] for name in in_context_linear.DESCENTS)
        assert min(names, key=lambda name: figures["distance"][name][k]) == "ridge"
