"""ALiBi against every pair of tokens and transformers, and the lengths that dynamic rotary scaling depends on."""

import dataclasses
import math

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from gpt_arc.nn import attention
from gpt_arc.nn.functional import compiled_waves
from gpt_arc.nn.positions import alibi_slopes, text_lengths
from helpers import randomised
from model import GPT, GPTConfig

TINY = GPTConfig(block_size=29, vocab_size=23, n_layer=2, n_head=6, n_embd=24, positions="alibi")
NO_POSITIONS = dataclasses.replace(TINY, positions="none")


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 25])
def test_slopes_are_those_of_bloom_and_mpt(heads):
    ours = -torch.tensor(alibi_slopes(heads))[:, None] * torch.arange(6, -1, -1)
    torch.testing.assert_close(ours, build_mpt_alibi_tensor(heads, 7)[:, 0])
    bloom = build_alibi_tensor(torch.ones(1, 7), heads, torch.float32)[:, 0]  # which adds 6 slopes to each score
    torch.testing.assert_close(ours, bloom - bloom[:, -1:])


@pytest.mark.parametrize("length", [1, 9, 29])
@pytest.mark.parametrize("change", [{}, {"n_kv_head": 2}, {"attention_band": 3}, {"attention_band": 20}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alibi_is_a_bias_on_every_pair(monkeypatch, length, change, dtype):
    """The same weights without positions, with a loop over heads, queries and keys for attention."""
    expected = GPT(dataclasses.replace(NO_POSITIONS, **change))
    model = randomised(GPT(dataclasses.replace(TINY, **change))).to(dtype)
    expected.load_state_dict(model.state_dict())
    expected.eval()
    tokens = torch.randint(23, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens)
        calls = []

        def attend_by_pairs(query, key, value, mask, dropout_rate, causal):
            band = change.get("attention_band", length) if len(calls) % 2 else length
            calls.append(band)
            key, value = (x.repeat_interleave(6 // x.size(1), 1) for x in (key, value))
            scores = query @ key.mT / math.sqrt(query.size(-1))
            places = range(length)
            bias = [
                [[slope * (j - i) if i - band < j <= i else -math.inf for j in places] for i in places]
                for slope in alibi_slopes(6)
            ]
            return (scores + torch.tensor(bias)).softmax(-1) @ value

        monkeypatch.setattr("model.attend", attend_by_pairs)
        by_pairs = expected(tokens)
    assert len(calls) == 2
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(logits.float(), by_pairs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("band", [None, 3])
def test_alibi_s_gradients_do_not_depend_on_the_kernel(monkeypatch, band):
    model = randomised(GPT(dataclasses.replace(TINY, attention_band=band))).double()
    tokens = torch.randint(23, (2, 29), generator=torch.Generator().manual_seed(0))
    gradients = []
    for scores_kept in (0, attention.SCORES_KEPT):  # by torch's fused kernel, then by products of matrices
        monkeypatch.setattr(attention, "SCORES_KEPT", scores_kept)
        gradients.append(torch.autograd.grad(model(tokens, tokens).total, list(model.parameters())))
    for fused, by_products in zip(*gradients):
        torch.testing.assert_close(fused, by_products)


def test_a_model_without_positions_cannot_tell_the_order_of_the_past():
    model = randomised(GPT(dataclasses.replace(NO_POSITIONS, n_layer=1)))
    tokens = torch.randint(23, (1, 9))
    shuffled = tokens[:, [3, 0, 2, 1, 7, 5, 4, 6, 8]]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, -1], model(shuffled)[:, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(tokens)[:, 0], model(tokens[:, :1])[:, 0])


def test_lengths_of_texts_worked_by_hand():
    assert text_lengths(torch.arange(4), None).tolist() == [4, 4, 4, 4]
    packed = torch.tensor([[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    assert text_lengths(packed, None).tolist() == [[2, 2, 1, 3, 3, 3], [6] * 6]
    padded = text_lengths(torch.arange(4), torch.tensor([4, 2])).tolist()
    assert padded == [[4, 4, 4, 4], [2, 2, 3, 4]]  # padding may count as it likes
    assert text_lengths(torch.tensor([[5, 6], [0, 1]]), None).tolist() == [[7, 7], [2, 2]]  # that continue a cache


def test_cosines_and_sines_of_compiled_code_are_those_of_math():
    positions, radians = torch.arange(6).view(2, 3), torch.tensor([1.0, 0.25])
    for computed, function in zip(compiled_waves(positions, radians), (math.cos, math.sin)):
        expected = [[[function(p * r) for r in (1.0, 0.25)] for p in row] for row in positions.tolist()]
        torch.testing.assert_close(computed, torch.tensor(expected))
    torch.library.opcheck(compiled_waves, (positions, radians), test_utils=("test_schema", "test_faketensor"))
