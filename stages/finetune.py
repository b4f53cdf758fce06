"""Fine-tune a trained GPT on examples with labels: GPT-1's second stage. Then predict with it.

    python stages/finetune.py out/gpt1 --train reviews.jsonl --test test.jsonl
    python stages/finetune.py gpt2 --task entailment --train mnli.tsv --val dev.tsv --text_a first --text_b second
    python stages/finetune.py gpt2 --task similarity --train stsb.csv --label score --numbers=True
    python stages/finetune.py gpt2 --task multiple_choice --train swag.csv --text_a start --options end0 end1 end2 end3
    python stages/finetune.py out/finetune --test test.jsonl                  measure a fine-tuned model
    python stages/finetune.py out/finetune --predict new.jsonl                writes new.predictions.jsonl
    python stages/finetune.py out/finetune --classify "a film to remember"    the texts of one example
    python stages/finetune.py out/finetune --resume=True                      go on with a run that was stopped

Examples are rows of .jsonl, .csv or .tsv files. A run writes out/finetune/ (or -2, -3 ...): run.json, metrics.jsonl,
report.json, and the models after the last epoch and the best one by the val split, each a model directory with a head.
"""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from gpt_arc import distributed
from gpt_arc.data.batches import training_batches
from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.device import (
    autocast,
    device_name,
    resolve_device,
    resolve_dtype,
    rng_state,
    set_rng_state,
    set_up_device,
    to_device,
)
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import write_file
from gpt_arc.finetuning.classifier import (
    Classifier,
    ClassifierConfig,
    combined_loss,
    is_classifier,
    load_classifier,
    save_classifier,
    with_special_tokens,
)
from gpt_arc.finetuning.encoding import EncodedExamples, encode_examples
from gpt_arc.finetuning.examples import Columns, Example, TaskKind, classes_of, label_value, read_examples
from gpt_arc.finetuning.lora import add_adapters
from gpt_arc.finetuning.lstm import LSTM
from gpt_arc.finetuning.predictions import (
    Predictions,
    confusion_matrix,
    confusion_table,
    metrics_of,
    predict,
    prediction_lines,
)
from gpt_arc.flags import parse_flags
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.tables import table
from gpt_arc.training import runs
from gpt_arc.training.checkpoints import clean_run, load_state, save_checkpoint
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.epochs import digest, epoch_batches, held_out
from gpt_arc.training.log import MetricsLog
from gpt_arc.training.optim import Updater
from gpt_arc.training.options import record_options, recorded_options, refuse_others
from gpt_arc.training.schedule import learning_rate_at, warmup_linear
from gpt_arc.training.signals import StopSignal
from gpt_arc.weights.directory import load_text_model
from gpt_arc.weights.edit import transfer, with_settings

