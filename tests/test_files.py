"""Atomic writes: files are complete or absent."""

import os
import stat

import pytest

from gpt_arc.files import new_directory, point, write_file


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
