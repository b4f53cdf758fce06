"""A resumed run equals one that never stopped, bit for bit, wherever its tensors lie in memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from gpt_arc.device import ALIGNMENT, align
from gpt_arc.training.checkpoints import load_state
from gpt_arc.training.optim import Updater
from gpt_arc.weights.directory import load_model, save_model
from gpt_arc.weights.huggingface import hf_config, hf_tensors
from helpers import ROOT, TINY_FLAGS
from model import GPT, GPTConfig
from stages import sft

SHRUNK = (
    "--dataset=sums --vocab_size=65 --block_size=32 --batch_size=8 --lr_decay_iters=20 --warmup_iters=4 "
    "--eval_interval=10 --eval_iters=2 --device=cpu"
).split()


def equal(a, b):
    """Whether two nested states are the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize(
    "shape",
    [
        (),
        pytest.param(("--n_embd=48", "--n_head=3", "--mlp_size=40", "--n_experts=4"), marks=pytest.mark.slow),
        pytest.param(
            ("--n_layer=3", "--n_embd=40", "--n_head=4", "--mlp_size=72", "--n_experts=6", "--shared_experts=1"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--n_experts=5", "--experts_per_token=3", "--mlp_size=20", "--activation=swiglu"), marks=pytest.mark.slow
        ),
        pytest.param(("--n_experts=0", "--n_embd=36", "--n_head=2", "--bias=True"), marks=pytest.mark.slow),
    ],
    ids=["preset", "narrow", "shared", "swiglu", "dense"],
)
def test_twenty_steps_of_a_mixture_equal_ten_and_ten_more(workplace, stage_runner, shape):
    flags = (ROOT / "configs" / "moe_mini.toml", *SHRUNK, *shape)
    stage_runner(train, *flags, "--max_iters=20", "--out_dir=whole")
    stage_runner(train, *flags, "--max_iters=10", "--out_dir=halves")
    assert "from step 10" in stage_runner(train, "--resume=halves", "--max_iters=20")
    whole, halves = Path("whole/last"), Path("halves/last")
    assert equal(load_file(whole / "model.safetensors"), load_file(halves / "model.safetensors"))
    first, second = load_state(whole), load_state(halves)
    assert equal(first["optimizer"]["state"], second["optimizer"]["state"])
    assert first["progress"]["best_val_loss"] == second["progress"]["best_val_loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("written_by", ["us", "transformers"])
def test_weights_of_a_file_are_aligned_as_fresh_ones_for_training(tmp_path, written_by, dtype):
    """In a file, tensors of odd sizes lie one behind the other."""
    model = GPT(GPTConfig(7, 11, 3, 3, 15))
    if written_by == "us":
        save_model(model, None, tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps(hf_config(model.config)))
        save_file(dict(hf_tensors(model)), tmp_path / "model.safetensors")
    trained = load_model(tmp_path, dtype=dtype)[0]
    align(trained)
    loaded = trained.state_dict()
    assert all(tensor.data_ptr() % ALIGNMENT == 0 and tensor.is_contiguous() for tensor in loaded.values())
    assert all(torch.equal(loaded[name], tensor.to(dtype)) for name, tensor in model.state_dict().items())


def test_a_run_and_a_stage_train_aligned_weights(workplace, stage_runner, monkeypatch):
    """Whether kernels mind depends on the processor, so the addresses themselves are checked."""
    flags = (*TINY_FLAGS, "--n_embd=18", "--bias=True")
    stage_runner(train, "sums.toml", *flags, "--out_dir=run")
    loaded = load_model("run")[0]
    assert any(parameter.data_ptr() % ALIGNMENT for parameter in loaded.parameters())  # else this shows nothing
    made, original = [], Updater.__init__

    def checked(self, model, *args):
        made.append([name for name, parameter in model.named_parameters() if parameter.data_ptr() % ALIGNMENT])
        original(self, model, *args)

    monkeypatch.setattr(Updater, "__init__", checked)
    stage_runner(train, "--resume=run", "--max_iters=9")
    Path("chats.jsonl").write_text('{"prompt": "2 times 3", "response": "6"}\n' * 8)
    stage_runner(sft, "run", "--train=chats.jsonl", "--val=chats.jsonl", "--device=cpu", "--epochs=1")
    assert made == [[], []]
