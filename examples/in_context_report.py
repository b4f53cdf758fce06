"""A table and a plot of stages/eval.py's results on the held-out mappings of examples/in_context_data.py.

    python examples/in_context_report.py --data data/in_context --results out/in_context_arc/results

For every held-out mapping RESULTS has NUMBER.json, and NUMBER.shuffled.json with random answers in the demonstrations.
The model is compared with the best possible learner, which knows each letter that a demonstration shows and guesses the
others among the remaining images. Standard errors are of the mean over mappings. The script writes table.txt,
figures.json and accuracy.png beside RESULTS.
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
from gpt_arc.tables import table, to_json

LETTERS = 10


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    data: Path = DATA_ROOT / "in_context"
    """Folder that examples/in_context_data.py wrote."""
    results: Path = Path("out/in_context_arc/results")
    """Folder with the results of stages/eval.py."""


def best_chance(shown: str, word: str) -> float:
    """Returns the probability that the best guess is right, after demonstrations "dab>hfc", one a line."""
    known = {letter for line in shown.split() for letter in line.split(">")[0]}
    unknown, images = len(set(word) - known), LETTERS - len(known)
    return 1 / prod(range(images - unknown + 1, images + 1))


def gather(options: Options) -> dict[str, dict[int, list[list[float]]]]:
    """Returns, for the model, its control and the best learner, the items' values by number of shots and mapping."""
    task = load_task(str(Path(__file__).with_name("in_context.toml")))
    values_of: dict[str, dict[int, list[list[float]]]] = {"model": {}, "answers shuffled": {}, "best possible": {}}
    mappings = json.loads((options.data / "mappings.json").read_text())
    for number in range(len(mappings)):
        items, pool = (load_items(task, "", options.data / f"{number}/{name}.jsonl", 0) for name in ("items", "pool"))
        for name, ending in (("model", ".json"), ("answers shuffled", ".shuffled.json")):
            path = options.results / f"{number}{ending}"
            if not path.exists():
                raise UserError(f"there is no {path}: run bash examples/in_context_arc.sh")
            report = json.loads(path.read_text())
            for r in report["models"][0]["tasks"]:
                if r["metric"] == "accuracy":
                    values_of[name].setdefault(r["shots"], []).append(r["values"])
        seed = report["options"]["seed"]
        for shots in values_of["model"]:
            shown = (demonstrations(task, pool, i, shots, seed, shuffled=False) for i in range(len(items)))
            chances = [best_chance(text, item["input"]) for text, item in zip(shown, items)]
            values_of["best possible"].setdefault(shots, []).append(chances)
    return values_of


def plot(figures: list[dict], path: Path) -> None:
    """Plots accuracy by number of demonstrations, with bars of two standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, style in {"best possible": "k--", "model": "C0o-", "answers shuffled": "C3s-"}.items():
        rows = [f for f in figures if f["of"] == name]
        places = range(len(rows))
        axes.errorbar(places, [f["accuracy"] for f in rows], [2 * f["standard_error"] for f in rows], fmt=style,
                      markersize=4, capsize=2, label=name)  # fmt: skip
        axes.set_xticks(places, [f["shots"] for f in rows])
    axes.set(xlabel="demonstrations", ylabel="words mapped right, %", ylim=(-3, 103))
    axes.set_title(f"mappings never seen in training, {rows[0]['mappings']} of them, {rows[0]['items']:,} words")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    values_of = gather(options)
    figures, rows = [], []
    for name, by_shots in values_of.items():
        first = sum(by_shots[min(by_shots)], [])
        for shots, by_mapping in sorted(by_shots.items()):
            means, values = [100 * sum(values) / len(values) for values in by_mapping], sum(by_mapping, [])
            figure = {"of": name, "shots": shots, "mappings": len(means), "items": len(values)}
            figure |= {"accuracy": sum(means) / len(means), "standard_error": standard_error(means)}
            if name != "best possible":  # McNemar's test, against the smallest number of shots
                figure["p"] = paired_p_value(first, values)
            figures.append(figure)
    for shots in sorted(values_of["model"]):
        by_learner = [f for f in figures if f["shots"] == shots]
        rows.append([str(shots), *(f"{f['accuracy']:.1f} ± {f['standard_error']:.1f}" for f in by_learner)])
    text = table([["shots", *values_of], *rows])
    print(text)
    folder = options.results.parent
    write_file(folder / "table.txt", text + "\n")
    write_file(folder / "figures.json", to_json(figures, indent=1) + "\n")
    plot(figures, folder / "accuracy.png")


if __name__ == "__main__":
    entry_point(main)()