LEAST_TOKENS = 8  # that a sequence may be cut to: three special ones, and something of each text


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str]
    """The model to fine-tune: a run folder, a model directory, or a published model: gpt2, openai-gpt, hf:OWNER/NAME.
    Or one that is fine-tuned: to measure it, to predict with it, or to go on from it to another task."""
    train: Path | None = None
    """Examples to learn from."""
    val: Path | None = None
    """Examples that choose the best epoch. None: val_fraction of the training examples."""
    val_fraction: float = 0.1
    """Share of the training examples that is held out where there is no val. 0: none, and the last epoch counts."""
    test: Path | None = None
    """Examples to measure the best epoch on."""
    predict: Path | None = None
    """Examples to predict labels of; labels that they have are not looked at."""
    output: Path | None = None
    """The file of the predictions. None: NAME.predictions.jsonl in the current folder, NAME being that of predict."""
    classify: tuple[str, ...] = ()
    """The texts of one example, to print its prediction: a text; two texts; or a context and its options."""
    task: TaskKind = "classification"
    """classification: a text has a class. entailment: a pair of texts, in this order, has one. similarity: a pair in
    either order. multiple_choice: one of the options goes with the context."""
    text_a: str | None = None
    """Column of the text, premise, first text or context. None: text, premise, text_a or context, by task."""
    text_b: str | None = None
    """Column of the hypothesis or second text, or of a question after the context. None: hypothesis, text_b, none."""
    options: tuple[str, ...] = ()
    """Columns of the options; or one column with a list of them. None: options."""
    label: str | None = None
    """Column of the label. Of an option: its number from 0, letter from A, column or text. None: label."""
    numbers: bool = False
    """Labels are numbers on a scale, to be predicted by least squares, and not names of classes."""
    max_tokens: int | None = None
    """Longer sequences are cut to this, the longest text first. None: the model's context."""
    batch_size: int = 32
    """Examples at a time."""
    gradient_accumulation_steps: int = 1
    """Batches in one update."""
    epochs: int = 3
    """Passes over the training examples."""
    learning_rate: float = 6.25e-5
    """The largest, at the end of the warmup; from there it falls to 0 in a line."""
    warmup: float = 0.002
    """Share of the updates in which the learning rate rises."""
    weight_decay: float = 0.01
    """Of tensors of two dimensions or more, decoupled from the gradient."""
    beta1: float = 0.9
    """Adam's decay of the mean of gradients."""
    beta2: float = 0.999
    """Adam's decay of the mean of squared gradients."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    grad_clip: float = 1.0
    """Gradients are shortened to this norm. 0: never."""
    language_weight: float = 0.5
    """Weight (lambda) of the language-model loss on the texts beside the task's loss."""
    classifier_dropout: float = 0.1
    """Dropout of the state that the head reads."""
    dropout: float | None = None
    """Dropout everywhere in the model. None: as the model has it."""
    group_by_length: bool = True
    """Put examples of like length into a batch, which saves padding."""
    freeze_trunk: bool = False
    """Train the head alone, on the hidden states as they are."""
    transfer_blocks: int | None = None
    """Keep the embeddings and this many of the first blocks, and draw the rest anew. None: keep the model."""
    from_scratch: bool = False
    """Draw all weights anew: the architecture without its pre-training."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank beside the blocks' frozen matrices; they are merged in what is saved.
    0: train all weights."""
    lora_alpha: float = 16.0
    """Adapters count alpha / rank times."""
    lstm: bool = False
    """Put an LSTM of as many weights in the Transformer's place, drawn anew."""
    lstm_dataset: str | None = None
    """A prepared dataset on which the LSTM is trained as a language model first."""
    lstm_iters: int = 0
    """Updates of that, with batches of 32 windows and a learning rate of 1e-3 that falls to 1e-4."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of products. auto: what the hardware multiplies fastest."""
    seed: int = 42
    """The source of all randomness: new weights, the order of examples, dropout."""
    out_dir: str | None = None
    """Folder of the run. None: out/finetune, or out/finetune-2, -3 ... where that is taken."""
    overwrite: bool = False
    """Delete the run that out_dir holds and start anew; replace a file of predictions."""
    resume: bool = False
    """Go on with the run folder named as the model, as it was started; only the device may be another."""

    def __post_init__(self):
        least = {"batch_size": 1, "gradient_accumulation_steps": 1, "epochs": 1, "lora_rank": 0, "lstm_iters": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} = {getattr(self, name)} must be {number} or more")
        for name in ("val_fraction", "classifier_dropout", "dropout", "beta1", "beta2"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must lie in [0, 1)")
        for name in ("weight_decay", "grad_clip", "language_weight", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} = {getattr(self, name)} must be zero or more, and less than 2^63")
        for name in ("learning_rate", "adam_eps", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be more than zero, and finite")
        if not 0 < self.warmup < 1:
            raise ValueError(f"warmup = {self.warmup} is a share of all updates: it must lie between 0 and 1")
        if self.max_tokens is not None and self.max_tokens < LEAST_TOKENS:
            raise ValueError(f"max_tokens = {self.max_tokens} must be {LEAST_TOKENS} or more, or left out")
        ways = ("freeze_trunk", "from_scratch", "lora_rank", "lstm")
        chosen = [name for name in ways if getattr(self, name)] + ["transfer_blocks"] * (
            self.transfer_blocks is not None
        )
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]} and {chosen[1]} exclude each other: choose one")
        if self.numbers and self.task == "multiple_choice":
            raise ValueError("numbers = True is for labels on a scale; multiple_choice has options")
        if (self.lstm_dataset is None) != (self.lstm_iters == 0) or self.lstm_iters and not self.lstm:
            raise ValueError("lstm_dataset and lstm_iters go together, with lstm = True")

    def columns(self, usual: Columns) -> Columns:
        """The columns named, in the place of the usual ones."""
        names = {field.name: getattr(self, field.name) for field in dataclasses.fields(Columns)}
        return dataclasses.replace(usual, **{name: value for name, value in names.items() if value})


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # updates made
    best: list[float] = field(default_factory=list)  # what chooses the best epoch: its metric, then its loss
    best_step: int | None = None
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # both losses and seconds of this epoch so far
    epochs: list[dict[str, Any]] = field(default_factory=list)  # a line of the report each


