"""Output that can't be written doesn't end a run, and bad data end it only after it has saved."""

import errno
import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from gpt_arc import errors
from gpt_arc.data.order import TrainingOrder, evaluation_starts
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import entry_point
from gpt_arc.training.log import MetricsLog, read_metrics
from gpt_arc.weights.directory import save_model
from helpers import TINY_FLAGS, assert_same_weights, command
from model import GPT, GPTConfig
from stages import finetune

FULL = OSError(errno.ENOSPC, "No space left on device")
GONE = BrokenPipeError(errno.EPIPE, "Broken pipe")


class Broken(io.StringIO):
    """A standard output whose writes fail from the first line after `kept` on."""

    def __init__(self, error, kept=0):
        super().__init__()
        self.error, self.kept = error, kept

    def write(self, text):
        if self.kept == 0:
            raise self.error
        self.kept -= text.count("\n")
        return super().write(text)


@pytest.fixture
def output(monkeypatch):
    """Has standard output fail from now on, with this error and after this many lines."""
    monkeypatch.setattr(errors, "_has_lost_output", False)
    monkeypatch.setattr(errors, "mute", lambda: monkeypatch.setattr(sys, "stdout", io.StringIO()))

    def broken(error, kept):
        monkeypatch.setattr(sys, "stdout", Broken(error, kept))

    return broken


@pytest.mark.parametrize(("error", "warnings"), [(FULL, 1), (GONE, 0)])
@pytest.mark.parametrize("kept", [0, 7])
def test_a_run_goes_on_without_standard_output(workplace, monkeypatch, capsys, output, error, warnings, kept):
    output(error, kept)
    monkeypatch.setattr(sys, "argv", ["train.py", "sums.toml", *TINY_FLAGS])
    with pytest.raises(SystemExit) as stop:
        entry_point(train.main)()
    assert stop.value.code == 0 and Path("out/sums/last").resolve().name == "step-00000008"
    assert [line["step"] for line in read_metrics(Path("out/sums/metrics.jsonl"))] == [*range(1, 9)]
    message = "train.py: standard output can't be written (No space left on device): the run goes on"
    assert capsys.readouterr().err.count(message) == warnings


