"""Mixtures of experts in the stages: which ones train, balance and report routers, and which freeze them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt_arc.alignment.reward_model import RewardModel, save_reward_model
from gpt_arc.training.log import read_metrics
from helpers import assert_same_weights, interrupt_at, randomised, write
from model import GPT, GPTConfig
from policy_tree import save_chat_model
from ranked_texts import CHAT, LETTERS, rankings
from stages import dpo, finetune, ppo, reward, sft

CONFIG = GPTConfig(
    block_size=16, vocab_size=12, n_layer=2, n_head=2, n_embd=16, mlp_size=16, n_experts=4, balance_rate=0.01
)
QUICK = "--device=cpu --dtype=float32 --learning_rate=1e-2 --batch_size=4 --seed=3".split()
STAGES = {
    "sft": (sft, "--train=chats.jsonl", "--epochs=2", "--val_fraction=0"),
    "reward": (reward, "--train=rankings.jsonl", "--gradient_accumulation_steps=1", "--val_fraction=0"),
    "finetune": (finetune, "--train=labels.csv", "--epochs=1"),
    "dpo": (dpo, "--train=rankings.jsonl", "--gradient_accumulation_steps=1", "--warmup=0", "--val_fraction=0"),
    "ppo": (
        *(ppo, "--prompts=prompts.jsonl", "--reward=reward_model", "--episodes=32", "--minibatches=2"),
        *("--gradient_accumulation_steps=1", "--max_new_tokens=4"),
    ),
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(0)
    save_chat_model(randomised(GPT(CONFIG)), CHAT, "base")
    save_reward_model(RewardModel(randomised(GPT(CONFIG), 1)), LETTERS, CHAT, "reward_model")
    write("rankings.jsonl", rankings(12))
    write("prompts.jsonl", [{"prompt": text} for text in ("a", "bcd", "ef", "aab")])
    write("chats.jsonl", [{"prompt": text, "response": text[::-1]} for text in ("ab", "cde", "fgh", "bcdea")])
    Path("labels.csv").write_text("text,label\n" + "".join(f"{t},{t[0]}\n" for t in ("ab", "ba", "abc", "bcd") * 4))


def routers(directory):
    tensors = load_file(Path(directory) / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "router" in name or name.endswith("balance")}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_reports_the_load_and_trains_routers_or_freezes_them(name, workplace, stage_runner):
    module, *flags = STAGES[name]
    output = stage_runner(module, "base", *flags, *QUICK, "--out_dir=run")
    assert isinstance(output, str), output.message
    lines = [line for line in read_metrics(Path("run/metrics.jsonl")) if "expert_cv" in line]
    assert lines and all(0 <= line["expert_cv"] and 1 <= line["expert_max"] <= 4 for line in lines), json.dumps(lines)
    before, after = routers("base"), routers("run/last")
    assert before.keys() == after.keys() and len(before) == 4
    changed = {key: not torch.equal(before[key], after[key]) for key in before}
    assert set(changed.values()) == {name in ("sft", "reward", "finetune")}, changed
    weights = (load_file(f"{folder}/model.safetensors")["blocks.0.mlp.up"] for folder in ("base", "run/last"))
    assert not torch.equal(*weights)


def test_a_frozen_trunk_keeps_its_routers(workplace, stage_runner):
    stage_runner(finetune, "base", "--train=labels.csv", "--epochs=1", "--freeze_trunk=True", *QUICK, "--out_dir=run")
    before, after = routers("base"), routers("run/last")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_frozen_routers_resume_exactly(name, workplace, stage_runner, monkeypatch):
    module, *flags = STAGES[name]
    stage_runner(module, "base", *flags, *QUICK, "--out_dir=whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert stage_runner(module, "base", *flags, *QUICK, "--out_dir=cut").code
    stage_runner(module, "--resume=cut")
    assert_same_weights("whole/last", "cut/last")
