"""Images with captions, and an encoder that learns which caption belongs to which image (CLIP, SigLIP).

Shapes: N images that a process reads and as many captions, M those of all processes, T tokens of the longest caption,
D features of both.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_arc.data.batches import pad_rows
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.distributed import RANK, WORLD_SIZE
from gpt_arc.errors import UserError
from gpt_arc.nn.names import ContrastiveLoss
from gpt_arc.vision.data import load_pixels
from gpt_arc.vision.encoder import ImageEncoder
from gpt_arc.vision.images import Preprocessing
from gpt_arc.vision.labels import LabelledImage
from gpt_arc.watch import WATCH
from model import GPT

STARTS = {"clip": (math.log(1 / 0.07), 0.0), "siglip": (math.log(10), -10.0)}  # of log_scale and bias
LARGEST_SCALE = math.log(100)  # CLIP's
MISSING = -1  # in place of a row's number


def clip_loss(of_images: Tensor, of_captions: Tensor, numbers: Tensor) -> Tensor:
    """Returns the sum over N images of the cross-entropy of its caption among all captions, and over N captions of that
    of its image among all images, halved (arXiv:2103.00020).

    `of_images` (N, M) are the images' similarities to all captions, `of_captions` (N, M) the captions' to all images;
    `numbers` (N,) says where among all each image and its caption are.
    """
    images = F.cross_entropy(of_images, numbers, reduction="sum")
    return (images + F.cross_entropy(of_captions, numbers, reduction="sum")) / 2


def siglip_loss(of_images: Tensor, of_captions: Tensor, numbers: Tensor) -> Tensor:
    """Returns the sum over the pairs of N images and all captions of the cross-entropy of whether they belong together
    (arXiv:2303.15343), with the arguments of `clip_loss`.
    """
    signs = 2 * F.one_hot(numbers, of_images.size(1)) - 1
    return -F.logsigmoid(signs * of_images).sum()


LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


class Gather(torch.autograd.Function):
    """Puts the rows of all processes one below the other, by rank. A row's gradient is summed over the processes."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        WATCH.arrive()
        parts = [torch.empty_like(rows) for _ in range(WORLD_SIZE)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        WATCH.arrive()
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(WORLD_SIZE)[RANK]


class CaptionReader(nn.Module):
    """A text model that reads captions, and what compares them with images."""

    def __init__(self, text: GPT, width: int, loss: ContrastiveLoss, batch_size: int):
        """`width` is that of the images' features, `batch_size` the most images that a process reads at a time."""
        super().__init__()
        self.text, self.batch_size, size = text, batch_size, text.config.n_embd
        for unused in (*([] if text.config.tied_head else [text.head.weight]), text.head_bias):
            if unused is not None:
                unused.requires_grad_(False)
        self.image_projection = nn.Linear(width, size, bias=False)
        self.text_projection = nn.Linear(size, size, bias=False)
        self.log_scale, self.bias = (nn.Parameter(torch.tensor(start)) for start in STARTS[loss])
        self.bias.requires_grad_(loss == "siglip")

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the arguments of `clip_loss` for images with the features (N, width) and captions (N, T), whose
        numbers in the split are `rows` (N,).
        """
        every = torch.arange(len(tokens), device=tokens.device)
        last = self.text.hidden(tokens, lengths=lengths)[every, lengths - 1]
        left, right = self.image_projection(images).float(), self.text_projection(last).float()
        left, right = F.normalize(left, dim=-1), F.normalize(right, dim=-1)
        all_left, all_right, numbers = self.of_all_processes(left, right, rows)
        scale = self.log_scale.clamp(max=LARGEST_SCALE).exp()
        return scale * left @ all_right.T + self.bias, scale * right @ all_left.T + self.bias, numbers

    def of_all_processes(self, left: Tensor, right: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the features (M, D) of the images and captions that all processes read, and where among them are
        those of `rows` (N,).

        A process may have read fewer than `batch_size`, or one that another has read, where there was no other left.
        """
        if WORLD_SIZE == 1:
            return left, right, torch.arange(len(rows), device=rows.device)
        missing = self.batch_size - len(rows)
        every = Gather.apply(F.pad(torch.cat((left, right), dim=1), (0, 0, 0, missing)))
        all_rows, place = Gather.apply(F.pad(rows, (0, missing), value=MISSING)).unique(return_inverse=True)
        first = int(all_rows[0] == MISSING)
        source = place.new_empty(len(all_rows)).scatter_(0, place, torch.arange(len(place), device=place.device))
        all_left, all_right = every[source[first:]].chunk(2, dim=1)
        return all_left, all_right, torch.searchsorted(all_rows[first:], rows)


class CaptionMatcher(nn.Module):
    """An encoder whose class token, or mean over patches, is compared with the last state of captions."""

    def __init__(self, encoder: ImageEncoder, text: GPT, loss: ContrastiveLoss, batch_size: int):
        """`batch_size` is the most images that a process reads at a time."""
        super().__init__()
        self.encoder, self.loss = encoder, LOSSES[loss]
        self.heads = CaptionReader(text, encoder.config.n_embd, loss, batch_size)

    def forward(self, pixels: Tensor, tokens: Tensor, lengths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the summed loss of N images and captions among those of all processes, and the number of images most
        similar to their caption.
        """
        of_images, of_captions, numbers = self.heads(self.encoder.pooled(pixels), tokens, lengths, rows)
        return self.loss(of_images, of_captions, numbers), (of_images.argmax(1) == numbers).sum()


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

    def batch(self, rows: Sequence[int], preprocessing: Preprocessing, size: int) -> tuple[Tensor, ...]:
        """Returns the pixels (N, 3, size, size), tokens (N, T), their lengths (N,) and `rows` (N,)."""
        tokens = [self.tokens[row] for row in rows]
        pixels = load_pixels([self.paths[row] for row in rows], preprocessing, size)
        return pixels, pad_rows(tokens), torch.tensor([len(each) for each in tokens]), torch.tensor(rows)

    def count(self, rows: Sequence[int]) -> int:
        """Returns the number of captions of these rows."""
        return len(rows)
