"""Reads files of conversations, prompts and rankings.

Files are .jsonl, .csv or .tsv; lists are for .jsonl. A row of a conversation has `prompt`, optionally `system`, and
`response`; or `messages`, a list of {"role": "system" | "user" | "assistant", "content": TEXT}. An assistant's message
may have "weight": 0, which keeps it from being learned; a message with any other key is refused. A row of a ranking has
a prompt, or messages that end with the user's turn, and either `chosen` and `rejected`, or `responses`, best first or
with a list of `ranks`, where 1 is best and equal ranks are ties.

Other columns don't matter, except to the reward functions of PPO, which get the whole row; but beside `messages` a
column that would change the conversation (prompt, response, system, tools, functions) is refused.
"""

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from gpt_arc.chat.format import ROLES, Turn
from gpt_arc.data.rows import parsed_rows, shown, text_of

CONTRADICTIONS = ("prompt", "response", "system", "tools", "functions")  # no columns beside messages


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
            turns = _messages(row)
        else:
            turns = (*_prompt(row), Turn("assistant", text_of(row, "response")))
        if all(turn.role != "assistant" or turn.weight == 0 for turn in turns):
            raise ValueError("messages has no assistant turn to learn from")
        return Conversation(turns, place, row)

    return parsed_rows(path, parse)


def read_prompts(path: Path) -> list[Conversation]:
    """Reads prompts: conversations without their last response. Raises UserError naming the first bad row."""

    def parse(row: dict[str, Any], place: str) -> Conversation:
        turns = _messages(row) if "messages" in row else _prompt(row)
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        if not turns or turns[-1].role != "user":
            raise ValueError("messages must end with a user turn or a response to one")
        return Conversation(turns, place, row)

    return parsed_rows(path, parse)


def read_rankings(path: Path) -> list[Ranking]:
    """Reads rankings of two or more responses. Raises UserError naming the first bad row."""

    def parse(row: dict[str, Any], place: str) -> Ranking:
        turns = _messages(row) if "messages" in row else _prompt(row)
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


def _messages(row: dict[str, Any]) -> tuple[Turn, ...]:
    contradiction = next((name for name in CONTRADICTIONS if row.get(name)), None)
    if contradiction:
        raise ValueError(f"the column {contradiction} can't stand beside messages")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is not a list of turns")
    return tuple(map(_turn, messages))


def _turn(message: Any) -> Turn:
    valid = isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") in ROLES
    if not valid:
        raise ValueError(f'the turn {shown(message)} is not {{"role": {" | ".join(ROLES)}, "content": TEXT}}')
    message = {key: value for key, value in message.items() if value is not None}
    unknown = message.keys() - {"role", "content", "weight"}
    if unknown:
        raise ValueError(f"the turn {shown(message)} has {min(unknown)}, which can't be learned: remove it or the row")
    weight = message.get("weight", 1)
    if weight not in ((0, 1) if message["role"] == "assistant" else (1,)):
        raise ValueError(
            f"the turn {shown(message)} has weight = {shown(weight)}: it may be 1, or 0 for an assistant's"
        )
    return Turn(message["role"], message["content"], int(weight))


def _list(row: dict[str, Any], column: str, kind: type | tuple, noun: str) -> list:
    value = row[column]
    if not isinstance(value, list) or not all(isinstance(x, kind) and not isinstance(x, bool) for x in value):
        raise ValueError(f"{column} = {json.dumps(value)[:60]} is not a list of {noun}")
    return value
