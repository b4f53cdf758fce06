"""Attention from answers to patches, beside transformers' LLaVA, and tools/image_attention.py."""

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from gpt_arc.chat.format import TEMPLATES, ChatFormat
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import entry_point
from gpt_arc.evaluation.image_attention import patch_attention
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.llava import write_llava
from gpt_arc.vision.model import VisionGPT, save_vision
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.directory import save_model
from helpers import randomised
from model import GPT, GPTConfig
from tools import image_attention

QWEN3 = dict(norm="rmsnorm", positions="rotary", activation="swiglu", bias=False, qk_norm=True, n_kv_head=1)
LETTERS = CharTokenizer("abcdefgh")


def model_of(final_norm=False, pixel_shuffle=1, **settings):
    encoder = ImageEncoder(EncoderConfig(8, 4, 1, 2, 12, final_norm=final_norm))
    text = GPT(GPTConfig(64, 12, 2, 2, 16, **settings))
    projector = Projector(ProjectorConfig(pixel_shuffle=pixel_shuffle), 12, 16)
    return randomised(VisionGPT(text, encoder, projector), seed=3, scale=0.5)


@torch.no_grad()
def test_shares_equal_the_weights_that_transformers_returns(tmp_path):
    import transformers

    model, pixels = model_of(**QWEN3), torch.randn(2, 3, 8, 8)
    prompt, response = [3, *range(-1, -5, -1), 5, *range(-5, -9, -1), 6], [1, 2, 4]
    shares = patch_attention(model, prompt, response, pixels)
    write_llava(model, tmp_path)
    llava = transformers.LlavaForConditionalGeneration
    theirs = llava.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = torch.tensor([[12 if token < 0 else token for token in [*prompt, *response]]])
    found = theirs(input_ids=tokens, pixel_values=pixels, output_attentions=True).attentions
    weights = torch.stack(found).mean((0, 1, 2))[len(prompt) - 1 : -1].mean(0)
    expected = torch.stack((weights[1:5], weights[6:10])).view(2, 2, 2)
    torch.testing.assert_close(shares, expected, atol=1e-5, rtol=1e-4)


def test_a_square_of_patches_has_one_share():
    shares = patch_attention(model_of(pixel_shuffle=2), [1, -1, 2], [3], torch.randn(1, 3, 8, 8))
    assert shares.shape == (1, 1, 1) and 0 < shares.item() < 1


@pytest.fixture
def tool(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save("red.png")
    chat = ChatFormat.new(TEMPLATES["markers"], LETTERS, 8)
    for folder, settings in (("seen", {}), ("banded", {"attention_band": 4}), ("text", {})):
        model = model_of(**settings)
        save_model(model.text, LETTERS, folder)
        chat.save(folder)
        if folder != "text":
            save_vision(model, Path(folder))
    return partial(output_of, entry_point(image_attention.main), "image_attention.py")


@pytest.mark.parametrize("model", ["seen", "banded"])
def test_the_tool_answers_and_draws(model, tool):
    output = tool(model, "--image=red.png", "--question=abc", "--plot=map.png")
    assert "attention to the image" in output and Image.open("map.png").size == (480, 480)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("text", "--image=red.png"), "text reads text alone: train it on images"),
        (("seen", "--image=none.png"), "none.png is missing"),
        (("seen", "--image=red.png", "--plot=map.pdf"), "map.pdf must end in .png"),
        (("seen", "--image=red.png", "--question=" + "a" * 40), "a question about an image takes 46 tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(flags, message, tool):
    assert message in tool("--question=a", "--plot=map.png", *flags)
    assert not Path("map.png").exists()
