"""The settings that choose how a model computes."""

import dataclasses
import itertools
import sys
from contextlib import nullcontext
from functools import partial
from inspect import signature
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from gpt_arc.device import DTYPES
from gpt_arc.errors import UserError
from gpt_arc.training import compile as compiling
from gpt_arc.training.compile import compile_in_place
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.kernels import check_flash_attention, check_float8, choose_kernels
from gpt_arc.training.optim import Updater
from model import GPT, GPTConfig

TINY = GPTConfig(16, 23, 3, 2, 32, norm="rmsnorm", qk_norm=True, n_experts=2, expert_interval=3)


def model_with(**settings):
    torch.manual_seed(0)
    model = GPT(TINY)
    choose_kernels(model, TrainingConfig(**settings))
    return model


def loss_of(model, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens.roll(-1, 1)).total
    loss.backward()
    return loss.item()


def test_a_residual_stream_in_16_bits_rounds_sums_only():
    tokens, streams = torch.randint(23, (4, 16)), {}
    losses = {}
    for residual in ("float32", "bfloat16"):
        model = model_with(residual=residual)
        model.final_norm.register_forward_pre_hook(lambda module, x, name=residual: streams.update({name: x[0].dtype}))
        losses[residual] = loss_of(model, tokens)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert streams == {"float32": torch.float32, "bfloat16": torch.bfloat16}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)


def test_blocks_share_their_compiled_code(monkeypatch):
    config = dataclasses.replace(TINY, n_experts=0, expert_interval=1)
    torch.manual_seed(0)
    model, compiled = GPT(config), []
    tokens = torch.randint(23, (2, 16))
    expected = model(tokens, tokens).total.detach()
    compile = torch.nn.Module.compile
    backend = lambda graph, inputs: compiled.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend=backend))
    assert compile_in_place(model, model, [tokens, tokens], torch.device("cpu"), "float32", by_block=True) is None
    assert model._compiled_call_impl is None and all(block._compiled_call_impl for block in model.blocks)
    torch.testing.assert_close(model(tokens, tokens).total.detach(), expected)
    assert len(compiled) == 1
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cuda_graphs_find_gradients_where_they_were(accumulate, monkeypatch):
    """Every update reads gradients at the addresses of the first, and is the update without graphs."""
    modes, cpu = [], torch.device("cpu")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: modes.append(settings))
    tokens, weights = torch.randint(23, (3, 2, 16)), {}
    for setting in ("graphs", False):
        model = model_with()
        if setting:
            assert compile_in_place(model, model, [tokens[0]] * 2, cpu, "float32", graphs=True) is None
            places = [p.grad.data_ptr() for p in model.parameters()]
            assert not any(p.grad.any() for p in model.parameters())
        updater = Updater(model, TrainingConfig(compile=setting), cpu, "float32")
        for each in tokens:
            for _ in range(accumulate):
                updater.backward(model(each, each).total)
            updater.update(1e-3, 0.0)
        if setting:
            assert [p.grad.data_ptr() for p in model.parameters()] == places
        weights[setting] = [p.detach() for p in model.parameters()]
    assert modes == [{"mode": "reduce-overhead"}]
    assert all(map(torch.equal, *weights.values()))
    torch.use_deterministic_algorithms(False)


def test_cuda_graphs_are_for_one_gpu(monkeypatch):
    with pytest.raises(UserError, match="compile = graphs is for one GPU, not for 1 x cpu: use --compile=True"):
        compiling.resolve_compile("graphs", torch.device("cpu"), 1.0)
    assert compiling.resolve_compile("graphs", torch.device("cuda"), 1.0)[0]
    monkeypatch.setattr(compiling, "WORLD_SIZE", 2)
    with pytest.raises(UserError, match="2 x cuda"):
        compiling.resolve_compile("graphs", torch.device("cuda"), 1.0)


