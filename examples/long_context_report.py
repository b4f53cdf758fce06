"""Tables of `bash examples/long_context_arc.sh` over several seeds, with standard errors.

    bash examples/long_context_arc.sh
    SEED=2 FOLDER=out/second bash examples/long_context_arc.sh
    python examples/long_context_report.py out/long_context_arc out/second

Prints by model and length the loss in nats, the share of characters copied and that of keys found, and how much the
loss at the longest length exceeds that of the model trained at 512, if there is one, compared within each seed. --json
writes the figures of each seed, and --plot draws the losses.
"""

import sys
from pathlib import Path
from statistics import fmean
from typing import Annotated

from annotated_types import MinLen
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.statistics import mean_and_error
from gpt_arc.extras import import_extra
from gpt_arc.files import replacing, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.reading import read_json
from gpt_arc.settings import STRICT, Picture, Positional, ResultFile
from gpt_arc.tables import markdown, to_json

REFERENCE = "rotary_512"
ROWS = {
    "rotary": "rotary, trained at 64",
    "rotary, linear": "stretched by the factor of the length, untrained: linear",
    "rotary, ntk": "ntk",
    "rotary, dynamic": "dynamic",
    "rotary, yarn": "yarn",
    "rotary, llama3": "llama3",
    "rotary_longer": "longer, without scaling",
    "rotary_linear": "longer, with linear by 8",
    "rotary_ntk": "longer, with ntk by 8",
    "rotary_yarn": "longer, with yarn by 8",
    "rotary_llama3": "longer, with llama3 by 8",
    REFERENCE: "rotary, trained at 512",
    "alibi": "ALiBi, trained at 64",
    "alibi_longer": "ALiBi, longer",
    "sinusoidal": "sinusoidal, trained at 64",
    "sinusoidal_longer": "sinusoidal, longer",
    "learned": "learned, trained at 64",
    "none": "none, trained at 64",
    "none_longer": "none, longer",
}
SHARED = {"alibi": "ALiBi", "sinusoidal": "sinusoidal", "none": "none"}
PANELS = (  # labels of the two panels' lines
    {"rotary": "rotary", "rotary, ntk": "rotary, ntk", "rotary, yarn": "rotary, yarn", "learned": "learned", **SHARED},
    {
        REFERENCE: ROWS[REFERENCE], "rotary_longer": "rotary", "rotary_linear": "rotary, linear",
        "rotary_ntk": "rotary, ntk", "rotary_yarn": "rotary, yarn",
        **{f"{name}_longer": label for name, label in SHARED.items()},
    },
)  # fmt: skip
Figures = dict[str, dict[str, dict[str, float]]]  # of a seed: model, length, and "loss", "copied" or "found"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    folders: Positional[Annotated[tuple[Path, ...], MinLen(1)]]
    """Folders of examples/long_context_arc.sh, one for each seed."""
    json: ResultFile | None = None
    """A file for the figures of each seed."""
    plot: Picture | None = None
    """A .png file for a plot of the losses by length."""


def read(folder: Path) -> Figures:
    """Returns the figures of a seed. Raises UserError if there are none."""
    path = folder / "figures.json"
    if not path.exists():
        raise UserError(f"{folder} has no figures: run bash examples/long_context_arc.sh with FOLDER={folder}")
    figures: Figures = {}
    for label, by_length in read_json(path)["models"].items():
        name = label.rpartition("/")[2]
        if name in ROWS:
            figures[name] = {
                length: {"loss": fmean(recall["losses"]), "copied": recall["copied"], "found": recall["found"]}
                for length, recall in by_length.items()
            }
    return figures


def values(seeds: list[Figures], name: str, length: str, key: str) -> list[float]:
    """Returns a figure in each seed that has it."""
    return [figures[name][length][key] for figures in seeds if length in figures.get(name, {})]


def differences(seeds: list[Figures], name: str, length: str) -> list[float]:
    """Returns how much the loss exceeds that of the model trained at 512, in each seed that has both."""
    pairs = [(figures.get(name, {}), figures.get(REFERENCE, {})) for figures in seeds]
    return [a[length]["loss"] - b[length]["loss"] for a, b in pairs if length in a and length in b]


def tables(seeds: list[Figures]) -> str:
    """Returns three markdown tables: losses, with the difference from REFERENCE if it is there, copies and keys."""
    lengths = sorted({length for figures in seeds for by_length in figures.values() for length in by_length}, key=int)
    compared = [f"over {ROWS[REFERENCE]}"] if any(REFERENCE in figures for figures in seeds) else []
    losses = [["loss, nats", *lengths, *compared]]
    shares = {"copied": [["copied, %", *lengths]], "found": [["keys found, %", *lengths]]}
    for name in (name for name in ROWS if any(name in figures for figures in seeds)):
        at = [values(seeds, name, length, "loss") for length in lengths]
        over = [differences(seeds, name, lengths[-1]) if name != REFERENCE else []] if compared else []
        losses.append([ROWS[name], *(mean_and_error(each) if each else "-" for each in (*at, *over))])
        for key, rows in shares.items():
            at = [[100 * share for share in values(seeds, name, length, key)] for length in lengths]
            rows.append([ROWS[name], *(mean_and_error(each, 1) if each else "-" for each in at)])
    return "\n\n".join(markdown(rows) for rows in (losses, *shares.values()))


def draw(seeds: list[Figures], path: Path) -> None:
    """Draws the mean loss by length of models as they were trained at 64, and of those trained further."""
    figure = import_extra("matplotlib.figure").Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    ticks = sorted({int(length) for by_length in seeds[0].values() for length in by_length})
    for axes, title, names in zip(panels, ("trained at 64", "and then at 512"), PANELS):
        for name, label in names.items():
            lengths = [length for length in seeds[0].get(name, {}) if values(seeds, name, length, "loss")]
            losses = [fmean(values(seeds, name, length, "loss")) for length in lengths]
            style = "k:" if name == REFERENCE else ".-"
            axes.plot(list(map(int, lengths)), losses, style, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.set_xlabel("length of the text, characters")
        axes.set_title(title)
        axes.legend(fontsize="small")
    panels[0].set_ylabel("loss, nats")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    seeds = [read(folder) for folder in options.folders]
    print(tables(seeds))
    if options.json:
        write_file(options.json, to_json({"seeds": seeds}) + "\n")
    if options.plot:
        draw(seeds, options.plot)


if __name__ == "__main__":
    entry_point(main)()
