"""The kernels that Triton compiles for a training step of GPT-2's width, against those of the last time.

Where a change is meant, `python tests/fake_gpu/test_kernels.py "dense, sm_90"` writes these cases, or all, anew.
"""

import json
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fake_gpu.build import measure, needs_triton

GOLDEN = Path(__file__).with_name("kernels.json")
MODERN = {
    "n_kv_head": 4, "positions": "rotary", "qk_norm": True, "norm": "rmsnorm", "activation": "swiglu", "bias": False
}  # fmt: skip
CASES = {
    "dense, sm_75": (75, {}, {"dtype": "float16"}),
    "dense, sm_80": (80, {}, {}),
    "dense, sm_90": (90, {}, {}),
    "dense, sm_100": (100, {}, {}),
    "modern, sm_90": (90, MODERN, {}),
}
KEPT = ("graphs", "breaks", "kernels", "launches", "bytes", "peak", "spills")


def counts(case):
    target, config, training = CASES[case]
    result = measure("step", {"n_layer": 2} | config, 12, training, target=target)
    result["spills"] = sum(result["spills"].values())  # bytes, of all kernels
    return {name: result[name] for name in KEPT}, result["estimate"]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_launches_no_more_kernels_and_moves_no_more_bytes_than_before(case):
    actual, estimate = counts(case)
    expected = json.loads(GOLDEN.read_text())[case]
    assert (actual["graphs"], actual["breaks"]) == (1, 0)
    for name in ("kernels", "launches", "bytes", "peak", "spills"):
        assert actual[name] <= expected[name], name
    assert actual["peak"] == pytest.approx(estimate, rel=0.15)


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(golden | {case: counts(case)[0]}, indent=1) + "\n")
