"""Images with labels: rows of files, and an encoder that learns to classify them.

{"image": "pictures/cat.png", "label": "cat"}
{"image": "pictures/ball.png", "colour": "red", "shape": null}      several labels; this image has one of them
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_arc.data.rows import missing_column, parsed_rows
from gpt_arc.errors import UserError
from gpt_arc.vision.data import checksums_of
from gpt_arc.vision.encoder import ImageEncoder
from gpt_arc.vision.images import image_path

UNLABELLED = -1


class LabelledImage(NamedTuple):
    path: Path
    checksum: str  # of the file
    labels: tuple[str | None, ...]  # one of each column; None: the image has none


def read_labelled_images(path: Path, columns: Sequence[str]) -> list[LabelledImage]:
    """Reads rows with an `image`, a path relative to the file, and labels in `columns`. Decodes every image once.

    Raises UserError naming the first row that has no label, lacks a column, or whose image is broken, missing or
    elsewhere.
    """
    rows = parsed_rows(path, partial(_labelled, path.parent, columns))
    places: dict[Path, str] = {}
    for place, image, _ in rows:
        places.setdefault(image, place)
    checksums = checksums_of(places)
    return [LabelledImage(image, checksums[image], labels) for _, image, labels in rows]


def _labelled(
    folder: Path, columns: Sequence[str], row: dict[str, Any], place: str
) -> tuple[str, Path, tuple[str | None, ...]]:
    """Returns a row's place, image and labels. Raises ValueError."""
    for column in ("image", *columns):
        if column not in row:
            raise ValueError(missing_column(row, column))
    labels = [row[column] for column in columns]
    for column, label in zip(columns, labels):
        if isinstance(label, list | dict | float):
            raise ValueError(f"{column} = {str(label)[:60]} is not a class: it must be a text or a whole number")
    if all(label in (None, "") for label in labels):
        raise ValueError(f"the image has no label in {', '.join(columns)}")
    return place, image_path(folder, row["image"]), tuple(None if each in (None, "") else str(each) for each in labels)


def classes_of(images: Sequence[LabelledImage], columns: Sequence[str]) -> list[list[str]]:
    """Returns the classes of each column in alphabetical order. Raises UserError for a column with fewer than two."""
    classes = [sorted({label for label in labels if label is not None}) for labels in zip(*(i.labels for i in images))]
    for column, each in zip(columns, classes):
        if len(each) < 2:
            only = f"all {each[0]}" if each else "missing"
            raise UserError(f"the labels in {column} are {only}: there must be two classes or more")
    return classes


def class_numbers(images: Sequence[LabelledImage], classes: Sequence[Sequence[str]]) -> Tensor:
    """Returns labels as numbers (N, columns), UNLABELLED where there is none."""
    numbers = [{name: i for i, name in enumerate(each)} | {None: UNLABELLED} for each in classes]
    return torch.tensor([[known[label] for known, label in zip(numbers, image.labels)] for image in images])


class ImageClassifier(nn.Module):
    """An encoder with a linear classifier for each column of labels, on its class token or the mean over patches."""

    def __init__(self, encoder: ImageEncoder, sizes: Sequence[int]):
        """`sizes` are the numbers of classes."""
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.n_embd, size) for size in sizes)

    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum of cross-entropies in nats and the number of right answers over all labels (N, columns)."""
        pooled = self.encoder.pooled(pixels)
        logits = [head(pooled) for head in self.heads]
        losses = [
            F.cross_entropy(each.float(), numbers, ignore_index=UNLABELLED, reduction="sum")
            for each, numbers in zip(logits, labels.unbind(1))
        ]
        guesses = torch.stack([each.argmax(1) for each in logits], dim=1)
        return torch.stack(losses).sum(), (guesses == labels).sum()
