"""Models derived from a trained one: with other settings, more tokens, or only some of its blocks."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_arc.nn.meta import meta_device
from model import GPT


def with_settings(model: GPT, tensors: dict[str, Tensor] | None = None, **settings: Any) -> GPT:
    """Returns a model with changed `settings` and with `tensors` as its weights; None: the model's own."""
    with meta_device():
        changed = type(model)(dataclasses.replace(model.config, **settings))
    changed.load_state_dict(tensors or model.state_dict(), assign=True)
    return changed


def with_more_tokens(model: GPT, count: int) -> GPT:
    """Returns the model with `count` more tokens, embeddings drawn from N(0, .02) as in finetune-transformer-lm."""
    tensors, config = model.state_dict(), model.config
    for name in ("token_embedding.weight",) if config.tied_head else ("token_embedding.weight", "head.weight"):
        new = torch.randn(count, config.n_embd) * 0.02
        tensors[name] = torch.cat((tensors[name], new.type_as(tensors[name])))
    if model.head_bias is not None:
        tensors["head_bias"] = F.pad(tensors["head_bias"], (0, count))
    return with_settings(model, tensors, vocab_size=config.vocab_size + count)


@torch.no_grad()
def fold_shift(model: GPT, weight: Tensor, shift: float) -> float:
    """Adds `shift` to the output of a head with `weight` (1, C) by the bias of the last norm. Returns what is left.

    That is `shift` itself if the norm has no bias, else 0.
    """
    last = model.blocks[-1].mlp_norm if model.config.norm_position == "post" else model.final_norm
    bias = getattr(last, "bias", None)
    if bias is None or not weight.any():
        return shift
    bias += shift * weight[0] / weight.square().sum()
    return 0.0


def transfer(model: GPT, blocks: int | None) -> GPT:
    """Returns a model that keeps the embeddings and the first `blocks` blocks; all other weights are new.

    None keeps nothing. n_layer keeps everything, also what follows the last block.
    """
    if blocks == model.config.n_layer:
        return model
    fresh = type(model)(model.config)
    if blocks is not None:
        embeddings = "token_embedding.", "position_embedding.", "ngram_embedding."
        kept = (*embeddings, *(f"blocks.{i}." for i in range(blocks)))
        fresh.load_state_dict({n: t for n, t in model.state_dict().items() if n.startswith(kept)}, strict=False)
    return fresh
