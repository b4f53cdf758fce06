"""The console command gpt-arc: runs the script of each subcommand in a Python process of its own.

gpt-arc COMMAND ARGUMENTS does what `python SCRIPT ARGUMENTS` does in a clone. A config such as configs/quickstart.toml
that isn't in the current folder is the one that comes with gpt-arc.
"""

import gpt_arc.startup  # noqa: F401

# isort: split
import os
import signal
import subprocess
import sys

from gpt_arc import completion
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import CONSOLE, HELP, resource

COMMANDS = {
    "new": ("new.py", "train on your own text, chosen settings included: gpt-arc new book.txt"),
    "train": ("train.py", "train a GPT: gpt-arc train configs/quickstart.toml"),
    "sample": ("sample.py", "continue a prompt with a trained model"),
    "chat": ("sample.py", "talk with a model that learned conversations: gpt-arc chat out/sft"),
    "prepare": ("prepare", "turn text into token files: gpt-arc prepare text --input book.txt --name book"),
    "pretrain-encoder": ("stages/pretrain_encoder.py", "train an image encoder on labelled images"),
    "sft": ("stages/sft.py", "fine-tune on conversations"),
    "reward": ("stages/reward.py", "train a reward model on rankings"),
    "ppo": ("stages/ppo.py", "learn from a reward"),
    "dpo": ("stages/dpo.py", "learn from preferences without a reward model"),
    "finetune": ("stages/finetune.py", "fine-tune on labels"),
    "translate": ("stages/translate.py", "train an encoder-decoder on pairs of a source and a target"),
    "scaling": ("stages/scaling.py", "fit scaling laws, and plan or predict a run: gpt-arc scaling plan --days=1"),
    "eval": ("stages/eval.py", "measure perplexity and tasks"),
    "runs": ("tools/runs.py", "list the runs under out/, compare two, remove one"),
    "report": ("tools/report.py", "write a page of a run's curves, samples and settings"),
    "playground": ("tools/playground.py", "try models in the browser, and serve them by OpenAI's API"),
    "export": ("tools/export.py", "write a model for transformers and other libraries"),
    "from-nanogpt": ("tools/from_nanogpt.py", "bring a model, a config or prepared data over from nanoGPT"),
    "llava": ("tools/llava.py", "turn a LLaVA of transformers into a model that reads images, or back"),
    "upcycle": ("tools/upcycle.py", "turn a dense model into a mixture of experts"),
    "expert-use": ("tools/expert_use.py", "show which experts which tokens take"),
    "long-context": ("tools/long_context.py", "measure how far back models use their context"),
    "image-attention": ("tools/image_attention.py", "draw where a model looks while it answers about an image"),
    "bench": ("tools/bench.py", "measure speed on this machine"),
}


def usage() -> str:
    commands = "\n".join(f"  {name:<18}{purpose}" for name, (_, purpose) in COMMANDS.items())
    return (
        f"usage: gpt-arc COMMAND ARGUMENTS\n\n{commands}\n\n"
        "`gpt-arc COMMAND --help` describes the arguments of one command. With several processes:\n"
        "torchrun --standalone --nproc_per_node=8 --no-python gpt-arc train configs/gpt2.toml\n\n"
        f"configs: {resource('configs')}\ntasks:   {resource('tasks')}"
    )


def with_packaged_configs(arguments: list[str]) -> list[str]:
    """Replaces each configs/NAME.toml that isn't in the current folder by the one that comes with gpt-arc."""

    def located(argument: str) -> str:
        is_config = argument.startswith("configs/") and argument.endswith(".toml")
        if is_config and not os.path.exists(argument) and resource(argument).is_file():
            return str(resource(argument))
        return argument

    return [located(argument) for argument in arguments]


def script_command(name: str, arguments: list[str]) -> list[str]:
    """The script of a command and its arguments. Raises UserError if there is no such script."""
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    script = resource(COMMANDS[name][0])
    if name == "prepare":
        names = sorted(path.stem for path in script.glob("*.py"))
        if HELP & set(arguments[:1]):
            print(f"usage: gpt-arc prepare NAME ARGUMENTS\n\nNAME is one of {', '.join(names)}.")
            raise SystemExit(0)
        if not arguments or arguments[0] not in names:
            raise UserError(f"name what to prepare: gpt-arc prepare {', '.join(names)}")
        script, arguments = script / f"{arguments[0]}.py", arguments[1:]
    if name == "chat" and not HELP & set(arguments[:1]):
        if not arguments or arguments[0].startswith("-"):
            raise UserError("name the model to talk with: gpt-arc chat out/sft")
        arguments = ["--chat", *arguments]
    return [str(script), *with_packaged_configs(arguments)]


def complete() -> None:
    """Answers the shell, which asks what may stand at the cursor."""
    words = completion.words_before_cursor()[1:]
    if not words:
        completion.answer_names(COMMANDS)
    if words == ["prepare"]:
        completion.answer_names(sorted(path.stem for path in resource("prepare").glob("*.py")))
    name = "sample" if words[0] == "chat" else words[0]  # whose flags they are
    os.execv(sys.executable, [sys.executable, *script_command(name, words[1:])])


def run() -> int | None:
    if completion.ASKED:
        return complete()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in HELP:
        print(usage())
        return None
    command = [sys.executable, *script_command(name, arguments)]
    os.environ[CONSOLE] = "1"
    if os.name == "nt":  # its execv doesn't wait for the end of the command
        return subprocess.call(command)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the script's `startup`
    os.execv(sys.executable, command)


main = entry_point(run)


if __name__ == "__main__":
    main()
