"""LLaVA's directories in and out, beside transformers' model."""

import json
import sys

import pytest
import torch

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import NotFinite, UserError
from gpt_arc.manifest import check_files
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.llava import is_llava, read_llava, write_llava
from gpt_arc.vision.model import VisionGPT, load_vision, save_vision
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.directory import load_model, save_model
from helpers import randomised
from model import GPT, GPTConfig
from tools import llava

PLACEHOLDER = 19
QWEN3 = dict(norm="rmsnorm", positions="rotary", activation="swiglu", bias=False, qk_norm=True, n_kv_head=1)


def saved(folder, kind="CLIP", **settings):
    import transformers

    sizes = dict(hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20, image_size=9)
    vision = getattr(transformers, f"{kind}VisionConfig")(**sizes, patch_size=3)
    text = transformers.Qwen3Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    settings |= {"vision_config": vision, "text_config": text, "image_token_index": PLACEHOLDER}
    config = transformers.LlavaConfig(**settings)
    model = randomised(transformers.LlavaForConditionalGeneration(config), scale=0.2)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def assert_equal_logits(ours, theirs, placeholder):
    pixels, size = torch.randn(2, 3, 9, 9), ours.embeddings_per_image
    tokens = torch.tensor([[1, *[-1] * size, 2, 3], [4, 5, *[-1] * size, 6]])
    numbered = torch.where(tokens < 0, -(tokens < 0).flatten().cumsum(0).view_as(tokens), tokens)
    expected = theirs(input_ids=tokens.where(tokens >= 0, placeholder), pixel_values=pixels).logits
    logits = ours(numbered, pixels=pixels)
    torch.testing.assert_close(logits, expected[..., : logits.size(-1)], atol=1e-4, rtol=1e-4)
    words = torch.randint(15, (2, 6))
    torch.testing.assert_close(
        ours(words), theirs(input_ids=words).logits[..., : logits.size(-1)], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("CLIP", {}),
        ("CLIP", {"vision_feature_layer": 1, "multimodal_projector_bias": False}),
        ("Siglip", {"vision_feature_select_strategy": "full"}),
    ],
    ids=str,
)
def test_logits_equal_those_of_transformers(kind, settings, tmp_path):
    theirs = saved(tmp_path, kind, **settings)
    assert is_llava(tmp_path)
    assert_equal_logits(read_llava(tmp_path), theirs, PLACEHOLDER)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "siglip"])
@pytest.mark.parametrize("tied_head", [True, False])
def test_transformers_reads_what_is_written(clip, tied_head, tmp_path):
    import transformers

    text = GPT(GPTConfig(32, 17, 2, 2, 16, tied_head=tied_head, **QWEN3))
    like_clip = dict(class_token=clip, first_norm=clip, patch_bias=not clip, final_norm=False)
    encoder = ImageEncoder(EncoderConfig(9, 3, 2, 2, 12, 20, "quick_gelu", **like_clip))
    model = randomised(VisionGPT(text, encoder, Projector(ProjectorConfig(), 12, 16)), scale=0.2)
    write_llava(model, tmp_path)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert_equal_logits(model, theirs, 17)
    again = read_llava(tmp_path)
    assert again.preprocessing.mean == model.preprocessing.mean and again.encoder.config == model.encoder.config


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["llava.py", *map(str, flags)])
    llava.main()


def test_the_tool_converts_there_and_back(tmp_path, monkeypatch):
    theirs = saved(tmp_path / "theirs")
    CharTokenizer("abcdefgh").save(tmp_path / "theirs")
    run(monkeypatch, tmp_path / "theirs", tmp_path / "ours")
    text, tokenizer = load_model(tmp_path / "ours")
    ours = load_vision(tmp_path / "ours", text)
    assert tokenizer == CharTokenizer("abcdefgh")
    assert_equal_logits(ours, theirs, PLACEHOLDER)
    run(monkeypatch, tmp_path / "ours", tmp_path / "back")
    again = read_llava(tmp_path / "back")
    assert all(
        torch.equal(a, b) for a, b in zip(ours.encoder.state_dict().values(), again.encoder.state_dict().values())
    )
    check_files(tmp_path / "back")
    assert "tokenizer.json" in json.loads((tmp_path / "back/manifest.json").read_text())["files"]
    with pytest.raises(UserError, match="back exists: name a new folder"):
        run(monkeypatch, tmp_path / "ours", tmp_path / "back")
    save_model(text, tokenizer, tmp_path / "text")
    with pytest.raises(UserError, match="text reads text alone"):
        run(monkeypatch, tmp_path / "text", tmp_path / "new")
    next(iter(ours.projector.state_dict().values()))[0, 0] = torch.nan
    save_vision(ours, tmp_path / "ours")
    with pytest.raises(NotFinite, match=r"projector\.\w+\.weight of .*ours is not finite"):
        run(monkeypatch, tmp_path / "ours", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vision_feature_layer": -9}, "vision_feature_layer = -9 is not a layer of the 3"),
        ({"vision_feature_select_strategy": "full"}, "drops or keeps a token"),
        ({"projector_hidden_act": "relu"}, 'projector_hidden_act = "relu"'),
        ({"text_config": {"model_type": "bloom"}}, 'model_type = "bloom" is not a supported architecture'),
        ({"multimodal_projector_bias": "yes"}, "multimodal_projector_bias"),
        ({"vision_config": {"model_type": "bert"}}, "is not an image encoder"),
    ],
    ids=str,
)
def test_others_are_refused(change, message, tmp_path):
    saved(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError) as error:
        read_llava(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "encoder, projector, message",
    [
        ({"final_norm": False}, {}, "a model with prefix_attention can't be exported"),
        ({}, {}, "no LLaVA has this image encoder"),
        ({"final_norm": False}, {"projector_layers": 1}, "two layers and no pixel_shuffle"),
        ({"final_norm": False}, {"pixel_shuffle": 3}, "two layers and no pixel_shuffle"),
    ],
    ids=str,
)
def test_what_no_llava_computes_is_not_written(encoder, projector, message, tmp_path):
    encoder = ImageEncoder(EncoderConfig(9, 3, 2, 2, 12, **encoder))
    text = GPT(GPTConfig(32, 17, 2, 2, 16, **QWEN3))
    model = VisionGPT(text, encoder, Projector(ProjectorConfig(**projector), 12, 16), prefix_attention=True)
    with pytest.raises(UserError, match=message):
        write_llava(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
