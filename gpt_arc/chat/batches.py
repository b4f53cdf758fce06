"""Encodes conversations and packs them into batches."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from gpt_arc.chat.files import Conversation
from gpt_arc.chat.format import ChatFormat
from gpt_arc.data.batches import pad_rows
from gpt_arc.errors import UserError
from gpt_arc.nn.head_loss import IGNORED


class EncodedConversation(NamedTuple):
    """A conversation in tokens."""

    tokens: list[int]
    scored: list[bool]  # whether the loss counts each token

    @property
    def count(self) -> int:
        """Number of tokens that the loss counts."""
        return sum(self.scored)


E = TypeVar("E")


class EncodedConversations(NamedTuple, Generic[E]):
    """The conversations of a file that fit into the context."""

    examples: list[E]
    cut: int  # conversations that lost responses at their end
    dropped: int  # conversations whose first response doesn't fit


def encode_conversations(
    conversations: Sequence[Conversation], chat: ChatFormat, context: int
) -> EncodedConversations[EncodedConversation]:
    """Encodes conversations; one of more than `context` + 1 tokens is cut after the last response that fits.

    Raises UserError naming the row whose text can't be encoded.
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
    """Assigns sequences to rows of `size` tokens: longest first, each to the first row with room."""
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


def conversation_batch(
    examples: Sequence[EncodedConversation], context: int | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Returns what `GPT.forward` takes: tokens, targets and documents of conversations, (B, T) int64, and lengths (B,).

    With `context`, conversations share rows of at most `context` tokens, and documents separates them; the loss is the
    same. Without, each conversation gets its own padded row, and documents is None.
    """
    lengths = [len(example.tokens) - 1 for example in examples]  # the last token isn't read
    rows = [[i] for i in range(len(examples))] if context is None else packed_rows(lengths, context)
    inputs = [example.tokens[:-1] for example in examples]
    outputs = [[t if scored else IGNORED for t, scored in list(zip(*example))[1:]] for example in examples]
    tokens = pad_rows([token for i in row for token in inputs[i]] for row in rows)
    targets = pad_rows(([target for i in row for target in outputs[i]] for row in rows), value=IGNORED)
    filled = torch.tensor([sum(lengths[i] for i in row) for row in rows])
    if context is None:
        return tokens, targets, None, filled
    documents = pad_rows(([n for n, i in enumerate(row) for _ in range(lengths[i])] for row in rows), value=-1)
    padding = torch.tensor([len(row) for row in rows])[:, None]  # a document of its own
    return tokens, targets, torch.where(documents < 0, padding, documents), filled
