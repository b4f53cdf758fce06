"""Activation checkpointing: a block's activations are computed anew in the backward pass instead of being stored."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gpt_arc.nn.names import Checkpointing

aten = torch.ops.aten
PRODUCTS = aten.mm.default, aten.addmm.default
ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
)


def recomputed(block: nn.Module, setting: Checkpointing, mlp_width: int) -> Callable[..., Any]:
    """Returns `block` as a function that stores its input alone, or with "selective" also what `policy` keeps."""
    if setting != "selective":
        return partial(checkpoint, block, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, partial(policy, mlp_width))
    return partial(checkpoint, block, use_reentrant=False, context_fn=contexts)


def policy(mlp_width: int, _: Any, operator: Any, *args: Any, **settings: Any) -> CheckpointPolicy:
    """Keeps the outputs of attention and of all products except the MLP's first, the widest: a third of the FLOPs."""
    is_widest = operator in PRODUCTS and args[-1].size(1) in (mlp_width, 2 * mlp_width)  # (C, M), gated (C, 2 M)
    is_attention = operator in ATTENTION or getattr(operator, "namespace", None) == "torch_attn"  # varlen_attn's
    keeps = is_attention or operator in PRODUCTS and not is_widest
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
