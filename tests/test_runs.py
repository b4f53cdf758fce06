"""Run folders: names, the newest one, and who may use them."""

import time

import pytest

from gpt_arc import runs
from gpt_arc.errors import UserError


def finished(path, name):
    step = path / "out" / name / "step-00000001"
    step.mkdir(parents=True)
    (step / "config.json").touch()
    time.sleep(0.02)
    (step.parent / "last").symlink_to(step.name)


def test_the_newest_run_of_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a-2", "a-10", "ab", "a-b", "a-3"):
        finished(tmp_path, name)
    (tmp_path / "out" / "a-4").mkdir()  # without a checkpoint
    assert runs.newest_run("a").name == "a-3"
    assert runs.newest_run("ab").name == "ab"
    finished(tmp_path, "z")
    assert runs.newest_run().name == "z"
    with pytest.raises(UserError, match="there is no run of b"):
        runs.newest_run("b")


def test_names_count_on_from_what_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path, "a")
    second, lock = runs.claim_new(None, "a", overwrite=False)
    third, other_lock = runs.claim_new(None, "a", overwrite=False)  # a-2 is empty still, but held
    assert (second.name, third.name) == ("a-2", "a-3")
    del lock
    assert runs.claim_new(None, "a", overwrite=False)[0].name == "a-2"
    with pytest.raises(UserError, match="another process is training"):
        runs.Lock(third)


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path, "a")
    folder = tmp_path / "out" / "a"
    for name in ("config.toml", "overrides.json", "metrics.jsonl", "notes.txt"):
        (folder / name).touch()
    runs.claim_new("out/a", "a", overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_damaged_overrides_are_refused(tmp_path):
    for content, sentence in (("{", "missing or damaged"), ('{"n_layerz": 1}', "there is no setting n_layerz")):
        (tmp_path / "overrides.json").write_text(content)
        with pytest.raises(UserError, match=sentence):
            runs.read_overrides(tmp_path)
