"""Reads files of conversations, prompts and rankings: .jsonl, .json, .csv, .tsv and .parquet; not all have lists.

`gpt_arc/data/hub_sets.py` has the names of data sets on the hub, which may stand in place of files.

The context of a response is given in one of four forms, and a conversation has the response too:

    prompt, response           {"prompt": TEXT, "response": TEXT}, optionally with "system"
    Alpaca                     {"instruction": TEXT, "input": TEXT, "output": TEXT}, optionally with "system"; an input
                               that isn't empty follows the instruction after an empty line
    messages                   {"messages": [{"role": "system" | "user" | "assistant", "content": TEXT}, ...]}
    ShareGPT                   {"conversations": [{"from": "system" | "human" | "gpt", "value": TEXT}, ...]}

An assistant's message may have "weight": 0, which keeps it from being learned; a message with any other key is refused.

A column `tools` beside messages describes tools, as a list or its JSON. An assistant's message may have `tool_calls`,
and one of the role "tool" holds a result; its `tool_call_id` and `name` aren't shown. OpenAI's former `function_call`
and role "function", and ShareGPT's roles "function_call" and "observation", mean the same. `chat.tools` has the texts
that all of this becomes.

A ranking is one of these forms, ending with the user's turn, and either `chosen` and `rejected`, or `responses`, best
first or with a list of `ranks`, where 1 is best and equal ranks are ties. `chosen` and `rejected` are texts, messages,
or lists of messages. Such lists may be whole conversations that differ in the last turn; then no other form is needed.

A row that has two forms is refused, and so are prompt, response, system and functions beside a list of messages.
A conversation or ranking with a weight (unless it is 1), a history or functions in columns is refused. Other columns
don't matter, except to the reward functions of PPO, which get the whole row. `columns`, "prompt=question"
and the like, name columns that are called otherwise, and choose the form of a row that has two.
"""

from collections.abc import Callable, Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gpt_arc.chat.format import ROLES, Turn
from gpt_arc.chat.tools import calls_text, describe, result_text
from gpt_arc.data.rows import missing_column, parsed_rows, shown, text_of
from gpt_arc.errors import UserError
from gpt_arc.tables import counted

T = TypeVar("T")
FORMS = {  # column of each form that contains the user's turn -> the others
    "messages": (),
    "conversations": (),
    "prompt": ("response",),
    "instruction": ("input", "output"),
}
OPTIONAL = ("system", "input", "tools")
NAMES = (*FORMS, "response", "output", *OPTIONAL, "chosen", "rejected", "responses", "ranks")
CONTRADICTIONS = ("prompt", "response", "system", "functions")  # not allowed beside a list of messages
ABSENT = (None, "", [], "[]")  # values of a column that holds nothing
UNLEARNED = ("weight", "history", "functions")  # columns that say what to learn, in a way that isn't read
ROLE_OF = {"human": "user", "gpt": "assistant", "function_call": "assistant"}  # ShareGPT's names
RESULTS = ("tool", "function", "observation", "ipython")  # roles of a tool's result, in several formats
TURN_ROLES = (*ROLES, "tool")
CALLS = ("tool_calls", "function_call")  # keys of an assistant's message


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


def read_conversations(path: Path, columns: Sequence[str] = ()) -> list[Conversation]:
    """Reads training conversations, each with a response. Raises UserError naming the first bad row."""

    def parse(row: dict[str, Any], place: str, original: dict[str, Any]) -> Conversation:
        turns = _context(row)
        _refuse_unlearned(row)
        if _form(row) in ("prompt", "instruction"):
            response = text_of(row, "output" if _form(row) == "instruction" else "response")
            turns = (*turns, Turn("assistant", response))
        if all(turn.role != "assistant" or turn.weight == 0 for turn in turns):
            raise ValueError("messages has no assistant turn to learn from")
        return Conversation(turns, place, original)

    return _parsed(path, columns, parse)


def read_prompts(path: Path, columns: Sequence[str] = ()) -> list[Conversation]:
    """Reads prompts: conversations without their last response. Raises UserError naming the first bad row."""

    def parse(row: dict[str, Any], place: str, original: dict[str, Any]) -> Conversation:
        turns = _context(row)
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        if not turns or turns[-1].role != "user":
            raise ValueError("messages must end with a user turn or a response to one")
        return Conversation(turns, place, original)

    return _parsed(path, columns, parse)


