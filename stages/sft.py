"""Supervised fine-tuning on conversations: InstructGPT's first step. Only the assistant's turns are learned.

    python stages/sft.py out/gpt2 --train chats.jsonl
    python stages/sft.py gpt2 --train chats.jsonl --val held_out.jsonl --template chatml --packing=False
    python stages/sft.py gpt2 --train chats.parquet --columns prompt=question response=answer
    python stages/sft.py gpt2 --train chats.jsonl --preview 3               show rows as tokens, and which are scored
    python stages/sft.py sft.toml --learning_rate 2e-5                      settings from a file; flags win
    python stages/sft.py out/base --train chats.jsonl --image_encoder clip/ --text_rate=0 --encoder_rate=0
                                                                            images: first the projector alone, then
    python stages/sft.py out/sft --train chats.jsonl --encoder_rate=0.1     all parts
    python stages/sft.py --resume=out/sft                                   continue a stopped run
    torchrun --standalone --nproc_per_node=8 stages/sft.py sft.toml
    python sample.py --chat out/sft                                         talk with it

A row has a prompt and a response; or instruction, input and output, as Alpaca; or conversations, as ShareGPT; or
messages: {"role": ..., "content": ...}, with "weight": 0 for a response that is not learned, and with tools and calls.
`gpt_arc/chat/files.py` and `gpt_arc/chat/format.py` describe files and templates, `gpt_arc/vision/data.py` rows with
images. A run writes out/sft/ (or out/sft-2, -3 ...): run.json, metrics.jsonl and checkpoints, with the lowest val loss
as `best`.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401
    from gpt_arc.training.arguments import check_stage_arguments
    from gpt_arc.training.stage_options import SFTOptions

    check_stage_arguments(SFTOptions, __doc__)


from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt_arc.chat.batches import EncodedConversations, conversation_batch, encode_conversations
from gpt_arc.chat.files import read_conversations
from gpt_arc.chat.format import ChatFormat, load_template, load_text_with_chat
from gpt_arc.chat.preview import preview_conversations
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.device import autocast, send, to_device
from gpt_arc.distributed import WORLD_SIZE, say
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command
from gpt_arc.nn.packing import can_pack, packed
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.tables import counted
from gpt_arc.training.command_line import run_stage
from gpt_arc.training.epochs import EpochOrder, digest, micro_batches
from gpt_arc.training.evaluate import mean_loss
from gpt_arc.training.routers import RouterMeter
from gpt_arc.training.stage_options import SFTOptions
from gpt_arc.training.stage_run import StageRun
from gpt_arc.vision.data import encode_image_conversations, identity, image_batch, read_image_conversations
from gpt_arc.vision.model import VisionGPT, load_vision, save_vision
from gpt_arc.vision.new import new_vision_model
from gpt_arc.weights.directory import of_one_checkpoint, reads_images, save_model
from gpt_arc.weights.edit import with_more_tokens, with_settings
from model import GPT


def val_loss(model: GPT | VisionGPT, examples: Sequence[Any], options: SFTOptions, run: StageRun) -> float:
    """Returns the mean cross-entropy in nats over the responses' tokens in all processes."""
    shares = micro_batches(range(len(examples)), options.batch_size)
    with run.parallel.evaluating(model):
        batches = ((batch_of(examples, rows, model, options, run), weight) for rows, weight in shares)
        return mean_loss(model, batches, run.device, run.dtype)


def batch_of(
    examples: Sequence[Any], rows: Sequence[int], model: GPT | VisionGPT, options: SFTOptions, run: StageRun
) -> list[Any]:
    """Returns the arguments of the model for these rows; `examples` are its kind of encoded conversations."""
    context = model.config.block_size if options.packing else None
    batch = [examples[row] for row in rows]
    if isinstance(model, VisionGPT):
        return to_device(image_batch(batch, context, model.preprocessing, model.image_size), run.device)
    on_host = conversation_batch(batch, context)
    sent = to_device(on_host, run.device)
    if on_host[2] is not None and can_pack(model.config, run.device, run.dtype):
        places = packed(on_host[2])
        sent[2] = places._replace(documents=sent[2], ends=send(places.ends, run.device))
    return sent


