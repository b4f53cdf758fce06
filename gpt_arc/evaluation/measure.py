"""Measures a model on tasks and texts: what stages/eval.py does with each model.

task_items = gather(task, shots=(0, 4), seed=0)
results = measure_task(task_items, reader, shots=(0, 4), seed=0)
figures = measure_text("wiki.test.tokens", reader, stride=512, detokenizer="wikitext")
"""

import hashlib
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt_arc.data import contamination
from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.data.documents import Files, find_files, read_text
from gpt_arc.errors import UserError
from gpt_arc.evaluation.detokenize import DETOKENIZERS
from gpt_arc.evaluation.items import demonstrations, load_items, prepared_items, with_images
from gpt_arc.evaluation.metrics import item_values, summary
from gpt_arc.evaluation.reader import Reader
from gpt_arc.evaluation.score import rolling_windows, score_continuations
from gpt_arc.evaluation.statistics import paired_p_value
from gpt_arc.evaluation.tasks import Question, Task, filled


class Overlap(NamedTuple):
    """Which of a task's items the training text contains."""

    words: int  # length of the compared word sequences
    dirty: list[bool]  # for each item


class TaskItems(NamedTuple):
    """A task with its items, the pool of demonstrations, and the indices of the items to answer."""

    task: Task
    raw: list[dict[str, Any]]  # the items as the data set has them
    items: list[dict[str, Any]]  # the same, with the columns that the task's templates name
    pool: list[dict[str, Any]]
    selected: list[int]
    overlap: Overlap | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of the raw items."""
        return hashlib.sha256(json.dumps(self.raw, default=str).encode()).hexdigest()


@dataclass
class Result:
    """One figure of a task, with the values behind it."""

    task: str
    shots: int
    metric: str
    value: float
    standard_error: float
    items: int
    p_value: float | None = None  # of the difference from the first shot count
    values: list[Any] = field(default_factory=list, repr=False)  # one for each item; for BLEU see `bleu_counts`
    overlap: dict[str, Any] | None = None  # with training text: words compared, figures of clean and of dirty items
    chance: float | None = None  # of a choice: the accuracy of guessing


def gather(
    task: Task,
    shots: Sequence[int],
    seed: int,
    data: Path | None = None,
    train_data: Path | None = None,
    limit: int | None = None,
) -> TaskItems:
    """Reads the task's items, and those of its train split if demonstrations come from there. Raises UserError."""
    if task.image and (any(shots) or data is None):
        raise UserError(f"{task.name} asks about images: name the file of items by --data, and leave shots out")
    raw = load_items(task, "test", data, seed, limit)
    items = pool = prepared_items(task, raw)
    if task.image and data is not None:
        items = pool = with_images(task, items, data.parent)
    if any(shots) and (train_data or ((task.generator or task.train) and not data)):
        pool = prepared_items(task, load_items(task, "train", train_data, seed))
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return TaskItems(task, raw, items, pool, sorted(order[:limit]))


def with_overlap(tasks: Sequence[TaskItems], training_text: Sequence[str]) -> list[TaskItems]:
    """Returns the tasks with the overlap of their items with the training text, which is read once. Raises UserError.

    Generated items are left out.
    """
    documents = Files(find_files(training_text), "text")
    if all(task_items.task.generator for task_items in tasks):
        raise UserError("training_text can't contain the items of these tasks, which are generated: leave it out")
    overlaps: dict[int, Overlap] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {i: Path(folder) / f"{i}.jsonl" for i, entry in enumerate(tasks) if not entry.task.generator}
        for i, path in paths.items():
            path.write_text("".join(json.dumps(item, default=str) + "\n" for item in tasks[i].raw), "utf-8")
        output = Path(folder) / "overlap.jsonl"
        report = contamination.measure(documents, contamination.read_items(paths.values()), output, ["gpt3"])
        lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    for (i, path), entry in zip(paths.items(), report["files"]):
        dirty = [line["gpt3_dirty"] for line in lines if line["file"] == str(path)]
        overlaps[i] = Overlap(entry["gpt3"]["words"], dirty)
    return [task_items._replace(overlap=overlaps.get(i)) for i, task_items in enumerate(tasks)]