def read_splits(options: Options) -> dict[str, list[Example]]:
    """The labelled examples by split. Raises UserError."""
    columns = options.columns(Columns.usual(options.task))
    splits = {
        name: read_examples(getattr(options, name), options.task, columns)
        for name in ("train", "val", "test")
        if getattr(options, name)
    }
    for example in splits["train"] if options.numbers else ():
        label_value(example)  # what is wrong is told of the first line that it is wrong in
    if "val" not in splits:
        splits |= held_out(splits["train"], options.val_fraction, options.seed)
    if not splits["train"]:
        raise UserError(f"val_fraction = {options.val_fraction} leaves no example to learn from")
    return splits


def classes_to_learn(options: Options, splits: dict[str, list[Example]]) -> tuple[str, ...] | None:
    """The classes of the training file by name; None for options and numbers. Raises UserError for a single one."""
    if options.task == "multiple_choice" or options.numbers:
        return None
    classes = classes_of(splits["train"] + ([] if options.val else splits.get("val", [])))
    if len(classes) < 2:
        raise UserError(f"{options.train}: every example has the label {classes[0]!r}: there is nothing to learn")
    return classes


def build(options: Options, classes: tuple[str, ...] | None) -> tuple[Classifier, Tokenizer]:
    """The classifier to train, what isn't to learn frozen. Raises UserError for options that the model can't have."""
    if is_classifier(options.model):
        trained, tokenizer = load_classifier(options.model)
        trunk, special = trained.trunk, trained.config.special
    else:
        model, tokenizer = load_text_model(options.model)
        trunk, special = with_special_tokens(model)
    if options.dropout is not None:
        places = dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"))
        trunk = with_settings(trunk, dropout=options.dropout, **places)
    context, blocks = trunk.config.block_size, trunk.config.n_layer
    if context < LEAST_TOKENS:
        raise UserError(f"{options.model} has a context of {context} tokens: an example takes {LEAST_TOKENS} or more")
    if (options.max_tokens or 0) > context:
        raise UserError(f"max_tokens = {options.max_tokens} is more than the model's context, {context}")
    if (options.transfer_blocks or 0) > blocks:
        raise UserError(f"transfer_blocks = {options.transfer_blocks}, but the model has {blocks} blocks")
    if isinstance(trunk, LSTM) and (options.lora_rank or options.transfer_blocks is not None):
        raise UserError(f"{options.model} is an LSTM: it has no blocks for lora_rank or transfer_blocks")
    if options.lstm:
        trunk = LSTM(trunk.config)
        if options.lstm_iters and not options.resume:
            train_language_model(trunk, tokenizer, options)
    elif options.from_scratch or options.transfer_blocks is not None:
        trunk = transfer(trunk, options.transfer_blocks)
    if options.freeze_trunk or options.lora_rank:
        trunk.requires_grad_(False)
    if options.lora_rank:
        add_adapters(trunk.blocks, options.lora_rank, options.lora_alpha)
    columns, max_tokens = options.columns(Columns.usual(options.task)), options.max_tokens or context
    dropout, is_lstm = options.classifier_dropout, isinstance(trunk, LSTM)
    config = ClassifierConfig(options.task, classes, special, columns, max_tokens, dropout, is_lstm)
    return Classifier(trunk, config), tokenizer


