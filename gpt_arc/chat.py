"""Conversations as tokens: how a template marks their turns, and what files of conversations and preferences hold.

    chat = ChatFormat.new(TEMPLATES["markers"], tokenizer, model.config.vocab_size)
    tokens, scored = chat.encode([Turn("user", "Name a colour."), Turn("assistant", "Red.")])
    prompt = chat.prompt([Turn("user", "Name a colour.")])      # up to where an answer begins; it ends with chat.end
    chat.save(directory)                                        # chat.json, beside a model that reads such tokens
    chat = load_chat(directory, tokenizer)

Files are .jsonl, .csv or .tsv; lists are for .jsonl. A conversation is a row with `prompt`, perhaps `system`, and
`response`, or with `messages`, a list of {"role": "system" | "user" | "assistant", "content": TEXT}. Preferences have a
prompt, or messages that end with the user's, and `chosen` and `rejected`, or `responses`, a list from the best to the
worst, or with a list of `ranks`, 1 for the best and equal ones for ties.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.labelled import parsed_rows, text_of
from gpt_arc.tokenizer import END_OF_TEXT, Tokenizer
from model import IGNORED

FILE_NAME, FORMAT_VERSION = "chat.json", 1
ROLES = ("system", "user", "assistant")
CONTENT = "{content}"
MARK = re.compile(r"(<\|\w+\|>)")


class Turn(NamedTuple):
    role: str  # one of ROLES
    content: str


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


@dataclass(frozen=True)
class Template:
    """How the turn of each role is written: text around {content}, in which <|name|> is one token."""

    system: str
    user: str
    assistant: str

    def __post_init__(self):
        for name, text in asdict(self).items():
            if not isinstance(text, str) or text.count(CONTENT) != 1:
                raise UserError(f"the template's {name} = {text!r} must be a text with {CONTENT} in it, once")
        if not MARK.match(self.assistant.split(CONTENT)[1]):
            raise UserError(f"the template's assistant = {self.assistant!r} must have a <|token|> after {CONTENT}")

    @property
    def marks(self) -> list[str]:
        """Its tokens, in the order in which they come first."""
        return list(dict.fromkeys(MARK.findall(f"{self.system} {self.user} {self.assistant}")))

    @property
    def jinja(self) -> str:
        """The template as transformers' tokenizers apply it."""
        texts = {role: getattr(self, role).replace(CONTENT, "{{ message.content }}") for role in ROLES}
        cases = "{% elif ".join(f"message.role == '{role}' %}}{text}" for role, text in texts.items())
        begun = self.assistant.split(CONTENT)[0]
        turns = "{% for message in messages %}{% if " + cases + "{% endif %}{% endfor %}"
        return turns + ("{% if add_generation_prompt %}" + begun + "{% endif %}" if begun else "")


def _chatml(role: str) -> str:
    return f"<|im_start|>{role}\n{CONTENT}<|im_end|>\n"


TEMPLATES = {
    "markers": Template("<|system|>{content}", "<|user|>{content}", "<|assistant|>{content}<|end|>"),
    "chatml": Template(*map(_chatml, ROLES)),  # as Qwen's models have it
    "plain": Template(f"{CONTENT}\n\n", f"{CONTENT}\n", CONTENT + END_OF_TEXT),  # as InstructGPT's prompts were
}


