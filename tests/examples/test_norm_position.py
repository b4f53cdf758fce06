"""examples/norm_position.py: what counts as a failure, and the command, which continues."""

from math import log

import pytest
from scipy.stats import entropy

import norm_position
from gpt_arc.errors import entry_point
from gpt_arc.reading import read_json
from helpers import ROOT
from norm_position import Options


def test_the_entropy_is_scipys():
    text = b"abracadabra"
    assert norm_position.entropy(text) == pytest.approx(entropy([5, 2, 2, 1, 1]))
    assert len(set(norm_position.read_text())) > 64


@pytest.mark.parametrize("norm", norm_position.NORMS)
def test_a_run_above_the_entropy_fails(norm, monkeypatch):
    monkeypatch.setattr(norm_position, "read_text", lambda: b"ab" * 100)
    monkeypatch.setattr(norm_position, "entropy", lambda text: 1.0)
    options = Options(max_iters=40, width=16)
    results = [norm_position.train(options, norm, 1, rate, seed=1) for rate in (1e-9, 1e-2)]
    assert [result["failed"] for result in results] == [True, False]
    assert results[0]["loss"] == pytest.approx(log(128), abs=0.2)  # untrained, about uniform over 128 ids


def test_the_command_continues(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    flags = "--depths 1 2 --learning_rates 1e-3 3e-2 --max_iters=2 --width=16 --output=out/try".split()
    main = entry_point(norm_position.main)
    output_of(main, "norm_position.py", *flags, "--seeds=1")
    first = read_json(tmp_path / "out/try/figures.json")["runs"]
    assert len(first) == 2 * 2 * 2
    output = output_of(main, "norm_position.py", *flags, "--seeds=2")
    runs = read_json(tmp_path / "out/try/figures.json")["runs"]
    assert runs[:8] == first and len(runs) == 16 and {run["seed"] for run in runs[8:]} == {2}
    assert output.count("2 of 2") == 8  # two updates teach nothing
    assert (tmp_path / "out/try/failures.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flag", "reason"), [("--width=20", "width = 20 must be a multiple of 16"), ("--depths=0", "must be at least 1")]
)
def test_mistakes_are_refused(flag, reason, tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    assert reason in output_of(entry_point(norm_position.main), "norm_position.py", flag)
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_figures_of_the_run():
    page, runs = (
        (ROOT / "docs/results/relatives.md").read_text(),
        read_json(ROOT / "docs/results/norm_position.json")["runs"],
    )
    for cells in norm_position.rows(runs, Options()):
        assert f"| {' | '.join(map(str, cells))} |" in page
    assert f"{norm_position.entropy(norm_position.read_text()):.3f} nats" in page
