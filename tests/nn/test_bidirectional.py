"""Bidirectional attention, and BERT against transformers'."""

import json
import tomllib

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gpt_arc.decoding.decoder import Decoder
from gpt_arc.errors import UserError
from gpt_arc.nn.meta import meta_device
from gpt_arc.weights.directory import load_model, save_model
from gpt_arc.weights.huggingface import architecture_of, config_from_hf, hf_config, hf_tensors, nearest_architecture
from helpers import ROOT, randomised
from model import GPT, GPTConfig

SHAPES = {  # vocabulary, width, blocks, heads, MLP, context, types, activation
    "usual": (37, 24, 2, 3, 40, 16, 2, "gelu"),
    "odd": (11, 15, 1, 5, 7, 5, 1, "relu"),
    "wide": (97, 32, 3, 1, 128, 33, 4, "gelu_new"),
}
TINY = dict(vocab_size=19, block_size=12, n_layer=2, n_head=4, n_embd=16, attention="bidirectional")


def bert(shape):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names += ("max_position_embeddings", "type_vocab_size", "hidden_act")
    return randomised(transformers.BertForMaskedLM(transformers.BertConfig(**dict(zip(names, SHAPES[shape])))))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_equal_those_of_transformers_both_ways(tmp_path, shape):
    theirs, length = bert(shape), SHAPES[shape][5]
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")[0].eval()
    lengths = torch.tensor([length, length // 2, 1])
    tokens = torch.randint(ours.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    types = (tokens % 2).clamp(max=ours.config.token_types - 1)
    real = torch.arange(length) < lengths[:, None]
    expected = theirs(tokens, attention_mask=real.long(), token_type_ids=types).logits
    torch.testing.assert_close(ours(tokens, lengths=lengths, types=types)[real], expected[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)

    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(hf_config(ours.config)))
    save_file(dict(hf_tensors(ours)), tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(
        again(tokens, attention_mask=real.long()).logits, theirs(tokens, attention_mask=real.long()).logits
    )
    written = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert {name: x.shape for name, x in next(written).items()} == {name: x.shape for name, x in next(written).items()}


def test_files_of_the_first_release_load(tmp_path):
    """They name the norms' tensors otherwise, and have copies of tied ones and another task's head besides."""
    model = bert("usual")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    for name, shape in {"bert.pooler.dense": (24, 24), "cls.seq_relationship": (2, 24)}.items():
        old |= {f"{name}.weight": torch.ones(shape), f"{name}.bias": torch.ones(shape[0])}
    save_file(old, tmp_path / "model.safetensors")
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)[0].eval()(tokens), model(tokens).logits, rtol=1e-5, atol=1e-5)
    old["cls.predictions.decoder.weight"] += 1
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="differs from the embedding"):
        load_model(tmp_path)


def test_what_bert_is_not_is_refused():
    for key, value in {
        "tie_word_embeddings": False,
        "is_decoder": True,
        "position_embedding_type": "relative_key",
    }.items():
        with pytest.raises(UserError, match=f"{key} = "):
            config_from_hf({"model_type": "bert", key: value})
    with pytest.raises(UserError, match="type_vocab_size"):
        config_from_hf({"model_type": "bert", "type_vocab_size": 0})
    with pytest.raises(UserError, match="the nearest, bert, has no .*token_types = 0"):
        architecture_of(GPTConfig(**TINY))
    assert nearest_architecture(GPTConfig(**TINY, n_experts=4))[0] == "bert"
    causal = dict(norm_position="post", head_bias=True, embedding_norm=True, token_types=2)
    assert nearest_architecture(GPTConfig(**causal))[0] != "bert"


def test_the_preset_is_berts_base_size():
    """BertModel's published 110M: these parameters, with the pooler in place of the head."""
    config = GPTConfig(**tomllib.loads((ROOT / "configs/bert.toml").read_text())["model"])
    with meta_device():
        ours, theirs = GPT(config), transformers.BertForMaskedLM(transformers.BertConfig())
        published = transformers.BertModel(transformers.BertConfig())
    assert ours.num_parameters() == theirs.num_parameters() == 109_514_298
    assert published.num_parameters() == 109_482_240
    assert config_from_hf({"model_type": "bert"}) == config


@pytest.mark.parametrize(
    "settings",
    [{}, {"positions": "rotary", "n_kv_head": 2}, {"norm_position": "post", "embedding_norm": True, "n_experts": 2}],
    ids=["plain", "rotary-grouped", "experts"],
)
@torch.no_grad()
def test_a_token_sees_its_document_on_both_sides_and_no_padding(settings):
    model = randomised(GPT(GPTConfig(**TINY | settings)))
    tokens = torch.randint(19, (1, 12), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    parts = torch.cat((model(tokens[:, :5]), model(tokens[:, 5:])), dim=1)
    torch.testing.assert_close(model(tokens, documents=documents), parts, rtol=1e-4, atol=1e-5)
    lengths = torch.tensor([5])
    torch.testing.assert_close(model(tokens, lengths=lengths)[:, :5], parts[:, :5], rtol=1e-4, atol=1e-5)
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 19
    assert not torch.allclose(model(changed)[0, 0], model(tokens)[0, 0])  # the first token sees the last
    assert model(tokens, lengths=torch.tensor([0])).isfinite().all()


@torch.no_grad()
def test_sixteen_bits_and_the_kernel_of_short_causal_attention_see_both_sides():
    """On a CPU, causal attention in 16 bits is computed by products over the earlier keys alone."""
    model = randomised(GPT(GPTConfig(**TINY)), scale=0.1)
    tokens, lengths = torch.arange(12)[None], torch.tensor([9])
    expected = model(tokens, lengths=lengths)[:, :9]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, lengths=lengths)[:, :9]
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)


def test_a_bidirectional_model_is_saved_and_doesnt_decode(tmp_path):
    model = GPT(GPTConfig(**TINY, embedding_norm=True, head_transform=True, token_types=2))
    save_model(model, None, tmp_path)
    assert load_model(tmp_path)[0].config == model.config
    with pytest.raises(ValueError, match="no next token"):
        Decoder(model)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"attention_band": 4}, "attention_band = 4"),
        ({"head_transform": True, "attention": "causal"}, "head_transform needs"),
        ({"head_transform": True, "activation": "swiglu"}, "head_transform needs"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**TINY | settings)
