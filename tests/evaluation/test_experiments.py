"""Experiments that continue where they stopped."""

import json

import pytest

from gpt_arc.errors import UserError
from gpt_arc.evaluation.experiments import run_missing
from gpt_arc.evaluation.statistics import mean_and_error


def test_only_missing_cases_run(tmp_path):
    file, ran = tmp_path / "out/figures.json", []

    def run(size, seed):
        ran.append((size, seed))
        if size == 3:
            raise KeyboardInterrupt
        return {"loss": size / seed, "bad": float("nan")}

    cases = [{"size": size, "seed": 2} for size in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        run_missing(file, {"steps": 5}, cases, run)
    kept = [{"size": 1, "seed": 2, "loss": 0.5, "bad": None}, {"size": 2, "seed": 2, "loss": 1.0, "bad": None}]
    assert json.loads(file.read_text()) == {"settings": {"steps": 5}, "runs": kept}
    results = run_missing(file, {"steps": 5}, [{"size": 4, "seed": 2}, *cases[:2]], run)
    assert ran == [(1, 2), (2, 2), (3, 2), (4, 2)] and [result["size"] for result in results] == [1, 2, 4]
    with pytest.raises(UserError, match=r"has runs with \{'steps': 5\}, not \{'steps': 6\}: name another --output"):
        run_missing(file, {"steps": 6}, cases, run)


def test_the_error_of_a_mean_worked_by_hand():
    assert mean_and_error([1.0, 2.0, 3.0]) == f"2.000 ± {(1 / 3) ** 0.5:.3f}"
    assert mean_and_error([12.34], 1) == "12.3"
