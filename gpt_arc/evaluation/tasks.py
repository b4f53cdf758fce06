"""Task files: how an item of a data set becomes a question, and what counts as its answer.

    task = load_task("hellaswag")                      # tasks/hellaswag.toml, or the path of a file
    items = load_items(task, "test", None, seed=0)     # from the hub, or from a local .jsonl or .parquet
    items = prepared_items(task, items)                # with the columns that its templates name
    question = task.question(items[0])                 # contexts and continuations to score

In a template {column} stands for a column of the item, and {a.b} for the entry b of column a. {text.beginning} and
{text.last_word} are the parts of a text around its last space, {text.before} and {text.after} those around its blank,
written as _. In the templates of a choice {option} is one of the options. A task file has the settings of `Task`.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Le, MinLen
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError
from gpt_arc.files import resource
from gpt_arc.settings import STRICT, Count, Natural, mistake, read_file

FOLDER = resource("tasks")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # the comma before three digits
PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.]*)\}")


class Question(NamedTuple):
    """An item as the model sees it."""

    contexts: list[str]  # one for each option; a single one if there are no options
    continuations: list[str]  # likewise; the answer if there are no options
    answer: int  # index of the right one
    place: str = "item 1"  # in the data, for messages
    image: Path | None = None  # shown before the context


@dataclass(frozen=True, config=STRICT)
class Task:
    """The settings of a task file."""

    name: str
    title: str
    """What the task is, with its source."""
    kind: Literal["choice", "cloze", "generate"]
    """choice: pick the likeliest option. cloze: is the answer what greedy decoding gives? generate: compare a generated
    text with the answer by `metric`."""
    context: str = ""
    """Template of the text before the answer."""
    continuation: str = "{option}"
    """choice: template of the text that is scored after the context."""
    options: str | Annotated[tuple[str, ...], MinLen(2)] = ""
    """choice: path of a column with a list of options, or a list of templates."""
    answer: str = field(kw_only=True)
    """Template of the right option, or of the answer if there are no options."""
    answer_as: Literal["place", "text"] = "place"
    """choice: whether `answer` is the option's number or letter (place), or its text."""
    answer_from: int = 0
    """choice: the number of the first option in the data."""
    normalise: Literal["sum", "token", "character", "byte", "unconditional"] = "sum"
    """choice: how options are compared. sum: by log-probability. token, character, byte: by log-probability over length
    without a leading space (the last two are acc_norm and acc_bytes of lm-evaluation-harness). unconditional: by
    log-probability minus that after the context `unconditional`."""
    unconditional: str = "Answer:"
    """choice: the context for normalise = "unconditional"."""
    stop_word_filter: bool = False
    """cloze: right if the answer is the likeliest word that isn't a stop word, see evaluation/word_search.py."""
    image: str = ""
    """choice, generate: the column with the name of an image that the question is about, relative to the file of items.
    Such questions are for models trained on images, and come without demonstrations."""
    description: str = ""
    """Template of a text before all demonstrations, filled from the item to answer."""
    separator: str = "\n\n"
    """Text after each demonstration."""
    stop: tuple[Annotated[str, MinLen(1)], ...] = ("\n",)
    """generate: texts that end an answer."""
    extract: str = ""
    """generate: a regular expression; the answer is its last match in the text, or that match's group. Empty: the whole
    text."""
    max_new_tokens: Count = 32
    """generate: longest answer in tokens."""
    sentences: Natural = 0
    """generate: number of sentences at the start of the text that count. 0: all."""
    top_k: Count = 1
    """generate: draw each token from the top_k likeliest. 1: greedy decoding."""
    num_beams: Count = 1
    """generate: beams of a search for the likeliest text; a beam ends with a token that contains a `stop` text. 1: no
    search."""
    length_penalty: Annotated[float, Ge(0), Le(100)] = 1.0
    """generate: beams are ranked by log-probability / length^length_penalty."""
    metric: Literal["exact match", "bleu", "rouge"] = "exact match"
    """generate: how a text is compared with the answer."""
    group: str = ""
    """Path of a column, such as a subject: demonstrations have the same value there as the item to answer."""
    demonstration: str = ""
    """Template of the text after the context in a demonstration, such as a chain of thought. Empty: the answer."""
    hub: str = ""
    """The data set on the Hugging Face hub."""
    subset: str = ""
    """The data set's configuration on the hub."""
    test: str = "test"
    """Split of the items to answer."""
    train: str = ""
    """Split to draw demonstrations from. Empty: the other items to answer."""
    generator: str = ""
    """Generated items: addition, subtraction or multiplication, and a number of digits (evaluation/items.py)."""
    prepare: Literal["", "cbt", "copa", "gsm8k", "winograd"] = ""
    """Derives the columns that the templates name from the data set's: see PREPARATIONS in evaluation/items.py."""
    published: dict[str, dict[str, float]] = field(default_factory=dict)
    """Published figures of this task: a table of figures by model for each metric."""

    LISTED: ClassVar[str] = "gpt_arc/evaluation/tasks.py"

    def __post_init__(self):
        if self.kind == "choice" and not self.options:
            raise ValueError("a choice needs options")
        if self.kind == "cloze" and self.image:
            raise ValueError("image belongs to the kinds choice and generate, not to cloze")
        if self.num_beams > 1 and self.top_k > 1:
            raise ValueError("num_beams does not sample, so top_k has no effect: leave one of them out")
        if self.num_beams == 1 and self.length_penalty != 1:
            raise ValueError("length_penalty ranks beams: it needs num_beams")
        if self.extract and self.metric != "exact match":
            raise ValueError(f"extract has no effect with metric = {self.metric}: it is for exact matches")
        try:
            re.compile(self.extract)
        except re.error as error:
            raise ValueError(f"extract = {self.extract!r} is not a regular expression: {error}") from None
        for setting in fields(self):
            kind = KIND_OF.get(setting.name, self.kind)
            if kind != self.kind and getattr(self, setting.name) != setting.default:
                raise ValueError(f"{setting.name} belongs to the kind {kind}, not to {self.kind}")

    def question(self, item: dict[str, Any]) -> Question:
        """Returns the item's contexts, continuations and answer. Raises UserError naming a missing column."""
        image = Path(looked_up(self.image, item)) if self.image else None
        if self.kind != "choice":
            return Question([filled(self.context, item)], [filled(self.answer, item)], 0, image=image)
        options = self.options_of(item)
        variants = [item | {"option": option} for option in options]
        contexts = [filled(self.context, variant) for variant in variants]
        continuations = [filled(self.continuation, variant) for variant in variants]
        return Question(contexts, continuations, self.answer_of(item, options), image=image)

    def options_of(self, item: dict[str, Any]) -> list[str]:
        if isinstance(self.options, tuple):
            return [filled(option, item) for option in self.options]
        options = looked_up(self.options, item)
        if not isinstance(options, list) or len(options) < 2 or not all_texts(options):
            raise UserError(f"{self.options} = {json.dumps(options)[:60]} is not a list of two or more texts")
        return options

    def answer_of(self, item: dict[str, Any], options: Sequence[str]) -> int:
        """Returns the index of the right option."""
        answer = filled(self.answer, item).strip()
        if self.answer_as == "text":
            if answer not in options:
                raise UserError(f"the answer {answer!r} is not the text of any of the {len(options)} options")
            return options.index(answer)
        number = ord(answer.upper()) - ord("A") if re.fullmatch("[A-Za-z]", answer) else -1
        if re.fullmatch(r"\d+", answer):
            number = int(answer) - self.answer_from
        if not 0 <= number < len(options):
            raise UserError(
                f"the answer {answer!r} is not the number or letter of any of the {len(options)} options; if it is the "
                'text of one, set answer_as = "text"'
            )
        return number

    def demonstrated(
        self, item: dict[str, Any], option: str | None = None, answer_item: dict[str, Any] | None = None
    ) -> str:
        """Returns a demonstration: an item with its answer, another `option`, or the answer of `answer_item`."""
        if self.kind == "choice":
            options = self.options_of(item)
            variant = item | {"option": options[self.answer_of(item, options)] if option is None else option}
            return filled(self.context, variant) + filled(self.continuation, variant) + self.separator
        answer = filled(self.demonstration or self.answer, answer_item or item)
        return filled(self.context, item) + answer + self.separator

    def is_right(self, text: str, question: Question) -> bool:
        """Returns whether a generated text is the question's answer.

        Case, white space, a final full stop and commas between thousands are ignored.
        """
        if self.extract:
            matches = list(re.finditer(self.extract, text))
            text = matches[-1][matches[-1].lastindex or 0] if matches else ""
        texts = [THOUSANDS.sub("", each.lower()) for each in (text, question.continuations[0])]
        texts = [" ".join(each.split()) for each in texts]
        plain = [each.rstrip(" .") or each for each in texts]  # a full stop alone stays
        return plain[0] == plain[1]


