"""Attention maps of a prompt, by the model of a run."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_arc.attention_view import MOST_TOKENS
from gpt_arc.errors import UserError
from gpt_arc.nn.attention_maps import attention_maps
from gpt_arc.weights.directory import load_text_model


class PromptAttention(NamedTuple):
    """The maps (L, H, T, T) between a prompt's tokens, with the texts of the tokens."""

    maps: Tensor
    tokens: list[str]


def prompt_attention(folder: Path, prompt: str) -> PromptAttention:
    """Returns the attention of a run's best checkpoint, else its last, in the beginning of a prompt.

    Raises UserError if there is no checkpoint or it is no language model, or for a text that it can't encode.
    """
    model, tokenizer = load_text_model(folder)
    tokens = tokenizer.encode(prompt)[: min(MOST_TOKENS, model.config.block_size)]
    if not tokens:
        raise UserError("the prompt has no tokens")
    if model.config.mixer == "lstm":
        raise UserError(f"{folder} has no attention to show, for its mixer is an lstm: leave out attention")
    return PromptAttention(attention_maps(model.eval(), tokens), [tokenizer.decode([token]) for token in tokens])


def draw_attention_maps(axes: Any, maps: Tensor) -> None:
    """Draws maps in matplotlib's axes: a row for each layer and a column for each head, darker for more attention."""
    layers, heads, size, _ = maps.shape
    future = torch.ones(size, size).triu(1).bool() & (maps == 0)
    tiles = torch.full((layers, heads, size + 1, size + 1), torch.nan)  # with a gap between them
    tiles[..., :size, :size] = maps.sqrt().masked_fill(future, torch.nan)
    axes.imshow(
        tiles.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="Blues", vmin=-0.1, interpolation="nearest"
    )
    axes.set_xticks([(size + 1) * head + size / 2 for head in range(heads)], range(1, heads + 1))
    axes.set_yticks([(size + 1) * layer + size / 2 for layer in range(layers)], range(1, layers + 1))
    axes.set(xlabel="head", ylabel="layer", title="attention: queries down, keys across")
    axes.spines[:].set_visible(False)
