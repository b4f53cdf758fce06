"""Evaluate a model without training it: perplexity, and tasks with zero, one or a few examples in the prompt.

    python stages/eval.py gpt2 --tasks lambada hellaswag                      data from the Hugging Face hub
    python stages/eval.py out/gpt2 --tasks mine.toml --data mine.jsonl        a task and items of your own
    python stages/eval.py out/gpt2 --tasks addition_2 --shots 0 1 4 16        demonstrations from its train split
    python stages/eval.py out/gpt2 --tasks sst2 --shots 4 --shuffled_answers=True        a control: random answers
    python stages/eval.py gpt2 --perplexity wiki.test.tokens --detokenizer wikitext --stride 512
    python stages/eval.py out/quickstart --perplexity python_manual           the val split of a prepared dataset
    python stages/eval.py out/gpt2 --tasks hellaswag --checkpoints=True --plot scores.png     over a training run
    python stages/eval.py out/sft --chat=True --tasks mine.toml --data mine.jsonl    prompts as a user's turns
    python stages/eval.py out/sft --chat=True --tasks images.toml --data images/test.jsonl      questions about images,
                                                                              to choose an answer or to write it
    python stages/eval.py out/gpt2 --tasks race --training_text pages/        clean and contaminated items apart

The tasks are in tasks/; `gpt_arc/evaluation/tasks.py` documents the files. Each figure comes with its standard
error, the accuracy of guessing if the task is a choice and, from the second shot count on, a p-value (McNemar's exact
test) against the first. `--json FILE` writes all figures with the hashes of weights and items, seeds and versions.

--training_text searches raw text for the tasks' items by GPT-3's rule, which `prepare/decontaminate.py` documents. All
strings of an item count. Generated arithmetic is left out. Each figure is then also given for the clean and for the
dirty items.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


# Modules that need torch are imported in functions, so that wrong settings are refused at once.

import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point, naming
from gpt_arc.evaluation.tasks import Task, load_task
from gpt_arc.extras import import_extra
from gpt_arc.files import command, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Natural, Picture, Positional, ResultFile, Threads
from gpt_arc.tables import table, to_json

if TYPE_CHECKING:
    import torch

    from gpt_arc.evaluation.measure import Result, TaskItems


@dataclass(frozen=True, config=STRICT)
class Options:
    model: Positional[str]
    """A run folder, a model directory, or a published model: gpt2, openai-gpt, hf:OWNER/NAME."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, or your own task files (.toml)."""
    shots: tuple[Natural, ...] = (0,)
    """Numbers of demonstrations to measure with."""
    data: Path | None = None
    """The task's items, .jsonl or .parquet, instead of those on the hub."""
    train_data: Path | None = None
    """Items to draw demonstrations from. None: the hub's train split, or with data its other items."""
    limit: Count | None = None
    """Maximum number of items, drawn by the seed."""
    chat: bool = False
    """Give each prompt as a user's turn in the model's template (chat.json), and read the response to it."""
    shuffled_answers: bool = False
    """Give demonstrations random answers, to measure what the format alone teaches: most of what large models gain by
    demonstrations (arXiv:2202.12837), none of it in docs/results/in_context.md."""
    perplexity: tuple[str, ...] = ()
    """Text files, or prepared datasets, whose val split is read."""
    stride: Count | None = None
    """New tokens in each window after a text's first; the others are context. None: all are new."""
    detokenizer: Literal["none", "wikitext", "ptb"] = "none"
    """Restores running text from a benchmark's separated tokens; words are counted before that."""
    checkpoints: bool = False
    """Measure each checkpoint of the run folder."""
    plot: Picture | None = None
    """A .png file for a plot of the checkpoints' figures against their updates."""
    training_text: tuple[str, ...] = ()
    """The text that the model was trained on, before tokenizing: files, folders and glob patterns."""
    batch_tokens: Count = 8192
    """Tokens read at once, including padding."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. auto: the fastest on this hardware; results then depend on the machine."""
    threads: Threads | Literal["auto"] = "auto"
    """CPU threads. auto: OMP_NUM_THREADS or, if that isn't set, more than one only where a short measurement shows that
    they pay."""
    seed: Natural = 0
    """Seed for drawing items, demonstrations, and the answers of tasks that sample them."""
    json: ResultFile | None = None
    """A file for the results."""

    def __post_init__(self):
        if not self.shots:
            raise ValueError("shots is empty: name numbers of demonstrations, each 0 or more")
        for name in ("data", "train_data"):
            if getattr(self, name) and len(self.tasks) != 1:
                raise ValueError(f"{name} holds the items of one task: name one")
        if self.plot and not self.checkpoints:
            raise ValueError("plot draws the figures of checkpoints: add --checkpoints=True, or leave it out")
        if self.chat and not self.tasks:
            raise ValueError("chat is for the prompts of tasks: name some, or leave it out")
        if self.training_text and not self.tasks:
            raise ValueError("training_text is looked through for the items of tasks: name some")


