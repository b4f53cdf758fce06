"""Attention maps in a page: the data that the page's script draws, and the script and style themselves.

page = with_view(template)                       # fills in attention_view.css and attention_view.js
data = view_data(maps, ["The", " cat"])          # JSON for the script's attentionView
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_TOKENS = 96  # of a text whose attention a page draws


def view_data(maps: Tensor, tokens: Sequence[str]) -> dict[str, Any]:
    """Returns what a page draws of attention maps (L, H, T, T) between tokens with these texts, in steps of 1/255."""
    layers, heads = maps.shape[:2]
    levels = (255 * maps).round().to(torch.uint8).cpu().numpy().tobytes()
    weights = base64.b64encode(levels).decode()
    return {"tokens": list(tokens), "layers": layers, "heads": heads, "weights": weights}


def with_view(page: str) -> str:
    """Returns a page with the style and the script of attention maps in their places."""
    for kind in ("css", "js"):
        mark = f"/* attention_view.{kind} */"
        assert mark in page
        page = page.replace(mark, Path(__file__).with_suffix(f".{kind}").read_text(encoding="utf-8"))
    return page
