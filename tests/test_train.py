"""train.py as a user runs it: what a run writes, how it resumes, what it refuses."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import train
from gpt_arc.data.tokenizer import CharTokenizer, load_tokenizer
from gpt_arc.decoding import in_training
from gpt_arc.training.checkpoints import load_state
from gpt_arc.training.log import read_metrics
from gpt_arc.weights.directory import load_config, load_model, save_model
from helpers import ROOT, TEXT, TINY_FLAGS, assert_same_weights, command, refusal, run_python, untimed, write_dataset
from model import GPT, GPTConfig
from warm import WarmPopen


@pytest.fixture
def run(workplace, stage_runner):
    """Runs train.py on sums.toml in this process; returns the output, or the code, output and message of a refusal."""
    return lambda *flags, tiny=True: stage_runner(train, "sums.toml", *(TINY_FLAGS if tiny else ()), *flags)


def in_processes(*flags, processes=1, **kwargs):
    result = command("train.py", "sums.toml", *TINY_FLAGS, *flags, processes=processes, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def test_a_run_writes_metrics_checkpoints_and_its_settings(workplace, run):
    output = run("--log_interval=2")
    folder = workplace / "out" / "sums"
    for words in ("parameters", "tokens a step", "epochs of", "memory", "device         cpu", "finished step 8"):
        assert words in output
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert ["val_loss" in line for line in lines] == [False, True, False, True]
    keys = {"step", "train_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"}
    assert all(keys <= line.keys() for line in lines)
    assert lines[-1]["tokens"] == 8 * 4 * 16
    assert (folder / "last").readlink() == Path("step-00000008")
    best = min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])
    assert (folder / "best").readlink() == Path(f"step-{best['step']:08}")
    model, tokenizer = load_model(folder)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert (folder / "config.toml").exists()
    assert json.loads((folder / "run.json").read_text())["overrides"]["n_layer"] == 2


def test_the_same_command_gives_the_same_weights_in_a_new_folder(workplace, run):
    run("--dropout=0.2")
    assert "out/sums-2" in run("--dropout=0.2")
    assert_same_weights("out/sums/last", "out/sums-2/last")
    run("--dropout=0.2", "--seed=2")
    assert not torch.equal(
        weights("out/sums-3/last")["final_norm.weight"], weights("out/sums/last")["final_norm.weight"]
    )


MUON = ("--optimizer=muon", "--ema_decay=0.9", "--schedule=wsd", "--ngrams=3", "--ngram_rows=100")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("extra", [(), MUON, ("--mixer=lstm",)], ids=["adamw", "muon", "lstm"])
def test_ten_steps_and_ten_resumed_ones_equal_twenty(workplace, run, dtype, extra):
    flags = ("--max_iters=20", "--eval_interval=10", "--dropout=0.1", f"--dtype={dtype}", "--lr_decay_iters=20", *extra)
    run(*flags, "--out_dir=whole")
    run(*flags, "--out_dir=halves", "--max_iters=10")
    run(*flags, "--out_dir=halves", "--init_from=resume")
    assert_same_weights("whole/last", "halves/last")
    whole, halves = read_metrics(Path("whole/metrics.jsonl")), read_metrics(Path("halves/metrics.jsonl"))
    measured = {"seconds", "tokens_per_second", "mfu"}
    assert [{k: v for k, v in line.items() if k not in measured} for line in whole] == [
        {k: v for k, v in line.items() if k not in measured} for line in halves
    ]


def test_resuming_needs_no_repeated_flags_or_config(workplace, run):
    run("--max_iters=12", "--eval_interval=3", "--dropout=0.1", "--out_dir=whole")
    run("--max_iters=6", "--lr_decay_iters=12", "--eval_interval=3", "--dropout=0.1")
    assert "out/sums, from step 6" in run("--init_from=resume", "--max_iters=9", tiny=False)
    result = command("train.py", "--init_from=resume", "--out_dir=out/sums", "--max_iters=12")
    assert result.returncode == 0, result.stderr
    assert_same_weights("whole/last", "out/sums/last")


def test_a_run_remembers_its_flags_however_it_is_resumed(workplace, run):
    run("--max_iters=2", "--tokens_per_step=128", "--seed=7", "--warmup_iters=0")
    run("--init_from=resume", "--out_dir=out/sums", "--max_iters=3", tiny=False)  # by its own config.toml
    assert "from step 3" in run("--init_from=resume", "--max_iters=4", "--tokens_per_step=192", tiny=False)
    overrides = json.loads(Path("out/sums/run.json").read_text())["overrides"]
    assert overrides["seed"] == 7 and overrides["block_size"] == 16
    assert overrides["tokens_per_step"] == 192 and overrides["max_iters"] == 4
    result = command("train.py", "--init_from=resume", "--out_dir=out/sums", "--max_iters=5")
    assert result.returncode == 0 and "from step 4" in result.stdout, result.stderr


def test_a_finished_run_says_how_to_go_on(workplace, run):
    run("--max_iters=3")
    sentence = "out/sums is finished: a max_iters above 3 goes on, such as --max_iters=6"
    assert sentence in run("--resume=out/sums", tiny=False)
    assert "is finished" not in run("--resume=out/sums", "--max_iters=4", tiny=False)
    run("--max_iters=9", "--patience=1", "--eval_interval=1", "--learning_rate=1e-30", "--out_dir=patient")
    assert "a patience above 1 goes on, such as --patience=2" in run("--resume=patient", tiny=False)


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_a_run_may_resume_in_another_precision(workplace, run, dtype):
    run("--max_iters=2", "--dtype=float32", "--warmup_iters=0")
    assert dtype in run("--init_from=resume", f"--dtype={dtype}", "--max_iters=4", tiny=False)
    assert "float32" in run("--init_from=resume", "--dtype=float32", "--max_iters=6", tiny=False)


def test_one_command_starts_and_restarts_a_run(workplace, run):
    auto = "--init_from=auto", "--out_dir=out/job"
    assert "finished step 8" in run(*auto)
    assert "out/job, from step 8" in run(*auto, "--max_iters=12")
    Path("out/killed").mkdir()
    Path("out/killed/run.json").write_text(Path("out/job/run.json").read_text())  # before the first checkpoint
    assert "finished step 8" in run("--init_from=auto", "--out_dir=out/killed")
    refused = run("--init_from=auto")
    assert refused.code == 2 and "init_from = auto needs out_dir" in refused.message


@pytest.mark.parametrize(("ask_every", "asked"), [(1, 6), (4, 2)])
def test_an_evaluation_asks_for_signals_now_and_then(workplace, run, monkeypatch, ask_every, asked):
    """Processes ask one another, which costs them more than a batch: 5 batches, and the question at the end."""
    questions = []
    monkeypatch.setattr(train, "ASK_EVERY", ask_every)
    monkeypatch.setattr(train.StopSignal, "anywhere", lambda stop: questions.append(1) and 0)
    run("--eval_only", "--eval_iters=5")
    assert len(questions) == asked


def test_an_interrupted_evaluation_is_repeated_on_resume(workplace, run, monkeypatch):
    run("--dropout=0.1", "--out_dir=whole")
    evaluate, calls = train.Run.val_loss, []

    def interrupt_every_other_call(self):
        calls.append(len(calls) % 2)
        self.stop.received = 0 if calls[-1] else signal.SIGINT
        return evaluate(self)

    monkeypatch.setattr(train.Run, "val_loss", interrupt_every_other_call)
    assert run("--dropout=0.1", "--out_dir=cut").code == 130
    assert run("--init_from=resume", "--out_dir=cut", tiny=False).code == 130
    assert "finished step 8" in run("--init_from=resume", "--out_dir=cut", tiny=False)
    assert calls == [0, 1, 0, 1]
    whole, cut = (load_state(Path(folder) / "last")["progress"] for folder in ("whole", "cut"))
    assert {**whole, "seconds": 0} == {**cut, "seconds": 0} and cut["evaluated_step"] == 8
    assert_same_weights("whole/best", "cut/best")


def test_float16_finds_its_loss_scale(workplace, run, monkeypatch):
    monkeypatch.setattr("gpt_arc.planning.cost.measured_flops", lambda dtype: 1e9)  # 2 s in float16
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: SCALER(*args, init_scale=2.0**24, **kwargs))
    output = run("--dtype=float16", "--max_iters=6", "--log_interval=1")
    lines = read_metrics(Path("out/sums/metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert 0 < lines[-1]["skipped"] == output.count("the batch is skipped") < 20
    assert lines[-1]["tokens"] == (6 + lines[-1]["skipped"]) * 64
    assert load_state(Path("out/sums/last"))["scaler"]["scale"] < 2.0**24


SCALER = torch.amp.GradScaler


def test_a_model_is_extended_to_a_longer_context(run):
    for name in ("rotary", "alibi", "learned"):
        run(f"--positions={name}", "--max_iters=3", f"--out_dir={name}")
    longer = "--block_size=64", "--max_iters=3"
    yarn = "--positions=rotary", "--rotary_scaling=yarn", "--rotary_factor=4"
    for flags, end in (
        (("--init_from=rotary", *longer), "leave it out, or train the model at another context with --extend_context"),
        (
            ("--init_from=learned", *longer),
            "learned has block_size = 16, which --block_size=64 can't change: leave it out",
        ),
        (("--init_from=alibi", "--positions=rotary"), "which --positions=rotary can't change: leave it out"),
    ):
        refused = run(*flags, "--dry_run")
        assert refused.code == 2 and refused.message.endswith(f"{end}\n")
    run("--init_from=rotary", *longer, "--extend_context=True", *yarn, "--rotary_context=16", "--out_dir=long")
    config = load_config("long")
    assert (config.block_size, config.rotary_scaling, config.rotary_context) == (64, "yarn", 16)
    assert "finished step 4" in run("--resume=long", "--max_iters=4", tiny=False)
    assert load_config("long") == config
    run("--init_from=alibi", *longer, "--extend_context=True", "--out_dir=farther")
    assert load_config("farther") == dataclasses.replace(load_config("alibi"), block_size=64)
    for flags, sentence in (
        (("--init_from=learned", *longer), "learned has learned 16 positions and none for a block_size of 64"),
        (
            ("--init_from=alibi", *longer, *yarn, "--rotary_context=16"),
            'the architecture of alibi: rotary_scaling = "y',
        ),
        ((), "extend_context needs init_from"),
    ):
        refused = run("--extend_context=True", *flags)
        assert refused.code == 2 and sentence in refused.message


def test_a_run_keeps_its_tokenizer_if_the_dataset_loses_it(workplace, run):
    run("--max_iters=4", f"--vocab_size={len(set(TEXT))}")
    (workplace / "data/sums/tokenizer.json").unlink()
    run("--init_from=resume", "--max_iters=8", tiny=False)
    assert load_model("out/sums")[1].encode("1 times") is not None


def test_changed_data_is_refused_on_resume(workplace, run):
    run("--max_iters=4")
    (workplace / "data/sums/meta.json").write_text("{}")
    assert "differ from what the run has seen" in run("--init_from=resume", "--max_iters=8", tiny=False)


def test_bare_shards_train_without_a_tokenizer(workplace, run):
    shards = workplace / "shards"
    shards.mkdir()
    for split in ("train", "val"):
        (workplace / "data/sums" / f"{split}.bin").rename(shards / f"corpus_{split}_000000.bin")
    assert "finished step 8" in run("--dataset=shards", "--vocab_size=50")
    assert load_model("out/sums-shards")[1] is None
    result = run("--dataset=shards", "--vocab_size=7")
    assert result.code == 2 and "beyond vocab_size = 7: set --vocab_size" in result.message


def test_evaluation_does_not_disturb_training(workplace, run):
    run("--eval_interval=1", "--eval_iters=0", "--dropout=0.2", "--out_dir=often")
    run("--eval_interval=8", "--eval_iters=1", "--dropout=0.2", "--out_dir=seldom")
    assert_same_weights("often/last", "seldom/last")


@pytest.mark.parametrize("is_main", [True, False])
def test_evaluations_show_their_progress_once_with_its_end(workplace, run, monkeypatch, is_main):
    """The main process of several shows a bar that counts the batches; the others show none."""
    bars = []

    def bar(*args, **settings):
        bars.append((tqdm(*args, **settings), settings["disable"]))
        return bars[-1][0]

    monkeypatch.setattr(train, "tqdm", bar)
    run("--max_iters=3", "--eval_iters=3", "--batch_size=5", "--gradient_accumulation_steps=2")
    monkeypatch.setattr(train, "IS_MAIN", is_main)
    run("--init_from=resume", "--eval_only=True", tiny=False)
    evaluation, disable = bars[-1]
    assert evaluation.total == 3 and disable is (None if is_main else True)  # None: shown on a terminal


def test_a_quiet_run_shows_its_plan_and_its_end_alone(workplace, run):
    lines = run("--quiet").splitlines()
    assert not [line for line in lines if line.startswith("step ")]
    end = [line for line in lines if line.startswith(("finished step 8: best val loss ", "trained        "))]
    tokens = read_metrics(Path("out/sums/metrics.jsonl"))[-1]["tokens"]
    assert len(end) == 2 and f", {tokens:,} tokens, " in end[1]


def test_eval_only_reports_the_run_s_loss_and_writes_nothing(workplace, run):
    run("--eval_iters=0")
    before = {path: path.stat().st_mtime_ns for path in Path("out/sums").rglob("*")}
    output = run("--init_from=resume", "--eval_only=True", "--eval_iters=0", tiny=False)
    val_loss = read_metrics(Path("out/sums/metrics.jsonl"))[-1]["val_loss"]
    assert f"step 8: val loss {val_loss:.4f}" in output
    assert before == {path: path.stat().st_mtime_ns for path in Path("out/sums").rglob("*")}


def test_accumulated_micro_batches_equal_one_batch(workplace, run):
    run("--out_dir=one", "--batch_size=12", "--dtype=float32")
    run("--out_dir=three", "--batch_size=4", "--gradient_accumulation_steps=3", "--dtype=float32")
    run("--out_dir=tokens", "--batch_size=4", "--tokens_per_step=192", "--dtype=float32")
    one, three = weights("one/last"), weights("three/last")
    for name in one:
        torch.testing.assert_close(one[name], three[name], rtol=1e-4, atol=1e-5)
    assert_same_weights("three/last", "tokens/last")


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_equal_one(workplace, run, torchrun):
    flags = (
        "--max_iters=10",
        "--dtype=float32",
        "--eval_interval=5",
        "--eval_iters=0",
        "--gradient_accumulation_steps=2",
    )
    run(*flags, "--out_dir=one", "--log_interval=1")
    output = in_processes(*flags, "--out_dir=two", "--log_interval=1", processes=2, torchrun=torchrun)
    assert output.count("finished step 10") == 1  # only rank 0 prints
    lines_1, lines_2 = (read_metrics(Path(f"{folder}/metrics.jsonl")) for folder in ("one", "two"))
    assert len(lines_1) == len(lines_2) == 10
    for line_1, line_2 in zip(lines_1, lines_2):
        for name in ("train_loss", "val_loss", "grad_norm", "learning_rate", "tokens"):
            assert (name in line_1) == (name in line_2)
            assert line_1.get(name, 0) == pytest.approx(line_2.get(name, 0), rel=1e-5), (line_1["step"], name)


@pytest.mark.slow
def test_two_processes_equal_one_with_muon_and_an_average(workplace, run):
    flags = (*MUON, "--max_iters=12", "--dtype=float32", "--eval_interval=6", "--gradient_accumulation_steps=2")
    run(*flags, "--out_dir=one", "--log_interval=1")
    output = in_processes(*flags, "--out_dir=two", "--log_interval=1", "--sample_interval=6", processes=2)
    assert output.count("sample of step") == Path("two/samples.txt").read_text().count("--- step") == 2
    lines_1, lines_2 = (read_metrics(Path(f"{folder}/metrics.jsonl")) for folder in ("one", "two"))
    assert len(lines_1) == len(lines_2) == 12 and lines_1[-1]["train_loss"] < lines_1[0]["train_loss"] - 0.2
    for line_1, line_2 in zip(lines_1, lines_2):  # Muon multiplies in bfloat16: the order of additions shows more
        for name in ("train_loss", "val_loss"):
            assert line_1.get(name, 0) == pytest.approx(line_2.get(name, 0), rel=2e-3), (line_1["step"], name)


def test_averaged_weights_are_evaluated_and_saved(workplace, run):
    """Against the checkpoints of the same run without averaging: .6^n of the first weights, .4 .6^(n - i) of the
    i-th."""
    flags = ("--max_iters=4", "--eval_interval=1", "--keep_all_checkpoints=True", "--dtype=float32")
    run(*flags, "--out_dir=plain")
    run(*flags, "--out_dir=averaged", "--ema_decay=0.6")
    torch.manual_seed(1337)
    checkpoints = [
        GPT(load_model("plain")[0].config).state_dict(),
        *(weights(f"plain/step-0000000{i}") for i in range(1, 5)),
    ]
    shares = [0.6**4, *(0.4 * 0.6 ** (4 - i) for i in range(1, 5))]
    for name, tensor in weights("averaged/last").items():
        torch.testing.assert_close(tensor, sum(share * w[name] for share, w in zip(shares, checkpoints)), msg=name)
    logged = read_metrics(Path("averaged/metrics.jsonl"))[-1]["val_loss"]
    assert logged != read_metrics(Path("plain/metrics.jsonl"))[-1]["val_loss"]
    assert f"val loss {logged:.4f}" in run("--init_from=averaged/last", "--eval_only=True", tiny=True)
    assert f"val loss {logged:.4f}" in run("--init_from=resume", "--out_dir=averaged", "--eval_only=True", tiny=False)


def test_patience_ends_a_run_that_overfits(workplace, run):
    tokens = np.arange(200) * 7 % 11
    write_dataset(
        workplace / "data" / "few",
        CharTokenizer.from_text("abcdefghijk"),
        {"train": tokens[:40], "val": tokens[:99:-1]},
    )
    flags = ("--dataset=few", "--max_iters=400", "--eval_interval=5", "--learning_rate=3e-2", "--out_dir=few")
    output = run(*flags, "--patience=3")
    losses = {line["step"]: line["val_loss"] for line in read_metrics(Path("few/metrics.jsonl")) if "val_loss" in line}
    best = min(losses, key=losses.get)
    assert 0 < best and max(losses) == best + 15 < 400 and list(losses.values()).count(losses[best]) == 1
    assert (
        f"finished step {best + 15} of 400, by patience = 3: best val loss {losses[best]:.4f} at step {best}" in output
    )
    assert Path("few/best").resolve().name == f"step-{best:08d}"
    assert f"finished step {best + 15} of 400, by patience = 3" in run(
        "--init_from=resume", "--out_dir=few", tiny=False
    )
    assert f"finished step {best + 20}" in run("--init_from=resume", "--out_dir=few", "--patience=4", tiny=False)


@pytest.mark.slow
def test_two_processes_resume_exactly(workplace):
    flags = ("--max_iters=12", "--eval_interval=6", "--dropout=0.2", "--lr_decay_iters=12")
    in_processes(*flags, "--out_dir=whole", processes=2)
    in_processes(*flags, "--out_dir=halves", "--max_iters=6", processes=2)
    in_processes(*flags, "--out_dir=halves", "--init_from=resume", processes=2)
    assert_same_weights("whole/last", "halves/last")


def test_a_batch_that_processes_can_t_share_is_refused(workplace):
    result = command("train.py", "sums.toml", *TINY_FLAGS, "--batch_size=3", processes=2)
    assert result.returncode != 0
    assert "the 3 sequences of a step" in result.stderr


def start(*flags):
    return WarmPopen(
        [sys.executable, str(ROOT / "train.py"), "sums.toml", *TINY_FLAGS, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_signals_save_and_say_how_to_resume(workplace, number, code):
    process = start("--max_iters=100000", "--eval_interval=100000", "--log_interval=5")
    metrics = workplace / "out/sums/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    resume = output.split("resume with: python ")[1].split()
    step = load_state(Path("out/sums/last"))["progress"]["step"]
    result = command(*resume, f"--max_iters={step + 3}")
    assert result.returncode == 0 and f"from step {step}" in result.stdout, result.stderr
    steps = [line["step"] for line in read_metrics(metrics)]
    assert steps == sorted(set(steps)) and steps[-1] == step + 3


def test_a_diverged_run_stops_and_keeps_its_last_checkpoint(workplace, run):
    result = run("--max_iters=200", "--learning_rate=1e6", "--grad_clip=0", "--warmup_iters=190", "--eval_interval=1",
                 "--dtype=float32")  # fmt: skip
    assert result.code == 1 and "has diverged" in result.output
    model, _ = load_model("out/sums/last")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_max_iters_updates_log_their_learning_rates(workplace, run):
    run(
        "--max_iters=7",
        "--warmup_iters=3",
        "--learning_rate=0.4",
        "--min_lr=0",
        "--schedule=linear",
        "--log_interval=1",
    )
    rates = [line["learning_rate"] for line in read_metrics(Path("out/sums/metrics.jsonl"))]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.3, 0.2, 0.1])


def test_dry_run_writes_nothing_and_needs_no_data(workplace):
    before = sorted(workplace.rglob("*"))
    result = command("train.py", str(ROOT / "configs/gpt2_xl.toml"), "--dry_run=True", "--device=cpu")
    assert result.returncode == 0, result.stderr
    assert "1,557,611,200" in result.stdout and "524,288" in result.stdout and "not prepared" in result.stdout
    assert sorted(workplace.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--learing_rate=1"], "did you mean --learning_rate"),
        (["--n_layer=six"], "--n_layer = six must be a whole number"),
        (["--n_head=3"], "n_head = 3 does not divide n_embd = 16"),
        (["--dataset=nothing"], "there is no dataset nothing"),
        (["--dataset=openwebtext"], "there is no dataset openwebtext"),
        (["--block_size=1000"], "block_size = 1000 is longer than the val split"),
        (["--out_dir=sums.toml/run"], "a file is in the way"),
        (["--out_dir=sums.toml"], "a file is in the way"),
        (["--out_dir=data"], "out_dir = data is in use"),
        (["--device=cuda"], 'device = "cuda" is not available here'),
        (["--device=gpu"], 'device = "gpu" is not a device'),
        (["--ema_decay=0.9", "--expert_processes=2"], "leave out one of the two settings"),
        (["--ema_decay=1"], "ema_decay = 1 must be between 0 and 1, 1 excluded"),
        (["--optimizer=adam"], "adam"),
        (["--patience=0"], "patience = 0 must be at least 1"),
        (["--patience=1.5"], "--patience = 1.5 must be a whole number"),
        (["--learning_rate=fast"], "--learning_rate = fast must be a number"),
        (["--learning_rate=inf"], "learning_rate = inf must be more than 0, and finite"),
        ([f"--seed={2**63}"], f"seed = {2**63} must be at least 0 and less than 2^63"),
        (["--cooldown=2"], "cooldown = 2 must be between 0 and 1"),
        (["--ngrams=0"], "ngrams = 0 must be at least 1"),
        (["--ngram_rows=99999999999999999"], "ngram_rows = 99999999999999999 must be between 1 and 2147483647"),
        (["--ngrams=2", f"--ngram_rows={2**31 - 1}", "--n_embd=65536"], "out of memory: a smaller batch, context or"),
        (["--init_from=resume"], "there is no run of sums"),
        (["--init_from=resume", "--out_dir=data"], "there is no checkpoint to resume from in data"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(workplace, run, flags, sentence):
    result = run(*flags)
    assert result.code == 2 and sentence in result.message and result.message.count("\n") == 1


def test_mistakes_exit_with_code_2(workplace):
    assert "did you mean --learning_rate" in refusal("train.py", "sums.toml", "--learing_rate=1")


def test_a_flag_without_effect_is_refused_and_a_file_s_setting_is_not(run):
    Path("sums.toml").write_text('[data]\ndataset = "sums"\n[training]\nmask_rate = 0.3\n')
    run("--max_iters=3")
    assert "finished step 3" in run("--max_iters=3", "out/sums/config.toml", "--out_dir=again")
    assert "--mask_rate = 0.2 has no effect" in run("--resume=out/sums", "--mask_rate=0.2", tiny=False).message


def test_contradicting_settings_are_refused_on_resume(workplace, run):
    run("--max_iters=4")
    assert "n_layer = 3 contradicts the run" in run("--init_from=resume", "--n_layer=3", tiny=False).message
    Path("sums.toml").write_text('[data]\ndataset = "sums"\n[model]\nqk_norm = true\n')
    assert "qk_norm = True contradicts the run" in run("--init_from=resume", tiny=False).message
    Path("sums.toml").write_text('[data]\ndataset = "sums"\n[training]\noptimizer = "muon"\n')
    result = run("--init_from=resume", tiny=False)
    assert 'optimizer = "muon" can\'t continue from the moments of "adamw"' in result.message


def test_a_run_in_use_is_not_overwritten(workplace, run):
    run("--out_dir=mine")
    before = weights("mine/last")
    assert "out_dir = mine is in use" in run("--out_dir=mine").message
    (workplace / "mine" / "notes.txt").write_text("not the run's")
    run("--out_dir=mine", "--overwrite=True", "--seed=5", "--max_iters=4")
    assert not torch.equal(before["final_norm.weight"], weights("mine/last")["final_norm.weight"])
    assert (workplace / "mine" / "notes.txt").exists()
    assert [line["step"] for line in read_metrics(Path("mine/metrics.jsonl"))][-1] == 4


def test_two_runs_do_not_share_a_folder(workplace, run):
    process = start("--max_iters=100000", "--out_dir=mine", "--log_interval=1", "--eval_interval=5")
    try:
        wait_for(lambda: (workplace / "mine/last").exists())
        result = run("--out_dir=mine", "--init_from=resume", tiny=False)
        assert "another process is training in mine" in result.message
    finally:
        process.kill()
        process.wait()
    assert "val loss" in run("--out_dir=mine", "--init_from=resume", "--eval_only=True", tiny=False)


def test_killed_runs_always_resume(workplace):
    """SIGKILL at random moments of a run that saves a checkpoint at every step (a slow test kills it more often)."""
    kill_and_resume(workplace, kills=3)


@pytest.mark.slow
def test_a_run_killed_twenty_times_resumes(workplace):
    kill_and_resume(workplace, kills=20)


def kill_and_resume(workplace, kills):
    import random

    chance = random.Random(0)
    run, last_step = workplace / "killed", 0
    start_flags = ("--max_iters=1000000", "--eval_interval=1", "--eval_iters=1", "--log_interval=1", "--out_dir=killed")
    for _ in range(kills):
        process = start(*start_flags, *(["--init_from=resume"] if (run / "last").exists() else []))
        before = Path(f"step-{last_step:08}")
        wait_for(lambda before=before: (run / "last").exists() and (run / "last").readlink() != before)
        time.sleep(chance.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        load_model(run / "last")
        load_model(run / "best")
        state = load_state(run / "last")
        assert state["progress"]["step"] > last_step
        last_step = state["progress"]["step"]
    result = command(
        "train.py", "sums.toml", *TINY_FLAGS, *start_flags, "--init_from=resume", f"--max_iters={last_step + 2}"
    )
    assert result.returncode == 0, result.stderr
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(1, last_step + 3))
    val_losses = [line["val_loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert load_state(run / "last")["progress"]["best_val_loss"] == min(val_losses)
    assert (run / "best").readlink() == Path(f"step-{1 + val_losses.index(min(val_losses)):08}")
    assert not list(run.glob(".step-*"))


def test_training_without_wandb_does_not_import_it():
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; import train; assert 'wandb' not in sys.modules"
    assert run_python("-c", code).returncode == 0


@pytest.mark.slow
def test_wandb_itself_logs_a_run(workplace):
    in_processes("--wandb_log=True", WANDB_MODE="offline")
    assert list(Path("out/sums/wandb").glob("offline-run-*"))


def test_samples_are_of_the_saved_model_and_change_nothing_else(workplace, run, monkeypatch):
    monkeypatch.setattr(in_training, "CHARACTERS", 40)
    flags = ("--dropout=0.1", "--ema_decay=0.6", "--max_iters=10", "--eval_interval=2", "--keep_all_checkpoints=True")
    sampled = ("--sample_interval=4", "--sample_start=2 times")
    run(*flags, "--out_dir=without")
    output = run(*flags, *sampled, "--out_dir=whole")
    run(*flags, *sampled, "--max_iters=6", "--lr_decay_iters=10", "--out_dir=halves")
    run("--resume=halves", "--max_iters=10", tiny=False)
    for folder in ("whole", "halves"):
        assert_same_weights("without/last", f"{folder}/last")
        lines, expected = (untimed(read_metrics(Path(name) / "metrics.jsonl")) for name in (folder, "without"))
        assert [line["train_loss"] for line in lines] == [line["train_loss"] for line in expected]
    text = ""
    for step in (4, 8, 10):
        model, tokenizer = load_model(f"whole/step-{step:08}")
        sample = in_training.TrainingSampler(model, tokenizer, "2 times", 1337).sample()
        assert sample.startswith("2 times") and len(sample) == 47 and f"sample of step {step}:\n{sample}\n" in output
        text += f"--- step {step}\n{sample}\n\n"
    assert Path("whole/samples.txt").read_text() == text
    halves = Path("halves/samples.txt").read_text()
    assert halves.startswith(text[: text.index("--- step 8")]) and halves.endswith(text[text.index("--- step 8") :])
    assert "--- step 6" in halves and halves.count("--- step") == 4  # also the last step of its first part


@pytest.mark.parametrize("content", [None, "{"])
def test_a_run_whose_settings_are_lost_starts_another(workplace, run, content):
    run("--max_iters=4", "--out_dir=run")
    Path("run/run.json").write_text(content) if content else Path("run/run.json").unlink()
    refused = run("--resume=run", tiny=False)
    assert refused.code == 2 and "run.json" in refused.message
    assert refused.message.endswith("--init_from=run starts another run from its weights\n")
    assert "finished step 8" in run("--init_from=run", "--max_iters=8", "--out_dir=new")


def test_samples_are_drawn_with_a_residual_stream_in_16_bits(workplace, run, monkeypatch):
    monkeypatch.setattr(in_training, "CHARACTERS", 40)
    flags = ("--residual=bfloat16", "--dtype=bfloat16", "--max_iters=4", "--out_dir=run")
    output = run(*flags, "--sample_interval=2", "--sample_start=2 times")
    sample = in_training.TrainingSampler(*load_model("run/last"), "2 times", 1337).sample()
    assert f"sample of step 4:\n{sample}\n" in output


def test_samples_that_cannot_be_drawn_are_refused_before_training(workplace, run):
    refused = run("--sample_interval=4", "--sample_start=ü")
    assert refused.code == 2 and "the prompt 'ü'" in refused.message
    Path("data/sums/tokenizer.json").unlink()
    refused = run("--sample_interval=4")
    assert refused.code == 2 and "--sample_interval=0" in refused.message
    assert not Path("out/sums/run.json").exists()


@pytest.mark.slow
def test_compiled_training_equals_eager_and_resumes_exactly(workplace):
    flags = ("--max_iters=12", "--eval_interval=6", "--lr_decay_iters=12", "--dtype=float32", "--eval_iters=0")
    in_processes(*flags, "--out_dir=eager", "--compile=False")
    assert "float32, compiled" in in_processes(
        *flags, "--out_dir=whole", "--compile=True", "--sample_interval=6", timeout=400
    )
    in_processes(*flags, "--out_dir=halves", "--compile=True", "--max_iters=6", timeout=400)
    # auto is resolved once, when the run starts: a run this short wouldn't be compiled otherwise
    record = json.loads(Path("halves/run.json").read_text())
    del record["overrides"]["compile"]
    Path("halves/run.json").write_text(json.dumps(record))
    output = in_processes(*flags, "--out_dir=halves", "--init_from=resume", timeout=400)
    assert "float32, compiled" in output
    assert_same_weights("whole/last", "halves/last")
    eager, compiled = weights("eager/last"), weights("whole/last")
    assert eager.keys() == compiled.keys()
    for name in eager:
        torch.testing.assert_close(eager[name], compiled[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_compiled_processes_equal_one(workplace):
    flags = (
        "--max_iters=6",
        "--dtype=float32",
        "--compile=True",
        "--log_interval=1",
        "--gradient_accumulation_steps=2",
    )
    in_processes(*flags, "--out_dir=one", timeout=400)
    in_processes(*flags, "--out_dir=two", processes=2, timeout=400)
    one, two = (read_metrics(Path(f"{folder}/metrics.jsonl")) for folder in ("one", "two"))
    assert [line["train_loss"] for line in one] == pytest.approx([line["train_loss"] for line in two], rel=1e-5)


def test_if_compilation_fails_auto_runs_uncompiled_and_true_is_refused(workplace, run, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("model.GPT.compile", broken)
    monkeypatch.setattr("gpt_arc.training.compile.COMPILE_PAYS_AFTER", 0)
    monkeypatch.setenv("CXX", "c++")
    output = run()
    assert "not compiled   RuntimeError: no compiler here" in output and "finished step 8" in output
    assert load_state(Path("out/sums/last"))["runtime"]["compile"] is False
    assert "compile = true can't work here" in run("--compile=True").message


def test_a_mixture_trains_and_resumes_to_the_same_weights(documents, run):
    flags = ("mixed.toml", "--document_mask=True", "--positions=rotary")
    output = run(*flags, "--out_dir=whole")
    assert "75.0% one: " in output and "25.0% two: " in output and "epochs of" in output
    run(*flags, "--max_iters=4", "--lr_decay_iters=8", "--out_dir=halves")
    run("mixed.toml", "--init_from=resume", "--out_dir=halves", "--max_iters=8", tiny=False)
    assert_same_weights("whole/last", "halves/last")
    Path("data/two/meta.json").write_text("{}")
    resumed = run("mixed.toml", "--init_from=resume", "--out_dir=halves", "--max_iters=9", tiny=False)
    assert "differ from what the run has seen" in resumed


def test_a_document_mask_changes_training_and_needs_a_separator(documents, run):
    run("--dataset=one", "--out_dir=across")
    run("--dataset=one", "--document_mask=True", "--out_dir=within")
    assert not torch.equal(weights("across/last")["final_norm.weight"], weights("within/last")["final_norm.weight"])
    result = run("--document_mask=True")
    assert result.code == 2 and "document_mask = true needs an end-of-text token between documents" in result.message


def test_training_starts_from_a_model_with_its_architecture(documents, run):
    model = GPT(GPTConfig(24, 260, n_layer=2, n_head=2, n_embd=16, bias=False))  # more rows than tokens, as in Qwen
    save_model(model, load_tokenizer(documents / "data/one"), documents / "model")
    changed = "--dropout=0.1", "--max_iters=1", "--learning_rate=1e-30", "--warmup_iters=0"
    output = run("--dataset=one", "--init_from=model", *changed)
    assert "architecture   of model: vocab_size = 260, bias = False" in output
    trained, _ = load_model("out/sums-one")
    assert trained.config == dataclasses.replace(model.config, block_size=16, dropout=0.1)
    start = model.state_dict()
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(tensor, start[name][:16] if name == "position_embedding.weight" else start[name])
    assert "from step 1" in run("--init_from=resume", "--max_iters=2", tiny=False)
    assert "model: val loss" in run("--dataset=one", "--init_from=model", "--eval_only=True")
    assert "has another tokenizer than model: prepare it with --tokenizer model" in run("--init_from=model").message


@pytest.mark.parametrize(
    "flags", [("--init_from=model",), ("--init_from=nowhere",), ("thin.toml",), ("--dataset=none",)]
)
def test_a_run_is_not_overwritten_by_one_that_can_t_start(documents, run, flags):
    save_model(GPT(GPTConfig(24, 260, n_layer=2, n_head=2, n_embd=16)), load_tokenizer(documents / "data/one"), "model")
    table = '[[data.mixture]]\nname = "{}"\nweight = {}\n'
    Path("thin.toml").write_text(table.format("one", 1) + table.format("two", 1e-9))
    run("--out_dir=x", "--max_iters=2", "--warmup_iters=0")
    before = weights("x/last")
    result = run("--out_dir=x", "--overwrite=True", *flags)
    assert result.code == 2
    after = weights("x/last")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_flag_overrides_a_mixture_and_changed_weights_are_refused(documents, run):
    assert "100.0% sums" in run("mixed.toml", "--dataset=sums", "--max_iters=2", "--warmup_iters=1")
    assert "100.0% sums" in run("mixed.toml", "--init_from=resume", "--max_iters=3", tiny=False)
    run("mixed.toml", "--max_iters=2", "--warmup_iters=1", "--out_dir=mixture")
    Path("mixed.toml").write_text(Path("mixed.toml").read_text().replace("weight = 3", "weight = 30"))
    resumed = run("mixed.toml", "--init_from=resume", "--max_iters=3", "--out_dir=mixture", tiny=False)
    assert "differ from what the run has seen" in resumed
