"""The bytes that processes send in an update, against what follows from the numbers of parameters and tokens.

On CPUs, and compiled on the simulated GPU. `python tests/fake_gpu/test_communication.py` prints the table of
docs/guide/scale.md.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fake_gpu.build import measure

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 300}
EXPERTS = {"n_experts": 4}


def update(config, training, rows, processes):
    """What `communication.update` returns in one of so many processes."""
    root = Path(__file__).parents[2]
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "tests")))
    command = [sys.executable, "-m", "fake_gpu.communication", json.dumps([config, training, rows])]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert not result.returncode, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def bytes_by_kind(sent):
    return dict(sum((Counter({kind: size}) for kind, size, _ in sent), Counter()))


@pytest.mark.slow
def test_ddp_sums_every_gradient_once_in_float32():
    result = update(TINY, {}, rows=2, processes=4)
    assert bytes_by_kind(result["sent"])["allreduce"] == 4 * result["parameters"] + 8  # the norm and the loss


@pytest.mark.slow
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_sends_what_the_plan_says(reshard):
    """Also against `Layout.communicated`, which counts what arrives: 3 of 4 shards."""
    from gpt_arc.planning.layout import Layout
    from model import GPT, GPTConfig

    result = update(TINY, {"parallel": "fsdp", "reshard_after_forward": reshard}, rows=2, processes=4)
    sent = bytes_by_kind(result["sent"])
    assert sent["reduce_scatter_base"] == 4 * result["parameters"]
    layout = Layout(GPT(GPTConfig(**TINY)), "", 4, 8, 2, "bfloat16", reshard=reshard)
    received = (sent["allgather_base"] + sent["reduce_scatter_base"]) * 3 / 4
    assert received == pytest.approx(layout.communicated, rel=0.1)


@pytest.mark.slow
def test_divided_blocks_under_fsdp_send_what_the_plan_says():
    """Shares are divided between 2 of 4 processes, and the rest among all; 2 processes exchange hidden states."""
    from gpt_arc.planning.layout import Layout
    from model import GPT, GPTConfig

    result = update(TINY, {"parallel": "fsdp", "tensor_processes": 2}, rows=2, processes=4)
    model = GPT(GPTConfig(**TINY))
    states = 2 * 2 * TINY["block_size"] * TINY["n_embd"] * 2  # bytes of both processes' rows, in 16 bits
    divided = "qkv.weight", "qkv.bias", "up.weight", "up.bias", "projection.weight"
    whole = 4 * sum(p.numel() for name, p in model.named_parameters() if not name.endswith(divided))
    sizes = [size for kind, size, _ in result["sent"] if kind in ("allgather_base", "reduce_scatter_base")]
    assert sizes.count(whole) == 2
    received = sum(size * (3 / 4 if size == whole else 1 / 2) for size in sizes)
    assert [size for _, size, _ in result["sent"]].count(states) == 8 * TINY["n_layer"]
    layout = Layout(model, "", 4, 8, 2, "bfloat16", tensor_processes=2)
    assert received == pytest.approx(layout.communicated, rel=0.1)


@pytest.mark.slow
def test_replicas_sum_their_shards_gradients():
    """A ring of 2 receives every byte of the sums once."""
    from gpt_arc.planning.layout import Layout
    from model import GPT, GPTConfig

    result = update(TINY, {"parallel": "fsdp", "replicas": 2}, rows=2, processes=4)
    sent = bytes_by_kind(result["sent"])
    assert sent["allreduce"] == 4 * result["parameters"] / 2 + 8
    received = (sent["allgather_base"] + sent["reduce_scatter_base"]) / 2 + sent["allreduce"]
    layout = Layout(GPT(GPTConfig(**TINY)), "", 4, 8, 2, "bfloat16", replicas=2)
    assert received == pytest.approx(layout.communicated, rel=0.1)


@pytest.mark.slow
def test_experts_are_sent_16_bits_a_value():
    """In each layer, for every token and choice: its state, its output, and the gradients of both."""
    result = update(TINY | EXPERTS, {"expert_processes": 4}, rows=2, processes=4)
    rows = [size for kind, size, _ in result["sent"] if kind == "alltoall_base" and size > 8 * 4]
    assert rows == [2 * (2 * 32) * 2 * 64] * (4 * 2)


def check_compiled(result):
    assert (result["graphs"], result["breaks"]) == (1, 0)
    assert [n for line, n in result["waits"].items() if not line.endswith("waits for copies")] == [1]


@pytest.mark.slow
def test_compiled_ddp_sends_buckets_while_it_computes():
    """The compiler cuts its graph at the buckets. The last one has the embedding, whose gradient comes at the end."""
    result = measure("parallel", {"n_layer": 2, "block_size": 64}, {}, 1, processes=8, kernels="none")
    check_compiled(result)
    sizes, shares = zip(*result["buckets"])
    assert sum(sizes) == 4 * result["parameters"]
    assert shares[0] < 0.5 and shares[1] < 0.9 and shares[2] < shares[3] == 1


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_fsdp_interrupts_no_block_s_compiled_code(offload):
    """Blocks share one graph; each is gathered twice, and what lies outside, with all norms, once."""
    result = measure(
        "parallel", TINY, {"parallel": "fsdp", "offload_optimizer": offload}, 2, processes=8, kernels="none"
    )
    check_compiled(result)
    assert result["collectives"]["c10d._allgather_base_.default"] == 2 * TINY["n_layer"] + 1
    assert result["collectives"]["c10d._reduce_scatter_base_.default"] == TINY["n_layer"] + 1
    shards = {"cpu": pytest.approx(4 * result["parameters"] / 8, rel=0.01)} if offload else {}  # of gradients
    assert {place: size for place, size in result["copied"].items() if place == "cpu"} == shards


def late(result, flops_per_second, bytes_per_second, processes):
    """Seconds that DDP's sums, one bucket after another, go on after the backward pass; a ring sends a byte twice."""
    free = 0.0
    for _, size, flops in result["sent"]:
        sending = 2 * size * (processes - 1) / processes / bytes_per_second
        free = max(free, flops / flops_per_second) + sending
    return max(free - result["flops"] / flops_per_second, 0.0)


def main():
    """GPT-2 small on 8 processes: the collectives of 1 x 64 tokens, which are those of 12 x 1,024 but for experts'."""
    scale = 12 * 1024 / 64
    cases = {
        "ddp": ({}, {}),
        "fsdp": ({}, {"parallel": "fsdp"}),
        "fsdp, replicas = 2": ({}, {"parallel": "fsdp", "replicas": 2}),
        "8 experts on 8 processes": ({"n_experts": 8}, {"expert_processes": 8}),
    }
    for name, (change, training) in cases.items():
        result = update({"block_size": 64} | change, training, rows=1, processes=8)
        sizes = bytes_by_kind(result["sent"])
        sizes["alltoall_base"] = scale * sizes.get("alltoall_base", 0)
        calls = Counter(kind for kind, _, _ in result["sent"])
        print(name, {kind: f"{calls[kind]} of {size / 1e9:.3f} GB" for kind, size in sizes.items()})
        for link, rate in {"NVLink": 450e9, "PCIe": 25e9}.items() if name == "ddp" else ():
            print(f"  {link}: {1e3 * late(result, 0.4 * 989e12 / scale, rate, 8):.1f} ms after the backward pass")


if __name__ == "__main__":
    main()
