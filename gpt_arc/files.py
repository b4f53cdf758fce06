"""Files that are whole or not there: written beside their place, flushed to the disk, renamed into it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

DATA_ROOT = Path("data")  # prepared datasets are folders below it
PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """Path of a script, config or task that comes with gpt-arc, such as "train.py" or "configs/gpt2.toml".

    A wheel carries them inside the package, in resources/; in a clone they are beside the package.
    """
    packaged = PACKAGE / "resources"
    return (packaged if packaged.is_dir() else PACKAGE.parent) / name


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write; on leaving without an error it becomes `path`."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield Path(name)
        sync(Path(name))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # as of a full disk: say which file
        raise
    sync(path.parent)


def write_file(path: Path, content: bytes | str) -> None:
    """Put `content` at `path` so that a reader or a crash sees the old file or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` to fill; on leaving without an error it becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        put_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_directory(temporary: Path, path: Path) -> None:
    """Make the directory `temporary`, flushed to the disk, `path`; an older one there goes."""
    for file in (*temporary.rglob("*"), temporary):
        sync(file)
    os.chmod(temporary, 0o777 & ~_umask())
    if path.exists():
        older = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        os.rename(path, older)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(older, path)
            raise
        shutil.rmtree(older)
    else:
        os.rename(temporary, path)
    sync(path.parent)


def point(link: Path, target: str) -> None:
    """Make `link` a relative symbolic link to `target`, replacing an older link in one step.

    A folder in its place is what a copy that follows links made of an older one, and goes.
    """
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync(link.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
