"""Measure what a model knows without being taught: perplexity, and tasks with no, one or a few examples in the prompt.

    python stages/eval.py gpt2 --tasks lambada hellaswag                      of the Hugging Face hub
    python stages/eval.py out/gpt2 --tasks mine.toml --data mine.jsonl        a task and items of your own
    python stages/eval.py out/gpt2 --tasks addition_2 --shots 0 1 4 16        demonstrations drawn from its train split
    python stages/eval.py out/gpt2 --tasks sst2 --shots 4 --shuffled_answers=True        a control: random answers
    python stages/eval.py gpt2 --perplexity wiki.test.tokens --detokenizer wikitext --stride 512
    python stages/eval.py out/quickstart --perplexity python_manual           the val split of a prepared dataset
    python stages/eval.py out/gpt2 --tasks hellaswag --checkpoints=True --plot scores.png     along a run's updates
    python stages/eval.py out/gpt2 --tasks race --training_text pages/        apart: items the training text has

tasks/ has the tasks: `gpt_arc/tasks.py` tells what such a file holds. A figure comes with its standard error, with
demonstrations also with the probability (McNemar's exact test) of such a difference to the first number of shots if
there were none. `--json FILE` has all figures, with the hashes of weights and items, seeds and versions.

--training_text looks for the tasks' items in raw text as GPT-3's authors did: `prepare/decontaminate.py` tells the
rule, and each item counts with all its strings, as in a file of such lines there; arithmetic, which is made anew, is
left out. Of each figure there are then those of the clean items and of the dirty ones.
"""

import hashlib
import importlib.metadata
import io
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from tqdm import tqdm

from gpt_arc.data import contamination
from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.data.documents import Files, find_files, read_text
from gpt_arc.data.text_stream import TextStream
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.beam import beam_search
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.probabilities import row_generators
from gpt_arc.decoding.settings import Sampling
from gpt_arc.device import DTYPES, resolve_device, resolve_dtype, set_up_device
from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.detokenize import DETOKENIZERS
from gpt_arc.evaluation.items import demonstrations, load_items, prepared_items
from gpt_arc.evaluation.score import Request, Score, encode_pair, rolling_windows, score_continuations
from gpt_arc.evaluation.statistics import paired_p_value, standard_error
from gpt_arc.evaluation.tasks import Question, Task, filled, load_task
from gpt_arc.evaluation.text_metrics import bleu, bleu_counts, eval_extra, first_sentences, rouge
from gpt_arc.evaluation.word_search import STOP_WORDS, Vocabulary, length_batches, likeliest_words
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.tables import table
from gpt_arc.weights.directory import load_text_model, model_directory
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
    plot: Path | None = None
    """A .png file to draw the checkpoints' figures in, against their updates."""
    training_text: tuple[str, ...] = ()
    """Text that the model was trained on, before tokens were made of it: files, folders and glob patterns."""
    batch_tokens: int = 8192
    """Tokens that are read at once, padding included."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. auto: what the hardware multiplies fastest; figures then depend on the machine."""
    seed: int = 0
    """Draws items, demonstrations, and answers where the task has them drawn."""
    json: Path | None = None
    """A file for the results."""

    def __post_init__(self):
        if any(shots < 0 for shots in self.shots) or not self.shots:
            raise ValueError(f"shots = {self.shots} must be numbers of 0 or more")
        for name in ("limit", "stride", "batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("data", "train_data"):
            if getattr(self, name) and len(self.tasks) != 1:
                raise ValueError(f"{name} holds the items of one task: name one")
        if self.plot and not self.checkpoints:
            raise ValueError("plot draws the figures of checkpoints: add --checkpoints=True, or leave it out")
        if self.plot and self.plot.suffix != ".png":
            raise ValueError(f"plot = {self.plot} must end in .png")
        if self.training_text and not self.tasks:
            raise ValueError("training_text is looked through for the items of tasks: name some")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} must be at least 0")


