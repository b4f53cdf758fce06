"""Documents laid end to end, by a stand-in for torch's kernel, against the masks of the same documents."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from gpt_arc.nn.packing import can_pack, packed
from helpers import randomised
from model import GPT, GPTConfig

TINY = {"block_size": 12, "vocab_size": 23, "n_layer": 2, "n_head": 4, "n_embd": 32}
DOCUMENTS = torch.tensor([[0] * 12, [0] * 5 + [1] + [2] * 6, [7] * 11 + [3]])


def attention_by_document(query, key, value, ends, key_ends, longest, longest_key, *, window_size):
    """Each document's attention apart, as torch's documentation describes `varlen_attn`."""
    assert ends is key_ends and ends.dtype == torch.int32 and longest == longest_key == ends.diff().max()
    assert query.shape == key.shape == value.shape and window_size[1] == 0
    results = []
    for start, end in zip(ends.tolist(), ends.tolist()[1:]):
        places = torch.arange(end - start)
        back = places[:, None] - places
        seen = (back >= 0) & (back <= window_size[0] if window_size[0] >= 0 else True)
        parts = (x[start:end].transpose(0, 1) for x in (query, key, value))
        results.append(F.scaled_dot_product_attention(*parts, attn_mask=seen).transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize(
    "change",
    [{}, {"attention_band": 3}, {"n_kv_head": 2, "positions": "rotary", "qk_norm": True, "attention_band": 1}],
    ids=str,
)
def test_packed_documents_are_read_as_with_masks(change, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", attention_by_document)
    model = randomised(GPT(GPTConfig(**TINY, **change)))
    tokens = torch.randint(23, (3, 12), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for documents in (DOCUMENTS, packed(DOCUMENTS)):
        losses.append(model(tokens, tokens, documents).total)
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_documents_end_where_rows_and_numbers_change():
    places = packed(DOCUMENTS)
    assert places.ends.tolist() == [0, 12, 17, 18, 24, 35, 36] and places.longest == 12
    assert packed(torch.zeros(1, 4)).ends.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("change", "dtype", "capability", "expected"),
    [
        ({}, "bfloat16", (8, 0), True),
        ({}, "float16", (9, 0), True),
        ({}, "bfloat16", (7, 5), False),
        ({}, "float32", (9, 0), False),
        ({"positions": "alibi"}, "bfloat16", (9, 0), False),
        ({"attention": "bidirectional"}, "bfloat16", (9, 0), False),
        ({"dropout": 0.1}, "bfloat16", (9, 0), False),
        ({"dropout": 0.1, "attention_dropout": 0.0}, "bfloat16", (9, 0), True),
        ({"head_size": 20}, "bfloat16", (9, 0), False),
        ({"attention_band": 8, "attention_sinks": 1}, "bfloat16", (9, 0), False),
    ],
)
def test_packing_needs_flash_attention(change, dtype, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = GPTConfig(**TINY, **change)
    assert can_pack(config, SimpleNamespace(type="cuda"), dtype) == expected
    assert not can_pack(config, torch.device("cpu"), dtype)
