"""Gives a text model an image encoder and a new projector."""

from pathlib import Path
from typing import Literal

from gpt_arc.errors import UserError
from gpt_arc.settings import build, read_file
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.images import Preprocessing
from gpt_arc.vision.model import VisionGPT
from gpt_arc.vision.pretrained import read_encoder
from gpt_arc.vision.projector import Projector, ProjectorConfig
from model import GPT


def new_vision_model(source: str, text: GPT, projector_layers: Literal[1, 2], pixel_shuffle: int) -> VisionGPT:
    """Returns `text` with the encoder that `source` names, and a new projector.

    `source` is a folder that transformers wrote, or a .toml file with the settings of a new encoder. Raises UserError.
    """
    path = Path(source)
    if path.suffix == ".toml":
        values = read_file(EncoderConfig, path)
        encoder = ImageEncoder(build(EncoderConfig, values, dict.fromkeys(values, source)))
        preprocessing = Preprocessing()
    elif (path / "config.json").is_file():
        encoder, preprocessing = read_encoder(path)
    else:
        raise UserError(
            f"image_encoder = {source} is neither a .toml file nor a folder with an encoder that transformers saved"
        )
    config = ProjectorConfig(projector_layers, pixel_shuffle=pixel_shuffle)
    try:
        projector = Projector(config, encoder.config.n_embd, text.config.n_embd)
        return VisionGPT(text, encoder, projector, preprocessing)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
