"""A GPU against the CPU, with `python -m pytest -m gpu`; REHEARSE=1 runs the same on the CPU, where there is no GPU."""

import copy
import os
from pathlib import Path

import pytest
import torch

import train
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.settings import Sampling
from gpt_arc.device import autocast, set_up_device
from gpt_arc.nn.packing import can_pack, packed
from gpt_arc.training.compile import compile_in_place
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.log import read_metrics
from gpt_arc.training.muon import BatchedMuon
from gpt_arc.training.optim import Updater
from helpers import TINY_FLAGS, randomised
from model import GPT, GPTConfig

REHEARSAL = os.environ.get("REHEARSE") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSAL), reason="there is no GPU"),
]
CPU, GPU = torch.device("cpu"), torch.device("cpu" if REHEARSAL else "cuda")
VARIANTS = {
    "dense": {},
    "modern": {
        "n_kv_head": 2, "positions": "rotary", "qk_norm": True, "norm": "rmsnorm", "activation": "swiglu", "bias": False
    },
    "band": {"attention_band": 32},
    "mixture": {"n_experts": 4, "shared_experts": 1, "balance_rate": 0.01},
    "n-grams": {"ngrams": 3},
    "post-norm": {"norm_position": "post", "positions": "sinusoidal"},
}  # fmt: skip