def prompts_of(task_items: TaskItems, shots: int, seed: int, shuffled: bool) -> Iterator[tuple[Question, str]]:
    """Yields the question of each selected item with the description and demonstrations that come before it."""
    task = task_items.task
    for number in task_items.selected:
        item = task_items.items[number]
        try:
            shown = demonstrations(task, task_items.pool, number, shots, seed, shuffled, item)
            question = task.question(item)
            if not all(question.continuations):
                raise UserError("the answer or an option is empty")
            yield question._replace(place=f"item {number + 1}"), filled(task.description, item) + shown
        except UserError as error:
            raise UserError(f"{task.name}, item {number + 1}: {error}") from None


def overlap_figures(task_items: TaskItems, metric: str, values: Sequence[Any]) -> dict[str, Any] | None:
    """Returns the figures of the clean and of the dirty items; None without training text."""
    overlap = task_items.overlap
    if overlap is None:
        return None
    figures: dict[str, Any] = {"words": overlap.words}
    for name, dirty in (("clean", False), ("dirty", True)):
        part = [value for number, value in zip(task_items.selected, values) if overlap.dirty[number] == dirty]
        value, error = summary(metric, part) if part else (None, None)
        figures[name] = {"value": value, "standard_error": error, "items": len(part)}
    return figures


def measure_task(
    task_items: TaskItems, reader: Reader, shots: Sequence[int], seed: int, shuffled: bool = False
) -> list[Result]:
    """Returns the figures of a task for each number of shots. Raises UserError."""
    task, results = task_items.task, []
    for count in shots:
        questions = list(prompts_of(task_items, count, seed, shuffled))
        sizes = [len(question.continuations) for question, _ in questions]
        chance = statistics.fmean(1 / size for size in sizes) if task.kind == "choice" else None
        for metric, values in item_values(task, reader, questions, seed).items():
            value, error = summary(metric, values)
            first = next((result for result in results if result.metric == metric), None)
            paired = metric in ("accuracy", "exact match")
            p_value = paired_p_value(first.values, values) if paired and first is not None else None
            overlap = overlap_figures(task_items, metric, values)
            results.append(
                Result(task.name, count, metric, value, error, len(values), p_value, values, overlap, chance)
            )
    return results


def measure_text(text_or_dataset: str, reader: Reader, stride: int | None, detokenizer: str) -> dict[str, float]:
    """Returns perplexity and bits of a text file or of a prepared dataset's val split. Raises UserError.

    Words, characters and bytes are counted before detokenization.
    """
    path, tokenizer = Path(text_or_dataset), reader.tokenizer
    if path.is_file():
        original = read_text(path)
        text = DETOKENIZERS[detokenizer](original)
        tokens = tokenizer.encode(text)
    else:
        corpus = open_corpus((Source(text_or_dataset, 1.0),))
        if corpus is None:
            raise UserError(f"{text_or_dataset} is neither a file nor a prepared dataset")
        if corpus.tokenizer != tokenizer:
            raise UserError(
                f"{text_or_dataset} was prepared with another tokenizer than the model's: name the text file instead"
            )
        split = corpus.split("val", 1, reader.model.config.vocab_size, False)  # may be shorter than the context
        tokens = split.read(0, len(split)).tolist()
        original = tokenizer.decode(tokens)
    if not tokens:
        raise UserError(f"{text_or_dataset} is empty")
    block_size = reader.model.config.block_size
    if stride and stride > block_size:
        raise UserError(f"stride = {stride} is more than the model's context, {block_size}")
    windows = rolling_windows(tokens, tokenizer.start_token, block_size, stride)
    scores = score_continuations(reader.model, windows, reader.batch_tokens, progress=text_or_dataset)
    nats = -math.fsum(score.log_probability for score in scores)
    words = max(len(original.split()), 1)
    return {
        "tokens": len(tokens),
        "nats a token": nats / len(tokens),
        "perplexity": math.exp(min(nats / len(tokens), 700.0)),
        "bits a byte": nats / math.log(2) / len(original.encode()),
        "bits a character": nats / math.log(2) / len(original),
        "word perplexity": math.exp(min(nats / words, 700.0)),
    }
