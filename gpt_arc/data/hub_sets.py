"""Data sets on the Hugging Face hub in place of files of examples, or folders with the hub's layout.

hf:OWNER/NAME             the split train
hf:OWNER/NAME:test        another split
hf:OWNER/NAME:main:test   a split of a configuration
hf:OWNER/NAME@REVISION    a branch, tag or commit, before any colon

A run records the commit, so that it reads the same rows when it is resumed.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt_arc.errors import UserError, first_line
from gpt_arc.extras import import_extra
from gpt_arc.hub import PREFIX

NAME = re.compile(r"hf:(?P<name>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<config>[^:]+)(?=:))?(:(?P<split>[^:]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def names_hub_set(path: Path | str | None) -> bool:
    """Whether a path is the name of a data set on the hub."""
    return str(path).startswith(PREFIX)


class Parts(NamedTuple):
    """The parts of a name."""

    name: str
    revision: str | None
    config: str | None
    split: str | None


def _parts(path: Path | str) -> Parts:
    match = NAME.fullmatch(str(path))
    if match is None:
        raise UserError(f"{path} is not hf:OWNER/NAME, with @REVISION, :CONFIG and :SPLIT if needed, in that order")
    return Parts(**match.groupdict())


def pinned(path: Path) -> Path:
    """Returns the name with the commit of its revision, that of a folder with its absolute path. Raises UserError."""
    name, revision, config, split = _parts(path)
    if Path(name).is_dir():
        name = str(Path(name).resolve())
    elif not COMMIT.fullmatch(revision or ""):
        hub = import_extra("huggingface_hub")
        try:
            revision = hub.HfApi().dataset_info(name, revision=revision).sha
        except Exception as error:  # each library between here and the network raises its own type
            raise _unreadable(path, error) from None
    following = "".join(f":{part}" for part in (config, split) if part)
    return Path(f"{PREFIX}{name}" + (f"@{revision}" if revision else "") + following)


def hub_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place and content of each row. Raises UserError."""
    name, revision, config, split = _parts(path)
    datasets = import_extra("datasets")
    try:
        rows = datasets.load_dataset(name, config, split=split or "train", revision=revision)
    except Exception as error:  # as above
        raise _unreadable(path, error) from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} can't be read from the Hugging Face hub ({type(error).__name__}: {first_line(error)}): check its name "
        "and split, connect once, or name a file of its rows"
    )
