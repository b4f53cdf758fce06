"""The models that `measure.step` trains, each with a batch of zeros on the GPU, and what computes its loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.kernels import choose_kernels
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.labels import ImageClassifier
from gpt_arc.vision.model import VisionGPT
from gpt_arc.vision.projector import Projector, ProjectorConfig
from model import GPT, GPTConfig


class Step(NamedTuple):
    model: nn.Module  # to compile
    loss: Callable[[], Tensor]
    tokens: int  # of the batch; an encoder's are patches


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def text(config: dict[str, Any], rows: int, settings: TrainingConfig, documents: bool = False) -> Step:
    model = GPT(GPTConfig(**config))
    choose_kernels(model, settings)
    batch = [zeros(rows, model.config.block_size) for _ in range(3 if documents else 2)]

    def loss() -> Tensor:
        result = model(*batch)
        return sum(result.auxiliary.values(), result.total)

    return Step(model, loss, batch[0].numel())


def documents(config: dict[str, Any], rows: int, settings: TrainingConfig) -> Step:
    return text(config, rows, settings, documents=True)


def translation(config: dict[str, Any], rows: int, settings: TrainingConfig) -> Step:
    """Sources and targets as long as the context; tokens are those of the targets."""
    from gpt_arc.data.pairs import PairBatch
    from stages.translate import scores

    class Translation(nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt = GPT(GPTConfig(**config))

        def forward(self, batch: PairBatch) -> Tensor:
            return scores(self.gpt, batch, label_smoothing=0.1).smoothed

    model, length = Translation(), GPTConfig(**config).block_size
    batch = PairBatch(zeros(rows, length), zeros(rows), zeros(rows, length), zeros(rows, length))
    return Step(model, lambda: model(batch), batch.tokens.numel())


def images(config: dict[str, Any], rows: int, settings: TrainingConfig) -> Step:
    """A row has an image of 224 x 224 pixels, which an encoder of as many layers reads."""
    gpt = GPT(GPTConfig(**config))
    encoder = ImageEncoder(EncoderConfig(n_layer=gpt.config.n_layer))
    model = VisionGPT(gpt, encoder, Projector(ProjectorConfig(), encoder.config.n_embd, gpt.config.n_embd))
    tokens, targets = (zeros(rows, gpt.config.block_size) for _ in range(2))
    pixels = torch.zeros(rows, 3, model.image_size, model.image_size)
    return Step(model, lambda: model(tokens, targets, pixels=pixels).total, tokens.numel())


def encoder(config: dict[str, Any], rows: int, settings: TrainingConfig) -> Step:
    """Images of 1,000 classes, with about as many patches as `rows` texts have tokens."""
    model = ImageClassifier(ImageEncoder(EncoderConfig(n_layer=config["n_layer"])), [1000])
    patches, size = model.encoder.config.side**2, model.encoder.config.image_size
    images = round(rows * GPTConfig().block_size / patches)
    batch = torch.zeros(images, 3, size, size), zeros(images, 1)
    return Step(model, lambda: model(*batch)[0], images * patches)
