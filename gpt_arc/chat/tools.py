"""Tools in conversations, as texts of turns, in the form that the templates of Hermes, Qwen2.5 and Qwen3 share.

The system turn ends with the tools' descriptions, an assistant's turn with its calls. Results make up a user's turn.
"""

import json
from typing import Any

from gpt_arc.data.rows import shown

OPENING = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
CLOSING = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
CALL = ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")  # around name and arguments
RESULT = ("<tool_response>\n", "\n</tool_response>")


def describe(tools: Any) -> str:
    """Returns what the system turn says of tools: a list of objects, or its JSON; empty without tools.

    Raises ValueError.
    """
    items = _parsed(tools)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"tools = {shown(tools)} is not a list of objects, or JSON of one")
    return OPENING + "".join(f"\n{_json(item)}" for item in items) + CLOSING if items else ""


def calls_text(calls: Any) -> str:
    """Returns the text of calls: objects with name and arguments, or with a function that has them, or JSON of these.

    Arguments that are JSON already are kept as they are. Raises ValueError.
    """
    items = _parsed(calls)
    return "\n".join(map(_call_text, items if isinstance(items, list) else [items]))


def result_text(content: str) -> str:
    """Returns the text of a tool's result, which may have it already."""
    before, after = RESULT
    return content if content.startswith(before) and content.endswith(after) else content.join(RESULT)


def _call_text(call: Any) -> str:
    function = call.get("function") or call if isinstance(call, dict) else {}
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not isinstance(_parsed(arguments), dict):
        raise ValueError(f'the call {shown(call)} is not {{"name": NAME, "arguments": OBJECT}}, alone or as function')
    before, between, after = CALL
    return f"{before}{name}{between}{arguments if isinstance(arguments, str) else _json(arguments)}{after}"


def _parsed(value: Any) -> Any:
    """Returns what a text holds as JSON, or None; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # as transformers' templates write it
