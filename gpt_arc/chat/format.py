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
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from gpt_arc.data.tokenizer import END_OF_TEXT, Tokenizer
from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.weights.directory import load_model, model_directory
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


def load_chat_model(path: Path | str) -> tuple[GPT, Tokenizer, ChatFormat]:
    """A model that knows how conversations are written, its tokenizer and that. Raises UserError."""
    directory = model_directory(path)
    model, tokenizer = load_model(directory)
    chat = tokenizer and load_chat(directory, tokenizer)
    if chat is None:
        raise UserError(f"{directory} doesn't know how turns are marked (chat.json): train it by stages/sft.py first")
    return model, tokenizer, chat
