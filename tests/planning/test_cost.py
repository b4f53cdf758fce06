"""The cost of a run, against counts obtained in other ways."""

import dataclasses
import itertools
import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.cost import ACCELERATORS, describe_parameters, flops_per_token, memory_estimate, peak_flops
from gpt_arc.tables import human
from gpt_arc.training.log import Meter, MetricsLog, Utilization
from model import GPT, GPTConfig

MIXTURE = {"n_experts": 4, "experts_per_token": 2, "shared_experts": 1, "expert_interval": 2, "mlp_size": 48}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied_head": False, "head_bias": True},
        {"n_kv_head": 2, "qk_norm": True, "positions": "rotary"},
        {"activation": "swiglu", "bias": False, "norm": "rmsnorm"},
        {"norm_position": "post", "head_size": 24},
        {"ngrams": 3, "ngram_rows": 64},
        MIXTURE,
        MIXTURE | {"experts_per_token": 1, "bias": False, "activation": "swiglu", "expert_interval": 1},
    ],
)
def test_flops_equal_torch_s_count(settings):
    config = GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=4, n_embd=64, **settings)
    model = GPT(config)
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.eval()(tokens)
    assert flops_per_token(model) * 32 == 3 * counter.get_total_flops()  # two products backward for each forward
    if not settings.get("n_experts"):  # torch counts no backward of grouped products
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model.train()(tokens, tokens).total.backward()
        assert flops_per_token(model) * 32 == counter.get_total_flops()


def test_flops_of_an_lstm_equal_torch_s_count():
    model = GPT(GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=4, n_embd=64, head_size=24, mixer="lstm"))
    with FlopCounterMode(display=False) as counter, torch.backends.mkldnn.flags(enabled=False):  # counts no fused LSTM
        model(torch.zeros(1, 32, dtype=torch.int64))
    assert flops_per_token(model) * 32 == 3 * counter.get_total_flops()


def test_a_band_of_width_w_is_seen_by_2w_keys():
    config = GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=4, n_embd=64)
    full, banded = GPT(config), GPT(dataclasses.replace(config, attention_band=4))
    assert flops_per_token(full) - flops_per_token(banded) == 12 * 64 * (32 - 8)  # in every other layer
    with_sinks = GPT(dataclasses.replace(banded.config, attention_sinks=3))
    assert flops_per_token(with_sinks) - flops_per_token(banded) == 12 * 64 * 3


def test_gpt2_takes_six_flops_per_weight_plus_attention():
    with meta_device():
        model = GPT(GPTConfig())
    assert flops_per_token(model) == 6 * (12 * 12 * 768**2 + 50_257 * 768) + 12 * 12 * 768 * 1024


def test_memory_of_weights_gradients_and_moments():
    with meta_device():
        model = GPT(GPTConfig())
    assert memory_estimate(model, 0, "bfloat16") == 16 * 124_439_808
    assert memory_estimate(model, 0, "bfloat16", averaged=True) == 20 * 124_439_808
    assert memory_estimate(model, 8, "float32") > memory_estimate(model, 8, "bfloat16")
    with meta_device():
        alibi, plain = (GPT(GPTConfig(positions=name)) for name in ("alibi", "none"))
    biases = memory_estimate(alibi, 8, "float32") - memory_estimate(plain, 8, "float32")
    assert biases == 12 * 1024 * 1024 * 4


