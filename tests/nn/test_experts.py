"""Mixtures of experts against a plain loop over tokens, formulas, enumeration and a dense model."""

import copy
import dataclasses
import json
import math
from itertools import permutations
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from expert_equality import ACTIVATIONS
from gpt_arc.decoding import linear
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.errors import entry_point
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig, make_batch
from gpt_arc.finetuning.examples import Columns, SpecialTokens
from gpt_arc.finetuning.lora import add_adapters, merge_adapters
from gpt_arc.nn.experts import Experts
from gpt_arc.nn.meta import meta_device
from gpt_arc.nn.names import Activation
from gpt_arc.planning.cost import flops_per_token, memory_estimate
from gpt_arc.settings import mistake
from gpt_arc.training import routers
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.log import read_metrics
from gpt_arc.training.optim import build_optimizers
from gpt_arc.training.routers import RouterMeter
from gpt_arc.weights.directory import LATER, load_model, save_model
from gpt_arc.weights.upcycle import upcycled
from helpers import TINY_FLAGS, command, randomised
from model import GPT, GPTConfig, make_experts

TINY = GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=2, n_embd=16, mlp_size=24, n_experts=4)


def changed(**settings) -> GPTConfig:
    return dataclasses.replace(TINY, **settings)


def experts_of(config: GPTConfig, starved: int | None = None) -> Experts:
    """Experts in training mode whose weights and biases all affect the output. No token chooses expert `starved` if
    feature 0 of the tokens is 1."""
    experts = randomised(make_experts(config)).train()
    if starved is not None:
        experts.router.weight.data[starved, 0] -= 40
    return experts


def tokens_of(count: int, width: int = 16, **settings) -> torch.Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(count), **settings)
    x[:, 0] = 1
    return x.requires_grad_()


def text(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(23, (rows, 12), generator=torch.Generator().manual_seed(seed))


def by_loop(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    """The reference: every choice of every token in turn."""
    config, weights = experts.config, dict(experts.named_parameters())
    rows = []
    for token in x:
        probabilities = (weights["router.weight"] @ token).softmax(0)
        best = probabilities.argsort(descending=True)[: config.experts_per_token].tolist()
        whole = probabilities[best].sum() if len(best) > 1 else 1
        total = torch.zeros_like(token)
        for e in best:
            up, projection = weights["up"][e] @ token, weights["projection"][e]
            hidden = ACTIVATIONS[config.activation](up + weights["up_bias"][e] if config.bias else up)
            output = projection @ hidden + (weights["projection_bias"][e] if config.bias else 0)
            total = total + output * probabilities[e] / whole
        if config.shared_experts:
            up = F.linear(token, weights["shared.up.weight"], weights.get("shared.up.bias"))
            hidden = ACTIVATIONS[config.activation](up)
            total = total + F.linear(hidden, weights["shared.projection.weight"], weights.get("shared.projection.bias"))
        rows.append(total)
    return torch.stack(rows)


def outputs_and_gradients(experts: Experts, x: torch.Tensor, forward) -> list[torch.Tensor]:
    """`forward(x)`, and the gradients of x and of every parameter."""
    y = forward(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, [x, *experts.parameters()], cotangent.to(y.dtype))]


VARIANTS = [
    dict(experts_per_token=1), dict(experts_per_token=2), dict(experts_per_token=4),
    dict(bias=False), dict(bias=False, shared_experts=1, activation="swiglu"), dict(shared_experts=2, mlp_size=10),
    *({"activation": activation} for activation in get_args(Activation)),
]  # fmt: skip


@pytest.mark.parametrize("change", VARIANTS, ids=str)
@pytest.mark.parametrize("count", [1, 13])
def test_experts_match_a_loop_over_tokens_and_choices(change, count):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        starved = 2 if change.get("experts_per_token") != 4 else None
        experts = experts_of(changed(**change), starved).to(dtype)
        x = tokens_of(count).detach().to(dtype).requires_grad_()
        actual = outputs_and_gradients(experts, x, lambda x: experts(x)[0])  # noqa: B023
        expected = outputs_and_gradients(experts, x, lambda x: by_loop(experts, x))  # noqa: B023
        for value, reference in zip(actual, expected):
            torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance * reference.abs().max().item())
        if starved is not None:
            up = actual[3]
            assert not up[starved].any() and up.any()


