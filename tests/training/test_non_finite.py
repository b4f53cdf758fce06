"""Nothing that is not finite becomes a checkpoint: not in train.py, not in a stage; good checkpoints stay."""

import json
from pathlib import Path

import pytest
import torch

import train
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.training import stage_run as stage_run_module
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.log import MetricsLog, read_metrics
from gpt_arc.training.optim import Updater
from gpt_arc.training.options import StageOptions
from gpt_arc.training.stage_run import StageProgress, StageRun
from gpt_arc.weights.directory import load_model, save_model
from helpers import TINY_FLAGS
from model import GPT, GPTConfig
from stages import dpo, finetune, ppo, reward, sft

LETTERS = CharTokenizer(sorted("abcdefghijklmnop\n !?.,<|>usertin"))


def all_finite(directory):
    return all(parameter.isfinite().all() for parameter in load_model(directory)[0].parameters())


@pytest.fixture
def run(workplace, stage_runner):
    return lambda *flags: stage_runner(train, "sums.toml", *TINY_FLAGS, "--dtype=float32", *flags)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_weight_is_noticed_frozen_or_not(value):
    model = torch.nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    updater = Updater(model, TrainingConfig(), torch.device("cpu"), "float32")
    with torch.no_grad():
        model.weight[0, 0] = 3e38  # finite, though its square isn't
        assert updater.finite() and updater.finite(1.0) and not updater.finite(1.0, value)
        model.bias[1] = value
    assert not updater.finite()


def test_a_run_that_diverges_in_its_only_step_saves_nothing(run):
    stopped = run("--max_iters=1", "--learning_rate=1e38", "--warmup_iters=0")
    assert (
        stopped.code == 1 and "step 1 has diverged, there is no checkpoint yet: lower learning_rate" in stopped.output
    )
    assert not list(Path("out/sums").glob("*/model.safetensors"))


def test_a_resumed_run_that_diverges_keeps_its_checkpoints(run):
    run("--max_iters=4", "--eval_interval=4")
    before = Path("out/sums/last").resolve()
    again = "--resume=out/sums", "--max_iters=5", "--learning_rate=1e38", "--eval_interval=4"
    stopped = run(*again)
    assert stopped.code == 1 and "step 5 has diverged, out/sums/last is the last good checkpoint" in stopped.output
    assert Path("out/sums/last").resolve() == before and all_finite("out/sums/last") and all_finite("out/sums/best")
    for line in Path("out/sums/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_stopped_run_does_not_save_bad_weights(run, monkeypatch):
    original = Updater.update

    def update(self, *args):
        result = original(self, *args)
        with torch.no_grad():
            self.parameters[0][0, 0] = torch.nan
        return result[0], result[1], [result[2][0], 2]  # as after a Ctrl-C

    monkeypatch.setattr(Updater, "update", update)
    stopped = run()
    assert stopped.code == 1 and "step 1 has diverged, there is no checkpoint yet" in stopped.output


# ---- stages


def test_a_stage_saves_neither_bad_weights_nor_a_bad_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage_run_module, "StopSignal", lambda after: None)  # which would take this process's signals
    run = StageRun(
        "sft",
        StageOptions("base", learning_rate=1e-5, out_dir="run", device="cpu"),
        torch.device("cpu"),
        None,
        None,
        StageProgress,
    )
    run.open("data")
    module = run.place(torch.nn.Linear(2, 2))
    run.restore(run.updater(module, 10), {})
    write = lambda _, directory: directory.mkdir(exist_ok=True)  # noqa: E731
    run.progress.step = 1
    with pytest.raises(UserError, match="update 1 left .*, there is no checkpoint yet: lower learning_rate, or set"):
        run.save(write, float("nan"))
    run.save(write, 2.0)
    run.progress.step = 2
    for loss in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="update 2 left .*, run/last is the last good checkpoint"):
            run.save(write, loss)
    with torch.no_grad():
        module.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="update 2 left .*, run/last is the last good checkpoint"):
        run.save(write, 1.0)
    assert sorted(path.name for path in Path("run").glob("step-*")) == ["step-00000001"]
    assert (run.progress.best, run.progress.best_step) == (2.0, 1)


ROWS = {
    finetune: [{"text": text, "label": text[0]} for text in ("abc", "bcd", "acd", "bad") * 4],
    sft: [{"prompt": "abc", "response": "de"}] * 4,
    reward: [{"prompt": "abc", "chosen": "de", "rejected": "fg"}] * 4,
    dpo: [{"prompt": "abc", "chosen": "de", "rejected": "fg"}] * 4,
    ppo: [{"prompt": "abc"}] * 4,
}
COMMON = ["--device=cpu", "--dtype=float32", "--batch_size=16", "--gradient_accumulation_steps=1"]
SFT = ["--train=chats.jsonl", "--val_fraction=0", "--epochs=1", *COMMON]
FLAGS = {
    ppo: [
        "--prompts=rows.jsonl",
        "--reward=lengths:f",
        "--episodes=32",
        "--minibatches=1",
        "--save_interval=1",
        "--max_new_tokens=3",
    ]
}


@pytest.mark.parametrize("stage", ROWS, ids=lambda stage: stage.__name__)
def test_every_stage_stops_at_weights_that_are_not_finite(tmp_path, monkeypatch, stage_runner, stage):
    """The second of two epochs ends with a NaN in the weights; what the first one left stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    save_model(
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=48, vocab_size=LETTERS.vocab_size)), LETTERS, "base"
    )
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[stage]))
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[sft]))
    Path("lengths.py").write_text("def f(rows, responses): return [float(len(r)) for r in responses]\n")
    flags = FLAGS.get(stage, ["--train=rows.jsonl", "--val=rows.jsonl", "--epochs=2"])
    if stage is not sft:
        assert "/last" in stage_runner(sft, "base", *SFT, "--out_dir=chat")
    original, updates = Updater.update, []

    def update(self, *args):
        result = original(self, *args)
        updates.append(result[0])
        if len(updates) == 2:
            with torch.no_grad():
                self.parameters[0].view(-1)[0] = torch.nan
        return result

    monkeypatch.setattr(Updater, "update", update)
    model = "base" if stage in (finetune, sft) else "chat"
    stopped = stage_runner(stage, model, *flags, *COMMON, "--out_dir=run")
    assert (
        stopped.code == 1
        and "update 2 left weights or a val loss that are not finite, run/last is the" in stopped.message
    )
    assert [path.name for path in Path("run").glob("step-*")] == ["step-00000001"] and all_finite("run/last")
    assert not [line for line in read_metrics(Path("run/metrics.jsonl")) if line["step"] > 2]


def test_metrics_are_json(tmp_path):
    MetricsLog(tmp_path, 0).write({"step": 1, "loss": float("nan"), "rate": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "rate": 0.5}]
