"""Tasks as files: how an item of a data set becomes a question, and what counts as its answer.

    task = load_task("hellaswag")                      # tasks/hellaswag.toml, or the path of a file
    items = load_items(task, "test", local=None)       # of the hub, or of a local .jsonl or .parquet
    question = task.question(item)                     # contexts and continuations to score

A template is text in which {column} stands for a column of the item, {a.b} for the entry b of what column a holds, and
{text.beginning} and {text.last_word}, {text.before} and {text.after} for the parts of a text beside its last space
or its blank, written as _. In those of a choice {option} is the option in question. A task's file has the settings of
`Task`.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import random
import re
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gpt_arc.documents import extra
from gpt_arc.errors import UserError, first_line

FOLDER = Path(__file__).resolve().parent.parent / "tasks"
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
    """Template of the right option, as its number, letter or text; of the answer, where there are no options."""
    answer_from: int = 0
    """Which number the first option has in the data."""
    normalise: Literal["sum", "token", "byte", "unconditional"] = "sum"
    """choice: what options are compared by: log-probability, that over its tokens or bytes, or less its own after
    `unconditional` alone."""
    unconditional: str = "Answer:"
    """The context of that."""
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
    """Items made by `gpt_arc.tasks` instead: addition, subtraction or multiplication and a number of digits."""
    published: dict[str, float] = field(default_factory=dict)
    """Published figures of this task by model, in the metric that is reported."""

    def __post_init__(self):
        for one in dataclasses.fields(self):
            value, allowed = getattr(self, one.name), TYPES[one.name]
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise UserError(f"{one.name} = {value!r} has the wrong type")
            choices = typing.get_args(one.type) if typing.get_origin(one.type) is Literal else ()
            if choices and value not in choices:
                raise UserError(f"{one.name} = {value!r} must be one of {', '.join(choices)}")
        if self.kind == "choice" and not self.options:
            raise UserError("a choice needs options")
        if self.kind != "choice" and self.options:
            raise UserError(f"options belong to the kind choice, not to {self.kind}")
        if isinstance(self.options, list) and (len(self.options) == 1 or not all_texts(self.options)):
            raise UserError(f"options = {self.options!r} must be two texts or more, or a column's path")
        if not all_texts(self.stop) or "" in self.stop:
            raise UserError(f"stop = {self.stop!r} must be texts, none of them empty")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens} must be at least 1")
        for model, figure in self.published.items():
            if not isinstance(figure, (int, float)):
                raise UserError(f"published: {model} = {figure!r} is not a number")
        try:
            re.compile(self.extract)
        except re.error as error:
            raise UserError(f"extract = {self.extract!r} is no regular expression: {error}") from None

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
        if said in options:
            return options.index(said)
        number = ord(said.upper()) - ord("A") if re.fullmatch("[A-Za-z]", said) else -1
        if re.fullmatch(r"\d+", said):
            number = int(said) - self.answer_from
        if not 0 <= number < len(options):
            raise UserError(f"the answer {said!r} is none of the {len(options)} options, by number, letter or text")
        return number

    def demonstrated(self, item: dict[str, Any], option: str | None = None, of: dict[str, Any] | None = None) -> str:
        """An item with its answer, with another `option`, or with the answer `of` another item, as a demonstration."""
        if self.kind == "choice":
            options = self.options_of(item)
            asked = item | {"option": options[self.answer_of(item, options)] if option is None else option}
            return filled(self.context, asked) + filled(self.continuation, asked) + self.separator
        return filled(self.context, item) + filled(self.demonstration or self.answer, of or item) + self.separator

    def is_right(self, said: str, question: Question) -> bool:
        """Whether a generated text is the question's answer, apart from case, white space and a last full stop."""
        if self.extract:
            found = list(re.finditer(self.extract, said))
            said = found[-1][found[-1].lastindex or 0] if found else ""
        plain = [" ".join(text.lower().split()).rstrip(" .") for text in (said, question.continuations[0])]
        return plain[0] == plain[1]


TYPES = {one.name: str for one in dataclasses.fields(Task)} | {
    "options": (str, list), "answer_from": int, "stop": list, "max_new_tokens": int, "published": dict,
}  # fmt: skip


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
            there = f": it has {', '.join(value)}" if isinstance(value, dict) else ""
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