def vision_model(options: SFTOptions, directory: Path, text: GPT) -> VisionGPT | None:
    """Returns the model with the encoder in its directory or the one that the settings add; None: it reads text alone.

    Raises UserError for settings of images that have no effect.
    """
    for name in ("prefix_attention", "projector_layers", "pixel_shuffle"):
        if not options.image_encoder and getattr(options, name) != getattr(SFTOptions, name):
            raise UserError(f"{name} is for a new image encoder: name an --image_encoder, or leave it out")
    if reads_images(directory):
        if options.image_encoder and not options.resume:
            raise UserError(f"{options.model} has an image encoder: leave --image_encoder out")
        model = load_vision(directory, text)
    elif options.image_encoder:
        new = options.projector_layers, options.pixel_shuffle, options.prefix_attention
        model = new_vision_model(options.image_encoder, text, *new)
    else:
        if set(options.rates.values()) != {1.0}:
            raise UserError("text_rate, encoder_rate and projector_rate are for images: name an --image_encoder")
        return None
    if not any(options.rates.values()):
        raise UserError("text_rate, encoder_rate and projector_rate are 0: nothing would be trained")
    model.set_rates(**options.rates)
    return model


@of_one_checkpoint
def load(path: Path | str, options: SFTOptions) -> tuple[GPT, VisionGPT | None, Tokenizer, ChatFormat]:
    """Returns the text model, with a token for each mark that the template adds, the model that reads images if it is
    one, the tokenizer and the chat format."""
    directory, model, tokenizer, chat = load_text_with_chat(path)
    if chat is not None and options.template != SFTOptions.template and not options.resume:
        if load_template(options.template) != chat.template:
            raise UserError(f"{options.model} keeps the template it has (chat.json): drop --template")
    if chat is None:
        chat = ChatFormat.new(load_template(options.template), tokenizer, model.config.vocab_size)
        chat.check_opening()
        model = with_more_tokens(model, max(chat.vocab_size - model.config.vocab_size, 0))
    if options.residual_dropout is not None:
        model = with_settings(model, residual_dropout=options.residual_dropout)
    model.activation_checkpointing = options.activation_checkpointing
    return model, vision_model(options, directory, model), tokenizer, chat


def reader(
    options: SFTOptions, vision: VisionGPT | None
) -> tuple[Callable[[Path], list[Any]], Callable[..., EncodedConversations[Any]]]:
    """Returns what reads a file's conversations, and what encodes them, for a model that reads images or text alone."""
    if vision is None:
        return partial(read_conversations, columns=options.columns), encode_conversations
    embeddings = vision.embeddings_per_image
    return partial(read_image_conversations, columns=options.columns, embeddings=embeddings), encode_image_conversations


