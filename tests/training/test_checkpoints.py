"""Checkpoints of a run: whole at every moment, found without links, deleted only if the run wrote them."""

import contextlib
import errno
import itertools
import os
import re
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.files import follow, locked
from gpt_arc.manifest import record_files
from gpt_arc.training.checkpoints import clean_run, load_state, read_shards, resumable, save_checkpoint
from gpt_arc.weights.checkpoint_folders import ATTEMPTS, check_checkpoint
from gpt_arc.weights.directory import load_model, model_directory, of_one_checkpoint, save_model
from helpers import killed_at_each_call
from model import GPT, GPTConfig

FULL = OSError(errno.ENOSPC, "No space left on device")
CONFIG = GPTConfig(8, 11, 2, 2, 16, positions="rotary", norm="rmsnorm", head_bias=True, dropout=0.1)
TOKENIZER = CharTokenizer("abcdefghij\n")
STATE = {"generators": [{"cpu": torch.get_rng_state()}], "scaler": {}, "data": ""}
STATE |= {"optimizer": {"state": {}, "param_groups": []}, "runtime": {"device": "cpu", "dtype": "float32"}}


def checkpoint(run, step, best_step, keep_all=False):
    state = STATE | {"progress": {"step": step}}
    save_checkpoint(run, step, best_step, partial(save_model, GPT(CONFIG), TOKENIZER), state, None if keep_all else 1)


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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_state_can_stay_on_disk(tmp_path, on_disk):
    """So that the processes of a machine share one copy of the optimizer's state."""
    moments = {"state": {0: {"exp_avg": torch.ones(1 << 20)}}, "param_groups": []}
    state = STATE | {"progress": {"step": 1}, "optimizer": moments}
    save_checkpoint(tmp_path, 1, 1, partial(save_model, GPT(CONFIG), TOKENIZER), state, 1)
    loaded = load_state(tmp_path / "last", on_disk=on_disk)["optimizer"]["state"][0]["exp_avg"]
    regions = (line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line)
    bounds = [[int(bound, 16) for bound in region.split("-")] for region in regions]
    assert any(start <= loaded.data_ptr() < end for start, end in bounds) == on_disk
    assert loaded.sum() == 1 << 20


def test_all_checkpoints_can_be_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step, 1, keep_all=True)
    assert len(list(tmp_path.glob("step-*"))) == 3


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    """A step that is saved again counts once, and a folder that the run didn't write stays."""
    for step in (2, 3, 4, 4, 5, 6):
        save_checkpoint(tmp_path, step, 2, lambda directory: None, {}, keep=3)
        (tmp_path / "step-00000001").mkdir(exist_ok=True)
    names = ["step-00000001", "step-00000002", "step-00000004.1", "step-00000005", "step-00000006"]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == names


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


@pytest.mark.parametrize(
    ("writer", "error", "reason"),
    [
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), ""),
        ("torch.save", FULL, " (No space left on device)"),
        ("os.fsync", FULL, " (No space left on device)"),  # while the model is saved
        (
            "gpt_arc.weights.tensor_files.save_file",
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            " (No space left on device)",
        ),
    ],
)
def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path, monkeypatch, writer, error, reason):
    def full(*args, **kwargs):
        raise type(error)(*error.args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        with pytest.raises(UserError) as refusal:
            checkpoint(tmp_path, 1, 1)
    message = rf"the checkpoint {tmp_path}/step-0000000\d can't be written, with [\d,]+ MB free on its disk"
    mend = re.escape(f"{reason}; mend that, or write elsewhere with --out_dir")
    assert re.fullmatch(message + mend, str(refusal.value)) and not list(tmp_path.iterdir())
    checkpoint(tmp_path, 1, 1)
    monkeypatch.setattr(writer, full)
    with pytest.raises(UserError) as refusal:
        checkpoint(tmp_path, 2, 1)
    assert re.fullmatch(message + re.escape(f"{reason}; earlier checkpoints are kept"), str(refusal.value))
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

    state, keep = STATE | {"progress": {"step": step}, "data": mark}, None if keep_all else 1
    save_checkpoint(run, step, best_step, save, state, keep)


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


def without_links(monkeypatch):
    def refused(*args, **kwargs):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "symlink", refused)


def test_a_run_goes_on_where_there_are_no_links(tmp_path, monkeypatch):
    without_links(monkeypatch)
    for step, best in ((1, 1), (2, 1), (3, 1)):
        small_checkpoint(tmp_path, step, best, str(step))
        clean_run(tmp_path, step, best)
    assert (tmp_path / "last").read_text() == "step-00000003" and marks(resumable(tmp_path)) == {"3"}
    for path in (tmp_path, tmp_path / "best", str(tmp_path / "best")):
        assert model_directory(path) == tmp_path / "step-00000001"
    assert model_directory(tmp_path / "last") == tmp_path / "step-00000003"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003"]


