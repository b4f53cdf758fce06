"""Train an encoder-decoder, the Transformer of 2017 (arXiv:1706.03762), on pairs of a source and a target.

    python stages/translate.py --train pairs.jsonl                          rows with the columns source and target
    python stages/translate.py --train pairs.csv --val held_out.csv --n_layer=6 --encoder_layers=6 --n_embd=512
    python stages/translate.py out/translate --train more.jsonl             train a model further
    python stages/translate.py --resume=out/translate                       resume a run that was stopped
    python sample.py out/translate --start="a source" --num_beams=4         the target that beam search finds

A run writes out/translate/ (or out/translate-2, -3 ...): run.json, metrics.jsonl and checkpoints, with the lowest val
loss as `best`. It reads text by the characters of the examples unless --tokenizer names a tokenizer.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401
    from gpt_arc.training.arguments import check_stage_arguments
    from gpt_arc.training.stage_options import TranslationOptions

    check_stage_arguments(TranslationOptions, __doc__)


import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_arc import distributed
from gpt_arc.data.pairs import EncodedPair, Pair, PairBatch, boundary_token, encode_pairs, pair_batch, read_pairs
from gpt_arc.data.tokenizer import CharTokenizer, Tokenizer, find_tokenizer
from gpt_arc.device import autocast, to_device
from gpt_arc.distributed import say
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command
from gpt_arc.nn.head_loss import IGNORED
from gpt_arc.nn.relations import check_heads
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.settings import LARGEST, mistake
from gpt_arc.tables import counted
from gpt_arc.training.command_line import read_options, start_stage
from gpt_arc.training.epochs import EpochOrder, digest
from gpt_arc.training.stage_options import TranslationOptions
from gpt_arc.training.stage_run import StageProgress, StageRun
from gpt_arc.weights.directory import load_text_model, save_model
from gpt_arc.weights.edit import with_settings
from model import GPT, GPTConfig


class Scores(NamedTuple):
    """How good a model is on B targets: sums."""

    smoothed: Tensor  # () cross-entropy of smoothed targets
    total: Tensor  # () cross-entropy in nats
    count: Tensor  # () tokens
    exact: Tensor  # () targets that greedy decoding gets right as a whole


def scores(model: GPT, batch: PairBatch, label_smoothing: float) -> Scores:
    """Greedy decoding gets a target right if, after its true beginnings, each token is the likeliest."""
    hidden = model.hidden(batch.tokens, source=model.encode(batch.source, batch.lengths))
    logits, targets = model.logits(hidden).float().flatten(0, 1), batch.targets.flatten()
    entropy = partial(F.cross_entropy, logits, targets, ignore_index=IGNORED, reduction="sum")
    right = (logits.argmax(-1) == targets) | (targets == IGNORED)
    exact = right.view_as(batch.targets).all(1).sum()
    return Scores(entropy(label_smoothing=label_smoothing), entropy().detach(), (targets != IGNORED).sum(), exact)


def new_model(options: TranslationOptions, tokenizer: Tokenizer, longest: int) -> GPT:
    """The paper's architecture in the sizes of `options`. Raises UserError for sizes that don't fit together."""
    settings = {"block_size": longest, **options.NEW, **options.architecture}
    try:
        check_heads(settings["n_head"], settings["n_embd"])
        config = GPTConfig(
            **settings, vocab_size=max(tokenizer.vocab_size, boundary_token(tokenizer) + 1),
            positions="sinusoidal", activation="relu", embedding_scale=math.sqrt(settings["n_embd"]),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(mistake(error, GPTConfig)) from None
    return GPT(config)


def continued(options: TranslationOptions, model: GPT, tokenizer: Tokenizer) -> GPT:
    """Returns the trained `model` with the dropout of `options`. Raises UserError if they name another architecture."""
    requested = options.architecture
    dropout = requested.pop("dropout", model.config.dropout)
    trained = {name: getattr(model.config, name) for name in requested}
    if others := [name for name in requested if requested[name] != trained[name]]:
        has, flags = (f"{name} = {trained[name]}" for name in others), (f"--{name}" for name in others)
        raise UserError(f"{options.model} has {' and '.join(has)}: leave out {' and '.join(flags)}")
    if options.tokenizer and find_tokenizer(options.tokenizer) != tokenizer:
        raise UserError(f"{options.model} has another tokenizer than {options.tokenizer}: leave --tokenizer out")
    return with_settings(model, dropout=dropout)


def build(options: TranslationOptions, resumed: Path | None, pairs: Sequence[Pair]) -> tuple[GPT, Tokenizer]:
    """The model to train, new or a trained one, and its tokenizer; `resumed` is the checkpoint of a resumed run."""
    origin = resumed or options.model
    if origin is not None:
        model, tokenizer = load_text_model(origin, translates=True)
        if not model.config.encoder_layers:
            raise UserError(f"{origin} has no encoder: leave it out to train a new model")
        return model if resumed else continued(options, model, tokenizer), tokenizer
    text = "".join(pair.source + pair.target for pair in pairs)
    tokenizer = find_tokenizer(options.tokenizer) if options.tokenizer else CharTokenizer.from_text(text)
    longest = max(len(tokens) for pair in encode_pairs(pairs, tokenizer, LARGEST, "") for tokens in pair)
    return new_model(options, tokenizer, 1 + longest), tokenizer


@torch.no_grad()
def measured(
    model: GPT, pairs: Sequence[EncodedPair], boundary: int, options: TranslationOptions, run: StageRun
) -> tuple:
    """Returns the mean loss in nats a token, and the share of targets that are right as a whole."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(pairs), options.batch_size):
        batch = PairBatch(*to_device(pair_batch(pairs[start : start + options.batch_size], boundary), run.device))
        with autocast(run.device, run.dtype):
            result = scores(model, batch, 0.0)
        sums += torch.stack(result[1:]).cpu().double()
    model.train()
    return (sums[0] / sums[1]).item(), sums[2].item() / len(pairs)


