"""Decoding on a GPU waits once a token, and copies no keys and values."""

import pytest

from fake_gpu.build import measure

SMALL = {"block_size": 256, "vocab_size": 50, "n_layer": 2, "n_head": 8, "n_embd": 64}
GROUPS = {"n_kv_head": 2, "positions": "rotary", "qk_norm": True, "norm": "rmsnorm", "activation": "swiglu"}
FILTERS = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}


def check(config, rows, sampling, target=90):
    token = measure("decode", SMALL | config, rows, sampling, target=target)
    assert sum(token["waits"].values()) == 1, token["waits"]
    assert token["largest"] < token["keys"]


@pytest.mark.slow
def test_a_token_waits_once():
    check(GROUPS, 4, FILTERS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "rows", "target"),
    [({}, 1, 90), ({"attention_band": 16}, 4, 90), ({"ngrams": 3}, 4, 90), ({"n_experts": 4}, 2, 90), (GROUPS, 4, 75)],
    ids=str,
)
def test_a_token_of_every_model_waits_once(config, rows, target):
    check(config, rows, {"temperature": 0.8}, target)
