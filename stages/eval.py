"""Measure what a model knows without being taught: perplexity, and tasks with no, one or a few examples in the prompt.

    python stages/eval.py gpt2 --tasks lambada hellaswag                      of the Hugging Face hub
    python stages/eval.py out/gpt2 --tasks mine.toml --data mine.jsonl        a task and items of your own
    python stages/eval.py out/gpt2 --tasks addition_2 --shots 0 1 4 16        demonstrations drawn from its train split
    python stages/eval.py out/gpt2 --tasks sst2 --shots 4 --shuffled_answers=True        a control: random answers
    python stages/eval.py gpt2 --perplexity wiki.test.tokens --detokenizer wikitext --stride 512
    python stages/eval.py out/quickstart --perplexity python_manual           the val split of a prepared dataset
    python stages/eval.py out/gpt2 --tasks hellaswag --checkpoints=True       each checkpoint of a run

tasks/ has the tasks: `gpt_arc/tasks.py` tells what such a file holds. A figure comes with its standard error, with
demonstrations also with the probability (McNemar's exact test) of such a difference to the first number of shots if
there were none. `--json FILE` has all figures, with the hashes of weights and items, seeds and versions.
"""

import hashlib
import importlib.metadata
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro

from gpt_arc import data, runtime
from gpt_arc.checkpoint import load_model, model_directory
from gpt_arc.config import Source
from gpt_arc.detokenize import DETOKENIZERS
from gpt_arc.documents import read_text
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import write_file
from gpt_arc.finetuning import table
from gpt_arc.flags import parse_flags
from gpt_arc.generate import generate
from gpt_arc.sampling import Sampling
from gpt_arc.score import Request, Score, encode_pair, rolling_windows, score_continuations
from gpt_arc.tasks import (
    Question,
    Task,
    demonstrations,
    filled,
    load_items,
    load_task,
    paired_p_value,
    standard_error,
)
from gpt_arc.text_stream import TextStream
from gpt_arc.tokenizer import Tokenizer
from model import GPT


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str]
    """A run folder, a model directory, or a published model: gpt2, openai-gpt, hf:OWNER/NAME."""
    tasks: tuple[str, ...] = ()
    """Tasks by name, or files (.toml) of your own."""
    shots: tuple[int, ...] = (0,)
    """Numbers of demonstrations, each measured."""
    data: Path | None = None
    """The items of the task, .jsonl or .parquet, in the place of the hub's."""
    train_data: Path | None = None
    """Items to draw demonstrations from. None: the hub's train split; with data, the other items asked."""
    limit: int | None = None
    """Ask so many items at most, drawn by the seed."""
    shuffled_answers: bool = False
    """Demonstrations with random answers: what the format alone teaches."""
    perplexity: tuple[str, ...] = ()
    """Texts (files), or prepared datasets, whose val split is taken."""
    stride: int | None = None
    """New tokens of each window after a text's first; the rest of the window is context. None: the whole window."""
    detokenizer: Literal["none", "wikitext", "ptb"] = "none"
    """What makes running text of a benchmark's separated words; words are counted before."""
    checkpoints: bool = False
    """Measure each checkpoint of the run folder."""
    batch_tokens: int = 8192
    """Tokens that are read at once, padding included."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. auto: what the hardware multiplies fastest; figures then depend on the machine."""
    seed: int = 0
    """Draws items and demonstrations."""
    json: Path | None = None
    """A file for the results."""

    def __post_init__(self):
        if any(shots < 0 for shots in self.shots) or not self.shots:
            raise ValueError(f"shots = {self.shots} must be numbers of 0 or more")
        for name in ("limit", "stride", "batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.data and len(self.tasks) != 1:
            raise ValueError("data holds the items of one task: name one")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} must be at least 0")


