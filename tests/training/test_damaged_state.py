"""training_state.pt is compared with the model before use: what doesn't fit is named, nothing is broadcast."""

import math
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import train
from gpt_arc.manifest import MANIFEST
from gpt_arc.training.checkpoints import load_state, state_file
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from helpers import TINY_FLAGS, interrupt_at
from model import GPT, GPTConfig
from stages import sft

CPU = torch.device("cpu")


def put(*keys, value):
    """Returns a change of a nested state: `value` (or what it computes from the old one) under `keys`."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return change


def rename(*keys, to):
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[to] = state.pop(keys[-1])

    return change


MOMENT = ("optimizer", "state", 0)
DAMAGES = [
    (put(*MOMENT, "exp_avg", value=torch.zeros(1)), r"token_embedding.weight: exp_avg has the shape \(1,\)"),
    (put(*MOMENT, "exp_avg_sq", value=torch.zeros(())), r"token_embedding.weight: exp_avg_sq has the shape \(\)"),
    (put(*MOMENT, "exp_avg", value=lambda old: old.T.contiguous()), "exp_avg has the shape"),
    (put(*MOMENT, "exp_avg", value=lambda old: old.double()), "exp_avg has the shape .* of torch.float64, not"),
    (put(*MOMENT, "exp_avg", value=lambda old: old.flatten()[:1].expand(old.shape)), "exp_avg doesn't hold a value"),
    (put(*MOMENT, "exp_avg", value=lambda old: old.to("meta")), "exp_avg doesn't hold a value"),
    (put(*MOMENT, "step", value=torch.zeros(3)), r"token_embedding.weight: step has the shape \(3,\)"),
    (rename(*MOMENT, "exp_avg", to="exp_avh"), "token_embedding.weight: exp_av"),
    (rename(*MOMENT, to=300), "it has moments of weight 300 of"),
    (rename(*MOMENT, to="0"), r"optimizer.state.0"),
    (put("optimizer", value=None), "optimizer = null"),
    (rename("optimizer", to="optimizes"), "it lacks optimizer"),
    (put("weights", 0, value=torch.zeros(1)), r"weights.0 has the shape \(1,\)"),
    (put("weights", value=lambda old: old[:-1]), r"it lacks weights\.\d+"),
    (rename("weights", to="weightt"), "weightt"),
    (put("progress", "step", value=-1), "step"),
    (put("progress", "step", value="4"), "step"),
    (put("progress", "best_val_loss", value=math.nan), "best_val_loss = NaN must be"),
    (put("progress", "seconds", value=math.inf), "seconds = Infinity must be a finite number"),
    (put("scaler", value={"scale": math.nan}), "scaler.scale.float = NaN must be a finite number"),
    (rename("progress", "consumed", to="consumee"), "consumee"),
    (put("generators", 0, "cpu", value=torch.zeros(5, dtype=torch.uint8)), "RNG state"),
    (put("generators", value=[{}]), "it lacks 'cpu'"),
    (put("runtime", "dtype", value="float33"), "runtime.dtype"),
    (put("data", value=7), "data"),
]


def state_of(run):
    """The last checkpoint's state; it loses its manifest, which whoever changes a state on purpose would change too."""
    directory = Path(run) / Path(run, "last").readlink()
    (directory / MANIFEST).unlink()
    return state_file(directory)


def resave(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_a_state_that_does_not_fit_the_model_is_refused(workplace, stage_runner):
    stage_runner(train, "sums.toml", *TINY_FLAGS, "--ema_decay=0.9", "--out_dir=run")
    path = state_of("run")
    whole = path.read_bytes()
    for change, sentence in DAMAGES:
        path.write_bytes(whole)
        resave(path, change)
        refused = stage_runner(train, "--resume=run", "--max_iters=9")
        assert refused.code == 2
        assert f"{path} is damaged, use another checkpoint: " in refused.message
        assert re.search(sentence, refused.message), (sentence, refused.message)
    path.write_bytes(whole)
    assert "finished step 9" in stage_runner(train, "--resume=run", "--max_iters=9")


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon"}])
def test_nothing_is_changed_by_a_state_that_does_not_fit(settings):
    model = GPT(GPTConfig(4, 5, 1, 1, 4))
    updater = Updater(model, TrainingConfig(**settings, ema_decay=0.5), CPU, "float32")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    updater.update(0.1, torch.tensor(1.0))
    before = [p.detach().clone() for p in updater.parameters]
    state = updater.state_dict()
    last = list(updater.optimizers)[-1]
    name, tensor = list(state[last]["state"][0].items())[-1]
    state[last]["state"][0][name] = tensor.flatten()[:1]
    state["weights"] = [torch.zeros_like(weight) for weight in state["weights"]]
    with pytest.raises(ValueError, match=rf"{name} has the shape \(1,\)"):
        updater.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, updater.parameters))


def test_a_compressed_state_is_refused_before_it_is_unpacked(workplace, stage_runner):
    """A megabyte of zeros takes a kilobyte in a compressed archive, so a small one might fill the memory."""
    stage_runner(train, "sums.toml", *TINY_FLAGS, "--out_dir=run")
    path = state_of("run")
    shutil.copy(path, "plain.pt")
    with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert "its parts are compressed" in stage_runner(train, "--resume=run", "--max_iters=9").message


def test_parts_of_a_stage_are_checked(workplace, stage_runner):
    stage_runner(train, "sums.toml", *TINY_FLAGS, "--out_dir=base")
    Path("chats.jsonl").write_text('{"prompt": "2 times 3", "response": "6"}\n' * 8)
    stage_runner(sft, "base", "--train=chats.jsonl", "--val=chats.jsonl", "--device=cpu", "--out_dir=run")
    path = state_of("run")
    resave(path, put(*MOMENT, "exp_avg", value=torch.zeros(1)))
    refused = stage_runner(sft, "--resume=run")
    assert f"{path} is damaged" in refused.message and "exp_avg has the shape (1,)" in refused.message
    resave(path, put("progress", "numbers", value={"a": "b"}))
    assert "numbers.a" in stage_runner(sft, "--resume=run").message
    assert load_state(Path("run/last"))["progress"]["numbers"] == {"a": "b"}
    resave(path, put("progress", value=lambda old: old | {"numbers": {}, "best": math.nan}))
    assert "best = NaN must be a finite number" in stage_runner(sft, "--resume=run").message


def test_a_run_without_a_val_loss_yet_goes_on(workplace, stage_runner, monkeypatch):
    interrupt_at(monkeypatch, 2)
    assert stage_runner(train, "sums.toml", *TINY_FLAGS, "--out_dir=run").code == 130
    assert load_state(Path("run/last"))["progress"]["best_val_loss"] == math.inf
    assert "finished step 8" in stage_runner(train, "--resume=run")
