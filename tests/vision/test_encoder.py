"""The image encoder and the projector, beside transformers' models with the same weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_arc.errors import UserError
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.pretrained import read_encoder
from gpt_arc.vision.projector import Projector, ProjectorConfig
from helpers import randomised

KINDS = ("ViT", "SiglipVision", "CLIPVision")


def saved(kind, folder, **settings):
    import transformers

    sizes = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20, image_size=15)
    config = getattr(transformers, f"{kind}Config")(**sizes | {"patch_size": 3} | settings)
    model = randomised(getattr(transformers, f"{kind}Model")(config), seed=len(kind))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("height, width", [(15, 15), (9, 21), (3, 12), (27, 6)])
def test_features_equal_those_of_transformers(kind, height, width, tmp_path):
    theirs = saved(kind, tmp_path)
    ours, _ = read_encoder(tmp_path)
    pixels = torch.randn(2, 3, height, width)
    expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours(pixels), expected, atol=1e-4, rtol=1e-4)
    grid = ours.grid(pixels)
    assert grid.shape == (2, height // 3, width // 3, 24)
    torch.testing.assert_close(grid[1, -1, 0], ours(pixels)[1, -(width // 3)])


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [4, 16])
def test_positions_begin_as_large_as_the_setting_says(patch_size):
    sizes = dict(image_size=8 * patch_size, patch_size=patch_size, n_layer=1, n_head=2, n_embd=64)
    usual, large = ImageEncoder(EncoderConfig(**sizes)), ImageEncoder(EncoderConfig(**sizes, position_std=0.5))
    pixels = torch.randint(2, (8, 3, 8 * patch_size, 8 * patch_size)) * 2.0 - 1
    assert usual.position_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert large.position_embedding.weight.std().item() == pytest.approx(large.patches(pixels).std().item(), rel=0.3)


def test_names_of_older_files_are_read(tmp_path):
    saved("ViT", tmp_path)
    new, _ = read_encoder(tmp_path)
    former = {
        "layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    tensors = load_file(tmp_path / "model.safetensors")
    for present, old in former.items():
        tensors = {name.replace(present, old): tensor for name, tensor in tensors.items()}
    assert any("attention.attention.query" in name for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    old, _ = read_encoder(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), old.state_dict().values()))


def test_the_encoder_of_a_whole_clip_is_read(tmp_path):
    import transformers

    vision = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = {**vision, "vocab_size": 20}
    config = transformers.CLIPConfig(text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4})
    model = randomised(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0], "do_center_crop": True})
    )
    ours, preprocessing = read_encoder(tmp_path)
    pixels = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(ours(pixels), model.vision_model(pixels).last_hidden_state, atol=1e-4, rtol=1e-4)
    assert (preprocessing.fit, preprocessing.mean, preprocessing.std) == ("crop", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "bert"}, 'model_type = "bert" is not an image encoder'),
        ({"hidden_act": "mish"}, "hidden_act = mish can't be computed"),
        ({"num_channels": 1}, "num_channels = 1 can't be computed"),
        ({"patch_size": 30}, "patch_size = 30 is larger than image_size = 15"),
        ({"hidden_size": 25}, "n_head = 3 does not divide n_embd = 25"),
        ({"hidden_size": 48}, "has the shape (1, 1, 24), not (48,)"),
        ({"num_hidden_layers": 4}, "lacks the tensor layers.3."),
    ],
    ids=str,
)
def test_other_encoders_are_refused(change, message, tmp_path):
    saved("ViT", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError) as error:
        read_encoder(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_every_patch_sees_every_other():
    encoder = randomised(ImageEncoder(EncoderConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=8)))
    pixels = torch.randn(1, 3, 8, 8, requires_grad=True)
    encoder(pixels)[0, 0].sum().backward()
    assert pixels.grad.flatten(2).abs().sum(-1).min() > 0
    assert all(pixels.grad[0, :, i : i + 4, j : j + 4].abs().sum() > 0 for i in (0, 4) for j in (0, 4))


def test_an_image_smaller_than_a_patch_is_refused():
    encoder = ImageEncoder(EncoderConfig(image_size=8, patch_size=4, n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(ValueError, match="smaller than a patch"):
        encoder(torch.zeros(1, 3, 3, 8))


def test_pixel_shuffle_puts_the_features_of_a_square_side_by_side():
    projector = Projector(ProjectorConfig(1, False, 2), 3, 5)
    grid = torch.randn(2, 4, 6, 3)
    square = torch.cat((grid[1, 2, 4], grid[1, 2, 5], grid[1, 3, 4], grid[1, 3, 5]))
    embeddings = projector(grid)
    assert embeddings.shape == (2, 6, 5)
    torch.testing.assert_close(embeddings[1, 5], projector.first.weight @ square)
    with pytest.raises(ValueError, match="pixel_shuffle = 2 doesn't divide 3 x 6 patches"):
        projector(grid[:, :3])