@pytest.mark.parametrize("change", VARIANTS, ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "weights"])
def test_experts_in_16_bits_match_the_loop_within_rounding(change, whole):
    """One grouped product where sizes are multiples of 8, otherwise expert by expert."""
    experts, x = experts_of(changed(**change), starved=None), tokens_of(40)
    if whole:
        experts.bfloat16().float()  # round the weights in float32 as well
        x = x.detach().bfloat16().float().requires_grad_()
    expected = outputs_and_gradients(experts, x, lambda x: by_loop(experts, x))
    if whole:
        experts, x = experts.bfloat16(), x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        actual = outputs_and_gradients(experts, x, lambda x: experts(x)[0])
    assert actual[0].dtype == torch.bfloat16
    # relu's slope jumps where rounding changes a sign
    tolerance = 2**-4 if change.get("activation") == "relu" else 2**-6
    for value, reference in zip(actual, expected):
        assert (value.float() - reference).norm() <= tolerance * reference.norm()


def test_a_step_never_waits_for_the_device():
    """Tensors without values raise an error if a step reads one, such as a count of tokens."""
    busy = changed(capacity_factor=1.0, router_jitter=0.1, shared_experts=1, dropout=0.1)
    for config in (busy, changed(expert_selection="drawn"), changed(balance_rate=0.1)):
        with FakeTensorMode():
            model, tokens = GPT(config), torch.zeros(2, 12, dtype=torch.int64)
            meter = RouterMeter(model)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens, tokens)
            (loss.total + sum(loss.auxiliary.values())).backward()
            meter.add()
            assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_several_gates_sum_to_1_and_a_single_gate_is_the_probability(k):
    experts, x = experts_of(changed(experts_per_token=k)), tokens_of(30)
    chosen, gates, logits = experts.route(x)
    probabilities = (x @ experts.router.weight.T).softmax(-1)
    torch.testing.assert_close(logits.softmax(-1), probabilities)
    best = probabilities.sort(descending=True)
    assert torch.equal(chosen, best.indices[:, :k])
    if k == 1:
        torch.testing.assert_close(gates, best.values[:, :1])
    else:
        torch.testing.assert_close(gates, logits.gather(1, chosen).softmax(-1))  # as in Mixtral


def test_the_router_computes_in_float32_under_autocast():
    experts = experts_of(TINY)
    experts.router.weight.data.fill_(1.0)
    experts.router.weight.data[2] += 1e-4  # lost in 16 bits
    experts.router.weight.data[1] += 5e-5
    x = tokens_of(9).abs()
    with torch.autocast("cpu", torch.bfloat16):
        chosen, gates, logits = experts.route(x)
        _, routing = experts(x)
    assert chosen.tolist() == [[2, 1]] * 9
    assert {t.dtype for t in (gates, logits, routing.load, routing.gates, routing.z)} == {torch.float32}
    torch.testing.assert_close(logits, x @ experts.router.weight.T, rtol=1e-6, atol=0)


def test_figures_of_a_uniform_router():
    experts = experts_of(changed(experts_per_token=1))
    experts.router.weight.data.zero_()
    _, routing = experts(tokens_of(8))
    torch.testing.assert_close(routing.gates, torch.full((4,), 0.25))
    assert routing.load.sum() == 1 and routing.dropped == 0
    assert routing.z.item() == pytest.approx(math.log(4) ** 2, rel=1e-6)
    assert routing.entropy.item() == pytest.approx(math.log(4), rel=1e-6)
    assert 4 * (routing.load * routing.gates).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 2])
