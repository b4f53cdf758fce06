"""Folders of pictures with questions, which scripts in prepare/ write.

prepare_questions("digits", options, write_all)                     # unless they are there already

def write_all(folder, options):
    write_rows(folder / "train.jsonl", rows)
    write_shuffled(folder, test_rows, seed)
    write_text(folder, [(prompt, answer), ...])
"""

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt_arc.data.documents import Text
from gpt_arc.data.json_lines import read_object
from gpt_arc.data.prepare import CorpusSettings, prepare_documents
from gpt_arc.data.tokenizer import BPETokenizer
from gpt_arc.errors import UserError
from gpt_arc.files import DATA_ROOT, new_directory

MADE_OF, TEXTS = "made_of.json", "texts.txt"
VOCABULARY = 512  # more than all words take
LETTERS_ONLY = 257  # bytes and the end of the text


@contextlib.contextmanager
def new_questions(folder: Path, made_of: Mapping[str, Any], overwrite: bool) -> Iterator[Path | None]:
    """Context in which a new folder is filled, with the subfolder pictures; None if it was made by these settings.

    Raises UserError if other settings made it, unless `overwrite`.
    """
    if read_object(folder / MADE_OF) == made_of:
        print(f"{folder} is prepared already")
        yield None
        return
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} has other pictures: --overwrite=True replaces them")
    with new_directory(folder) as temporary:
        (temporary / "pictures").mkdir()
        yield temporary
        (temporary / MADE_OF).write_text(json.dumps(made_of, indent=1) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_shuffled(folder: Path, rows: Sequence[Mapping[str, Any]], seed: int) -> None:
    """Writes shuffled.jsonl: the questions of `rows`, each about the picture of another."""
    pictures = [row["image"] for row in rows]
    random.Random(seed).shuffle(pictures)
    write_rows(folder / "shuffled.jsonl", [{**row, "image": name} for row, name in zip(rows, pictures)])


def write_text(folder: Path, questions: Iterable[tuple[str, str]], vocabulary: int = VOCABULARY) -> None:
    """Writes questions and answers as a text, and a tokenizer that has a token for each word, or for each letter if
    `vocabulary` is LETTERS_ONLY.
    """
    text = "".join(f"{question}\n{answer}\n" for question, answer in questions)
    (folder / TEXTS).write_text(text, "utf-8")
    BPETokenizer.train([text], vocabulary).save(folder)


def prepare_text(folder: Path, overwrite: bool) -> None:
    """Prepares the text of a folder as the dataset FOLDER_text."""
    text = Text((folder / TEXTS).read_text("utf-8"), f"the questions of {folder}")
    prepare_documents(text, CorpusSettings(tokenizer=str(folder), overwrite=overwrite), f"{folder.name}_text")


def prepare_questions(name: str, options: Any, write: Callable[[Path, Any], None]) -> None:
    """Makes data/NAME by `write(folder, options)`, unless these options made it already, and its text data/NAME_text.

    Raises UserError if other options made it, unless `options.overwrite`.
    """
    folder, made_of = DATA_ROOT / name, dataclasses.asdict(dataclasses.replace(options, overwrite=False))
    with new_questions(folder, made_of, options.overwrite) as temporary:
        if temporary is not None:
            write(temporary, options)
    prepare_text(folder, options.overwrite)
