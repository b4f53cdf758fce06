"""Run folders: names, the newest one, and who may write to them."""

import json
import os
import shutil
import time

import pytest

from gpt_arc.errors import UserError
from gpt_arc.training import runs
from gpt_arc.training.checkpoints import resumable, save_checkpoint
from gpt_arc.training.command_line import read_command_line
from gpt_arc.training.config import Config
from gpt_arc.training.options import StageOptions
from gpt_arc.training.stage_record import record_options
from helpers import killed_at_each_call


def finished(path, name, config=None):
    step = path / "out" / name / "step-00000001"
    step.mkdir(parents=True)
    (step / "config.json").touch()
    (step.parent / "run.json").write_text(json.dumps({"config": config or name, "overrides": {}}))
    time.sleep(0.02)
    (step.parent / "last").symlink_to(step.name)


def test_the_newest_run_of_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path, "a")
    finished(tmp_path, "a-10", config="a")
    finished(tmp_path, "renamed", config="a")
    finished(tmp_path, "a-2")  # a run of config a-2, not the second run of a
    (tmp_path / "out" / "a-4").mkdir()  # without a checkpoint
    assert runs.newest_run("a").name == "renamed"
    assert runs.newest_run("a-2").name == "a-2"
    finished(tmp_path, "z")
    assert runs.newest_run().name == "z"
    finished(tmp_path, "finetune")
    (tmp_path / "out" / "finetune" / "run.json").write_text(json.dumps({"stage": "finetune"}))
    with pytest.raises(UserError, match="holds a run of finetune.py"):
        runs.claim_new("out/finetune", "a", overwrite=True)
    assert runs.newest_run().name == "z"
    with pytest.raises(UserError, match="there is no run of b"):
        runs.newest_run("b")


def test_a_run_whose_checkpoint_was_just_replaced_is_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path, "live", config="a")
    finished(tmp_path, "later", config="a")
    (tmp_path / "out/live/config.toml").write_text("")
    gone, find = tmp_path / "out/live/step-00000000", runs.named_checkpoint
    monkeypatch.setattr(runs, "named_checkpoint", lambda run, link: gone if run.name == "live" else find(run, link))
    assert runs.newest_run().name == "live"
    assert runs.summary(tmp_path / "out/live").written >= time.time() - 60


def test_files_deleted_while_their_sizes_are_read_count_nothing(tmp_path, monkeypatch):
    for name in ("run.json", "step-00000001/config.json", "step-00000001/weights"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("12345")
    (tmp_path / "last").symlink_to("step-00000001")
    lstat = os.lstat

    def deleted(path, **options):
        if str(path).endswith("config.json") and not options:
            monkeypatch.setattr(os, "lstat", lstat)
            shutil.rmtree(path.parent)
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", deleted)
    assert runs.size_of(tmp_path) in (5, 10)  # the other file of the folder came before or after


def test_the_newest_run_is_no_trial_if_there_are_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path, "whole")
    (tmp_path / "out/whole/step-00000001").rename(tmp_path / "out/whole/step-00000600")
    (tmp_path / "out/whole/last").unlink()
    (tmp_path / "out/whole/last").symlink_to("step-00000600")
    finished(tmp_path, "trial", config="whole")
    assert runs.newest_run().name == runs.newest_run("whole").name == "whole"
    finished(tmp_path, "other")
    assert runs.newest_run("other").name == "other"


def test_new_runs_get_the_next_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path, "a")
    second, lock = runs.claim_new(None, "a", overwrite=False)
    third, other_lock = runs.claim_new(None, "a", overwrite=False)  # a-2 is still empty, but locked
    assert (second.name, third.name) == ("a-2", "a-3")
    del lock
    assert runs.claim_new(None, "a", overwrite=False)[0].name == "a-2"
    with pytest.raises(UserError, match="another process is training"):
        runs.Lock(third)


def test_overwriting_deletes_only_a_run_s_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path, "a")
    folder = tmp_path / "out" / "a"
    for name in ("config.toml", "metrics.jsonl", "notes.txt"):
        (folder / name).touch()
    runs.claim_new("out/a", "a", overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "config.toml").touch()  # not a run's file: the folder is no longer a run
    with pytest.raises(UserError, match="not by a run"):
        runs.claim_new("out/a", "a", overwrite=True)
    assert (folder / "config.toml").exists()