def test_router_losses_match_their_formulas(k):
    """Switch's E sum f P, where f is the share of choices (1 at balance), and the mean square of logsumexp."""
    model = GPT(changed(experts_per_token=k, balance_loss=0.5, router_z_loss=0.25, n_layer=3, expert_interval=1))
    randomised(model).train()
    inputs = []
    for experts in model.experts:
        experts.register_forward_hook(lambda module, args, output: inputs.append((module, args[0].flatten(0, 1))))
    loss = model(text(), text())
    balance = z = 0.0
    for experts, x in inputs:
        logits = x @ experts.router.weight.T
        probabilities = logits.softmax(-1)
        shares = [(probabilities.argsort(descending=True)[:, :k] == e).sum().item() / (24 * k) for e in range(4)]
        balance += 4 * sum(f * p for f, p in zip(shares, probabilities.mean(0)))
        z += logits.exp().sum(-1).log().square().mean()
    assert len(inputs) == 3 and set(loss.auxiliary) == {"balance", "router_z"}
    torch.testing.assert_close(loss.auxiliary["balance"], 0.5 * balance)
    torch.testing.assert_close(loss.auxiliary["router_z"], 0.25 * z)
    routers = [experts.router.weight for experts in model.experts]
    for name, value in (("balance", 0.5 * balance), ("router_z", 0.25 * z)):
        gradients = torch.autograd.grad(loss.auxiliary[name], routers, retain_graph=True)
        for gradient, reference in zip(gradients, torch.autograd.grad(value, routers, retain_graph=True)):
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert model.eval()(text(), text()).auxiliary == {}
    assert GPT(changed(balance_loss=0.0, router_z_loss=0.0))(text(), text()).auxiliary == {}


def to_each(experts: Experts, choices: list[int]) -> torch.Tensor:
    """Tokens that the router sends to the given experts."""
    experts.router.weight.data.zero_()
    experts.router.weight.data[:, :4] = torch.eye(4)
    x = tokens_of(len(choices)).detach()
    x[:, :4] = 3 * F.one_hot(torch.tensor(choices), 4)
    return x


def test_tokens_beyond_the_capacity_get_no_expert_output():
    choices = [0, 0, 1, 0, 2, 0, 1, 0, 0, 1, 1, 1]  # 6, 5 and 1 of 12; the capacity is 12 / 4 * 1.25 = 3.75
    config = changed(experts_per_token=1, capacity_factor=1.25)
    experts, free = experts_of(config), experts_of(dataclasses.replace(config, capacity_factor=None))
    x = to_each(experts, choices)
    to_each(free, choices)
    y, routing = experts(x)
    expected, unlimited = free(x)
    late = [7, 8, 11]
    fitting = [i for i in range(12) if i not in late]
    assert not y[late].any() and expected[late].any(dim=-1).all()
    torch.testing.assert_close(y[fitting], expected[fitting])
    assert routing.dropped.item() == 3 / 12 and unlimited.dropped == 0
    assert routing.load.tolist() == unlimited.load.tolist() == pytest.approx([6 / 12, 5 / 12, 1 / 12, 0])
    torch.testing.assert_close(experts.eval()(x), expected)  # evaluation has no capacity limit and returns no routing


