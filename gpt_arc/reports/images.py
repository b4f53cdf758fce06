"""The first images that a run learns from, as thumbnails for a page."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from gpt_arc.data.rows import first_rows, shown
from gpt_arc.errors import UserError
from gpt_arc.reports.parts import section
from gpt_arc.vision.images import image_path, read_image

ROWS = 12
SIDE = 224  # pixels of a thumbnail at most


class ShownImage(NamedTuple):
    png: bytes
    text: str  # the other columns of its row


def first_images(path: Path) -> list[ShownImage]:
    """Returns the images of a file's first rows. Raises UserError for one that can't be read."""
    images = []
    for row in first_rows(path, ROWS):
        text = ", ".join(f"{name}: {shown(value)}" for name, value in row.items() if name not in ("image", "images"))
        names = row.get("images") or filter(None, [row.get("image")])
        for name in names if not isinstance(names, str) else [names]:
            try:
                image = read_image(image_path(path.parent, name))
            except ValueError as error:
                raise UserError(f"{path}: {error}") from None
            image.thumbnail((SIDE, SIDE))
            file = io.BytesIO()
            image.save(file, "PNG")
            images.append(ShownImage(file.getvalue(), text))
    return images


def picture(png: bytes, alt: str) -> str:
    """Returns the HTML of a PNG that the page itself holds."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def image_section(name: str, images: Sequence[ShownImage]) -> str:
    figures = [f"<div>{picture(png, text)}<p>{escape(text)}</p></div>" for png, text in images]
    return section(f"{name}: the first images", f'<div class="thumbnails">{"".join(figures)}</div>') if figures else ""


def learns_images(stage: str, settings: dict[str, Any], reads_images: bool) -> Path | None:
    """Returns the file whose images a run learns from, if it is one of this machine."""
    if stage != "pretrain_encoder" and not settings.get("image_encoder") and not reads_images:
        return None
    path = Path(settings.get("train") or "")
    return path if path.is_file() else None
