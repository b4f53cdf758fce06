"""What a directory declares about its texts: where documents and continuations end, and how a text begins.

`load_tokenizer` asks this module, so every reader of a directory gets the same answer. The files and their precedence
are those of transformers:

- The tokens eos_token, bos_token and pad_token: special_tokens_map.json, then tokenizer_config.json, which is the only
  one if it has added_tokens_decoder. An eos_token ends a document.
- The ids eos_token_id (one or a list), bos_token_id and pad_token_id: generation_config.json, then config.json. Each
  eos_token_id ends a continuation. Without any, the eos_token does, where transformers would go on.
- The tokens before each text: the post-processor of tokenizer.json; without that file, the bos_token if
  tokenizer_config.json has add_bos_token.

chat.json, our own file, adds the token that ends a response.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gpt_arc.errors import UserError
from gpt_arc.reading import read_bytes, read_json

SETTINGS_FILE, SPECIAL_FILE = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE_FILE, GENERATION_FILE, CHAT_FILE = "chat_template.jinja", "generation_config.json", "chat.json"
KEPT = (SETTINGS_FILE, SPECIAL_FILE, TEMPLATE_FILE, GENERATION_FILE)  # copied unchanged with the tokenizer
ID_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id")
CONTENT = "{content}"  # in a template of chat.json
MARK = re.compile(r"(<\|\w+\|>)")


class TokenLookup(Protocol):
    """What a `Tokenizer` knows by itself."""

    vocab_size: int
    end_of_text: int | None

    def special_token(self, text: str) -> int | None: ...


@dataclass(frozen=True)
class Declared:
    """Token ids, and the files that declare them."""

    end_of_text: int | None = None  # ends a document
    ends: frozenset[int] = frozenset()  # each ends a continuation
    start: int | None = None  # first token where there is no text
    prefix: tuple[int, ...] = ()  # before each text that a model reads
    pad: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)


def read_declared(folder: Path, tokenizer: TokenLookup, prefix: tuple[int, ...] | None) -> Declared:
    """Returns what the files in `folder` declare. Raises UserError naming a damaged file.

    The tokenizer's end_of_text is used if no eos_token is declared. `prefix` is that of tokenizer.json, or None without
    that file.
    """
    settings, special, config, generation, chat = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in (SETTINGS_FILE, SPECIAL_FILE, "config.json", GENERATION_FILE, CHAT_FILE)
    )
    tokens = settings if "added_tokens_decoder" in settings else settings | special

    def token(key: str, default: int | None = None) -> int | None:
        return tokenizer.special_token(_text(folder, key, tokens[key]) or "") if key in tokens else default

    def known(ids: list[int]) -> int | None:
        return next((id for id in ids if id < tokenizer.vocab_size), None)

    generating = {key: _ids(folder / GENERATION_FILE, key, generation) for key in ID_KEYS}
    ids = {key: generating[key] or _ids(folder / "config.json", key, config) for key in ID_KEYS}
    end, start, pad = token("eos_token", tokenizer.end_of_text), token("bos_token"), token("pad_token")
    end = known(ids["eos_token_id"]) if end is None else end
    if prefix is None:
        first = token("bos_token", tokenizer.end_of_text)
        prefix = (first,) if settings.get("add_bos_token") and first is not None else ()
    files = {name: read_bytes(folder / name) for name in KEPT if (folder / name).exists()}
    others = {key: value if len(value) > 1 else value[0] for key, value in ids.items() if value and not generating[key]}
    if others:  # from config.json, which isn't copied
        files[GENERATION_FILE] = (json.dumps(generation | others, indent=1) + "\n").encode()
    return Declared(
        end,
        frozenset(id for id in (*(ids["eos_token_id"] or [end]), _response_end(chat, tokenizer)) if id is not None),
        known(ids["bos_token_id"]) if start is None else start,
        prefix,
        known(ids["pad_token_id"]) if pad is None else pad,
        files,
    )


def end_mark(assistant: str) -> str:
    """Returns the <|token|> after the {content} of a template's text for the assistant; empty if there is none."""
    match = MARK.match(assistant.partition(CONTENT)[2])
    return match.group() if match else ""


def _response_end(chat: dict[str, Any], tokenizer: TokenLookup) -> int | None:
    """Returns the id that ends a response by a chat.json; None for a damaged one, which `load_chat` refuses."""
    try:
        mark = end_mark(chat["template"]["assistant"])
        token = chat["added_tokens"].get(mark, tokenizer.special_token(mark))
        return token if type(token) is int else None
    except (KeyError, TypeError, AttributeError):
        return None


def _text(folder: Path, key: str, value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise UserError(f"{folder}: {key} = {json.dumps(value)[:60]} in {SETTINGS_FILE} or {SPECIAL_FILE} is no token")
    return text


def _ids(path: Path, key: str, content: dict[str, Any]) -> list[int]:
    value = content.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(each) is not int for each in values):
        raise UserError(f"{path}: {key} = {json.dumps(value)[:60]} is neither a token's id nor a list of ids")
    return [each for each in values if each >= 0]  # the first Llamas have -1 for none
