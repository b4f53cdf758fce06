"""Encodes conversations as tokens, with templates that mark turns. `chat.files` describes the input files.

chat = ChatFormat.new(TEMPLATES["markers"], tokenizer, model.config.vocab_size)
tokens, scored = chat.encode([Turn("user", "Name a colour."), Turn("assistant", "Red.")])
prompt = chat.prompt([Turn("user", "Name a colour.")])      # up to the answer, which ends with chat.end
chat.save(directory)                                        # chat.json, beside a model trained on this format
chat = load_chat(directory, tokenizer)
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, NotRequired

import torch
from typing_extensions import TypedDict

from gpt_arc.chat.tools import CALL, CLOSING, OPENING, RESULT
from gpt_arc.data.declared import CHAT_FILE, CONTENT, MARK, end_mark
from gpt_arc.data.tokenizer import END_OF_TEXT, Tokenizer
from gpt_arc.errors import UserError
from gpt_arc.files import command, write_file
from gpt_arc.manifest import record_files
from gpt_arc.reading import read_json, read_toml
from gpt_arc.weights.directory import load_model, load_text_model, of_one_checkpoint, refuse_images, require_causal
from model import GPT

FORMAT_VERSION = 1
ROLES = ("system", "user", "assistant")
IMAGE = "<image>"  # where an image stands in a turn's content, as in LLaVA's files


class Turn(NamedTuple):
    role: str  # one of ROLES
    content: str
    weight: int = 1  # 0: a response that isn't learned
    images: tuple[range, ...] = ()  # for each <image> in the content, the ids of its embeddings: see `GPT.embed`


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
        if not end_mark(self.assistant):
            raise UserError(f"the template's assistant = {self.assistant!r} must have a <|token|> after {CONTENT}")

    @property
    def marks(self) -> list[str]:
        """Its <|name|> tokens, in order of first occurrence."""
        return list(dict.fromkeys(MARK.findall(f"{self.system} {self.user} {self.assistant}")))

    def parts(self, role: str) -> tuple[str, str]:
        """Returns the texts before and after the content of a role's turn."""
        before, _, after = getattr(self, role).partition(CONTENT)
        return before, after


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
    prefix: NotRequired[list[int]]