def allocated_at_the_peak(call):
    """The most bytes that a call has allocated on the CPU at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


LLAMA = {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False}


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize(
    "settings",
    [{}, LLAMA, LLAMA | {"qk_norm": True}, {"qk_norm": True}, LLAMA | {"norm": "layernorm"}, LLAMA | {"n_kv_head": 2}],
    ids=str,
)
def test_memory_of_a_step_on_a_cpu_is_what_it_allocates(settings, checkpointing):
    model = GPT(GPTConfig(block_size=512, vocab_size=16, n_layer=4, n_head=4, n_embd=64, **settings))
    model.activation_checkpointing = checkpointing
    tokens = torch.zeros(2, 512, dtype=torch.int64)

    def step():
        model(tokens, tokens).total.backward()

    step()  # the gradients stay
    estimate, weights = (memory_estimate(model, n, "float32", "cpu", checkpointing) for n in (2, 0))
    assert allocated_at_the_peak(step) == pytest.approx(estimate - weights, rel=0.05)


def test_peak_flops_are_measured_on_a_cpu_and_known_for_some_gpus():
    assert 1e8 < peak_flops(torch.device("cpu"), "any", "float32") < 1e14
    cuda = torch.device("cuda", 0)
    assert peak_flops(cuda, "NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert peak_flops(cuda, "NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops(cuda, "NVIDIA H100 80GB HBM3", "float16") == 989e12
    assert peak_flops(cuda, "NVIDIA L40", "bfloat16") == 181e12
    assert peak_flops(cuda, "NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops(cuda, "NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert peak_flops(cuda, "Tesla V100-SXM2-16GB", "float16") == 125e12
    assert peak_flops(cuda, "Tesla V100-SXM2-16GB", "tf32") == 15.7e12
    assert peak_flops(cuda, "Tesla T4", "bfloat16") is None  # which it emulates
    assert peak_flops(cuda, "NVIDIA L40S", "tf32") == 183e12
    assert peak_flops(cuda, "AMD Instinct MI300X", "tf32") == 653.7e12
    assert peak_flops(cuda, "NVIDIA GB200", "bfloat16") == 2500e12
    assert peak_flops(cuda, "NVIDIA H20", "bfloat16") == 148e12
    assert peak_flops(cuda, "NVIDIA GeForce RTX 5090", "bfloat16") == 209.5e12
    assert peak_flops(cuda, "AMD Instinct MI300X", "bfloat16") == 1307e12
    assert peak_flops(cuda, "NVIDIA RTX A1000", "bfloat16") is None
    assert peak_flops(cuda, "Some GPU of 2031", "bfloat16") is None
    assert peak_flops(torch.device("mps"), "mps", "float32") is None


def test_tf32_is_half_as_fast_as_16_bits_where_tensor_cores_have_it():
    for name, accelerator in ACCELERATORS.items():
        expected = accelerator.single if accelerator.capability < (8, 0) else accelerator.half / 2
        assert accelerator.tf32 is None or accelerator.tf32 == pytest.approx(expected, rel=0.015), name


def test_a_peak_measured_under_load_is_measured_again():
    peaks = iter([100.0, 80.0, 200.0])  # the machine is busy twice
    utilization = Utilization(lambda: next(peaks), flops_per_token=6, processes=2)
    assert utilization.at(None) is None
    assert utilization.at(20.0) == 0.6
    assert utilization.at(50.0) == 1.5  # 80 is no better than 100
    assert utilization.at(50.0) == 0.75 and utilization.at(20.0) == 0.3
    assert Utilization(lambda: None, 6, 1).at(20.0) is None


def test_a_peak_is_measured_again_a_few_times_only():
    measured = []
    utilization = Utilization(lambda: measured.append(None) or 1.0, flops_per_token=1, processes=1)
    assert [utilization.at(2.0) for _ in range(20)] == [2.0] * 20 and len(measured) == 1 + Utilization.AGAIN


def test_a_resumed_log_continues_at_the_run_s_step(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "train_loss": 1.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train')  # killed in the middle of a line
    MetricsLog(tmp_path, 2).write({"step": 3, "val_loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "train_loss": 1.5}, {"step": 2, "train_loss": 1.5}, {"step": 3, "val_loss": 2.0}]


def test_the_meter_averages_since_the_last_take():
    meter = Meter()
    meter.add(10.0, 4, 0.5)
    meter.add(20.0, 6, 1.5)
    assert meter.take() == (3.0, 5.0)
    meter.add(1.0, 1, 1.0)
    assert meter.take() == (1.0, 1.0) and meter.take() == (None, None)


def test_human_readable_figures():
    assert [human(x, "B") for x in (12, 63_300_000, 2.5e9, 1e12)] == ["12B", "63.3MB", "2.5GB", "1TB"]


def test_the_description_of_a_mixture_counts_all_and_active_parameters():
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 9, "block_size": 8, "mlp_size": 24, "bias": False}
    dense, mixture = GPT(GPTConfig(**sizes)), GPT(GPTConfig(**sizes, n_experts=4, experts_per_token=1))
    expert, other = 2 * 16 * 24, 9 * 16 + 8 * 16 + 3 * 16 + 4 * 16 * 16
    assert describe_parameters(dense) == f"{other + expert:,}"
    counts = f"{other + 4 * 16 + 4 * expert:,} parameters, {other + 4 * 16 + expert:,} active"
    assert describe_parameters(mixture, " parameters") == counts
    with_head = torch.nn.ModuleDict({"trunk": mixture, "head": torch.nn.Linear(16, 1)})
    assert describe_parameters(with_head).endswith(f", {other + 4 * 16 + expert + 17:,} active")
