"""The kernels that Triton compiles for a training step of GPT-2's width, against those of the last time.

`python tests/fake_gpu/test_kernels.py "dense, sm_90"` prints these cases, or all, as rows of docs/results/speed.md, and
where a change is meant writes those anew that the tests compare with.
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
SHOWN = {  # besides, in the table
    "band of 256 with 4 sinks, sm_90": (90, {"attention_band": 256, "attention_sinks": 4}, {}),
    "ALiBi, 8 heads, sm_90": (90, {"positions": "alibi", "n_head": 8}, {}),  # more slopes would be a real tensor
    "bidirectional, sm_90": (90, {"attention": "bidirectional"}, {}),
    "n-grams up to 3, sm_90": (90, {"ngrams": 3}, {}),
    "8 experts, sm_90": (90, {"n_experts": 8}, {}),
    "selective checkpointing, sm_90": (90, {}, {"activation_checkpointing": "selective"}),
    "offloaded optimizer, sm_90": (90, {}, {"offload_optimizer": True}),
    "float8, sm_90": (90, {}, {"float8": True}),  # needs torchao
}
ROWS = 12
KEPT = ("graphs", "breaks", "kernels", "launches", "bytes", "peak", "spills")


def counts(case):
    target, config, training = (CASES | SHOWN)[case]
    result = measure("step", {"n_layer": 2} | config, ROWS, training, target=target)
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
    for case in sys.argv[1:] or CASES | SHOWN:
        row, estimate = counts(case)
        token, peak = row["bytes"] / (ROWS * 1024), row["peak"]
        cells = f"{row['graphs']}, {row['breaks']}", row["kernels"], row["launches"], f"{row['spills']} bytes"
        memory = f"{token / 1e6:.2f} MB", f"{peak / 1e9:.2f} GB", f"{estimate / 1e9:.2f} GB"
        print("|", " | ".join(map(str, (case, *cells, *memory))), "|", flush=True)
        if case in CASES:
            golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
            GOLDEN.write_text(json.dumps(golden | {case: row}, indent=1) + "\n")
