"""The tables of examples/long_context_report.py: means and differences by hand."""

import json
from pathlib import Path

import pytest

import long_context_report
from gpt_arc.errors import entry_point
from gpt_arc.reading import read_json
from helpers import ROOT

LOSSES = {"rotary": ([3.0, 4.0], [3.5, 4.5]), "rotary_512": ([2.0, 2.0], [2.5, 2.9]), "learned": ([5.0, 7.0], None)}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Figures of two seeds; the second lacks `learned`, which has no length of 8 in the first either."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        models = {}
        for name, by_seed in LOSSES.items():
            if (losses := by_seed[seed]) is not None:
                recall = {"losses": losses, "copied": 0.1 + seed / 10, "found": 0.5}
                models[f"out/{seed}/{name}"] = {"4": recall} if name == "learned" else {"4": recall, "8": recall}
        Path(str(seed)).mkdir()
        Path(str(seed), "figures.json").write_text(json.dumps({"models": models}))
    return ["0", "1"]


def test_means_errors_and_differences_within_a_seed(folders, output_of):
    main = entry_point(long_context_report.main)
    output = output_of(main, "long_context_report.py", *folders, "--json=both.json", "--plot=both.png")
    assert Path("both.png").stat().st_size > 1000
    assert "| rotary, trained at 64 | 3.750 ± 0.250 | 3.750 ± 0.250 | 1.400 ± 0.100 |" in output
    assert "| rotary, trained at 512 | 2.350 ± 0.350 | 2.350 ± 0.350 | - |" in output
    assert "| learned, trained at 64 | 6.000 | - | - |" in output
    assert "| rotary, trained at 64 | 15.0 ± 5.0 | 15.0 ± 5.0 |" in output
    assert "| rotary, trained at 64 | 50.0 ± 0.0 | 50.0 ± 0.0 |" in output
    seeds = read_json(Path("both.json"))["seeds"]
    assert long_context_report.tables(seeds) + "\n" == output
    for figures in seeds:
        del figures["rotary_512"]
    assert "| rotary, trained at 64 | 3.750 ± 0.250 | 3.750 ± 0.250 |\n" in long_context_report.tables(seeds)
    assert "no has no figures: run bash examples/long_context_arc.sh with FOLDER=no" in output_of(main, "x", "no")


def test_the_page_has_the_figures_of_the_runs():
    seeds = read_json(ROOT / "docs/results/long_context.json")["seeds"]
    page = (ROOT / "docs/results/long_context.md").read_text()
    assert all(table in page for table in long_context_report.tables(seeds).split("\n\n"))
