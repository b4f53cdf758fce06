"""Atomic writes: files are complete or absent."""

import contextlib
import errno
import importlib.util
import os
import stat
import sys
import time
from pathlib import Path

import pytest

from gpt_arc import files
from gpt_arc.files import follow, new_directory, point, release, restore, sync, take_lock, whole, write_file
from helpers import killed_at_each_call


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_file(path, "one")
    write_file(path, b"two")
    assert path.read_text() == "two" and os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / "plain").touch()  # with the permissions of the umask, not of a temporary file
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_file(path, "one")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "two")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_write_names_the_destination(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as refused, new_directory(tmp_path / "d") as temporary:
        write_file(temporary / "x", "half")
    assert refused.value.filename == str(tmp_path / "d" / "x") and not os.listdir(tmp_path)


def test_a_directory_appears_once_it_is_complete(tmp_path):
    with pytest.raises(RuntimeError), new_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    for content in ("first", "second"):
        with new_directory(tmp_path / "d") as temporary:
            (temporary / "x").write_text(content)
        assert (tmp_path / "d" / "x").read_text() == content and os.listdir(tmp_path) == ["d"]


def test_a_link_is_moved(tmp_path):
    for target in ("one", "two"):
        (tmp_path / target).mkdir()
        point(tmp_path / "last", target)
        assert os.readlink(tmp_path / "last") == target
    assert sorted(os.listdir(tmp_path)) == ["last", "one", "two"]


def refuse(number):
    """A system call that the file system doesn't have."""

    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


def write_directory(path, content):
    with new_directory(path) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(content)


def test_a_directory_is_whole_wherever_its_replacement_is_killed(tmp_path, monkeypatch):
    ends = set()
    start = lambda case: (case.mkdir(), write_directory(case / "d", "old"))  # noqa: E731
    for case in killed_at_each_call(tmp_path, monkeypatch, start, lambda case: write_directory(case / "d", "new")):
        path = case / "d"
        contents = {(whole(path) / name).read_text() for name in ("a", "b")}
        assert len(contents) == 1
        ends |= contents
        restore(path)
        assert (path / "a").read_text() in contents
        write_directory(path, "newest")
        assert whole(path) == path and (path / "a").read_text() == "newest" and not (case / ".d.old").exists()
    assert ends == {"old", "new"}


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS])
def test_a_file_with_the_name_stands_in_for_a_link(tmp_path, monkeypatch, number):
    for target in ("one", "two"):
        (tmp_path / target).mkdir()
    point(tmp_path / "last", "one")
    monkeypatch.setattr(os, "symlink", refuse(number))
    for target in ("two", "one"):
        point(tmp_path / "last", target)
        assert (tmp_path / "last").read_text() == target and follow(tmp_path / "last") == tmp_path / target
    monkeypatch.undo()
    point(tmp_path / "last", "two")
    assert follow(tmp_path / "last") == tmp_path / "two" and sorted(os.listdir(tmp_path)) == ["last", "one", "two"]


def test_links_are_followed_to_the_end_and_other_files_are_not(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "inner").symlink_to("target")
    (tmp_path / "outer").symlink_to("inner")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere").write_text("missing")
    (tmp_path / "binary").write_bytes(b"\xff\0/")
    assert follow(tmp_path / "outer") == tmp_path / "target"
    for name in ("circle", "nowhere", "binary", "absent", "target"):
        assert follow(tmp_path / name) == tmp_path / name


def test_a_path_without_a_name_stays():
    assert [whole(Path(path)) for path in (".", "/", "..")] == [Path("."), Path("/"), Path("..")]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_without_locks_there_is_a_line(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr("fcntl.flock", refuse(number))
    release(tmp_path / "lock", take_lock(tmp_path / "lock"))
    error = capsys.readouterr().err
    assert "lock can't be locked (" in error and os.strerror(number) in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "lock"
    lock = take_lock(path)
    with pytest.raises(BlockingIOError):
        take_lock(path)
    release(path, lock)
    release(path, take_lock(path))
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_process_and_not_with_a_fork_of_it(tmp_path):
    path = tmp_path / "lock"
    holder = os.fork()
    if holder == 0:
        take_lock(path)
        os._exit(0)  # a crash: nothing is released
    os.waitpid(holder, 0)
    assert path.exists()
    lock = take_lock(path)
    child = os.fork()
    if child == 0:
        release(path, lock)
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(BlockingIOError):
        take_lock(path)
    release(path, lock)


def test_many_processes_that_delete_the_file_of_their_lock_exclude_each_other(tmp_path):
    """Each adds to a counter under the lock; a lock that two hold loses an addition."""
    path, counter = tmp_path / "lock", tmp_path / "counter"
    counter.write_text("0")
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            added = 0
            while added < 25:
                with contextlib.suppress(BlockingIOError):
                    lock = take_lock(path)
                    number = int(counter.read_text())
                    time.sleep(0.0005)
                    counter.write_text(str(number + 1))
                    release(path, lock)
                    added += 1
            os._exit(0)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert counter.read_text() == "100"


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.ENOTSUP])
def test_a_folder_that_cannot_be_flushed_is_written_all_the_same(tmp_path, monkeypatch, call, number):
    original = getattr(os, call)

    def of_files(file, *args):
        directory = os.path.isdir(file) if call == "open" else stat.S_ISDIR(os.fstat(file).st_mode)
        return refuse(number)() if directory else original(file, *args)

    monkeypatch.setattr(os, call, of_files)
    write_directory(tmp_path / "d", "content")
    assert (tmp_path / "d" / "a").read_text() == "content"
    monkeypatch.setattr(os, call, refuse(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync(tmp_path)


def test_a_write_that_fails_without_a_number_names_the_file(tmp_path):
    """So fails numpy's tofile, by which .gguf files are written, on a full disk."""
    with pytest.raises(OSError) as caught:
        with files.replacing(tmp_path / "a") as temporary:
            temporary.write_bytes(b"half")
            raise OSError("1024 requested and 4 written")
    assert caught.value.strerror == "the write failed: 1024 requested and 4 written"
    assert caught.value.filename == str(tmp_path / "a") and not list(tmp_path.iterdir())


def test_permissions_are_not_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chmod", refuse(errno.EPERM))
    write_file(tmp_path / "a", "content")
    assert (tmp_path / "a").read_text() == "content"


def test_files_are_written_without_fcntl_and_symlink(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "symlink")
    spec = importlib.util.spec_from_file_location("files_elsewhere", files.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    (tmp_path / "d").mkdir()
    elsewhere.point(tmp_path / "last", "d")
    assert elsewhere.follow(tmp_path / "last") == tmp_path / "d"