def train_language_model(model: LSTM, tokenizer: Tokenizer, options: Options) -> None:
    """Pre-train an LSTM on the dataset named. Raises UserError if it isn't there or is another tokenizer's."""
    config, sequences = model.config, 32
    device = resolve_device(options.device)
    corpus = open_corpus((Source(options.lstm_dataset, 1.0),))
    if corpus is None or corpus.tokenizer != tokenizer:
        what = "there is no prepared dataset of that name" if corpus is None else "its tokenizer is not the model's"
        raise UserError(f"lstm_dataset = {options.lstm_dataset}: {what}")
    training = TrainingConfig(max_iters=options.lstm_iters, learning_rate=1e-3, warmup_iters=options.lstm_iters // 20)
    updater = Updater(model.to(device), training, device, "float32")
    tokens = corpus.split("train", config.block_size, config.vocab_size, False)
    order = tokens.training_order(config.block_size, options.seed)
    batches = training_batches(tokens, order, 0, sequences, sequences, config.block_size)
    bar = tqdm(range(options.lstm_iters), "pre-training the LSTM", disable=None)
    for step in bar:
        loss = model(*to_device(next(batches), device)).total / (sequences * config.block_size)
        updater.backward(loss)
        _, _, (mean,) = updater.update(learning_rate_at(step, training), loss.detach())
        bar.set_postfix_str(f"loss {mean:.4f}")
    print(f"LSTM           pre-trained to a loss of {mean:.4f} nats a token")
    model.cpu()


def train(options: Options, resumed: Path | None) -> int:
    """Fine-tune, choose the best epoch, measure it."""
    # ---- the examples, the model and the plan in figures
    torch.manual_seed(options.seed)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    examples = read_splits(options)
    if options.predict:
        read_examples(options.predict, options.task, options.columns(Columns.usual(options.task)), labelled=False)
        predictions_file(options)
    classifier, tokenizer = build(options, classes_to_learn(options, examples))
    config = classifier.config
    splits = {name: encode_examples(split, config, tokenizer) for name, split in examples.items()}
    training, lengths = splits["train"], splits["train"].lengths
    fingerprint = digest([training.sequences, training.labels])
    per_update = options.batch_size * options.gradient_accumulation_steps
    updates_per_epoch = math.ceil(len(training) / per_update)
    updates = updates_per_epoch * options.epochs
    learning = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    print(f"parameters     {describe_parameters(classifier)}; {learning:,} learn")
    for name, split in splits.items():
        cut = f", {split.cut:,} of them cut to {config.max_tokens} tokens" if split.cut else ""
        print(f"{name:<15}{len(split):,} examples{cut}")
    if config.classes:
        print(f"classes        {len(config.classes)}: {', '.join(config.classes[:20])}")
    print(f"updates        {updates:,} of {per_update} examples in {options.epochs} epochs")
    print(f"device         {device} ({device_name(device)}), {dtype}")

    # ---- the run's folder, held from here on
    if resumed:
        run, lock = resumed, runs.Lock(resumed)
    else:
        if options.out_dir and Path(options.out_dir).resolve() in (Path(options.model) / "model").resolve().parents:
            raise UserError(f"out_dir = {options.out_dir} holds the model to start from: name another")
        where = options.out_dir, "finetune", options.overwrite, "finetune", "--resume=True"
        run, lock = runs.claim_new(*where)  # noqa: F841  by name
        record_options(run, "finetune", options)
    print(f"run            {run}", flush=True)

    # ---- optimizer, random generators, where a stopped run stood
    set_up_device(device, dtype)
    classifier.to(device)
    settings = ("learning_rate", "weight_decay", "beta1", "beta2", "adam_eps", "grad_clip")
    adam = TrainingConfig(max_iters=updates, **{name: getattr(options, name) for name in settings})
    updater = Updater(classifier, adam, device, dtype)
    torch.manual_seed(options.seed)
    progress = Progress()
    if resumed and (run / "last").exists():
        state = load_state(run / "last")
        if state["data"] != fingerprint:
            raise UserError(f"{run} was started on other examples: start a new run")
        progress = Progress(**state["progress"])
        clean_run(run, progress.step, progress.best_step)
        updater.load_state_dict(state)
        classifier.load_state_dict(state["learned"], strict=False)
        set_rng_state(state["generators"], device)
        del state
    log, stop = MetricsLog(run, progress.step), StopSignal()
    main_metric = "pearson" if config.is_regression else "accuracy"

    def save() -> None:
        state = {
            "progress": dataclasses.asdict(progress),
            **updater.state_dict(),
            "learned": {name: p.detach() for name, p in classifier.named_parameters() if p.requires_grad},
            "generators": rng_state(device),
            "runtime": {"device": device.type, "dtype": dtype},
            "data": fingerprint,
        }
        write = partial(save_classifier, classifier, tokenizer)
        save_checkpoint(run, progress.step, progress.best_step, write, state, keep_all=False)

    def measured(split: EncodedExamples) -> tuple[Predictions, dict[str, float | None]]:
        predictions = predict(classifier, split, options.batch_size, device, dtype)
        return predictions, {**metrics_of(predictions, config), **predictions.losses}

    # -----------------------------------------------------------------------------------------------------------------
    # The training loop. Losses are sums over examples, divided by the examples of an update. The best epoch is that of
    # the highest metric, the lower loss deciding between equals.
    language = options.language_weight > 0 and not options.freeze_trunk
    bar = tqdm(total=updates, initial=progress.step, unit="update", disable=None)
    not_finite = 0  # updates in a row
    while progress.step < updates and not stop.number:
        epoch = progress.step // updates_per_epoch
        batches = epoch_batches(lengths, options.batch_size, options.seed, epoch, options.group_by_length)
        classifier.train()
        classifier.trunk.train(not options.freeze_trunk)
        while progress.step < (epoch + 1) * updates_per_epoch and not stop.number:
            started = time.perf_counter()
            first = progress.step % updates_per_epoch * options.gradient_accumulation_steps
            own = batches[first : first + options.gradient_accumulation_steps]
            count, sums = sum(map(len, own)), torch.zeros(2, device=device)
            for rows in own:
                batch = to_device(training.batch(rows), device)
                with autocast(device, dtype):
                    outcome = classifier(*batch, with_language=language)
                losses = torch.stack((outcome.task_loss, outcome.language_loss))
                updater.backward(combined_loss(*losses, options.language_weight) / count)
                sums += losses.detach()
            factor = warmup_linear(progress.step / updates, options.warmup)
            finite, norm, sums = updater.update(options.learning_rate * factor, *sums)
            if not finite:  # float16 finds its loss scale by overflowing, and tries again
                not_finite += 1
                if not_finite == (20 if updater.scaler.is_enabled() else 1):
                    raise UserError(
                        f"update {progress.step + 1} is not finite: lower learning_rate, or set dtype = float32"
                    )
                continue
            progress.step, not_finite = progress.step + 1, 0
            for i, value in enumerate((*sums, time.perf_counter() - started)):
                progress.sums[i] += value
            rates = {"learning_rate": options.learning_rate * factor, "grad_norm": norm}
            log.write({"step": progress.step, "task_loss": sums[0] / count, "language_loss": sums[1] / count, **rates})
            bar.set_postfix_str(f"loss {sums[0] / count:.4f}")
            bar.update()
            if bar.disable and progress.step % max(1, updates // 20) == 0:
                print(f"update {progress.step:,} of {updates:,}: loss {sums[0] / count:.4f}", flush=True)
        if progress.step < (epoch + 1) * updates_per_epoch:
            break

        # the epoch's line; its model, if it is the best
        seconds = progress.sums[2]
        line = {"epoch": epoch + 1, "loss": progress.sums[0] / len(training)}
        line |= {"language_loss": progress.sums[1] / len(training)} if language else {}
        merit = [progress.step]
        if "val" in splits:
            metrics = measured(splits["val"])[1]
            line |= {f"val_{name}": value for name, value in metrics.items()}
            correctness = metrics[main_metric]
            merit = [-1.0 if correctness is None else correctness, -metrics["loss"]]
        if merit > progress.best:
            progress.best, progress.best_step = merit, progress.step
        progress.epochs.append(line | {"examples_per_second": len(training) / seconds})
        progress.sums = [0.0, 0.0, 0.0]
        log.write({"step": progress.step, **progress.epochs[-1]})
        names = list(progress.epochs[-1])
        widths = [max(len(name), 7) for name in names]
        header = [] if epoch else [names]
        tqdm.write(table([*header, list(progress.epochs[-1].values())], widths))
        save()
    bar.close()
    if progress.step < updates:
        save()
        print(f"stopped after update {progress.step}; go on by: python {sys.argv[0]} {run} --resume=True")
        return 128 + stop.number

    # ---- the report, with the best epoch on the test split
    report = {"task": config.task, "classes": config.classes, "epochs": progress.epochs}
    report["best_epoch"] = progress.best_step // updates_per_epoch
    report["examples"] = {name: len(split) for name, split in splits.items()}
    report["cut"] = {name: split.cut for name, split in splits.items()}
    if "test" in splits:
        if progress.best_step != progress.step:
            classifier = load_classifier(run / "best")[0].to(device)
        predictions, report["test"] = measured(splits["test"])
        report["confusion_matrix"] = show_test(predictions, report["test"], config)
    write_file(run / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    by = f" by {main_metric} on the val split" if "val" in splits else ", the last"
    print(f"kept epoch {report['best_epoch']}{by}: {run}/best")
    if options.predict or options.classify:
        use(dataclasses.replace(options, model=str(run), test=None))
    return 0


def show_test(predictions: Predictions, metrics: dict[str, float | None], config: ClassifierConfig) -> list | None:
    """Print how good the predictions are, and return their confusion matrix."""
    print("test: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if value is not None))
    matrix = confusion_matrix(predictions, config)
    if matrix:
        print(confusion_table(matrix, config.classes))
    return matrix


def predictions_file(options: Options) -> Path:
    """Where predictions go. Raises UserError if something is there already."""
    path = options.output or Path(f"{options.predict.stem}.predictions.jsonl")
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} is there already: name another --output, or add --overwrite=True")
    return path


def use(options: Options) -> None:
    """Measure, predict and classify with a fine-tuned model."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    classifier, tokenizer = load_classifier(options.model)
    classifier.to(device)
    config = classifier.config
    columns = options.columns(config.columns)

    def predicted(examples: list[Example]) -> tuple[EncodedExamples, Predictions]:
        encoded = encode_examples(examples, config, tokenizer)
        if encoded.cut:
            print(f"{encoded.cut:,} examples were cut to {config.max_tokens} tokens", file=sys.stderr)
        return encoded, predict(classifier, encoded, options.batch_size, device, dtype)

    if options.test:
        _, predictions = predicted(read_examples(options.test, config.task, columns))
        show_test(predictions, {**metrics_of(predictions, config), **predictions.losses}, config)
    if options.predict:
        encoded, predictions = predicted(read_examples(options.predict, config.task, columns, labelled=False))
        path = predictions_file(options)
        lines = prediction_lines(predictions, config)
        write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        print(f"{path}: {len(encoded):,} predictions")
    if options.classify:
        needed = {"classification": 1, "multiple_choice": 3}.get(config.task, 2)
        given = len(options.classify)
        if given < needed or given > needed and config.task != "multiple_choice":
            wanted = {1: "one text", 2: "two texts", 3: "a context and two options or more"}[needed]
            raise UserError(f"--classify: {config.task} takes {wanted}, each in quotation marks, not {given}")
        encoded, predictions = predicted([Example(options.classify, None, "--classify")])
        print(json.dumps(next(prediction_lines(predictions, config)), ensure_ascii=False))


USE = {"model", "test", "predict", "output", "overwrite", "classify", "text_a", "text_b", "options", "label"}
USE |= {"batch_size", "device", "dtype"}  # the options that using a model has


def main() -> int:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if distributed.WORLD_SIZE > 1:
        raise UserError("fine-tuning runs in one process: start it by python, not by torchrun")
    if options.resume:
        refuse_others(
            options, {"model", "resume", "device"}, "can't be changed: --resume=True goes on as the run was started"
        )
        run = Path(options.model)
        return train(
            dataclasses.replace(recorded_options(run, Options, "finetune"), device=options.device, resume=True), run
        )
    if options.train is not None:
        return train(options, None)
    if not (options.test or options.predict or options.classify):
        raise UserError("there is nothing to do: name --train, --test, --predict or --classify")
    refuse_others(options, USE, "is for training, and there is no --train")
    use(options)
    return 0


if __name__ == "__main__":
    entry_point(main)()
