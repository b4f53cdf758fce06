"""What a compiled training step takes on a GPU, against the last counts, and these against the documentation."""

import pytest

from fake_gpu.build import needs_triton
from fake_gpu.table import counts, kept, table
from helpers import ROOT


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense, sm_75", "dense, sm_80", "dense, sm_90", "dense, sm_100", "modern, sm_90"])
def test_a_step_launches_no_more_kernels_and_moves_no_more_bytes_than_before(case):
    actual, expected = counts(case), kept()[case]
    assert (actual["graphs"], actual["breaks"]) == (1, 0)
    for name in ("kernels", "launches", "bytes", "peak"):
        assert actual[name] <= expected[name], name
    assert sum(actual["spills"].values()) <= sum(expected["spills"].values())
    assert actual["peak"] == pytest.approx(actual["estimate"], rel=0.15)


def test_the_documented_table_is_what_was_counted():
    assert table(kept()) in (ROOT / "docs/results/speed.md").read_text()
