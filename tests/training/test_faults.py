"""What happens to long runs: full disks, spikes of the loss, time that ends, processes that hang, lag or fail."""

import errno
import json
import os
import random
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import train
from gpt_arc import watch as watch_module
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.manifest import record_files
from gpt_arc.settings import seconds_in
from gpt_arc.training import pace as pace_module
from gpt_arc.training import signals
from gpt_arc.training.checkpoints import load_state, resumable
from gpt_arc.training.log import read_metrics
from gpt_arc.training.optim import Updater
from gpt_arc.training.pace import Pace
from gpt_arc.training.saving import Saving
from gpt_arc.watch import Watch
from gpt_arc.weights.checkpoint_folders import named_checkpoint, step_of
from gpt_arc.weights.directory import save_model
from helpers import ROOT, TINY_FLAGS, assert_same_weights, command, free_port, lines_of
from model import GPT, GPTConfig
from stages import sft
from warm import WarmPopen

FLAGS = "sums.toml", *TINY_FLAGS, "--dtype=float32", "--compile=False"
FULL = OSError(errno.ENOSPC, "No space left on device")


def fails_at(monkeypatch, owner, name, calls, error=FULL):
    """Makes the calls of a function with these numbers, counted from 1, raise an error."""
    original, made = getattr(owner, name), []

    def failing(*args, **kwargs):
        made.append(1)
        if len(made) in calls:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


# ---- time


def test_durations_are_read():
    durations = {"3h59m": 14340, "90m": 5400, "45s": 45, "1d2h3m4s": 93784}
    assert {duration: seconds_in(duration) for duration in durations} == durations
    for wrong in ("", "90", "0m", "1.5h", "59m3h", "-1h"):
        with pytest.raises(ValueError, match="is not a time such as 3h59m"):
            seconds_in(wrong)


def test_a_run_saves_when_its_time_is_up_and_resumes_as_if_it_had_not_been(workplace, stage_runner, monkeypatch):
    stage_runner(train, *FLAGS, "--out_dir=whole", "--dropout=0.1")
    monkeypatch.setattr(signals, "START", time.monotonic() - 3600)
    stopped = stage_runner(train, *FLAGS, "--out_dir=halves", "--dropout=0.1", "--stop_after=59m")
    assert stopped.code == 143 and "stopped at step 1, saved; resume with: python train.py sums.toml" in stopped.output
    assert "finished step 8" in stage_runner(train, "--resume=halves", "--device=cpu", "--stop_after=61m")
    assert_same_weights("whole/last", "halves/last")
    refused = stage_runner(train, *FLAGS, "--stop_after=90")
    assert refused.code == 2 and "'90' is not a time such as 3h59m" in refused.message


# ---- disks


def test_a_run_goes_on_while_its_disk_is_full(workplace, stage_runner, monkeypatch):
    """The checkpoint of step 4, the best so far, isn't written: the next one becomes the best."""
    stage_runner(train, *FLAGS, "--out_dir=whole", "--eval_interval=2")
    fails_at(monkeypatch, torch, "save", calls=[2, 3])
    output = stage_runner(train, *FLAGS, "--out_dir=run", "--eval_interval=2", "--keep_checkpoints=2")
    for step in (4, 6):
        assert f"run/step-0000000{step} can't be written, with" in output
    assert output.count("(No space left on device); earlier checkpoints are kept; the run goes on, and tries") == 2
    assert "best val loss" in output and Path("run/best").readlink().name == Path("run/last").readlink().name
    assert_same_weights("whole/last", "run/last")
    assert [line["train_loss"] for line in lines_of("run")] == [line["train_loss"] for line in lines_of("whole")]
    assert sorted(path.name for path in Path("run").glob("step-*")) == ["step-00000002", "step-00000008"]


