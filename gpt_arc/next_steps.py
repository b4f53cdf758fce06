"""What to type next, at the end of a script. Words in capitals stand for what only the user knows."""

from pathlib import Path

from gpt_arc.errors import UserError
from gpt_arc.files import command


def next_steps(purposes: dict[str, str]) -> str:
    """Returns lines with commands and, before each, what it is for."""
    width = max(map(len, purposes.values()))
    return "\n".join(["next:", *(f"  {purpose:<{width}}  {each}" for each, purpose in purposes.items())])


def after_preparation(name: str) -> str:
    """What to type once data/NAME is prepared."""
    dataset = f"--dataset={name}"
    return next_steps({
        command("train.py", "configs/quickstart.toml", dataset): "train a small model in minutes",
        command("train.py", "configs/gpt2_modern.toml", dataset, "--dry_run"): "what GPT-2's size would take",
    })  # fmt: skip


def after_training(run: Path, dataset: str | None, longer: str, is_masked: bool = False) -> str:
    """What to type once a run of train.py has ended. `dataset` is None if its model has no tokenizer."""
    steps = {longer: "train for as long again"}
    if is_masked:
        steps = {
            command("sample.py", run, "--start=The [MASK] is"): "fill gaps with it",
            command("stages/finetune.py", run, "--train=LABELLED.csv"): "teach it to classify",
            **steps,
        }
    elif dataset is not None:
        steps = {
            command("sample.py", run): "write text with it",
            command("stages/eval.py", run, "--perplexity", dataset): "measure it",
            command("stages/sft.py", run, "--train=CHATS.jsonl"): "teach it to answer",
            command("stages/finetune.py", run, "--train=LABELLED.csv"): "teach it to classify",
            **steps,
        }
    return next_steps(steps)


def reads_text_alone(model: Path | str) -> UserError:
    """The error for a model without an image encoder, where one is needed."""
    train = command("stages/sft.py", model, "--train=IMAGES.jsonl", "--image_encoder=ENCODER")
    return UserError(f"{model} reads text alone: train it on images with: {train}")
