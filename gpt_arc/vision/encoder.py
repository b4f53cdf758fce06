"""The image encoder: a vision transformer (arXiv:2010.11929) made of the GPT's own blocks, without the causal mask.

    encoder = ImageEncoder(EncoderConfig(image_size=224, patch_size=16))
    features = encoder(pixels)          # (N, 3, H, W) -> (N, T, C), the class token first if there is one
    grid = encoder.grid(pixels)         # (N, H / patch, W / patch, C), the patches alone

Shapes: N images, H and W their height and width in pixels, T patches (and class token), C n_embd.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from gpt_arc.nn.names import Activation
from gpt_arc.nn.relations import check_heads
from gpt_arc.settings import STRICT, Count, Positive
from model import Block, GPTConfig


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """The architecture of an image encoder."""

    image_size: Count = 224
    """Side of the square images it is trained on, in pixels. Other sizes interpolate the positions."""
    patch_size: Count = 16
    """Side of a patch in pixels. Pixels beyond the last whole patch are ignored."""
    n_layer: Count = 12
    """Number of blocks."""
    n_head: Count = 12
    """Attention heads per block."""
    n_embd: Count = 768
    """Width of the features."""
    mlp_size: Count | None = None
    """Hidden width of the MLP. None: 4 n_embd."""
    activation: Activation = "gelu"
    """The MLP's non-linearity."""
    norm_eps: Positive = 1e-6
    """Added to the variance inside every norm."""
    class_token: bool = False
    """A token before the patches that stands for the whole image (ViT, CLIP)."""
    patch_bias: bool = True
    """A bias on the embeddings of patches."""
    first_norm: bool = False
    """A norm before the first block (CLIP)."""
    final_norm: bool = True
    """A norm after the last block."""
    position_std: Positive = 0.02
    """Standard deviation of a new encoder's position embeddings. 0.5 is about as large as the embeddings of patches:
    a small encoder learns sooner where in an image something is."""

    def __post_init__(self):
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size = {self.patch_size} is larger than image_size = {self.image_size}")
        check_heads(self.n_head, self.n_embd)
        self.block  # noqa: B018  raises ValueError for sizes that don't fit together

    @property
    def side(self) -> int:
        """Patches along a side of an image of `image_size`."""
        return self.image_size // self.patch_size

    @property
    def block(self) -> GPTConfig:
        """The settings of a block."""
        names = ("n_layer", "n_head", "n_embd", "mlp_size", "activation", "norm_eps")
        return GPTConfig(attention="bidirectional", **{name: getattr(self, name) for name in names})


class ImageEncoder(nn.Module):
    """Embeddings of patches and positions, then blocks in which every patch sees every other."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        width, patch = config.n_embd, config.patch_size
        self.patches = nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        self.class_embedding = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.position_embedding = nn.Embedding(config.class_token + config.side**2, width)
        norms = (
            nn.LayerNorm(width, config.norm_eps) if present else nn.Identity()
            for present in (config.first_norm, config.final_norm)
        )
        self.first_norm, self.final_norm = norms
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.n_layer))
        self.init_weights()

    def init_weights(self) -> None:
        """Draws matrices of the blocks as GPT-2's; the convolution keeps torch's initialisation."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                scale = math.sqrt(2 * self.config.n_layer) if name.endswith("projection") else 1.0
                nn.init.normal_(module.weight, std=0.02 / scale)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.position_embedding.weight, std=self.config.position_std)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Returns position embeddings (T, C) for a grid of patches, bicubic interpolations of the learned square's."""
        table, side, first = self.position_embedding.weight, self.config.side, int(self.config.class_token)
        if rows == columns == side:
            return table
        square = table[first:].T.unflatten(1, (side, side))[None]  # (1, C, side, side)
        resized = F.interpolate(square, (rows, columns), mode="bicubic").flatten(2)[0].T
        return torch.cat((table[:first], resized))

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns features (N, T, C) of pixels (N, 3, H, W). Raises ValueError for images smaller than a patch."""
        if min(pixels.shape[2:]) < self.config.patch_size:
            raise ValueError(f"images of {tuple(pixels.shape[2:])} pixels are smaller than a patch")
        x = self.patches(pixels)  # (N, C, rows, columns)
        rows, columns = x.shape[2:]
        x = x.flatten(2).mT
        if self.class_embedding is not None:
            x = torch.cat((self.class_embedding.expand(len(x), 1, -1).type_as(x), x), dim=1)
        x = self.first_norm(x + self.positions(rows, columns))
        for block in self.blocks:
            x = block(x, None, None)
        return self.final_norm(x)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Returns one vector (N, C) for each image: the class token, or the mean over patches."""
        features = self(pixels)
        return features[:, 0] if self.config.class_token else features.mean(1)

    def grid(self, pixels: Tensor) -> Tensor:
        """Returns the features (N, rows, columns, C) of the patches."""
        rows = pixels.size(2) // self.config.patch_size
        return self(pixels)[:, int(self.config.class_token) :].unflatten(1, (rows, -1))
