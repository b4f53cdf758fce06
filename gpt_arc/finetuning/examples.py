"""Labelled examples, and GPT-1's input transformations, which turn each into one or more sequences of tokens.

    examples = read_examples(Path("train.jsonl"), "entailment", Columns(text_a="premise", text_b="hypothesis"))
    sequences, cut = sequences_of(examples[0], "entailment", tokenizer, SpecialTokens.after(50257), max_tokens=512)

The layouts (Radford et al. 2018, figure 1):

    classification    [start] text [extract]
    entailment        [start] premise [delimiter] hypothesis [extract]
    similarity        [start] text [delimiter] text [extract], in both orders: two sequences
    multiple_choice   [start] context [delimiter] option [extract], one sequence per option
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt_arc.data.json_lines import parse_as
from gpt_arc.data.rows import missing_column, parsed_rows, shown, text_of
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.errors import UserError
from gpt_arc.nn.names import TaskKind


@dataclass(frozen=True)
class Columns:
    """Names of a file's columns; None where the task has no such column."""

    text_a: str
    text_b: str | None = None
    options: tuple[str, ...] = ()  # several columns, or one column of lists
    label: str = "label"

    @classmethod
    def usual(cls, task: TaskKind) -> "Columns":
        """Returns the default names."""
        return {
            "classification": cls("text"),
            "entailment": cls("premise", "hypothesis"),
            "similarity": cls("text_a", "text_b"),
            "multiple_choice": cls("context", options=("options",)),
        }[task]


class Example(NamedTuple):
    """One row: the texts of the task, and the label as written in the file, None if it is missing."""

    texts: tuple[str, ...]  # text; premise, hypothesis; the two texts; context, first option, second option ...
    label: str | None
    place: str  # file and line, for messages


class SpecialTokens(NamedTuple):
    """Ids of GPT-1's three special tokens."""

    start: int
    delimiter: int
    extract: int

    @classmethod
    def after(cls, vocab_size: int) -> "SpecialTokens":
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)


def read_examples(path: Path, task: TaskKind, columns: Columns, labelled: bool = True) -> list[Example]:
    """Reads the examples of a file, see `data.rows`; the first line of a .csv or .tsv names its columns.

    Without `labelled`, labels are ignored and None. Raises UserError naming file and line of the first bad row, and the
    number of further ones.
    """
    return parsed_rows(path, lambda row, place: _example(row, task, columns, labelled, place))


def _example(row: dict[str, Any], task: TaskKind, columns: Columns, labelled: bool, place: str) -> Example:
    """Parses a row. Raises ValueError saying what is wrong with it."""
    first = text_of(row, columns.text_a)
    if task == "multiple_choice":
        context = first if columns.text_b is None else f"{first} {text_of(row, columns.text_b)}"
        texts = (context, *_options(row, columns.options))
    else:
        texts = (first,) if task == "classification" else (first, text_of(row, columns.text_b or "text_b"))
    if not labelled:
        return Example(texts, None, place)
    value = row.get(columns.label)
    if value is None or isinstance(value, str) and not value.strip():
        raise ValueError(missing_column(row, columns.label))
    if isinstance(value, bool):
        value = json.dumps(value)
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{columns.label} = {shown(value)} is neither a text nor a number")
    whole = isinstance(value, float) and value.is_integer()
    label = str(int(value) if whole else value).strip()
    if task == "multiple_choice":
        label = str(_option_number(label, texts[1:], columns.options))
    return Example(texts, label, place)


def _options(row: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    column, *others = columns
    if others:
        return [text_of(row, name) for name in columns]
    value = row.get(column)
    if isinstance(value, str):  # a .csv holds the list as JSON
        parsed = parse_as(list, value)
        value = value if parsed is None else parsed
    if value is None:
        raise ValueError(missing_column(row, column))
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(option, str) for option in value):
        raise ValueError(f"{column} = {shown(value)} is not a list of two texts or more")
    return value


def _option_number(label: str, options: Sequence[str], columns: tuple[str, ...]) -> int:
    """Returns the number from 0 of the option that a label means.

    A label is a number from 0, a letter from A, a column's name or the text of an option.
    """
    if re.fullmatch(r"\d+", label):
        number = int(label)
    elif len(label) == 1 and label.isascii() and label.isalpha():
        number = ord(label.upper()) - ord("A")
    elif len(columns) > 1 and label in columns:
        number = columns.index(label)
    else:
        number = options.index(label) if label in options else len(options)
    if number >= len(options):
        raise ValueError(
            f"the label {label!r} means none of the {len(options)} options: it is a number from 0, a letter from A, a "
            "column's name or the text of an option"
        )
    return number


def classes_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """Returns the distinct labels, sorted as numbers if they all are numbers, otherwise alphabetically."""
    labels = {example.label for example in examples if example.label is not None}
    try:
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def label_number(example: Example, classes: Sequence[str]) -> int:
    """Returns the number of the label in `classes`, -1 without a label. Raises UserError for an unknown label."""
    if example.label is None:
        return -1
    if example.label not in classes:
        shown = ", ".join(classes[:10]) + (" ..." if len(classes) > 10 else "")
        raise UserError(f"{example.place}: the label {example.label!r} is not one of the classes trained on: {shown}")
    return classes.index(example.label)


def label_value(example: Example) -> float:
    """Returns the label as a number, NaN without a label. Raises UserError if it is not a finite number."""
    try:
        value = math.nan if example.label is None else float(example.label)
    except ValueError:
        value = math.inf
    if math.isinf(value) or math.isnan(value) and example.label is not None:
        raise UserError(f"{example.place}: the label {example.label!r} is not a number")
    return value


def fitted(segments: Sequence[list[int]], room: int) -> list[list[int]]:
    """Cuts tokens off the end of the longest segment (the last of equals) until all fit into `room` tokens together."""
    lengths = [len(segment) for segment in segments]
    while sum(lengths) > room:
        longest = max(range(len(lengths)), key=lambda i: (lengths[i], i))
        lengths[longest] -= 1
    return [segment[:length] for segment, length in zip(segments, lengths)]


def sequences_of(
    example: Example, task: TaskKind, tokenizer: Tokenizer, special: SpecialTokens, max_tokens: int
) -> tuple[list[list[int]], bool]:
    """Returns an example's sequences of at most `max_tokens` ids, and whether any was cut.

    Raises UserError for a character missing from the vocabulary.
    """
    try:
        encoded = [tokenizer.encode(text) for text in example.texts]
    except UserError as error:
        raise UserError(f"{example.place}: {error}") from None
    match task:
        case "classification":
            layouts = [encoded]
        case "entailment":
            layouts = [encoded]
        case "similarity":
            layouts = [encoded, encoded[::-1]]
        case "multiple_choice":
            layouts = [[encoded[0], option] for option in encoded[1:]]
    sequences, cut = [], False
    for segments in layouts:
        kept = fitted(segments, max_tokens - 1 - len(segments))
        cut |= kept != segments
        sequence = [special.start]
        for i, segment in enumerate(kept):
            sequence += segment if i == 0 else [special.delimiter, *segment]
        sequences.append([*sequence, special.extract])
    return sequences, cut
