"""Shared parts of the benchmarks: child processes that take turns, checks of the command line, and figures."""

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing import resource_tracker
from pathlib import Path
from statistics import median
from typing import Any

from pydantic.dataclasses import dataclass

from gpt_arc import hub
from gpt_arc.errors import OUT_OF_MEMORY, UserError, first_line, is_out_of_memory
from gpt_arc.extras import missing_extra
from gpt_arc.files import resource, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Positional, ResultFile, Seed
from gpt_arc.tables import to_json

NANOGPT_SETTINGS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")

# Calls a method of the worker in a child process and returns its result; None: waits until the worker is loaded.
Call = Callable[[str | None], Any]


# ---- settings and checks


@dataclass(frozen=True, config=STRICT)
class ModelBench:
    """Settings of the benchmarks that measure one architecture."""

    model: Positional[str]
    """A config (quickstart, or a .toml file), whose architecture may be changed by flags such as --n_layer=6; or, for
    its architecture alone, a run folder, a model directory, or a published model: gpt2, hf:OWNER/NAME."""
    rounds: Count = 3
    """Measured rounds, after one warm-up round."""
    transformers: bool = False
    """Measure transformers too."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a torch device."""
    seed: Seed = 1337
    """The source of all randomness."""
    json: ResultFile | None = None
    """A file for the results."""


def with_config_file(args: list[str]) -> list[str]:
    """Returns the arguments with the file of the config that the first one names, as for train.py. Raises UserError."""
    if not args or args[0].startswith("-"):
        return args
    from gpt_arc.training.arguments import config_file

    return [config_file(args[0]), *args[1:]]


def config_files(args: Sequence[str]) -> list[str]:
    """The config files among command-line arguments."""
    return [arg for arg in args if arg.endswith(".toml") and not arg.startswith("-")]


def read_model_arguments(cls: type[ModelBench], description: str | None, args: list[str]) -> tuple[Any, Any]:
    """Returns settings of the dataclass `cls` and the config file's architecture, both with the flags applied.

    The architecture is None if the setting `model` names a model instead of a config file.
    """
    name = args[0] if args else ""
    if resource(f"configs/{name}.toml").is_file() and not (hub.is_name(name) or Path(name).exists()):
        args = with_config_file(args)
    files = config_files(args)
    if not files:
        return parse_flags(cls, description, args), None
    from gpt_arc.training.config import build_config, read_settings
    from model import GPTConfig  # imports torch

    default = build_config(read_settings(Path(files[0])), files[0]).model
    arguments = dataclasses.make_dataclass("Arguments", [("settings", cls), ("architecture", GPTConfig)])
    parsed = parse_flags(arguments, description, args, arguments(cls(files[0]), default))
    return parsed.settings, parsed.architecture


def check_requirements(settings: Any, packages: Sequence[str] = ("transformers",)) -> None:
    """Raises UserError if the nanoGPT checkout or a package is missing.

    `packages` are those that the setting `transformers` needs.
    """
    nanogpt = getattr(settings, "nanogpt", None)
    if nanogpt is not None and not (nanogpt / "model.py").is_file():
        raise UserError(f"there is no nanoGPT checkout at {nanogpt}: it has no model.py")
    for package in packages if getattr(settings, "transformers", False) else ():
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package)


def nanogpt_model(checkout: Path, config: Any, dropout: float) -> Any:
    """Returns the model of a nanoGPT checkout, with the sizes of a `GPTConfig`."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in NANOGPT_SETTINGS}, dropout=dropout))


def check_nanogpt_fits(config: Any) -> None:
    """Raises UserError for a `GPTConfig` that nanoGPT can't compute."""
    free = {*NANOGPT_SETTINGS, "rotary_base", "init", "dropout"}
    free |= {"embedding_dropout", "attention_dropout", "residual_dropout"}
    equivalent = {"n_kv_head": config.n_head, "head_size": config.n_embd / config.n_head, "activation": "gelu"}
    equivalent |= {"mlp_size": 4 * config.n_embd}
    for name, value in asdict(config).items():
        if name not in free and value not in (getattr(type(config)(), name), equivalent.get(name)):
            raise UserError(f"nanoGPT only computes GPT-2 and has no {name} = {json.dumps(value)}: leave --nanogpt out")


# ---- measurements inside a process


def peak_memory(device: str) -> int:
    """Peak memory of this process in bytes: GPU memory on a GPU, else resident memory."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac


def synchronized_time(device: Any) -> float:
    """Waits until the device has finished its work; returns the time in seconds."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


