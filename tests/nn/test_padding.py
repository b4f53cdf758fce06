"""Padding doesn't affect the routers' statistics, losses and capacity."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from gpt_arc.chat.batches import EncodedConversation, conversation_batch
from gpt_arc.nn.experts import expert_capacity, router_losses
from helpers import randomised
from model import GPT, GPTConfig, make_experts

TINY = {"block_size": 12, "vocab_size": 23, "n_layer": 2, "n_head": 2, "n_embd": 16, "mlp_size": 24, "n_experts": 4}
VARIANTS = [
    {},
    {"experts_per_token": 1, "capacity_factor": 0.75},
    {"experts_per_token": 2, "capacity_factor": 1.1, "shared_experts": 1},
    {"experts_per_token": 3, "capacity_factor": 1e300, "balance_rate": 0.1, "activation": "swiglu"},
]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_padding_changes_nothing_for_real_tokens(change, seed):
    torch.manual_seed(seed)
    experts = randomised(make_experts(GPTConfig(**TINY | change)), seed, scale=1.0).train()
    x, real = torch.randn(6, 7, 16), torch.rand(6, 7) < 0.6
    padded, report = experts(torch.where(real[..., None], x, 3.0), real)
    unpadded, expected = experts(x[real])
    torch.testing.assert_close(padded[real], unpadded, rtol=1e-5, atol=1e-5)
    for name, value in report._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=1e-6, atol=1e-6, msg=name)


def test_a_mask_without_padding_changes_nothing():
    torch.manual_seed(0)
    experts = randomised(make_experts(GPTConfig(**TINY | {"capacity_factor": 0.9})), scale=1.0).train()
    x = torch.randn(5, 8, 16)
    torch.testing.assert_close(experts(x, torch.ones(5, 8, dtype=torch.bool)), experts(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [0.1, 0.3, 1.0, 1.1, 1.25, 2.7, 1e300])
def test_capacity_of_a_tensor_equals_that_of_a_number(factor):
    for choices in (1, 10, 37, 8193, 100_003):
        expected = expert_capacity(factor, choices, 8)
        assert expert_capacity(factor, torch.tensor(choices), 8).item() == expected


def conversations(lengths):
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(23, (length,), generator=draw).tolist() for length in lengths]
    return [EncodedConversation(row, [False] + [True] * (len(row) - 1)) for row in tokens]


def test_router_losses_are_equal_however_conversations_are_laid_out():
    """Positions restart in every conversation, so a token's state doesn't depend on the layout."""
    model = randomised(GPT(GPTConfig(**TINY | {"positions": "rotary"}))).double().train()
    examples = conversations((13, 3, 5, 2, 8))
    singly = [model(*conversation_batch([example], None)) and model.routings for example in examples]
    counts = torch.tensor([len(example.tokens) - 1.0 for example in examples]).double()
    for context in (None, 12):
        tokens, *batch = conversation_batch(examples, context)
        assert (batch[-1] < tokens.size(1)).any()  # there is padding
        model(tokens, *batch)
        for block, routing in enumerate(model.routings):
            for name, value in routing._asdict().items():
                each = torch.stack([getattr(routings[block], name) for routings in singly])
                mean = (each * (counts / counts.sum()).view(-1, *[1] * value.dim())).sum(0)
                torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-6, msg=name)


def test_the_balance_loss_under_padding_equals_mixtral_s():
    model = randomised(GPT(GPTConfig(**TINY | {"n_layer": 1}))).train()
    tokens, targets, _, lengths = conversation_batch(conversations((13, 3, 5, 2)), None)
    logits = []
    route = model.blocks[0].mlp.route

    def recorded(x):
        result = route(x)
        logits.append(result[2])
        return result

    model.blocks[0].mlp.route = recorded
    model(tokens, targets, None, lengths)
    mask = (torch.arange(tokens.size(1)) < lengths[:, None]).long()
    expected = load_balancing_loss_func(tuple(logits), 4, 2, mask)  # sums over both choices; ours averages
    actual = router_losses(model.routings, 1.0, 0.0)["balance"]
    torch.testing.assert_close(actual, expected / 2, rtol=1e-6, atol=1e-6)
    z = logits[0].logsumexp(-1).square()[mask.flatten().bool()].mean()
    torch.testing.assert_close(router_losses(model.routings, 0.0, 1.0)["router_z"], z, rtol=1e-6, atol=1e-6)
