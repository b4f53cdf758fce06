"""Image files: read by Pillow, checked, and turned into pixels for an encoder.

pixels = Preprocessing().pixels(read_image(image_path(folder, "cat.png")), 224)    # (3, 224, 224) float32
"""

import io
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt
from pydantic.dataclasses import dataclass
from torch import Tensor

from gpt_arc.errors import UserError
from gpt_arc.extras import import_extra
from gpt_arc.reading import read_bytes, reading
from gpt_arc.settings import STRICT

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 50_000_000  # of an image: a small file may claim any size, and decoding takes 4 bytes a pixel
MOST_BYTES = 64 << 20
Three = tuple[float, float, float]


@dataclass(frozen=True, config=STRICT)
class Preprocessing:
    """How an image becomes a square of numbers."""

    fit: Literal["stretch", "crop", "pad"] = "pad"
    """How an image becomes square: stretched, cropped around its centre, or padded with the mean colour."""
    mean: Three = (0.5, 0.5, 0.5)
    """Subtracted from red, green and blue, each between 0 and 1."""
    std: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)], Annotated[float, Gt(0)]] = (0.5, 0.5, 0.5)
    """Divides red, green and blue after that."""

    def pixels(self, image: Any, size: int) -> Tensor:
        """Returns the pixels (3, size, size) of an image of Pillow's in RGB."""
        pillow, operations = import_extra("PIL.Image"), import_extra("PIL.ImageOps")
        method = pillow.Resampling.BICUBIC
        if self.fit == "crop":
            square = operations.fit(image, (size, size), method)
        elif self.fit == "pad":
            colour = tuple(min(max(round(255 * value), 0), 255) for value in self.mean)
            square = operations.pad(image, (size, size), method, color=colour)
        else:
            square = image.resize((size, size), method)
        values = torch.from_numpy(np.array(square, dtype=np.float32) / 255)  # (size, size, 3)
        return ((values - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()


def read_image(path: Path) -> Any:
    """`decode_image` of a file."""
    return decode_image(read_bytes(path, MOST_BYTES), path)


def decode_image(content: bytes, path: Path) -> Any:
    """Returns an image in RGB, turned as its camera says; transparent parts become white.

    Raises UserError in one sentence that names `path` if it is broken, of another format or too large.
    """
    pillow, operations = import_extra("PIL.Image"), import_extra("PIL.ImageOps")
    with warnings.catch_warnings(), reading(path):
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # the limit below is lower
        try:
            image = pillow.open(io.BytesIO(content), formats=FORMATS)
        except import_extra("PIL").UnidentifiedImageError:
            raise UserError(f"{path} is not a PNG, JPEG or WebP image") from None
        except pillow.DecompressionBombError:
            raise UserError(f"{path} has more than {MOST_PIXELS:,} pixels, the most that an image may have") from None
        if image.width * image.height > MOST_PIXELS:
            raise UserError(f"{path} has {image.width} x {image.height} pixels; {MOST_PIXELS:,} are the most")
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path} has more than 8 bits per colour: save it with 8")
        image.load()
        image = operations.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def image_path(folder: Path, name: Any) -> Path:
    """Returns the path of an image that a file in `folder` names.

    Raises ValueError if it isn't a path relative to the folder, or leads out of it.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"the image {str(name)[:60]!r} is not the name of a file")
    if "://" in name or name.startswith("data:"):
        raise ValueError(f"the image {name[:60]} is a URL: download it, and name the file")
    path = folder / name
    if Path(name).is_absolute() or folder.resolve() not in path.resolve().parents:
        raise ValueError(f"the image {name} is outside the folder {folder}: move it there, and name it relative to it")
    return path