class Reader(NamedTuple):
    """A model at work."""

    model: GPT
    tokenizer: Tokenizer
    batch_tokens: int

    def score(self, texts: Sequence[tuple[str, str]], what: str) -> list[Score]:
        """Log-probabilities of second texts after first ones. Raises UserError where one is empty or too long."""
        requests = []
        for number, pair in enumerate(texts, start=1):
            try:
                requests.append(Request(*encode_pair(self.tokenizer, *pair)))
            except UserError as error:
                raise UserError(f"{what}, text {number} of {len(texts)}: {error}") from None
        try:
            scores = score_continuations(self.model, requests, self.batch_tokens, progress=what)
        except ValueError as error:
            raise UserError(f"{what}: {error}") from None
        room = self.model.config.block_size + 1
        cut = sum(len(request.context) + len(request.continuation) > room for request in requests)
        if cut:
            print(
                f"{what}: {cut:,} of {len(requests):,} texts lose their beginning to fit the context", file=sys.stderr
            )
        return scores

    def answers(self, prompts: Sequence[str], task: Task, seed: int) -> list[str]:
        """What the model says after each prompt, up to one of the task's stops.

        Where answers are drawn, one depends on the seed and its prompt's place among all. Of a long prompt the end is
        read that leaves room for the answer.
        """
        room = max(self.model.config.block_size - task.max_new_tokens, 1)
        tokens = [(self.tokenizer.encode(prompt) or [self.tokenizer.start_token])[-room:] for prompt in prompts]
        streams = [TextStream(self.tokenizer, own) for own in tokens]
        bar = tqdm(total=len(prompts), desc=task.name, unit="answer", leave=False, disable=None)
        if task.num_beams > 1:
            ends = self._stop_tokens(task)
            for own, stream in zip(tokens, streams):
                best = beam_search(self.model, own, task.max_new_tokens, task.num_beams, task.length_penalty, ends)[0]
                for token in best.tokens:
                    stream.push(token)
                bar.update()
        else:
            lengths = [len(own) + task.max_new_tokens for own in tokens]
            for batch in length_batches(lengths, self.batch_tokens):
                self._generate(
                    [tokens[i] for i in batch], [streams[i] for i in batch], task, row_generators(seed, batch)
                )
                bar.update(len(batch))
        bar.close()
        for stream in streams:
            stream.end()
        stop = "|".join(map(re.escape, task.stop))
        return [re.split(stop, stream.text)[0] if stop else stream.text for stream in streams]

    def _generate(
        self, prompts: list[list[int]], streams: list[TextStream], task: Task, generators: list[torch.Generator]
    ) -> None:
        sampling = Sampling(temperature=0) if task.top_k == 1 else Sampling(top_k=task.top_k)

        def stopped(row: int, token: int) -> bool:
            streams[row].push(token)
            return streams[row].ended or any(stop in streams[row].text for stop in task.stop)

        for _ in generate(self.model, prompts, task.max_new_tokens, sampling, generators=generators, stopped=stopped):
            pass

    def _stop_tokens(self, task: Task) -> list[int]:
        """Tokens that end a beam: the one between documents, and those that hold one of the task's stops."""
        pieces = ((token, self.tokenizer.decode([token])) for token in range(self.tokenizer.vocab_size))
        found = [token for token, piece in pieces if any(stop in piece for stop in task.stop)]
        return found if self.tokenizer.end_of_text is None else [*found, self.tokenizer.end_of_text]


class Overlap(NamedTuple):
    """What training text has of a task's items."""

    words: int  # that are compared, in a row
    dirty: list[bool]  # of the items


class Material(NamedTuple):
    """A task with its items, those that demonstrations come from, and the numbers of those asked."""

    task: Task
    raw: list[dict[str, Any]]  # the items as the data set has them
    items: list[dict[str, Any]]  # and as the task's templates want them
    pool: list[dict[str, Any]]
    asked: list[int]
    overlap: Overlap | None = None


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
    values: list[Any] = field(default_factory=list, repr=False)  # of the items; of BLEU see `bleu_counts`
    overlap: dict[str, Any] | None = None  # with training text: words compared, and the clean and dirty items' figures


