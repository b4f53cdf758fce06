"""Encodes conversations as tokens, with templates that mark turns. `chat.files` describes the input files.

chat = ChatFormat.new(TEMPLATES["markers"], tokenizer, model.config.vocab_size)
tokens, scored = chat.encode([Turn("user", "Name a colour."), Turn("assistant", "Red.")])
prompt = chat.prompt([Turn("user", "Name a colour.")])      # up to the answer, which ends with chat.end
chat.save(directory)                                        # chat.json, beside a model trained on this format
chat = load_chat(directory, tokenizer)
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from typing_extensions import TypedDict

from gpt_arc.data.tokenizer import END_OF_TEXT, Tokenizer
from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.manifest import record_files
from gpt_arc.reading import read_json, read_toml
from gpt_arc.weights.directory import load_model, of_one_checkpoint
from model import GPT

FILE_NAME, FORMAT_VERSION = "chat.json", 1
ROLES = ("system", "user", "assistant")
CONTENT = "{content}"
MARK = re.compile(r"(<\|\w+\|>)")


class Turn(NamedTuple):
    role: str  # one of ROLES
    content: str


@dataclass(frozen=True)
class Template:
    """Text around the {content} of each role's turn; <|name|> in it is one token."""

    system: str
    user: str
    assistant: str

    def __post_init__(self):
        for name, text in asdict(self).items():
            if not isinstance(text, str) or text.count(CONTENT) != 1:
                raise UserError(f"the template's {name} = {text!r} must be a text that contains {CONTENT} once")
        if not MARK.match(self.assistant.split(CONTENT)[1]):
            raise UserError(f"the template's assistant = {self.assistant!r} must have a <|token|> after {CONTENT}")

    @property
    def marks(self) -> list[str]:
        """Its <|name|> tokens, in order of first occurrence."""
        return list(dict.fromkeys(MARK.findall(f"{self.system} {self.user} {self.assistant}")))

    @property
    def jinja(self) -> str:
        """The template in jinja, for transformers' tokenizers."""
        texts = {role: getattr(self, role).replace(CONTENT, "{{ message.content }}") for role in ROLES}
        cases = "{% elif ".join(f"message.role == '{role}' %}}{text}" for role, text in texts.items())
        opening = self.assistant.split(CONTENT)[0]
        turns = "{% for message in messages %}{% if " + cases + "{% endif %}{% endfor %}"
        return turns + ("{% if add_generation_prompt %}" + opening + "{% endif %}" if opening else "")


def _chatml(role: str) -> str:
    return f"<|im_start|>{role}\n{CONTENT}<|im_end|>\n"


TEMPLATES = {
    "markers": Template("<|system|>{content}", "<|user|>{content}", "<|assistant|>{content}<|end|>"),
    "chatml": Template(*map(_chatml, ROLES)),  # as in Qwen's models
    "plain": Template(f"{CONTENT}\n\n", f"{CONTENT}\n", CONTENT + END_OF_TEXT),  # as in InstructGPT
}


class ChatFile(TypedDict):
    """The content of chat.json."""

    format_version: int
    template: Template
    added_tokens: dict[str, int]


