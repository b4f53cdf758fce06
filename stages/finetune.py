"""Fine-tune a trained GPT on examples with labels: GPT-1's second stage. Then predict with it.

    python stages/finetune.py out/gpt1 --train reviews.jsonl --test test.jsonl
    python stages/finetune.py gpt2 --task entailment --train mnli.tsv --val dev.tsv --text_a first --text_b second
    python stages/finetune.py gpt2 --task similarity --train stsb.csv --label score --numbers=True
    python stages/finetune.py gpt2 --task multiple_choice --train swag.csv --text_a start --options end0 end1 end2 end3
    python stages/finetune.py out/finetune --test test.jsonl                  measure a fine-tuned model
    python stages/finetune.py out/finetune --predict new.jsonl                writes new.predictions.jsonl
    python stages/finetune.py out/finetune --classify "a film to remember"    the texts of one example
    python stages/finetune.py --resume=out/finetune                           continue a stopped run
    torchrun --standalone --nproc_per_node=8 stages/finetune.py gpt2 --train reviews.jsonl --parallel=fsdp

Examples are rows of .jsonl, .json, .csv, .tsv or .parquet files. A run writes out/finetune/ (or -2, -3 ...): run.json,
metrics.jsonl, report.json, and the models after the last epoch and the best one by the val split, each a model
directory with a head.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401
    from gpt_arc.training.arguments import check_stage_arguments
    from gpt_arc.training.stage_options import FinetuneOptions

    check_stage_arguments(FinetuneOptions, __doc__)


import dataclasses
import math
import sys
from dataclasses import field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from gpt_arc.data.batches import training_batches
from gpt_arc.data.datasets import Corpus, open_dataset
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.device import autocast, resolve_device, resolve_dtype, to_device
from gpt_arc.distributed import IS_MAIN, WORLD_SIZE, say
from gpt_arc.errors import NotFinite, UserError, entry_point, naming
from gpt_arc.extras import import_extra
from gpt_arc.files import command, write_file
from gpt_arc.finetuning.classifier import (
    Classifier,
    ClassifierConfig,
    combined_loss,
    is_classifier,
    load_classifier,
    read_config,
    save_classifier,
    with_special_tokens,
)
from gpt_arc.finetuning.encoding import EncodedExamples, encode_examples
from gpt_arc.finetuning.examples import Columns, Example, classes_of, label_value, read_examples
from gpt_arc.finetuning.lora import add_adapters, learn_new_tokens
from gpt_arc.finetuning.lstm import LSTM
from gpt_arc.finetuning.predictions import (
    Predictions,
    confusion_matrix,
    confusion_table,
    metrics_of,
    predict,
    prediction_lines,
)
from gpt_arc.next_steps import next_steps
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.tables import counted, table, to_json
from gpt_arc.training.checkpoints import CHECKED
from gpt_arc.training.command_line import check_model, read_options, start_stage
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.epochs import digest, epoch_batches, held_out, micro_batches
from gpt_arc.training.optim import Updater
from gpt_arc.training.options import refuse_others
from gpt_arc.training.routers import RouterMeter
from gpt_arc.training.schedule import learning_rate_at
from gpt_arc.training.stage_options import LEAST_TOKENS, FinetuneOptions
from gpt_arc.training.stage_run import StageProgress, StageRun
from gpt_arc.weights.directory import load_text_model, refuse_images
from gpt_arc.weights.edit import transfer, with_settings

GPT1_WEIGHT = 0.5  # of the language-model loss


@dataclass(config=CHECKED)
class FinetuneProgress(StageProgress):
    """How far a run has come. `best` is the best epoch's metric and then its negative loss."""

    best: list[float] | None = None
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # both losses and seconds of this epoch so far
    epochs: list[dict[str, Any]] = field(default_factory=list)  # a line of the report each


