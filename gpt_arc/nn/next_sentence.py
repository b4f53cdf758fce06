"""The head and the loss of BERT's second objective (arXiv:1810.04805): does one text follow another?"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_arc.nn.head_loss import IGNORED

FOLLOWS, UNRELATED = 0, 1  # labels of pairs, as in BERT's code


class PairHead(nn.Module):
    """BERT's pooler, a layer and tanh on the hidden state of the first token, and a linear layer."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.pooler = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, 2, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns logits (B, 2) of hidden states (B, T, C): the second text follows the first, or it doesn't."""
        return self.output(self.pooler(hidden[:, 0]).tanh())


def next_sentence_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns three sums (3,) over pairs: cross-entropies in nats, right choices, and pairs that are scored.

    `logits` (B, 2) are scored at labels (B,); -1 isn't scored.
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    right, scored = (logits.argmax(-1) == labels).sum(), (labels != IGNORED).sum()
    return torch.stack((loss, right.type_as(loss), scored.type_as(loss)))