def test_one_of_two_choices_may_exceed_the_capacity():
    experts = experts_of(changed(experts_per_token=2, capacity_factor=0.5))  # one of the 8 choices for each expert
    x = to_each(experts, [0, 0, 1, 0])
    x[:, :4] += torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]])
    y, routing = experts(x)  # (0, 1), (0, 2), (1, 3), (0, 3)
    _, gates, _ = experts.route(x)
    assert routing.dropped.item() == 4 / 8 and not y[3].any()
    for row, place, expert in ((1, 1, 2), (2, 1, 3)):
        hidden = F.gelu(experts.up[expert] @ x[row] + experts.up_bias[expert], approximate="tanh")
        output = experts.projection[expert] @ hidden + experts.projection_bias[expert]
        torch.testing.assert_close(y[row], gates[row, place] * output, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert experts.up.grad.isfinite().all() and experts.router.weight.grad.any()


def test_jitter_stays_in_range_and_only_affects_the_router_in_training():
    experts = experts_of(changed(router_jitter=0.1, n_experts=16))
    x = torch.ones(500, 16)
    experts.router.weight.data = torch.eye(16)
    _, _, factors = experts.route(x)
    assert 0.9 <= factors.min() < 0.901 and 1.099 < factors.max() <= 1.1
    assert factors.std().item() == pytest.approx(0.2 / math.sqrt(12), rel=0.05)
    experts.router.weight.data.zero_()
    trained, _ = experts(x)
    assert torch.equal(trained, experts.eval()(x))
    experts.router.weight.data = torch.eye(16)
    assert torch.equal(experts.route(x)[2], x)


def test_experts_are_drawn_one_after_another_without_replacement():
    experts = experts_of(changed(expert_selection="drawn"))
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    x = torch.zeros(40_000, 16)
    x[:, 0] = 1
    experts.router.weight.data[:, 0] = p.log()
    torch.manual_seed(0)
    chosen, gates, _ = experts.route(x)
    for i, j in permutations(range(4), 2):
        expected = (p[i] * p[j] / (1 - p[i])).item()
        share = (chosen == torch.tensor([i, j])).all(1).float().mean().item()
        assert abs(share - expected) < 4 * math.sqrt(expected / len(x)), (i, j)
    torch.testing.assert_close(gates, p[chosen] / p[chosen].sum(1, keepdim=True))
    chosen, _, _ = experts.eval().route(x)
    assert (chosen == torch.tensor([0, 1])).all()


def test_expert_dropout_acts_inside_the_experts_and_residual_dropout_outside():
    for change, values in (({"expert_dropout": 0.5}, {0.0, 2.0}), ({"residual_dropout": 0.75}, {0.0, 4.0})):
        experts = experts_of(changed(activation="relu", mlp_size=16, experts_per_token=4, **change))
        for name, parameter in experts.named_parameters():
            parameter.data.fill_(1.0 if name == "up_bias" else 0.0)
        experts.projection.data[:] = torch.eye(16)
        x = tokens_of(50)
        y = experts(x)[0]
        gates = 4 if "expert_dropout" in change else 1
        levels = {round(value * gates) / gates for value in y.flatten().tolist()}
        assert values <= levels and (gates > 1 or levels == values)  # each of the four experts has its own mask
        assert y.mean().item() == pytest.approx(1, abs=0.15)
        assert (experts.eval()(x) == 1).all()


def skewed(**settings) -> GPT:
    """A model whose router prefers expert 0, then expert 1."""
    model = GPT(changed(n_layer=1, balance_loss=0.0, router_z_loss=0.0, bias=True, **settings))
    randomised(model).train()
    model.blocks[0].mlp_norm.bias.data[0] += 1
    model.experts[0].router.weight.data[:, 0] = torch.tensor([0.3, 0.2, 0.0, 0.0])
    return model


def test_the_selection_bias_balances_skewed_loads():
    def loads(model: GPT, steps: int) -> list[float]:
        meter, deviations = RouterMeter(model), []
        for step in range(steps):
            for half in range(2):
                model(text(16, 2 * step + half))
                meter.add()
            meter.step(True)
            deviations.append(meter.take()["expert_cv"])
        return deviations

    model = skewed(balance_rate=0.02)
    model(text(16))
    before, meter = model.routings[0].load, RouterMeter(model)
    meter.add()
    meter.step(True)
    assert torch.equal(model.experts[0].balance, 0.02 * (0.25 - before).sign()) and before.max() > 0.3
    model = skewed(balance_rate=0.005)
    balanced = loads(model, 120)
    assert balanced[0] > 0.9 and sum(balanced[-10:]) / 10 < 0.15
    unbiased = loads(skewed(), 20)
    assert min(unbiased) > 0.3
    chosen, gates, logits = model.experts[0].route(tokens_of(20))
    torch.testing.assert_close(gates, logits.gather(1, chosen).softmax(-1))  # the bias doesn't affect the gates


def test_the_rounding_of_means_over_processes_moves_no_bias(monkeypatch):
    """Experts 0 and 1 have exactly their share; a mean over several processes is off in the last bit."""
    model = skewed(balance_rate=0.02)
    model(text(16))
    meter, load = RouterMeter(model), torch.tensor([0.25, 0.25, 0.375, 0.125])
    model.routings[0] = model.routings[0]._replace(load=load)
    meter.add()
    off = torch.tensor([2**-25, -(2**-26), 0, 0, 0, 0])
    monkeypatch.setattr(routers.distributed, "sum_over_ranks", lambda x: x + off)
    meter.step(True)
    torch.testing.assert_close(model.experts[0].balance, torch.tensor([0.0, 0.0, -0.02, 0.02]), rtol=0, atol=0)


def test_the_meter_averages_over_updates_and_blocks_and_skips_updates_not_made():
    model = skewed(capacity_factor=1.0)
    meter = RouterMeter(model)
    recorded = []
    for step in range(3):
        model(text(8, step))
        meter.add()
        recorded.append(model.routings[0])
        meter.step(step != 1)
    loads = (recorded[0].load + recorded[2].load) / 2
    figures = meter.take()
    assert figures["expert_cv"] == pytest.approx((loads.std(correction=0) / loads.mean()).item())
    assert figures["expert_max"] == pytest.approx(4 * loads.max().item())
    assert figures["router_entropy"] == pytest.approx(((recorded[0].entropy + recorded[2].entropy) / 2).item())
    assert figures["dropped"] == pytest.approx(((recorded[0].dropped + recorded[2].dropped) / 2).item())
    assert figures["dropped"] > 0
    assert meter.take() == {}
    dense = RouterMeter(GPT(changed(n_experts=0)))
    dense.add()
    dense.step(True)
    assert dense.take() == {}


def test_parameters_and_flops_match_mixtral():
    mixtral = GPTConfig(
        4096, 32_000, 32, 32, 4096, n_kv_head=8, mlp_size=14_336, n_experts=8, experts_per_token=2, norm="rmsnorm",
        positions="rotary", activation="swiglu", bias=False, tied_head=False,
    )  # fmt: skip
    with meta_device():
        model = GPT(mixtral)
    assert model.num_parameters() == 46_702_792_704
    assert model.num_parameters(active=True) == 12_879_925_248
    norms = (2 * 32 + 1) * 4096
    multiplying = 12_879_925_248 - 32_000 * 4096 - norms
    assert model.num_parameters(embeddings=False, active=True) == multiplying + norms - 32_000 * 4096  # of the head
    assert flops_per_token(model) == 6 * multiplying + 12 * 4096 * 4096 * 32
    biased = GPT(changed(shared_experts=1, expert_interval=2))
    sizes = {name: p.numel() for name, p in biased.named_parameters()}
    of_experts = sum(sizes[f"blocks.1.mlp.{name}"] for name in ("up", "up_bias", "projection", "projection_bias"))
    assert biased.num_parameters(active=True) == sum(sizes.values()) - of_experts // 2


@pytest.mark.parametrize("change", [{"n_experts": 0}, {}, {"activation": "swiglu"}, {"experts_per_token": 1}], ids=str)
def test_estimated_memory_of_a_step_matches_what_autograd_saves(change):
    model = GPT(changed(n_embd=64, mlp_size=128, vocab_size=23, **change))
    saved_bytes, references = {}, []

    def record(x: torch.Tensor) -> torch.Tensor:
        saved_bytes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        references.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        model(text(16), text(16))
    for parameter in model.parameters():
        saved_bytes.pop(parameter.data_ptr(), None)
    estimate = memory_estimate(model, 16, "float32") - memory_estimate(model, 0, "float32")
    assert sum(saved_bytes.values()) == pytest.approx(estimate, rel=0.15)


def test_every_parameter_is_optimized_and_stacked_biases_do_not_decay():
    model = GPT(changed(shared_experts=1, expert_interval=2))
    decayed, not_decayed = build_optimizers(model, TrainingConfig(weight_decay=0.1))["optimizer"].param_groups
    assert decayed["weight_decay"] == 0.1 and not_decayed["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in (decayed, not_decayed)]
    assert groups[0] | groups[1] == set(names.values()) and not groups[0] & groups[1]
    decayed_names = {name.removeprefix("blocks.1.mlp.") for name in groups[0]}
    assert {"router.weight", "up", "projection"} <= decayed_names
    assert {"up_bias", "projection_bias"} <= {name.removeprefix("blocks.1.mlp.") for name in groups[1]}


@pytest.mark.parametrize("change", [{}, {"activation": "swiglu", "bias": False, "tied_head": False}], ids=str)
@pytest.mark.parametrize("settings", [{}, {"experts_per_token": 3, "expert_interval": 2, "balance_rate": 0.1}], ids=str)
def test_an_upcycled_model_has_the_dense_model_s_loss(change, settings):
    dense = randomised(GPT(changed(n_experts=0, **change))).train()
    mixture = upcycled(dense, 4, **settings)
    torch.testing.assert_close(mixture(text(), text()).total, dense(text(), text()).total, rtol=1e-6, atol=1e-5)
    routers = {name for name, _ in mixture.named_parameters() if "router" in name}
    assert len(routers) == (1 if "expert_interval" in settings else 2)
    assert mixture.num_parameters(active=True) > dense.num_parameters()
    before = dense.blocks[1].mlp.up.weight.clone()
    mixture.experts[-1].up.data[0] += 1
    assert torch.equal(mixture.experts[-1].up[1], before) and torch.equal(dense.blocks[1].mlp.up.weight, before)


def test_every_nth_block_has_experts():
    model = GPT(changed(n_layer=6, expert_interval=3))
    assert [isinstance(block.mlp, Experts) for block in model.blocks] == [False, False, True] * 2
    model(text(), text())
    assert len(model.routings) == len(model.experts) == 2


@pytest.mark.parametrize(
    "change",
    [
        {}, {"experts_per_token": 1, "capacity_factor": 0.5}, {"expert_selection": "drawn", "router_jitter": 0.2},
        {"shared_experts": 1, "expert_interval": 2, "balance_rate": 0.1, "positions": "rotary", "activation": "swiglu"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_cached_decoding_equals_the_full_forward(change, packed, monkeypatch):
    model = randomised(GPT(changed(**change)))
    for experts in model.experts:
        if model.config.balance_rate:
            experts.balance += torch.tensor([0.2, -0.1, 0.0, 0.1])
    prompts = [text(1, seed)[0, :length].tolist() for seed, length in ((1, 3), (2, 5))]
    endings = text(2, 3)[:, :6].tolist()
    with torch.no_grad():
        expected = [model(torch.tensor([prompt + ending]))[0] for prompt, ending in zip(prompts, endings)]
    decoder = Decoder(model)
    if packed:
        monkeypatch.setattr(linear, "PACKED_FROM", 1)
        decoder.prepare(rows=2, compile=False)
    logits = [decoder.read(prompts)]
    logits += decoder.extend([ending[:2] for ending in endings]).unbind(1)
    logits += [decoder.step([ending[i] for ending in endings]) for i in range(2, 6)]
    for row, (prompt, whole) in enumerate(zip(prompts, expected)):
        actual = torch.stack([step[row] for step in logits])
        torch.testing.assert_close(actual, whole[len(prompt) - 1 :], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_experts_equal_eager_experts(checkpointing):
    """In bfloat16 the step is one graph; in float32 the loop over experts breaks it."""
    eager = GPT(changed(n_layer=1, capacity_factor=1.0))
    randomised(eager).train().activation_checkpointing = checkpointing
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile(backend="aot_eager")
    for seed in range(2):
        steps = []
        for model in (eager, compiled):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(text(seed=seed), text(seed=seed))
            (loss.total / 24 + sum(loss.auxiliary.values())).backward()
            steps.append((loss.total, *loss.auxiliary.values(), *(p.grad for p in model.parameters())))
            model.zero_grad()
            model.routings.clear()
        for actual, reference in zip(*steps):
            assert (actual - reference).norm() <= 2e-2 * reference.norm() + 1e-6
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()


def test_checkpointing_changes_no_result_and_records_no_routing_twice():
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = GPT(changed(dropout=0.1, expert_dropout=0.2, router_jitter=0.1, expert_selection="drawn"))
        model.activation_checkpointing = checkpointing
        loss = model(text(), text())
        routings = list(model.routings)
        (loss.total / 24 + sum(loss.auxiliary.values())).backward()
        assert all(a is b for a, b in zip(model.routings, routings, strict=True))
        results.append([loss.total, *loss.auxiliary.values(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_model_can_be_copied_after_a_step():
    model = GPT(TINY)
    model(text(), text())
    twin = copy.deepcopy(model)
    assert model.routings and not twin.routings
    assert torch.equal(twin.eval()(text()), model.eval()(text()))


def test_adapters_leave_experts_and_routers_unchanged():
    model = randomised(GPT(changed(shared_experts=1)))
    expected = model(text())
    add_adapters(model.blocks, rank=2, alpha=4)
    torch.testing.assert_close(model(text()), expected)
    assert not any(p.requires_grad for e in model.experts for p in (e.router.weight, e.up, e.up_bias, e.projection))
    assert model.experts[0].shared.up.up.requires_grad
    merge_adapters(model.blocks)
    assert model.state_dict().keys() == GPT(model.config).state_dict().keys()


def test_a_classifier_trains_with_the_router_losses():
    config = ClassifierConfig("classification", ("a", "b"), SpecialTokens(20, 21, 22), Columns("text"), 12, dropout=0.0)
    classifier = Classifier(randomised(GPT(TINY)), config)
    batch = make_batch([[[20, 1, 2, 22]], [[20, 3, 22]], [[20, 4, 5, 6, 22]]], [0, 1, 1])
    without_routers = classifier.eval()(*batch).task_loss
    outcome = classifier.train()(*batch)
    losses = classifier.trunk.router_losses()
    assert set(losses) == {"balance", "router_z"}
    torch.testing.assert_close(outcome.task_loss, without_routers + 3 * sum(losses.values()))
    assert classifier.eval()(*batch).task_loss == without_routers


def test_the_configuration_is_saved_and_an_older_one_is_dense(tmp_path):
    model = GPT(changed(balance_rate=0.5, shared_experts=1, capacity_factor=1.5, expert_selection="top"))
    model.experts[0].balance += torch.tensor([0.5, -0.5, 0.0, 1.0])
    save_model(model, None, tmp_path / "new")
    loaded, _ = load_model(tmp_path / "new")
    assert loaded.config == model.config
    assert loaded.experts[0].balance.tolist() == [0.5, -0.5, 0.0, 1.0]
    assert torch.equal(loaded.eval()(text()), model.eval()(text()))
    dense = GPT(changed(n_experts=0))
    save_model(dense, None, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    content = json.loads(path.read_text())
    for name in list(content):
        if "expert" in name or "router" in name or name.startswith(("balance", "capacity")):
            del content[name]
    assert len(content) == len(dataclasses.fields(GPTConfig)) + 2 - 11 - len(LATER)
    path.write_text(json.dumps(content))
    (tmp_path / "old" / "manifest.json").unlink()
    assert load_model(tmp_path / "old")[0].config == GPTConfig(**{**dataclasses.asdict(TINY), "n_experts": 0})


def test_a_huge_capacity_drops_nothing():
    x, experts = tokens_of(9), experts_of(changed(capacity_factor=1e300)).train()
    plain = experts_of(TINY).train()
    plain.load_state_dict(experts.state_dict())
    assert torch.equal(experts(x)[0], plain(x)[0]) and experts(x)[1].dropped == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(n_experts=-1), "n_experts = -1 must be at least 0"),
        (dict(experts_per_token=5), "experts_per_token = 5 must lie between 1 and n_experts"),
        (dict(experts_per_token=0), "experts_per_token = 0 must lie between 1 and n_experts"),
        (dict(expert_interval=0), "expert_interval = 0 must be at least 1"),
        (dict(expert_interval=3), "expert_interval = 3 leaves 2 blocks without experts"),
        (dict(shared_experts=-1), "shared_experts = -1 must be at least 0"),
        (dict(capacity_factor=0.0), "capacity_factor = 0.0 must be more than 0"),
        (dict(router_jitter=1.0), "router_jitter = 1.0 must be between 0 and 1, 1 excluded"),
        (dict(expert_dropout=-0.1), "expert_dropout = -0.1 must be between 0 and 1, 1 excluded"),
        (dict(balance_loss=math.inf), "balance_loss = inf must be at least 0"),
        (dict(router_z_loss=-1.0), "router_z_loss = -1.0 must be at least 0"),
        (dict(expert_selection="some"), 'expert_selection = "some" must be one of "top", "drawn"'),
        (dict(balance_rate=0.1, expert_selection="drawn"), "it has no say in what is drawn"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError) as refused:
        changed(**settings)
    assert sentence in mistake(refused.value, GPTConfig)


FLAGS = (*TINY_FLAGS, "--n_experts=4", "--mlp_size=16", "--compile=False", "--dtype=float32", "--balance_rate=0.01")


def test_a_resumed_run_equals_an_uninterrupted_one_and_logs_its_routers(workplace, output_of):
    def run(*flags):
        output_of(entry_point(train.main), "train.py", "sums.toml", *FLAGS, "--router_jitter=0.1", *flags)

    run("--out_dir=whole", "--log_interval=2")
    run("--out_dir=halves", "--max_iters=4", "--lr_decay_iters=8")
    run("--out_dir=halves", "--init_from=resume", "--max_iters=8")
    whole, halves = (load_file(Path(f"{folder}/last/model.safetensors")) for folder in ("whole", "halves"))
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    assert whole["blocks.0.mlp.balance"].any() and whole["blocks.0.mlp.balance"].abs().max() <= 8 * 0.01 + 1e-6
    lines = [line for line in read_metrics(Path("whole/metrics.jsonl")) if "train_loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert 0 < line["expert_cv"] < math.sqrt(3) and 1 < line["expert_max"] <= 4
        assert 0 < line["router_entropy"] <= math.log(4) + 1e-6 and line["dropped"] == 0


@pytest.mark.slow
def test_two_processes_equal_one(workplace, output_of):
    """The router losses balance the load of all processes together."""
    flags = (*FLAGS, "--balance_loss=0.1", "--max_iters=6")
    output_of(entry_point(train.main), "train.py", "sums.toml", *flags, "--out_dir=one")
    result = command("train.py", "sums.toml", *flags, "--out_dir=two", processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    one, two = (load_file(Path(f"{folder}/last/model.safetensors")) for folder in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5, msg=name)
    single, together = (read_metrics(Path(f"{folder}/metrics.jsonl"))[-1] for folder in ("one", "two"))
    for name in ("expert_cv", "expert_max", "router_entropy", "train_loss"):
        assert single[name] == pytest.approx(together[name], rel=1e-5), name
