"""Measurements on the fake device, in a process of their own: see `build.measure`.

Each function takes and returns what JSON can hold.
"""

import gc
import importlib
import json
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from fake_gpu import device

IMPORTED = """
torch torch._dynamo torch._inductor.compile_fx torch.nn.attention.flex_attention pydantic.dataclasses model
""".split()
compiler: Any = None  # a `Compiler`, where kernels count


def compile_step(model: Any) -> None:
    """Compiles as training does: by inductor, or where kernels don't count up to what inductor would be given."""
    model.compile(**({} if compiler else {"backend": "aot_eager"}))


def compilations() -> dict[str, int]:
    import torch

    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def count_updates(run: Any) -> list[dict[str, Any]]:
    """Calls `run`; returns each update's waits by line and operators, and the graphs and breaks up to its end."""
    from fake_gpu.counting import FakeDevice
    from gpt_arc.training.optim import Updater

    Updater.finite = lambda *args: True
    updates, update = [], Updater.update

    def counted(*args: Any) -> Any:
        result = update(*args)
        updates.append({"waits": dict(fake.waits), "operators": dict(fake.operators), **compilations()})
        fake.waits.clear()
        fake.operators.clear()
        return result

    Updater.update = counted
    with FakeDevice() as fake:
        run()
    return updates


def train(*flags: str) -> list[dict[str, Any]]:
    """The updates of train.py with these flags."""
    import train
    from gpt_arc.device import resolve_device
    from gpt_arc.training.command_line import read_command_line
    from gpt_arc.training.plan import make_plan
    from model import GPT

    train.save_checkpoint = lambda *args: None
    compile = GPT.compile
    GPT.compile = lambda model: compile(model, backend="aot_eager")
    launch = read_command_line(["sums.toml", *flags], None)
    return count_updates(lambda: train.train(train.build(make_plan(launch, resolve_device("cuda")))))


def step(
    config: dict[str, Any], rows: int, training: dict[str, Any] | None = None, kind: str = "text"
) -> dict[str, Any]:
    """An update of a model of steps.py on `rows` sequences: graphs, memory and, by inductor, kernels.

    For a model that train.py trains also the memory that a run's plan estimates.
    """
    import torch

    from fake_gpu import steps
    from fake_gpu.counting import FakeDevice
    from gpt_arc.device import autocast
    from gpt_arc.planning.cost import memory_estimate
    from gpt_arc.training.config import TrainingConfig
    from gpt_arc.training.optim import Updater
    from model import GPT

    settings = TrainingConfig(**{"dtype": "bfloat16"} | (training or {}))
    dtype, gpu = settings.dtype, torch.device("cuda", 0)
    with FakeDevice() as fake:
        with gpu:
            model, loss_of, tokens = getattr(steps, kind)(config, rows, settings)
        compile_step(model)
        updater = Updater(model, settings, gpu, dtype)
        peaks = {}
        for _ in range(2):
            start_counting(fake)
            with autocast(gpu, dtype):
                loss = loss_of()
            peaks["forward"], fake.peak = fake.peak, fake.allocated
            updater.backward(loss)
            peaks["backward"], counts = fake.peak, counted(fake)
            updater.update(1e-3, loss.detach())
            peaks["update"] = fake.peak
        estimate = None
        if isinstance(model, GPT):
            estimate = memory_estimate(
                model, rows, dtype, "cuda", settings.activation_checkpointing, compiled=True,
                offloaded=settings.offload_optimizer, averaged=settings.ema_decay is not None,
            )  # fmt: skip
    update = {"waits": dict(fake.waits), "copied": dict(fake.copied), "peak": max(peaks.values()), "estimate": estimate}
    parameters = sum(p.numel() for p in model.parameters())
    if compiler and compiler.assembles:
        counts["spills"] = compiler.spills()
    return {**compilations(), "parameters": parameters, "tokens": tokens, **peaks, **update, **counts}


