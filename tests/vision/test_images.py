"""Reading images: formats, sizes, and what is refused."""

import io
import os
import struct
import zlib

import pytest
import torch
from PIL import Image

from gpt_arc.errors import UserError
from gpt_arc.vision.images import MOST_PIXELS, Preprocessing, image_path, read_image


def picture(width=6, height=4):
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.putpixel((0, 0), (0, 0, 255))
    return image


def png(width, height, data=b""):
    """The bytes of a PNG that claims a size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(kind, **settings):
    file = io.BytesIO()
    picture(64, 64).save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize("kind, suffix", [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_formats(kind, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    picture().save(path, kind, **({"lossless": True} if kind == "WEBP" else {"quality": 100}))
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert image.getpixel((5, 3))[0] > 220


def test_transparent_parts_are_white_and_cameras_turn_images(tmp_path):
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture().save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (4, 6)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_modes_become_rgb(mode, tmp_path):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (3, 3), "white").convert(mode).save(path)
    assert read_image(path).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_an_image_becomes_square(fit):
    pixels = Preprocessing(fit, (0.0, 0.5, 0.5), (1.0, 0.5, 0.25)).pixels(Image.new("RGB", (40, 20), (255, 0, 0)), 8)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 4, 4], torch.tensor([1.0, -1.0, -2.0]))
    edge = torch.tensor([0.0, 0.0, 0.0]) if fit == "pad" else torch.tensor([1.0, -1.0, -2.0])
    torch.testing.assert_close(pixels[:, 0, 4], edge, atol=0.02, rtol=0)


BROKEN = {
    "empty": (b"", "is not a PNG, JPEG or WebP image"),
    "text": (b"hello", "is not a PNG, JPEG or WebP image"),
    "gif": (encoded("GIF"), "is not a PNG, JPEG or WebP image"),
    "header only": (encoded("PNG")[:20], "a.png"),
    "cut png": (encoded("PNG")[:-40], "a.png"),
    "cut jpeg": (encoded("JPEG")[:-200], "truncated"),
    "cut webp": (encoded("WEBP", lossless=True)[:-20], "a.png"),
    "bad checksum": (encoded("PNG")[:30] + b"\0\0\0\0" + encoded("PNG")[34:], "a.png"),
    "no data": (png(8, 8), "a.png"),
    "bomb": (png(MOST_PIXELS // 1000, 1001), "50,000,000 are the most"),
    "huge bomb": (png(1 << 30, 1 << 30), "50,000,000"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BROKEN)
def test_broken_images_are_refused_in_a_sentence(case, tmp_path):
    content, message = BROKEN[case]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_image(tmp_path / "a.png")
    assert message in str(error.value) and "\n" not in str(error.value) and "BytesIO" not in str(error.value)


def test_missing_files_folders_pipes_and_deep_colours_are_refused(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        read_image(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(UserError, match="is not a plain file"):
            read_image(path)
    Image.new("I;16", (2, 2)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits per colour"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize(
    "name, message",
    [
        ("../secret.png", "outside the folder"),
        ("/etc/passwd", "outside the folder"),
        ("link/secret.png", "outside the folder"),
        (".", "outside the folder"),
        ("https://example.com/a.png", "is a URL"),
        ("file:///etc/passwd", "is a URL"),
        ("data:image/png;base64,AAAA", "is a URL"),
        ("", "is not the name of a file"),
        ("a\0b", "is not the name of a file"),
        (7, "is not the name of a file"),
        (None, "is not the name of a file"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(name, message, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=message):
        image_path(folder, name)


def test_names_in_the_folder_are_taken(tmp_path):
    assert image_path(tmp_path, "images/a.png") == tmp_path / "images" / "a.png"
    assert image_path(tmp_path, "images/../a.png").resolve() == (tmp_path / "a.png").resolve()
