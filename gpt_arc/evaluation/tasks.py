"""Tasks as files: how an item of a data set becomes a question, and what counts as its answer.

    task = load_task("hellaswag")                      # tasks/hellaswag.toml, or the path of a file
    items = load_items(task, "test", local=None)       # of the hub, or of a local .jsonl or .parquet
    items = prepared_items(task, items)                # with the columns that its templates name
    question = task.question(items[0])                 # contexts and continuations to score

A template is text in which {column} stands for a column of the item, {a.b} for the entry b of what column a holds, and
{text.beginning} and {text.last_word}, {text.before} and {text.after} for the parts of a text beside its last space
or its blank, written as _. In those of a choice {option} is the option in question. A task's file has the settings of
`Task`.
"""

import dataclasses
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt_arc.errors import UserError
from gpt_arc.files import resource

FOLDER = resource("tasks")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # the comma before three digits
PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.]*)\}")


class Question(NamedTuple):
    """An item as a model meets it."""

    contexts: list[str]  # of each option; one where there is nothing to choose
    continuations: list[str]  # likewise; the answer, where there is nothing to choose
    answer: int  # which of them is right


@dataclass(frozen=True)
class Task:
    """A task's file. Raises UserError for settings that don't go together."""

    name: str
    title: str
    """What it is, and whose."""
    kind: Literal["choice", "cloze", "generate"]
    """choice: the likeliest option. cloze: is the answer what greedy decoding says? generate: the same, by a metric."""
    context: str = ""
    """Template of what the model reads."""
    continuation: str = "{option}"
    """choice: template of what is scored after it."""
    options: str | list[str] = ""
    """choice: the path of a column with a list of options, or a list of templates."""
    answer: str = ""
    """Template of the right option; of the answer, where there are no options."""
    answer_as: Literal["place", "text"] = "place"
    """choice: what `answer` is: the option's number or letter, or its text."""
    answer_from: int = 0
    """Which number the first option has in the data."""
    normalise: Literal["sum", "token", "character", "byte", "unconditional"] = "sum"
    """choice: what options are compared by: log-probability, that over its tokens, over its characters or bytes but a
    space at its beginning (acc_norm and acc_bytes of lm-evaluation-harness), or less its own after `unconditional`."""
    unconditional: str = "Answer:"
    """The context of that."""
    stop_word_filter: bool = False
    """cloze: right if the answer is the likeliest word that isn't a stop word, see evaluation/word_search.py."""
    description: str = ""
    """Template before all demonstrations, of the item asked."""
    separator: str = "\n\n"
    """What stands after a demonstration."""
    stop: list[str] = field(default_factory=lambda: ["\n"])
    """generate: what ends an answer."""
    extract: str = ""
    """generate: a regular expression whose last match, or its group, in the text is the answer; empty: the text."""
    max_new_tokens: int = 32
    """generate: the longest answer."""
    sentences: int = 0
    """generate: so many first sentences of the text count; 0: all."""
    top_k: int = 1
    """generate: each token is drawn among the so many likeliest; 1: greedy decoding."""
    num_beams: int = 1
    """generate: the likeliest text that a search with so many beams finds; 1: none. One at a time, and a beam ends with
    a token that holds one of `stop`."""
    length_penalty: float = 1.0
    """Beams are ranked by log-probability / length^this."""
    metric: Literal["exact match", "bleu", "rouge"] = "exact match"
    """generate: what a text is compared with the answer by."""
    group: str = ""
    """Path of a column: an item's demonstrations are items that have the same there, such as a subject."""
    demonstration: str = ""
    """Template of what follows the context in a demonstration, such as a chain of thought; empty: the answer."""
    hub: str = ""
    """The data set on the Hugging Face hub."""
    subset: str = ""
    """The part of it that it calls a configuration."""
    test: str = "test"
    """Its split of the items to answer."""
    train: str = ""
    """Its split to draw demonstrations from; empty: from the items to answer, but never the one asked."""
    generator: str = ""
    """Generated items: addition, subtraction or multiplication, and a number of digits (evaluation/items.py)."""
    prepare: Literal["", "cbt", "copa", "gsm8k", "winograd"] = ""
    """What makes the columns that the templates name of an item's own, where those don't do: see PREPARATIONS."""
    published: dict[str, dict[str, float]] = field(default_factory=dict)
    """Published figures of this task: a table for each metric, by model."""

    def __post_init__(self):
        for one in dataclasses.fields(self):
            value, allowed = getattr(self, one.name), TYPES[one.name]
            if not isinstance(value, allowed) or (isinstance(value, bool) and allowed is not bool):
                raise UserError(f"{one.name} = {value!r} has the wrong type")
            choices = typing.get_args(one.type) if typing.get_origin(one.type) is Literal else ()
            if choices and value not in choices:
                raise UserError(f"{one.name} = {value!r} must be one of {', '.join(choices)}")
        if self.kind == "choice" and not self.options:
            raise UserError("a choice needs options")
        if isinstance(self.options, list) and (len(self.options) == 1 or not all_texts(self.options)):
            raise UserError(f"options = {self.options!r} must be two texts or more, or a column's path")
        if not all_texts(self.stop) or "" in self.stop:
            raise UserError(f"stop = {self.stop!r} must be texts, none of them empty")
        for name, least in (("max_new_tokens", 1), ("top_k", 1), ("num_beams", 1), ("sentences", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)} must be at least {least}")
        if self.num_beams > 1 and self.top_k > 1:
            raise UserError("num_beams draws nothing, so top_k has no meaning: leave one of them out")
        if not 0 <= self.length_penalty <= 100:
            raise UserError(f"length_penalty = {self.length_penalty} must lie in [0, 100]")
        if self.num_beams == 1 and self.length_penalty != 1:
            raise UserError("length_penalty ranks beams: it needs num_beams")
        if self.extract and self.metric != "exact match":
            raise UserError(f"extract finds what is matched exactly: it has no meaning for {self.metric}")
        for metric, figures in self.published.items():
            if not isinstance(figures, dict):
                raise UserError(f"published: {metric} = {figures!r} is no table of a metric's figures")
            for model, figure in figures.items():
                if not isinstance(figure, (int, float)):
                    raise UserError(f"published: {model} = {figure!r} is not a number")
        try:
            re.compile(self.extract)
        except re.error as error:
            raise UserError(f"extract = {self.extract!r} is no regular expression: {error}") from None
        for one in dataclasses.fields(self):
            default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            kind = KIND_OF.get(one.name, self.kind)
            if kind != self.kind and getattr(self, one.name) != default:
                raise UserError(f"{one.name} belongs to the kind {kind}, not to {self.kind}")

    def question(self, item: dict[str, Any]) -> Question:
        """The item's contexts, continuations and answer. Raises UserError naming what it lacks."""
        if self.kind != "choice":
            return Question([filled(self.context, item)], [filled(self.answer, item)], 0)
        options = self.options_of(item)
        asked = [item | {"option": option} for option in options]
        contexts = [filled(self.context, one) for one in asked]
        return Question(contexts, [filled(self.continuation, one) for one in asked], self.answer_of(item, options))

    def options_of(self, item: dict[str, Any]) -> list[str]:
        if isinstance(self.options, list):
            return [filled(option, item) for option in self.options]
        options = looked_up(self.options, item)
        if not isinstance(options, list) or len(options) < 2 or not all_texts(options):
            raise UserError(f"{self.options} = {json.dumps(options)[:60]} is not a list of two texts or more")
        return options

    def answer_of(self, item: dict[str, Any], options: Sequence[str]) -> int:
        """The number, from 0, of the right option."""
        said = filled(self.answer, item).strip()
        if self.answer_as == "text":
            if said not in options:
                raise UserError(f"the answer {said!r} is none of the {len(options)} options' texts")
            return options.index(said)
        number = ord(said.upper()) - ord("A") if re.fullmatch("[A-Za-z]", said) else -1
        if re.fullmatch(r"\d+", said):
            number = int(said) - self.answer_from
        if not 0 <= number < len(options):
            raise UserError(
                f"the answer {said!r} is none of the {len(options)} options, by number or letter; where it is one's "
                'text, answer_as = "text" says so'
            )
        return number

    def demonstrated(self, item: dict[str, Any], option: str | None = None, of: dict[str, Any] | None = None) -> str:
        """An item with its answer, with another `option`, or with the answer `of` another item, as a demonstration."""
        if self.kind == "choice":
            options = self.options_of(item)
            asked = item | {"option": options[self.answer_of(item, options)] if option is None else option}
            return filled(self.context, asked) + filled(self.continuation, asked) + self.separator
        return filled(self.context, item) + filled(self.demonstration or self.answer, of or item) + self.separator

    def is_right(self, said: str, question: Question) -> bool:
        """Whether a generated text is the question's answer.

        Case, white space, a last full stop and commas between thousands do not matter.
        """
        if self.extract:
            found = list(re.finditer(self.extract, said))
            said = found[-1][found[-1].lastindex or 0] if found else ""
        texts = [THOUSANDS.sub("", text.lower()) for text in (said, question.continuations[0])]
        plain = [" ".join(text.split()).rstrip(" .") for text in texts]
        return plain[0] == plain[1]


