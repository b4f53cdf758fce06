"""manifest.json: sizes and checksums of the files in a model directory, a checkpoint or a dataset.

It binds files that belong together: one that is damaged or comes from elsewhere is named. Folders without a manifest
are read as they are.
"""

import contextlib
import json
import mmap
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import xxhash
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, first_line
from gpt_arc.files import write_file
from gpt_arc.reading import read_json
from gpt_arc.settings import STRICT

MANIFEST = "manifest.json"


@dataclass(frozen=True, config=STRICT)
class RecordedFile:
    size: int
    xxh3_64: str


@dataclass(frozen=True, config=STRICT)
class Manifest:
    format_version: Literal[1]
    files: dict[str, RecordedFile]


class DamagedFile(UserError):
    """A file differs from its folder's manifest."""


def record_files(directory: Path, *names: str, removed: Collection[str] = ()) -> None:
    """Adds files to the manifest of their folder, in place of older entries, and drops those of `removed` files.

    `names` may include the manifest's.
    """
    recorded = {name: file for name, file in _read(directory).items() if name not in removed}
    for name in names:
        if name == MANIFEST:
            continue
        path = directory / name
        recorded[name] = RecordedFile(path.stat().st_size, _checksum(path))
    write_file(directory / MANIFEST, json.dumps(asdict(Manifest(1, recorded)), indent=1) + "\n")


def check_files(directory: Path, sizes_only: tuple[str, ...] = ()) -> None:
    """Compares the files of a folder with its manifest; those whose names end in `sizes_only` by their sizes alone.

    Raises DamagedFile naming the first that differs.
    """
    manifest = _read(directory)
    is_dataset = any(name.endswith(".bin") for name in manifest)
    remedy = f"restore it from a copy or {'prepare the dataset again' if is_dataset else 'use another checkpoint'}"
    for name, recorded in manifest.items():
        path = directory / name
        if not path.exists():
            raise DamagedFile(
                f"{path} is missing, but {MANIFEST} there lists it: {remedy}; if you removed it on purpose, delete "
                f"{directory / MANIFEST}"
            )
        if not path.is_file() or path.stat().st_size != recorded.size:
            difference = "has another size than"
        elif not name.endswith(sizes_only) and _checksum(path) != recorded.xxh3_64:
            difference = "has other contents than"
        else:
            continue
        raise DamagedFile(
            f"{path} {difference} {MANIFEST} there, so it is damaged or comes from elsewhere: {remedy}; if you "
            f"changed it on purpose, delete {directory / MANIFEST}"
        )


@contextlib.contextmanager
def checking(directory: Path, sizes_only: tuple[str, ...] = ()) -> Iterator[None]:
    """Runs the block, which reads the folder, while a thread does `check_files`. Raises DamagedFile."""
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_files, directory, sizes_only)
        try:
            yield
        except UserError as error:  # which may not name the file that is to blame
            if isinstance(checked.exception(), DamagedFile):
                raise DamagedFile(f"{checked.exception()} ({first_line(error)})") from None
            raise
        checked.result()


def _read(directory: Path) -> dict[str, RecordedFile]:
    path = directory / MANIFEST
    try:
        recorded = read_json(path, Manifest).files if path.exists() else {}
        return {name: file for name, file in recorded.items() if name != MANIFEST}  # some have listed themselves
    except UserError as error:
        raise DamagedFile(str(error)) from None


def _checksum(path: Path) -> str:
    if not path.stat().st_size:  # can't be mapped
        return xxhash.xxh3_64_hexdigest(b"")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxhash.xxh3_64_hexdigest(content)
