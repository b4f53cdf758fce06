"""Shows what a stage learns from: rows as tokens, with those that are scored marked."""

import itertools
import os
import sys
from collections.abc import Sequence

from gpt_arc.chat.batches import encode_conversations
from gpt_arc.chat.files import Conversation
from gpt_arc.chat.format import IMAGE, ChatFormat
from gpt_arc.distributed import say

GREEN, PLAIN = "\033[32m", "\033[0m"


def preview_conversations(conversations: Sequence[Conversation], chat: ChatFormat, context: int) -> int:
    """Prints conversations as they are trained on. Returns the exit code."""
    for conversation in conversations:
        encoded = encode_conversations([conversation], chat, context)
        notes = ["cut to fit the context"] * encoded.cut + ["dropped: too long"] * encoded.dropped
        say("; ".join([conversation.place, *notes]))
        for example in encoded.examples:
            say(marked(example.tokens, example.scored, chat))
    return 0


def marked(tokens: Sequence[int], scored: Sequence[bool], chat: ChatFormat) -> str:
    """Returns the texts of tokens with a dot between them. Scored ones are green on a terminal, otherwise in brackets.

    Characters that don't print are escaped.
    """
    marks = {id: mark for mark, id in chat.ids.items()}
    texts = [IMAGE if token < 0 else marks.get(token) or repr(chat.tokenizer.decode([token]))[1:-1] for token in tokens]
    opening, closing = (GREEN, PLAIN) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("[", "]")
    runs = itertools.groupby(zip(texts, scored), key=lambda pair: pair[1])
    parts = [("·".join(text for text, _ in run), is_scored) for is_scored, run in runs]
    return "·".join(f"{opening}{part}{closing}" if is_scored else part for part, is_scored in parts)