def test_fine_tuning_writes_its_report_without_standard_output(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    save_model(GPT(GPTConfig(16, 4, 1, 1, 8)), CharTokenizer("abcd"), "base")
    rows = [{"text": text, "label": text[0]} for text in ("ab", "bc", "ad", "bd") * 3]
    for name in ("train.jsonl", "test.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    output(GONE, 1)
    files = ["base", "--train=train.jsonl", "--val=test.jsonl", "--test=test.jsonl"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *files, "--epochs=2", "--device=cpu", "--dtype=float32"])
    with pytest.raises(SystemExit) as stop:
        entry_point(finetune.main)()
    assert stop.value.code == 0 and json.loads(Path("out/finetune/report.json").read_text())["test"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_output_that_is_the_purpose_of_a_command_must_be_written():
    script = "from gpt_arc.errors import entry_point\n@entry_point\ndef main():\n  print('x')\nmain()"
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (2, "-c: No space left on device\n")


# ---- metrics.jsonl


class NearlyFull:
    """A file on a disk with room for `room` bytes more."""

    def __init__(self, room):
        self.room, self.content = room, b""

    def write(self, content):
        if not self.room:
            raise FULL
        part = content[: self.room]
        self.content, self.room = self.content + part, self.room - len(part)
        return len(part)


@pytest.mark.parametrize("room", [0, 1, 9, 12, 30, 31])
def test_lines_that_find_no_room_are_written_when_there_is_some(tmp_path, capsys, room):
    log = MetricsLog(tmp_path, 0)
    log._file = NearlyFull(room)
    lines = [{"step": step, "train_loss": 1 / step} for step in range(1, 6)]
    for line in lines[:3]:
        log.write(line)
    assert capsys.readouterr().out.count("metrics.jsonl can't be written (No space left on device)") == 1
    log._file.room = 10**6
    for line in lines[3:]:
        log.write(line)
    (tmp_path / "metrics.jsonl").write_bytes(log._file.content)
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


# ---- bad data


def test_a_run_saves_before_bad_data_end_it_and_resumes_as_if_they_had_been_good(workplace, stage_runner, monkeypatch):
    flags = ["sums.toml", *TINY_FLAGS, "--eval_interval=100", "--dtype=float32"]
    stage_runner(train, *flags, "--out_dir=whole")
    tokens, steps = Path("data/sums/train.bin"), []
    content, original = tokens.read_bytes(), train.Updater.update

    def update(self, *args):
        steps.append(1)
        if len(steps) == 5:
            tokens.write_bytes(content[:1500])
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(train.Updater, "update", update)
        stopped = stage_runner(train, *flags, "--out_dir=halves")
    assert stopped.code == 2 and "data/sums/train.bin was changed or replaced while it was in use" in stopped.message
    assert "is saved; resume with: python train.py sums.toml --resume=halves" in stopped.output
    step = int(Path("halves/last").resolve().name.removeprefix("step-"))
    assert 4 <= step <= 6  # batches are read ahead
    tokens.write_bytes(content)
    gc.collect()  # the failed run's lock
    assert "finished step 8" in stage_runner(train, "--resume=halves", "--device=cpu")
    assert_same_weights("whole/last", "halves/last")


def test_a_file_that_vanishes_ends_a_run_that_has_saved(workplace, stage_runner, monkeypatch):
    original = train.Updater.update

    def update(self, *args):
        Path("data/sums/train.bin").unlink(missing_ok=True)
        return original(self, *args)

    monkeypatch.setattr(train.Updater, "update", update)
    stopped = stage_runner(train, "sums.toml", *TINY_FLAGS, "--eval_interval=100")
    assert stopped.code == 2 and "train.bin: No such file or directory" in stopped.message
    assert "is saved; resume with: " in stopped.output and Path("out/sums/last/model.safetensors").exists()


@pytest.mark.parametrize(("split", "place", "ending"), [
    ("val", 2, "stopped at step 4, saved; resume with: torchrun"),  # a window of the second process, in an evaluation
    ("train", 1, "stopped at step 0\n"),  # in its first batch, before there is anything to save
])  # fmt: skip
def test_other_bad_data_of_one_of_two_processes(workplace, split, place, ending):
    flags = ["sums.toml", *TINY_FLAGS, "--batch_size=2", "--dtype=float32", "--out_dir=run"]
    tokens = TokenFiles(Path("data/sums"), split)
    starts = {"train": TrainingOrder(len(tokens), 16, 1337).starts(0, 2), "val": evaluation_starts(len(tokens), 16, 4)}
    path, bad = Path(f"data/sums/{split}.bin"), int(starts[split][place])
    content = path.read_bytes()
    path.write_bytes(content[: 1024 + 2 * bad] + b"\xff\xff" + content[1026 + 2 * bad :])
    stopped = command("train.py", *flags, processes=2)
    assert stopped.returncode and "data/sums has the token id 65535, beyond vocab_size" in stopped.stderr
    assert ending in stopped.stdout
    path.write_bytes(content)
    if split == "val":
        resumed = command("train.py", "--resume=run", processes=2)
        assert "run, from step 4" in resumed.stdout and "finished step 8" in resumed.stdout, resumed.stderr
    else:
        assert not Path("run/last").exists()


@pytest.mark.slow
def test_bad_data_of_one_of_two_processes_stop_both_after_they_have_saved(workplace):
    """The token that only the second process reads is made invalid, and mended before the run goes on."""
    flags = ["sums.toml", *TINY_FLAGS, "--eval_interval=100", "--dtype=float32"]
    assert command("train.py", *flags, "--out_dir=whole", processes=2).returncode == 0
    tokens = TokenFiles(Path("data/sums"), "train")
    starts = TrainingOrder(len(tokens), 16, 1337).starts(0, 8 * 4)
    bad = int(starts[4 * 4 + 2]) + 5  # in the fifth step, in the second half of its four windows
    first = [step for step in range(8) if any(s <= bad <= s + 16 for s in starts[4 * step : 4 * step + 4])]
    path = Path("data/sums/train.bin")
    content = path.read_bytes()
    path.write_bytes(content[: 1024 + 2 * bad] + b"\xff\xff" + content[1026 + 2 * bad :])
    stopped = command("train.py", *flags, "--out_dir=halves", processes=2)
    assert stopped.returncode and "data/sums has the token id 65535, beyond vocab_size" in stopped.stderr
    assert f"stopped at step {first[0]}, saved; resume with: torchrun" in stopped.stdout
    path.write_bytes(content)
    resumed = command("train.py", "--resume=halves", processes=2)
    assert "finished step 8" in resumed.stdout, resumed.stderr
    assert_same_weights("whole/last", "halves/last")