def test_a_file_in_place_of_the_runs_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="a file is in the way"):
        runs.claim_new(None, "a", overwrite=False)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"config": "a", "overrides": [1]}', "is damaged"),
        ('{"config": "a", "overrides": {"n_layerz": 1}}', "there is no setting n_layerz"),
        ('{"config": "a", "overrides": {"n_layer": null}}', "n_layer = null must be a whole number"),
    ],
)
def test_damaged_records_are_refused(tmp_path, content, sentence):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        runs.read_record(tmp_path)


def begin(folder, stage):
    """What train.py or a stage does before its first step."""
    _, lock = runs.claim_new(str(folder), "a", overwrite=True, stage=stage)
    if stage == "train":
        runs.write_record(folder, Config(), "a", {})
    else:
        record_options(folder, stage, StageOptions("base"))
    return lock


def checkpoint(folder, step):
    save_checkpoint(folder, step, 1, lambda directory: (directory / "config.json").write_text("{}"), {}, None)


def assert_a_command_takes(folder, stage):
    """A new run starts there, or is refused with a command that works."""
    message = ""
    try:
        runs.claim_new(str(folder), "a", overwrite=False, stage=stage)
    except UserError as error:
        message = str(error)
    if message:
        assert "--overwrite=True" in message
        if "resume it with" in message:
            assert resumable(folder) and (stage != "train" or (folder / "config.toml").exists())
        runs.claim_new(str(folder), "a", overwrite=True, stage=stage)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("stage", ["train", "sft"])
def test_a_command_takes_what_a_kill_at_the_start_leaves(tmp_path, monkeypatch, stage):
    for case in killed_at_each_call(tmp_path, monkeypatch, lambda case: case.mkdir(), lambda case: begin(case, stage)):
        assert_a_command_takes(case, stage)


@pytest.mark.parametrize("stage", ["train", "sft"])
def test_a_command_takes_what_a_kill_of_overwriting_leaves(tmp_path, monkeypatch, stage):
    def start(case):
        begin(case, stage)
        for step in (1, 2):
            checkpoint(case, step)
        (case / "metrics.jsonl").touch()

    overwrite = lambda case: runs.claim_new(str(case), "a", overwrite=True, stage=stage)  # noqa: E731
    for case in killed_at_each_call(tmp_path, monkeypatch, start, overwrite):
        assert_a_command_takes(case, stage)


def test_a_run_without_a_checkpoint_is_started_over(tmp_path):
    begin(tmp_path / "a b", "train")
    with pytest.raises(UserError, match=r"start it over with: python .* '--out_dir=.*/a b' --overwrite"):
        read_command_line([f"--resume={tmp_path / 'a b'}"], None)
    with pytest.raises(UserError, match="a run without a checkpoint: start it over with --overwrite=True"):
        runs.claim_new(str(tmp_path / "a b"), "a", overwrite=False)


def test_overwriting_deletes_only_recorded_checkpoints(tmp_path):
    begin(tmp_path, "train")
    checkpoint(tmp_path, 1)
    for name in ("step-00000001-keep", "step-00000007", "step-notes"):
        (tmp_path / name).mkdir()
    runs.claim_new(str(tmp_path), "a", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001-keep", "step-00000007", "step-notes"]


def test_unfinished_files_keep_no_run_from_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "a" / ".step-00000001.0a1b2c3d").mkdir(parents=True)
    (tmp_path / "out" / "a" / ".run.json.0a1b2c3d").touch()
    folder, lock = runs.claim_new(None, "a", overwrite=False)
    assert folder.name == "a" and list(folder.iterdir()) == [folder / runs.Lock.FILE]
    del lock
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_and_its_dry_run_refuse_a_folder_that_cant_be_written(tmp_path, monkeypatch, exists):
    folder = tmp_path / "out" if exists else tmp_path / "out" / "run"
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "out")
    for refuse in (runs.check_out_dir, lambda out_dir, overwrite: runs.claim_new(out_dir, "a", overwrite)):
        with pytest.raises(UserError, match=f"can't be written, since {tmp_path / 'out'} is read-only"):
            refuse(str(folder), False)
    assert not list((tmp_path / "out").iterdir())
