"""Reads files of conversations, prompts and rankings.

Files are .jsonl, .csv or .tsv; lists are for .jsonl. A row of a conversation has `prompt`, optionally `system`, and
`response`; or `messages`, a list of {"role": "system" | "user" | "assistant", "content": TEXT}. A row of a ranking has
a prompt, or messages that end with the user's turn, and either `chosen` and `rejected`, or `responses`, best first or
with a list of `ranks`, where 1 is best and equal ranks are ties.
"""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from gpt_arc.chat.format import ROLES, Turn
from gpt_arc.data.rows import parsed_rows, text_of


class Conversation(NamedTuple):
    turns: tuple[Turn, ...]
    place: str  # file and line, for messages
    row: dict[str, Any]  # as read


class Ranking(NamedTuple):
    """Several responses to one prompt."""

    turns: tuple[Turn, ...]  # the last is the user's
    responses: tuple[str, ...]
    ranks: tuple[float, ...]  # lower is better; equal for a tie
    place: str

    def pairs(self) -> list[tuple[int, int]]:
        """Returns the indices (better, worse) of each pair of responses that isn't tied."""
        ranks = self.ranks
        return [
            (i, j) if ranks[i] < ranks[j] else (j, i)
            for i, j in combinations(range(len(ranks)), 2)
            if ranks[i] != ranks[j]
        ]


def read_conversations(path: Path) -> list[Conversation]:
    """Reads training conversations, each with a response. Raises UserError naming the first bad row."""

    def parse(row: dict[str, Any], place: str) -> Conversation:
        if "messages" in row:
            turns = _messages(row["messages"])
        else:
            turns = (*_prompt(row), Turn("assistant", text_of(row, "response")))
        if all(turn.role != "assistant" for turn in turns):
            raise ValueError("messages has no assistant turn to learn from")
        return Conversation(turns, place, row)

    return parsed_rows(path, parse)


def read_prompts(path: Path) -> list[Conversation]:
    """Reads prompts: conversations without their last response. Raises UserError naming the first bad row."""

    def parse(row: dict[str, Any], place: str) -> Conversation:
        turns = _messages(row["messages"]) if "messages" in row else _prompt(row)
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        if not turns or turns[-1].role != "user":
            raise ValueError("messages must end with a user turn or a response to one")
        return Conversation(turns, place, row)

    return parsed_rows(path, parse)


def read_rankings(path: Path) -> list[Ranking]:
    """Reads rankings of two or more responses. Raises UserError naming the first bad row."""

    def parse(row: dict[str, Any], place: str) -> Ranking:
        turns = _messages(row["messages"]) if "messages" in row else _prompt(row)
        if turns[-1].role != "user":
            raise ValueError("messages must end with a user turn")
        if "responses" not in row:
            return Ranking(turns, (text_of(row, "chosen"), text_of(row, "rejected")), (1, 2), place)
        responses = _list(row, "responses", str, "texts")
        ranks = _list(row, "ranks", (int, float), "numbers") if "ranks" in row else list(range(1, len(responses) + 1))
        if any(map(math.isnan, ranks)):
            raise ValueError("ranks contains NaN")
        if len(responses) < 2 or len(ranks) != len(responses):
            raise ValueError(
                f"{len(responses)} responses with {len(ranks)} ranks: a ranking needs two or more "
                "responses, and a rank for each"
            )
        return Ranking(turns, tuple(responses), tuple(ranks), place)

    return parsed_rows(path, parse)


def _prompt(row: dict[str, Any]) -> tuple[Turn, ...]:
    system = (Turn("system", text_of(row, "system")),) if row.get("system") else ()
    return *system, Turn("user", text_of(row, "prompt"))


def _messages(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages is not a list of turns")
    for turn in value:
        valid = isinstance(turn, dict) and isinstance(turn.get("content"), str)
        if not valid or turn.get("role") not in ROLES:
            shown = json.dumps(turn)[:60]
            raise ValueError(f'the turn {shown} is not {{"role": {" | ".join(ROLES)}, "content": TEXT}}')
    return tuple(Turn(turn["role"], turn["content"]) for turn in value)


def _list(row: dict[str, Any], column: str, kind: type | tuple, noun: str) -> list:
    value = row[column]
    if not isinstance(value, list) or not all(isinstance(x, kind) and not isinstance(x, bool) for x in value):
        raise ValueError(f"{column} = {json.dumps(value)[:60]} is not a list of {noun}")
    return value
