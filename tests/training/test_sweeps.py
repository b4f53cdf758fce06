"""The sweeps in configs/sweeps, which are configs of train.py with one more table."""

import pytest

from gpt_arc.training.sweeps import sweep_runs
from helpers import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_has_runs(path):
    runs = sweep_runs(path)
    assert len({run.name for run in runs}) == len(runs) > 0
    assert [run.flops for run in runs] == sorted(run.flops for run in runs)
