"""The floor under a language model: n-gram counts with interpolated Kneser-Ney smoothing, on any prepared dataset.

    python examples/ngrams.py python_manual                     the quickstart's characters
    python examples/ngrams.py openwebtext --tokens=20_000_000   counts these first tokens of the train split only

Prints the loss in nats a token on the val split for n = 1 .. --order, beside which a GPT's val loss stands. The
smoothing is that of Chen and Goodman (1998), section 4.1.6, with one discount for each n.
"""

import itertools
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.errors import UserError, entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positional
from gpt_arc.tables import counted, table


@dataclass(frozen=True, config=STRICT)
class Options:
    dataset: Positional[str]
    """A prepared dataset: a name below data/, or a folder."""
    order: Annotated[int, Ge(1), Le(10)] = 5
    """The longest n-gram."""
    tokens: Count | None = None
    """Tokens of the train split to count, from its beginning; each takes some 50 bytes for each n. None: all."""
    val_tokens: Count = 1_000_000
    """Tokens of the val split to predict, from its beginning."""


class Counts(NamedTuple):
    """Counts of the n-grams of one n, with what Kneser-Ney smoothing needs of them."""

    counts: np.ndarray  # (G,) by n-gram
    totals: np.ndarray  # (H,) their sums by prefix, the first n - 1 tokens
    kinds: np.ndarray  # (H,) numbers of n-grams by prefix
    discount: float  # taken from each count, and given to the shorter n-grams

    @classmethod
    def of(cls, counts: np.ndarray, prefixes: np.ndarray) -> "Counts":
        """From counts (G,) and the prefix (G,) of each n-gram."""
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = float(once / (once + 2 * twice)) if once else 0.0
        return cls(counts, np.bincount(prefixes, counts), np.bincount(prefixes, counts > 0), discount)

    def smoothed(self, lower: np.ndarray, ngrams: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        """Returns the probabilities (T,) of n-grams (T,) after their prefixes (T,); -1 marks what was never seen.

        `lower` (T,) are the probabilities by the shorter n-grams.
        """
        totals = np.where(prefixes < 0, 0, self.totals[prefixes])
        kept = np.where(ngrams < 0, 0, np.maximum(self.counts[ngrams] - self.discount, 0))
        shared = self.discount * self.kinds[prefixes] * lower
        return np.where(totals > 0, (kept + shared) / np.maximum(totals, 1), lower)


class KneserNey:
    """Interpolated Kneser-Ney models of n-grams for n = 1 .. `order`, from tokens (N,)."""

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int):
        self.vocab_size = vocab_size
        self.pairs: list[np.ndarray] = []  # for each n, (G,): number of the prefix * vocab_size + last token
        self.occurrences: list[Counts] = []  # how often each n-gram occurs
        self.predecessors: list[Counts] = []  # how many different tokens precede it
        numbers = np.zeros(len(tokens), np.int64)  # of the (n-1)-gram that precedes each token from the n-th on
        previous = None  # the n-grams of the last n: of each place, and the prefixes
        for n in range(1, order + 1):
            keys = numbers * vocab_size + tokens[n - 1 :]
            pairs, first, inverse, repeats = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            if previous is not None:
                ngrams, prefixes = previous
                endings = ngrams[first + 1]  # of each n-gram, its last n - 1 tokens
                self.predecessors.append(Counts.of(np.bincount(endings, minlength=len(prefixes)), prefixes))
            previous = inverse, pairs // vocab_size
            self.pairs.append(pairs)
            self.occurrences.append(Counts.of(repeats, pairs // vocab_size))
            numbers = inverse[:-1]

    def probabilities(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Returns for each n the probabilities (T,) of tokens (T,), each after the ones before it."""
        results, lower = [], np.full(len(tokens), 1 / self.vocab_size)
        prefixes = np.zeros(len(tokens), np.int64)  # number of the (n-1)-gram before each token; -1: never seen
        for pairs, occurrences, predecessors in itertools.zip_longest(self.pairs, self.occurrences, self.predecessors):
            keys = np.where(prefixes < 0, -1, prefixes * self.vocab_size + tokens)
            places = np.searchsorted(pairs, keys).clip(max=len(pairs) - 1)
            ngrams = np.where(pairs[places] == keys, places, -1)
            results.append(occurrences.smoothed(lower, ngrams, prefixes))
            if predecessors is not None:
                lower = predecessors.smoothed(lower, ngrams, prefixes)
            prefixes = np.concatenate(([-1], ngrams[:-1]))
        return results


def losses(options: Options) -> list[float]:
    """Returns the val loss in nats a token for each n. Raises UserError."""
    corpus = open_corpus([Source(options.dataset, 1.0)])
    if corpus is None:
        raise UserError(f"there is no prepared dataset {options.dataset}: prepare/text.py makes one")
    folder: Path = corpus.directories[0]
    train, val = TokenFiles(folder, "train"), TokenFiles(folder, "val")
    tokens, targets = train.read(0, options.tokens or len(train)), val.read(0, options.val_tokens)
    if min(len(tokens), len(targets)) <= options.order:
        raise UserError(f"{folder} has fewer tokens than order = {options.order} needs: lower it")
    size = corpus.tokenizer.vocab_size if corpus.tokenizer else int(max(tokens.max(), targets.max())) + 1
    print(f"{counted(len(tokens), 'token')} counted, {counted(len(targets), 'token')} predicted, {size:,} kinds")
    probabilities = KneserNey(tokens, size, options.order).probabilities(targets)
    with np.errstate(divide="ignore"):
        return [float(-np.log(each).mean()) for each in probabilities]


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    rows = [(str(n), f"{loss:.4f}") for n, loss in enumerate(losses(options), 1)]
    print(table([("n", "val loss"), *rows]))


if __name__ == "__main__":
    entry_point(main)()
