"""A GPT that reads images: encoder, projector and text model, with their files.

    model = VisionGPT(text, encoder, Projector(ProjectorConfig(), encoder.config.n_embd, text.config.n_embd))
    logits = model(tokens, pixels=pixels)      # (B, T) int64, (N, 3, H, W) -> (B, T, V)
    save_vision(model, directory)              # beside the text model's files
    model = load_vision(directory, text)

A token below 0 is a placeholder: -1 - i stands for embedding i of all images in turn. `tokens` has one for each. With
prefix_attention (arXiv:2407.07726) placeholders with no text between them see each other both ways.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import ConfigDict, with_config
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from gpt_arc.errors import UserError
from gpt_arc.files import replacing, write_file
from gpt_arc.manifest import record_files
from gpt_arc.nn.meta import meta_device
from gpt_arc.reading import read_json
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.images import Preprocessing
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.directory import VISION_FILE
from gpt_arc.weights.tensor_files import read_tensors
from model import GPT, GPTConfig, Loss

WEIGHTS = "vision.safetensors"
FORMAT_VERSION = 1
PARTS = ("text", "encoder", "projector")


@with_config(ConfigDict(extra="forbid"))
class VisionFile(TypedDict):
    """The content of vision.json."""

    format_version: int
    encoder: EncoderConfig
    projector: ProjectorConfig
    preprocessing: Preprocessing
    prefix_attention: NotRequired[bool]


class VisionGPT(nn.Module):
    """A text model that reads the projected features of images as if they were tokens."""

    def __init__(
        self,
        text: GPT,
        encoder: ImageEncoder,
        projector: Projector,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  frozen
        prefix_attention: bool = False,
    ):
        """Raises ValueError for a text model with n-grams, which placeholders can't be part of, and for
        prefix_attention in one with an attention band, ALiBi or an LSTM, which count back from a token.
        """
        super().__init__()
        if text.config.ngrams > 1:
            raise ValueError(f"ngrams = {text.config.ngrams} can't be formed of images: name a model without n-grams")
        if encoder.config.side % projector.config.pixel_shuffle:
            raise ValueError(
                f"pixel_shuffle = {projector.config.pixel_shuffle} doesn't divide the {encoder.config.side} patches "
                "along a side of an image"
            )
        counts_back = text.config.attention_band is not None or text.config.positions == "alibi"
        if prefix_attention and (counts_back or text.config.mixer == "lstm"):
            raise ValueError(
                'prefix_attention needs a text model without attention_band, positions = "alibi" and mixer = "lstm"'
            )
        text.prefix_attention = prefix_attention
        self.text, self.encoder, self.projector, self.preprocessing = text, encoder, projector, preprocessing
        self.rates = dict.fromkeys(PARTS, 1.0)  # factors of the learning rate

    @property
    def config(self) -> GPTConfig:
        return self.text.config

    @property
    def image_size(self) -> int:
        return self.encoder.config.image_size

    @property
    def embeddings_per_image(self) -> int:
        """Number of embeddings of an image of `image_size`."""
        return (self.encoder.config.side // self.projector.config.pixel_shuffle) ** 2

    def set_rates(self, text: float, encoder: float, projector: float) -> None:
        """Sets the factors of the parts' learning rates. A part with the factor 0 isn't trained."""
        self.rates = {"text": text, "encoder": encoder, "projector": projector}
        for name, rate in self.rates.items():
            self.get_submodule(name).requires_grad_(rate > 0)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Returns the embeddings (N, P, C) of images (N, 3, H, W)."""
        return self.projector(self.encoder.grid(pixels))

    @torch.inference_mode()
    def see(self, image: Any) -> Tensor:
        """Returns the embeddings (P, C) of one image of Pillow's."""
        pixels = self.preprocessing.pixels(image, self.image_size)
        return self.embed_images(pixels[None].to(self.encoder.patches.weight))[0]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        lengths: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> Tensor | Loss:
        """`GPT.forward`, with the images (N, 3, H, W) that the placeholders in `tokens` stand for, if there are any.

        Raises ValueError unless there is one placeholder for each embedding, on CPUs alone: a GPU would be waited for.
        """
        images = None if pixels is None else self.embed_images(pixels).flatten(0, 1)
        count = 0 if images is None else len(images)
        if tokens.device.type == "cpu" and (placeholders := int((tokens < 0).sum())) != count:
            raise ValueError(f"{placeholders} placeholders in the tokens are for the {count} embeddings of the images")
        return self.text(tokens, targets, documents, lengths, images)


def save_vision(model: VisionGPT, directory: Path) -> None:
    """Writes the encoder and the projector into the text model's directory."""
    parts = {"encoder": model.encoder.config, "projector": model.projector.config}
    content: dict[str, Any] = {
        name: asdict(part) for name, part in (parts | {"preprocessing": model.preprocessing}).items()
    }
    content |= {"prefix_attention": True} if model.text.prefix_attention else {}
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name in parts
        for key, tensor in model.get_submodule(name).state_dict().items()
    }
    with replacing(directory / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_file(directory / VISION_FILE, json.dumps({"format_version": FORMAT_VERSION, **content}, indent=1) + "\n")
    record_files(directory, VISION_FILE, WEIGHTS)


def load_vision(directory: Path, text: GPT, dtype: torch.dtype = torch.float32) -> VisionGPT:
    """Returns `text` with the encoder and projector in its directory. Raises UserError if they are damaged."""
    path = directory / VISION_FILE
    content: VisionFile = read_json(path, VisionFile)
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} has version {content['format_version']}; this program reads {FORMAT_VERSION}")
    config, projection = content["encoder"], content["projector"]
    with meta_device():
        encoder, projector = ImageEncoder(config), Projector(projection, config.n_embd, text.config.n_embd)
    shapes = {
        f"{name}.{key}": tensor.shape
        for name, part in (("encoder", encoder), ("projector", projector))
        for key, tensor in part.state_dict().items()
    }
    tensors = read_tensors(directory / WEIGHTS, shapes, dtype)
    for name, part in (("encoder.", encoder), ("projector.", projector)):
        weights = {key.removeprefix(name): tensor for key, tensor in tensors.items() if key.startswith(name)}
        part.load_state_dict(weights, assign=True)
    try:
        prefix_attention = content.get("prefix_attention", False)
        return VisionGPT(text, encoder, projector, content["preprocessing"], prefix_attention)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
