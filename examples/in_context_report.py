"""Gather what stages/eval.py found on the held-out mappings of examples/in_context_data.py: a table and a plot.

    python examples/in_context_report.py --data data/in_context --results out/in_context_arc/results

RESULTS has NUMBER.json, and NUMBER.shuffled.json with random answers in the demonstrations, of every held-out mapping.
Beside the model stands the best learner there can be: a letter that a demonstration shows it knows, the images of other
letters it guesses among those left. Standard errors are those of a mean over mappings. Writes table.txt, figures.json
and accuracy.png beside RESULTS.
"""

import json
import sys
from math import prod
from pathlib import Path

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.items import demonstrations, load_items
from gpt_arc.evaluation.statistics import paired_p_value, standard_error
from gpt_arc.evaluation.tasks import load_task
from gpt_arc.files import DATA_ROOT, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT
from gpt_arc.tables import table

LETTERS = 10


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    data: Path = DATA_ROOT / "in_context"
    """Folder that examples/in_context_data.py wrote."""
    results: Path = Path("out/in_context_arc/results")
    """Folder of what stages/eval.py wrote."""


def best_chance(shown: str, word: str) -> float:
    """Probability that the best guess of a word's image is right, after demonstrations "dab>hfc", a line each."""
    known = {letter for line in shown.split() for letter in line.split(">")[0]}
    unknown, left = len(set(word) - known), LETTERS - len(known)
    return 1 / prod(range(left - unknown + 1, left + 1))


def gather(options: Options) -> dict[str, dict[int, list[list[float]]]]:
    """Of the model, its control and the best learner, for each number of shots and mapping, whether items are right."""
    task = load_task(str(Path(__file__).with_name("in_context.toml")))
    found: dict[str, dict[int, list[list[float]]]] = {"model": {}, "answers shuffled": {}, "best possible": {}}
    mappings = json.loads((options.data / "mappings.json").read_text())
    for number in range(len(mappings)):
        items, pool = (load_items(task, "", options.data / f"{number}/{name}.jsonl", 0) for name in ("items", "pool"))
        for name, ending in (("model", ".json"), ("answers shuffled", ".shuffled.json")):
            path = options.results / f"{number}{ending}"
            if not path.exists():
                raise UserError(f"there is no {path}: bash examples/in_context_arc.sh makes them all")
            report = json.loads(path.read_text())
            for r in report["models"][0]["tasks"]:
                if r["metric"] == "accuracy":
                    found[name].setdefault(r["shots"], []).append(r["values"])
        seed = report["options"]["seed"]
        for shots in found["model"]:
            shown = (demonstrations(task, pool, i, shots, seed, shuffled=False) for i in range(len(items)))
            chances = [best_chance(text, item["input"]) for text, item in zip(shown, items)]
            found["best possible"].setdefault(shots, []).append(chances)
    return found


def plot(figures: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, style in {"best possible": "k--", "model": "C0o-", "answers shuffled": "C3s-"}.items():
        mine = [f for f in figures if f["of"] == name]
        places = range(len(mine))
        axes.errorbar(places, [f["accuracy"] for f in mine], [2 * f["standard_error"] for f in mine], fmt=style,
                      markersize=4, capsize=2, label=name)  # fmt: skip
        axes.set_xticks(places, [f["shots"] for f in mine])
    axes.set(xlabel="demonstrations", ylabel="words mapped right, %", ylim=(-3, 103))
    axes.set_title(f"mappings never seen in training, {mine[0]['mappings']} of them, {mine[0]['items']:,} words")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    found = gather(options)
    figures, rows = [], []
    for name, by_shots in found.items():
        first = sum(by_shots[min(by_shots)], [])
        for shots, by_mapping in sorted(by_shots.items()):
            means, values = [100 * sum(own) / len(own) for own in by_mapping], sum(by_mapping, [])
            figure = {"of": name, "shots": shots, "mappings": len(means), "items": len(values)}
            figure |= {"accuracy": sum(means) / len(means), "standard_error": standard_error(means)}
            if name != "best possible":  # McNemar's test, against the smallest number of shots
                figure["p"] = paired_p_value(first, values)
            figures.append(figure)
    for shots in sorted(found["model"]):
        mine = [f for f in figures if f["shots"] == shots]
        rows.append([str(shots), *(f"{f['accuracy']:.1f} ± {f['standard_error']:.1f}" for f in mine)])
    text = table([["shots", *found], *rows])
    print(text)
    folder = options.results.parent
    write_file(folder / "table.txt", text + "\n")
    write_file(folder / "figures.json", json.dumps(figures, indent=1) + "\n")
    plot(figures, folder / "accuracy.png")


if __name__ == "__main__":
    entry_point(main)()
