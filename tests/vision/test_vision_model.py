"""A GPT that reads images: placeholders, text alone, gradients, files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.manifest import DamagedFile
from gpt_arc.nn.functional import put_images
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.images import Preprocessing
from gpt_arc.vision.model import VisionGPT, load_vision, save_vision
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.directory import load_model, reads_images, save_model
from helpers import randomised
from model import GPT, GPTConfig

MODERN = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, n_kv_head=1, qk_norm=True)


def vision_gpt(shuffle=1, layers=2, prefix_attention=False, **settings):
    text = GPT(GPTConfig(32, 10, 2, 2, 8, **settings))
    encoder = ImageEncoder(EncoderConfig(image_size=8, patch_size=2, n_layer=2, n_head=2, n_embd=12))
    projector = Projector(ProjectorConfig(layers, pixel_shuffle=shuffle), 12, 8)
    return randomised(VisionGPT(text, encoder, projector, Preprocessing("crop"), prefix_attention), scale=0.2)


def tokens_around(*counts, rows=1):
    """Rows of a text token, then as many placeholders as counted, and so on; numbered through."""
    row, image = [1], 0
    for count in counts:
        row += [*range(-1 - image, -1 - image - count, -1), 2, 3]
        image += count
    return torch.tensor([row] * rows)


@pytest.mark.parametrize("settings", [{}, MODERN, {"n_experts": 2}], ids=str)
@torch.no_grad()
def test_logits_equal_those_of_the_embeddings_put_in_by_hand(settings, monkeypatch):
    model = vision_gpt(shuffle=2, **settings)
    pixels = torch.randn(2, 3, 8, 8)
    tokens = tokens_around(4, 4)
    logits = model(tokens, pixels=pixels)
    first, second = (model.projector(model.encoder.grid(image[None]))[0] for image in pixels)
    words = model.text.token_embedding.weight[[1, 2, 3, 2, 3]]
    by_hand = torch.cat((words[:1], first, words[1:3], second, words[3:]))[None]
    monkeypatch.setattr(model.text.token_embedding, "forward", lambda ids: by_hand)
    torch.testing.assert_close(logits, model.text(torch.zeros_like(tokens)))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, MODERN, {**MODERN, "prefix_attention": True}], ids=str)
def test_text_alone_has_exactly_the_text_model_s_logits(settings):
    text = vision_gpt(**{**settings, "prefix_attention": False}).text
    model = vision_gpt(**settings)
    tokens = torch.randint(10, (3, 7))
    expected = text(tokens)
    assert torch.equal(model(tokens), expected)
    assert torch.equal(model(tokens, pixels=torch.zeros(0, 3, 8, 8)), expected)


@torch.no_grad()
def test_logits_depend_on_which_image_comes_first_and_text_before_an_image_does_not():
    model = vision_gpt()
    pixels, tokens = torch.randn(2, 3, 8, 8), tokens_around(16)
    tokens = torch.cat((tokens[:, 1:-1], tokens[:, -1:], tokens[:, 1:-1] - 16 * (tokens[:, 1:-1] < 0)), dim=1)[:, :32]
    with pytest.raises(ValueError, match="placeholders in the tokens are for the 32 embeddings"):
        model(tokens, pixels=pixels)
    model = vision_gpt(shuffle=2)
    tokens = tokens_around(4, 4)
    logits, permuted = model(tokens, pixels=pixels), model(tokens, pixels=pixels.flip(0))
    assert torch.equal(logits[:, :1], permuted[:, :1])
    assert (logits[:, 1:] - permuted[:, 1:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_other_sizes_have_other_numbers_of_embeddings():
    model = vision_gpt(shuffle=2)
    assert model.embeddings_per_image == 4
    assert model.embed_images(torch.zeros(2, 3, 12, 20)).shape == (2, 15, 8)
    assert model(tokens_around(6), pixels=torch.randn(1, 3, 12, 8)).shape == (1, 9, 10)


@pytest.mark.parametrize("prefix_attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, MODERN], ids=str)
def test_images_see_themselves_both_ways_with_prefix_attention(settings, dtype, prefix_attention, monkeypatch):
    model = vision_gpt(prefix_attention=prefix_attention, **settings).to(dtype)
    model.text.blocks = model.text.blocks[:1]  # so that a state depends on the tokens that its query sees alone
    tokens = torch.tensor([[1, -1, -2, 3, -3, -4, -5, -6, 4, 5, -7, -8, -9, 2]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]])
    image = [None, 1, 1, None, 2, 2, 2, 2, None, None, 3, 3, 4, None]  # two between the same texts are one
    inputs = torch.randn(1, 14, 8, dtype=dtype, requires_grad=True)
    monkeypatch.setattr(model.text, "embed", lambda *given: inputs)
    states = model.text.hidden(tokens, documents, images=torch.zeros(9, 8))
    for query in range(14):
        (gradient,) = torch.autograd.grad(states[0, query] @ torch.randn(8, dtype=dtype), inputs, retain_graph=True)
        for key in range(14):
            together = prefix_attention and image[query] is not None and image[query] == image[key]
            visible = documents[0, query] == documents[0, key] and (key <= query or together)
            assert bool(gradient[0, key].any()) == visible, (query, key)


def test_images_take_the_places_of_their_tokens():
    x, images = torch.randn(2, 5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    tokens = torch.tensor([[1, -2, 3, -1, 0], [-4, 2, 2, 2, -3]])
    by_hand = torch.stack([images[-1 - n] if n < 0 else each for n, each in zip(tokens.flatten(), x.flatten(0, 1))])
    placed, weights = put_images(x, tokens, images), torch.randn(2, 5, 3)
    assert torch.equal(placed, by_hand.view_as(x))
    for ours, theirs in zip(*(torch.autograd.grad(y.view_as(x), (x, images), weights) for y in (placed, by_hand))):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layers, count", [(1, 1), (2, 1), (2, 0)])
def test_gradients_reach_every_part(layers, count):
    model = vision_gpt(shuffle=2, layers=layers).train()
    tokens = tokens_around(4) if count else torch.tensor([[1, 2, 3]])
    loss = model(tokens, tokens.clamp(min=0), pixels=torch.randn(count, 3, 8, 8))
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == bool(count or name.startswith("text.")), name


@pytest.mark.parametrize("tokens, images", [(tokens_around(4), 0), (tokens_around(3), 1), (tokens_around(4, 4), 1)])
def test_placeholders_and_embeddings_are_counted(tokens, images):
    with pytest.raises(ValueError, match=f"{(tokens < 0).sum()} placeholders .* the {4 * images} embeddings"):
        vision_gpt(shuffle=2)(tokens, pixels=torch.zeros(images, 3, 8, 8))


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="ngrams = 2 can't be formed of images"):
        vision_gpt(ngrams=2)
    with pytest.raises(ValueError, match="pixel_shuffle = 3 doesn't divide the 4 patches"):
        vision_gpt(shuffle=3)
    for settings in ({"attention_band": 3}, {"positions": "alibi"}, {"mixer": "lstm"}):
        with pytest.raises(ValueError, match="prefix_attention needs a text model without"):
            vision_gpt(prefix_attention=True, **settings)


@pytest.mark.parametrize("prefix_attention", [False, True])
def test_a_directory_holds_all_parts(prefix_attention, tmp_path):
    model = vision_gpt(shuffle=2, prefix_attention=prefix_attention)
    save_model(model.text, CharTokenizer("abcdefghi"), tmp_path)
    assert not reads_images(tmp_path)
    save_vision(model, tmp_path)
    text, tokenizer = load_model(tmp_path)
    loaded = load_vision(tmp_path, text).eval()
    assert reads_images(tmp_path) and tokenizer == CharTokenizer("abcdefghi")
    assert loaded.preprocessing == model.preprocessing and loaded.text.prefix_attention == prefix_attention
    pixels = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(tokens_around(4), pixels=pixels), loaded(tokens_around(4), pixels=pixels))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 2}, "has version 2"),
        ({"encoder": {"n_head": 5}}, "n_head = 5 does not divide n_embd = 12: change one"),
        ({"encoder": {"n_lair": 5}}, "n_lair"),
        ({"encoder": {"n_layer": 3}}, "lacks the tensor encoder.blocks.2."),
        ({"projector": {"projector_layers": 3}}, "projector_layers"),
        ({"projector": {"pixel_shuffle": 4}}, "has the shape"),
        ({"preprocessing": {"std": [0.0, 1.0, 1.0]}}, "std"),
    ],
    ids=str,
)
def test_damaged_directories_are_refused(change, message, tmp_path):
    model = vision_gpt(shuffle=2)
    save_model(model.text, None, tmp_path)
    save_vision(model, tmp_path)
    content = json.loads((tmp_path / "vision.json").read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    (tmp_path / "vision.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_vision(tmp_path, model.text)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_a_changed_file_is_noticed(tmp_path):
    model = vision_gpt()
    save_model(model.text, None, tmp_path)
    save_vision(model, tmp_path)
    tensors = load_file(tmp_path / "vision.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "vision.safetensors")
    with pytest.raises(DamagedFile, match="vision.safetensors"):
        load_model(tmp_path)