def test_only_auto_goes_on_where_blocks_cannot_be_compiled(monkeypatch):
    monkeypatch.setattr(compiling, "compile_in_place", lambda *args: "no compiler")
    model = model_with()
    assert not compiling.try_compiling(model, model, [], torch.device("cpu"), "float32", "auto")
    with pytest.raises(UserError, match="compile = blocks can't work here"):
        compiling.try_compiling(model, model, [], torch.device("cpu"), "float32", "blocks")


def test_flash_attention_of_another_package(monkeypatch):
    with pytest.raises(UserError, match="flash_attention = 3 isn't available here; --flash_attention=2 needs"):
        model_with(flash_attention="3")
    chosen = []
    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", chosen.append)
    model_with(flash_attention="4")
    assert chosen == ["FA4"]


@pytest.mark.parametrize(("capability", "works"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_float8_is_for_gpus_that_multiply_in_it(capability, works):
    with nullcontext() if works else pytest.raises(UserError, match="device is this GPU: use --float8=False"):
        check_float8(TrainingConfig(float8=True), capability, "this GPU")
    check_float8(TrainingConfig(), capability, "this GPU")


@pytest.mark.parametrize(
    ("version", "capability", "dtype", "sentence"),
    [
        ("3", (8, 0), "bfloat16", "capability 9, such as the H100, and the device is this GPU: use"),
        ("4", None, "bfloat16", "capability 9 or 10, such as the H100 and the B200, and the device is this GPU: use"),
        ("4", (10, 0), "float32", "16 bits, and these are in float32: use --dtype=bfloat16 or --flash_attention=2"),
    ],
)
def test_flash_attention_is_for_some_gpus_and_16_bits(version, capability, dtype, sentence):
    with pytest.raises(UserError, match=f"^flash_attention = {version} .* {sentence}"):
        check_flash_attention(TrainingConfig(flash_attention=version), dtype, capability, "this GPU")
    check_flash_attention(TrainingConfig(), dtype, capability, "this GPU")


@pytest.mark.parametrize("version", ["3", "4"])
def test_torch_has_the_same_rule_for_flash_attention(version, monkeypatch):
    """Its own functions say which devices and types a version takes."""
    module = pytest.importorskip(f"torch.nn.attention._fa{version}")  # torch 2.11 may keep it elsewhere
    training = TrainingConfig(flash_attention=version)
    obstacle = partial(getattr(module, f"_fa{version}_forward_support_error"), dropout_p=0.0, return_debug_mask=False)
    absent = signature(obstacle).parameters.keys() - {"query", "key", "value", "dropout_p", "return_debug_mask"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, dtype in itertools.product((7, 8, 9, 10, 12), ("float32", "tf32", "bfloat16", "float16")):
        monkeypatch.setattr(module, "_get_device_major", lambda device, major=major: major)
        tensor = Mock(is_cuda=True, device="cuda", dtype=DTYPES[dtype], dim=lambda: 4)
        refused = obstacle(query=tensor, key=tensor, value=tensor, **dict.fromkeys(absent))
        with pytest.raises(UserError) if refused else nullcontext():
            check_flash_attention(training, dtype, (major, 0), "this GPU")


def test_float8_is_for_the_blocks_linear_layers(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"float8 = true needs torchao: pip install -e '.\[float8\]'"):
        model_with(float8=True)
    calls = []
    package = SimpleNamespace(convert_to_float8_training=lambda *args, **settings: calls.append((args, settings)))
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(float8=package))
    monkeypatch.setitem(sys.modules, "torchao.float8", package)
    model = model_with(float8=True)
    [((converted,), settings)] = calls
    names = [name for name, module in converted.named_modules() if settings["module_filter_fn"](module, name)]
    layers = ("attention.qkv", "attention.projection", "mlp.up", "mlp.projection")
    assert names == [f"{i}.{layer}" for i in range(3) for layer in layers][:-2] and converted is model.blocks
