"""The projector: maps an encoder's features to embeddings of the text model."""

from typing import Literal

import torch.nn as nn
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from gpt_arc.settings import STRICT, Count


@dataclass(frozen=True, config=STRICT)
class ProjectorConfig:
    projector_layers: Literal[1, 2] = 2
    """1: a linear map. 2: two linear maps around a GELU (LLaVA-1.5, arXiv:2310.03744)."""
    projector_bias: bool = True
    """Biases in the projector."""
    pixel_shuffle: Count = 1
    """Squares of this many patches a side become one embedding, their features side by side. 1: each patch has one."""


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig, width: int, n_embd: int):
        """`width` is that of the features, `n_embd` that of the text model."""
        super().__init__()
        self.config = config
        self.first = nn.Linear(width * config.pixel_shuffle**2, n_embd, bias=config.projector_bias)
        self.second = nn.Linear(n_embd, n_embd, bias=config.projector_bias) if config.projector_layers == 2 else None

    def forward(self, grid: Tensor) -> Tensor:
        """Returns embeddings (N, P, n_embd) of a grid of features (N, rows, columns, width).

        Raises ValueError unless the grid consists of whole squares.
        """
        side = self.config.pixel_shuffle
        if grid.size(1) % side or grid.size(2) % side:
            raise ValueError(f"pixel_shuffle = {side} doesn't divide {grid.size(1)} x {grid.size(2)} patches")
        squares = grid.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (N, rows / s, s, columns / s, s, width)
        x = self.first(squares.transpose(2, 3).flatten(3).flatten(1, 2))
        return x if self.second is None else self.second(F.gelu(x))