def read_rankings(path: Path, columns: Sequence[str] = ()) -> list[Ranking]:
    """Reads rankings of two or more responses. Raises UserError naming the first bad row."""

    def parse(row: dict[str, Any], place: str, original: dict[str, Any]) -> Ranking:
        if row.get("responses") is None:
            if row.get("ranks") is not None:
                raise ValueError("the column ranks ranks responses, and can't stand beside chosen")
            turns, responses = _pair(row)
            ranks = [1, 2]
        elif pair := [column for column in ("chosen", "rejected") if row.get(column) is not None]:
            raise ValueError(f"the column {pair[0]} can't stand beside responses")
        else:
            turns, responses, ranks = _context(row), *_responses(row)
        _refuse_unlearned(row)
        if turns[-1].role != "user":
            raise ValueError("messages must end with a user turn")
        return Ranking(turns, tuple(responses), tuple(ranks), place)

    return _parsed(path, columns, parse)


def _parsed(path: Path, columns: Sequence[str], parse: Callable[[dict[str, Any], str, dict[str, Any]], T]) -> list[T]:
    """Calls `parse` with each row under our names, its place, and the row as it is."""
    names, present = _column_names(columns), set()

    def renamed(row: dict[str, Any], place: str) -> T:
        present.update(row)
        return parse(_renamed(row, names), place, row)

    parsed = parsed_rows(path, renamed)
    for name, column in names.items():
        if column not in present:
            raise UserError(f"{path}: columns = {name}={column}, and no row has {column}")
    return parsed


def _column_names(columns: Sequence[str]) -> dict[str, str]:
    """Returns the file's column by our name. Raises UserError."""
    pairs = [column.partition("=") for column in columns]
    for name, _, column in pairs:
        if name not in NAMES or not column:
            written = f"{name}={column}" if column else name
            raise UserError(f"columns = {written} is not NAME=COLUMN; the names are {', '.join(NAMES)}")
    return {name: column for name, _, column in pairs}


def _renamed(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Returns a row under our names. Forms that `names` doesn't choose are dropped if it chooses one."""
    missing = next((c for name, c in names.items() if c not in row and name not in OPTIONAL), None)
    if missing:
        raise ValueError(missing_column(row, missing))
    chosen = names.keys() & FORMS.keys()
    dropped = {each for form in FORMS.keys() - chosen for each in (form, *FORMS[form])} if chosen else set()
    dropped |= set(names.values())
    kept = {name: value for name, value in row.items() if name not in dropped}
    return kept | {name: row[column] for name, column in names.items() if column in row}


def _form(row: dict[str, Any]) -> str:
    """Returns the column that a row's form is named after. Raises ValueError if it has two forms."""
    present = [form for form in FORMS if row.get(form) not in (None, "")]  # a .csv has no null
    if len(present) < 2:
        return (present or [form for form in FORMS if form in row] or ["prompt"])[0]
    if present[0] in ("messages", "conversations") and present[1] in CONTRADICTIONS:
        raise ValueError(f"the column {present[1]} can't stand beside {present[0]}")
    raise ValueError(
        f"the columns {present[0]} and {present[1]} both hold a prompt: choose one, for instance with "
        f"--columns {present[0]}={present[0]}"
    )


def _context(row: dict[str, Any]) -> tuple[Turn, ...]:
    """Returns the turns of a row's form, without those in columns for responses."""
    form = _form(row)
    if form in ("messages", "conversations"):
        return _messages(row, form)
    if row.get("tools") not in ABSENT:
        raise ValueError(f"the column tools = {shown(row['tools'])} is only read beside messages: remove it or the row")
    system = (Turn("system", text_of(row, "system")),) if row.get("system") else ()
    request = text_of(row, form)
    if form == "instruction" and row.get("input"):
        request += "\n\n" + text_of(row, "input")
    return *system, Turn("user", request)


def _refuse_unlearned(row: dict[str, Any]) -> None:
    """Raises ValueError for a column that would be ignored, though it says what to learn."""
    for name in UNLEARNED:
        value = row.get(name)
        if value not in (*ABSENT, "1") and not (name == "weight" and value == 1):
            raise ValueError(f"the column {name} = {shown(value)} can't be learned: remove it or the row")


def _messages(row: dict[str, Any], column: str) -> tuple[Turn, ...]:
    contradiction = next((name for name in CONTRADICTIONS if row.get(name)), None)
    if contradiction:
        mend = ": name it by --columns tools=functions" if contradiction == "functions" else ""
        raise ValueError(f"the column {contradiction} can't stand beside {column}{mend}")
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column} is not a list of turns")
    return _with_tools(row, _turns(messages))


