"""A sweep in a report: its results, the laws that stages/scaling.py fitted to them, and the pictures that it drew."""

from html import escape
from pathlib import Path
from typing import NamedTuple

from typing_extensions import TypedDict

from gpt_arc.files import command
from gpt_arc.planning.fits import FinishedRun
from gpt_arc.reading import read_bytes, read_json
from gpt_arc.reports.images import picture
from gpt_arc.reports.parts import details, html_table, section
from gpt_arc.tables import amount, human
from gpt_arc.training.runs import OUT_ROOT

LARGEST_PICTURE = 16 << 20  # bytes


class LawFigures(TypedDict):
    constants: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    error: float


class TrendFigures(TypedDict):
    factor: float
    exponent: float


class LawsFile(TypedDict):
    """What a report shows of laws.json."""

    laws: dict[str, LawFigures]
    best_size: dict[str, TrendFigures]
    missing: dict[str, str]


class SweepContent(NamedTuple):
    folder: Path
    results: list[FinishedRun]
    laws: LawsFile | None  # None before they are fitted
    pictures: dict[str, bytes]  # PNGs by name

    @property
    def name(self) -> str:
        return self.folder.name


def sweep_folder(name: str) -> Path | None:
    """Returns the folder of a sweep that has results: one under out/, or a path. None if there is none."""
    return next((folder for folder in (OUT_ROOT / name, Path(name)) if (folder / "results.json").is_file()), None)


def read_sweep_folder(folder: Path) -> SweepContent:
    """Reads what a report shows of a sweep. Raises UserError for a damaged file."""
    laws = folder / "laws.json"
    return SweepContent(
        folder,
        read_json(folder / "results.json", list[FinishedRun]),
        read_json(laws, LawsFile) if laws.exists() else None,
        {path.stem: read_bytes(path, LARGEST_PICTURE) for path in sorted(folder.glob("*.png"))},
    )


def sweep_section(sweep: SweepContent) -> str:
    """Returns the HTML of a sweep."""
    parts = [f"<p>Fit laws with: {escape(command('stages/scaling.py', 'fit', sweep.folder))}</p>"]
    if sweep.laws:
        rows = [
            [name, constant, f"{value:.4g}", interval_text(law, constant), f"{law['error']:.2%}"]
            for name, law in sweep.laws["laws"].items()
            for constant, value in law["constants"].items()
        ]
        parts = [html_table(["law", "constant", "value", "95% interval", "error of the law"], rows)]
        best = [
            [name, f"{each['factor']:.4g} C^{each['exponent']:.3f}"] for name, each in sweep.laws["best_size"].items()
        ]
        parts += [html_table(["best size by", "parameters for C FLOPs"], best)] if best else []
        parts += [f"<p>not fitted: {escape(name)}: {escape(why)}</p>" for name, why in sweep.laws["missing"].items()]
    images = [picture(content, name) for name, content in sweep.pictures.items()]
    parts += [f'<div class="pictures">{"".join(images)}</div>'] if images else []
    runs = sorted(sweep.results, key=lambda run: run.val_loss)
    rows = [
        [run.run, f"{run.parameters:,}", amount(run.tokens), human(run.flops, "FLOP"), f"{run.val_loss:.4f}"]
        for run in runs
    ]
    parts.append(details("all runs", html_table(["run", "parameters", "tokens", "compute", "val loss"], rows)))
    return section(f"{sweep.name}: scaling laws", "\n".join(parts))


def interval_text(law: LawFigures, constant: str) -> str:
    low, high = law["intervals"].get(constant, (None, None))
    return "" if low is None else f"{low:.4g} to {high:.4g}"