def gather(task: Task, options: Options) -> Material:
    """The task's items. Raises UserError."""
    raw = load_items(task, "test", options.data, options.seed, options.limit)
    items = pool = prepared_items(task, raw)
    if any(options.shots) and (options.train_data or ((task.generator or task.train) and not options.data)):
        pool = prepared_items(task, load_items(task, "train", options.train_data, options.seed))
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(options.seed)).tolist()
    return Material(task, raw, items, pool, sorted(order[: options.limit]))


def with_overlap(materials: list[Material], options: Options) -> list[Material]:
    """The materials with what the training text has of their items, read once for all. Raises UserError."""
    documents = Files(find_files(options.training_text), "text")
    if all(material.task.generator for material in materials):
        raise UserError("training_text can't hold the items of these tasks, which are made anew: leave it out")
    overlaps: dict[int, Overlap] = {}
    with tempfile.TemporaryDirectory() as folder:
        places = {i: Path(folder) / f"{i}.jsonl" for i, own in enumerate(materials) if not own.task.generator}
        for i, path in places.items():
            path.write_text("".join(json.dumps(item, default=str) + "\n" for item in materials[i].raw), "utf-8")
        output = Path(folder) / "overlap.jsonl"
        report = contamination.measure(documents, contamination.read_items(places.values()), output, ["gpt3"])
        found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    for (i, path), entry in zip(places.items(), report["files"]):
        dirty = [line["gpt3_dirty"] for line in found if line["file"] == str(path)]
        overlaps[i] = Overlap(entry["gpt3"]["words"], dirty)
    return [material._replace(overlap=overlaps.get(i)) for i, material in enumerate(materials)]


def prompts_of(material: Material, options: Options, shots: int) -> Iterator[tuple[Question, str]]:
    """For each item asked, its question and what stands before it."""
    task = material.task
    for number in material.asked:
        item = material.items[number]
        try:
            shown = demonstrations(task, material.pool, number, shots, options.seed, options.shuffled_answers, item)
            question = task.question(item)
            if not all(question.continuations):
                raise UserError("the answer or an option is empty")
            yield question, filled(task.description, item) + shown
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
    elif task.normalise in ("character", "byte"):
        options = [option.removeprefix(" ") or option for _, option in pairs]
        sizes = [len(option if task.normalise == "character" else option.encode()) for option in options]
        merits = [merit / size for merit, size in zip(merits, sizes)]
    elif task.normalise == "unconditional":
        alone = reader.score([(task.unconditional, option) for _, option in pairs], f"{task.name}, unconditional")
        merits = [merit - score.log_probability for merit, score in zip(merits, alone)]
    right, start = [], 0
    for question, _ in questions:
        own = merits[start : start + len(question.contexts)]
        right.append(float(own.index(max(own)) == question.answer))
        start += len(own)
    return right


def figures_of(task: Task, reader: Reader, questions: list[tuple[Question, str]], seed: int) -> dict[str, list[Any]]:
    """The metrics of a task, each with its value for every question; `summary` makes one of them."""
    if task.kind == "choice":
        return {"accuracy": choose(task, reader, questions)}
    if task.kind == "cloze":
        pairs = [(before + question.contexts[0], question.continuations[0]) for question, before in questions]
        scores = reader.score(pairs, task.name)
        right = [score.is_greedy for score in scores]
        if task.stop_word_filter:
            tokens = [encode_pair(reader.tokenizer, *pair) for pair in pairs]
            words = Vocabulary(reader.tokenizer)
            right = likeliest_words(words, reader.model, tokens, STOP_WORDS, reader.batch_tokens, task.name)
        return {"accuracy": [float(one) for one in right], "perplexity": [-score.log_probability for score in scores]}
    said = reader.answers([before + question.contexts[0] for question, before in questions], task, seed)
    if task.metric == "exact match":
        return {"exact match": [float(task.is_right(text, question)) for text, (question, _) in zip(said, questions)]}
    said = [first_sentences(text, task.sentences) if task.sentences else text.strip() for text in said]
    pairs = [(text, question.continuations[0].strip()) for text, (question, _) in zip(said, questions)]
    return {"BLEU": [bleu_counts(*pair) for pair in pairs]} if task.metric == "bleu" else rouge(pairs)


