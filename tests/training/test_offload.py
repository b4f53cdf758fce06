"""AdamW in the CPU's memory: the updates of torch's AdamW, to the bit, and states that either can go on from.

tests/fake_gpu counts its copies and waits.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from gpt_arc.errors import UserError
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.cost import memory_estimate
from gpt_arc.planning.layout import Layout
from gpt_arc.training.checkpoints import load_state
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.offload import OffloadedAdamW, check_offload
from gpt_arc.training.optim import Updater
from helpers import TINY_FLAGS
from model import GPT, GPTConfig

CPU = torch.device("cpu")
PLAIN, OFFLOADED = {}, {"offload_optimizer": True}


def updater(change, model=None, **settings):
    torch.manual_seed(0)
    model = model or GPT(GPTConfig(8, 11, 2, 2, 16, base_width=8, tied_head=False))
    return Updater(model, TrainingConfig(grad_clip=0.3, ema_decay=0.9, **settings, **change), CPU, "float32")


def trained(updater, steps, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        tokens = torch.randint(11, (4, 8), generator=draw)
        loss = updater.model(tokens, tokens).total
        updater.backward(loss)
        updater.update(1e-3 * (step + 1), loss.detach())
    return updater


def assert_equal(a, b):
    for x, y in zip(a.parameters + a.average, b.parameters + b.average, strict=True):
        assert torch.equal(x, y)
    states = [list(updater.optimizers["optimizer"].state.values()) for updater in (a, b)]
    for x, y in zip(*states, strict=True):
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_updates_are_those_of_adamw_to_the_bit():
    """Clipped, averaged, and with a rate of its own for matrices."""
    actual, expected = (trained(updater(change), 5) for change in (OFFLOADED, PLAIN))
    assert isinstance(actual.optimizers["optimizer"], OffloadedAdamW)
    assert len(actual.optimizers["optimizer"].param_groups) == 3
    assert_equal(actual, expected)


@pytest.mark.parametrize("before", [PLAIN, OFFLOADED], ids=["plain", "offloaded"])
@pytest.mark.parametrize("after", [PLAIN, OFFLOADED], ids=["plain", "offloaded"])
def test_a_state_of_either_resumes_as_either(before, after):
    first = trained(updater(before), 3)
    state, model = copy.deepcopy(first.state_dict()), copy.deepcopy(first.model)
    resumed = updater(after, model)
    resumed.load_state_dict(state)
    for mean, source in zip(resumed.average, first.average):  # which a checkpoint's model file holds
        mean.copy_(source)
    assert_equal(trained(resumed, 2, seed=1), trained(first, 2, seed=1))


def test_loaded_moments_share_no_memory_with_the_state():
    """Which may be mapped from a file."""
    first = trained(updater(OFFLOADED), 1)
    state = first.state_dict()
    resumed = updater(OFFLOADED)
    resumed.load_state_dict(state)
    for moments, saved in zip(resumed.optimizers["optimizer"].state.values(), state["optimizer"]["state"].values()):
        assert all(moments[name].data_ptr() != saved[name].data_ptr() for name in saved)


def test_a_run_resumes_to_the_bit_and_its_losses_are_those_without(workplace, stage_runner):
    flags = "sums.toml", *TINY_FLAGS, "--lr_decay_iters=6"
    stage_runner(train, *flags, "--max_iters=6", "--out_dir=plain")
    stage_runner(train, *flags, "--max_iters=3", "--out_dir=offloaded", "--offload_optimizer")
    stage_runner(train, "--resume=offloaded", "--max_iters=6")
    plain, offloaded = (load_file(Path(name, "last", "model.safetensors")) for name in ("plain", "offloaded"))
    assert all(torch.equal(offloaded[name], tensor) for name, tensor in plain.items())
    assert "offload_optimizer = true" in Path("offloaded/config.toml").read_text()
    assert load_state(Path("offloaded/last"))["optimizer"].keys() == load_state(Path("plain/last"))["optimizer"].keys()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="offload_optimizer is for AdamW, since Muon's"):
        TrainingConfig(optimizer="muon", offload_optimizer=True)
    with pytest.raises(UserError, match="offload_optimizer saves nothing on mps"):
        check_offload(TrainingConfig(offload_optimizer=True), torch.device("mps"))
    check_offload(TrainingConfig(), torch.device("mps"))


def test_the_plan_counts_what_a_gpu_is_spared():
    with meta_device():
        model = GPT(GPTConfig())
    plain, offloaded = (memory_estimate(model, 8, "bfloat16", "cuda", offloaded=x) for x in (False, True))
    assert plain - offloaded == 8 * 124_439_808
    plain, offloaded = (Layout(model, "h100", 8, 64, 8, "bfloat16", offloaded=x) for x in (False, True))
    assert sum(plain.memory.values()) - sum(offloaded.memory.values()) == 16 * 124_439_808 / 8


def test_a_dry_run_shows_what_the_cpu_holds(workplace, stage_runner):
    flags = "--parallel=fsdp", "--accelerator=h100", "--devices=8", "--device=cpu", "--dry_run"
    lines = [
        re.search("memory .*", stage_runner(train, "gpt2_xl", *flags, *change))[0]
        for change in ((), ("--offload_optimizer",))
    ]
    assert "; and 3.12GB of the CPU's for each" in lines[1] and "moments" not in lines[1]
    assert "moments" in lines[0] and "CPU" not in lines[0]
