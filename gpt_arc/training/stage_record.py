"""What a run of a stage records in run.json: its settings, from which --resume builds them again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gpt_arc.data.hub_sets import names_hub_set, pinned
from gpt_arc.distributed import launch_command
from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.reading import read_json
from gpt_arc.settings import build, read_value
from gpt_arc.training.options import O, StageOptions
from gpt_arc.training.runs import Record


def located(options: O) -> O:
    """The options, with models on this disk by their absolute paths and data sets on the hub by their commits.

    So a resumed run reads the same. Raises UserError.
    """
    named = {name: getattr(options, name) for name in options.PATHS}
    whole = {name: str(Path(value).resolve()) for name, value in named.items() if value and Path(value).exists()}
    values = {one.name: getattr(options, one.name) for one in dataclasses.fields(options)}
    sets = {name: pinned(value) for name, value in values.items() if isinstance(value, Path) and names_hub_set(value)}
    return dataclasses.replace(options, **whole, **sets)


def resume_command(script: str, run: Path | str, options: StageOptions) -> str:
    """Returns the command that resumes a run of a stage, with as many processes as now."""
    return launch_command(script, f"--resume={run}", *(f"--{name}={value}" for name, value in options.code.items()))


def record_options(run: Path, stage: str, options: Any, hardware: str | None = None) -> None:
    """run.json: the options that a run was started with, paths made absolute, and the `hardware` it runs on."""
    recorded = dataclasses.asdict(options)
    for name, value in recorded.items():
        may_be_path = name in getattr(options, "PATHS", ("model",))
        if value is None or names_hub_set(value):
            continue
        if isinstance(value, Path) or may_be_path and Path(value).exists():
            recorded[name] = str(Path(value).resolve())
    content = {"stage": stage, "config": stage, "overrides": {}, "options": recorded}
    content |= {"hardware": hardware} if hardware else {}
    write_file(run / "run.json", json.dumps(content, default=str, indent=1) + "\n")


def record_steps(run: Path, steps: int) -> None:
    """Adds to run.json how many steps the run has in all."""
    path = run / "run.json"
    write_file(path, json.dumps(read_json(path, Record) | {"steps": steps}, indent=1) + "\n")


def recorded_options(run: Path, cls: type[O], stage: str) -> O:
    """The options in the run.json that `record_options` wrote. Raises UserError."""
    path = run / "run.json"
    try:
        content = read_json(path, Record)
        if content.get("stage", "train") != stage:
            raise ValueError(f"it is a run of {content.get('stage', 'train')}.py")
        values = {name: read_value(cls, name, value, "options") for name, value in content["options"].items()}
        return build(cls, values, dict.fromkeys(values, "options"))
    except (ValueError, KeyError) as error:
        raise UserError(f"{run} is not a run of {stage}.py that could go on ({path}: {error})") from None