# ---- child processes


@contextlib.contextmanager
def reporting(pipe: Any) -> Iterator[None]:
    """Runs the block in a child process: sends errors to the parent, and ends when the parent hangs up or dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    sys.stdout = open(os.devnull, "w")  # nanoGPT prints its parameter count
    from tqdm import tqdm

    # Compilers use tqdm, whose default lock is a semaphore, reported as leaked when the process is killed.
    tqdm.set_lock(threading.RLock())
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:  # another library, a compiler or a driver may raise anything
        known = isinstance(error, UserError) or is_out_of_memory(error)
        message = OUT_OF_MEMORY if is_out_of_memory(error) else first_line(error)
        pipe.send(UserError(message if known else f"{type(error).__name__}: {message}"))


def serve(pipe: Any, worker_class: type, job: Any) -> None:
    """Main loop of a child process: builds the worker, then calls its methods as the parent names them."""
    with reporting(pipe):
        worker = worker_class(job)
        pipe.send(None)
        while True:
            pipe.send(getattr(worker, pipe.recv())())


@contextlib.contextmanager
def child_process(name: str, worker: Any, job: Any, main_loop: Callable = serve) -> Iterator[Call]:
    """Runs `worker`, by default a class built with `job`, in a child process; yields the function that calls it.

    `main_loop`: the child process's main loop. It receives the pipe, `worker` and `job`.
    """
    context = multiprocessing.get_context("spawn")
    pipe, child_end = context.Pipe()
    process = context.Process(target=main_loop, args=(child_end, worker, job), daemon=True)

    def call(method: str | None) -> Any:
        try:
            if method is not None:
                pipe.send(method)
            answer = pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            process.join()
            why = ", perhaps out of memory" if process.exitcode == -signal.SIGKILL else ""
            raise UserError(f"{name}: its process ended with exit code {process.exitcode}{why}") from None
        if isinstance(answer, UserError):
            raise UserError(f"{name}: {answer}")
        return answer

    # A terminal sends Ctrl-C to all processes, and only the parent should act on it. Start multiprocessing's resource
    # tracker before the signal is blocked: starting it later would unblock the signal.
    resource_tracker.ensure_running()
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    grace = 0
    try:
        process.start()
        child_end.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        yield call
        grace = 5
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        pipe.close()  # an idle child ends on this
        if process.pid is not None:
            process.join(grace)
            process.kill()
            process.join()


def take_turns(calls: dict[str, Call], rounds: int, between: Callable[[], Any] = lambda: None) -> tuple:
    """Runs one warm-up round and `rounds` measured ones; in each round every worker takes a turn.

    Returns the results of each worker's rounds by name, and the results of `between`, called after every round.
    """
    from tqdm import tqdm

    for call in calls.values():
        call(None)
    results: dict[str, list] = {name: [] for name in calls}
    between_results = []
    for _ in tqdm(range(1 + rounds), "rounds", leave=False, disable=None):
        for name, call in calls.items():
            results[name].append(call("round"))
        between_results.append(between())
    return results, between_results


# ---- figures


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def round_ratios(rounds: dict[str, list], seconds: Callable[[Any], float]) -> dict[str, dict[str, float]]:
    """Spread of each competitor's time over ours, round by round without the warm-up; `seconds` is a round's time."""
    pairs = {name: list(zip(rounds["ours"], others))[1:] for name, others in rounds.items() if name != "ours"}
    return {name: spread([seconds(b) / seconds(a) for a, b in pair]) for name, pair in pairs.items()}


def ratio_of_medians(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Time of `other` over ours: the ratio of their median rounds, and the extremes over the rounds."""
    extremes = spread([b / a for a, b in zip(ours["rounds"], other["rounds"])])
    return extremes | {"median": other["round_seconds"]["median"] / ours["round_seconds"]["median"]}


def show_ratios(ratios: dict[str, dict[str, float]]) -> None:
    for name, ratio in ratios.items():
        print(f"ratio        {name} takes {ratio['median']:.2f} times as long as ours", end="")
        print(f" ({ratio['min']:.2f} to {ratio['max']:.2f} over the rounds)")


def machine_name(device: Any) -> str:
    import torch

    from gpt_arc.device import device_name

    return f"{device_name(device)}, torch {torch.__version__}"


def json_settings(settings: Any) -> dict[str, Any]:
    """Settings as JSON can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}


def write_results(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        write_file(path.resolve(), to_json(results, indent=2) + "\n")
