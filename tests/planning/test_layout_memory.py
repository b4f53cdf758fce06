"""The memory and traffic of FSDP layouts, against runs of torch's fake process group and by hand."""

import dataclasses

import pytest

from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.layout import MEMORY, ROOM, Layout
from model import GPT, GPTConfig

MEDIUM = {"n_layer": 8, "n_embd": 4096, "n_head": 32, "block_size": 2048}


def layout(shape, devices, sequences, checkpointing, **settings):
    with meta_device():
        model = GPT(GPTConfig(**shape))
    return Layout(model, "h100", devices, devices * sequences, sequences, "bfloat16", checkpointing, **settings)


@pytest.mark.parametrize(
    ("shape", "devices", "sequences", "checkpointing", "gigabytes"),
    [
        ({"n_layer": 6, "n_embd": 1024, "n_head": 16}, 8, 1, True, 1.037),
        ({"n_layer": 8, "n_embd": 1024, "n_head": 16}, 16, 4, False, 3.457),
        (MEDIUM, 64, 1, True, 4.382),
        (MEDIUM, 64, 2, False, 8.959),
    ],
)
def test_memory_is_that_of_fake_ranks(shape, devices, sequences, checkpointing, gigabytes):
    """Peaks of a step without moments that shard_block's FSDP2 had with bfloat16 autocast and the logits of a GPU.

    They were counted on fake tensors with torch 2.13's fake process group.
    """
    memory = layout(shape, devices, sequences, checkpointing).memory
    assert sum(memory.values()) - memory["moments"] == pytest.approx(gigabytes * 1e9, rel=0.1)


def test_figures_by_hand():
    plan = layout(MEDIUM, 64, 2, True)
    parameters = plan.model.num_parameters()
    assert plan.memory["weights"] == plan.memory["gradients"] == plan.memory["moments"] / 2 == 4 * parameters / 64
    assert plan.checkpoint == 12 * parameters
    assert plan.communicated == pytest.approx((2 + 2 + 4) * parameters * 63 / 64)  # two gathers and the gradients
    assert dataclasses.replace(plan, reshard=False).communicated == pytest.approx((2 + 4) * parameters * 63 / 64)
    assert dataclasses.replace(plan, batch_size=1).communicated == 2 * plan.communicated
    assert dataclasses.replace(plan, average=True).checkpoint == 16 * parameters
    assert dataclasses.replace(plan, devices=1).communicated == 0
    replicated = dataclasses.replace(plan, replicas=16)  # of 4 devices
    assert replicated.memory["moments"] == 8 * parameters / 4
    assert replicated.communicated == pytest.approx(8 * parameters * 3 / 4 + 2 * 4 * parameters / 4 * 15 / 16)


@pytest.mark.parametrize("average", [False, True])
def test_the_smallest_layout_fits_and_no_smaller_one_does(average):
    plan = layout(MEDIUM, 64, 2, True, average=average)
    smallest = plan.smallest()
    fitting = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if dataclasses.replace(plan, devices=n).fits]
    assert smallest.devices == fitting[0] < 64 and smallest.sequences_per_step == plan.sequences_per_step
    assert sum(smallest.memory.values()) <= ROOM * MEMORY["h100"]
    assert layout(MEDIUM | {"block_size": 2**21}, 64, 1, False).smallest() is None