KIND_OF: dict[str, str] = dict.fromkeys(
    ("options", "continuation", "answer_as", "answer_from", "normalise", "unconditional"), "choice"
)
KIND_OF |= {"stop_word_filter": "cloze"} | dict.fromkeys(
    ("stop", "extract", "max_new_tokens", "sentences", "top_k", "num_beams", "length_penalty", "metric"),
    "generate",
)


def all_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def looked_up(path: str, item: dict[str, Any]) -> Any:
    """Returns the entry of `item` at a dotted path. Raises UserError listing the entries if it is missing."""
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
            entries = hint or f": it has {', '.join(value)}" if isinstance(value, dict) else ""
            raise UserError(f"an item has no {path}{entries}")
    return value


def filled(template: str, item: dict[str, Any]) -> str:
    """Returns the template with its placeholders replaced by entries of the item. Raises UserError."""

    def entry(match: re.Match) -> str:
        value = looked_up(match[1], item)
        if isinstance(value, (dict, list)) or value is None or value != value:
            raise UserError(f"{{{match[1]}}} = {json.dumps(value)[:60]} is not a text or a number")
        return str(value)

    return PLACEHOLDER.sub(entry, template)


def known_tasks() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_task(name: str) -> Task:
    """Returns the task of tasks/NAME.toml or of the file NAME. Raises UserError for an unknown or invalid one."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.exists():
        near = difflib.get_close_matches(name, known_tasks(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known_tasks())}"
        raise UserError(f"there is no task {name}; {hint}")
    values = read_file(Task, path)
    if "name" in values:
        raise UserError(f"{path}: there is no setting name: a task has the name of its file")
    try:
        return Task(path.stem, **values)
    except ValueError as error:
        raise UserError(f"{path}: {mistake(error, Task)}") from None