class Reader(NamedTuple):
    """A model at work."""

    model: GPT
    tokenizer: Tokenizer
    batch_tokens: int

    def score(self, texts: Sequence[tuple[str, str]], what: str) -> list[Score]:
        """Log-probabilities of second texts after first ones. Raises UserError where one is empty or too long."""
        requests = [Request(*encode_pair(self.tokenizer, *pair)) for pair in texts]
        try:
            return score_continuations(self.model, requests, self.batch_tokens, progress=what)
        except ValueError as error:
            raise UserError(f"{what}: {error}") from None

    def answer(self, prompt: str, task: Task) -> str:
        """What greedy decoding says up to one of the task's stops."""
        context = self.model.config.block_size
        tokens = (self.tokenizer.encode(prompt) or [self.tokenizer.start_token])[
            -max(context - task.max_new_tokens, 1) :
        ]
        stream = TextStream(self.tokenizer, tokens)

        def stopped(row: int, token: int) -> bool:
            stream.push(token)
            return stream.ended or any(stop in stream.text for stop in task.stop)

        for _ in generate(self.model, [tokens], task.max_new_tokens, Sampling(temperature=0), stopped=stopped):
            pass
        stream.end()
        return re.split("|".join(map(re.escape, task.stop)), stream.text)[0] if task.stop else stream.text


@dataclass
class Result:
    """One figure, with what it rests on."""

    task: str
    shots: int
    metric: str
    value: float
    standard_error: float
    items: int
    p_value: float | None = None  # of the difference to the first number of shots
    values: list[float] = field(default_factory=list, repr=False)  # of the items


def prompts_of(
    task: Task, options: Options, shots: int, asked: Sequence[int], items: list, pool: list
) -> Iterator[tuple]:
    """For each item asked, its question and what stands before it."""
    for number in asked:
        try:
            shown = demonstrations(task, pool, number, shots, options.seed, options.shuffled_answers)
            question = task.question(items[number])
            if not all(question.continuations):
                raise UserError("the answer or an option is empty")
            yield question, filled(task.description, items[number]) + shown
        except UserError as error:
            raise UserError(f"{task.name}, item {number + 1}: {error}") from None


def choose(task: Task, reader: Reader, questions: list[tuple[Question, str]]) -> list[float]:
    """Whether the best option of each question is the right one, the first of equals counting."""
    pairs = [
        (before + c, o) for question, before in questions for c, o in zip(question.contexts, question.continuations)
    ]
    scores = reader.score(pairs, task.name)
    merits = [score.log_probability for score in scores]
    if task.normalise == "token":
        merits = [merit / score.tokens for merit, score in zip(merits, scores)]
    elif task.normalise == "byte":
        merits = [merit / len(option.encode()) for merit, (_, option) in zip(merits, pairs)]
    elif task.normalise == "unconditional":
        alone = reader.score([(task.unconditional, option) for _, option in pairs], f"{task.name}, unconditional")
        merits = [merit - score.log_probability for merit, score in zip(merits, alone)]
    right, start = [], 0
    for question, _ in questions:
        own = merits[start : start + len(question.contexts)]
        right.append(float(own.index(max(own)) == question.answer))
        start += len(own)
    return right


def measure(task: Task, reader: Reader, options: Options) -> tuple[list[Result], str]:
    """The figures of a task for each number of shots, and a hash of its items. Raises UserError."""
    items = load_items(task, "test", options.data, options.seed, options.limit)
    pool = items
    if any(options.shots) and (options.train_data or ((task.generator or task.train) and not options.data)):
        pool = load_items(task, "train", options.train_data, options.seed)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(options.seed)).tolist()
    asked = sorted(order[: options.limit])
    results: list[Result] = []
    for shots in options.shots:
        questions = list(prompts_of(task, options, shots, asked, items, pool))
        if task.kind == "choice":
            figures = {"accuracy": choose(task, reader, questions)}
        elif task.kind == "cloze":
            scores = reader.score([(before + q.contexts[0], q.continuations[0]) for q, before in questions], task.name)
            figures = {
                "accuracy": [float(score.is_greedy) for score in scores],
                "perplexity": [-score.log_probability for score in scores],
            }
        else:
            answers = (reader.answer(before + question.contexts[0], task) for question, before in questions)
            figures = {"exact match": [float(task.is_right(said, q)) for said, (q, _) in zip(answers, questions)]}
        for metric, values in figures.items():
            value, error = sum(values) / len(values), standard_error(values)
            if metric == "perplexity":  # the error of a mean, through the exponential
                value = math.exp(min(value, 700.0))
                error *= value
            first = next((r for r in results if r.metric == metric), None)
            p_value = None if first is None or metric == "perplexity" else paired_p_value(first.values, values)
            results.append(Result(task.name, shots, metric, value, error, len(values), p_value, values))
    return results, hashlib.sha256(json.dumps(items, default=str).encode()).hexdigest()


