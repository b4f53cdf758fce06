"""Atomic writes: files are complete or absent."""

import errno
import importlib.util
import os
import stat
import sys

import pytest

from gpt_arc import files
from gpt_arc.files import follow, new_directory, point, restore, sync, take_lock, whole, write_file
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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_without_locks_there_is_a_line(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr("fcntl.flock", refuse(number))
    os.close(take_lock(tmp_path))
    assert f"can't be locked ([Errno {number}] {os.strerror(number)})" in capsys.readouterr().err


def test_a_lock_is_held_by_one(tmp_path):
    descriptor = take_lock(tmp_path)
    with pytest.raises(BlockingIOError):
        take_lock(tmp_path)
    os.close(descriptor)
    os.close(take_lock(tmp_path))


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


def test_permissions_are_not_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chmod", refuse(errno.EPERM))
    write_file(tmp_path / "a", "content")
    assert (tmp_path / "a").read_text() == "content"


def test_files_are_written_without_fcntl_and_symlink(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "symlink")
    spec = importlib.util.spec_from_file_location("files_elsewhere", files.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    (tmp_path / "d").mkdir()
    elsewhere.point(tmp_path / "last", "d")
    assert elsewhere.follow(tmp_path / "last") == tmp_path / "d" and elsewhere.take_lock(tmp_path) is None
    assert "can't be locked on this system" in capsys.readouterr().err
