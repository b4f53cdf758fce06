"""The memory of a training step on a GPU, against what is planned and what has to be there."""

import pytest

from fake_gpu.build import measure, needs_triton


@pytest.mark.slow
def test_an_offloaded_optimizer_leaves_a_gpu_weights_and_gradients():
    """Both are copied to the CPU, and the weights back, while others are updated; besides, only the norm is awaited."""
    config = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 300}
    plain, offloaded = (
        measure("step", config, 2, {"offload_optimizer": setting}, kernels="none") for setting in (False, True)
    )
    parameters, tensors = plain["parameters"], 2 + 2 * 12 + 2
    assert plain["copied"] == {} and sum(plain["waits"].values()) == 1
    assert offloaded["copied"] == {"cpu": 8 * parameters, "cuda": 4 * parameters}
    assert sum(offloaded["waits"].values()) == 1 + tensors
    assert all("offload.py" in line for line, n in offloaded["waits"].items() if n > 1)
    assert plain["update"] - offloaded["update"] == pytest.approx(8 * parameters, rel=0.01)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("setting", ["selective", True])
def test_checkpointing_takes_the_memory_that_the_plan_says(setting):
    update = measure("step", {"n_layer": 4, "bias": False}, 12, {"activation_checkpointing": setting})
    assert update["peak"] == pytest.approx(update["estimate"], rel=0.05)


@needs_triton
@pytest.mark.slow
def test_the_head_s_gradient_takes_no_memory_for_each_chunk():
    """Nineteen chunks of a vocabulary of 151,936: the compiler would keep their products, of 0.6 GB each."""
    config = {"vocab_size": 151_936, "n_embd": 2048, "n_head": 16, "n_layer": 2, "block_size": 4096}
    update = measure("step", config, 8)
    assert update["forward"] - 8 * update["parameters"] <= 11.5 * 2**30
