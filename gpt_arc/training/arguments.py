"""Command lines of train.py and of the stages, apart from what their settings lead to.

Nothing here imports torch, which takes two seconds: --help and mistakes are answered before it.
"""

import difflib
import sys
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, check_early
from gpt_arc.files import HELP, command, resource
from gpt_arc.flags import read_flags
from gpt_arc.settings import STRICT, Positional, read_files
from gpt_arc.training.config import Config


@dataclass(frozen=True, config=STRICT)
class Arguments:
    """The command line of train.py."""

    config_files: Positional[tuple[str, ...]] = ()
    """Config files (.toml), later ones winning; flags win over files."""
    config: Config = field(default_factory=Config)

    FIRST: ClassVar[tuple[str, ...]] = (
        *("dataset", "max_iters", "batch_size", "learning_rate", "warmup", "block_size", "n_layer", "n_head", "n_embd"),
        *("eval_interval", "out_dir", "init_from", "resume", "dry_run"),
    )


def config_file(name: str) -> str:
    """Returns the path of a config file: `name` itself, or that of a config that comes with gpt-arc, such as gpt2.

    Raises UserError.
    """
    if name.endswith(".toml"):
        return name
    preset = resource(f"configs/{name}.toml")
    if name == Path(name).name and preset.is_file():
        local = Path("configs", preset.name)
        return str(local if local.is_file() else preset)
    if name.endswith(".py"):
        convert = command("tools/from_nanogpt.py", name, f"{Path(name).stem}.toml")
        raise UserError(f"{name} is not a config file (.toml): convert a config of nanoGPT with: {convert}")
    near = difflib.get_close_matches(name, [path.stem for path in resource("configs").glob("*.toml")], n=1)
    hint = f"did you mean {near[0]}?" if near else "write flags as --name=value"
    raise UserError(f"{name} is not a config file (.toml); {hint}")


def read_arguments(description: str | None, args: list[str]) -> dict[str, Any]:
    """Returns the settings on the command line of train.py, by flat name. Raises UserError; --help prints and exits."""
    named = [arg for arg in args if arg.endswith(".toml") and not arg.startswith("-")]
    shown = read_files(Config, named)[0] if HELP & set(args) else {}
    return read_flags(Arguments, description, args, shown)


def read_stage_arguments(cls: type, description: str | None, args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Returns the settings files on the command line of a stage, which stand first, and the settings after them.

    Raises UserError; --help prints and exits.
    """
    count = next((i for i, arg in enumerate(args) if arg.startswith("-") or not arg.endswith(".toml")), len(args))
    former = getattr(cls, "OLD", {})
    shown = {name: value for name, value in read_files(cls, args[:count])[0].items() if name not in former}
    return args[:count], read_flags(cls, description, args[count:], shown)


def check_arguments(description: str | None) -> None:
    """Ends train.py at once if its command line asks for help or has a mistake."""
    check_early(lambda: read_arguments(description, sys.argv[1:]))


def check_stage_arguments(cls: type, description: str | None) -> None:
    """Ends a stage at once if its command line asks for help or has a mistake."""
    check_early(lambda: read_stage_arguments(cls, description, sys.argv[1:]))