def parallel(config: dict[str, Any], training: dict[str, Any], rows: int) -> dict[str, Any]:
    """The third update in one of several processes: graphs, breaks, waits, copies and collectives.

    Of each bucket of DDP its bytes, and the share of the backward pass's operators that run before it is sent.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed._tools import fake_collectives  # noqa: F401  gives fake tensors collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from fake_gpu.counting import FakeDevice
    from gpt_arc.device import autocast
    from gpt_arc.distributed import WORLD_SIZE
    from gpt_arc.training import parallel as replicated
    from gpt_arc.training.config import TrainingConfig
    from gpt_arc.training.optim import Updater
    from gpt_arc.training.parallel_modes import make_parallel
    from model import GPT, GPTConfig

    gpu, settings = torch.device("cuda", 0), TrainingConfig(**{"dtype": "bfloat16"} | training)
    buckets: list[tuple[int, int]] = []  # bytes, and operators run before they are sent

    def record(bucket: dist.GradBucket, process_group: Any) -> torch.futures.Future:
        buckets.append((bucket.buffer().nbytes, sum(fake.operators.values())))
        summed = torch.futures.Future()
        summed.set_result(bucket.buffer())
        return summed

    replicated.allreduce_hook = record
    for name in ("_verify_param_shape_across_processes", "_sync_module_states"):  # read numbers
        setattr(torch.nn.parallel.distributed, name, lambda *args, **kwargs: None)
    limits, assign = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 << 20], dist._compute_bucket_assignment_by_size
    dist._compute_bucket_assignment_by_size = lambda tensors, _, *more: assign(tensors, limits, *more)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    mode = make_parallel(settings, gpu, settings.dtype)
    with FakeDevice() as fake:
        model = GPT(GPTConfig(**config))
        replica = mode.place(model, gpu)
        if not mode.is_sharded:
            replica.reducer = Reducer(replica.reducer)
            replica.logger = types.SimpleNamespace(set_runtime_stats_and_log=lambda: None)  # times the device
        for part in model.blocks if mode.is_sharded else (model,):
            compile_step(part)
        updater = Updater(model, settings, gpu, settings.dtype, mode)
        tokens = [torch.zeros(rows, model.config.block_size, dtype=torch.int64, device=gpu) for _ in range(2)]
        for _ in range(3):
            start_counting(fake)
            buckets.clear()
            with mode.sharing_gradients(replica, True):
                with autocast(gpu, settings.dtype):
                    loss = replica(*tokens)
                forward = sum(fake.operators.values())
                updater.backward(loss.total)
                both = sum(fake.operators.values())
            updater.update(1e-3, loss.total.detach())
    return {
        **compilations(),
        "parameters": model.num_parameters(),
        "buckets": [(size, (before - forward) / (both - forward)) for size, before in buckets],
        "collectives": {name: n for name, n in fake.operators.items() if "c10d" in name},
        "waits": dict(fake.waits),
        "copied": dict(fake.copied),
    }


class Reducer:
    """A Reducer of DistributedDataParallel that keeps its first buckets: the code that makes others reads numbers."""

    def __init__(self, reducer: Any):
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def graphs(config: dict[str, Any], checkpointing: bool | str = False) -> dict[str, Any]:
    """Two updates of `compile = "graphs"`: how often a pass is handed to a CUDA graph, and the reasons not to."""
    import torch
    from torch._inductor import cudagraph_trees

    from fake_gpu.counting import FakeDevice
    from gpt_arc.training.compile import compile_in_place
    from gpt_arc.training.config import TrainingConfig
    from gpt_arc.training.optim import Updater
    from model import GPT, GPTConfig

    handed, gpu = [], torch.device("cuda", 0)
    cudagraph_trees.cudagraphify_impl = lambda passed, *args, **settings: handed.append(1) or passed
    with FakeDevice() as fake:
        with gpu:
            model = GPT(GPTConfig(**config))
        model.activation_checkpointing = checkpointing
        batch = [torch.zeros(2, model.config.block_size, dtype=torch.int64, device=gpu) for _ in range(2)]
        failure = compile_in_place(model, model, batch, gpu, "bfloat16", graphs=True)
        updater = Updater(model, TrainingConfig(compile="graphs"), gpu, "bfloat16")
        fake.waits.clear()
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(*batch)
            updater.backward(loss.total)
            updater.update(1e-3, loss.total.detach())
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return {"failure": failure, "handed": len(handed), "skipped": skipped, "waits": dict(fake.waits), **compilations()}


def stage(name: str, *flags: str) -> list[dict[str, Any]]:
    """The updates of stages/NAME.py with these flags."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from gpt_arc.training import stage_run
    from gpt_arc.weights import directory

    load = directory.load_model

    def load_model(*args: Any, **settings: Any) -> Any:
        with unset_fake_temporarily():
            return load(*args, **settings)

    directory.load_model = load_model
    module = importlib.import_module(f"stages.{name}")
    stage_run.save_checkpoint = lambda *args, **settings: None
    compile = torch.compile
    torch.compile = lambda function, mode, **settings: compile(function, backend="aot_eager", **settings)
    sys.argv = [f"{name}.py", *flags, "--device=cuda"]
    return count_updates(module.main)


def peer(name: str, checkout: str, layers: int, rows: int) -> dict[str, Any]:
    """Forward and backward pass of another trainer's model on `rows` sequences of 1,024 tokens: memory and kernels."""
    import torch

    from fake_gpu import peers
    from fake_gpu.counting import FakeDevice

    with FakeDevice() as fake:
        with torch.device("cuda"):
            model, loss_of = getattr(peers, name)(Path(checkout), layers)
            tokens = [torch.zeros(rows, 1024, dtype=torch.int64) for _ in range(2)]
        compile_step(model)
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            start_counting(fake)
            with torch.autocast("cuda", torch.bfloat16, enabled=name != "nanochat"):  # which casts by itself
                loss = loss_of(*tokens)
            loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    return {**compilations(), "parameters": parameters, "peak": fake.peak, **counted(fake)}


