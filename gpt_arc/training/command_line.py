"""The command lines of train.py and of the stages."""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_arc import distributed
from gpt_arc.device import resolve_device
from gpt_arc.distributed import IS_MAIN, LOCAL_RANK, WORLD_SIZE, say
from gpt_arc.errors import UserError
from gpt_arc.files import command, resource
from gpt_arc.settings import build, merge, mistake, read_files, values_of
from gpt_arc.training.arguments import config_file, read_arguments, read_stage_arguments
from gpt_arc.training.config import OWN_RUNS, SETTINGS, Config, RunConfig, check_effects
from gpt_arc.training.options import O, StageOptions, refuse_others
from gpt_arc.training.runs import Lock, newest_run, read_record, stage_of
from gpt_arc.training.stage_record import located, recorded_options, resume_command
from gpt_arc.training.stage_run import P, StageProgress, StageRun
from gpt_arc.weights.checkpoint_folders import named_checkpoint
from gpt_arc.weights.directory import OF_TRAINING, load_config, refuse_images
from gpt_arc.weights.huggingface import STRETCHING
from model import GPTConfig


@dataclass(frozen=True)
class Launch:
    """A parsed command line of train.py."""

    config: Config
    name: str  # of the config file
    files: tuple[str, ...]
    overrides: dict[str, Any]  # settings that differ from those in the files
    resumed: Path | None  # the run to resume
    checkpoint: Path | None  # the folder in it to resume from, once the run is locked
    imported: str | None  # the model to start from
    adopted: dict[str, Any]  # settings of its architecture that replace those in files and flags

    @property
    def run_name(self) -> str:
        """The name of a new run: the config's, and the dataset's where a flag names another than the config."""
        dataset = self.overrides.get("dataset")
        return f"{self.name}-{Path(dataset).name}" if dataset else self.name


def read_command_line(args: list[str], description: str | None) -> Launch:
    """Reads settings from files and flags; on resume also the run's original flags, which new flags override.

    So `--resume=RUN` alone keeps all settings, while an edited config file and a new flag both take effect. Comparison
    with the checkpoint then finds settings that contradict the model. Raises UserError.
    """
    flags = read_arguments(description, args)
    files = distinct(list(map(config_file, flags.pop("config_files", ()))))
    name = _name_of(Path(files[-1])) if files else ""
    settings, sources = read_files(Config, files)
    given = merge(Config, settings, flags)
    run_settings = {setting: value for setting, value in given.items() if SETTINGS[setting].table == "run"}
    run = build(RunConfig, run_settings, {name: source for name, source in sources.items() if name not in flags})
    resumed, recorded = None, {}
    if run.resumes:
        folder = run.resume or run.out_dir
        resumed = newest_run(name or None) if folder is None else Path(folder)
        check_resumable(resumed)
        recorded_name, recorded = read_record(resumed)
        if not files:
            files = [str(resumed / "config.toml")]
            if not Path(files[0]).exists():
                again = command(sys.argv[0], _findable(recorded_name), f"--resume={resumed}")
                raise UserError(f"{files[0]} is missing: name the run's config file, for instance: {again}")
            settings, sources = read_files(Config, files)
    sources |= dict.fromkeys(recorded, f"{resumed}/run.json")
    values = merge(Config, merge(Config, settings, recorded), flags)
    sources = {name: source for name, source in sources.items() if name not in flags}
    config = build(Config, values, sources)
    config = without_samples(config, "sample_interval" in flags)
    if not files:
        raise UserError(f"name a config file, for instance: {command('train.py', 'configs/quickstart.toml')}")
    for setting in sorted((settings | recorded).keys() - values.keys()):
        say(f"settings       {Config.INSTEAD[setting]} replaces {setting}, which {sources[setting]} sets")
    file_values = values_of(Config()) | settings
    overrides = {
        setting: value
        for setting, value in values_of(config).items()
        if SETTINGS[setting].table != "run"
        and setting != "mixture"
        and (setting in recorded or value != file_values[setting])
    }
    imported, adopted = None, {}
    if config.run.init_from not in OWN_RUNS:
        imported = config.run.init_from
        config, adopted = adopt_architecture(config, imported, flags)
    check_effects(config, flags)
    name = name or _name_of(Path(files[-1]))
    return Launch(config, name, tuple(files), overrides | adopted, resumed, None, imported, adopted)