class Learned:
    """The trained weights of a classifier, as part of a checkpoint: what is saved as a model has adapters merged."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.classifier.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.classifier.load_state_dict(state, strict=False)


def read_splits(options: FinetuneOptions) -> dict[str, list[Example]]:
    """The labelled examples by split. Raises UserError."""
    columns = named_columns(options, Columns.usual(options.task))
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


def classes_to_learn(options: FinetuneOptions, splits: dict[str, list[Example]]) -> tuple[str, ...] | None:
    """The classes of the training file by name; None for options and numbers. Raises UserError for a single one."""
    if options.task == "multiple_choice" or options.numbers:
        return None
    classes = classes_of(splits["train"] + ([] if options.val else splits.get("val", [])))
    if len(classes) == 1:
        raise UserError(f"{options.train}: every example has the label {classes[0]!r}: there is nothing to learn")
    return classes


def scale_to_learn(options: FinetuneOptions, examples: list[Example], checkpoint: Path | None) -> dict[str, float]:
    """The mean and scale of numeric labels; a resumed run keeps those of its checkpoint."""
    if not options.numbers:
        return {}
    if checkpoint:
        config = read_config(checkpoint)
        return {"mean": config.mean, "scale": config.scale}
    labels = [label_value(example) for example in examples]
    return {"mean": fmean(labels), "scale": pstdev(labels) or 1.0}


def build(
    options: FinetuneOptions, classes: tuple[str, ...] | None, scale: dict[str, float]
) -> tuple[Classifier, Tokenizer]:
    """The classifier to train, what isn't to learn frozen. Raises UserError for options that the model can't have."""
    if is_classifier(options.base_model):
        trained, tokenizer = load_classifier(options.base_model)
        trunk, special = trained.trunk, trained.config.special
    else:
        refuse_images(options.base_model)
        model, tokenizer = load_text_model(options.base_model, causal=False)
        trunk, special = with_special_tokens(model, tokenizer)
    if options.dropout is not None:
        places = dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"))
        trunk = with_settings(trunk, dropout=options.dropout, **places)
    context, blocks = trunk.config.block_size, trunk.config.n_layer
    if context < LEAST_TOKENS:
        raise UserError(
            f"{options.model} has a context of {counted(context, 'token')}: an example takes {LEAST_TOKENS} or more"
        )
    if (options.max_tokens or 0) > context:
        raise UserError(f"max_tokens = {options.max_tokens} is more than the model's context, {context}")
    if (options.transfer_blocks or 0) > blocks:
        raise UserError(f"transfer_blocks = {options.transfer_blocks}, but the model has {counted(blocks, 'block')}")
    if isinstance(trunk, LSTM) and (options.lora_rank or options.transfer_blocks is not None):
        raise UserError(f"{options.model} is an LSTM: it has no blocks for lora_rank or transfer_blocks")
    if options.lstm and trunk.config.attention == "bidirectional":
        raise UserError(f"{options.model} reads in both directions, and an LSTM in one: compare it with a causal model")
    if WORLD_SIZE > 1 and (options.lstm or isinstance(trunk, LSTM)):
        raise UserError("an LSTM is trained in one process: start it with python, not torchrun")
    if not options.resume:  # an old run goes on with what it was started with
        check_effects(options, is_causal=trunk.config.attention == "causal")
    if options.lstm:
        trunk = LSTM(trunk.config)
        if options.lstm_dataset and not options.resume:
            train_language_model(trunk, open_dataset(options.lstm_dataset, tokenizer, "lstm_dataset"), options)
    elif options.from_scratch or options.transfer_blocks is not None:
        trunk = transfer(trunk, options.transfer_blocks)
    if options.freeze_trunk or options.lora_rank:
        trunk.requires_grad_(False)
    if options.lora_rank:
        add_adapters(trunk.blocks, options.lora_rank, options.lora_alpha)
        if not is_classifier(options.base_model) and special.start >= tokenizer.vocab_size:  # tokens that are new
            learn_new_tokens(trunk, len(special))
    columns, max_tokens = named_columns(options, Columns.usual(options.task)), options.max_tokens or context
    dropout, is_lstm = options.classifier_dropout, isinstance(trunk, LSTM)
    config = ClassifierConfig(options.task, classes, special, columns, max_tokens, dropout, is_lstm, **scale)
    classifier = Classifier(trunk, config)
    if config.is_regression:
        torch.nn.init.zeros_(classifier.head.weight)  # the first prediction is the mean
    return classifier, tokenizer


def check_effects(options: FinetuneOptions, is_causal: bool) -> None:
    """Raises UserError for settings that have no effect beside others, or on the model."""
    if options.language_weight and not is_causal:
        raise UserError(
            f"{options.model} reads in both directions, and has no language-model loss: leave language_weight out"
        )
    if options.language_weight and options.freeze_trunk:
        raise UserError("freeze_trunk trains without a language-model loss: leave language_weight or freeze_trunk out")
    if options.lora_alpha != FinetuneOptions.lora_alpha and not options.lora_rank:
        raise UserError(f"lora_alpha = {options.lora_alpha} is for adapters: set lora_rank, or leave lora_alpha out")


def train_language_model(model: LSTM, corpus: Corpus, options: FinetuneOptions) -> None:
    """Pre-train an LSTM on a dataset. Raises NotFinite if training diverges."""
    config, sequences = model.config, 32
    device = resolve_device(options.device)
    training = TrainingConfig(max_iters=options.lstm_iters, learning_rate=1e-3, warmup_iters=options.lstm_iters // 20)
    updater = Updater(model.to(device), training, device, "float32")
    tokens = corpus.split("train", config.block_size, config.vocab_size, False)
    order = tokens.training_order(config.block_size, options.seed)
    batches = training_batches(tokens, order, 0, sequences, sequences, config.block_size)
    bar = tqdm(range(options.lstm_iters), "pre-training the LSTM", disable=options.quiet or None)
    for step in bar:
        loss = model(*to_device(next(batches), device)).total / (sequences * config.block_size)
        updater.backward(loss)
        _, _, (mean,) = updater.update(learning_rate_at(step, training), loss.detach())
        bar.set_postfix_str(f"loss {mean:.4f}")
    if not updater.finite(mean):
        raise NotFinite(f"pre-training the LSTM on {options.lstm_dataset} diverged: choose another seed or lstm_iters")
    say(f"LSTM           pre-trained to a loss of {mean:.4f} nats a token")
    model.cpu()


class Material(NamedTuple):
    """What a run learns from and what learns."""

    classifier: Classifier
    tokenizer: Tokenizer
    splits: dict[str, EncodedExamples]
    updates: int
    updates_per_epoch: int

    @property
    def main_metric(self) -> str:
        """The metric that chooses the best epoch; the lower loss decides between equals."""
        return "pearson" if self.classifier.config.is_regression else "accuracy"


def prepare(options: FinetuneOptions, checkpoint: Path | None) -> Material:
    """Read the examples, build the classifier and print the plan. Raises UserError."""
    examples = read_splits(options)
    if options.predict:
        columns = named_columns(options, Columns.usual(options.task))
        read_examples(options.predict, options.task, columns, labelled=False)
        predictions_file(options, options.predict)
    scale = scale_to_learn(options, examples["train"], checkpoint)
    classifier, tokenizer = build(options, classes_to_learn(options, examples), scale)
    config = classifier.config
    splits = {name: encode_examples(split, config, tokenizer) for name, split in examples.items()}
    updates_per_epoch = math.ceil(len(splits["train"]) / options.examples_per_update)
    updates = updates_per_epoch * options.epochs
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    say(f"parameters     {describe_parameters(classifier)}; {trained:,} learn")
    for name, split in splits.items():
        cut = f", {split.cut:,} of them cut to {config.max_tokens} tokens" if split.cut else ""
        say(f"{name:<15}{counted(len(split), 'example')}{cut}")
    if config.classes:
        say(f"classes        {len(config.classes)}: {', '.join(config.classes[:20])}")
    size, epochs = counted(options.examples_per_update, "example"), counted(options.epochs, "epoch")
    say(f"updates        {updates:,} of {size} in {epochs}")
    return Material(classifier, tokenizer, splits, updates, updates_per_epoch)


def train(options: FinetuneOptions, run: StageRun[FinetuneProgress]) -> int:
    """Fine-tune, choose the best epoch, measure it."""
    material = prepare(options, run.checkpoint)
    classifier, updates, updates_per_epoch = material.classifier, material.updates, material.updates_per_epoch
    training, progress = material.splits["train"], run.progress
    lengths = training.lengths
    run.fit(classifier.trunk.config)
    run.open(digest([training.sequences, training.labels]))
    is_causal = classifier.trunk.config.attention == "causal"
    language_weight = GPT1_WEIGHT if options.language_weight is None else options.language_weight
    language = language_weight > 0 and is_causal and not options.freeze_trunk
    heads = any(p.requires_grad for name, p in classifier.trunk.named_parameters() if name.startswith("head"))
    replica = run.place(classifier, unused=heads and not language)
    updater = run.updater(classifier, updates)
    routers = RouterMeter(classifier.trunk, frozen=options.freeze_trunk or options.lora_rank > 0)
    run.restore(updater, {"learned": Learned(classifier)})

    def write(whole: Classifier, directory: Path) -> None:
        save_classifier(whole, material.tokenizer, directory)

    # -----------------------------------------------------------------------------------------------------------------
    # The training loop. Losses are sums over examples, divided by the examples of an update.
    while run.goes_on(updates):
        epoch, place = divmod(progress.step, updates_per_epoch)
        batches = epoch_batches(lengths, options.batch_size, options.seed, epoch, options.group_by_length)
        classifier.train()
        classifier.trunk.train(not options.freeze_trunk)
        first = place * options.gradient_accumulation_steps
        batches = batches[first : first + options.gradient_accumulation_steps]
        micros = [micro for batch in batches for micro in micro_batches(batch.tolist(), options.batch_size)]
        count, losses = sum(map(len, batches)), torch.zeros(2, device=run.device)
        for i, (rows, weight) in enumerate(micros, start=1):
            batch = to_device(training.batch(rows), run.device)
            with run.parallel.sharing_gradients(replica, i == len(micros)):
                with autocast(run.device, run.dtype):
                    outcome = replica(*batch, with_language=language)
                micro_losses = outcome.task_loss, outcome.language_loss
                loss = combined_loss(*micro_losses, language_weight)
                updater.backward(loss * weight * WORLD_SIZE / count)
            losses += weight * torch.stack(micro_losses).detach()
            routers.add()
        result = run.update(updater, progress.step, *losses)
        routers.step(result is not None)
        if result is None:  # float16 finds its loss scale by overflowing, and tries again
            continue
        rate, norm, (task_loss, language_loss) = result
        task_loss *= classifier.config.scale**2
        progress.step += 1
        for i, value in enumerate((task_loss, language_loss, run.seconds)):
            progress.sums[i] += value
        line = {"train_loss": task_loss / count, "language_loss": language_loss / count, **routers.take()}
        run.tell(line | {"learning_rate": rate, "grad_norm": norm}, f"loss {task_loss / count:.4f}", updates)
        if progress.step % updates_per_epoch == 0:
            end_epoch(options, run, material, language)
            run.save(write)
    # -----------------------------------------------------------------------------------------------------------------

    if progress.step < updates:
        return run.finish(write)
    run.close()
    write_report(options, run, material)
    if IS_MAIN and (options.predict or options.classify):
        use(dataclasses.replace(options, model=str(run.folder), test=None, resume=None))
    texts = {"classification": ["TEXT"], "multiple_choice": ["CONTEXT", "OPTION", "OPTION"]}
    classify = texts.get(options.task, ["TEXT", "TEXT"])
    steps = {
        command("stages/finetune.py", run.folder, "--classify", *classify): "predict the label of an example",
        command("stages/finetune.py", run.folder, "--predict=FILE.csv"): "of all examples in a file",
        command("stages/finetune.py", run.folder, "--test=FILE.csv"): "measure it on others",
    }
    say(next_steps(steps))
    return 0


def end_epoch(options: FinetuneOptions, run: StageRun[FinetuneProgress], material: Material, language: bool) -> None:
    """Measure the val split, keep the epoch if it is the best, and print its line."""
    progress, training = run.progress, material.splits["train"]
    epoch = progress.step // material.updates_per_epoch
    line = {"epoch": epoch, "loss": progress.sums[0] / len(training)}
    line |= {"language_loss": progress.sums[1] / len(training)} if language else {}
    scores: list[float] = [progress.step]
    run.check_finite()
    if "val" in material.splits:
        predictions, metrics = measured(options, run, material.classifier, material.splits["val"])
        line |= {f"val_{name}": value for name, value in metrics.items()}
        main = metrics[material.main_metric]
        scores = [-1.0 if main is None else main, -predictions.losses["loss"]]
    if scores > (progress.best or []):
        progress.best, progress.best_step = scores, progress.step
    line["examples_per_second"] = len(training) / progress.sums[2]
    progress.epochs.append(line)
    progress.sums = [0.0, 0.0, 0.0]
    run.log({"train_loss" if name == "loss" else name: value for name, value in line.items()})
    header = [] if epoch > 1 else [list(line)]
    say(table([*header, list(line.values())], [max(len(name), 7) for name in line]))


def measured(
    options: FinetuneOptions, run: StageRun[FinetuneProgress], classifier: Classifier, split: EncodedExamples
) -> tuple[Predictions, dict[str, float | None]]:
    with run.parallel.evaluating(classifier):
        predictions = predict(classifier, split, options.batch_size, run.device, run.dtype, WORLD_SIZE)
    return predictions, {**metrics_of(predictions, classifier.config), **predictions.losses}


def write_report(options: FinetuneOptions, run: StageRun[FinetuneProgress], material: Material) -> None:
    """Write report.json, with the best epoch measured on the test split."""
    classifier, splits, progress = material.classifier, material.splits, run.progress
    config = classifier.config
    assert progress.best_step is not None  # the first epoch has set it
    report: dict[str, Any] = {"task": config.task, "classes": config.classes, "epochs": progress.epochs}
    report["step"] = progress.best_step
    report["best_epoch"] = progress.best_step // material.updates_per_epoch
    report["examples"] = {name: len(split) for name, split in splits.items()}
    report["cut"] = {name: split.cut for name, split in splits.items()}
    if "test" in splits:
        classifier = load_classifier(run.folder)[0].to(run.device)  # the best, as it is saved
        predictions, report["test"] = measured(options, run, classifier, splits["test"])
        report["confusion_matrix"] = show_test(predictions, report["test"], config)
    if IS_MAIN:
        write_file(run.folder / "report.json", to_json(report, indent=1, ensure_ascii=False) + "\n")
    by = f" by {material.main_metric} on the val split" if "val" in splits else ", the last"
    say(f"kept epoch {report['best_epoch']}{by}: {run.folder}/best")


def show_test(predictions: Predictions, metrics: dict[str, float | None], config: ClassifierConfig) -> list | None:
    """Print how good the predictions are, and return their confusion matrix."""
    say("test: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if value is not None))
    matrix = confusion_matrix(predictions, config)
    if matrix and config.classes:
        say(confusion_table(matrix, config.classes))
    return matrix


def predictions_file(options: FinetuneOptions, examples: Path) -> Path:
    """Where predictions for examples go. Raises UserError if something is there already."""
    path = options.output or Path(f"{examples.stem}.predictions.jsonl")
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} is there already: name another --output, or add --overwrite=True")
    return path


def use(options: FinetuneOptions) -> None:
    """Measure, predict and classify with a fine-tuned model."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    classifier, tokenizer = load_classifier(options.base_model)
    classifier.to(device)
    config = classifier.config
    columns = named_columns(options, config.columns)

    def predicted(examples: list[Example]) -> tuple[EncodedExamples, Predictions]:
        encoded = encode_examples(examples, config, tokenizer)
        if encoded.cut:
            print(f"cut {counted(encoded.cut, 'example')} to {config.max_tokens} tokens", file=sys.stderr)
        return encoded, predict(classifier, encoded, options.batch_size, device, dtype)

    if options.test:
        _, predictions = predicted(read_examples(options.test, config.task, columns))
        show_test(predictions, {**metrics_of(predictions, config), **predictions.losses}, config)
    if options.predict:
        encoded, predictions = predicted(read_examples(options.predict, config.task, columns, labelled=False))
        path = predictions_file(options, options.predict)
        lines = prediction_lines(predictions, config)
        write_file(path, "".join(to_json(line, ensure_ascii=False) + "\n" for line in lines))
        print(f"{path}: {counted(len(encoded), 'prediction')}")
    if options.classify:
        needed = {"classification": 1, "multiple_choice": 3}.get(config.task, 2)
        given = len(options.classify)
        if given < needed or given > needed and config.task != "multiple_choice":
            wanted = {1: "one text", 2: "two texts", 3: "a context and two options or more"}[needed]
            raise UserError(f"--classify: {config.task} takes {wanted}, each in quotation marks, not {given}")
        encoded, predictions = predicted([Example(options.classify, None, "--classify")])
        print(to_json(next(prediction_lines(predictions, config)), ensure_ascii=False))


USE = {"model", "test", "predict", "output", "overwrite", "classify", "text_a", "text_b", "options", "label"}
USE |= {"batch_size", "device", "dtype"}  # the options that using a model has


def named_columns(options: FinetuneOptions, usual: Columns) -> Columns:
    """The columns that the options name, in the place of the usual ones."""
    names = {field.name: getattr(options, field.name) for field in dataclasses.fields(Columns)}
    return dataclasses.replace(usual, **{name: value for name, value in names.items() if value})


def main() -> int:
    options = read_options(FinetuneOptions, __doc__, sys.argv[1:])
    check_model(options)
    if options.resume or options.train is not None:
        import_extra("sklearn.metrics")  # measures each epoch: missing, it is missed now
        return start_stage(options, "finetune", train, FinetuneProgress)
    if WORLD_SIZE > 1:
        raise UserError("a fine-tuned model is used in one process: start it with python, not torchrun")
    if not (options.test or options.predict or options.classify):
        raise UserError("there is nothing to do: name --train, --test, --predict or --classify")
    refuse_others(options, USE, "is for training, and there is no --train")
    with naming(options.model):
        use(options)
    return 0


if __name__ == "__main__":
    entry_point(main)()
