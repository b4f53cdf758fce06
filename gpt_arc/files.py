"""Atomic writes: files and directories are written next to their destination, flushed to disk, then renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpt_arc.errors import UserError, first_line

DATA_ROOT = Path("data")  # the folder of prepared datasets
PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """Path of a script, config or task that comes with gpt-arc, such as "train.py" or "configs/gpt2.toml".

    A wheel carries them inside the package, in resources/; in a clone they are beside the package.
    """
    packaged = PACKAGE / "resources"
    return (packaged if packaged.is_dir() else PACKAGE.parent) / name


def write_file(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` atomically: readers see the old file or the new one, even after a crash."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file in the same folder, which replaces `path` if the block succeeds."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        with name_failed_writes(path):
            yield Path(name)
            sync(Path(name))
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory in the same folder, which replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        put_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_directory(temporary: Path, path: Path) -> None:
    """Flush the directory `temporary` to disk and move it to `path`, deleting any older directory there."""
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
    """Make `link` a relative symbolic link to `target`, replacing an older link atomically.

    A copy that followed links has a folder in place of the link; it is deleted.
    """
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def name_failed_writes(path: Path) -> Iterator[None]:
    """Runs the block, which writes to `path`, so that the error of a full disk names `path`.

    An OSError without a file name gets this one. Raises UserError in place of what safetensors and torch.save raise.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if not is_failed_write(error):
            raise
        raise UserError(f"{path} can't be written: {first_line(error)}") from None


def is_failed_write(error: BaseException) -> bool:
    """Whether a write failed, for example because the disk is full: Python, safetensors and torch.save each have an
    error of their own for it.
    """
    from_torch = isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("unexpected pos", "PytorchStreamWriter failed")
    )
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or from_torch


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
