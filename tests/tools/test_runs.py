"""tools/runs.py: the list of runs, the comparison of two, and removal."""

import io
import os
import sys
import time
from pathlib import Path

import pytest

import train
from gpt_arc.errors import entry_point
from gpt_arc.training import runs
from gpt_arc.training.log import read_metrics
from gpt_arc.weights.directory import save_model
from helpers import TINY_FLAGS, write
from model import GPT
from ranked_texts import LETTERS, tiny_config
from stages import sft
from tools import runs as tool

main = entry_point(tool.main)


@pytest.fixture
def begin(workplace, stage_runner):
    """Trains a tiny run in a folder."""

    def call(folder, *flags):
        output = stage_runner(train, "sums.toml", *TINY_FLAGS, f"--out_dir={folder}", *flags)
        assert "finished step" in output, output

    return call


def written(folder, seconds):
    """Sets the time of a run's last checkpoint."""
    os.utime(Path(folder) / "last", (seconds, seconds))


def test_the_list_has_every_run_the_newest_last(begin, stage_runner, output_of):
    begin("out/a")
    config = Path("out/a/config.toml")
    config.write_text(config.read_text().replace("max_iters = 8", "max_iters = 9"))
    save_model(GPT(tiny_config(n_layer=1)), LETTERS, "base")
    write("chats.jsonl", [{"prompt": "a", "response": "b"}] * 3)
    stage_runner(sft, "base", "--train=chats.jsonl", "--epochs=2", "--device=cpu", "--val_fraction=0")
    written("out/sft", 0)
    Path("out/damaged").mkdir()
    Path("out/damaged/run.json").write_text("{")
    Path("out/notes").mkdir()
    header, first, second, damaged = output_of(main, "runs.py").splitlines()
    assert header.split() == ["run", "stage", "from", "data", "steps", "val", "loss", "written", "size"]
    epoch = time.strftime("%Y-%m-%d %H:%M", time.localtime(0)).split()
    assert first.split()[:-2] == ["sft", "sft", "base", "chats.jsonl", "2", "of", "2", *epoch]
    lowest = min(line["val_loss"] for line in read_metrics(Path("out/a/metrics.jsonl")) if "val_loss" in line)
    assert second.split()[:8] == ["a", "train", "sums", "sums", "8", "of", "9", f"{lowest:.4g}"]
    assert first.endswith("  finished") and second.endswith("  unfinished")
    assert damaged.startswith("out/damaged/run.json is damaged")
    size = sum(path.stat().st_size for path in Path("out/a").glob("**/*") if path.is_file())  # ** follows no links
    assert runs.summary(Path("out/a")).size == size


def test_an_empty_list_says_how_to_start(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    assert "there are no runs under out/; start one with: python train.py" in output_of(main, "runs.py")


def test_a_run_that_patience_ended_is_finished(begin):
    begin("out/a", "--max_iters=100", "--patience=1", "--eval_interval=2", "--learning_rate=1e-30")
    summary = runs.summary(Path("out/a"))
    assert summary.finished and summary.step == 4


def test_two_runs_are_compared_by_settings_and_losses_at_equal_steps(begin, output_of):
    begin("out/a")
    begin("elsewhere/b", "--max_iters=4", "--seed=7")
    settings, losses = output_of(main, "runs.py", "a", "elsewhere/b").split("\n\n")
    rows = [line.split() for line in settings.splitlines()]
    assert rows == [["setting", "a", "b"], ["max_iters", "8", "4"], ["seed", "1337", "7"]]
    header, last = (line.split() for line in losses.splitlines())
    assert header == ["step", "train", "a", "train", "b", "val", "a", "val", "b"]
    a, b = (read_metrics(Path(folder) / "metrics.jsonl") for folder in ("out/a", "elsewhere/b"))
    lines = [next(line for line in log if line["step"] == 4) for log in (a, b)]
    assert last == ["4", *(f"{line[name]:.4g}" for name in ("train_loss", "val_loss") for line in lines)]


def test_runs_of_two_stages_are_compared_by_what_they_have():
    settings = {"model": "m", "epochs": 1, "out_dir": None}, {"model": "n", "epochs": 1, "out_dir": "b", "beta": 0.1}
    metrics = (
        [{"step": 1, "train_loss": 2.0}, {"step": 1, "val_loss": 3.0}],
        [{"step": 1, "train_loss": 0.5}, {"step": 2}],
    )
    a, b = (
        runs.Summary(Path(name), stage, "m", "d", each, 1, 1, lines, 0.0, 0)
        for name, stage, each, lines in zip("ab", ("sft", "dpo"), settings, metrics)
    )
    assert [line.split() for line in tool.comparison(a, b).splitlines()] == [
        ["setting", "a", "b"],
        ["stage", "sft", "dpo"],
        ["model", "m", "n"],
        ["beta", "0.1"],
        [],
        ["step", "train", "a", "train", "b", "val", "a", "val", "b"],
        ["1", "2", "0.5", "3"],
    ]


def test_a_comparison_is_short_and_has_the_last_step(begin, output_of):
    for name in ("a", "b"):
        begin(f"out/{name}", "--max_iters=3")
        write(f"out/{name}/metrics.jsonl", [{"step": step, "train_loss": 1 / (step + 1)} for step in range(1001)])
    steps = [line.split()[0] for line in output_of(main, "runs.py", "a", "b").split("\n\n")[1].splitlines()[1:]]
    assert len(steps) <= 21 and steps[0] == "0" and steps[-1] == "1000"
    write("out/b/metrics.jsonl", [{"step": 2000, "train_loss": 1.0}])
    assert output_of(main, "runs.py", "a", "b").endswith("no step has a loss in both runs\n")


def test_removal_asks_and_deletes_only_what_the_run_wrote(begin, output_of, monkeypatch):
    for name in ("a", "b"):
        begin(f"out/{name}", "--max_iters=3")
    Path("out/b/notes.txt").touch()
    Path("out/b/step-00000009").mkdir()  # not in checkpoints.json
    assert "nobody can be asked whether to remove out/a: add --yes" in output_of(main, "runs.py", "--remove", "a")
    terminal = io.StringIO("no\ny\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert output_of(main, "runs.py", "--remove", "a").endswith("nothing is removed\n") and Path("out/a/last").exists()
    assert output_of(main, "runs.py", "--remove", "a").endswith("removed out/a\n") and not Path("out/a").exists()
    output = output_of(main, "runs.py", "--remove", "b", "--yes")
    assert output == "removed out/b, except what the run didn't write: notes.txt, step-00000009\n"
    assert sorted(path.name for path in Path("out/b").iterdir()) == ["notes.txt", "step-00000009"]


def test_a_run_in_use_and_a_folder_that_is_no_run_are_kept(begin, output_of):
    begin("out/a", "--max_iters=3")
    Path("out/notes").mkdir()
    lock = runs.Lock(Path("out/a"))
    assert "out/a can't be removed: a process is training in it" in output_of(main, "runs.py", "--remove=a", "--yes")
    del lock
    message = output_of(main, "runs.py", "--remove=notes", "--yes")
    assert "there is no run notes; the runs under out/ are: a" in message and Path("out/notes").exists()
    assert "two runs are compared, not 1" in output_of(main, "runs.py", "a")
    assert "--remove takes one run" in output_of(main, "runs.py", "a", "--remove=a")
    assert Path("out/a/run.json").exists()
