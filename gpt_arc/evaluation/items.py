"""The items of a task: reading, preparing and generating them, and drawing demonstrations."""

import hashlib
import json
import logging
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
from gpt_arc.tables import counted
from gpt_arc.vision.images import image_path

POSSESSIVES = {"my", "his", "her", "our", "their"}
NOT_NAMES = {"A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their"}  # lower case within a sentence


def _cbt(item: dict[str, Any]) -> dict[str, Any]:
    """Adds the running text `before` and `after` the blank, XXXXX, detokenized as by GPT-2's authors."""

    def detokenized(text: str) -> str:
        for token, sign in (("`` ", '"'), (" ''", '"'), ("` ", "'"), ("-LRB- ", "("), (" -RRB-", ")")):
            text = text.replace(token, sign)
        return penn_treebank(text)

    before, blank, after = detokenized(item["question"]).partition("XXXXX")
    if not blank:
        raise UserError("the question has no blank, XXXXX")
    return item | {"before": f"{detokenized(' '.join(item['sentences']))} {before}", "after": after}


def _copa(item: dict[str, Any]) -> dict[str, Any]:
    """Replaces the premise's full stop by "because" or "therefore", and lower-cases the choices that follow it."""
    word = {"cause": "because", "effect": "therefore"}[item["question"]]
    choices = {name: item[name][:1].lower() + item[name][1:] for name in ("choice1", "choice2")}
    return item | choices | {"premise": f"{item['premise'].strip().removesuffix('.')} {word}"}


def _gsm8k(item: dict[str, Any]) -> dict[str, Any]:
    """Adds the `reasoning` on one line without the calculator annotations <<...>>, and the `result` without commas."""
    reasoning, _, result = item["answer"].rpartition("####")
    reasoning = " ".join(re.sub(r"<<[^>]*>>", "", reasoning).split())
    return item | {"reasoning": reasoning, "result": result.strip().replace(",", "")}


def _winograd(item: dict[str, Any]) -> dict[str, Any]:
    """Adds the text `before` and `after` the pronoun, and fits the options into its place.

    As in EleutherAI's lm-evaluation-harness: 's replaces a possessive, an article or pronoun is in lower case except at
    the start of a sentence, and spaces are single.
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
    """Returns the items with the columns that the task's `prepare` adds. Raises UserError naming a malformed item."""
    prepared = []
    for number, item in enumerate(items, start=1):
        try:
            prepared.append(PREPARATIONS[task.prepare](item) if task.prepare else item)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            lacks = f"there is no {error}" if isinstance(error, KeyError) else first_line(error)
            raise UserError(
                f"{task.name}, item {number} does not have the columns of {task.prepare}: {lacks}"
            ) from None
        except UserError as error:
            raise UserError(f"{task.name}, item {number}: {error}") from None
    return prepared


def with_images(task: Task, items: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Returns the items with the paths of the images they name, in `folder`. Raises UserError naming a bad item."""
    located = []
    for number, item in enumerate(items, start=1):
        try:
            located.append(item | {task.image: str(image_path(folder, item.get(task.image)))})
        except ValueError as error:
            raise UserError(f"{task.name}, item {number}: {error}") from None
    return located


def load_items(task: Task, split: str, local: Path | None, seed: int, count: int | None = None) -> list[dict[str, Any]]:
    """Returns the items of a task's split, "test" or "train": from the file `local`, its generator or the hub.

    Raises UserError if they are not available.
    """
    if local is not None:
        return _local_items(local)
    if task.generator:
        return arithmetic(task.generator, count or 2000, seed, split)
    if not task.hub:
        raise UserError(f"{task.name} names no data set: give a file of items with --data")
    load_dataset = import_extra("datasets").load_dataset
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
    name = task.test if split == "test" else task.train
    try:
        return list(load_dataset(task.hub, task.subset or None, split=name))
    except Exception as error:  # every library between here and the network raises its own
        raise UserError(
            f"{task.name}: can't load {task.hub} from the Hugging Face hub: connect once, or give a file with --data "
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
    """Generates GPT-3's arithmetic questions (Brown et al. 2020, 3.9.1): numbers uniform in [0, 10^D) for D digits.

    A hash assigns a tenth of all pairs of numbers to the demonstrations, so that none of these is ever a question.
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
    target: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """Returns `shots` items of the pool as text, drawn by the seed for item `number`, which is never among them.

    If the task has a group, they come from the group of that item, `target`.

    `shuffled` gives each a random option, or another item's answer: a control for what the format alone teaches.
    Large models lose little by it (Min et al., arXiv:2202.12837), the small one of docs/results/in_context.md loses
    everything.
    Raises UserError if there are too few items, or for one that lacks a column. A pool that is not the items to
    answer also leaves out its item `number`, which is harmless.
    """
    places, condition = range(len(pool)), ""
    if task.group and target is not None and shots:
        group = looked_up(task.group, target)
        places = [i for i, item in enumerate(pool) if looked_up(task.group, item) == group]
        condition = f" with {task.group} = {json.dumps(group)}"
    if shots >= len(places):
        pool_size = f"{counted(len(places), 'item')}{condition}"
        raise UserError(f"can't draw {counted(shots, 'demonstration')} from {pool_size}, one of them left out")
    rng = random.Random(f"{seed} {number}")
    texts = []
    for i in [i for i in rng.sample(places, shots + 1) if i != number][:shots]:
        try:
            option = rng.choice(task.options_of(pool[i])) if shuffled and task.kind == "choice" else None
            answer_item = None
            if shuffled and task.kind != "choice":
                others = [place for place in places if place != i]
                answer_item = pool[others[rng.randrange(len(others))]]
            texts.append(task.demonstrated(pool[i], option, answer_item))
        except UserError as error:
            raise UserError(f"item {i + 1} as a demonstration: {error}") from None
    return "".join(texts)