class ChatFormat:
    """A template in the tokens of a tokenizer, and of further ones for marks that it hasn't."""

    def __init__(self, template: Template, tokenizer: Tokenizer, added: dict[str, int]):
        self.template, self.tokenizer, self.added = template, tokenizer, added
        self.ids = {mark: added.get(mark, tokenizer.special_token(mark)) for mark in template.marks}
        missing = [mark for mark, id in self.ids.items() if id is None]
        if missing:
            raise UserError(f"the template's {missing[0]} is no token of the tokenizer")
        halves = {role: getattr(template, role).split(CONTENT) for role in ROLES}
        self.parts = {role: [self._encode(half) for half in both] for role, both in halves.items()}
        self.end = self.parts["assistant"][1][0]  # the token that ends a response

    @classmethod
    def new(cls, template: Template, tokenizer: Tokenizer, vocab_size: int) -> "ChatFormat":
        """For a model of `vocab_size` tokens, which then needs `len(added)` more, the ids after its own."""
        unknown = [mark for mark in template.marks if tokenizer.special_token(mark) is None]
        return cls(template, tokenizer, {mark: vocab_size + i for i, mark in enumerate(unknown)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatFormat) and (self.template, self.ids) == (other.template, other.ids)

    def _encode(self, text: str) -> list[int]:
        """A piece of the template, whose marks are single tokens."""
        try:
            pieces = [[self.ids[p]] if p in self.ids else self.tokenizer.encode(p) for p in MARK.split(text) if p]
        except UserError as error:
            raise UserError(f"the template's text {text!r}: {error}") from None
        return [token for piece in pieces for token in piece]

    def turn(self, turn: Turn) -> tuple[list[int], list[bool]]:
        """Tokens of a turn, and which of them a model learns to write: a response with the token that ends it."""
        before, after = self.parts[turn.role]
        content = self.tokenizer.encode(turn.content)
        learned = len(content) + 1 if turn.role == "assistant" else 0
        tokens = [*before, *content, *after]
        return tokens, [len(before) <= i < len(before) + learned for i in range(len(tokens))]

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which of them are scored, never the first: nothing would predict it.

        Raises UserError for text that has no tokens.
        """
        tokens, scored = [], []
        for turn in turns:
            own, learned = self.turn(turn)
            if not tokens and learned[:1] == [True]:
                tokens, scored = [self.tokenizer.start_token], [False]
            tokens += own
            scored += learned
        return tokens, scored

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of the turns and of what comes before a response."""
        return [*self.encode(turns)[0], *self.parts["assistant"][0]] or [self.tokenizer.start_token]

    def response(self, content: str) -> list[int]:
        """Tokens of a response and the one that ends it."""
        return [*self.tokenizer.encode(content), self.end]

    def decode(self, response: Sequence[int]) -> str:
        """The text of a response, up to its end."""
        ended = response.index(self.end) if self.end in response else len(response)
        return self.tokenizer.decode(response[:ended])

    def latest(self, turns: Sequence[Turn], room: int) -> list[Turn]:
        """The turns, less the oldest ones after the system's, so that their prompt takes `room` tokens at most.

        Raises UserError where the last turn alone takes more.
        """
        first = 1 if turns and turns[0].role == "system" else 0
        kept = list(turns)
        while (size := len(self.prompt(kept))) > room:
            if len(kept) <= first + 1:
                alone = "the system's turn and the last" if first else "the last turn"
                raise UserError(f"the {size} tokens of {alone} are more than the {room} that the context leaves")
            following = (i for i in range(first + 1, len(kept) - 1) if kept[i].role == "user")
            kept[first : next(following, len(kept) - 1)] = []
        return kept

    def save(self, directory: Path | str) -> None:
        """Write chat.json."""
        content = {"format_version": FORMAT_VERSION, "template": asdict(self.template), "added_tokens": self.added}
        write_file(Path(directory) / FILE_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load_chat(directory: Path | str, tokenizer: Tokenizer) -> ChatFormat | None:
    """The format of a model directory's conversations; None where it has none. Raises UserError if it is damaged."""
    path = Path(directory) / FILE_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise UserError(f"it has the version {content['format_version']}; this program reads {FORMAT_VERSION}")
        added = content["added_tokens"]
        ids = sorted(added.values())
        if ids and (ids != list(range(ids[0], ids[0] + len(ids))) or ids[0] < tokenizer.vocab_size):
            raise UserError(f"added_tokens = {added} don't follow the tokenizer's {tokenizer.vocab_size}")
        return ChatFormat(Template(**content["template"]), tokenizer, added)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def load_template(name: str) -> Template:
    """A template by its name, or of a .toml file with a text for each role. Raises UserError."""
    import tomllib

    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise UserError(f"template = {name} is neither a .toml file nor one of {', '.join(TEMPLATES)}")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    if set(content) != set(ROLES):
        raise UserError(f"{path} has {', '.join(content) or 'nothing'}: a template has a text for {', '.join(ROLES)}")
    try:
        return Template(**content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ---- files


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


# ---- batches


class Encoded(NamedTuple):
    """A conversation in tokens."""

    tokens: list[int]
    scored: list[bool]  # which of them the loss counts

    @property
    def count(self) -> int:
        """Tokens that the loss counts."""
        return sum(self.scored)


class EncodedConversations(NamedTuple):
    examples: list[Encoded]
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
            examples.append(Encoded(tokens[: fit[-1]], scored[: fit[-1]]))
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


def conversation_batch(examples: Sequence[Encoded], context: int | None) -> tuple[Tensor, ...]:
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
