"""Models divided among processes (FSDP2), against one process with all of them."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt_arc.errors import UserError
from gpt_arc.training import parallel, parallel_modes
from gpt_arc.training.checkpoints import load_state
from gpt_arc.training.config import LoggingConfig, TrainingConfig
from gpt_arc.training.log import read_metrics
from helpers import ROOT, TINY_FLAGS, command, free_port, trains_into, untimed, write_lines

FLAGS = (
    *TINY_FLAGS,
    "--dtype=float32",
    "--compile=False",
    "--learning_rate=1e-3",
    "--log_interval=1",
    "--grad_clip=0.5",
)
FLAGS += ("--max_iters=20", "--lr_decay_iters=20", "--eval_interval=10", "--batch_size=6", "--eval_iters=3")
ACCUMULATION = ("--batch_size=3", "--gradient_accumulation_steps=4")


@pytest.fixture
def run(workplace, output_of):
    """Returns a function that trains into a folder with some processes and returns the metrics and the final
    tensors. Beside data/sums there is data/lines, whose lines are documents."""
    write_lines(workplace)
    return trains_into(output_of, FLAGS)


def assert_same_run(
    actual: tuple[list[dict], dict],
    expected: tuple[list[dict], dict],
    bound: float = 1e-5,
    figures: tuple[str, ...] = ("train_loss", "val_loss", "grad_norm"),
) -> None:
    assert len(actual[0]) == len(expected[0]) == 20
    for line, expected_line in zip(actual[0], expected[0]):
        for name in figures:
            assert (name in line) == (name in expected_line)
            assert line.get(name, 0) == pytest.approx(expected_line.get(name, 0), rel=bound), (name, line["step"])
    assert actual[1].keys() == expected[1].keys()
    for name, tensor in actual[1].items():
        torch.testing.assert_close(tensor, expected[1][name], rtol=0, atol=3 * bound, msg=name)
    assert any(line["grad_norm"] > 0.5 for line in actual[0]), "clipping isn't tested"


def test_two_shards_train_as_one_process(run):
    """Accumulated gradients, clipped by the norm of all shards; the saved and evaluated model is an average."""
    flags = *ACCUMULATION, "--ema_decay=0.9", "--compare_replicas=True"
    assert_same_run(run("two", *flags, "--parallel=fsdp", processes=2), run("one", *flags))


@pytest.mark.slow
def test_shards_in_the_cpu_s_memory_train_and_resume_to_the_bit(run):
    """The balance of the experts' router is a buffer, which doesn't move there."""
    flags = *ACCUMULATION, *VARIANTS["experts"], "--ema_decay=0.9", "--parallel=fsdp", "--checkpoint_format=sharded"
    plain = run("plain", *flags, processes=2)
    run("offloaded", *flags, "--offload_optimizer=True", "--max_iters=10", processes=2)
    assert_same_run(
        run("offloaded", *flags, "--offload_optimizer=True", "--init_from=resume", processes=2), plain, bound=0.0
    )


VARIANTS = {
    "untied": ("--tied_head=False", "--positions=rotary", "--activation=swiglu", "--norm=rmsnorm", "--qk_norm=True"),
    "documents": (
        "--dataset=lines",
        "--document_mask=True",
        "--activation_checkpointing=True",
        "--reshard_after_forward=False",
    ),
    "ngrams": ("--ngrams=3", "--ngram_rows=100", "--head_bias=True", "--activation_checkpointing=True"),
    "experts": ("--n_experts=4", "--experts_per_token=2", "--mlp_size=16", "--balance_rate=0.01", "--dropout=0.0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_trains_as_in_one_process(run, mode, flags):
    assert_same_run(run("two", *flags, f"--parallel={mode}", processes=2), run("one", *flags))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "flags"), [(3, ()), (4, ("--replicas=2", *ACCUMULATION))])
def test_uneven_shards_and_replicas_of_shards_train_as_one_process(run, processes, flags):
    flags = "--batch_size=12", *flags
    assert_same_run(run("several", *flags, "--parallel=fsdp", processes=processes), run("one", *flags[:1], *flags[2:]))


@pytest.mark.slow
def test_experts_in_four_processes_train_as_in_one(run):
    """Whose loads, exactly even in some steps, move no bias of the routers by the rounding of their mean."""
    flags = "--batch_size=12", *VARIANTS["experts"]
    assert_same_run(run("four", *flags, "--parallel=ddp", processes=4), run("one", *flags))


AS_MUON = {"bound": 2e-3, "figures": ("train_loss", "val_loss")}  # bfloat16, where the order of additions shows


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_muon_trains_as_in_one_process(run, mode):
    flags = "--optimizer=muon", "--ema_decay=0.9", *ACCUMULATION
    assert_same_run(run("two", *flags, f"--parallel={mode}", processes=2), run("one", *flags), **AS_MUON)


IN_FLOAT32 = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.Tensor.bfloat16 = torch.Tensor.float
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_muon_in_float32_trains_as_in_one_process(run, monkeypatch, tmp_path):
    """So nothing but the rounding of Newton and Schulz's iteration, which is in bfloat16, sets processes apart."""
    script = tmp_path / "in_float32.py"
    script.write_text(IN_FLOAT32)
    flags = "--optimizer=muon", *ACCUMULATION
    arguments = str(script), str(ROOT / "train.py"), "sums.toml", *FLAGS, *flags, "--parallel=fsdp", "--out_dir=two"
    result = command(*arguments, processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    two = read_metrics(Path("two/metrics.jsonl")), load_file("two/last/model.safetensors")
    assert_same_run(two, run("one", *flags))


@pytest.mark.slow
def test_matrices_gathered_in_bfloat16_compute_what_autocast_does(run):
    """The first loss is the same; later ones differ by the order of additions in 16 bits."""
    flags = *VARIANTS["experts"], "--qk_norm=True", "--norm=rmsnorm", "--dtype=bfloat16", "--balance_loss=0"
    two, one = run("two", *flags, "--parallel=fsdp", processes=2), run("one", *flags)
    assert two[0][0]["train_loss"] == pytest.approx(one[0][0]["train_loss"], rel=1e-6)
    assert_same_run(two, one, **AS_MUON)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_format", ["whole", "sharded"])
@pytest.mark.parametrize("extra", [(), ("--optimizer=muon", "--ema_decay=0.9")], ids=["adamw", "muon"])
def test_a_run_resumes_in_another_number_of_processes(run, extra, checkpoint_format):
    """From two shards to one process, to two and to three shards, and from one process to two shards."""
    flags = "--batch_size=12", f"--checkpoint_format={checkpoint_format}", "--parallel=fsdp", *extra
    bounds = AS_MUON if extra else {}
    whole = run("whole", *flags)
    for before, after in ((2, 1), (2, 2), (2, 3), (1, 2)):
        folder = f"from-{before}-to-{after}"
        run(folder, *flags, "--max_iters=10", processes=before)
        assert Path(folder, "last/shards").is_dir() == (before > 1 and checkpoint_format == "sharded")
        resumed = run(folder, *flags, "--init_from=resume", processes=after)
        assert_same_run(resumed, whole, **bounds)


@pytest.mark.slow
def test_checkpoints_written_while_training_goes_on_hold_the_same(run):
    """To the bit, except for the order of what a file of safetensors says about itself, which is random."""
    flags = *VARIANTS["experts"], "--ema_decay=0.9", "--parallel=fsdp", "--checkpoint_format=sharded"
    flags += "--eval_interval=3", "--keep_all_checkpoints=True"
    run("sync", *flags, processes=2)
    run("async", *flags, "--async_save", processes=2)
    assert len(list(Path("sync").glob("step-*"))) == 7
    for path in Path("sync").glob("step-*/**/*.safetensors"):
        twin = Path("async", *path.parts[1:])
        assert twin.stat().st_size == path.stat().st_size
        torch.testing.assert_close(load_file(twin), load_file(path), rtol=0, atol=0)
    for folder in Path("sync").glob("step-*"):
        states = [load_state(Path(name, folder.name)) for name in ("sync", "async")]
        assert untimed([states[0]["progress"]]) == untimed([states[1]["progress"]])
        torch.testing.assert_close(*(state["optimizer"]["state"] for state in states), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--parallel=ddp",), ("--parallel=fsdp", "--checkpoint_format=sharded")])
def test_a_killed_process_ends_the_others_and_a_restart_makes_the_same_weights(run, flags):
    flags = *flags, "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=10", "--dropout=0.1"
    undisturbed = run("undisturbed", *flags, processes=2)
    arguments = ROOT / "train.py", "sums.toml", *FLAGS, *flags, "--out_dir=killed", "--init_from=auto"
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen([sys.executable, *arguments], env=environment | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    try:
        deadline = time.monotonic() + 90
        while not Path("killed/last").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes[1].kill()
        assert processes[0].wait(60) not in (0, None)
    finally:
        for process in processes:
            process.kill()
    assert 10 <= int(Path("killed/last").resolve().name.removeprefix("step-")) < 60
    restarted = run("killed", *flags, "--init_from=auto", processes=2)
    assert len(restarted[0]) == 60
    assert all(torch.equal(tensor, undisturbed[1][name]) for name, tensor in restarted[1].items())


SHARDS = """
import copy, os, sys
import torch
from gpt_arc import distributed
from gpt_arc.distributed import IS_MAIN, RANK, WORLD_SIZE
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater
from gpt_arc.training.parallel import REPLICATED
from gpt_arc.training.sharded import Sharded, ShardedMuon
from gpt_arc.nn.meta import meta_device
from model import GPT, GPTConfig

cpu = torch.device("cpu")
with distributed.process_group("gloo", cpu):
    config = GPTConfig(n_layer=3, n_embd=20, n_head=2, vocab_size=19, block_size=8, n_experts=2, expert_interval=3,
                       experts_per_token=1, balance_rate=0.1, balance_loss=0.0, router_z_loss=0.0, head_bias=True)
    torch.manual_seed(0)
    whole = GPT(config)
    if IS_MAIN:
        model = copy.deepcopy(whole)
    else:
        with meta_device():
            model = GPT(config)
    sharded = Sharded(cpu)
    replica = sharded.place(model, cpu)

    def same(exactly):
        gathered = sharded.whole(model)
        if IS_MAIN:
            for (name, x), y in zip(gathered.state_dict().items(), whole.state_dict().values()):
                assert torch.equal(x, y) if exactly else (x - y).abs().max() < 1e-6, name

    same(exactly=True)
    print("equal weights")

    batches = torch.randint(19, (WORLD_SIZE, 2, 9))
    for tokens in batches:
        whole(tokens[:, :-1], tokens[:, 1:].contiguous()).total.backward()
    (replica(batches[RANK, :, :-1], batches[RANK, :, 1:].contiguous()).total * WORLD_SIZE).backward()
    for (name, p), q in zip(model.named_parameters(), whole.parameters()):
        gradient = sharded.gathered(p.grad)
        if IS_MAIN:
            assert (gradient - q.grad).abs().max() <= 1e-5 * q.grad.abs().max(), name
    norm = torch.nn.utils.get_total_norm([q.grad for q in whole.parameters()])
    assert abs(sharded.total_norm([p.grad for p in model.parameters()]) - norm) < 1e-5 * norm
    print("equal gradients")

    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")}
    twins = [dict(whole.named_parameters())[name] for name in matrices]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    muon, expected = ShardedMuon(matrices.values(), **settings), torch.optim.Muon(twins, **settings)
    for step in range(3):
        for p, q in zip(matrices.values(), twins):
            torch.manual_seed(step)
            q.grad = torch.randn(q.shape)
            p.grad = sharded.shard_of(q.grad, p)
        muon.step()
        expected.step()
    same(exactly=False)
    for p, q in zip(matrices.values(), twins):
        assert torch.equal(muon.state[p]["momentum_buffer"].full_tensor(), expected.state[q]["momentum_buffer"])
    print("equal matrices")

    tokens, parameters = batches[0, :, :-1], list(model.parameters())  # the optimizer's
    for _ in range(2):  # the second time with other weights, of which none may be left from the first
        with torch.no_grad(), sharded.evaluating(model):
            logits = replica(tokens)
        expected = whole.eval()(tokens)
        assert (logits - expected).abs().max() < 1e-3  # stale weights would be 0.1 off
        with torch.no_grad():
            for p, q in zip(parameters, whole.parameters()):
                p.add_(0.1)
                q.add_(0.1)
    print("equal outputs")

    frozen = sharded.place_frozen(copy.deepcopy(whole), cpu)
    held = sum(p.to_local().numel() for p in frozen.parameters())
    assert held < 1.2 / WORLD_SIZE * sum(p.numel() for p in whole.parameters())
    assert (frozen.eval()(tokens) - whole(tokens)).abs().max() < 1e-5
    print("equal outputs of shards that aren't trained")

    updater = Updater(model, TrainingConfig(), cpu, "float32", sharded)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    if RANK == 1:
        parameters[0].grad.to_local()[0] = torch.nan
    before = [p.detach().to_local().clone() for p in parameters]
    assert not updater.update(1e-3, torch.tensor(1.0))[0]
    assert all(torch.equal(p.to_local(), x) for p, x in zip(parameters, before))
    print("skipped by all")

    assert REPLICATED.differing(whole.parameters()) == sharded.differing(parameters) == []
    if RANK == WORLD_SIZE - 1:
        whole.final_norm.weight.data.view(torch.int32)[3] ^= 1 << 20
    assert REPLICATED.differing(whole.parameters()) == [WORLD_SIZE - 1]
    print("found the flipped bit")
sys.stdout.flush()
os._exit(0)  # as scripts end
"""


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shards_add_up_to_the_model(tmp_path, processes):
    """Initial weights to the bit, gradients, Muon's updates, and outputs after an update; uneven among three.

    A gradient that isn't finite in one process is skipped by all, and a bit that flips in one replica is found.
    """
    script = tmp_path / "shards.py"
    script.write_text(SHARDS)
    result = command(str(script), processes=processes)
    assert result.returncode == 0 and result.stdout.count("equal") == 5 * processes, result.stdout + result.stderr
    assert result.stdout.count("skipped by all") == result.stdout.count("flipped bit") == processes


def test_impossible_divisions_are_refused(monkeypatch):
    for module in (parallel, parallel_modes):
        monkeypatch.setattr(module, "WORLD_SIZE", 4)
    sharded = TrainingConfig(parallel="fsdp")
    parallel_modes.check_parallel(sharded)
    parallel_modes.check_parallel(dataclasses.replace(sharded, replicas=2))
    with pytest.raises(UserError, match="replicas = 3 does not divide the number of processes, 4"):
        parallel_modes.check_parallel(dataclasses.replace(sharded, replicas=3))
    parallel_modes.check_parallel(dataclasses.replace(sharded, replicas=3), devices=6)
    with pytest.raises(UserError, match="replicas = 4 does not divide devices = 6"):
        parallel_modes.check_parallel(dataclasses.replace(sharded, replicas=4), devices=6)
    monkeypatch.setattr(parallel, "WORLD_SIZE", 1)
    with pytest.raises(UserError, match="the number of processes, 1: start 2 with .*, or set replicas = 1"):
        parallel_modes.check_parallel(dataclasses.replace(sharded, replicas=2))
    with pytest.raises(UserError, match="is for one process, and torchrun started 4"):
        parallel_modes.check_parallel(TrainingConfig(parallel="none"))
    with pytest.raises(ValueError, match="leave out expert_processes"):
        TrainingConfig(parallel="fsdp", expert_processes=2)
    with pytest.raises(ValueError, match="async_save needs parallel = fsdp and checkpoint_format = sharded"):
        TrainingConfig(parallel="fsdp", async_save=True)
    with pytest.raises(ValueError, match="keep_all_checkpoints contradicts keep_checkpoints = 2: choose one"):
        LoggingConfig(keep_all_checkpoints=True, keep_checkpoints=2)
    with pytest.raises(ValueError, match="replicas = 2 is for parallel = fsdp"):
        TrainingConfig(replicas=2)