def summary(metric: str, values: Sequence[Any]) -> tuple[float, float]:
    """A metric's figure over items, and its standard error."""
    if metric == "BLEU":
        return bleu(values)
    value, error = sum(values) / len(values), standard_error(values)
    if metric == "perplexity":  # the error of a mean, through the exponential
        value = math.exp(min(value, 700.0))
        error *= value
    return value, error


def overlap_of(material: Material, metric: str, values: Sequence[Any]) -> dict[str, Any] | None:
    """The figures of the clean items and of the dirty ones, None where there is no training text."""
    if material.overlap is None:
        return None
    figures: dict[str, Any] = {"words": material.overlap.words}
    for name, dirty in (("clean", False), ("dirty", True)):
        own = [value for number, value in zip(material.asked, values) if material.overlap.dirty[number] == dirty]
        value, error = summary(metric, own) if own else (None, None)
        figures[name] = {"value": value, "standard_error": error, "items": len(own)}
    return figures


def measure(material: Material, reader: Reader, options: Options) -> list[Result]:
    """The figures of a task for each number of shots. Raises UserError."""
    task, results = material.task, []
    for shots in options.shots:
        questions = list(prompts_of(material, options, shots))
        for metric, values in figures_of(task, reader, questions, options.seed).items():
            value, error = summary(metric, values)
            first = next((r for r in results if r.metric == metric), None)
            paired = first is not None and metric in ("accuracy", "exact match")
            p_value = paired_p_value(first.values, values) if paired else None
            overlap = overlap_of(material, metric, values)
            results.append(Result(task.name, shots, metric, value, error, len(values), p_value, values, overlap))
    return results


def read(text_or_dataset: str, reader: Reader, options: Options) -> dict[str, float]:
    """Perplexity and bits of a text or of a prepared val split. Raises UserError."""
    path, tokenizer = Path(text_or_dataset), reader.tokenizer
    if path.is_file():
        original = read_text(path)
        text = DETOKENIZERS[options.detokenizer](original)
        tokens = tokenizer.encode(text)
    else:
        corpus = open_corpus((Source(text_or_dataset, 1.0),))
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


def printed(value: float | None, metric: str) -> float | None:
    """A figure as it is printed: a perplexity, or per cent."""
    return value if value is None or metric == "perplexity" else value * 100


def tables(materials: list[Material], results: list[Result]) -> Iterator[str]:
    """The figures to print, and a second table with those of clean and dirty items."""
    published = {material.task.name: material.task.published for material in materials}
    rows: list[list[Any]] = [["task", "shots", "metric", "value", "±", "items", "p", "published"]]
    for r in results:
        known = ", ".join(f"{name} {value:g}" for name, value in published[r.task].get(r.metric, {}).items())
        value, error = printed(r.value, r.metric), printed(r.standard_error, r.metric)
        rows.append([r.task, r.shots, r.metric, value, error, r.items, r.p_value, known])
    yield table(rows)
    rows = [["task", "shots", "metric", "all", "clean", "±", "items", "dirty", "±", "items", "words compared"]]
    for r in results:
        if r.overlap is not None:
            own = [r.overlap[name] for name in ("clean", "dirty")]
            cells = [[*(printed(o[key], r.metric) for key in ("value", "standard_error")), o["items"]] for o in own]
            rows.append(
                [r.task, r.shots, r.metric, printed(r.value, r.metric), *cells[0], *cells[1], r.overlap["words"]]
            )
    if len(rows) > 1:
        yield table(rows)


