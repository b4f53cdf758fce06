"""Pairs of a source and a target, encoded for a model with an encoder.

The target begins and ends with one token: the tokenizer's end-of-text token or, in a vocabulary without one, the first
id beyond.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, tensor

from gpt_arc.data.batches import pad_rows
from gpt_arc.data.rows import parsed_rows, text_of
from gpt_arc.data.tokenizer import Tokenizer, naming_text
from gpt_arc.errors import UserError
from gpt_arc.nn.head_loss import IGNORED


class Pair(NamedTuple):
    """A source and its target, as texts."""

    source: str
    target: str
    place: str  # file and line, for messages


class EncodedPair(NamedTuple):
    """A source and its target, in tokens without the boundaries."""

    source: list[int]
    target: list[int]


class PairBatch(NamedTuple):
    """B pairs: sources of up to S tokens, targets of up to T with the boundary."""

    source: Tensor  # (B, S) int64
    lengths: Tensor  # (B,) int64, of the sources
    tokens: Tensor  # (B, T) int64, the boundary first
    targets: Tensor  # (B, T) int64, the boundary last; -1 for padding


def boundary_token(tokenizer: Tokenizer) -> int:
    """Returns the token that begins and ends a target."""
    return tokenizer.vocab_size if tokenizer.end_of_text is None else tokenizer.end_of_text


def read_pairs(path: Path) -> list[Pair]:
    """Reads the columns source and target of a file of rows. Raises UserError naming the first bad row."""
    return parsed_rows(path, lambda row, place: Pair(text_of(row, "source"), text_of(row, "target"), place))


def encode_source(text: str, tokenizer: Tokenizer, context: int, mend: str = "shorten it") -> list[int]:
    """Returns a source's tokens. Raises UserError for a text without any, or for more than the context holds.

    `mend` is what to do about one that is too long.
    """
    with naming_text("source", text):
        tokens = tokenizer.encode(text)
    if not tokens:
        raise UserError(f"the source {text[:40]!r} has 0 tokens, and a model needs one: write a text, or leave it out")
    if len(tokens) > context:
        raise UserError(f"the source {text[:40]!r} has {len(tokens)} tokens, and the model reads {context}: {mend}")
    return tokens


def encode_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer, context: int, mend: str) -> list[EncodedPair]:
    """Encodes pairs. Raises UserError, naming the row, for one that doesn't fit into the context or vocabulary.

    `mend` is what to do about one that is too long.
    """
    encoded = []
    for pair in pairs:
        try:
            source = encode_source(pair.source, tokenizer, context, mend)
            with naming_text("target", pair.target):
                target = tokenizer.encode(pair.target)
            if len(target) >= context:
                size = f"has {len(target)} tokens and an end, and block_size = {context} has room for {context}"
                raise UserError(f"the target {pair.target[:40]!r} {size}: {mend}")
        except UserError as error:
            raise UserError(f"{pair.place}: {error}") from None
        encoded.append(EncodedPair(source, target))
    return encoded


def pair_batch(pairs: Sequence[EncodedPair], boundary: int) -> PairBatch:
    """Pads pairs into a batch."""
    return PairBatch(
        pad_rows(pair.source for pair in pairs),
        tensor([len(pair.source) for pair in pairs]),
        pad_rows([boundary, *pair.target] for pair in pairs),
        pad_rows(([*pair.target, boundary] for pair in pairs), value=IGNORED),
    )