def read(text_or_dataset: str, reader: Reader, options: Options) -> dict[str, float]:
    """Perplexity and bits of a text or of a prepared val split. Raises UserError."""
    path, tokenizer = Path(text_or_dataset), reader.tokenizer
    if path.is_file():
        original = read_text(path)
        text = DETOKENIZERS[options.detokenizer](original)
        tokens = tokenizer.encode(text)
    else:
        corpus = data.open_corpus((Source(text_or_dataset, 1.0),))
        if corpus is None:
            raise UserError(f"there is neither a file {text_or_dataset} nor a prepared dataset of that name")
        if corpus.tokenizer != tokenizer:
            raise UserError(f"{text_or_dataset} was prepared with another tokenizer than the model's: name its text")
        split = corpus.split("val", 1, reader.model.config.vocab_size, False)  # shorter than the context is fine
        tokens = split.read(0, len(split)).tolist()
        original = tokenizer.decode(tokens)
    if not tokens:
        raise UserError(f"{text_or_dataset} is empty")
    if options.stride and options.stride > reader.model.config.block_size:
        raise UserError(f"stride = {options.stride} is more than the model's context, {reader.model.config.block_size}")
    windows = rolling_windows(tokens, tokenizer.start_token, reader.model.config.block_size, options.stride)
    scores = score_continuations(reader.model, windows, reader.batch_tokens, progress=text_or_dataset)
    nats = -math.fsum(score.log_probability for score in scores)
    words = max(len(original.split()), 1)
    return {
        "tokens": len(tokens),
        "nats a token": nats / len(tokens),
        "perplexity": math.exp(nats / len(tokens)),
        "bits a byte": nats / math.log(2) / len(original.encode()),
        "bits a character": nats / math.log(2) / len(original),
        "word perplexity": math.exp(min(nats / words, 700.0)),
    }


def model_directories(options: Options) -> list[Path]:
    """What to measure: the model, or each checkpoint of a run, in their order. Raises UserError."""
    if not options.checkpoints:
        return [model_directory(options.model)]
    found = sorted(path.parent for path in Path(options.model).glob("step-*/config.json"))
    if not found:
        raise UserError(
            f"{options.model} is no run folder with checkpoints; train.py keeps them all by --keep_all_checkpoints"
        )
    return found


def weight_hash(directory: Path) -> str:
    """SHA-256 of a model directory's weights."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if not options.tasks and not options.perplexity:  # told here: a misspelled flag comes first
        raise UserError("there is nothing to do: name --tasks or --perplexity")
    if options.json and not options.json.parent.is_dir():  # told before hours of work
        raise UserError(f"there is no folder {options.json.parent} for the results: make it, or name another by --json")
    tasks = [load_task(name) for name in options.tasks]
    device = runtime.resolve_device(options.device)
    dtype = runtime.DTYPES[runtime.resolve_dtype(options.dtype, device)]
    report: dict[str, Any] = {"options": asdict(options), "models": []}
    report["versions"] = {name: importlib.metadata.version(name) for name in ("gpt-arc", "torch", "tokenizers")}
    for directory in model_directories(options):
        model, tokenizer = load_model(directory, dtype=dtype)
        if tokenizer is None:
            raise UserError(f"{directory} has no tokenizer: it can't read texts")
        reader = Reader(model.to(device).eval(), tokenizer, options.batch_tokens)
        print(f"{directory}: {model.num_parameters():,} parameters, {str(dtype).removeprefix('torch.')}")
        one: dict[str, Any] = {"model": str(directory), "weights": weight_hash(directory), "tasks": [], "texts": {}}
        rows: list[list[Any]] = [["task", "shots", "metric", "value", "±", "items", "p", "published"]]
        for task in tasks:
            results, items_hash = measure(task, reader, options)
            for r in results:
                scale = 1 if r.metric == "perplexity" else 100
                known = ", ".join(f"{name} {value:g}" for name, value in task.published.items()) if scale == 100 else ""
                rows.append(
                    [task.name, r.shots, r.metric, r.value * scale, r.standard_error * scale, r.items, r.p_value, known]
                )
                one["tasks"].append(asdict(r) | {"items_hash": items_hash})
        if tasks:
            print(table(rows))
        for name in options.perplexity:
            one["texts"][name] = figures = read(name, reader, options)
            print(table([["text", *figures], [name, *figures.values()]]))
        report["models"].append(one)
    if options.json:
        write_file(options.json, json.dumps(report, indent=1, default=str, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    entry_point(main)()