def check(options: Options, tasks: Sequence[Task]) -> None:
    """Raises UserError for what would otherwise fail after hours of work."""
    needed = {"matplotlib.figure"} if options.plot else set()
    libraries = {"bleu": "sacrebleu.metrics", "rouge": "rouge_score.rouge_scorer"}
    for module in sorted(needed | {libraries[task.metric] for task in tasks if task.metric in libraries}):
        import_extra(module)


def models(options: Options) -> Sequence[Path | str]:
    """Returns what to measure: the model, or the directories of a run's checkpoints in order. Raises UserError."""
    from gpt_arc.weights.directory import model_directory

    if not options.checkpoints:
        model_directory(options.model)
        return [options.model]
    directories = sorted(path.parent for path in Path(options.model).glob("step-*/config.json"))
    if not directories:
        train = command("train.py", "CONFIG", "--keep_all_checkpoints")
        raise UserError(f"{options.model} is not a run folder with checkpoints; a run keeps them all with: {train}")
    return directories


def load(path: Path | str, dtype: "torch.dtype") -> tuple:
    """Returns a model's directory, what `load_text_model` and `load_chat` read from it, the model with image encoder or
    None, and the hash of the weights."""
    from gpt_arc.chat.format import load_text_with_chat
    from gpt_arc.evaluation.report import weight_hash
    from gpt_arc.vision.model import load_vision
    from gpt_arc.weights.directory import of_one_checkpoint, reads_images

    @of_one_checkpoint
    def read(directory: Path) -> tuple:
        directory, model, tokenizer, chat = load_text_with_chat(directory, dtype)
        vision = load_vision(directory, model, dtype) if reads_images(directory) else None
        return directory, model, tokenizer, chat, vision, weight_hash(directory)

    return read(path)


def evaluate(
    loaded: tuple, all_items: Sequence["TaskItems"], options: Options, dtype: "torch.dtype", device: "torch.device"
) -> dict[str, Any]:
    """Measures a model, prints its figures and returns its entry of the report. Raises UserError."""
    from gpt_arc.chat.format import require_chat
    from gpt_arc.evaluation.measure import measure_task, measure_text
    from gpt_arc.evaluation.reader import Reader
    from gpt_arc.evaluation.report import result_tables
    from gpt_arc.planning.cost import describe_parameters
    from gpt_arc.training.threads import set_reading_threads

    directory, model, tokenizer, chat, vision, hash = loaded
    chat = require_chat(directory, chat) if options.chat else None
    set_reading_threads(options.threads, model.to(device).eval(), options.batch_tokens)
    if vision:
        vision.to(device).eval()
    reader = Reader(model, tokenizer, options.batch_tokens, chat, vision)
    print(f"{directory}: {describe_parameters(model, ' parameters')}, {str(dtype).removeprefix('torch.')}")
    entry: dict[str, Any] = {"model": str(directory), "checkpoint": str(directory.resolve())}
    entry |= {"weights": hash, "tasks": [], "texts": {}}

    # ---- tasks
    results: list[Result] = []
    for task_items in all_items:
        measured = measure_task(task_items, reader, options.shots, options.seed, options.shuffled_answers)
        entry["tasks"] += [asdict(result) | {"items_hash": task_items.hash} for result in measured]
        results += measured
    if results:
        print(*result_tables(all_items, results), sep="\n\n")

    # ---- texts
    for name in options.perplexity:
        entry["texts"][name] = figures = measure_text(name, reader, options.stride, options.detokenizer)
        print(table([["text", *figures], [name, *figures.values()]]))
    return entry


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if not options.tasks and not options.perplexity:  # not in Options: a misspelled flag is reported first
        raise UserError("there is nothing to do: name --tasks or --perplexity")
    tasks = [load_task(name) for name in options.tasks]
    check(options, tasks)

    from gpt_arc.device import DTYPES, resolve_device, resolve_dtype, set_up_device
    from gpt_arc.evaluation.measure import gather, with_overlap
    from gpt_arc.evaluation.report import plot_checkpoints

    device = resolve_device(options.device)
    dtype = DTYPES[resolve_dtype(options.dtype, device)]
    set_up_device(device, options.dtype)

    # ---- what to measure, and on which items
    paths = models(options)
    sources = options.data, options.train_data, options.limit
    all_items = [gather(task, options.shots, options.seed, *sources) for task in tasks]
    if options.training_text:
        all_items = with_overlap(all_items, options.training_text)
    report: dict[str, Any] = {"options": asdict(options), "models": []}
    report["versions"] = {name: importlib.metadata.version(name) for name in ("gpt-arc", "torch", "tokenizers")}

    for path in paths:
        loaded = load(path, dtype)
        with naming(loaded[0]):
            report["models"].append(evaluate(loaded, all_items, options, dtype, device))
    if options.plot:
        plot_checkpoints(report, options.plot)
        print(f"plot           {options.plot}")
    if options.json:
        write_file(options.json, to_json(report, indent=1, default=str, ensure_ascii=False) + "\n")
        print(f"figures        {options.json}")


if __name__ == "__main__":
    entry_point(main)()
