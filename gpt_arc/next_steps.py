"""What to type next, at the end of a script. Words in capitals stand for what only the user knows."""

from gpt_arc.files import command


def next_steps(purposes: dict[str, str]) -> str:
    """Returns lines with commands and what each is for."""
    width = max(map(len, purposes))
    return "\n".join(["next:", *(f"  {each:<{width}}   {purpose}" for each, purpose in purposes.items())])


def after_preparation(name: str) -> str:
    """What to type once data/NAME is prepared."""
    dataset = f"--dataset={name}"
    return next_steps({
        command("train.py", "configs/quickstart.toml", dataset): "train a small model in minutes",
        command("train.py", "configs/gpt2_modern.toml", dataset, "--dry_run"): "what GPT-2's size would take",
    })  # fmt: skip