def train(options: TranslationOptions, run: StageRun) -> int:
    splits = options.splits(read_pairs)
    model, tokenizer = build(options, run.checkpoint, [pair for split in splits.values() for pair in split])
    model.activation_checkpointing = options.activation_checkpointing
    boundary = boundary_token(tokenizer)
    mend = "shorten it, or leave --block_size out" if options.model is None else "shorten it, or leave the row out"
    encoded = {name: encode_pairs(split, tokenizer, model.config.block_size, mend) for name, split in splits.items()}
    examples = encoded["train"]
    order = EpochOrder(len(examples), options.examples_per_update, options.seed)
    updates = order.updates(options.epochs)
    say(f"parameters     {describe_parameters(model)}")
    say(", ".join(f"{name} {counted(len(split), 'pair')}" for name, split in encoded.items()))
    say(f"updates        {updates:,} of {counted(options.examples_per_update, 'pair')}")
    if options.threads != "auto":
        torch.set_num_threads(options.threads)
    run.open(digest(encoded))
    run.place(model)
    updater = run.updater(model, updates)
    run.restore(updater, {})

    def write(whole: GPT, directory: Path) -> None:
        save_model(whole, tokenizer, directory)

    # -----------------------------------------------------------------------------------------------------------------
    # The training loop. The loss is the mean over an update's target tokens.
    progress = run.progress
    model.train()
    while run.goes_on(updates):
        batch = [examples[row] for row in order.rows(progress.step)]
        count = sum(len(pair.target) + 1 for pair in batch)
        loss = torch.zeros((), device=run.device)
        for start in range(0, len(batch), options.batch_size):
            micro = pair_batch(batch[start : start + options.batch_size], boundary)
            with autocast(run.device, run.dtype):
                result = scores(model, PairBatch(*to_device(micro, run.device)), options.label_smoothing)
            updater.backward(result.smoothed / count)
            loss += result.total
        result = run.update(updater, progress.step, loss)
        if result is None:
            continue
        rate, norm, (total,) = result
        progress.step += 1
        line = {"train_loss": total / count, "learning_rate": rate, "grad_norm": norm}
        epoch, place = divmod(progress.step, order.per_epoch)
        if place == 0:
            line["epoch"] = epoch
            if "val" in encoded:
                line["val_loss"], line["val_accuracy"] = measured(model, encoded["val"], boundary, options, run)
            figures = (
                f"{name} {line[name]:.4f}" for name in ("train_loss", "val_loss", "val_accuracy") if name in line
            )
            say(f"epoch {epoch}: {', '.join(figures)}")
        run.tell(line, f"loss {line['train_loss']:.4f}", updates)
        if place == 0:
            run.save(write, line.get("val_loss"))
    return run.finish(write, {command("sample.py", run.folder, "--start=SOURCE"): "turn a source into a target"})


def main() -> int:
    options = read_options(TranslationOptions, __doc__, sys.argv[1:])
    if distributed.WORLD_SIZE > 1:
        raise UserError("translate.py runs in one process: start it with python, not torchrun")
    return start_stage(options, "translate", train, StageProgress)


if __name__ == "__main__":
    entry_point(main)()