def load_items(task: Task, split: str, local: Path | None, seed: int, count: int | None = None) -> list[dict[str, Any]]:
    """The items of a task's split, "test" or "train": of the file `local`, made by its generator, or of the hub.

    Raises UserError where they can't be had.
    """
    if local is not None:
        return _local_items(local)
    if task.generator:
        return arithmetic(task.generator, count or 2000, seed, split)
    if not task.hub:
        raise UserError(f"{task.name} has no data of its own: name a file of items by --data")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            "data sets of the hub take a library: pip install -e '.[data]', or name a file by --data"
        ) from None
    name = task.test if split == "test" else task.train
    try:
        return list(load_dataset(task.hub, task.subset or None, split=name))
    except Exception as error:  # every library between here and the network raises its own
        raise UserError(
            f"{task.name}: {task.hub} can't be had of the Hugging Face hub: connect once, or name a file by --data "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None


def _local_items(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".parquet":
        try:
            items = extra("pyarrow.parquet").read_table(path).to_pylist()
        except (OSError, extra("pyarrow").ArrowException) as error:
            raise UserError(f"{path} is not readable as parquet: {first_line(error)}") from None
    elif path.suffix == ".jsonl":
        items = _json_lines(path)
    else:
        raise UserError(f"{path}: items are read from .jsonl and .parquet files")
    if not items:
        raise UserError(f"{path} holds no items")
    return items


def _json_lines(path: Path) -> list[dict[str, Any]]:
    items = []
    try:
        for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):  # noqa: B007  told below
            if line.strip():
                item = json.loads(line)
                if not isinstance(item, dict):
                    raise ValueError("not a JSON object")
                items.append(item)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8") from None
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}") from None
    return items


WORDS = {"addition": "plus", "subtraction": "minus", "multiplication": "times"}


def arithmetic(kind: str, count: int, seed: int, split: str) -> list[dict[str, Any]]:
    """Questions of GPT-3's arithmetic (Brown et al. 2020, 3.9.1): both numbers uniform in [0, 10^D), D the digits.

    Of the pairs of numbers a hash makes tenths; those of one are for demonstrations, so that none is ever asked.
    """
    operation, _, digits = kind.partition(" ")
    if operation not in WORDS or not digits.isdigit() or not 1 <= int(digits) <= 9:
        raise UserError(f'generator = "{kind}": write {", ".join(WORDS)} and a number of digits, as in "addition 2"')
    generator = np.random.default_rng((seed, len(operation), int(digits), split == "train"))
    items: list[dict[str, Any]] = []
    while len(items) < count:
        a, b = (int(number) for number in generator.integers(0, 10 ** int(digits), 2))
        tenth = int.from_bytes(hashlib.sha256(f"{a} {b}".encode()).digest()) % 10
        if (tenth == 0) != (split == "train"):
            continue
        value = a + b if operation == "addition" else a - b if operation == "subtraction" else a * b
        items.append({"a": a, "b": b, "operation": WORDS[operation], "value": value})
    return items


def demonstrations(
    task: Task, pool: Sequence[dict[str, Any]], number: int, shots: int, seed: int, shuffled: bool
) -> str:
    """`shots` items of the pool as text, drawn by the seed for the item `number`, which is never among them.

    `shuffled` gives each a random option, or the answer of a random item: a control for what the format alone teaches
    (Min et al., arXiv:2202.12837). Raises UserError where there are too few, or naming one that lacks something. A pool
    of other items than those asked has numbers of its own, so there the item of this number is left out in vain.
    """
    if shots >= len(pool):
        raise UserError(f"{shots} demonstrations can't be drawn from {len(pool)} items, one left out")
    chance = random.Random(f"{seed} {number}")
    texts = []
    for i in [i for i in chance.sample(range(len(pool)), shots + 1) if i != number][:shots]:
        try:
            answer = chance.choice(task.options_of(pool[i])) if shuffled and task.kind == "choice" else None
            of = chance.choice(pool) if shuffled and task.kind != "choice" else None
            texts.append(task.demonstrated(pool[i], answer, of))
        except UserError as error:
            raise UserError(f"item {i + 1} as a demonstration: {error}") from None
    return "".join(texts)


def standard_error(values: Sequence[float]) -> float:
    """Of a mean: the sample's standard deviation over the root of its size; 0 for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """That two settings are right (1) equally often, by the items on which they differ: McNemar's exact test."""
    from scipy.stats import binomtest

    better = sum(b > a for a, b in zip(first, second))
    worse = sum(a > b for a, b in zip(first, second))
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
