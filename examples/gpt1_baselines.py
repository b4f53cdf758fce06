"""Measures what words alone, without a neural network, get right in the sets of examples/gpt1_data.py.

    python examples/gpt1_baselines.py

`package`, `follows`, `related`: logistic regression on how often each word occurs, for pairs in either text.
`next_sentence`: the option that shares the most words with the context, a word's weight being its inverse document
frequency in the training contexts. Words are runs of two or more letters and digits, in lower case. It needs
scikit-learn: pip install -e ".[metrics]".
"""

import sys
from pathlib import Path

import numpy as np
from pydantic.dataclasses import dataclass

from gpt_arc.data.json_lines import parse_line
from gpt_arc.errors import UserError, entry_point
from gpt_arc.extras import import_extra
from gpt_arc.files import DATA_ROOT
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT
from gpt_arc.tables import table

TEXTS = {"package": ("text",), "follows": ("premise", "hypothesis"), "related": ("text_a", "text_b")}


@dataclass(frozen=True, config=STRICT)
class Options:
    data: Path = DATA_ROOT / "gpt1_arc"
    """The folder that examples/gpt1_data.py wrote."""


def read(path: Path) -> list[dict]:
    """Reads a file of rows. Raises UserError if it is missing."""
    if not path.is_file():
        raise UserError(f"there is no {path}: write it with python examples/gpt1_data.py")
    return [parse_line(line, str(path)) for line in path.read_text("utf-8").splitlines()]


def classified(train: list[dict], test: list[dict], columns: tuple[str, ...]) -> float:
    """Returns the accuracy on `test` of logistic regression on counts of words."""
    vectorizer = import_extra("sklearn.feature_extraction.text").CountVectorizer()
    texts = [" ".join(row[column] for column in columns) for row in train]
    model = import_extra("sklearn.linear_model").LogisticRegression(max_iter=1000)
    model.fit(vectorizer.fit_transform(texts), [row["label"] for row in train])
    counts = vectorizer.transform([" ".join(row[column] for column in columns) for row in test])
    return float(np.mean(model.predict(counts) == [row["label"] for row in test]))


def chosen(train: list[dict], test: list[dict]) -> float:
    """Returns the accuracy on `test` of choosing the option with the largest overlap of words with its context."""
    vectorizer = import_extra("sklearn.feature_extraction.text").TfidfVectorizer()
    vectorizer.fit([row["context"] for row in train])
    right = []
    for row in test:
        context, options = vectorizer.transform([row["context"]]), vectorizer.transform(row["options"])
        right.append(np.argmax((options @ context.T).toarray()[:, 0]) == int(row["label"]))
    return float(np.mean(right))


def accuracies(folder: Path) -> dict[str, float]:
    sets = {name: (read(folder / name / "train.jsonl"), read(folder / name / "test.jsonl")) for name in TEXTS}
    found = {name: classified(*rows, TEXTS[name]) for name, rows in sets.items()}
    name = "next_sentence"
    return found | {name: chosen(read(folder / name / "train.jsonl"), read(folder / name / "test.jsonl"))}


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    rows = [(name, f"{accuracy:.1%}") for name, accuracy in accuracies(options.data).items()]
    print(table([("set", "accuracy"), *rows]))


if __name__ == "__main__":
    entry_point(main)()
