"""The attention weights of a model that reads a text, whatever kernel computes them.

maps = attention_maps(model.eval(), tokens)      # (L, H, T, T): block, head, query, key
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt_arc.nn.attention import attend

if TYPE_CHECKING:
    from model import GPT


class AttentionWeights(TorchFunctionMode):
    """Context that collects the weights (B, H, T, T) of each call of `attend` in this thread.

    Of longer texts, those from token `start` on; a negative one counts from the end.
    """

    def __init__(self, start: int = 0):
        super().__init__()
        self.start = start
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is attend:
            query, key, value, *others = args
            identity = torch.eye(key.size(2), dtype=value.dtype, device=value.device)  # as values they give the weights
            weights = attend(query, key, identity.expand(*key.shape[:2], -1, -1), *others)
            self.weights.append(weights[..., self.start :, self.start :].float())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def attention_maps(
    model: "GPT", tokens: Sequence[int], images: Tensor | None = None, latest: int | None = None
) -> Tensor:
    """Returns the weights (L, H, T, T), float32, that each token's query gives to each token's key.

    `images` (N, C): see `GPT.embed`. `latest`: returns those between this many last tokens only. Raises ValueError for
    more than block_size tokens, or a model without attention.
    """
    if model.config.mixer == "lstm":
        raise ValueError("a model with mixer = lstm has no attention to show")
    with AttentionWeights(0 if latest is None else -latest) as record:
        model.hidden(torch.tensor([list(tokens)], device=model.token_embedding.weight.device), images=images)
    return torch.cat(record.weights)