def test_as_many_saves_may_fail_as_is_set_except_the_last_one(workplace, stage_runner, monkeypatch):
    for folder, flags, calls, kept in (
        ("at-once", ("--failed_saves=0",), [2], 2),
        ("later", ("--failed_saves=1",), [2, 3], 2),
        ("at-the-end", (), [4, 5], 6),
    ):
        with monkeypatch.context() as patch:
            fails_at(patch, torch, "save", [*calls, calls[-1] + 1])  # also where an error makes the run save
            stopped = stage_runner(train, *FLAGS, f"--out_dir={folder}", "--eval_interval=2", *flags)
        assert stopped.code == 2 and "(No space left on device); earlier checkpoints are kept" in stopped.message
        assert Path(folder, "last").readlink().name == f"step-0000000{kept}"
    with monkeypatch.context() as patch:
        fails_at(patch, torch, "save", [1, 2])
        stopped = stage_runner(train, *FLAGS, "--out_dir=never", "--failed_saves=0")
    assert stopped.message.endswith("(No space left on device); mend that, or write elsewhere with --out_dir\n")
    assert "finished step 8" in stage_runner(train, *FLAGS, "--out_dir=elsewhere")


def test_a_folder_that_vanishes_for_a_while_is_written_when_it_is_back(workplace, stage_runner, monkeypatch):
    """As a network's mount does."""
    original, updates = Updater.update, []

    def update(self, *args):
        updates.append(1)
        if len(updates) in (3, 5):
            os.rename(*[("run", "away"), ("away", "run")][len(updates) // 5])
        return original(self, *args)

    monkeypatch.setattr(Updater, "update", update)
    output = stage_runner(train, *FLAGS, "--out_dir=run")
    assert "the run folder run has been deleted or moved, so step 4 can't be saved; the run goes on" in output
    assert Path("run/last").readlink().name == "step-00000008" and len(read_metrics(Path("run/metrics.jsonl"))) == 8


def test_a_stage_goes_on_while_its_disk_is_full(tmp_path, monkeypatch, stage_runner):
    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer(sorted("abcde\n !?.,<|>usertin"))
    save_model(GPT(GPTConfig(32, tokenizer.vocab_size, 1, 1, 8)), tokenizer, "base")
    Path("chats.jsonl").write_text('{"prompt": "abc", "response": "de"}\n' * 4)
    flags = "base", "--train=chats.jsonl", "--val=chats.jsonl", "--epochs=3", "--device=cpu", "--batch_size=4"
    fails_at(monkeypatch, torch, "save", calls=[2])
    output = stage_runner(sft, *flags, "--out_dir=run", "--learning_rate=1e-2", "--keep_checkpoints=2")
    assert "step-00000002 can't be written" in output and "the run goes on" in output
    assert Path("run/best").readlink().name == Path("run/last").readlink().name == "step-00000003"
    assert sorted(path.name for path in Path("run").glob("step-*")) == ["step-00000001", "step-00000003"]


def test_what_a_thread_writes_is_reported_when_it_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(dist, "new_group", lambda backend: backend)
    progress, begin = SimpleNamespace(step=4, best_val_loss=2.0, best_step=4), threading.Event()
    saving = Saving(progress, None, 1, background=True)
    state, shards = {"optimizer": {0: {"step": torch.zeros(())}}}, {"optimizer.0.exp_avg": torch.zeros(3)}
    copies = saving.staged(state, shards)
    state["optimizer"][0]["step"] += 1
    shards["optimizer.0.exp_avg"] += 1
    assert copies[0]["optimizer"][0]["step"] == 0 and not copies[1]["optimizer.0.exp_avg"].any()

    saving.attempt(lambda: begin.wait(10) or None)
    vars(progress).update(step=8, best_val_loss=1.0, best_step=8)
    assert saving.step is None
    begin.set()
    saving.wait()
    assert saving.step == 4

    def full():
        raise UserError("the disk is full")

    saving.attempt(full)
    progress.step = 9
    assert "the disk" not in capsys.readouterr().out
    saving.wait()
    assert "the disk is full; the run goes on, and tries again" in capsys.readouterr().out
    assert (saving.step, progress.best_val_loss, progress.best_step) == (4, 2.0, 4)
    with pytest.raises(UserError, match="the disk is full"):
        saving.attempt(full, last=True)


# ---- spikes of the loss


def spike_at(monkeypatch, *updates):
    """Multiplies the losses that these updates return, counted from 1."""
    original, made = Updater.update, []

    def update(self, *args):
        made.append(1)
        finite, norm, (loss, *others) = original(self, *args)
        return finite, norm, [loss * (3 if len(made) in updates else 1), *others]

    monkeypatch.setattr(Updater, "update", update)


SPIKY = *FLAGS, "--max_iters=16", "--dropout=0.1", "--ema_decay=0.9", "--keep_all_checkpoints=True"


def test_a_spike_rewinds_to_the_last_checkpoint_and_leaves_out_the_batches(workplace, stage_runner, monkeypatch):
    """As if a run were resumed from step 12 with the batches that come after the fourteenth."""
    with monkeypatch.context() as patch:
        spike_at(patch, 14)
        output = stage_runner(train, *SPIKY, "--out_dir=run", "--spike_factor=2")
    assert "step 14: the loss, " in output and "times the usual one: back to step 12, and on without" in output
    lines = read_metrics(Path("run/metrics.jsonl"))
    assert [line["step"] for line in lines] == [*range(1, 17)]
    assert [line.get("rewinds") for line in lines] == [None] * 12 + [1] * 4
    assert lines[-1]["tokens"] == 18 * 4 * 16

    shutil.copytree("run", "resumed", symlinks=True)
    Path("resumed/last").unlink()
    Path("resumed/last").symlink_to("step-00000012")
    path = Path("resumed/last/training_state.pt")
    state = torch.load(path, weights_only=True)
    state["progress"]["consumed"] = 14 * 4
    torch.save(state, path)
    record_files(path.parent, path.name)
    assert "finished step 16" in stage_runner(train, "--resume=resumed", "--device=cpu")
    assert_same_weights("resumed/last", "run/last")


def test_a_run_whose_loss_spikes_again_and_again_ends(workplace, stage_runner, monkeypatch):
    spike_at(monkeypatch, 14, 25, 36, 47)
    flags = "--max_iters=100", "--eval_interval=12", "--lr_decay_iters=100", "--spike_factor=2"
    stopped = stage_runner(train, *SPIKY, "--out_dir=run", *flags)
    assert stopped.code == 1 and "the loss has spiked 4 times after step 12: lower learning_rate" in stopped.message
    assert Path("run/last").readlink().name == "step-00000012" and stopped.output.count("back to step 12") == 4


SPIKING = f"""
import runpy, sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests" / "training")!r}, {str(ROOT / "tests")!r}
import pytest
from test_faults import spike_at
spike_at(pytest.MonkeyPatch(), 14)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_divided_models_rewind_as_whole_ones(workplace, stage_runner, monkeypatch):
    Path("spiking.py").write_text(SPIKING)
    flags = *SPIKY, "--dropout=0", "--spike_factor=2"
    with monkeypatch.context() as patch:
        spike_at(patch, 14)
        stage_runner(train, *flags, "--out_dir=one")
    flags += "--parallel=fsdp", "--checkpoint_format=sharded", "--async_save", "--out_dir=two"
    result = command(str(workplace / "spiking.py"), str(ROOT / "train.py"), *flags, processes=2)
    assert "back to step 12, and on without" in result.stdout, result.stdout + result.stderr
    for expected, line in zip(lines_of("one"), lines_of("two"), strict=True):
        assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert line.get("rewinds") == expected.get("rewinds")
    assert_same_weights("one/last", "two/last", rtol=0, atol=3e-5)


# ---- processes


def test_the_watch_names_the_process_that_others_wait_for(monkeypatch, capsys):
    """Each process's watch reads the same store; the second has come less far, and the third is silent."""
    store, watches = dist.HashStore(), []
    monkeypatch.setattr(watch_module.socket, "gethostname", lambda: "node")
    for rank, (arrivals, heard) in enumerate(((7, 0), (6, 0), (6, 100))):
        watch = Watch()
        watch._store, watch._rank, watch._processes = store, rank, 4  # the fourth hasn't started
        watch._since = time.monotonic() - 60
        store.set(watch._key(rank), f"{arrivals} {time.time() - heard} node")
        watches.append(watch)
    printed = []
    for watch in watches[:2]:
        watch._report(beat=10)
        printed.append(capsys.readouterr().err)
    assert printed[0].splitlines() == [
        "process 1 on node keeps the others waiting for 60 s",
        "process 2 on node keeps the others waiting for 60 s, nor shown a sign of life for 100 s",
    ]
    assert printed[1].startswith("process 1 on node has not moved for 60 s while others wait for it; it is at:\n")
    assert "test_the_watch_names_the_process_that_others_wait_for" in printed[1]  # this thread's stack


def test_slow_processes_are_named(monkeypatch, capsys):
    monkeypatch.setattr(pace_module, "WORLD_SIZE", 3)
    figures = [("a", 0.0, 1.0), ("b", 0.0, 1.1), ("c", 0.3, 1.9)]  # host, share of waiting for data, time of a product
    monkeypatch.setattr(pace_module.distributed, "gather", lambda figure: figures)
    Pace(torch.device("cpu")).report(10.0)
    assert capsys.readouterr().out.splitlines() == [
        "process 2 on c is slow: it multiplies 1.7 times as long as others",
        "process 2 on c is slow: it waits for its data during 30% of the training",
    ]


FAULTY = f"""
import errno, os, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed.checkpoint as checkpoint
from gpt_arc.training.optim import Updater
from gpt_arc.training.pace import Pace

def stuck_on_a_disk():
    time.sleep(15)

backward, timed, write_data, steps = Updater.backward, Pace.timed, checkpoint.HuggingFaceStorageWriter.write_data, []

def faulty_backward(self, loss):
    steps.append(1)
    if len(steps) == 3:
        loss.register_hook(lambda gradient: gradient * torch.nan)
    if len(steps) == 12:
        stuck_on_a_disk()
    backward(self, loss)

def late(batches):
    for batch in batches:
        if 5 <= len(steps) < 9:
            time.sleep(0.3)
        yield batch

def full(self, *args):
    if len(steps) < 6:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write_data(self, *args)

if os.environ["RANK"] == "1":
    Updater.backward = faulty_backward
    Pace.timed = lambda self, batches: timed(self, late(batches))
    checkpoint.HuggingFaceStorageWriter.write_data = full
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--parallel=ddp",), ("--parallel=fsdp", "--checkpoint_format=sharded")])
def test_faults_of_one_of_two_processes_are_named_and_survived(workplace, flags):
    """A gradient that isn't finite, a full disk, late data and, in the end, a process that hangs."""
    Path("faulty.py").write_text(FAULTY)
    flags = *FLAGS, *flags, "--max_iters=20", "--out_dir=run", "--timeout_minutes=0.2"
    result = command(str(workplace / "faulty.py"), str(ROOT / "train.py"), *flags, processes=2)
    output = result.stdout + result.stderr
    assert "step 3: the loss or its gradient is not finite in process 1; the batch is skipped" in output
    if "--parallel=fsdp" in flags:
        assert "step-00000004 can't be written" in output and "the run goes on, and tries again" in output
    assert "is slow: it waits for its data during" in output
    assert "process 1 on " in output and "keeps the others waiting for " in output
    assert "has not moved for " in output and "in stuck_on_a_disk" in output
    assert result.returncode and Path("run/last").readlink().name == "step-00000008"
    assert json.loads(Path("run/metrics.jsonl").read_text().splitlines()[3])["skipped"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "kills"), [((), 3), (("--async_save",), 2)], ids=["sync", "async"])
def test_processes_killed_while_they_save_lose_one_step_at_most(workplace, flags, kills):
    """Every step is saved, in shards; each kill comes at a random moment, and the run resumes from what is left."""
    flags += *FLAGS, "--parallel=fsdp", "--checkpoint_format=sharded", "--eval_interval=1", "--eval_iters=1"
    flags += "--max_iters=1000000", "--out_dir=run", "--init_from=auto"
    moments, step = random.Random(0), 0
    for _ in range(kills):
        shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        processes = [
            WarmPopen([sys.executable, str(ROOT / "train.py"), *flags], env=shared | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in ("0", "1")
        ]
        try:
            deadline = time.monotonic() + 60
            while saved_step() <= step and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(moments.random() / 2)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
        last = read_metrics(Path("run/metrics.jsonl"))[-1]["step"]
        checkpoint = resumable(Path("run"))
        assert checkpoint == Path("run/last").resolve().relative_to(workplace), "the last one is whole"
        assert step < step_of(checkpoint) and last - 1 <= step_of(checkpoint) <= last
        load_state(checkpoint)
        step = step_of(checkpoint)


def saved_step():
    checkpoint = named_checkpoint(Path("run"), "last")
    return step_of(checkpoint) if checkpoint else -1