TYPES = {one.name: str for one in dataclasses.fields(Task)} | {
    "options": (str, list), "answer_from": int, "stop_word_filter": bool, "stop": list, "max_new_tokens": int,
    "sentences": int, "top_k": int, "num_beams": int, "length_penalty": (int, float), "published": dict,
}  # fmt: skip
KIND_OF = dict.fromkeys(("options", "continuation", "answer_as", "answer_from", "normalise", "unconditional"), "choice")
KIND_OF |= {"stop_word_filter": "cloze"} | dict.fromkeys(
    ("stop", "extract", "max_new_tokens", "sentences", "top_k", "num_beams", "length_penalty", "metric"), "generate"
)


def all_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def looked_up(path: str, item: dict[str, Any]) -> Any:
    """The entry of `item` at a dotted path. Raises UserError saying what there is."""
    value: Any = item
    for part in path.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, str) and part in ("beginning", "last_word") and len(value.split()) > 1:
            value = value.rstrip().rsplit(None, 1)[part == "last_word"]
        elif isinstance(value, str) and part in ("before", "after") and "_" in value:
            value = value.split("_", 1)[part == "after"]
        else:
            hint = "; write its name without braces" if path.startswith("{") else ""
            there = hint or f": it has {', '.join(value)}" if isinstance(value, dict) else ""
            raise UserError(f"an item has no {path}{there}")
    return value


def filled(template: str, item: dict[str, Any]) -> str:
    def entry(match: re.Match) -> str:
        value = looked_up(match[1], item)
        if isinstance(value, (dict, list)) or value is None:
            raise UserError(f"{{{match[1]}}} = {json.dumps(value)[:60]} is not a text or a number")
        return str(value)

    return PLACEHOLDER.sub(entry, template)


def known_tasks() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_task(name: str) -> Task:
    """The task of tasks/NAME.toml, or of a file. Raises UserError for an unknown or damaged one."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.exists():
        near = difflib.get_close_matches(name, known_tasks(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"those there are: {', '.join(known_tasks())}"
        raise UserError(f"there is no task {name}; {hint}")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    fields = {f.name for f in dataclasses.fields(Task)} - {"name"}
    for key in sorted(content.keys() - fields):
        near = difflib.get_close_matches(key, fields, n=1)
        raise UserError(f"{path}: there is no setting {key}" + (f"; did you mean {near[0]}?" if near else ""))
    missing = {"title", "kind", "answer"} - content.keys()
    if missing:
        raise UserError(f"{path}: {min(missing)} is missing")
    try:
        return Task(path.stem, **content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
