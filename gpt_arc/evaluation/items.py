"""The items of a task: read, prepared or generated, and demonstrations among them."""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_arc.data.json_lines import parse_line
from gpt_arc.errors import UserError, first_line
from gpt_arc.evaluation.detokenize import penn_treebank
from gpt_arc.evaluation.tasks import Task, looked_up
from gpt_arc.extras import import_extra

POSSESSIVES = {"my", "his", "her", "our", "their"}
NOT_NAMES = {"A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their"}  # lower case within a sentence


def _cbt(item: dict[str, Any]) -> dict[str, Any]:
    """`before` and `after` the blank, XXXXX, of the last sentence: running text, as GPT-2's authors made it."""

    def running(text: str) -> str:
        for token, sign in (("`` ", '"'), (" ''", '"'), ("` ", "'"), ("-LRB- ", "("), (" -RRB-", ")")):
            text = text.replace(token, sign)
        return penn_treebank(text)

    before, blank, after = running(item["question"]).partition("XXXXX")
    if not blank:
        raise UserError("its question has no blank, XXXXX")
    return item | {"before": f"{running(' '.join(item['sentences']))} {before}", "after": after}


def _copa(item: dict[str, Any]) -> dict[str, Any]:
    """The premise with because or therefore in its full stop's place, and the choices as the rest of the sentence."""
    word = {"cause": "because", "effect": "therefore"}[item["question"]]
    choices = {name: item[name][:1].lower() + item[name][1:] for name in ("choice1", "choice2")}
    return item | choices | {"premise": f"{item['premise'].strip().removesuffix('.')} {word}"}


def _gsm8k(item: dict[str, Any]) -> dict[str, Any]:
    """The `reasoning` in a line, without the calculator's notes <<...>>, and the `result`, without commas."""
    reasoning, _, result = item["answer"].rpartition("####")
    reasoning = " ".join(re.sub(r"<<[^>]*>>", "", reasoning).split())
    return item | {"reasoning": reasoning, "result": result.strip().replace(",", "")}


def _winograd(item: dict[str, Any]) -> dict[str, Any]:
    """`before` and `after` the pronoun, and options that fit into its place.

    As in EleutherAI's lm-evaluation-harness: 's for a possessive, an article or pronoun in lower case but where a
    sentence begins, single spaces.
    """
    at = item["pronoun_loc"]
    before, after = (
        re.sub("  +", " ", part) for part in (item["text"][:at], item["text"][at + len(item["pronoun"]) :])
    )
    options = []
    for option in item["options"]:
        first = option.split()[0]
        if first in NOT_NAMES and before.rstrip() and not before.rstrip().endswith((".", "!", "?")):
            option = first.lower() + option[len(first) :]
        options.append(option + ("'s" if item["pronoun"].lower() in POSSESSIVES else ""))
    return item | {"before": before, "after": after, "options": options}


PREPARATIONS = {"cbt": _cbt, "copa": _copa, "gsm8k": _gsm8k, "winograd": _winograd}


def prepared_items(task: Task, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as the task's `prepare` makes them. Raises UserError naming one that isn't of the schema."""
    found = []
    for number, item in enumerate(items, start=1):
        try:
            found.append(PREPARATIONS[task.prepare](item) if task.prepare else item)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            lacks = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
            raise UserError(f"{task.name}, item {number} is none that {task.prepare} knows: {lacks}") from None
        except UserError as error:
            raise UserError(f"{task.name}, item {number}: {error}") from None
    return found


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
    load_dataset = import_extra("datasets").load_dataset
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
            items = import_extra("pyarrow.parquet").read_table(path).to_pylist()
        except (OSError, import_extra("pyarrow").ArrowException) as error:
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
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items.append(parse_line(line, f"{path}, line {number}"))
            if not isinstance(items[-1], dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
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
    task: Task, pool: Sequence[dict[str, Any]], number: int, shots: int, seed: int, shuffled: bool,
    asked: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """`shots` items of the pool as text, drawn by the seed for the item `number`, which is never among them.

    Where the task has a group they are of that of the item `asked`.

    `shuffled` gives each a random option, or another item's answer: a control for what the format alone teaches
    (Min et al., arXiv:2202.12837). Raises UserError where there are too few, or naming one that lacks something. A pool
    of other items than those asked has numbers of its own, so there the item of this number is left out in vain.
    """
    places, among = range(len(pool)), ""
    if task.group and asked is not None and shots:
        group = looked_up(task.group, asked)
        places = [i for i, item in enumerate(pool) if looked_up(task.group, item) == group]
        among = f" of {task.group} = {json.dumps(group)}"
    if shots >= len(places):
        raise UserError(f"{shots} demonstrations can't be drawn from {len(places)} items{among}, one left out")
    chance = random.Random(f"{seed} {number}")
    texts = []
    for i in [i for i in chance.sample(places, shots + 1) if i != number][:shots]:
        try:
            answer = chance.choice(task.options_of(pool[i])) if shuffled and task.kind == "choice" else None
            of = None
            if shuffled and task.kind != "choice":
                others = [place for place in places if place != i]
                of = pool[others[chance.randrange(len(others))]]
            texts.append(task.demonstrated(pool[i], answer, of))
        except UserError as error:
            raise UserError(f"item {i + 1} as a demonstration: {error}") from None
    return "".join(texts)