def distinct(files: list[str]) -> list[str]:
    """Returns the files in the order in which they win: one that is named again counts where it is named last."""
    for file in dict.fromkeys(files):
        if files.count(file) > 1:
            say(f"settings       of {file}, which is named {files.count(file)} times")
    return list(dict.fromkeys(reversed(files)))[::-1]


def without_samples(config: Config, requested: bool) -> Config:
    """Returns `config` without samples if its model is divided among processes; a line says so.

    Raises UserError if the command line `requested` them.
    """
    training, interval = config.training, config.logging.sample_interval
    dividing = {
        f"expert_processes = {training.expert_processes}": training.expert_processes > 1,
        f"tensor_processes = {training.tensor_processes}": training.tensor_processes > 1,
        "parallel = fsdp": training.parallel == "fsdp",
    }
    dividing = next((name for name, divides in dividing.items() if divides), None)
    if not (interval and dividing):
        return config
    if requested:
        raise UserError(
            f"sample_interval = {interval} samples from a whole model, and {dividing} divides it: leave one out"
        )
    say(f"samples        none: {dividing} divides the model")
    return dataclasses.replace(config, logging=dataclasses.replace(config.logging, sample_interval=0))


def check_resumable(run: Path) -> None:
    """Raises UserError, with what to do instead, if a folder isn't a run of train.py that has a checkpoint."""
    if (stage := stage_of(run)) != "train":
        again = command(f"stages/{stage}.py", f"--resume={run}")
        raise UserError(f"{run} is a run of {stage}.py; resume it with: {again}")
    if named_checkpoint(run, "last") is not None:
        return
    if (run / "training_state.pt").exists():
        raise UserError(f"{run} is a checkpoint: name the folder of its run, --resume={shlex.quote(str(run.parent))}")
    if not (run / "run.json").exists():
        raise UserError(f"there is no checkpoint to resume from in {run}: name another run, or start a new one")
    if IS_MAIN:
        Lock(run)  # another process may be about to write the first one
    name, overrides = read_record(run)
    file = str(run / "config.toml") if (run / "config.toml").exists() else _findable(name)
    flags = (f"--{setting}={value}" for setting, value in overrides.items())
    again = command(sys.argv[0], file, *flags, f"--out_dir={run}", "--overwrite")
    raise UserError(f"there is no checkpoint to resume from in {run}: start it over with: {again}")


def adopt_architecture(config: Config, name: str, flags: Container[str] = ()) -> tuple[Config, dict[str, Any]]:
    """Returns `config` with the architecture of the model `name`, and the settings that this changed.

    Keeps settings that only training reads, such as dropout, and a context shorter than the model's; with
    extend_context also a longer one and rotary_scaling. Raises UserError, also if it would change one of the `flags`.
    """
    refuse_images(name)
    requested, imported = config.model, load_config(name)
    if requested.n_experts and not imported.n_experts:
        upcycle = command("tools/upcycle.py", name, "UPCYCLED", f"--n_experts={requested.n_experts}")
        raise UserError(f"n_experts = {requested.n_experts}, and {name} is dense: make a mixture of it with: {upcycle}")
    kept = {name: getattr(requested, name) for name in OF_TRAINING}
    kept["block_size"] = min(requested.block_size, imported.block_size)
    if config.run.extend_context:
        kept["block_size"] = requested.block_size
        if requested.rotary_scaling:
            kept |= {name: getattr(requested, name) for name in STRETCHING}
        if imported.positions == "learned" and requested.block_size > imported.block_size:
            raise UserError(
                f"{name} has learned {imported.block_size} positions and none for a block_size of "
                f"{requested.block_size}: extend_context is for models with other positions"
            )
    try:
        model = dataclasses.replace(imported, **kept)
        adopting = dataclasses.replace(config, model=model)
    except ValueError as error:
        raise UserError(f"with the architecture of {name}: {mistake(error, Config)}") from None
    adopted = {n: value for n, value in dataclasses.asdict(model).items() if value != getattr(requested, n)}
    if flag := next((setting for setting in adopted if setting in flags), None):
        stretches = flag in {"block_size", *STRETCHING} and imported.positions != "learned"
        raise UserError(
            f"{name} has {flag} = {adopted[flag]}, which --{flag}={getattr(requested, flag)} can't change: leave it out"
            + ", or train the model at another context with --extend_context" * stretches
        )
    return adopting, adopted


