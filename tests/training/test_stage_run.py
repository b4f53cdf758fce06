"""Shared by the training stages: orders, splits, micro-batches, settings and records."""

import dataclasses
import json
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError
from gpt_arc.settings import STRICT, mistake
from gpt_arc.training import command_line
from gpt_arc.training import epochs as epochs_module
from gpt_arc.training import stage_run as stage_run_module
from gpt_arc.training.command_line import read_options, run_stage
from gpt_arc.training.epochs import EpochOrder, digest, held_out, micro_batches
from gpt_arc.training.options import StageOptions
from gpt_arc.training.schedule import PublishedRate, learning_rate_at
from gpt_arc.training.stage_record import record_options, recorded_options
from gpt_arc.training.stage_run import StageProgress, StageRun
from helpers import refusal
from model import GPTConfig
from train import Run


@dataclass(frozen=True, config=STRICT)
class Options(StageOptions):
    train: Path | None = None
    """A file."""
    words: tuple[str, ...] = ()
    """Several texts."""
    reference: str | None = None
    """Another model."""
    share: float | None = 0.5
    """A number, or none."""

    PATHS = ("model", "reference")
    PUBLISHED = PublishedRate(1e-5, 1e9)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 3), (9, 3), (5, 8), (64, 7)])
def test_an_epoch_has_each_row_once(count, size):
    order = EpochOrder(count, size, seed=3)
    per_epoch = -(-count // size)
    assert order.updates(4) == 4 * per_epoch
    epochs = []
    for epoch in range(4):
        updates = [order.rows(update) for update in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert all(len(rows) == size for rows in updates[:-1]) and 1 <= len(updates[-1]) <= size
        rows = [row for update in updates for row in update]
        assert sorted(rows) == list(range(count))
        epochs.append(rows)
    if count > 5:
        assert len({tuple(rows) for rows in epochs}) == 4  # another order each time
    together = [row for rows in epochs for row in rows]
    for start in range(3 * count):
        assert order.take(start, count) == together[start : start + count]
    same_seed, other_seed = EpochOrder(count, size, seed=3), EpochOrder(count, size, seed=4)
    assert [same_seed.rows(u) for u in range(order.updates(1))] == [order.rows(u) for u in range(order.updates(1))]
    if count > 5:
        assert [other_seed.rows(u) for u in range(order.updates(1))] != [order.rows(u) for u in range(order.updates(1))]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_split_the_rows_of_an_update(monkeypatch, world):
    draw = random.Random(world)
    monkeypatch.setattr(epochs_module, "WORLD_SIZE", world)
    for _ in range(100):
        rows, size = draw.sample(range(100), draw.randrange(1, 30)), draw.randrange(1, 6)
        parts = []
        for rank in range(world):
            monkeypatch.setattr(epochs_module, "RANK", rank)
            parts.append(list(micro_batches(rows, size)))
        assert len({len(batches) for batches in parts}) == 1  # otherwise one process would wait forever
        counted = Counter(row for batches in parts for batch, counts in batches for row in batch if counts)
        assert counted == Counter(rows)
        for batch, counts in (part for batches in parts for part in batches):
            assert 1 <= len(batch) <= size and set(batch) <= set(rows) and counts in (0.0, 1.0)
        for turn in zip(*parts):
            sizes = [len(batch) * bool(counts) for batch, counts in turn]
            assert max(sizes) - min(sizes) <= 1


def test_the_held_out_split():
    texts = [f"text {i}" for i in range(40)]
    splits = held_out(texts, 0.25, seed=5)
    assert len(splits["val"]) == 10 and sorted(splits["train"] + splits["val"]) == sorted(texts)
    assert held_out(texts, 0.25, seed=5) == splits != held_out(texts, 0.25, seed=6)
    assert held_out(texts, 0.01, seed=5) == held_out(texts, 0.0, seed=5) == {"train": texts}


def test_digests_differ_by_content():
    assert digest([[1, 2], [3]]) == digest(((1, 2), (3,))) != digest([[1], [2, 3]])


# ---- settings


def test_the_learning_rate_has_warmup_schedule_and_final_value():
    options = Options(learning_rate=2.0, warmup=0.1, min_lr=0.5, schedule="linear", beta2=0.5)
    training = options.training(40)
    rates = [learning_rate_at(step, training) for step in range(41)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0]) and rates[22] == pytest.approx(1.25)
    assert rates[40] == pytest.approx(0.5) and training.beta2 == 0.5
    assert learning_rate_at(39, Options(schedule="constant", learning_rate=2.0).training(40)) == 2.0


def test_flags_override_files_and_later_files_earlier_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text('model = "one"\nwords = ["x", "y z"]\nbatch_size = 3\nseed = 5\nreference = "r"\n')
    Path("b.toml").write_text("batch_size = 4\nshare = 0.25\noverwrite = true\n")
    options = read_options(Options, None, ["a.toml", "b.toml", "--seed=6", "--reference=None"])
    assert options == Options(
        model="one", words=("x", "y z"), batch_size=4, seed=6, share=0.25, reference=None, overwrite=True
    )
    assert read_options(Options, None, ["a.toml", "two"]).model == "two"
    assert read_options(Options, None, ["three", "--train", "f.jsonl"]) == Options(model="three", train=Path("f.jsonl"))
    Path("c.toml").write_text("words = []\n")
    assert read_options(Options, None, ["a.toml", "c.toml"]).words == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("wrods = ['x']", "a.toml: there is no setting wrods; did you mean words?"),
        ("zzzzzzz = 1", "a.toml: there is no setting zzzzzzz"),
        ("words = 'x'", 'a.toml: words = "x" must be a list'),
        ("reference = ['x']", 'a.toml: reference = ["x"] must be a text in quotes'),
        ("model = ['x']", 'a.toml: model = ["x"] must be a text in quotes'),
        ("[model]\nname = 'x'", 'a.toml: model = {"name": "x"} must be a text in quotes'),
        ("seed = 'x'", 'a.toml: seed = "x" must be a whole number'),
        ("seed", "a.toml is not valid TOML"),
    ],
)
def test_mistakes_in_a_settings_file(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(content)
    with pytest.raises(UserError) as refused:
        read_options(Options, None, ["a.toml"])
    assert message in str(refused.value) and "a.toml" in str(refused.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps = 0 must be at least 1"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0 must be at least 0"),
        ({"grad_clip": float("nan")}, "grad_clip = nan must be at least 0, and finite"),
        ({"seed": -1}, r"seed = -1 must be at least 0 and less than 2\^63"),
        ({"adam_eps": float("inf")}, "adam_eps = inf must be more than 0, and finite"),
        ({"beta1": 1.0}, "beta1 = 1.0 must be between 0 and 1, 1 excluded"),
        ({"warmup": 1.0}, "warmup = 1.0 must be between 0 and 1, 1 excluded"),
        ({"learning_rate": 1e-5, "min_lr": 1.5}, "min_lr = 1.5 lies above learning_rate = 1e-05"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError) as refused:
        Options(**setting)
    assert re.search(message, mistake(refused.value, Options))


def test_the_former_name_of_min_lr_still_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for min_lr, expected in ((None, 1e-5 * 0.1), (0.0, 0)):
        assert Options(learning_rate=1e-5, min_lr=min_lr).training(10).min_lr == expected
    for flags in (["--final_learning_rate=0.3"], ["--final-learning-rate", "0.3"]):
        assert read_options(Options, None, ["--learning_rate=7e-6", *flags]).min_lr == 7e-6 * 0.3
    Path("a.toml").write_text("final_learning_rate = 0.3\nlearning_rate = 1e-4\n")
    assert read_options(Options, None, ["a.toml", "--learning_rate=7e-6"]).min_lr == 7e-6 * 0.3
    assert read_options(Options, None, ["a.toml", "--min_lr=2e-6"]).min_lr == 2e-6
    Path("b.toml").write_text("min_lr = 1e-6\n")
    assert read_options(Options, None, ["b.toml", "--final_learning_rate=0"]).min_lr == 0
    assert read_options(Options, None, ["a.toml", "b.toml"]).min_lr == 1e-6
    assert read_options(Options, None, ["--final_learning_rate=0.3"]) == Options(learning_rate=1e-5, min_lr=1e-5 * 0.3)
    with pytest.raises(UserError, match="final_learning_rate = 2 must be between 0 and 1"):
        read_options(Options, None, ["--final_learning_rate=2"])


def test_the_learning_rate_follows_from_the_model_s_size(capsys):
    """It is the published one at the published size and beyond, and 0.01 at most; min_lr follows."""
    published = Options.PUBLISHED
    assert [published.at(size) for size in (10**9, 10**10)] == [1e-5, 1e-5] and published.at(900) == 0.01
    assert [published.at(size) for size in (10**7, 4 * 10**6, 10**5, 1001)] == [1e-4, 1.6e-4, 1e-3, 0.01]
    options = Options(batch_size=3).with_rate(10**5)
    assert options == Options(batch_size=3, learning_rate=1e-3) and options.training(9).min_lr == 1e-4
    assert capsys.readouterr().out == "learning rate  0.001, by the model's 100,000 parameters without embeddings\n"
    assert Options(learning_rate=0.5).with_rate(10**6).learning_rate == 0.5 and not capsys.readouterr().out
    with pytest.raises(UserError, match="min_lr = 0.002 lies above learning_rate = 0.001"):
        Options(min_lr=2e-3).with_rate(10**5)


def test_an_older_run_s_record_loads(tmp_path):
    old = {"model": "gpt2", "learning_rate": 3e-5, "final_learning_rate": 0.7, "resume": False, "train": "/a.jsonl"}
    content = {"stage": "sft", "config": "sft", "overrides": {}, "options": {**old, "words": ["x"], "share": None}}
    (tmp_path / "run.json").write_text(json.dumps(content))
    options = recorded_options(tmp_path, Options, "sft")
    assert options.min_lr == 3e-5 * 0.7 and options.resume is None and options.train == Path("/a.jsonl")
    assert options.words == ("x",) and options.share is None


def test_both_forms_of_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_options(Options, None, ["--resume=run"]).resume == "run"
    assert read_options(Options, None, ["run", "--resume=True"]) == Options("run", resume="True")
    assert read_options(Options, None, ["gpt2", "--resume=False"]).resume is None
    Path("a.toml").write_text("resume = true\n")
    assert read_options(Options, None, ["a.toml", "run"]).resume == "True"


def test_options_are_recorded_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    for options in (
        Options("base", train=Path("not there yet.jsonl"), words=("a", "b"), share=None, reference="gpt2", seed=2**62),
        Options("gpt2", reference="base", learning_rate=1e-30, resume="run"),
    ):
        record_options(tmp_path, "sft", options)
        monkeypatch.chdir("base")
        recorded = recorded_options(tmp_path, Options, "sft")
        monkeypatch.chdir(tmp_path)
        whole = {name: str(tmp_path / "base") for name in ("model", "reference") if getattr(options, name) == "base"}
        train = options.train and tmp_path / options.train
        assert recorded == dataclasses.replace(options, train=train, **whole)
    for change, message in (
        ({"stage": "ppo"}, "it is a run of ppo.py"),
        ({"options": {"epochs": 1}}, "epochs"),
        ({"options": []}, "options = []"),
        ({"options": {"batch_size": 0}}, "batch_size = 0"),
    ):
        content = json.loads(Path("run.json").read_text())
        (tmp_path / "base" / "run.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match="base is not a run of sft.py that could go on") as refused:
            recorded_options(Path("base"), Options, "sft")
        assert message in str(refused.value)
    with pytest.raises(UserError, match="nowhere is not a run of sft.py"):
        recorded_options(Path("nowhere"), Options, "sft")


def test_a_resumed_run_has_the_same_options(tmp_path, monkeypatch):
    """Otherwise the digest of its data would differ, or the learning rate that followed from the model's size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage_run_module, "StopSignal", lambda after: None)
    Path("base").mkdir()
    recorded, rates = [], []

    def train(options, run):
        run.fit(GPTConfig(block_size=8, vocab_size=9, n_layer=1 + len(recorded), n_head=1, n_embd=4))
        rates.append(run.options.learning_rate)
        run.open("data")
        run.restore(run.updater(run.place(torch.nn.Linear(2, 2)), 1), {})
        run.save(lambda model, directory: None)
        recorded.append(options)
        return 0

    for args in (
        ["base", "--reference=gpt2", "--train=f.jsonl", "--out_dir=run", "--threads=1"],
        ["run", "--resume=True"],
        ["--resume=run"],
    ):
        monkeypatch.setattr("sys.argv", ["sft.py", "--device=cpu", *args])
        assert run_stage(Options, None, "sft", train) == 0
    original, resumed, resumed_by_name = recorded
    assert resumed == resumed_by_name
    assert original.model == resumed.model == str(tmp_path / "base")
    assert original.reference == resumed.reference == "gpt2"
    assert original.learning_rate is None and rates == [resumed.learning_rate] * 3
    with pytest.raises(UserError, match="--reference can't be changed"):
        monkeypatch.setattr("sys.argv", ["sft.py", "run", "--resume=True", "--reference=base"])
        run_stage(Options, None, "sft", train)


def test_a_refusal_is_one_sentence_with_exit_code_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal("stages/sft.py", "nowhere", "--train=a.jsonl")
    assert message.startswith("sft.py: there is no model directory nowhere; ")
    assert not list(tmp_path.iterdir())


# ---- a run


def test_best_is_the_checkpoint_with_the_lowest_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage_run_module, "StopSignal", lambda after: None)  # it would handle this process's signals
    options = Options("base", learning_rate=1e-5, out_dir="run", device="cpu", dtype="float32")
    run = StageRun("sft", options, torch.device("cpu"), None, None, StageProgress)
    run.open("data")
    module = run.place(torch.nn.Linear(2, 2))
    run.restore(run.updater(module, 10), {"part": torch.nn.Linear(1, 1)})
    written = []

    def write(_, directory):
        directory.mkdir(exist_ok=True)
        written.append(directory.name)

    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0), (4, None), (5, 3.0)):
        run.progress.step = step
        run.save(write, loss)
    assert (run.progress.best, run.progress.best_step, len(written)) == (1.0, 2, 5)
    assert Path("run/best").readlink() == Path("step-00000002") and Path("run/last").readlink() == Path("step-00000005")
    assert sorted(path.name for path in Path("run").glob("step-*")) == ["step-00000002", "step-00000005"]
    record = json.loads(Path("run/run.json").read_text())
    assert record["stage"] == "sft" and record["options"]["model"] == "base"
    del run  # releases the folder
    resumed = StageRun("sft", options, torch.device("cpu"), Path("run"), None, StageProgress)
    assert resumed.progress.step == 5 and resumed.progress.best == 1.0 and resumed.origin == "run/step-00000005"
    with pytest.raises(UserError, match="run was started on other data or another model"):
        resumed.open("others")


def test_the_end_of_another_process_leaves_the_command_that_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage_run_module, "StopSignal", lambda after: None)

    def train(options, run):
        run.open("data")
        run.restore(run.updater(run.place(torch.nn.Linear(2, 2)), 1), {})
        run.progress.step = 3
        run.save(lambda model, directory: None)
        monkeypatch.setattr(command_line, "WORLD_SIZE", 2)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("sys.argv", ["sft.py", "base", "--learning_rate=1e-5", "--device=cpu", "--out_dir=a run"])
    with pytest.raises(RuntimeError, match="closed by peer"):
        run_stage(Options, None, "sft", train)
    assert "step 3 is the last one saved; resume with: python sft.py '--resume=a run'\n" in capsys.readouterr().out


def test_the_end_of_another_process_of_train_leaves_the_command_that_resumes(monkeypatch, capsys):
    monkeypatch.setattr("train.WORLD_SIZE", 2)
    run = SimpleNamespace(saving=SimpleNamespace(step=3), resume="torchrun train.py --resume=run")
    with pytest.raises(RuntimeError, match="closed by peer"), Run.keeping(run):
        raise RuntimeError("Connection closed by peer")
    assert capsys.readouterr().out == "step 3 is the last one saved; resume with: torchrun train.py --resume=run\n"
