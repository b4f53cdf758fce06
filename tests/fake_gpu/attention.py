"""The choice among fused kernels that a CUDA build of torch makes in scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

on_cpu = F.scaled_dot_product_attention
aten = torch.ops.aten


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """flash attention without a mask in 16 bits from the A100 on, memory-efficient attention otherwise.

    Raises ValueError where a device would have neither.
    """
    settings = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if query.device.type != "cuda":
        return on_cpu(query, key, value, **settings, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32 and torch.cuda.get_device_capability() >= (8, 0):
        flash = aten._scaled_dot_product_flash_attention.default
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        raise ValueError("no fused kernel has groups of queries here")
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.size(2))
    efficient = aten._scaled_dot_product_efficient_attention.default
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def install() -> None:
    F.scaled_dot_product_attention = scaled_dot_product_attention