def _findable(name: str) -> str:
    """Returns a recorded config as it may be named: by its name if it comes with gpt-arc, else by a file's."""
    return name if name.endswith(".toml") or resource(f"configs/{name}.toml").is_file() else f"{name}.toml"


def _name_of(config_file: Path) -> str:
    """Returns the name of a config: that of its file, or of the run folder if the file is a run's config.toml."""
    run_name = config_file.name == "config.toml" and config_file.parent.name
    return run_name or config_file.stem


def check_same_model(requested: GPTConfig, trained: GPTConfig, run: Path) -> None:
    """Raises UserError if `requested` contradicts the trained model; settings that only training reads may change."""
    for setting in dataclasses.fields(GPTConfig):
        new, original = getattr(requested, setting.name), getattr(trained, setting.name)
        if new != original and setting.name not in OF_TRAINING:
            raise UserError(
                f"{setting.name} = {new} contradicts the run {run}, whose model has {setting.name} = {original}: "
                "keep that value to resume, or start a new run"
            )


def read_options(cls: type[O], description: str | None, args: list[str]) -> O:
    """Reads the options of a stage from settings files (.toml), named first, and flags, which win. Raises UserError."""
    files, flags = read_stage_arguments(cls, description, args)
    settings, sources = read_files(cls, distinct(files))
    return build(cls, merge(cls, settings, flags), {n: source for n, source in sources.items() if n not in flags})


def check_model(options: StageOptions) -> None:
    """Raises UserError unless a model or a run to resume is named."""
    if options.start is None and not options.resume:
        raise UserError(f"name a model to start from: {command(sys.argv[0], 'MODEL')}; --help lists the settings")


def run_stage(cls: type[O], description: str | None, name: str, train: Callable[[O, StageRun], int]) -> int:
    """Read the command line and run a stage's `train`. Returns the exit code."""
    options = read_options(cls, description, sys.argv[1:])
    check_model(options)
    return start_stage(options, name, train, StageProgress)


def confirm_code(options: StageOptions, recorded: StageOptions, command: str) -> None:
    """Raises UserError unless the command line names again the code that a resumed run names in its record.

    Whoever wrote the folder could have named any code there.
    """
    for setting, value in recorded.code.items():
        given = getattr(options, setting)
        if given not in (None, value):
            raise UserError(f"--{setting} = {given} can't be changed: the run was started with {value}")
        if given is None:
            raise UserError(
                f"the run names Python code, {setting} = {value}, which is imported only from the command line: if you "
                f"trust it, resume with: {command}"
            )


def start_stage(options: O, name: str, train: Callable[[O, StageRun[P]], int], progress: type[P]) -> int:
    """Run a stage's `train`, new or resumed, among the processes that torchrun started. Returns the exit code."""
    folder, lock = None, None
    if options.resume:
        is_old_form = options.resume == "True"  # RUN --resume=True
        resumed = options.model if is_old_form else options.resume
        if resumed is None:
            raise UserError("name the run to resume: --resume=RUN")
        folder = Path(resumed)
        recorded = recorded_options(folder, type(options), name)
        anew = ("device", "backend", "stop_after", "quiet")
        allowed = {"resume", "logger", "wandb_log", *anew, *recorded.code}
        allowed |= {"model"} if is_old_form else set()
        refuse_others(options, allowed, "can't be changed: --resume keeps the run's original settings")
        confirm_code(options, recorded, resume_command(sys.argv[0], folder, recorded))
        given: dict[str, Any] = {each: getattr(options, each) for each in anew}
        given["resume"] = str(folder)
        for setting in ("logger", "wandb_log"):
            value = getattr(options, setting)
            given[setting] = getattr(recorded, setting) if value is None else value
        options = dataclasses.replace(recorded, **given)
        lock = Lock(folder) if IS_MAIN else None
    else:
        options = located(options)
    device = resolve_device(options.device, LOCAL_RANK)
    with distributed.process_group(options.backend, device, options.timeout_minutes):
        run = StageRun(name, options, device, folder, lock, progress, sys.argv[0])
        try:
            return train(options, run)
        except UserError:
            run.abandon()
            raise
        except RuntimeError:  # such as the end of another process
            if WORLD_SIZE > 1:
                run.say_saved()
            raise
