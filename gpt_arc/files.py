"""Files and folders that survive a crash: written beside their destination, flushed to disk, then renamed.

Symbolic links, locks and flushing a folder are used where the system has them.
"""

import contextlib
import errno
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpt_arc.errors import first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from filelock import BaseFileLock

DATA_ROOT = Path("data")  # the folder of prepared datasets
PACKAGE = Path(__file__).resolve().parent
HELP = {"-h", "--help", "--help-all", "--help_all"}
CONSOLE = "GPT_ARC_CONSOLE"  # environment variable that the command gpt-arc sets for the script that it runs
# what systems and file systems answer that can't open or flush a folder
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF}


def resource(name: str) -> Path:
    """Path of a script, config or task that comes with gpt-arc, such as "train.py" or "configs/gpt2.toml".

    A wheel carries them inside the package, in resources/; in a clone they are beside the package.
    """
    packaged = PACKAGE / "resources"
    return (packaged if packaged.is_dir() else PACKAGE.parent) / name


def command(script: str, *arguments: object) -> str:
    """Returns the shell command that runs a script, such as "tools/runs.py".

    It is a command of gpt-arc where the user typed one, and in a wheel, which has no scripts in the current folder.
    gpt-arc finds its own configs by their short names.
    """
    path, texts = Path(script), list(map(str, arguments))
    program = ["python", str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else script]
    if (PACKAGE / "resources").is_dir() or CONSOLE in os.environ:
        name = ["prepare", path.stem] if path.parent.name == "prepare" else [path.stem.replace("_", "-")]
        program = ["gpt-arc", *name]
        texts = [text.replace(f"{resource('configs')}{os.sep}", "configs/") for text in texts]
    return shlex.join((*program, *texts))


