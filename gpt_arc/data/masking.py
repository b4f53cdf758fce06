"""BERT's objective (arXiv:1810.04805): to predict some hidden tokens of a text from the others."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt_arc.data.next_sentence import SentencePairs
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.nn.head_loss import IGNORED

MASK = "[MASK]"
HIDDEN, REPLACED = 0.8, 0.1  # shares of the chosen tokens: hidden, replaced by a random one; the others stay


def mask_token(tokenizer: Tokenizer) -> int:
    """Returns the token that hides another: [MASK] or, in a vocabulary without it, the first id beyond."""
    token = tokenizer.special_token(MASK)
    return tokenizer.vocab_size if token is None else token


def sentence_marks(tokenizer: Tokenizer, next_sentence: bool) -> tuple[int, int] | None:
    """Returns the tokens that begin and end a text, [CLS] and [SEP]. If the tokenizer has no such tokens, they are the
    first two ids beyond it and the token that hides others in a model with `next_sentence`, and None in any other.
    """
    start, end = tokenizer.special_token("[CLS]"), tokenizer.special_token("[SEP]")
    if start is not None and end is not None:
        return start, end
    beyond = max(tokenizer.vocab_size, mask_token(tokenizer) + 1)
    return (beyond, beyond + 1) if next_sentence else None


def scored_tokens(rate: float, length: int) -> int:
    """Returns how many of a window's `length` tokens are scored: always the same number, as in BERT's code."""
    return max(1, round(rate * length))


@dataclass(frozen=True)
class Masking:
    """How windows of tokens are hidden: a pure function of the seed and a window's number."""

    token: int  # hides another
    words: int  # random tokens are below this id
    rate: float  # share of the tokens that are scored
    seed: int
    pairs: SentencePairs | None = None  # if windows become pairs of texts

    def hide(self, tokens: Tensor, is_text: Tensor, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Returns what the model reads in place of tokens (B, T), and targets (B, T), -1 where none is scored.

        `numbers` has one number for each window. Where `is_text` (B, T) is False, tokens stay and aren't scored.
        """
        inputs = tokens.clone()
        targets = torch.full_like(tokens, IGNORED)
        for row, number in enumerate(numbers):
            random = np.random.default_rng((self.seed, int(number)))
            places = is_text[row].nonzero().flatten()
            length = len(places)
            chosen = places[random.permutation(length)[: scored_tokens(self.rate, length)]]
            fate = torch.from_numpy(random.random(len(chosen)))
            replacement = torch.from_numpy(random.integers(self.words, size=len(chosen)))
            replacement[fate < HIDDEN] = self.token
            changed = fate < HIDDEN + REPLACED
            targets[row, chosen] = tokens[row, chosen]
            inputs[row, chosen[changed]] = replacement[changed]
        return inputs, targets
