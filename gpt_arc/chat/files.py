"""Files of conversations, prompts and rankings."""

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
    row: dict[str, Any]  # as it was read


class Ranking(NamedTuple):
    """Several responses to one prompt."""

    turns: tuple[Turn, ...]  # the last one the user's
    responses: tuple[str, ...]
    ranks: tuple[float, ...]  # the lower the better; equal for a tie
    place: str

    def pairs(self) -> list[tuple[int, int]]:
        """Numbers of the better and the worse response of every pair that isn't tied."""
        ranks = self.ranks
        return [
            (i, j) if ranks[i] < ranks[j] else (j, i)
            for i, j in combinations(range(len(ranks)), 2)
            if ranks[i] != ranks[j]
        ]


def read_conversations(path: Path) -> list[Conversation]:
    """Conversations to learn from, each with a response. Raises UserError naming the first bad row."""

    def parse(row: dict[str, Any], place: str) -> Conversation:
        if "messages" in row:
            turns = _messages(row["messages"])
        else:
            turns = (*_prompt(row), Turn("assistant", text_of(row, "response")))
        if all(turn.role != "assistant" for turn in turns):
            raise ValueError("messages has no turn of the assistant to learn from")
        return Conversation(turns, place, row)

    return parsed_rows(path, parse)


def read_prompts(path: Path) -> list[Conversation]:
    """What is to be answered: of a conversation all before its last response. Raises UserError."""

    def parse(row: dict[str, Any], place: str) -> Conversation:
        turns = _messages(row["messages"]) if "messages" in row else _prompt(row)
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        if not turns or turns[-1].role != "user":
            raise ValueError("messages must end with a turn of the user's, or a response to one")
        return Conversation(turns, place, row)

    return parsed_rows(path, parse)


def read_rankings(path: Path) -> list[Ranking]:
    """Rankings of two responses or more. Raises UserError naming the first bad row."""

    def parse(row: dict[str, Any], place: str) -> Ranking:
        turns = _messages(row["messages"]) if "messages" in row else _prompt(row)
        if turns[-1].role != "user":
            raise ValueError("messages must end with a turn of the user's")
        if "responses" not in row:
            return Ranking(turns, (text_of(row, "chosen"), text_of(row, "rejected")), (1, 2), place)
        responses = _list(row, "responses", str, "texts")
        ranks = _list(row, "ranks", (int, float), "numbers") if "ranks" in row else list(range(1, len(responses) + 1))
        if any(map(math.isnan, ranks)):
            raise ValueError("ranks has a number that is none, NaN")
        if len(responses) < 2 or len(ranks) != len(responses):
            raise ValueError(f"{len(responses)} responses with {len(ranks)} ranks are no ranking of two or more")
        return Ranking(turns, tuple(responses), tuple(ranks), place)

    return parsed_rows(path, parse)


def _prompt(row: dict[str, Any]) -> tuple[Turn, ...]:
    system = (Turn("system", text_of(row, "system")),) if row.get("system") else ()
    return *system, Turn("user", text_of(row, "prompt"))


def _messages(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages is not a list of turns")
    for turn in value:
        whole = isinstance(turn, dict) and isinstance(turn.get("content"), str)
        if not whole or turn.get("role") not in ROLES:
            shown = json.dumps(turn)[:60]
            raise ValueError(f'the turn {shown} is not {{"role": {" | ".join(ROLES)}, "content": TEXT}}')
    return tuple(Turn(turn["role"], turn["content"]) for turn in value)


def _list(row: dict[str, Any], column: str, kind: type | tuple, what: str) -> list:
    value = row[column]
    if not isinstance(value, list) or not all(isinstance(x, kind) and not isinstance(x, bool) for x in value):
        raise ValueError(f"{column} = {json.dumps(value)[:60]} is not a list of {what}")
    return value
