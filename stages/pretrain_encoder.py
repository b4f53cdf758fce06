"""Train an image encoder by labels or captions of images, before stages/sft.py gives it to a text model.

    python stages/pretrain_encoder.py --image_encoder new.toml --train images.jsonl
    python stages/pretrain_encoder.py --image_encoder new.toml --train images.jsonl --labels colour shape
    python stages/pretrain_encoder.py vit/ --train images.csv --val held_out.csv       an encoder of transformers
    python stages/pretrain_encoder.py --image_encoder new.toml --train captions.jsonl --labels caption --text_model gpt2
    python stages/pretrain_encoder.py --resume=out/pretrain_encoder                    continue a stopped run
    python stages/sft.py out/text --train chats.jsonl --image_encoder out/pretrain_encoder

A row has an `image`, a path relative to the file, and a label, or several: `gpt_arc/vision/labels.py`. A run writes
out/pretrain_encoder/ (or -2, -3 ...): run.json, metrics.jsonl and checkpoints, with the lowest val loss as `best`. A
checkpoint is an encoder in the format of transformers; everything else it trains stays behind in its training_state.pt.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401
    from gpt_arc.training.arguments import check_stage_arguments
    from gpt_arc.training.stage_options import EncoderOptions

    check_stage_arguments(EncoderOptions, __doc__)


import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gpt_arc import distributed
from gpt_arc.device import autocast, to_device
from gpt_arc.distributed import WORLD_SIZE, say
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.tables import counted
from gpt_arc.training.command_line import run_stage
from gpt_arc.training.epochs import EpochOrder, digest, micro_batches
from gpt_arc.training.stage_options import EncoderOptions
from gpt_arc.training.stage_run import StageRun
from gpt_arc.vision.contrastive import CaptionedImages, CaptionMatcher
from gpt_arc.vision.data import load_pixels
from gpt_arc.vision.encoder import ImageEncoder
from gpt_arc.vision.images import Preprocessing
from gpt_arc.vision.labels import (
    UNLABELLED,
    ImageClassifier,
    LabelledImage,
    class_numbers,
    classes_of,
    read_labelled_images,
)
from gpt_arc.vision.new import named_encoder
from gpt_arc.vision.pretrained import encoder_kind, write_encoder
from gpt_arc.weights.directory import load_text_model

Learner = ImageClassifier | CaptionMatcher


class ImageSplit:
    """Images of a split with the numbers of their classes."""

    def __init__(self, images: Sequence[LabelledImage], classes: Sequence[Sequence[str]]):
        self.paths = [image.path for image in images]
        self.labels = class_numbers(images, classes)

    def batch(self, rows: Sequence[int], preprocessing: Preprocessing, size: int) -> tuple[Tensor, Tensor]:
        """Returns the pixels (N, 3, size, size) and labels (N, columns) of these rows."""
        return load_pixels([self.paths[row] for row in rows], preprocessing, size), self.labels[rows]

    def count(self, rows: Sequence[int]) -> int:
        """Returns the number of labels of these rows."""
        return int((self.labels[rows] != UNLABELLED).sum())


@torch.no_grad()
def measure(
    model: Learner,
    split: ImageSplit | CaptionedImages,
    preprocessing: Preprocessing,
    options: EncoderOptions,
    run: StageRun,
) -> tuple[float, float]:
    """Returns the mean loss in nats and the share of right answers over a split's labels, or captions, in all
    processes."""
    sums = torch.zeros(2, device=run.device)
    size = model.encoder.config.image_size
    with run.parallel.evaluating(model):
        for rows, weight in micro_batches(range(len(split.paths)), options.batch_size):
            with autocast(run.device, run.dtype):
                sums += weight * torch.stack(model(*to_device(split.batch(rows, preprocessing, size), run.device)))
    loss, right = distributed.sum_over_ranks(sums).tolist()
    count = split.count(range(len(split.paths)))
    return loss / count, right / count


def learner(
    options: EncoderOptions, encoder: ImageEncoder, images: Mapping[str, Sequence[LabelledImage]]
) -> tuple[Learner, Mapping[str, ImageSplit | CaptionedImages]]:
    """Returns the module that learns from the images, and the splits as it reads them; says what they are.

    Raises UserError for images that teach nothing, or a text model that can't read captions.
    """
    if options.text_model is not None:
        text, tokenizer = load_text_model(options.text_model)
        captioned = {name: CaptionedImages(split, tokenizer, text.config.block_size) for name, split in images.items()}
        for name, split in captioned.items():
            say(f"{name:<15}{counted(len(split.paths), 'image')} with captions")
        return CaptionMatcher(encoder, text, options.contrastive_loss, options.batch_size), captioned
    classes = classes_of([image for split in images.values() for image in split], options.labels)
    splits = {name: ImageSplit(split, classes) for name, split in images.items()}
    for name, split in splits.items():
        labels = counted(split.count(range(len(split.paths))), "label")
        say(f"{name:<15}{counted(len(split.paths), 'image')} with {labels}")
    for name, each in zip(options.labels, classes):
        say(f"classes        {name}: {', '.join(each[:20])}" + f" and {len(each) - 20} more" * (len(each) > 20))
    return ImageClassifier(encoder, [*map(len, classes)]), splits


def train(options: EncoderOptions, run: StageRun) -> int:
    new = options.image_encoder if not run.checkpoint else None
    encoder, preprocessing = named_encoder(new or run.origin, "image_encoder" if new else "model")
    if encoder_kind(encoder.config) is None:
        raise UserError(
            f"{options.image_encoder or options.model}: no encoder of transformers, whose format is written, has this "
            "class_token, patch_bias, first_norm and final_norm together: leave them at their defaults"
        )

    # ---- the images, and the plan in figures
    images = options.splits(partial(read_labelled_images, columns=options.labels))
    say(f"parameters     {describe_parameters(encoder)}")
    model, splits = learner(options, encoder, images)
    examples, size = splits["train"], encoder.config.image_size
    order = EpochOrder(len(examples.paths), options.examples_per_update, options.seed)
    updates = order.updates(options.epochs)
    say(f"updates        {updates:,} of {counted(options.examples_per_update, 'image')}")

    # ---- the run: a new one, or a stopped one from its last checkpoint
    patches = encoder.config.side**2
    run.fit(dataclasses.replace(encoder.config.block, block_size=patches, vocab_size=1))
    run.open(digest([[[image.checksum, image.labels] for image in split] for split in images.values()]))
    replica = run.place(model)
    updater = run.updater(model, updates)
    run.restore(updater, {"heads": model.heads})

    def write(model: Learner, directory: Path) -> None:
        write_encoder(model.encoder, preprocessing, directory)

    # -----------------------------------------------------------------------------------------------------------------
    # The training loop. The loss is the mean over the update's labels or captions.
    progress = run.progress
    while run.goes_on(updates):
        rows = order.rows(progress.step)
        count, micros = examples.count(rows), list(micro_batches(rows, options.batch_size))
        total = torch.zeros((), device=run.device)
        for i, (micro, weight) in enumerate(micros, start=1):
            batch = to_device(examples.batch(micro, preprocessing, size), run.device)
            with run.parallel.sharing_gradients(replica, i == len(micros)):
                with autocast(run.device, run.dtype):
                    loss, _ = replica(*batch)
                updater.backward(loss * (weight * WORLD_SIZE / count))
            total += loss.detach() * weight
        result = run.update(updater, progress.step, total)
        if result is None:
            continue
        rate, norm, (total,) = result
        progress.step += 1
        line = {"train_loss": total / count, "learning_rate": rate, "grad_norm": norm}
        shown = f"loss {total / count:.4f}"
        epoch_ended = progress.step % order.per_epoch == 0
        if epoch_ended:
            line["epoch"] = progress.step // order.per_epoch
            if "val" in splits:
                line["val_loss"], line["val_accuracy"] = measure(model, splits["val"], preprocessing, options, run)
                shown += f", val {line['val_loss']:.4f}, accuracy {line['val_accuracy']:.4f}"
        run.tell(line, shown, updates)
        if epoch_ended:
            say(f"epoch {line['epoch']}: {shown}")
            run.save(write, line.get("val_loss"))
    steps = {
        command(
            "stages/sft.py", "MODEL", "--train=CHATS.jsonl", f"--image_encoder={run.folder}"
        ): "give it to a text model",
        command("stages/pretrain_encoder.py", run.folder, "--train=LABELS.jsonl"): "train it on other labels",
    }
    return run.finish(write, steps)


def main() -> int:
    return run_stage(EncoderOptions, __doc__, "pretrain_encoder", train)


if __name__ == "__main__":
    entry_point(main)()
