"""The loss of BERT's second objective: does the second text of a pair follow the first (arXiv:1810.04805)?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_arc.nn.head_loss import IGNORED

FOLLOWS, UNRELATED = 0, 1  # labels of pairs, as in BERT's code


def next_sentence_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns three sums (3,) over pairs: cross-entropies in nats, right choices, and pairs that are scored.

    `logits` (B, 2) are scored at labels (B,); -1 isn't scored.
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    right, scored = (logits.argmax(-1) == labels).sum(), (labels != IGNORED).sum()
    return torch.stack((loss, right.type_as(loss), scored.type_as(loss)))
