"""Heads and MLPs divided among processes, against all of them in one process."""

import dataclasses

import pytest
import torch

from gpt_arc.errors import UserError
from gpt_arc.planning.cost import activation_bytes, memory_estimate
from gpt_arc.training import parallel, tensor_parallel
from gpt_arc.training.config import Config, DataConfig, RunConfig, TrainingConfig
from gpt_arc.training.tensor_parallel import TensorParallel, check_tensor_processes
from helpers import TINY_FLAGS, trains_into, write_lines
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
    tensors. Beside data/sums there is data/lines, whose lines are documents."""
    write_lines(workplace)
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


DOCUMENTS = "--dataset=lines", "--document_mask=True"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (2, ("--batch_size=2", "--gradient_accumulation_steps=2", "--compare_replicas")),
        (4, (*MODERN, "--norm_position=post")),
        (2, ("--parallel=fsdp", *DOCUMENTS, "--positions=rotary")),
        (4, ("--parallel=fsdp", *DOCUMENTS, "--gradient_accumulation_steps=2")),
    ],
)
def test_divided_blocks_train_as_whole_ones(run, processes, flags):
    """Twenty losses and gradient norms; four processes are two groups of two."""
    assert_same_run(run("several", *flags, "--tensor_processes=2", processes=processes), run("one", *flags))


@pytest.mark.slow
def test_compiled_divided_blocks_train_as_whole_ones(run):
    compiled = run("several", "--n_layer=1", "--tensor_processes=2", "--compile=blocks", processes=2)
    assert_same_run(compiled, run("one", "--n_layer=1"))


@pytest.mark.slow
def test_a_run_resumes_with_its_blocks_in_another_number_of_processes(run):
    """Stacked queries, keys, values and gates find their places, and so do their moments, in a run of nine parts."""
    flags = *MODERN, "--eval_interval=2", "--warmup_iters=1"
    one, tensor, fsdp, both = (1, "ddp", 1), (2, "ddp", 2), (2, "fsdp", 1), (4, "fsdp", 2)
    parts = zip((2, 4, 6, 8, 10, 12, 14, 16, 20), (one, tensor, one, both, fsdp, both, tensor, both, one))
    for steps, (processes, mode, divided) in parts:
        division = f"--parallel={mode}", f"--tensor_processes={divided}", f"--max_iters={steps}"
        resumed = run("parts", *flags, *division, "--init_from=auto", processes=processes)
        assert len(resumed[0]) == steps
    assert_same_run(resumed, run("one", *flags))


def test_impossible_divisions_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "WORLD_SIZE", 4)

    def check(processes, dtype="float32", mask=False, accelerators=None, **model):
        data, training = DataConfig(document_mask=mask), TrainingConfig(**processes)
        config = Config(GPTConfig(**{"n_head": 4, "n_embd": 16, **model}), data, training)
        if accelerators:
            config = dataclasses.replace(config, run=RunConfig(dry_run=True, accelerator="h100", devices=accelerators))
        check_tensor_processes(config, dtype)

    two, four = {"tensor_processes": 2}, {"tensor_processes": 4}
    check(two)
    check(four)
    check({}, positions="alibi", dtype="float16")
    check({"tensor_processes": 3}, accelerators=6, n_head=6, n_embd=24)
    for sentence, arguments, settings in (
        ("tensor_processes = 3 does not divide the number of processes, 4", {"tensor_processes": 3}, {}),
        ("tensor_processes = 4 does not divide devices = 6", four, {"accelerators": 6}),
        ("tensor_processes = 4 does not divide n_kv_head = 2", four, {"n_kv_head": 2}),
        ("tensor_processes = 4 does not divide mlp_size = 6", four, {"mlp_size": 6}),
        ("doesn't suit n_experts = 2, for which there is expert_processes", two, {"n_experts": 2}),
        ("doesn't suit positions = alibi: leave out one of the two", two, {"positions": "alibi"}),
        ("doesn't suit attention_band = 8", two, {"attention_band": 8}),
        ("doesn't suit dtype = float16", two, {"dtype": "float16"}),
        ("document_mask with compile = blocks", {**two, "compile": "blocks"}, {"mask": True}),
    ):
        with pytest.raises(UserError, match=sentence):
            check(arguments, **settings)
    for settings in (
        {"checkpoint_format": "sharded", "parallel": "fsdp"}, {"replicas": 2, "parallel": "fsdp"},
        {"expert_processes": 2}, {"optimizer": "muon"}, {"ema_decay": 0.9}, {"float8": True},
        {"offload_optimizer": True},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"tensor_processes = 2 doesn't suit .*{next(iter(settings))}"):
            TrainingConfig(tensor_processes=2, **settings)


def test_the_estimate_of_memory_divides_the_matrices():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32))
    whole, part = (memory_estimate(model, 0, "float32", tensor_processes=n) for n in (1, 2))
    assert whole - part == 16 * 2 * 12 * 16 * 16 / 2


def test_the_estimate_counts_the_inputs_that_a_group_gathers(monkeypatch):
    """Against the bytes that autograd saves, with another process that sends the same."""
    monkeypatch.setattr(tensor_parallel, "gather_rows", lambda x, group: torch.cat((x, x)))
    monkeypatch.setattr(tensor_parallel, "sum_rows", lambda x, group: x.chunk(2)[0] * 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    config, tokens = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32), torch.zeros(3, 8).long()
    sharing = TensorParallel(1, torch.device("cpu"))
    saved, estimates = [], []
    for processes in (1, 2):
        model = GPT(config)
        if processes == 2:
            sharing.processes, sharing.group = 2, None
            sharing.divide(model)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            model(tokens, tokens)
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        saved.append(sum(size for place, size in sizes.items() if place not in weights))
        estimates.append(activation_bytes(config, tokens.numel(), 4, False, processes)[0])
    assert saved[1] - saved[0] == estimates[1] - estimates[0] > 0
