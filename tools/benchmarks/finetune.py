"""`bench.py finetune`: updates built from stages/finetune.py's parts, against transformers' Trainer.

    python tools/bench.py finetune configs/gpt2.toml --n_layer=4 --transformers=True
    python tools/bench.py finetune out/gpt1 --batch_size=8 --transformers=True --json=finetune.json

The architecture gets random weights and learns classes of random sequences, whose lengths are uniform between
min_tokens and max_tokens. An update is one batch: padding it, forward, backward, update. Each competitor has its own
process, and they take turns, round by round; a round is an epoch unless `steps` says otherwise:

- ours: model, batches of similar lengths, precision and update, put together as in stages/finetune.py, without the
  language-model loss, which the Trainer doesn't compute.
- ours + LM: the same with the language-model loss, the default of stages/finetune.py.
- transformers: its Trainer with default settings, in float32 and with random batches, training its own classifier of
  the architecture; evaluation, checkpoints and logs are off.
- transformers 16 bit: the same with bf16=True (fp16=True where ours is float16), if ours is not float32.

All use the same sequences and vocabulary, including the three special tokens.
"""

import contextlib
import dataclasses
import queue
import tempfile
import threading
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from benchmarks.processes import (
    ModelBench,
    check_requirements,
    child_process,
    json_settings,
    machine_name,
    peak_memory,
    ratio_of_medians,
    read_model_arguments,
    show_ratios,
    spread,
    synchronized_time,
    take_turns,
    write_results,
)
from gpt_arc.errors import UserError
from gpt_arc.settings import STRICT, Count, NonNegative
from gpt_arc.tables import counted

LEARNING_RATE, WARMUP = 6.25e-5, 0.002  # GPT-1's