def start_counting(fake: Any) -> None:
    fake.peak, fake.moved = fake.allocated, 0
    for counter in (fake.operators, fake.waits, fake.copied):
        counter.clear()
    if compiler:
        compiler.bytes = 0
        compiler.launches.clear()


def counted(fake: Any) -> dict[str, Any]:
    """What has been launched since `start_counting`, and the bytes that it reads and writes; {} without a compiler."""
    if not compiler:
        return {}
    return {
        "kernels": len(compiler.kernels),
        "launches": sum(compiler.launches.values()) + sum(fake.operators.values()),
        "operators": dict(fake.operators),
        "bytes": compiler.bytes + fake.moved,
        "fused_bytes": compiler.bytes,  # of inductor's kernels, which wait for memory alone
    }


def decode(config: dict[str, Any], rows: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """The waits by line of the third token that `rows` prompts are continued by, and its largest allocation."""
    import torch

    from fake_gpu.counting import FakeDevice
    from gpt_arc.decoding.decoder import Decoder
    from gpt_arc.decoding.generate import generate
    from gpt_arc.decoding.settings import Sampling
    from model import GPT, GPTConfig

    with FakeDevice() as fake:
        with torch.device("cuda"):
            model = GPT(GPTConfig(**config)).eval().to(torch.bfloat16)
        decoder = Decoder(model)
        prompts = [[1, 2, 3, row + 4] * 50 for row in range(rows)]
        steps = generate(decoder, prompts, 8, Sampling(**sampling))
        for _ in range(3):
            fake.waits.clear()
            fake.largest = 0
            next(steps)
    return {"waits": dict(fake.waits), "largest": fake.largest, "keys": decoder.cache[0].keys.nbytes}


def norm() -> dict[str, int]:
    """The operators of an RMSNorm of 16-bit numbers under autocast."""
    import torch

    from fake_gpu.counting import FakeDevice
    from gpt_arc.device import autocast
    from model import RMSNorm

    with FakeDevice() as fake, autocast(gpu := torch.device("cuda", 0), "bfloat16"):
        RMSNorm(8, device=gpu)(torch.ones(3, 8, dtype=torch.bfloat16, device=gpu))
    return dict(fake.operators)


def choose(target: int, kernels: str, triton: Path) -> None:
    """Makes the device a GPU of capability `target`."""
    global compiler
    from fake_gpu import attention

    gpu = device.choose(target)
    attention.install()
    if kernels != "none":
        from fake_gpu.compiler import Compiler

        compiler = Compiler(gpu, triton, assembles=kernels == "assembled")


def warm_up() -> None:
    """Compiles a small model, so that the compiler's tables are there for every fork.

    Only the forward pass: after a backward pass autograd has threads, and a fork has none of them.
    """
    import torch
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.utils import is_big_gpu
    from torch.utils import _triton

    from fake_gpu.counting import FakeDevice
    from model import GPT, GPTConfig

    with FakeDevice(), torch.no_grad():
        with torch.device("cuda", 0):
            model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=32, vocab_size=300))
            tokens = torch.zeros(2, 32, dtype=torch.int64)
        compile_step(model)
        model(tokens, tokens)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for function in (DeviceProperties.create, is_big_gpu, *vars(_triton).values()):  # what the next GPU may differ in
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def run(name: str, arguments: str, target: int, kernels: str, triton: Path) -> str:
    """Calls the function `name` on a GPU of capability `target`. Arguments and result are JSON."""
    choose(target, kernels, triton)
    return json.dumps(globals()[name](*json.loads(arguments)))


def main() -> None:
    """Forks for each request, a line of JSON on standard input, and answers with the fork's exit code.

    So a measurement doesn't take the seconds in which Python imports torch and the compiler fills its tables.
    """
    global compiler
    library, triton = sys.argv[1:]
    sys.path += [triton] * bool(triton)
    device.install(Path(library))
    for module in IMPORTED:
        importlib.import_module(module)
    choose(90, "counted" if triton else "none", Path(triton))
    warm_up()
    compiler = None
    assert "gpt_arc.distributed" not in sys.modules  # which reads the environment of each process
    gc.disable()  # looking for cycles would take a tenth of a measurement, whose process ends soon
    gc.freeze()  # otherwise a fork would visit all objects at its end, and so copy their pages
    for line in sys.stdin:
        *what, folder, environment, files = json.loads(line)
        if pid := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), files, flush=True)
            continue
        output = os.open(Path(files, "output"), os.O_CREAT | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(folder)
        os.environ.update(environment)
        code = 1
        try:
            Path(files, "result").write_text(run(*what, Path(triton)))
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
