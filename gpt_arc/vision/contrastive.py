"""Images with captions, and an encoder that learns which caption belongs to which image (CLIP, SigLIP).

Shapes: N images of a batch and as many captions, T tokens of the longest, D features of both.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_arc.data.batches import pad_rows
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.errors import UserError
from gpt_arc.nn.names import ContrastiveLoss
from gpt_arc.vision.data import load_pixels
from gpt_arc.vision.encoder import ImageEncoder
from gpt_arc.vision.images import Preprocessing
from gpt_arc.vision.labels import LabelledImage
from model import GPT

STARTS = {"clip": (math.log(1 / 0.07), 0.0), "siglip": (math.log(10), -10.0)}  # of log_scale and bias
LARGEST_SCALE = math.log(100)  # CLIP's


def clip_loss(similarities: Tensor) -> Tensor:
    """Returns the sum over images of the cross-entropy of its caption among all captions of the batch, and of the
    image among all images, halved (arXiv:2103.00020). `similarities` are (N, N), images by captions.
    """
    numbers = torch.arange(len(similarities), device=similarities.device)
    of_captions = F.cross_entropy(similarities, numbers, reduction="sum")
    return (of_captions + F.cross_entropy(similarities.T, numbers, reduction="sum")) / 2


def siglip_loss(similarities: Tensor) -> Tensor:
    """Returns the sum over all pairs of the cross-entropy of whether they belong together (arXiv:2303.15343)."""
    signs = 2 * torch.eye(len(similarities), device=similarities.device) - 1
    return -F.logsigmoid(signs * similarities).sum()


LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


class CaptionReader(nn.Module):
    """A text model that reads captions, and what compares them with images."""

    def __init__(self, text: GPT, width: int, loss: ContrastiveLoss):
        """`width` is that of the images' features."""
        super().__init__()
        self.text, size = text, text.config.n_embd
        for unused in (*([] if text.config.tied_head else [text.head.weight]), text.head_bias):
            if unused is not None:
                unused.requires_grad_(False)
        self.image_projection = nn.Linear(width, size, bias=False)
        self.text_projection = nn.Linear(size, size, bias=False)
        self.log_scale, self.bias = (nn.Parameter(torch.tensor(start)) for start in STARTS[loss])
        self.bias.requires_grad_(loss == "siglip")

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Returns the similarities (N, N) of images with the features (N, width) and captions (N, T)."""
        last = self.text.hidden(tokens, lengths=lengths)[torch.arange(len(tokens)), lengths - 1]
        left, right = self.image_projection(images).float(), self.text_projection(last).float()
        scale = self.log_scale.clamp(max=LARGEST_SCALE).exp()
        return scale * F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T + self.bias


class CaptionMatcher(nn.Module):
    """An encoder whose class token, or mean over patches, is compared with the last state of captions."""

    def __init__(self, encoder: ImageEncoder, text: GPT, loss: ContrastiveLoss):
        super().__init__()
        self.encoder, self.loss = encoder, LOSSES[loss]
        self.heads = CaptionReader(text, encoder.config.n_embd, loss)

    def forward(self, pixels: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the summed loss of images and captions, and the number of images most similar to their caption."""
        similarities = self.heads(self.encoder.pooled(pixels), tokens, lengths)
        right = similarities.argmax(1) == torch.arange(len(similarities), device=similarities.device)
        return self.loss(similarities), right.sum()


class CaptionedImages:
    """Images of a split with the tokens of their captions: their labels with spaces between."""

    def __init__(self, images: Sequence[LabelledImage], tokenizer: Tokenizer, context: int):
        """Captions are cut at `context` tokens. Raises UserError for one that the tokenizer can't encode."""
        self.paths = [image.path for image in images]
        captions = [" ".join(label for label in image.labels if label is not None) for image in images]
        self.tokens = []
        for path, caption in zip(self.paths, captions):
            try:
                self.tokens.append(tokenizer.encode_prompt(caption)[:context])
            except UserError as error:
                raise UserError(f"the caption of {path}: {error}") from None

    def batch(self, rows: Sequence[int], preprocessing: Preprocessing, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the pixels (N, 3, size, size), tokens (N, T) and their lengths (N,) of these rows."""
        tokens = [self.tokens[row] for row in rows]
        pixels = load_pixels([self.paths[row] for row in rows], preprocessing, size)
        return pixels, pad_rows(tokens), torch.tensor([len(each) for each in tokens])

    def count(self, rows: Sequence[int]) -> int:
        """Returns the number of captions of these rows."""
        return len(rows)
