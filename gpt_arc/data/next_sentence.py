"""Pairs of texts for BERT's second objective (arXiv:1810.04805, section 3.1, task 2, and appendix A.2)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gpt_arc.nn.next_sentence import FOLLOWS, UNRELATED
from gpt_arc.nn.relations import MARKS

READ = 4096  # tokens at once in the search for the end of a document
DRAWS = 100  # of a place in another document


class Texts(Protocol):
    """What pairs are cut from: a split, or a stand-in."""

    def read(self, start: int, count: int) -> np.ndarray: ...

    def dataset_of(self, start: int) -> range: ...


@dataclass(frozen=True)
class SentencePairs:
    """How windows become pairs of texts, a pure function of the seed and a window's number.

    A row is [CLS] A [SEP] B [SEP]. A and what follows it are a window of tokens, cut in two at a random place inside a
    document. In half of the rows B is what follows, in the others a piece of the same length from a random place of the
    same dataset that is in another document than the end of A. No B begins its document.

    Google's create_pretraining_data.py joins whole sentences of one document and ends a row where the document ends;
    here a piece begins and ends at any token, and runs on into the documents that follow, as other windows do. So all
    rows are full, of short documents too, and a label says whether B goes on where A ends. There, text that a random B
    displaces is read in a later row, a tenth of the rows are shorter, and other documents are drawn with equal chances;
    here it waits for another epoch, which cuts other windows, and a document's chance grows with its length.
    """

    start: int  # [CLS]
    end: int  # [SEP]
    separator: int  # begins a document
    seed: int

    def rows(
        self, texts: Texts, starts: np.ndarray, numbers: Iterable[int], length: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the tokens of the windows at `starts` as pairs, their types, and whether they are text, all
        (B, length), and labels (B,): 0 where the second text follows the first, 1 where it doesn't.

        `numbers` has one number for each window. The datasets are longer than `length`.
        """
        tokens = torch.full((len(starts), length), self.end)
        types, labels = torch.zeros_like(tokens), torch.zeros_like(tokens[:, 0])
        is_text = torch.zeros_like(tokens, dtype=torch.bool)
        tokens[:, 0] = self.start
        for row, (start, number) in enumerate(zip(starts, numbers)):
            pair, cut, labels[row] = self._pair(texts, int(start), int(number), length - MARKS)
            for text, place in ((pair[:cut], 1), (pair[cut:], cut + 2)):
                tokens[row, place : place + len(text)] = torch.from_numpy(text)
                is_text[row, place : place + len(text)] = True
            types[row, cut + 2 :] = 1
        return tokens, types, is_text, labels

    def _pair(self, texts: Texts, start: int, number: int, size: int) -> tuple[np.ndarray, int, int]:
        """Returns two texts of `size` tokens together, the length of the first, and their label."""
        random, dataset = np.random.default_rng((self.seed, number, 1)), texts.dataset_of(start)
        start = min(start, dataset.stop - size)  # an evaluation's last window may go beyond the end
        window = texts.read(start, size)
        inside = window != self.separator
        cuts = np.flatnonzero(inside[:-1] & inside[1:]) + 1
        if not len(cuts):  # no document has two tokens here
            return window, size // 2, UNRELATED
        cut = int(random.choice(cuts))
        for _ in range(DRAWS if random.random() < 0.5 else 0):
            place = int(random.integers(dataset.start + 1, dataset.stop - (size - cut) + 1))
            piece = texts.read(place - 1, size - cut + 1)
            is_inside = self.separator not in piece[:2]
            if is_inside and not same_document(texts, start + cut - 1, place, self.separator):
                return np.concatenate((window[:cut], piece[1:])), cut, UNRELATED
        return window, cut, FOLLOWS


def same_document(texts: Texts, one: int, other: int, separator: int) -> bool:
    """Whether the tokens at these places of a dataset belong to one document."""
    first, last = sorted((one, other))
    for place in range(first + 1, last + 1, READ):
        if separator in texts.read(place, min(READ, last + 1 - place)):
            return False
    return True
