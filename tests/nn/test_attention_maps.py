"""Attention weights, beside those of transformers and the definition."""

import math

import pytest
import torch

from gpt_arc.nn.attention_maps import AttentionWeights, attention_maps
from gpt_arc.nn.positions import alibi_slopes
from gpt_arc.weights.directory import load_model
from helpers import randomised
from model import GPT, GPTConfig

TOKENS = list(range(14))


def by_definition(model, tokens):
    """The weights of the model's queries and keys, without rotation and norms, under band, sinks and ALiBi."""
    config, outputs = model.config, []
    hooks = [block.attention.qkv.register_forward_hook(lambda *call: outputs.append(call[2])) for block in model.blocks]
    model.hidden(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    places = torch.arange(len(tokens))
    distance = places[:, None] - places
    maps = []
    for number, output in enumerate(outputs):
        heads = output[0].float().unflatten(-1, (-1, config.head_width)).transpose(0, 1)
        query, key = heads[: config.n_head], heads[config.n_head : config.n_head + config.kv_heads]
        scores = query @ key.repeat_interleave(config.n_head // config.kv_heads, 0).mT / math.sqrt(config.head_width)
        if config.positions == "alibi":
            scores -= torch.tensor(alibi_slopes(config.n_head))[:, None, None] * distance
        allowed = distance >= 0
        if config.attention_band and number % 2:
            allowed &= (distance < config.attention_band) | (places < config.attention_sinks)
        maps.append(scores.masked_fill(~allowed, -math.inf).softmax(-1))
    return torch.stack(maps)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{}, {"n_kv_head": 1}, {"attention_band": 3}, {"attention_band": 3, "attention_sinks": 2}, {"positions": "alibi"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_are_what_the_definition_gives(settings, dtype):
    model = randomised(GPT(GPTConfig(16, 20, 2, 4, 32, **settings)), scale=0.2).to(dtype)
    maps = attention_maps(model, TOKENS)
    assert maps.shape == (2, 4, 14, 14) and maps.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(maps, by_definition(model, TOKENS), atol=tolerance, rtol=0)


@torch.no_grad()
def test_maps_equal_those_of_transformers(tmp_path):
    import transformers

    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0}
    config = transformers.GPT2Config(**sizes, eos_token_id=0, attn_implementation="eager")
    theirs = randomised(transformers.GPT2LMHeadModel(config), scale=0.2)
    theirs.save_pretrained(tmp_path)
    expected = torch.cat(theirs(torch.tensor([TOKENS]), output_attentions=True).attentions)
    model, _ = load_model(tmp_path)
    torch.testing.assert_close(attention_maps(model.eval(), TOKENS), expected, atol=1e-5, rtol=0)


def test_a_context_leaves_the_result_as_it_is():
    model, tokens = randomised(GPT(GPTConfig(16, 20, 2, 4, 32, attention_band=3))), torch.tensor([TOKENS])
    with AttentionWeights() as record:
        hidden = model.hidden(tokens)
    assert torch.equal(hidden, model.hidden(tokens)) and len(record.weights) == 2
