"""Frozen layers against torch's own linear layers and, for 8 bits, a transcription in numpy."""

import copy
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt_arc.decoding import linear
from gpt_arc.decoding.linear import InferenceLinear, for_inference, packable
from helpers import randomised
from model import GPT, GPTConfig

TYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not packable(dtype), reason=f"this CPU packs no {dtype}"))
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.fixture(autouse=True)
def pack_the_smallest_layers(monkeypatch):
    monkeypatch.setattr(linear, "PACKED_FROM", 0)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(layout: str, bias: bool, dtype: torch.dtype = torch.float32) -> tuple[InferenceLinear, torch.nn.Linear]:
    """An inference layer of 19 outputs from 33 inputs, and the linear layer that it was made from."""
    linear = torch.nn.Linear(33, 19, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(drawn(19, 33))
        if bias:
            linear.bias.copy_(drawn(19, seed=1))
    return InferenceLinear(linear.weight, linear.bias, layout), linear


def assert_near(y: torch.Tensor, expected: torch.Tensor) -> None:
    """float32: 1e-5. bfloat16 has 8 significant bits: sums in any order and precision, rounded once, differ by a unit
    in the last place (2^-7); a bias added after a first rounding makes it two."""
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2**-6
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_an_inference_layer_equals_the_linear_layer(layout, bias, dtype):
    layer, linear = layer_of(layout, bias, dtype)
    assert layer.layout == layout
    for shape in ((1, 33), (2, 33), (17, 33), (1, 1, 33), (3, 5, 33), (33,)):
        x = drawn(*shape, seed=2, dtype=dtype)
        with torch.no_grad():
            assert_near(layer(x), linear(x))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["plain", "packed", "int8"])
def test_inference_layers_compile(layout, bias, dtype):
    """As `aot_eager` traces it; 8-bit weights are compared with the eager layer."""
    torch._dynamo.reset()
    layer, linear = layer_of(layout, bias, dtype)
    expected = linear if layout != "int8" else layer
    compiled = torch.compile(lambda x: layer(x) + 1, backend="aot_eager", fullgraph=True)
    for shape in ((1, 33), (1, 1, 33), (2, 33), (17, 33)):
        x = drawn(*shape, seed=2, dtype=dtype)
        with torch.no_grad():
            assert_near(compiled(x), expected(x) + 1)
    torch._dynamo.reset()


def test_layers_too_small_to_gain_are_not_packed(monkeypatch):
    monkeypatch.setattr(linear, "PACKED_FROM", 19 * 33 + 1)
    assert layer_of("packed", bias=True)[0].layout == "plain"
    monkeypatch.setattr(linear, "PACKED_FROM", 19 * 33)
    assert layer_of("packed", bias=True)[0].layout == "packed"


def test_packed_weights_are_freed_with_their_layer():
    before = len(linear._packed)
    layers = [layer_of("packed", bias=True)[0] for _ in range(3)]
    assert len(linear._packed) == before + 3
    last = layers.pop()
    del layers
    gc.collect()
    assert len(linear._packed) == before + 1
    last(drawn(1, 33))
    del last
    gc.collect()
    assert len(linear._packed) == before


def test_an_inference_layer_is_not_saved():
    assert not layer_of("int8", bias=True)[0].state_dict()


def rounded(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers from -127 to 127, and the scale of each output."""
    scale = np.abs(weight).max(1) / np.float32(127)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.rint(weight / scale[:, None])), scale


@pytest.mark.parametrize("bias", [True, False])
def test_8_bits_equal_a_transcription(bias):
    layer, linear = layer_of("int8", bias)
    whole, scale = rounded(linear.weight.detach().numpy())
    assert layer.weight.dtype == torch.int8 and np.array_equal(layer.weight.numpy(), whole)
    assert np.abs(whole).max(1).tolist() == [127] * 19
    np.testing.assert_allclose(layer.scale.numpy(), scale, rtol=1e-6)
    for rows in (1, 2, 17):
        x = drawn(rows, 33, seed=2)
        expected = x.numpy() @ (whole * scale[:, None]).T + (linear.bias.detach().numpy() if bias else 0)
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5, rtol=1e-5)


def test_8_bits_differ_by_at_most_half_a_step_and_zero_stays_zero():
    weight = drawn(19, 33) * torch.logspace(-20, 20, 19)[:, None]
    weight[4] = 0
    layer = InferenceLinear(weight, None, "int8")
    step = weight.abs().amax(1, keepdim=True) / 127
    error = (layer.weight * layer.scale[:, None] - weight).abs()
    assert (error <= step * (0.5 + 1e-4)).all()
    assert (layer.scale > 0).all() and error[:4].amax() > 0 and (layer(drawn(2, 33))[:, 4] == 0).all()


HEADS = [{}, {"head_bias": True}, {"tied_head": False}, {"tied_head": False, "head_bias": True, "bias": False}]


def logits_of(model: GPT, layout: str, tokens: torch.Tensor) -> torch.Tensor:
    head = for_inference(model, layout)
    assert not any(isinstance(module, torch.nn.Linear) for module in model.blocks.modules())
    with torch.no_grad():
        return head(model.hidden(tokens))


def model_of(change: dict) -> tuple[GPT, torch.Tensor]:
    model = randomised(GPT(GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=4, n_embd=32, **change)))
    return model, torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("change", HEADS, ids=lambda change: ",".join(change) or "tied_head")
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_freezing_keeps_the_logits(layout, change):
    model, tokens = model_of(change)
    with torch.no_grad():
        expected = model(tokens)
    assert_near(logits_of(model, layout, tokens), expected)


@pytest.mark.parametrize("change", HEADS, ids=lambda change: ",".join(change) or "tied_head")
def test_freezing_in_8_bits_rounds_each_matrix_except_the_embeddings(change):
    model, tokens = model_of(change)
    reference = copy.deepcopy(model)
    head = model.token_embedding.weight if model.config.tied_head else model.head.weight
    whole, scale = rounded(head.detach().numpy())
    for module in reference.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            quantized, steps = rounded(module.weight.detach().numpy())
            module.weight.data = torch.from_numpy(quantized * steps[:, None])
    with torch.no_grad():
        expected = F.linear(reference.hidden(tokens), torch.from_numpy(whole * scale[:, None]), model.head_bias)
        plain = model(tokens)
    logits = logits_of(model, "int8", tokens)
    assert_near(logits, expected)
    assert not torch.allclose(logits, plain, atol=1e-3)