def draw(report: dict[str, Any], path: Path) -> None:
    """Each task's figure and each text's perplexity against the checkpoint's update, as in GPT-1's paper (figure 2).

    Tasks have their standard errors; perplexities stand apart, on a logarithmic axis.
    """
    curves: dict[str, dict[str, list[tuple[int, float, float]]]] = {"per cent": {}, "perplexity": {}}
    for model in report["models"]:
        update = int(Path(model["model"]).name.removeprefix("step-"))
        points = [
            (f"{r['task']}, {r['shots']} shots, {r['metric']}", r["metric"], r["value"], r["standard_error"])
            for r in model["tasks"]
        ]
        points += [(name, "perplexity", figures["perplexity"], 0.0) for name, figures in model["texts"].items()]
        for name, metric, value, error in points:
            axis = curves["perplexity" if metric == "perplexity" else "per cent"]
            axis.setdefault(name, []).append((update, printed(value, metric), printed(error, metric)))
    kinds = [kind for kind in curves if curves[kind]]
    figure = eval_extra("matplotlib.figure").Figure(figsize=(7 * len(kinds), 5), layout="constrained")
    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), place + 1, xlabel="updates", ylabel=kind)
        if kind == "perplexity":
            axes.set_yscale("log")
        for name, points in curves[kind].items():
            updates, values, errors = zip(*points)
            axes.errorbar(updates, values, yerr=errors, marker="o", capsize=3, label=name)
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_file(path, image.getvalue())


def check(options: Options, tasks: Sequence[Task]) -> None:
    """Raises UserError for what would fail after hours of work."""
    for path, flag in ((options.json, "json"), (options.plot, "plot")):
        if path and not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent} for the results: make it, or name another by --{flag}")
    needed = {"matplotlib.figure"} if options.plot else set()
    libraries = {"bleu": "sacrebleu.metrics", "rouge": "rouge_score.rouge_scorer"}
    for module in sorted(needed | {libraries[task.metric] for task in tasks if task.metric in libraries}):
        eval_extra(module)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if not options.tasks and not options.perplexity:  # told here: a misspelled flag comes first
        raise UserError("there is nothing to do: name --tasks or --perplexity")
    tasks = [load_task(name) for name in options.tasks]
    check(options, tasks)
    device = resolve_device(options.device)
    dtype = DTYPES[resolve_dtype(options.dtype, device)]
    set_up_device(device, options.dtype)
    directories = model_directories(options)
    materials = [gather(task, options) for task in tasks]
    if options.training_text:
        materials = with_overlap(materials, options)
    report: dict[str, Any] = {"options": asdict(options), "models": []}
    report["versions"] = {name: importlib.metadata.version(name) for name in ("gpt-arc", "torch", "tokenizers")}
    for directory in directories:
        model, tokenizer = load_text_model(directory, dtype=dtype)
        reader = Reader(model.to(device).eval(), tokenizer, options.batch_tokens)
        print(f"{directory}: {describe_parameters(model, ' parameters')}, {str(dtype).removeprefix('torch.')}")
        one: dict[str, Any] = {"model": str(directory), "weights": weight_hash(directory), "tasks": [], "texts": {}}
        results: list[Result] = []
        for material in materials:
            own = measure(material, reader, options)
            items_hash = hashlib.sha256(json.dumps(material.raw, default=str).encode()).hexdigest()
            one["tasks"] += [asdict(result) | {"items_hash": items_hash} for result in own]
            results += own
        if tasks:
            print(*tables(materials, results), sep="\n\n")
        for name in options.perplexity:
            one["texts"][name] = figures = read(name, reader, options)
            print(table([["text", *figures], [name, *figures.values()]]))
        report["models"].append(one)
    if options.plot:
        draw(report, options.plot)
    if options.json:
        write_file(options.json, json.dumps(report, indent=1, default=str, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    entry_point(main)()