def models(change):
    """Equal models on the CPU and on the device."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"block_size": 128, "vocab_size": 301, "n_layer": 2, "n_head": 4, "n_embd": 64} | change))
    return model, copy.deepcopy(model).to(GPU)


def batch(documents=False):
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(301, (4, 129), generator=draw)
    columns = [tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()]
    return [*columns, (columns[0] < 10).cumsum(1)] if documents else columns


def loss_and_gradients(model, device, dtype="float32", documents=False):
    with autocast(device, dtype):
        loss = model(*(x.to(device) for x in batch(documents)))
    (loss.total / 512 + sum(loss.auxiliary.values())).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.total.item() / 512, gradients


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients(variant, documents):
    on_cpu, on_gpu = models(VARIANTS[variant])
    set_up_device(GPU, "float32")
    expected, actual = (loss_and_gradients(m, d, documents=documents) for m, d in ((on_cpu, CPU), (on_gpu, GPU)))
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        difference = (actual[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-8)
        assert difference < 1e-3, f"{name}: {difference}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
def test_losses_in_lower_precision(dtype):
    on_cpu, on_gpu = models(VARIANTS["modern"])
    expected, actual = (loss_and_gradients(m, d, t)[0] for m, d, t in ((on_cpu, CPU, "float32"), (on_gpu, GPU, dtype)))
    assert actual == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("change", [{}, VARIANTS["modern"], VARIANTS["band"]], ids=str)
@pytest.mark.skipif(REHEARSAL, reason="CPUs have no flash attention for documents")
def test_packed_documents(change):
    on_cpu, on_gpu = models(change)
    tokens, targets, documents = batch(documents=True)
    places = packed(documents)
    assert can_pack(on_gpu.config, GPU, "bfloat16")
    places = places._replace(documents=documents.to(GPU), ends=places.ends.to(GPU))
    with autocast(GPU, "bfloat16"):
        loss = on_gpu(tokens.to(GPU), targets.to(GPU), places).total
    loss.backward()
    assert loss.item() / 512 == pytest.approx(loss_and_gradients(on_cpu, CPU, documents=True)[0], rel=2e-3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in on_gpu.parameters())


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("variant", VARIANTS if not REHEARSAL else ["dense"])
def test_compiled_code(variant, by_block):
    on_cpu, on_gpu = models(VARIANTS[variant])
    example = batch(documents=not REHEARSAL)
    assert compile_in_place(on_gpu, on_gpu, example, GPU, "bfloat16", by_block=by_block) is None
    expected = loss_and_gradients(on_cpu, CPU, documents=not REHEARSAL)[0]
    assert loss_and_gradients(on_gpu, GPU, "bfloat16", not REHEARSAL)[0] == pytest.approx(expected, rel=2e-3)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.skipif(REHEARSAL, reason="CPUs have no CUDA graphs")
def test_cuda_graphs(accumulate):
    losses = {}
    for setting in ("graphs", False):
        _, model = models({})
        if setting:
            assert compile_in_place(model, model, batch(), GPU, "bfloat16", graphs=True) is None
        updater, losses[setting] = Updater(model, TrainingConfig(compile=setting), GPU, "bfloat16"), []
        for _ in range(5):
            total = torch.zeros((), device=GPU)
            for _ in range(accumulate):
                with autocast(GPU, "bfloat16"):
                    loss = model(*(x.to(GPU) for x in batch()))
                updater.backward(loss.total / 512)
                total += loss.total.detach()
            losses[setting].append(updater.update(1e-3, total)[2][0])
    assert losses["graphs"] == pytest.approx(losses[False], rel=2e-3)


@pytest.mark.parametrize("setting", ["selective", True])
def test_activation_checkpointing(setting):
    results = []
    for checkpointing in (False, setting):
        _, model = models(VARIANTS["modern"])
        model.activation_checkpointing = checkpointing
        results.append(loss_and_gradients(model, GPU, "bfloat16"))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    for name, gradient in results[0][1].items():
        assert (results[1][1][name] - gradient).norm() <= 1e-2 * gradient.norm(), name


def test_an_offloaded_optimizer_updates_as_one_on_the_device():
    losses = {False: [], True: []}
    for offload in losses:
        _, model = models({})
        updater = Updater(model, TrainingConfig(offload_optimizer=offload), GPU, "float32")
        for _ in range(10):
            loss = model(*(x.to(GPU) for x in batch())).total
            updater.backward(loss / 512)
            losses[offload].append(updater.update(1e-3, loss.detach())[2][0])
    assert all(x.device == CPU for moments in updater.optimizers["optimizer"].state.values() for x in moments.values())
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_finds_its_loss_scale(optimizer):
    _, model = models({})
    updater = Updater(model, TrainingConfig(optimizer=optimizer), GPU, "float16")
    losses = []
    for _ in range(30):
        with autocast(GPU, "float16"):
            loss = model(*(x.to(GPU) for x in batch()))
        updater.backward(loss.total / 512)
        losses.append(updater.update(1e-3, loss.total.detach())[2][0])
    assert losses[-1] < losses[0] and updater.scaler.get_scale() >= 1


def test_batched_muon():
    draw = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=draw) for shape in [(96, 64), (64, 96), (96, 64)]]
    results = []
    for kind, device in ((torch.optim.Muon, CPU), (BatchedMuon, GPU)):
        matrices = [torch.nn.Parameter(x.to(device)) for x in whole]
        for matrix in matrices:
            matrix.grad = matrix.detach().sin()
        kind(matrices, lr=0.02, momentum=0.95).step()
        results.append([matrix.detach().cpu() for matrix in matrices])
    torch.testing.assert_close(*results, atol=2e-3, rtol=0)


@pytest.mark.parametrize("compile", [False, True] if not REHEARSAL else [False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding(variant, compile):
    on_cpu, on_gpu = (randomised(model) for model in models(VARIANTS[variant]))
    decoder = Decoder(on_gpu)
    decoder.prepare(3, compile)
    prompts = [[1, 2, 3], [4, 5], [6]]
    expected, actual = (
        [step.tokens for step in generate(model, prompts, 20, Sampling(temperature=0.0))] for model in (on_cpu, decoder)
    )
    assert actual == expected


def test_a_run_resumes(workplace, stage_runner):
    flags = [flag for flag in TINY_FLAGS if "device" not in flag] + [f"--device={GPU.type}", "--dtype=float32"]
    flags += ["--compile=False"]
    stage_runner(train, "sums.toml", *flags, "--out_dir=whole")
    stage_runner(train, "sums.toml", *flags, "--max_iters=4", "--lr_decay_iters=8", "--out_dir=halves")
    stage_runner(train, "--resume=halves", "--max_iters=8")
    losses = [[line["train_loss"] for line in read_metrics(Path(run, "metrics.jsonl"))] for run in ("whole", "halves")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
