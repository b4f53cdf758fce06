"""New parts of a model that reads images: an encoder by its name, and a text model with one and a new projector."""

from pathlib import Path
from typing import Literal

from gpt_arc.errors import UserError
from gpt_arc.settings import build, read_file
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.images import Preprocessing
from gpt_arc.vision.model import VisionGPT
from gpt_arc.vision.pretrained import read_encoder
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.directory import local_directory
from model import GPT


def named_encoder(source: str, setting: str) -> tuple[ImageEncoder, Preprocessing]:
    """Returns the encoder that `source`, the value of a setting, names, and how images are prepared for it.

    `source` is a folder of stages/pretrain_encoder.py or of transformers, or a .toml file with the settings of a new
    encoder. Raises UserError.
    """
    if Path(source).suffix == ".toml":
        values = read_file(EncoderConfig, Path(source))
        return ImageEncoder(build(EncoderConfig, values, dict.fromkeys(values, source))), Preprocessing()
    directory = local_directory(source)
    if directory is None:
        raise UserError(
            f"{setting} = {source} is neither a .toml file nor a folder with an encoder, saved by "
            "stages/pretrain_encoder.py or transformers"
        )
    return read_encoder(directory)


def new_vision_model(
    source: str, text: GPT, projector_layers: Literal[1, 2], pixel_shuffle: int, prefix_attention: bool
) -> VisionGPT:
    """Returns `text` with the encoder that `source` names, and a new projector. Raises UserError."""
    encoder, preprocessing = named_encoder(source, "image_encoder")
    config = ProjectorConfig(projector_layers, pixel_shuffle=pixel_shuffle)
    try:
        projector = Projector(config, encoder.config.n_embd, text.config.n_embd)
        return VisionGPT(text, encoder, projector, preprocessing, prefix_attention)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
