"""List the runs under out/, compare two of them, or remove one.

    python tools/runs.py                               every run, the newest last
    python tools/runs.py quickstart gpt2               settings that differ, and losses at equal steps
    python tools/runs.py --remove quickstart           delete what the run wrote, after asking
    python tools/runs.py --remove quickstart --yes     without asking

A run is the name of a folder under out/, or the path of one elsewhere.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


# Modules that need torch are imported in functions: --help needs none.

import contextlib
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Positional
from gpt_arc.tables import human, table

if TYPE_CHECKING:
    from gpt_arc.training.runs import Summary

STATES = {True: "finished", False: "unfinished", None: ""}
COMPARED_STEPS = 20  # at most
NOT_COMPARED = {"out_dir", "overwrite", "resume"}  # settings that say nothing about what is trained


@dataclass(frozen=True, config=STRICT)
class Options:
    names: Positional[tuple[str, ...]] = ()
    """Two runs to compare. None: list all runs."""
    remove: str | None = None
    """A run to delete: what it wrote, and no other files in its folder."""
    yes: bool = False
    """Delete without asking."""


def listing() -> str:
    """Returns a table of the runs under out/, the newest last, and a line for each that can't be read."""
    from gpt_arc.training.runs import OUT_ROOT, summary

    summaries, damaged = [], []
    for record in sorted(OUT_ROOT.glob("*/run.json")):
        try:
            summaries.append(summary(record.parent))
        except UserError as error:
            damaged.append(str(error))
    rows: list[list[Any]] = [["run", "stage", "from", "data", "steps", "val loss", "written", "size", ""]]
    for run in sorted(summaries, key=lambda run: run.written):
        steps = f"{run.step:,}" + (f" of {run.steps:,}" if run.steps is not None else "")
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written))
        figures = [steps, run.val_loss, written, human(run.size, "B"), STATES[run.finished]]
        rows.append([run.folder.name, run.stage, run.origin, run.data, *figures])
    if not summaries and not damaged:
        return f"there are no runs under {OUT_ROOT}/; start one with: {command('train.py', 'configs/quickstart.toml')}"
    return "\n".join([table(rows), *damaged])


def comparison(a: "Summary", b: "Summary") -> str:
    """Returns tables of the settings that differ and of the losses at equal steps."""
    names = [run.folder.name for run in (a, b)]
    facts = [{"stage": run.stage} | run.settings for run in (a, b)]
    rows = [["setting", *names]]
    rows += [
        [name, *(str(each.get(name, "")) for each in facts)]
        for name in facts[0] | facts[1]
        if name not in NOT_COMPARED and facts[0].get(name) != facts[1].get(name)
    ]
    curves = [losses(run) for run in (a, b)]
    steps = [step for step in curves[0] if step in curves[1]]
    evaluated = [step for step in steps if all(curve[step][1] is not None for curve in curves)]
    steps = evaluated or steps
    shown = steps[:: math.ceil(len(steps) / COMPARED_STEPS) or 1]
    shown += steps[-1:] if steps[-1:] != shown[-1:] else []
    header = ["step", *(f"{loss} {name}" for loss in ("train", "val") for name in names)]
    losses_table = table([header, *([step, *(curve[step][i] for i in (0, 1) for curve in curves)] for step in shown)])
    return f"{table(rows)}\n\n" + (losses_table if shown else "no step has a loss in both runs")


def losses(run: "Summary") -> dict[int, tuple[float | None, float | None]]:
    """Returns the train and val loss by step."""
    curve: dict[int, tuple[float | None, float | None]] = {}
    for line in run.metrics:
        train, val = curve.get(line["step"], (None, None))
        curve[line["step"]] = line.get("train_loss", train), line.get("val_loss", val)
    return {step: pair for step, pair in curve.items() if pair != (None, None)}


def remove(folder: Path, without_asking: bool) -> None:
    """Deletes what a run wrote. Raises UserError if a process is training in it, or nobody can be asked."""
    from gpt_arc.training import runs

    try:
        lock = runs.Lock(folder)
    except UserError:
        raise UserError(f"{folder} can't be removed: a process is training in it") from None
    if not without_asking:
        if not (sys.stdin and sys.stdin.isatty()):
            raise UserError(f"nobody can be asked whether to remove {folder}: add --yes")
        if input(f"remove {folder} with all its checkpoints? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing is removed")
            return
    runs.clear(folder)
    del lock  # a file in the folder
    with contextlib.suppress(OSError):  # it holds files that the run didn't write
        folder.rmdir()
    kept = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.exists() else ""
    print(f"removed {folder}" + (f", except what the run didn't write: {kept}" if kept else ""))


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if options.remove is not None:
        if options.names:
            raise UserError(f"--remove takes one run, and {options.names[0]} stands beside it")
        from gpt_arc.training.runs import run_folder

        remove(run_folder(options.remove), options.yes)
    elif not options.names:
        print(listing())
    elif len(options.names) == 2:
        from gpt_arc.training.runs import run_folder, summary

        print(comparison(*(summary(run_folder(name)) for name in options.names)))
    else:
        raise UserError(f"two runs are compared, not {len(options.names)}: {command('tools/runs.py', 'RUN', 'RUN')}")


if __name__ == "__main__":
    entry_point(main)()
