"""Checkpoints of a run: whole at every moment, found without links, deleted only if the run wrote them."""

import shutil
from functools import partial

import pytest
import torch

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.manifest import record_files
from gpt_arc.training.checkpoints import clean_run, load_state, resumable, save_checkpoint
from gpt_arc.weights.directory import model_directory, save_model
from helpers import killed_at_each_call
from model import GPT, GPTConfig

CONFIG = GPTConfig(8, 11, 2, 2, 16, positions="rotary", norm="rmsnorm", head_bias=True, dropout=0.1)
TOKENIZER = CharTokenizer("abcdefghij\n")


def checkpoint(run, step, best_step, keep_all=False):
    state = dict.fromkeys(("optimizer", "scaler", "runtime", "data"))
    state |= {"progress": {"step": step}, "generators": [{"cpu": torch.get_rng_state()}]}
    save_checkpoint(run, step, best_step, partial(save_model, GPT(CONFIG), TOKENIZER), state, keep_all)


def test_only_the_last_and_best_checkpoints_are_kept(tmp_path):
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2)):
        checkpoint(tmp_path, step, best)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000004"]
    assert (tmp_path / "last").readlink().name == "step-00000004"
    assert (tmp_path / "best").readlink().name == "step-00000002"
    assert model_directory(tmp_path) == tmp_path / "step-00000002"
    assert load_state(tmp_path / "last")["progress"]["step"] == 4
    tmp_path.rename(tmp_path.with_name("elsewhere"))  # the links are relative
    assert load_state(tmp_path.with_name("elsewhere") / "last")["progress"]["step"] == 4


def test_all_checkpoints_can_be_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step, 1, keep_all=True)
    assert len(list(tmp_path.glob("step-*"))) == 3


def test_a_run_resumes_from_last_only(tmp_path):
    """Killed after writing step 4 and linking `best` to it, but before linking `last`."""
    checkpoint(tmp_path, 2, 2)
    checkpoint(tmp_path, 4, 4, keep_all=True)
    (tmp_path / "last").unlink()
    (tmp_path / "last").symlink_to("step-00000002")
    (tmp_path / ".step-00000006.abc").mkdir()
    clean_run(tmp_path, step=2, best_step=2)
    steps = ["step-00000002", "step-00000004"]  # the run wrote both, and may have been pointed back on purpose
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "checkpoints.json", "last", *steps]
    assert (tmp_path / "best").readlink().name == "step-00000002"
    checkpoint(tmp_path, 4, 4)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000004.1"]


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoint(tmp_path, 1, 1)

    def full(*args, **kwargs):
        raise RuntimeError("unexpected pos 64 vs 0")  # torch.save's message for a full disk

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="can't be written, with .* earlier checkpoints are kept"):
        checkpoint(tmp_path, 2, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "checkpoints.json", "last", "step-00000001"]


def test_a_copy_without_links_can_be_continued(tmp_path):
    checkpoint(tmp_path, 1, 1)
    shutil.copytree(tmp_path, tmp_path / "copy", symlinks=False)
    checkpoint(tmp_path / "copy", 2, 2)
    assert (tmp_path / "copy" / "last").readlink().name == (tmp_path / "copy" / "best").readlink().name


def test_a_damaged_or_missing_state_is_refused(tmp_path):
    checkpoint(tmp_path, 1, 1)
    path = tmp_path / "last" / "training_state.pt"
    torch.save({"progress": {}}, path)
    with pytest.raises(UserError, match="training_state.pt is damaged.*it lacks"):
        load_state(tmp_path / "last")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="training_state.pt is damaged"):
        load_state(tmp_path / "last")
    path.unlink()
    with pytest.raises(UserError, match="is a model but not a checkpoint"):
        load_state(tmp_path / "last")


def small_checkpoint(run, step, best_step, mark, keep_all=False):
    """A checkpoint in whose files `mark` stands."""

    def save(directory):
        for name in ("config.json", "weights"):
            (directory / name).write_text(mark)
        record_files(directory, "config.json", "weights")

    state = dict.fromkeys(("optimizer", "scaler", "runtime", "generators"))
    save_checkpoint(run, step, best_step, save, state | {"progress": {"step": step}, "data": mark}, keep_all)


def marks(directory):
    return {(directory / "config.json").read_text(), (directory / "weights").read_text(), load_state(directory)["data"]}


@pytest.mark.parametrize("keep_all", [False, True])
@pytest.mark.parametrize(("step", "best_step"), [(2, 1), (2, 2), (1, 1), (1, None)], ids=str)
def test_a_kill_at_any_call_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step, best_step, keep_all):
    """Also where the step is saved a second time."""

    def start(run):
        run.mkdir()
        small_checkpoint(run, 1, best_step and 1, "old", keep_all)

    def save(run):
        small_checkpoint(run, step, best_step, "new", keep_all)

    ends = set()
    for run in killed_at_each_call(tmp_path, monkeypatch, start, save):
        last = resumable(run)
        (mark,), saved = marks(last), load_state(last)["progress"]["step"]
        assert (run / "last").readlink().name == last.name
        assert len(marks(model_directory(run))) == 1
        ends.add(mark)
        clean_run(run, saved, best_step and min(best_step, saved))
        small_checkpoint(run, 3, 3, "third", keep_all)
        assert marks(run / "last") == marks(run / "best") == {"third"}
        assert keep_all or len(list(run.glob("step-*"))) == 1
        assert not list(run.glob(".*"))
    assert ends == {"old", "new"}


def test_only_what_the_run_wrote_is_deleted(tmp_path):
    small_checkpoint(tmp_path, 1, None, "one")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-keep")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009")
    (tmp_path / "step-notes.txt").write_text("mine")
    (tmp_path / "moved").mkdir()
    (tmp_path / "step-00000001").rename(tmp_path / "moved" / "one")
    (tmp_path / "step-00000001").symlink_to("moved/one")
    for step in (2, 3):
        clean_run(tmp_path, step - 1, None)
        small_checkpoint(tmp_path, step, None, str(step))
    mine = ["step-00000001", "step-00000001-keep", "step-00000009", "step-notes.txt"]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == sorted([*mine, "step-00000003"])
    assert marks(tmp_path / "moved" / "one") == {"one"}


def test_newer_checkpoints_stay_when_last_is_pointed_back(tmp_path):
    for step in (1, 2, 3):
        small_checkpoint(tmp_path, step, 1, f"first {step}", keep_all=True)
    (tmp_path / "last").unlink()
    (tmp_path / "last").symlink_to("step-00000001")
    assert resumable(tmp_path).name == "step-00000001"
    clean_run(tmp_path, 1, 1)
    for step in (2, 3):
        small_checkpoint(tmp_path, step, 1, f"second {step}", keep_all=True)
    assert marks(tmp_path / "step-00000003") == {"first 3"} and marks(tmp_path / "last") == {"second 3"}
    assert len(list(tmp_path.glob("step-*"))) == 5


def test_a_run_of_an_older_version_deletes_its_checkpoints(tmp_path):
    for step in (1, 2):
        small_checkpoint(tmp_path, step, 1, str(step))
    (tmp_path / "checkpoints.json").unlink()
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-keep")
    small_checkpoint(tmp_path, 3, 3, "3")
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001-keep", "step-00000003"]


def test_a_deleted_run_folder_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    small_checkpoint(tmp_path / "run", 1, 1, "one")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="run has been deleted or moved, so step 2 can't be saved"):
        small_checkpoint(tmp_path / "run", 2, 2, "two")
    assert not (tmp_path / "run").exists()