def test_a_copy_that_lost_its_links_goes_on(tmp_path):
    for step in (9, 10):
        small_checkpoint(tmp_path, step, 9, str(step), keep_all=True)
    for name in ("last", "best"):
        (tmp_path / name).unlink()
    (tmp_path / "step-00000011").mkdir()  # cut short
    (tmp_path / "step-00000011" / "config.json").write_text("11")
    assert resumable(tmp_path) == model_directory(tmp_path) == tmp_path / "step-00000010"
    clean_run(tmp_path, 10, 9)
    assert (tmp_path / "last").readlink() == Path("step-00000010")
    assert (tmp_path / "best").readlink() == Path("step-00000009")


def test_a_copy_of_last_and_best_alone_goes_on(tmp_path):
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        small_checkpoint(tmp_path / "run", step, 1, str(step))
    copy = tmp_path / "copy"
    for name in ("last", "best"):
        shutil.copytree(tmp_path / "run" / name, copy / name)
    assert marks(resumable(copy)) == {"2"} and marks(model_directory(copy)) == {"1"}
    clean_run(copy, 2, 1)
    assert (copy / "last").readlink() == Path("step-00000002") and (copy / "best").readlink() == Path("step-00000001")
    small_checkpoint(copy, 3, 1, "3")
    assert marks(copy / "last") == {"3"} and marks(copy / "best") == {"1"}


def test_a_live_run_is_read_one_checkpoint_at_a_time_without_locks(tmp_path, monkeypatch):
    """A reader between whose files the run saves and deletes."""
    monkeypatch.setattr("gpt_arc.files.fcntl", None)
    small_checkpoint(tmp_path, 1, 1, "1")
    step, attempts = 1, 0

    @of_one_checkpoint
    def read(directory, saves):
        nonlocal step, attempts
        attempts += 1
        first = (directory / "config.json").read_text()
        if attempts <= saves:
            step += 1
            small_checkpoint(tmp_path, step, step, str(step))
        if not (directory / "weights").exists():  # as a reader takes a file that may be missing
            return first, None
        return first, (directory / "weights").read_text()

    for saves in (0, 1, ATTEMPTS - 1):
        attempts = 0
        assert read(tmp_path, saves) == (str(step), str(step))
    attempts = 0
    with pytest.raises(UserError, match="are deleted before they are read"):
        read(tmp_path, ATTEMPTS)


def test_a_run_does_not_delete_what_is_read(tmp_path):
    """Two readers, and a check of `last`, during which the run saves; it deletes what they read at a later save."""
    small_checkpoint(tmp_path, 1, None, "1")

    @of_one_checkpoint
    def read(directory):
        first = (directory / "config.json").read_text()
        for step in (2, 3):
            small_checkpoint(tmp_path, step, None, str(step))
        with contextlib.ExitStack() as hold:
            assert resumable(tmp_path, hold) == tmp_path / "step-00000003"
            small_checkpoint(tmp_path, 4, None, "4")
            assert marks(tmp_path / "step-00000003") == {"3"} and not (tmp_path / "step-00000002").exists()
        return {first, *marks(directory)}

    assert read(tmp_path) == {"1"}
    small_checkpoint(tmp_path, 5, None, "5")
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000005"]


@pytest.mark.parametrize("held", [False, True])
def test_a_checkpoint_deleted_before_it_is_checked_is_looked_for_again(tmp_path, monkeypatch, held):
    small_checkpoint(tmp_path, 1, None, "1")
    steps = iter((2, 3))

    def save_then(call):
        def wrapped(*args, **kwargs):
            for step in itertools.islice(steps, 1):
                small_checkpoint(tmp_path, step, None, str(step))
            return call(*args, **kwargs)

        return wrapped

    name, call = ("locked", locked) if held else ("check_checkpoint", check_checkpoint)
    monkeypatch.setattr(f"gpt_arc.training.checkpoints.{name}", save_then(call))
    with contextlib.ExitStack() as stack:
        assert resumable(tmp_path, stack if held else None) == tmp_path / "step-00000003"


def test_a_checkpoint_deleted_while_its_link_is_followed_is_looked_for_again(tmp_path, monkeypatch):
    small_checkpoint(tmp_path, 1, 1, "1")
    steps = itertools.count(2)

    def follow_then_save(link):
        directory = follow(link)
        if (step := next(steps)) < 5:
            small_checkpoint(tmp_path, step, step, str(step))
        return directory

    monkeypatch.setattr("gpt_arc.weights.directory.follow", follow_then_save)
    assert marks(model_directory(tmp_path / "last")) == {"4"}


