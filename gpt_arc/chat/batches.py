"""Conversations as tokens, and rows of several of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_arc.chat.files import Conversation
from gpt_arc.chat.format import ChatFormat
from gpt_arc.errors import UserError
from gpt_arc.nn.head_loss import IGNORED


class EncodedConversation(NamedTuple):
    """A conversation in tokens."""

    tokens: list[int]
    scored: list[bool]  # which of them the loss counts

    @property
    def count(self) -> int:
        """Tokens that the loss counts."""
        return sum(self.scored)


class EncodedConversations(NamedTuple):
    examples: list[EncodedConversation]
    cut: int  # conversations that lost responses at their end
    dropped: int  # those whose first response doesn't fit


def encode_conversations(conversations: Sequence[Conversation], chat: ChatFormat, context: int) -> EncodedConversations:
    """Conversations of at most `context` + 1 tokens: a longer one keeps its first turns, up to a response that fits.

    Raises UserError naming the row for text that has no tokens.
    """
    examples, cut, dropped = [], 0, 0
    for conversation in conversations:
        try:
            tokens, scored = chat.encode(conversation.turns)
        except UserError as error:
            raise UserError(f"{conversation.place}: {error}") from None
        ends = [i + 1 for i, token in enumerate(tokens) if scored[i] and token == chat.end]
        fit = [end for end in ends if end <= context + 1]
        cut += 0 < len(fit) < len(ends)
        dropped += not fit
        if fit:
            examples.append(EncodedConversation(tokens[: fit[-1]], scored[: fit[-1]]))
    return EncodedConversations(examples, cut, dropped)


def packed_rows(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which sequences share a row of `size` tokens: the longest first, each into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(size)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def conversation_batch(examples: Sequence[EncodedConversation], context: int | None) -> tuple[Tensor, ...]:
    """Tokens and targets of conversations, (B, T) int64, as `GPT.forward` takes them.

    With `context` several share a row of at most so many tokens, and documents (B, T) tell them apart: the loss is
    the same. Without, each has a row of its own, padded at its end.
    """
    lengths = [len(example.tokens) - 1 for example in examples]  # the last token isn't read
    rows = [[i] for i in range(len(examples))] if context is None else packed_rows(lengths, context)
    width = max(sum(lengths[i] for i in row) for row in rows)
    tokens, documents = torch.zeros(2, len(rows), width, dtype=torch.int64)
    targets = torch.full((len(rows), width), IGNORED)
    for r, row in enumerate(rows):
        start = 0
        for number, i in enumerate(row):
            end, (own, scored) = start + lengths[i], examples[i]
            tokens[r, start:end] = torch.tensor(own[:-1])
            targets[r, start:end] = torch.where(torch.tensor(scored[1:]), torch.tensor(own[1:]), IGNORED)
            documents[r, start:end] = number
            start = end
        documents[r, start:] = len(row)
    return (tokens, targets) if context is None else (tokens, targets, documents)