def train(options: SFTOptions, run: StageRun) -> int:
    if options.train is None:
        raise UserError("name the conversations to learn from by --train")

    model, vision, tokenizer, chat = load(run.origin, options)
    whole: GPT | VisionGPT = vision or model

    # ---- the conversations, and the plan in figures
    read, encode = reader(options, vision)
    if options.preview:
        return preview_conversations(read(options.train)[: options.preview], chat, model.config.block_size)
    splits = options.splits(read)
    if vision is None and any(each.row.get("image") or each.row.get("images") for each in splits["train"]):
        say("images         ignored: name an --image_encoder to learn from them")
    encoded = {name: encode(split, chat, model.config.block_size) for name, split in splits.items()}
    say(f"parameters     {describe_parameters(whole)}")
    say(f"template       {chat.template.user}{chat.template.assistant}".replace("\n", "\\n"))
    for name, split in encoded.items():
        say(f"{name:<15}{describe(split)}")
        if not split.examples:
            reason = f"fits into the context of {model.config.block_size} tokens" if split.dropped else "is left"
            raise UserError(f"no conversation of the {name} split {reason}")
    examples = encoded["train"].examples
    order = EpochOrder(len(examples), options.examples_per_update, options.seed)
    updates = order.updates(options.epochs)
    size, epochs = counted(options.examples_per_update, "conversation"), counted(options.epochs, "epoch")
    say(f"updates        {updates:,} of {size} in {epochs}")

    # ---- the run: a new one, or a stopped one from its last checkpoint
    run.fit(model.config)
    run.open(
        digest(
            [[identity(each) for each in split.examples] if vision else split.examples for split in encoded.values()]
        )
    )
    replica = run.place(whole)
    updater, routers = run.updater(whole, updates), RouterMeter(model)
    run.restore(updater, {})

    def write(whole: GPT | VisionGPT, directory: Path) -> None:
        text = whole.text if isinstance(whole, VisionGPT) else whole
        save_model(text, tokenizer, directory)
        chat.save(directory)
        if isinstance(whole, VisionGPT):
            save_vision(whole, directory)

    # -----------------------------------------------------------------------------------------------------------------
    # The training loop. The loss is the mean over the update's response tokens.
    progress = run.progress
    learned = sum(examples[row].count for row in order.before(progress.step))  # tokens of a resumed run
    whole.train()
    while run.goes_on(updates):
        rows = order.rows(progress.step)
        tokens = sum(examples[row].count for row in rows)  # an empty response has one, its end
        micros = list(micro_batches(rows, options.batch_size))
        total = torch.zeros((), device=run.device)
        for i, (micro, weight) in enumerate(micros, start=1):
            with run.parallel.sharing_gradients(replica, i == len(micros)):
                with autocast(run.device, run.dtype):
                    loss = replica(*batch_of(examples, micro, whole, options, run))
                routing = sum(loss.auxiliary.values()) / len(micros)  # a mixture of experts' router losses
                updater.backward(weight * (loss.total * (WORLD_SIZE / tokens) + routing))
            total += loss.total.detach() * weight
            routers.add()
        result = run.update(updater, progress.step, total)
        routers.step(result is not None)
        if result is None:
            continue
        rate, norm, (total,) = result
        progress.step += 1
        learned += tokens
        line = {"train_loss": total / tokens, "learning_rate": rate, "grad_norm": norm, "tokens": learned}
        line |= {"tokens_per_second": tokens / run.seconds, **routers.take()}
        epoch_ended = progress.step % order.per_epoch == 0
        line |= {"epoch": progress.step // order.per_epoch} if epoch_ended else {}
        if epoch_ended and "val" in encoded:
            line["val_loss"] = val_loss(whole, encoded["val"].examples, options, run)
        shown = f"loss {total / tokens:.4f}" + (f", val {line['val_loss']:.4f}" if "val_loss" in line else "")
        run.tell(line, shown, updates)
        if epoch_ended:
            say(f"epoch {progress.step // order.per_epoch}: {shown}")
            run.save(write, line.get("val_loss"))
    steps = {
        command("sample.py", "--chat", run.folder): "talk with it",
        command("stages/dpo.py", run.folder, "--train=RANKINGS.jsonl"): "learn from preferences",
        command("stages/reward.py", run.folder, "--train=RANKINGS.jsonl"): "or a reward model, for stages/ppo.py",
    }
    return run.finish(write, steps)


def describe(split: EncodedConversations) -> str:
    tokens = sum(example.count for example in split.examples)
    parts = [f"{counted(len(split.examples), 'conversation')}, {counted(tokens, 'token')} of responses"]
    parts += [f"{split.cut:,} cut at a turn to fit the context"] * (split.cut > 0)
    parts += [f"{split.dropped:,} dropped: too long"] * (split.dropped > 0)
    return "; ".join(parts)


def main() -> int:
    return run_stage(SFTOptions, __doc__, "sft", train)


if __name__ == "__main__":
    entry_point(main)()
