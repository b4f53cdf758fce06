"""Heads and MLPs divided among processes, against all of them in one process."""

import dataclasses

import pytest
import torch

from gpt_arc.errors import UserError
from gpt_arc.planning.cost import memory_estimate
from gpt_arc.training import tensor_parallel
from gpt_arc.training.config import Config, TrainingConfig
from gpt_arc.training.tensor_parallel import check_tensor_processes
from helpers import TINY_FLAGS, trains_into
from model import GPT, GPTConfig

FLAGS = (
    *TINY_FLAGS,
    "--compile=False",
    "--dtype=float32",
    "--learning_rate=1e-3",
    "--batch_size=4",
    "--log_interval=1",
)
FLAGS += ("--max_iters=20", "--lr_decay_iters=20", "--eval_interval=10", "--eval_iters=3", "--grad_clip=0.5")
MODERN = (
    *("--n_head=4", "--n_kv_head=2", "--positions=rotary", "--activation=swiglu", "--norm=rmsnorm", "--qk_norm=True"),
    *("--tied_head=False", "--ngrams=2", "--ngram_rows=50", "--activation_checkpointing"),
)


@pytest.fixture
def run(workplace, output_of):
    """Returns a function that trains into a folder with some processes and returns the metrics and the final
    tensors."""
    return trains_into(output_of, FLAGS)


def assert_same_run(actual, expected):
    assert len(actual[0]) == len(expected[0]) == 20
    for line, expected_line in zip(actual[0], expected[0]):
        for name in ("train_loss", "val_loss", "grad_norm"):
            assert line.get(name, 0) == pytest.approx(expected_line.get(name, 0), rel=1e-5), (name, line["step"])
    assert actual[1].keys() == expected[1].keys()
    for name, tensor in actual[1].items():
        torch.testing.assert_close(tensor, expected[1][name], rtol=0, atol=3e-5, msg=name)
    assert any(line["grad_norm"] > 0.5 for line in actual[0]), "clipping isn't tested"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (2, ("--batch_size=2", "--gradient_accumulation_steps=2", "--compare_replicas")),
        (4, (*MODERN, "--norm_position=post")),
    ],
)
def test_divided_blocks_train_as_whole_ones(run, processes, flags):
    """Twenty losses and gradient norms; four processes are two groups of two."""
    assert_same_run(run("several", *flags, "--tensor_processes=2", processes=processes), run("one", *flags))


@pytest.mark.slow
def test_a_run_resumes_with_its_blocks_in_another_number_of_processes(run):
    """Stacked queries, keys, values and gates find their places, and so do their moments."""
    whole = run("one", *MODERN)
    for before, after in ((2, 1), (1, 2)):
        folder = f"from-{before}"
        run(folder, *MODERN, "--max_iters=10", f"--tensor_processes={before}", processes=before)
        flags = *MODERN, "--init_from=resume", f"--tensor_processes={after}"
        assert_same_run(run(folder, *flags, processes=after), whole)


def test_impossible_divisions_are_refused(monkeypatch):
    monkeypatch.setattr(tensor_parallel, "WORLD_SIZE", 4)

    def check(processes, dtype="float32", mask=False, **model):
        config = Config(GPTConfig(**{"n_head": 4, "n_embd": 16, **model}), training=TrainingConfig(**processes))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, document_mask=mask))
        check_tensor_processes(config, dtype)

    two, four = {"tensor_processes": 2}, {"tensor_processes": 4}
    check(two)
    check(four)
    check({}, positions="alibi", dtype="float16")
    for sentence, arguments, settings in (
        ("tensor_processes = 3 does not divide the number of processes, 4", {"tensor_processes": 3}, {}),
        ("tensor_processes = 4 does not divide n_kv_head = 2", four, {"n_kv_head": 2}),
        ("tensor_processes = 4 does not divide mlp_size = 6", four, {"mlp_size": 6}),
        ("doesn't suit n_experts = 2, for which there is expert_processes", two, {"n_experts": 2}),
        ("doesn't suit positions = alibi: leave out one of the two", two, {"positions": "alibi"}),
        ("doesn't suit attention_band = 8", two, {"attention_band": 8}),
        ("doesn't suit document_mask", two, {"mask": True}),
        ("doesn't suit dtype = float16", two, {"dtype": "float16"}),
        ("doesn't suit compile = blocks", {**two, "compile": "blocks"}, {}),
    ):
        with pytest.raises(UserError, match=sentence):
            check(arguments, **settings)
    for settings in (
        {"parallel": "fsdp"}, {"expert_processes": 2}, {"optimizer": "muon"}, {"ema_decay": 0.9}, {"float8": True},
        {"offload_optimizer": True},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"tensor_processes = 2 doesn't suit .*{next(iter(settings))}"):
            TrainingConfig(tensor_processes=2, **settings)


def test_the_estimate_of_memory_divides_the_matrices():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32))
    whole, part = (memory_estimate(model, 3, "float32", tensor_processes=n) for n in (1, 2))
    assert whole - part == 16 * 2 * 12 * 16 * 16 / 2