class ChatFormat:
    """A template in a tokenizer's tokens, with added tokens for marks that the tokenizer lacks."""

    def __init__(self, template: Template, tokenizer: Tokenizer, added: dict[str, int]):
        self.template, self.tokenizer, self.added = template, tokenizer, added
        ids = {mark: added.get(mark, tokenizer.special_token(mark)) for mark in template.marks}
        missing = [mark for mark, id in ids.items() if id is None]
        if missing:
            raise UserError(f"the template's {missing[0]} is not a token of the tokenizer")
        self.ids = {mark: id for mark, id in ids.items() if id is not None}
        halves = {role: getattr(template, role).split(CONTENT) for role in ROLES}
        self.parts = {role: [self._encode(half) for half in pair] for role, pair in halves.items()}
        self.end = self.parts["assistant"][1][0]  # the token that ends a response

    @classmethod
    def new(cls, template: Template, tokenizer: Tokenizer, vocab_size: int) -> "ChatFormat":
        """Returns a format for a model of `vocab_size` tokens, which then needs `len(added)` more."""
        unknown = [mark for mark in template.marks if tokenizer.special_token(mark) is None]
        return cls(template, tokenizer, {mark: vocab_size + i for i, mark in enumerate(unknown)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatFormat) and (self.template, self.ids) == (other.template, other.ids)

    def _encode(self, text: str) -> list[int]:
        """Encodes a piece of the template; marks are single tokens."""
        try:
            pieces = [[self.ids[p]] if p in self.ids else self.tokenizer.encode(p) for p in MARK.split(text) if p]
        except UserError as error:
            raise UserError(f"the template's text {text!r}: {error}") from None
        return [token for piece in pieces for token in piece]

    def turn(self, turn: Turn) -> tuple[list[int], list[bool]]:
        """Returns the tokens of a turn and whether each is learned: a response and its end token are."""
        before, after = self.parts[turn.role]
        content = self.tokenizer.encode(turn.content)
        learned = len(content) + 1 if turn.role == "assistant" else 0
        tokens = [*before, *content, *after]
        return tokens, [len(before) <= i < len(before) + learned for i in range(len(tokens))]

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Returns the tokens of a conversation and whether each is scored; the first never is, as nothing predicts it.

        Raises UserError for text that can't be encoded.
        """
        tokens, scored = [], []
        for turn in turns:
            encoded, learned = self.turn(turn)
            if not tokens and learned[:1] == [True]:
                tokens, scored = [self.tokenizer.start_token], [False]
            tokens += encoded
            scored += learned
        return tokens, scored

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Returns the tokens of the turns and of the opening of a response."""
        return [*self.encode(turns)[0], *self.parts["assistant"][0]] or [self.tokenizer.start_token]

    def response(self, content: str) -> list[int]:
        """Returns the tokens of a response, with its end token."""
        return [*self.tokenizer.encode(content), self.end]

    def decode(self, response: Sequence[int]) -> str:
        """Returns the text of a response, up to its end token."""
        length = response.index(self.end) if self.end in response else len(response)
        return self.tokenizer.decode(response[:length])

    def latest(self, turns: Sequence[Turn], room: int) -> list[Turn]:
        """Drops the oldest turns, except the system's, until the prompt takes at most `room` tokens.

        Raises UserError if the last turn alone takes more.
        """
        first = 1 if turns and turns[0].role == "system" else 0
        kept = list(turns)
        while (size := len(self.prompt(kept))) > room:
            if len(kept) <= first + 1:
                alone = "the system turn and the last" if first else "the last turn"
                raise UserError(f"the {size} tokens of {alone} are more than the {room} that the context leaves")
            following = (i for i in range(first + 1, len(kept) - 1) if kept[i].role == "user")
            kept[first : next(following, len(kept) - 1)] = []
        return kept

    def save(self, directory: Path | str) -> None:
        """Writes chat.json."""
        content = {"format_version": FORMAT_VERSION, "template": asdict(self.template), "added_tokens": self.added}
        write_file(Path(directory) / FILE_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        record_files(Path(directory), FILE_NAME)


def load_chat(directory: Path | str, tokenizer: Tokenizer) -> ChatFormat | None:
    """Reads a model directory's chat.json; None if it has none. Raises UserError if it is damaged."""
    path = Path(directory) / FILE_NAME
    if not path.exists():
        return None
    content = read_json(path, ChatFile)
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: it has version {content['format_version']}; this program reads {FORMAT_VERSION}")
    added = content["added_tokens"]
    ids = sorted(added.values())
    if ids and (ids != list(range(ids[0], ids[0] + len(ids))) or ids[0] < tokenizer.text_size):
        raise UserError(f"{path}: added_tokens = {added} don't follow the tokenizer's {tokenizer.vocab_size}")
    try:
        return ChatFormat(content["template"], tokenizer, added)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_template(name: str) -> Template:
    """Returns a template by name, or from a .toml file with a text for each role. Raises UserError."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise UserError(f"template = {name} is neither a .toml file nor one of {', '.join(TEMPLATES)}")
    content = read_toml(path)
    if set(content) != set(ROLES):
        raise UserError(f"{path} has {', '.join(content) or 'nothing'}: a template needs a text for {', '.join(ROLES)}")
    try:
        return Template(**content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@of_one_checkpoint
def load_chat_model(path: Path | str) -> tuple[GPT, Tokenizer, ChatFormat]:
    """Loads a model trained on conversations, with its tokenizer and chat format. Raises UserError."""
    directory = Path(path)
    model, tokenizer = load_model(directory)
    chat = tokenizer and load_chat(directory, tokenizer)
    if tokenizer is None or chat is None:
        raise UserError(f"{directory} doesn't know how turns are marked (chat.json): train it by stages/sft.py first")
    largest, rows = max(chat.ids.values()), model.config.vocab_size
    if largest >= rows:
        raise UserError(f"{directory / FILE_NAME} has a token of the id {largest}, and the model {rows} rows")
    return model, tokenizer, chat
