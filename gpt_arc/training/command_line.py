"""The command line of train.py."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from gpt_arc.errors import UserError
from gpt_arc.flags import parse_flags
from gpt_arc.training.config import (
    SETTINGS,
    Config,
    RunConfig,
    build_config,
    merge,
    read_files,
    settings_of,
)
from gpt_arc.training.runs import newest_run, read_record
from gpt_arc.weights.directory import OF_TRAINING, load_config
from model import GPTConfig


@dataclass(frozen=True)
class Arguments:
    """The command line of train.py."""

    config_files: tyro.conf.Positional[tuple[str, ...]] = ()
    """Config files (.toml), later ones winning; flags win over files."""
    config: Config = field(default_factory=Config)


def parse_arguments(args: list[str], description: str | None, settings: dict[str, Any], source: str) -> Config:
    """`settings`, which came from `source`, with the flags among `args` over them. Raises UserError."""
    if any(arg.split("=")[0] == "--dataset" for arg in args):
        settings = {name: value for name, value in settings.items() if name != "mixture"}
    base = build_config(settings, source)
    files = config_files(args)
    args = files + [arg for arg in args if arg not in files]  # tyro wants them side by side
    parsed = parse_flags(Arguments, description, args, Arguments(config=base))
    for file in set(parsed.config_files) - set(files):
        raise UserError(f"{file} is not a config file, whose name would end in .toml; flags are written --name=value")
    return parsed.config


def parse_run_flags(args: list[str], settings: dict[str, Any], source: str) -> RunConfig:
    """[run] alone, from `settings` and `args`: what has to be known before the rest can be read."""
    default = build_config({name: value for name, value in settings.items() if SETTINGS[name][0] == "run"}, source).run
    return parse_flags(RunConfig, None, args, default, partly=True)


def config_files(args: list[str]) -> list[str]:
    """The config files among command-line arguments: those that end in .toml."""
    return [arg for arg in args if arg.endswith(".toml") and not arg.startswith("-")]


@dataclass(frozen=True)
class Launch:
    """What a command line of train.py asks for."""

    config: Config
    name: str  # of the config file, and so of the run
    files: tuple[str, ...]
    overrides: dict[str, Any]  # settings that differ from the files'
    resumed: Path | None  # the run to go on with
    imported: str | None  # the model to start from
    adopted: dict[str, Any]  # settings of its architecture that replace the files' and flags'


def read_command_line(args: list[str], description: str | None) -> Launch:
    """Settings from files and flags; on resume also the flags that the run was started with, below the present ones.

    So `--init_from=resume` alone goes on as before, an edited config file and a new flag both take effect, and what
    contradicts the model is found by comparing with the checkpoint. Raises UserError.
    """
    files = config_files(args)
    name = _name_of(Path(files[-1])) if files else ""
    settings = read_files(files)
    wanted = parse_run_flags(args, settings, ", ".join(files))
    resumed, recorded = None, {}
    if wanted.init_from == "resume":
        resumed = newest_run(name or None) if wanted.out_dir is None else Path(wanted.out_dir)
        if not (resumed / "last" / "config.json").exists():
            raise UserError(f"there is no checkpoint to resume from in {resumed}: leave init_from out to begin anew")
        recorded = read_record(resumed)[1]
        if not files:
            files = [str(resumed / "config.toml")]
            settings = read_files(files)
    config = parse_arguments(args, description, merge(settings, recorded), ", ".join(files))
    if not files:
        raise UserError("name a config file, for instance: python train.py configs/quickstart.toml")
    of_files = settings_of(Config()) | settings
    overrides = {
        setting: value
        for setting, value in settings_of(config).items()
        if SETTINGS[setting][0] != "run"
        and setting != "mixture"
        and (setting in recorded or value != of_files[setting])
    }
    imported, adopted = None, {}
    if wanted.init_from not in ("scratch", "resume"):
        imported = wanted.init_from
        config, adopted = adopt_architecture(config, imported)
    name = name or _name_of(Path(files[-1]))
    return Launch(config, name, tuple(files), overrides | adopted, resumed, imported, adopted)


def adopt_architecture(config: Config, name: str) -> tuple[Config, dict[str, Any]]:
    """`config` with the architecture of the model `name`, and the settings that this changed.

    What training alone reads, such as dropout, stays as it is set, and so does a context shorter than the model's.
    Raises UserError.
    """
    asked, imported = config.model, load_config(name)
    if asked.n_experts and not imported.n_experts:
        raise UserError(f"n_experts = {asked.n_experts}, and {name} is dense: tools/upcycle.py makes a mixture of it")
    kept = {name: getattr(asked, name) for name in OF_TRAINING}
    kept["block_size"] = min(asked.block_size, imported.block_size)
    model = dataclasses.replace(imported, **kept)
    try:
        adopted = {n: value for n, value in dataclasses.asdict(model).items() if value != getattr(asked, n)}
        return dataclasses.replace(config, model=model), adopted
    except ValueError as error:
        raise UserError(f"with the architecture of {name}: {error}") from None


def _name_of(config_file: Path) -> str:
    """The name of a config: its file's, or that of the run whose config.toml it is."""
    of_run = config_file.name == "config.toml" and config_file.parent.name
    return of_run or config_file.stem


def check_same_model(asked: GPTConfig, trained: GPTConfig, run: Path) -> None:
    """Raises UserError if a run can't go on with the settings `asked` for; what training alone reads may change."""
    for setting in dataclasses.fields(GPTConfig):
        wanted, has = getattr(asked, setting.name), getattr(trained, setting.name)
        if wanted != has and setting.name not in OF_TRAINING:
            raise UserError(
                f"{setting.name} = {wanted} contradicts the run {run}, whose model has {setting.name} = {has}: "
                "leave it as it was to resume, or start a new run"
            )
