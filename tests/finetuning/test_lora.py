"""Low-rank adapters: they initially change nothing, only they learn, and merging them keeps the function."""

import copy

import pytest
import torch
import torch.nn as nn

from gpt_arc.finetuning.lora import (
    LowRankLinear,
    add_adapters,
    learn_new_tokens,
    merge_adapters,
    with_merged_adapters,
)
from helpers import randomised
from model import GPT, GPTConfig

ARCHITECTURES = {
    "gpt1": GPTConfig(16, 30, 2, 2, 16, norm_position="post", init="gpt1"),
    "modern": GPTConfig(16, 30, 2, 2, 16, positions="rotary", activation="swiglu", bias=False, n_kv_head=1),
}
TOKENS = torch.randint(0, 30, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def model(request):
    return randomised(GPT(request.param))


def test_the_layer_computes_the_equation_of_the_paper():
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(5, 4), 2, 6.0)
    nn.init.normal_(layer.up)
    x = torch.randn(3, 5)
    weight = layer.linear.weight + 6.0 / 2 * layer.up @ layer.down
    torch.testing.assert_close(layer(x), x @ weight.T + layer.linear.bias)
    merged = layer.merged()
    assert type(merged) is nn.Linear and merged.weight.requires_grad and merged.bias.requires_grad
    torch.testing.assert_close(merged.weight, weight)


def test_new_adapters_change_nothing(model):
    before = model(TOKENS)
    add_adapters(model.blocks, 3, 16.0)
    assert torch.equal(model(TOKENS), before)
    assert all(layer.down.std() > 0.05 for layer in model.modules() if isinstance(layer, LowRankLinear))


def test_in_the_blocks_only_adapters_of_linear_layers_learn(model):
    linear = {name: layer.weight.shape for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear)}
    outside = {name for name, _ in model.named_parameters() if not name.startswith("blocks.")}
    add_adapters(model.blocks, 3, 16.0)
    learning = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert outside and outside <= learning.keys()  # the caller freezes these
    expected = {f"blocks.{name}.down": (3, shape[1]) for name, shape in linear.items()}
    expected |= {f"blocks.{name}.up": (shape[0], 3) for name, shape in linear.items()}
    assert {name: shape for name, shape in learning.items() if name not in outside} == expected
    assert len(linear) == 2 * 4


def trained(model, updates=4):
    model.requires_grad_(False)
    add_adapters(model.blocks, 3, 16.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(updates):
        loss = model(TOKENS, TOKENS.roll(-1, 1)).total / TOKENS.numel()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_training_changes_only_the_adapters(model):
    before = copy.deepcopy(model.state_dict())
    losses = trained(model)
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        if name.endswith((".up", ".down")) and name not in before:
            assert tensor.any(), name
        else:
            assert torch.equal(tensor, before[name.replace(".linear.", ".")]), name
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_adapter_gradients_follow_from_the_weight_s_gradient():
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(5, 4), 2, 6.0).double()
    nn.init.normal_(layer.up)
    x, target = torch.randn(7, 5).double(), torch.randn(7, 4).double()
    ((layer(x) - target) ** 2).sum().backward()
    weight = (layer.linear.weight + 3 * layer.up @ layer.down).detach().requires_grad_()
    ((nn.functional.linear(x, weight, layer.linear.bias) - target) ** 2).sum().backward()
    torch.testing.assert_close(layer.up.grad, 3 * weight.grad @ layer.down.T)
    torch.testing.assert_close(layer.down.grad, 3 * layer.up.T @ weight.grad)
    assert layer.linear.weight.grad is None and layer.linear.bias.grad is None


def test_a_merged_model_equals_the_adapted_one(model):
    names, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    unadapted = model(TOKENS)
    trained(model)
    adapted = model(TOKENS)
    assert (adapted - unadapted).abs().max() > 0.1
    merged = with_merged_adapters(model)
    assert merged is not model and list(merged.state_dict()) == names
    torch.testing.assert_close(merged(TOKENS), adapted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(TOKENS), adapted)  # it still has its adapters
    for name, tensor in model.state_dict().items():
        if name.replace(".linear.", ".") in before and not name.endswith(".down"):
            assert torch.equal(tensor, before[name.replace(".linear.", ".")])
    merge_adapters(model)
    assert not any(isinstance(layer, LowRankLinear) for layer in model.modules())
    assert torch.equal(model(TOKENS), merged(TOKENS))


def test_a_model_without_adapters_is_not_copied(model):
    assert with_merged_adapters(model) is model


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_learn_beside_adapters(tied):
    model = randomised(GPT(GPTConfig(16, 30, 2, 2, 16, tied_head=tied)))
    reference, names = copy.deepcopy(model), list(model.state_dict())
    model.requires_grad_(False)
    add_adapters(model.blocks, 3, 16.0)
    learn_new_tokens(model, 3)
    torch.testing.assert_close(model(TOKENS), reference(TOKENS))
    learning = [p for p in model.parameters() if p.requires_grad]
    (model(TOKENS, TOKENS.roll(-1, 1)).total / TOKENS.numel()).backward()
    (reference(TOKENS, TOKENS.roll(-1, 1)).total / TOKENS.numel()).backward()
    rows = [p for p in learning if p.shape == (3, 16) and "rows" in name_of(model, p)]
    assert len(rows) == 2 - tied
    for parameter, matrix in zip(rows, (reference.token_embedding, *([] if tied else [reference.head]))):
        torch.testing.assert_close(parameter.grad, matrix.weight.grad[-3:], rtol=1e-4, atol=1e-6)
    torch.optim.AdamW(learning, lr=0.1, weight_decay=0.5).step()
    adapted = model(TOKENS)
    merged = with_merged_adapters(model)
    torch.testing.assert_close(merged(TOKENS), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(TOKENS), adapted)
    state = merged.state_dict()
    assert list(state) == names
    for name in ("token_embedding.weight", *([] if tied else ["head.weight"])):
        old, new = reference.state_dict()[name], state[name]
        assert torch.equal(old[:-3], new[:-3]) and not torch.isclose(old[-3:], new[-3:]).any()


def name_of(model, parameter):
    return next(name for name, other in model.named_parameters() if other is parameter)