def test_loads_of_a_live_run_never_mix_checkpoints(tmp_path, monkeypatch):
    """A thread saves models whose weights are all equal to their step; best is every third."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    config, stop = GPTConfig(4, 11, 2, 1, 4), threading.Event()

    def save(step):
        model = GPT(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        state = STATE | {"progress": {"step": step}}
        save_checkpoint(tmp_path, step, step - step % 3 or None, partial(save_model, model, TOKENIZER), state, 1)

    def train():
        for step in itertools.count(2):
            save(step)
            if stop.wait(0.01):
                return

    save(1)
    thread = threading.Thread(target=train)
    thread.start()
    try:
        steps = []
        for turn in range(12):
            path = (tmp_path, tmp_path / "last")[turn % 2]
            model, tokenizer = load_model(path)
            (step,) = {value for parameter in model.parameters() for value in parameter.unique().tolist()}
            assert tokenizer == TOKENIZER
            steps.append(step)
    finally:
        stop.set()
        thread.join()
    assert len(set(steps)) > 2 and steps[1::2] == sorted(steps[1::2])


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "weights", "training_state.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumed(tmp_path, name, capsys):
    for step in (1, 2, 3):
        small_checkpoint(tmp_path, step, 1, str(step), keep_all=True)
    flip(tmp_path / "step-00000003" / name, 1001)
    assert resumable(tmp_path) == tmp_path / "step-00000002"
    output = capsys.readouterr().out
    assert f"step-00000003/{name if name != 'manifest.json' else ''}" in output
    assert output.endswith(f"; resuming from {tmp_path}/step-00000002\n")
    clean_run(tmp_path, 2, 1)
    assert (tmp_path / "last").readlink().name == "step-00000002"
    flip(tmp_path / "step-00000002" / name, 2002)
    flip(tmp_path / "step-00000001" / name, 3003)
    with pytest.raises(UserError, match="step-00000002"):
        resumable(tmp_path)


def test_a_damaged_model_is_named_with_the_checkpoint_before_it(tmp_path):
    for step in (1, 2):
        checkpoint(tmp_path, step, 2, keep_all=True)
    for name, bit in (("config.json", 4300), ("tokenizer.json", 900), ("model.safetensors", -77)):
        before = (tmp_path / "best" / name).read_bytes()
        flip(tmp_path / "best" / name, bit)
        remedy = "restore it from a copy or use another checkpoint"
        with pytest.raises(UserError, match=rf"{name} .*damaged.*: {remedy}; .*step-00000001 is undamaged"):
            load_model(tmp_path)
        (tmp_path / "best" / name).write_bytes(before)
    (tmp_path / "best" / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match="tokenizer.json is missing, but manifest.json there lists it: restore it from a copy or use"
    ):
        load_model(tmp_path)
    (tmp_path / "best" / "manifest.json").unlink()  # how to accept a change
    assert load_model(tmp_path)[1] is None


def sharded_checkpoint(run, step):
    shards = {"optimizer.0.exp_avg": torch.full((4, 3), float(step)), "weights.0": torch.arange(5.0)}
    save_checkpoint(run, step, None, lambda directory: None, {"step": step}, None, shards)
    return shards


def test_shards_are_read_as_they_were_written(tmp_path):
    written = sharded_checkpoint(tmp_path, 10)
    shards = {name: torch.empty_like(tensor) for name, tensor in written.items()}
    read_shards(shards, tmp_path / "last")
    assert all(torch.equal(shards[name], tensor) for name, tensor in written.items())
    files = sorted(path.name for path in (tmp_path / "last" / "shards").iterdir())
    assert files[0] == "manifest.json" and all(name.endswith(".safetensors") for name in files[1:])


@pytest.mark.parametrize("damage", ["bit", "missing"])
def test_damaged_shards_are_named_and_the_checkpoint_before_them_resumed(tmp_path, damage, capsys):
    for step in (10, 20):
        sharded_checkpoint(tmp_path, step)
    path = next((tmp_path / "step-00000020" / "shards").glob("*.safetensors"))
    flip(path, 8 * (path.stat().st_size - 2)) if damage == "bit" else path.unlink()
    assert resumable(tmp_path) == tmp_path / "step-00000010"
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "content", "sentence"),
    [
        ({"other": torch.zeros(2)}, None, "is damaged"),
        ({"weights.0": torch.zeros(6)}, None, "is damaged"),
        ({"weights.0": torch.zeros(5)}, b"\xff" * 64, "it claims a header of"),
        ({"weights.0": torch.zeros(5)}, b"", "is damaged"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path, wanted, content, sentence):
    sharded_checkpoint(tmp_path, 10)
    path = next((tmp_path / "last" / "shards").glob("*.safetensors"))
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        read_shards(wanted, tmp_path / "last")
    assert str(tmp_path / "last" / "shards") in str(error.value)


def test_shards_that_can_t_be_written_keep_the_previous_checkpoint(tmp_path, monkeypatch):
    from torch.distributed import checkpoint

    sharded_checkpoint(tmp_path, 10)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(UserError, match=r"can't be written.*No space left on device.*earlier checkpoints are kept"):
        sharded_checkpoint(tmp_path, 20)
    assert resumable(tmp_path).name == "step-00000010" and not list(tmp_path.glob("*00000020*"))