class ChatFormat:
    """A template in a tokenizer's tokens, with added tokens for marks that the tokenizer lacks.

    Text between two marks is encoded as one, as transformers does with a rendered template.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, added: dict[str, int], prefix: Sequence[int] = ()):
        """`prefix`: tokens before each conversation."""
        self.template, self.tokenizer, self.added, self.prefix = template, tokenizer, added, list(prefix)
        ids = {mark: added.get(mark, tokenizer.special_token(mark)) for mark in template.marks}
        missing = [mark for mark, id in ids.items() if id is None]
        if missing:
            raise UserError(f"the template's {missing[0]} is not a token of the tokenizer")
        self.ids = {mark: id for mark, id in ids.items() if id is not None}
        self.end = self.ids[end_mark(template.assistant)]  # the token that ends a response in training
        self.ends = {*tokenizer.ends, self.end}  # those that end what a model writes
        for half in (half for role in ROLES for half in template.parts(role)):
            try:
                self._encode(self._split(half), [])
            except UserError as error:
                raise UserError(f"the template's text {half!r}: {error}") from None

    @classmethod
    def new(cls, template: Template, tokenizer: Tokenizer, vocab_size: int) -> "ChatFormat":
        """Returns a format for a model of `vocab_size` tokens, which may then need more: the format's `vocab_size`."""
        first = max(vocab_size, tokenizer.vocab_size)
        unknown = [mark for mark in template.marks if tokenizer.special_token(mark) is None]
        added = {mark: first + i for i, mark in enumerate(unknown)}
        return cls(template, tokenizer, added, tokenizer.declared.prefix)

    @property
    def vocab_size(self) -> int:
        """The least number of tokens that a model of this format has."""
        return max(self.ids.values()) + 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChatFormat):
            return False
        return (self.template, self.ids, self.prefix) == (other.template, other.ids, other.prefix)

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Returns the tokens of a conversation and whether each is scored: those of responses and their end tokens.

        The first token never is, as nothing predicts it. Raises UserError for text that can't be encoded.
        """
        return self._encode([part for turn in turns for part in self._parts(turn)], self._start(turns))

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Returns the tokens of the turns and of the opening of a response."""
        parts = [part for turn in turns for part in self._parts(turn)]
        parts += self._split(self.template.parts("assistant")[0])
        return self._encode(parts, self._start(turns))[0] or [self.tokenizer.start_token]

    def render(self, turns: Sequence[Turn], continued: bool = False) -> str:
        """Returns the text of the turns and of the opening of a response.

        `continued`: instead, the last turn is the beginning of a response, and the text ends with it.
        """
        texts = [turn.content.join(self.template.parts(turn.role)) for turn in turns]
        opening, closing = self.template.parts("assistant")
        return "".join(texts).removesuffix(closing) if continued else "".join(texts) + opening

    def encode_rendered(self, text: str) -> list[int]:
        """Returns the tokens of a text made by `render`. A mark's spelling is the mark, also within a content."""
        return self._encode(self._split(text), self.prefix)[0]

    def check_opening(self) -> None:
        """Raises UserError if a token may span the text before a response and the beginning of the response.

        Training reads both as one text. A prompt ends between them, so it would end in tokens never seen there.
        """
        text = MARK.split(self.render([Turn("user", "a")]))[-1]
        for letter in "aA1":
            try:
                before, together = self.tokenizer.encode(text), self.tokenizer.encode(text + letter)
            except UserError:  # the vocabulary lacks a character, so it has no tokens of several
                continue
            if together[: len(before)] != before:
                raise UserError(
                    f"the template's assistant = {self.template.assistant!r}: a token holds the end of the text before "
                    f"{CONTENT} and the beginning of a response such as {letter!r}, so a prompt would end otherwise "
                    f"than in training: let {CONTENT} follow a <|token|>, a colon or a line break, without a space"
                )

    def _start(self, turns: Sequence[Turn]) -> list[int]:
        """Returns the tokens before the turns. A response that would come first has a start token that predicts it."""
        starts_with_content = bool(turns) and turns[0].role == "assistant" and not self.template.parts("assistant")[0]
        return self.prefix or [self.tokenizer.start_token] * starts_with_content

    def _encode(self, parts: Sequence[tuple[str | int, bool]], start: list[int]) -> tuple[list[int], list[bool]]:
        """Encodes texts and marks after the tokens `start`. Returns the tokens and whether each is scored.

        Each part comes with whether it is learned; a learned text is followed by a mark.
        """
        tokens, scored = list(start), [False] * len(start)
        text, begin = "", None  # the text since the last mark, and where a learned one begins in it
        for part, learned in [*parts, (-1, False)]:  # the -1 only ends the last text
            if isinstance(part, str):
                begin = len(text) if learned else begin
                text += part
                continue
            begin = len(text) if begin is None else begin
            ids, unlearned = self.tokenizer.encode_from(text, begin, bool(tokens)) if text else ([], 0)
            tokens += [*ids, part]
            scored += [*(i >= unlearned or not begin for i in range(len(ids))), learned]
            text, begin = "", None
        return tokens[:-1], [False, *scored[1:-1]] if tokens[1:] else []

    def _parts(self, turn: Turn) -> list[tuple[str | int, bool]]:
        """Returns the texts and the marks' ids that a turn consists of, and whether each is learned."""
        before, after = map(self._split, self.template.parts(turn.role))
        learned = turn.role == "assistant" and turn.weight > 0
        if learned:
            after[:2] = [(self.end, True)]  # in place of an empty text and the end mark
        if not turn.images:
            return [*before, (turn.content, learned), *after]
        first, *texts = turn.content.split(IMAGE, len(turn.images))
        content: list[tuple[str | int, bool]] = [(first, learned)]
        for ids, text in zip(turn.images, texts, strict=True):
            content += [*((id, False) for id in ids), (text, learned)]
        return [*before, *content, *after]

    def _split(self, text: str) -> list[tuple[str | int, bool]]:
        """Splits a text of the template at its marks, which become ids."""
        return [(self.ids.get(piece, piece), False) for piece in MARK.split(text)]

    @property
    def jinja(self) -> str:
        """The template in Jinja. What it renders, transformers' tokenizers encode as `encode` does.

        All texts are literals in expressions, from which Jinja strips no white space. {% generation %} encloses what is
        learned. A mark spelled in a content is text here, and the mark for transformers. Tools, their calls and results
        become what `chat.tools` makes of them.
        """
        return self._in_jinja("{after}")

    @property
    def scored_jinja(self) -> str:
        """`jinja` for reward models: a response that comes last ends with the token at which it is scored."""
        return self._in_jinja("{{% if not loop.last %}}{after}{{% endif %}}")

    def _in_jinja(self, ending: str) -> str:
        """Returns the template in Jinja; `ending` is formatted with the text after the mark that ends a response."""

        def literal(text: str) -> str:
            return f"{{{{ {text!r} }}}}" if text else ""

        def when(condition: str, text: str, otherwise: str = "") -> str:
            return f"{{% if {condition} %}}{text}" + (otherwise and "{% else %}" + otherwise) + "{% endif %}"

        content = "{{ message['content'] }}"
        system, user = (tuple(map(literal, self.template.parts(role))) for role in ("system", "user"))
        opening, closing = self.template.parts("assistant")
        mark = end_mark(self.template.assistant)
        after = literal(closing.removeprefix(mark))
        name, arguments = "{{ call['name'] }}", "{{ call['arguments'] }}"
        arguments = when("call['arguments'] is string", arguments, arguments.replace(" }}", " | tojson }}"))
        call = literal(CALL[0]) + name + literal(CALL[1]) + arguments + literal(CALL[2])
        calls = "{% for each in message['tool_calls'] or [] %}{% set call = each['function'] or each %}"
        calls += when("message['content'] or not loop.first", literal("\n")) + call + "{% endfor %}"
        response = "{{ message['content'] or '' }}" + calls + literal(mark)
        texts = {
            "system": when("not (tools and loop.first)", content.join(system)),
            "user": content.join(user),
            "assistant": literal(opening) + f"{{% generation %}}{response}{{% endgeneration %}}",
            "tool": when("loop.previtem is defined and loop.previtem['role'] == 'tool'", literal("\n"), user[0])
            + content.join(map(literal, RESULT))
            + when("loop.last or loop.nextitem['role'] != 'tool'", user[1]),
        }
        texts["assistant"] += after and ending.format(after=after)
        start = literal(self.tokenizer.decode(self.prefix or [self.tokenizer.start_token]))
        if not self.prefix:
            start = "" if opening else when("not tools and messages and messages[0]['role'] == 'assistant'", start)
        asked = when("messages[0]['role'] == 'system'", "{{ messages[0]['content'] }}" + literal("\n\n"))
        each_tool = "{% for tool in tools %}" + literal("\n") + "{{ tool | tojson }}{% endfor %}"
        tools = (asked + literal(OPENING) + each_tool + literal(CLOSING)).join(system)
        cases = "{% elif ".join(f"message['role'] == '{role}' %}}{text}" for role, text in texts.items())
        turns = "{% for message in messages %}{% if " + cases + "{% endif %}{% endfor %}"
        prompt = when("add_generation_prompt", literal(opening)) if opening else ""
        return start + when("tools", tools) + turns + prompt

    def response(self, content: str) -> list[int]:
        """Returns the tokens of a response, with its end token."""
        return [*self.tokenizer.encode_from(content, 0, after_special=True)[0], self.end]

    def decode(self, response: Sequence[int]) -> str:
        """Returns the text of a response, up to the first of `ends`."""
        length = next((i for i, token in enumerate(response) if token in self.ends), len(response))
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
        content |= {"prefix": self.prefix} if self.prefix else {}
        write_file(Path(directory) / CHAT_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        record_files(Path(directory), CHAT_FILE)


def load_chat(directory: Path | str, tokenizer: Tokenizer, rows: int | None = None) -> ChatFormat | None:
    """Reads a model directory's chat.json; None if it has none.

    Raises UserError if it is damaged or names a token beyond the model's `rows`.
    """
    path = Path(directory) / CHAT_FILE
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
        chat = ChatFormat(content["template"], tokenizer, added, content.get("prefix", ()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    largest = max((*chat.ids.values(), *chat.prefix))
    if rows is not None and largest >= rows:
        raise UserError(f"{path} has a token of the id {largest}, and the model {rows} rows")
    return chat


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


def require_chat(directory: Path | str, chat: ChatFormat | None) -> ChatFormat:
    """Returns `chat`, which was read from a model directory. Raises UserError if it has none."""
    if chat is None:
        train = command("stages/sft.py", directory, "--train=CHATS.jsonl")
        raise UserError(f"{directory} doesn't know how turns are marked (chat.json): train it first with: {train}")
    return chat


@of_one_checkpoint
def load_with_chat(path: Path | str) -> tuple[GPT, Tokenizer | None, ChatFormat | None]:
    """Returns what `load_model` and `load_chat` read from a model directory."""
    model, tokenizer = load_model(path)
    return model, tokenizer, tokenizer and load_chat(path, tokenizer, model.config.vocab_size)


@of_one_checkpoint
def load_text_with_chat(
    path: Path | str, dtype: torch.dtype = torch.float32
) -> tuple[Path, GPT, Tokenizer, ChatFormat | None]:
    """Returns the model directory, and what `load_text_model` and `load_chat` read from it."""
    model, tokenizer = load_text_model(path, dtype=dtype)
    return Path(path), model, tokenizer, load_chat(path, tokenizer, model.config.vocab_size)


@of_one_checkpoint
def load_chat_model(path: Path | str) -> tuple[GPT, Tokenizer, ChatFormat]:
    """Loads a model trained on conversations, with its tokenizer and chat format. Raises UserError.

    Refuses a model that reads images, because whoever trains it saves its text model alone.
    """
    refuse_images(path)
    model, _, chat = load_with_chat(path)
    require_causal(path, model)
    chat = require_chat(path, chat)
    return model, chat.tokenizer, chat