def write_file(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` atomically: readers see the old file or the new one, even after a crash."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path in the same folder; the file that the block writes there replaces `path` if the block succeeds."""
    temporary = hidden(path)
    try:
        with name_failed_writes(path, temporary):
            yield temporary
            sync(temporary)
            with contextlib.suppress(OSError):  # some file systems have no permissions
                os.chmod(temporary, 0o666 & ~_umask())  # safetensors grants fewer
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory in the same folder, which replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden(path)
    temporary.mkdir()
    try:
        with name_failed_writes(path, temporary):
            yield temporary
            put_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_directory(temporary: Path, path: Path) -> None:
    """Flush the directory `temporary` to disk and move it to `path`, deleting any older directory there.

    A directory can't be replaced in one step: if the process is killed in between, `whole` finds the older one.
    """
    for file in (*temporary.rglob("*"), temporary):
        sync(file)
    older = _older(path)
    if path.is_dir():
        _remove(older)
        os.rename(path, older)
    try:
        os.rename(temporary, path)
    except BaseException:
        restore(path)
        raise
    _remove(older)
    sync(path.parent)


def whole(path: Path) -> Path:
    """Returns `path`, or where `put_directory` moved it if the process was killed before `path` was replaced."""
    if not path.name:  # "." or "/", which no directory replaced
        return path
    older = _older(path)
    return older if older.is_dir() and not path.exists() else path


def restore(path: Path) -> None:
    """Moves back the directory that a killed `put_directory` left at `whole(path)`; deletes it if `path` is there."""
    if whole(path) != path:
        os.rename(whole(path), path)
    _remove(_older(path))


def _remove(directory: Path) -> None:
    """Deletes a directory, as far as possible; of a link to one, only the link."""
    if directory.is_symlink():
        directory.unlink()
    shutil.rmtree(directory, ignore_errors=True)


def discard(directory: Path) -> None:
    """Deletes a directory, which vanishes for its readers at once; what can't be deleted stays under a hidden name."""
    temporary = hidden(directory)
    os.rename(directory, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def hidden(path: Path) -> Path:
    """Returns an unused path in the same folder: `.NAME.`, then eight hexadecimal digits."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _older(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def point(link: Path, target: str) -> None:
    """Make `link` name `target`, a directory beside it, in one step: by a symbolic link, else by a file with the name.

    A copy that followed links has a directory in place of the link; it is deleted.
    """
    if link.is_dir() and not link.is_symlink():
        discard(link)
    temporary = hidden(link)
    try:
        os.symlink(target, temporary)
    except (OSError, AttributeError, NotImplementedError):  # what Python raises where there are no links
        write_file(link, target)
    else:
        os.replace(temporary, link)
        sync(link.parent)


def follow(link: Path) -> Path:
    """Returns the directory that a link made by `point` names; any other path as it is."""
    while link.is_symlink() and link.exists():
        link = link.parent / link.readlink()
    if link.is_file() and link.stat().st_size < 256:
        with contextlib.suppress(OSError, ValueError):  # it holds something else than a name
            target = link.with_name(link.read_text("utf-8").strip())
            return target if target.is_dir() else link
    return link


def take_lock(path: Path) -> "BaseFileLock | None":
    """Creates and locks the file `path`, until `release` or the end of the process, in whatever way it ends.

    Returns None where there are no locks, after printing a line, and in a folder that can't be written. Raises
    BlockingIOError if another process holds it.
    """
    import filelock  # takes a quarter of a second

    # long enough to try again if the holder has just deleted the file
    lock = filelock.FileLock(path, 0.1, thread_local=False, poll_interval=0.02, fallback_to_soft=False)
    try:
        lock.acquire()
        return lock
    except filelock.Timeout:
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path)) from None
    except (OSError, NotImplementedError) as error:  # what filelock raises where there are no locks
        if os.access(path.parent, os.W_OK):  # otherwise nothing will be written there
            print(f"{path} can't be locked ({first_line(error)}): let no other process write there", file=sys.stderr)
        return None


def release(path: Path, lock: "BaseFileLock | None") -> None:
    """Deletes the file `path` and releases the `lock` that `take_lock` returned for it."""
    try:
        if lock is None or lock.is_locked:  # a forked process doesn't hold it
            with contextlib.suppress(OSError):  # Windows deletes no open file; the lock does it there
                path.unlink()
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def locked(directory: Path, shared: bool = False) -> Iterator[None]:
    """Runs the block with a lock on a directory, where there are such locks; a `shared` one may be held by many.

    Raises BlockingIOError if another process holds it, and FileNotFoundError.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file's contents to disk; a directory's entries too, where the system can."""
    try:
        flags = os.O_RDWR if os.name == "nt" and path.is_file() else os.O_RDONLY  # Windows flushes what it may write
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in CANNOT_SYNC):
            raise


@contextlib.contextmanager
def name_failed_writes(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Runs the block, which writes to `path`, so that the error of a full disk names `path`.

    An OSError without a file name gets this one; in a name that begins with `temporary`, it replaces that part. Raises
    OSError, without an errno if the cause is unknown, in place of what safetensors, torch.save and numpy raise.
    """
    try:
        yield
    except OSError as error:
        name, reason = str(path if error.filename is None else error.filename), str(error)
        error.filename = name if temporary is None else name.replace(str(temporary), str(path), 1)
        if error.strerror is None:  # numpy says only how much it wrote
            raise OSError(None, f"the write failed: {reason}", error.filename) from None
        raise
    except Exception as error:
        if not _is_failed_write(error):
            raise
        number = re.search(r"os error (\d+)", str(error))  # safetensors has it, torch doesn't
        cause = (int(number[1]), os.strerror(int(number[1]))) if number else (None, "the write failed")
        raise OSError(*cause, str(path)) from None


def _is_failed_write(error: BaseException) -> bool:
    """Whether the error is one of those that safetensors and torch.save raise, for example on a full disk."""
    from_torch = isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("unexpected pos", "PytorchStreamWriter failed")
    )
    return type(error).__name__ == "SafetensorError" or from_torch


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
