"""Budgets: days, money, shapes and claims, by hand."""

import pytest

from gpt_arc.errors import UserError
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.budget import (
    GPT3,
    Hardware,
    MixtureClaim,
    accelerator_named,
    gpt3_batch,
    gpt3_rate,
    nearest_shape,
    serving_memory,
    shaped,
)
from model import GPT, GPTConfig


def test_days_and_money_by_hand():
    cluster = Hardware("H100", 1024, 0.4, 2.0)
    flops = 1024 * 0.4 * 989e12 * 30 * 86_400
    assert cluster.days(flops) == pytest.approx(30)
    assert cluster.money(flops) == pytest.approx(1024 * 30 * 24 * 2)
    assert Hardware("h100", 1, 0.4).money(1e20) is None
    assert accelerator_named("a100").half == 312e12
    with pytest.raises(UserError, match="accelerator = h10 is not known: name one of h200"):
        accelerator_named("h10")


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("h100", "bfloat16", 989), ("h100", "float16", 989), ("h100", "tf32", 494.5), ("h100", "float32", 67),
        ("a100", "tf32", 156), ("a100", "float32", 19.5),
        ("v100", "float16", 125), ("v100", "tf32", 15.7), ("v100", "float32", 15.7),
        ("t4", "float16", 65), ("t4", "tf32", 8.1), ("t4", "float32", 8.1),
    ],
)  # fmt: skip
def test_days_are_those_of_the_precision(name, dtype, teraflops):
    hardware = Hardware(name, 2, 0.5, dtype=dtype)
    assert hardware.days(teraflops * 1e12 * 86_400) == pytest.approx(1)
    assert hardware.cost(teraflops * 1e12 * 86_400) == f"1 days on 2 {name} at 50% of peak"


def test_a_peak_that_is_not_known_is_not_guessed():
    for name, dtype in (("v100", "bfloat16"), ("T4", "bfloat16"), ("mi250x", "tf32")):
        assert Hardware(name, 1, 0.4, 2.0, dtype).cost(1e20) == f"the peak of the {name} in {dtype} isn't known"


def test_rates_and_batches_are_gpt3_s_at_its_sizes_and_between_them_between():
    for size, (rate, batch) in GPT3.items():
        assert gpt3_rate(size) == pytest.approx(rate) and gpt3_batch(size) == pytest.approx(batch)
    assert 1e-4 < gpt3_rate(10e9) < 1.2e-4 and gpt3_rate(1e6) == pytest.approx(6e-4)


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(),
        GPTConfig(n_kv_head=4, mlp_size=2048, positions="rotary", tied_head=False),
        GPTConfig(n_layer=4, n_experts=8, experts_per_token=2, expert_interval=2),
    ],
)
@pytest.mark.parametrize("embeddings", [True, False])
def test_no_other_depth_comes_nearer(config, embeddings):
    def size(layers):
        with meta_device():
            return GPT(shaped(config, layers, 64, 64)).num_parameters(embeddings, active=True)

    sizes = {layers: size(layers) for layers in (8, 10, 16)}
    for layers in (8, 16):
        found = nearest_shape(config, sizes[layers], 64, 64, embeddings)
        assert found.n_layer == layers and found == shaped(config, layers, 64, 64)
    between = (sizes[8] * sizes[10]) ** 0.5
    assert nearest_shape(config, between, 64, 64, embeddings).n_layer in (8, 9, 10)


def test_shapes_keep_the_ratio_of_grouped_queries_and_of_the_mlp():
    config = shaped(GPTConfig(n_kv_head=4, mlp_size=2048), 24, 64, 64)
    assert (config.n_embd, config.n_head, config.n_kv_head, config.mlp_size) == (1536, 24, 8, 4096)


def test_a_claim_of_1_8t_with_220b_active_is_impossible():
    claim = MixtureClaim(1.8e12, 220e9, 8, 2)
    assert round(claim.shared / 1e9) == -307 and round(claim.least_active / 1e9) == 450
    assert MixtureClaim(1e12, 200e9, 8, 2).least_active == 250e9
    mixtral = MixtureClaim(46_702_792_704, 12_879_925_248, 8, 2)
    assert mixtral.expert == 32 * 3 * 4096 * 14_336  # of Mixtral 8x7B, to the parameter


def test_serving_needs_all_experts_and_the_cache():
    model = GPT(GPTConfig(16, 32, 2, 4, 32, n_kv_head=2, positions="rotary", n_experts=4))
    assert serving_memory(model, 3) == {
        "weights": 2 * sum(p.numel() for p in model.parameters()),
        "keys and values": 2 * (3 * 16 * 2 * 2 * 2 * 8),
    }