def _turns(messages: list) -> tuple[Turn, ...]:
    """Returns the turns of messages; results of tools that follow each other are one turn of the user."""
    turns: list[Turn] = []
    for is_result, same in groupby(map(_turn, messages), key=lambda turn: turn.role == "tool"):
        group = list(same)
        turns += [Turn("user", "\n".join(turn.content for turn in group))] if is_result else group
    return tuple(turns)


def _with_tools(row: dict[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Returns the turns with the row's tools in the system turn."""
    tools = describe(row["tools"]) if row.get("tools") else ""
    if not tools:
        return turns
    first = turns[0]
    if first.role == "system":
        return first._replace(content=f"{first.content}\n\n{tools}"), *turns[1:]
    return Turn("system", tools), *turns


def _pair(row: dict[str, Any]) -> tuple[tuple[Turn, ...], tuple[str, str]]:
    """Returns the context and the texts of `chosen` and `rejected`."""
    chosen, rejected = (_answer(row, column) for column in ("chosen", "rejected"))
    before = chosen[:-1]
    if before != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last turns")
    if before and row.get("prompt") is not None and text_of(row, "prompt") != before[-1].content:
        raise ValueError("prompt is not the last user turn of chosen")
    context = _with_tools(row, before) if before else _context(row)
    return context, (chosen[-1].content, rejected[-1].content)


def _answer(row: dict[str, Any], column: str) -> tuple[Turn, ...]:
    """Returns the turns in a column: a text or turn of the assistant, or a list of turns that ends with one."""
    value = row.get(column)
    if not isinstance(value, list | dict):
        return (Turn("assistant", text_of(row, column)),)
    turns = _turns(value if isinstance(value, list) else [value])
    if not turns or turns[-1].role != "assistant":
        raise ValueError(f"{column} must be a text, or end with an assistant turn")
    if turns[-1].weight == 0:
        raise ValueError(f"{column} has weight = 0, and every response of a ranking is learned")
    return turns


def _responses(row: dict[str, Any]) -> tuple[list[str], Sequence[float]]:
    responses = _list(row, "responses", str, "texts")
    ranks = _list(row, "ranks", (int, float), "numbers") if "ranks" in row else range(1, len(responses) + 1)
    if len(responses) < 2 or len(ranks) != len(responses):
        raise ValueError(
            f"{counted(len(responses), 'response')} with {counted(len(ranks), 'rank')}: a ranking needs two or more "
            "responses, and a rank for each"
        )
    return responses, ranks


def _turn(message: Any) -> Turn:
    present = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if "from" in present and "role" not in present and "content" not in present:  # as in ShareGPT
        role = present.pop("from")
        present["role"] = ROLE_OF.get(role, role) if isinstance(role, str) else role
        present["function_call" if role == "function_call" else "content"] = present.pop("value", None)
    if present.get("role") in RESULTS:
        present = {key: value for key, value in present.items() if key not in ("tool_call_id", "name")}
        present["role"] = "tool"
    elif present.get("role") == "assistant" and isinstance(content := present.get("content", ""), str):
        calls = [calls_text(each) for key in CALLS if (each := present.pop(key, None))]
        present |= {"content": "\n".join(filter(None, (content, *calls)))} if calls else {}
    if not isinstance(present.get("content"), str) or present.get("role") not in TURN_ROLES:
        raise ValueError(f'the turn {shown(message)} is not {{"role": {" | ".join(TURN_ROLES)}, "content": TEXT}}')
    unknown = present.keys() - {"role", "content", "weight"}
    if unknown:
        raise ValueError(f"the turn {shown(message)} has {min(unknown)}, which can't be learned: remove it or the row")
    weight = present.get("weight", 1)
    if weight not in ((0, 1) if present["role"] == "assistant" else (1,)):
        raise ValueError(
            f"the turn {shown(message)} has weight = {shown(weight)}: it may be 1, or 0 for an assistant's"
        )
    content = result_text(present["content"]) if present["role"] == "tool" else present["content"]
    return Turn(present["role"], content, int(weight))


def _list(row: dict[str, Any], column: str, kind: type | tuple, noun: str) -> list:
    value = row[column]
    if not isinstance(value, list) or any(not isinstance(x, kind) or isinstance(x, bool) or x != x for x in value):
        raise ValueError(f"{column} = {shown(value)} is not a list of {noun}")
    return value