@dataclass(frozen=True, config=STRICT)
class FinetuneBench(ModelBench):
    batch_size: Count = 32
    """Examples per update."""
    examples: Count = 256
    """Examples per epoch, a multiple of batch_size."""
    min_tokens: Annotated[int, Ge(3)] = 16
    """Tokens in the shortest sequence, two of them special."""
    max_tokens: Count = 128
    """Tokens in the longest sequence."""
    classes: Annotated[int, Ge(2)] = 2
    """Number of classes."""
    language_weight: NonNegative = 0.5
    """Weight of the language-model loss in our second row. 0: no second row."""
    steps: Count | None = None
    """Updates per program and round. None: an epoch, so that every round sees the same examples."""
    group_trainer: bool = False
    """Make the Trainer batch examples of similar length too, which it doesn't by default."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of our matrix products and of the Trainer's second row. auto: the fastest on this hardware."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 1337  # the Trainer seeds numpy with it

    def __post_init__(self):
        if self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens = {self.max_tokens} is less than min_tokens = {self.min_tokens}")
        if self.examples % self.batch_size:
            multiple = f"a multiple of batch_size = {self.batch_size}"
            raise ValueError(f"examples = {self.examples} must be {multiple}: then all batches are of one size")

    @property
    def steps_per_round(self) -> int:
        return self.steps or self.examples // self.batch_size

    @property
    def all_steps(self) -> int:
        return (1 + self.rounds) * self.steps_per_round


@dataclasses.dataclass(frozen=True)
class FinetuneJob:
    """Input of a child process."""

    settings: FinetuneBench
    config: Any  # GPTConfig; importing it would import torch; vocab_size includes the special tokens
    device: str
    dtype: str
    folder: Path  # for temporary files


class FinetuneRound(NamedTuple):
    seconds: float
    peak: int  # peak memory so far, in bytes


class FinetuneWorker(ABC):
    """Trains a classifier."""

    def __init__(self, job: FinetuneJob):
        import torch

        self.job, self.settings, self.device = job, job.settings, torch.device(job.device)
        torch.manual_seed(job.settings.seed)
        self.setup()

    @abstractmethod
    def setup(self) -> None:
        """Builds the classifier, its optimizer and its data."""

    @abstractmethod
    def train(self) -> None:
        """Makes the updates of a round."""

    def round(self) -> FinetuneRound:
        start = synchronized_time(self.device)
        self.train()
        return FinetuneRound(synchronized_time(self.device) - start, peak_memory(self.job.device))


def draw_examples(settings: FinetuneBench, vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """Returns sequences, [start] ... [extract], and their classes. `vocab_size` includes the special tokens."""
    from gpt_arc.finetuning.examples import SpecialTokens

    generator, special = (
        np.random.default_rng(settings.seed),
        SpecialTokens.after(vocab_size - len(SpecialTokens._fields)),
    )
    lengths = generator.integers(settings.min_tokens, settings.max_tokens, size=settings.examples, endpoint=True)
    texts = (generator.integers(special.start, size=length - 2).tolist() for length in lengths)
    sequences = [[special.start, *text, special.extract] for text in texts]
    return sequences, generator.integers(settings.classes, size=settings.examples).tolist()


class OurFinetuner(FinetuneWorker):
    language_weight = 0.0

    def setup(self) -> None:
        from gpt_arc.device import set_up_device
        from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig
        from gpt_arc.finetuning.encoding import EncodedExamples
        from gpt_arc.finetuning.examples import Columns, SpecialTokens
        from gpt_arc.training.config import TrainingConfig
        from gpt_arc.training.optim import Updater
        from model import GPT

        settings, config, task = self.settings, self.job.config, "classification"
        set_up_device(self.device, self.job.dtype)
        special = SpecialTokens.after(config.vocab_size - len(SpecialTokens._fields))
        names = tuple(map(str, range(settings.classes)))
        head = ClassifierConfig(task, names, special, Columns.usual(task), settings.max_tokens)
        self.model = Classifier(GPT(config), head).to(self.device)
        adam = TrainingConfig(max_iters=settings.all_steps, learning_rate=LEARNING_RATE, weight_decay=0.01, beta2=0.999)
        self.updater = Updater(self.model, adam, self.device, self.job.dtype)
        sequences, labels = draw_examples(settings, config.vocab_size)
        self.examples = EncodedExamples([[sequence] for sequence in sequences], list(labels), 0, ())
        self.step = 0

    def train(self) -> None:
        from gpt_arc.device import autocast, to_device
        from gpt_arc.finetuning.classifier import combined_loss
        from gpt_arc.training.epochs import epoch_batches
        from gpt_arc.training.schedule import warmup_linear

        settings, weight, lengths = self.settings, self.language_weight, self.examples.lengths
        size, per_epoch = settings.batch_size, settings.examples // settings.batch_size
        for _ in range(settings.steps_per_round):
            epoch, i = divmod(self.step, per_epoch)
            if i == 0:
                self.batches = epoch_batches(lengths, size, settings.seed, epoch, group_by_length=True)
            batch = to_device(self.examples.batch(self.batches[i]), self.device)
            with autocast(self.device, self.job.dtype):
                outcome = self.model(*batch, with_language=weight > 0)
            losses = outcome.task_loss, outcome.language_loss
            self.updater.backward(combined_loss(*losses, weight) / size)
            factor = warmup_linear((self.step + 1) / settings.all_steps, WARMUP)
            self.updater.update(LEARNING_RATE * factor, *(loss.detach() for loss in losses))
            self.step += 1


class OurFinetunerWithLanguage(OurFinetuner):
    def setup(self) -> None:
        super().setup()
        self.language_weight = self.settings.language_weight


class HFTrainer(FinetuneWorker):
    """One run of transformers' Trainer, paused between rounds.

    It runs in a separate thread that does all of torch's work: with two, OpenMP's threads would share the cores.
    """

    sixteen_bit = False

    def setup(self) -> None:
        self.resume: queue.Queue[None] = queue.Queue()
        self.done: queue.Queue[BaseException | None] = queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()
        self.wait()

    def train(self) -> None:
        self.resume.put(None)
        self.wait()

    def wait(self) -> None:
        error = self.done.get()
        if error is not None:
            raise error

    def run(self) -> None:
        """Main function of the thread."""
        try:
            self.build()
            self.pause()
            self.trainer.train()
        except BaseException as error:
            self.done.put(error)

    def pause(self) -> None:
        self.done.put(None)
        self.resume.get()

    def build(self) -> None:
        import transformers

        from gpt_arc.weights.huggingface import hf_config

        settings, vocab_size = self.settings, self.job.config.vocab_size
        transformers.logging.set_verbosity_error()
        pad = {"pad_token_id": vocab_size - 2}  # [delimiter]: no sequence contains it
        config = transformers.AutoConfig.for_model(
            **hf_config(self.job.config, "float32") | pad, num_labels=settings.classes
        )
        self.model = transformers.AutoModelForSequenceClassification.from_config(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(self.job.folder),
            per_device_train_batch_size=settings.batch_size,
            max_steps=settings.all_steps,
            learning_rate=LEARNING_RATE,
            train_sampling_strategy="group_by_length" if settings.group_trainer else "random",
            bf16=self.sixteen_bit and self.job.dtype == "bfloat16",
            fp16=self.sixteen_bit and self.job.dtype == "float16",
            use_cpu=self.device.type == "cpu",
            seed=settings.seed,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        if arguments.device.type == "cuda":
            arguments._n_gpu = 1  # otherwise it spreads a batch over all GPUs
        sequences, labels = draw_examples(settings, vocab_size)
        rows = zip(sequences, labels)
        examples: Any = [{"input_ids": sequence, "labels": label} for sequence, label in rows]  # works as a Dataset
        pause = self.pause
        self.trainer = transformers.Trainer(self.model, arguments, self.pad_batch, examples)

        class Pauses(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step % settings.steps_per_round == 0:
                    pause()

        self.trainer.add_callback(Pauses())

    def pad_batch(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the batch that DataCollatorWithPadding would make; that needs a tokenizer."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        sequences = [torch.tensor(example["input_ids"]) for example in examples]
        pad = self.model.config.pad_token_id
        return {
            "input_ids": pad_sequence(sequences, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }


class HFTrainer16Bit(HFTrainer):
    sixteen_bit = True


def summarize(examples: int, steps: int, warmup: FinetuneRound, *rounds: FinetuneRound) -> dict[str, Any]:
    """Figures of one competitor, from rounds of `examples` examples and `steps` steps."""
    seconds = spread([round.seconds for round in rounds])
    return {
        "examples_per_second": examples / seconds["median"],
        "round_seconds": seconds,
        "step_ms": {name: 1000 * value / steps for name, value in seconds.items()},
        "peak_memory_gb": max(round.peak for round in rounds) / 1e9,
        "warmup_seconds": warmup.seconds,
        "rounds": [round.seconds for round in rounds],
    }


def show(results: dict[str, Any]) -> None:
    columns = ["examples/s", "update ms", "min ms", "max ms", "round s", "memory GB"]
    print("\n" + f"{'':20}" + "".join(f"{column:>12}" for column in columns))
    for name, row in results["programs"].items():
        milliseconds = "".join(f"{row['step_ms'][key]:12,.1f}" for key in ("median", "min", "max"))
        print(f"{name:20}{row['examples_per_second']:12,.2f}{milliseconds}", end="")
        print(f"{row['round_seconds']['median']:12,.2f}{row['peak_memory_gb']:12.2f}")
    print()
    show_ratios(results["ratios"])


def bench_finetune(args: list[str]) -> None:
    settings, config = read_model_arguments(FinetuneBench, __doc__, args)
    check_requirements(settings, ("transformers", "accelerate"))

    from gpt_arc.device import resolve_device, resolve_dtype
    from gpt_arc.finetuning.examples import SpecialTokens
    from gpt_arc.nn.meta import meta_device
    from gpt_arc.weights.directory import load_config
    from gpt_arc.weights.huggingface import architecture_of
    from model import GPT

    config = load_config(settings.model) if config is None else config
    if settings.max_tokens > config.block_size:
        raise UserError(
            f"max_tokens = {settings.max_tokens} is more than the context, block_size = {config.block_size}"
        )
    if settings.transformers:
        architecture_of(config)
    device = resolve_device(settings.device)
    if settings.transformers and device.index:
        raise UserError("the Trainer uses the first GPU: choose it with CUDA_VISIBLE_DEVICES and set --device=cuda")
    dtype = resolve_dtype(settings.dtype, device)
    config = replace(config, vocab_size=config.vocab_size + len(SpecialTokens._fields))
    with meta_device():
        parameters = GPT(config).num_parameters()
    workers: dict[str, type[FinetuneWorker]] = {"ours": OurFinetuner}
    workers |= {"ours + LM": OurFinetunerWithLanguage} if settings.language_weight else {}
    if settings.transformers:
        workers |= {"transformers": HFTrainer} | ({} if dtype == "float32" else {"transformers 16 bit": HFTrainer16Bit})
    machine = machine_name(device)
    steps = settings.steps_per_round
    print(f"machine      {machine}")
    print(f"model        {settings.model}, {parameters:,} parameters, {dtype}")
    print(
        f"work         {settings.batch_size} examples of {settings.min_tokens} to {settings.max_tokens} tokens per",
        end="",
    )
    rounds, updates = counted(settings.rounds, "round"), counted(steps, "update")
    print(f" update, {rounds} of {updates} after a warm-up round", flush=True)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpt-arc-bench-")))
        job = FinetuneJob(settings, config, str(device), dtype, folder)
        calls = {name: stack.enter_context(child_process(name, worker, job)) for name, worker in workers.items()}
        rounds, _ = take_turns(calls, settings.rounds)

    results: dict[str, Any] = {"machine": machine, "dtype": dtype, "parameters": parameters}
    results |= {"architecture": asdict(config), "settings": json_settings(settings)}
    results["programs"] = {
        name: summarize(steps * settings.batch_size, steps, *its_rounds) for name, its_rounds in rounds.items()
    }
    ours, *others = results["programs"].items()
    results["ratios"] = {name: ratio_of_medians(ours[1], row) for name, row in others}
    show(results)
    write_results(settings.json, results)
