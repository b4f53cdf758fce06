"""Write a report of training runs: an HTML file with curves, samples, settings and checkpoints, and PNGs.

    python tools/report.py quickstart                  writes out/quickstart/report/report.html
    python tools/report.py out/a out/b --output=a_b    compares two runs, in the folder a_b
    python tools/report.py quickstart --watch          writes it again and again while the run goes on
    python tools/report.py quickstart --attention="The "       adds the attention in a prompt, by layer and head

A run is the name of a folder under out/, or the path of one elsewhere; that of a sweep by stages/scaling.py shows its
results and the laws fitted to them. The HTML file needs no other file, and no network.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


# Modules that need torch are imported in functions: --help needs none.

import sys
import time
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positional


@dataclass(frozen=True, config=STRICT)
class Options:
    runs: Positional[Annotated[tuple[str, ...], MinLen(1)]]
    """The runs, or sweeps. Several runs are compared."""
    output: Path | None = None
    """Folder for report.html and the PNGs. None: report, in the folder of the first run."""
    watch: bool = False
    """Write the report again while one of the runs goes on; the page reloads itself."""
    attention: Annotated[str, MinLen(1)] | None = None
    """Prompt in which the attention of each run's best checkpoint is shown, by layer and head. None: no maps."""
    interval: Count = 10
    """Seconds between two reports of watch."""


def write(options: Options) -> bool:
    """Writes the report. Returns whether one of the runs goes on."""
    from gpt_arc.reports.charts import charts_of, draw_all
    from gpt_arc.reports.content import read_run
    from gpt_arc.reports.page import page
    from gpt_arc.reports.sweeps import read_sweep_folder, sweep_folder
    from gpt_arc.training.runs import run_folder

    folders = {name: sweep_folder(name) for name in options.runs}
    sweeps = [read_sweep_folder(folder) for folder in dict.fromkeys(folders.values()) if folder]
    run_folders = dict.fromkeys(run_folder(name) for name, folder in folders.items() if not folder)
    runs = [read_run(folder, options.attention) for folder in run_folders]
    charts, goes_on = charts_of(runs), any(run.state == "running" for run in runs)
    output = options.output or next(filter(None, (*folders.values(), *run_folders))) / "report"
    output.mkdir(parents=True, exist_ok=True)
    refresh = options.interval if options.watch and goes_on else None
    write_file(output / "report.html", page(runs, charts, refresh, sweeps))
    written = [output / "report.html"]
    try:
        written += draw_all(runs, charts, output)
    except UserError as error:
        print(f"no PNGs: {error}", file=sys.stderr)
    print(f"wrote {', '.join(map(str, written))}", flush=True)
    return goes_on


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    while write(options) and options.watch:
        time.sleep(options.interval)


if __name__ == "__main__":
    entry_point(main)()
