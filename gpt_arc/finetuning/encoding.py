"""Examples encoded as tokens, and batches of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.finetuning.classifier import Batch, ClassifierConfig, make_batch
from gpt_arc.finetuning.examples import Example, label_number, label_value, sequences_of


class EncodedExamples(NamedTuple):
    """Examples as tokens."""

    sequences: list[list[list[int]]]  # the sequences of each example
    labels: list[float]  # class or option numbers, -1 where unknown; in regression values, NaN where unknown
    cut: int  # number of examples that were too long and were cut
    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in the longest sequence of each example, (N,)."""
        return np.array([max(map(len, sequences)) for sequences in self.sequences])

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return make_batch([self.sequences[row] for row in rows], [self.labels[row] for row in rows])


def encode_examples(examples: Sequence[Example], config: ClassifierConfig, tokenizer: Tokenizer) -> EncodedExamples:
    """Encodes examples the way a classifier reads them.

    Raises UserError, naming the row, for an unknown label or character.
    """
    encoded, labels, cut = [], [], 0
    for example in tqdm(examples, "encoding", leave=False, disable=None):
        sequences, was_cut = sequences_of(example, config.task, tokenizer, config.special, config.max_tokens)
        encoded.append(sequences)
        cut += was_cut
        if config.is_regression:
            labels.append(label_value(example))
        elif config.classes is None:
            labels.append(-1 if example.label is None else int(example.label))
        else:
            labels.append(label_number(example, config.classes))
    return EncodedExamples(encoded, labels, cut, examples)
