"""Writes the table and the pictures of `bash examples/gpt4_arc.sh`.

    python examples/gpt4_report.py --results out/gpt4_arc

A figure is the share of a test's questions that are answered exactly, by kind of question. The script prints the table,
writes it to table.md, and for each task draws answers.png: the first ten questions of its test with pictures and
answers, right ones in green, and for each picture where the model looks while it answers. Patches that get little
attention are covered by grey.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.image_attention import ask, attention_to, draw_attention, load_image_reader
from gpt_arc.extras import import_extra
from gpt_arc.files import DATA_ROOT, replacing, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT
from gpt_arc.tables import markdown
from gpt_arc.vision.images import read_image

TESTS = {"test": "test", "pairs": "held-out pairs", "shuffled": "shuffled pictures"}
TASKS = ("shapes", "digits", "words")
SHOWN = 10  # questions of a picture


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    results: Path = Path("out/gpt4_arc")
    """Folder with the models and figures; the report is written there."""


def read_items(task: str, test: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA_ROOT / task / f"{test}.jsonl").read_text("utf-8").splitlines()]


def figures(folder: Path, task: str, test: str) -> dict[str, float]:
    """Returns the share of right answers by kind of question, and over all; {} without results."""
    path = folder / task / f"{test}.json"
    if not path.exists():
        return {}
    (result,) = json.loads(path.read_text())["models"][0]["tasks"]
    right: dict[str, list[float]] = {}
    for item, value in zip(read_items(task, test), result["values"], strict=True):
        for kind in dict.fromkeys((item.get("kind", task), task)):
            right.setdefault(kind, []).append(value)
    return {kind: statistics.fmean(values) for kind, values in right.items()}


def table(folder: Path) -> str:
    """Returns the markdown table. Raises UserError if there are no results."""
    rows = [["right answers, %", *TESTS.values()]]
    for task in TASKS:
        columns = [figures(folder, task, test) for test in TESTS]
        for kind in sorted(columns[0], key=lambda kind: kind == task):  # the whole task comes last
            name = f"{task}, all" if kind == task and len(columns[0]) > 1 else kind
            rows.append([name, *(f"{100 * column[kind]:.1f}" if column else "" for column in columns)])
    if len(rows) == 1:
        raise UserError(f"{folder} has no results: run bash examples/gpt4_arc.sh first")
    return markdown(rows)


def draw(folder: Path, task: str) -> None:
    """Draws the first questions of a task's test with the model's answers and its attention to the pictures."""
    reader, items = load_image_reader(folder / task / "seen"), read_items(task, "test")[:SHOWN]
    paths = [DATA_ROOT / task / item["image"] for item in items]
    answers = ask(reader, [item["prompt"] for item in items], paths)
    figure = import_extra("matplotlib.figure").Figure(figsize=(12, 10), layout="constrained")
    cells = figure.subplots(4, SHOWN // 2)
    for number, (item, path, answer) in enumerate(zip(items, paths, answers)):
        row, column = divmod(number, SHOWN // 2)
        picture, attention = cells[2 * row, column], cells[2 * row + 1, column]
        picture.imshow(read_image(path))
        picture.set_axis_off()
        picture.set_title(item["prompt"].replace(" or ", " or\n"), fontsize=9)
        draw_attention(attention, *attention_to(reader, item["prompt"], path, answer))
        attention.set_title(answer, color="green" if answer == item["response"] else "red")
    with replacing(folder / task / "answers.png") as temporary:
        figure.savefig(temporary, format="png", dpi=60)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    text = table(options.results)
    write_file(options.results / "table.md", text + "\n")
    print(text)
    for task in TASKS:
        if (options.results / task / "test.json").exists():
            draw(options.results, task)


if __name__ == "__main__":
    entry_point(main)()
