"""Programs that are measured against each other, each in a process of its own."""

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

from gpt_arc.errors import OUT_OF_MEMORY, UserError, first_line, is_out_of_memory
from gpt_arc.flags import parse_flags

NANOGPT_SETTINGS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")


def nanogpt_model(checkout: Path, config: Any, dropout: float) -> Any:
    """The model of a nanoGPT checkout, of the sizes of a `GPTConfig`."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in NANOGPT_SETTINGS}, dropout=dropout))


def check_nanogpt_fits(config: Any) -> None:
    """Raises UserError for a `GPTConfig` that nanoGPT can't compute."""
    free = {*NANOGPT_SETTINGS, "rotary_base", "init", "dropout"}
    free |= {"embedding_dropout", "attention_dropout", "residual_dropout"}
    also = {"n_kv_head": config.n_head, "head_size": config.n_embd / config.n_head, "mlp_size": 4 * config.n_embd}
    also |= {"activation": "gelu"}
    for name, value in asdict(config).items():
        if name not in free and value not in (getattr(type(config)(), name), also.get(name)):
            raise UserError(f"nanoGPT is GPT-2 alone and has no {name} = {json.dumps(value)}: leave --nanogpt out")


def read_model_arguments(cls: type, description: str, args: list[str]) -> tuple[Any, Any]:
    """The settings, of the dataclass `cls`, and for a config file its architecture, with the flags over it.

    `cls` has a positional `model` first, which names the config file or a model.
    """
    files = [arg for arg in args if arg.endswith(".toml") and not arg.startswith("-")]
    if not files:
        return parse_flags(cls, description, args), None
    from gpt_arc.training.config import build_config, read_settings
    from model import GPTConfig  # whose import takes torch

    default = build_config(read_settings(Path(files[0])), files[0]).model
    both = dataclasses.make_dataclass("Both", [("settings", cls), ("architecture", GPTConfig)])
    parsed = parse_flags(both, description, args, both(cls(files[0]), default))
    return parsed.settings, parsed.architecture


def plain(settings: Any) -> dict[str, Any]:
    """The settings as JSON has them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}


def check_places(settings: Any, packages: Sequence[str] = ("transformers",)) -> None:
    """Raises UserError where one of the settings nanogpt, transformers and json names what is not there.

    `packages` are what the setting transformers takes.
    """
    nanogpt = getattr(settings, "nanogpt", None)
    if nanogpt is not None and not (nanogpt / "model.py").is_file():
        raise UserError(f"there is no nanoGPT checkout at {nanogpt}: it has no model.py")
    for package in packages if getattr(settings, "transformers", False) else ():
        if importlib.util.find_spec(package) is None:
            raise UserError(f'{package} is not installed: pip install -e ".[dev]"')
    refused = settings.json is not None and settings.json.exists() and not settings.json.is_file()
    if settings.json is not None and (refused or not settings.json.parent.is_dir()):
        raise UserError(f"{settings.json} can't be written: name a file in a folder that is there")


def peak_memory(device: str) -> int:
    """The most bytes that this process has held: of the GPU's memory where it has one, else of the machine's."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes, on a Mac


def now(device: Any) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def reporting(pipe: Any) -> Iterator[None]:
    """In which a process ends when the parent hangs up or dies, and tells it of what goes wrong."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    sys.stdout = open(os.devnull, "w")  # nanoGPT counts its parameters there
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # compilers use its own, which a process that is killed is said to leak
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:  # whatever another program, a compiler or a driver may raise
        known = isinstance(error, UserError) or is_out_of_memory(error)
        said = OUT_OF_MEMORY if is_out_of_memory(error) else first_line(error)
        pipe.send(UserError(said if known else f"{type(error).__name__}: {said}"))


def serve(pipe: Any, program: type, job: Any) -> None:
    """The life of a process: load, then call the methods it is asked for."""
    with reporting(pipe):
        loaded = program(job)
        pipe.send(None)
        while True:
            pipe.send(getattr(loaded, pipe.recv())())


@contextlib.contextmanager
def running(name: str, program: Any, job: Any, live: Callable = serve) -> Iterator[Callable[[str | None], Any]]:
    """A process with `program`; yields what asks it for the result of one of its methods, first None: to be loaded.

    `live` is another life that answers as often as it is asked.
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=live, args=(theirs, program, job), daemon=True)

    def ask(method: str | None) -> Any:
        try:
            if method is not None:
                pipe.send(method)
            answer = pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            process.join()
            why = ", for want of memory perhaps" if process.exitcode == -signal.SIGKILL else ""
            raise UserError(f"{name}: its process ended ({process.exitcode}){why}") from None
        if isinstance(answer, UserError):
            raise UserError(f"{name}: {answer}")
        return answer

    # A terminal's Ctrl-C comes to all processes and is for the parent to act on. The tracker is multiprocessing's own;
    # started only now, it would let the signal through again.
    resource_tracker.ensure_running()
    allowed = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    grace = 0
    try:
        process.start()
        theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
        yield ask
        grace = 5
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
        pipe.close()  # upon which an idle one ends
        if process.pid is not None:
            process.join(grace)
            process.kill()
            process.join()


def take_turns(
    ask: dict[str, Callable[[str | None], Any]], rounds: int, between: Callable[[], Any] = lambda: None
) -> tuple:
    """Load the programs, then let them take turns in one round that warms up and `rounds` more.

    Returns what the rounds of each program gave, and what `between` did, which is called after every round.
    """
    from tqdm import tqdm

    for load in ask.values():
        load(None)
    taken: dict[str, list] = {name: [] for name in ask}
    found = []
    for _ in tqdm(range(1 + rounds), "rounds", leave=False, disable=None):
        for name in ask:
            taken[name].append(ask[name]("round"))
        found.append(between())
    return taken, found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def show_ratios(ratios: dict[str, dict[str, float]]) -> None:
    """How much longer each other program takes: the `spread` over the rounds."""
    for name, ratio in ratios.items():
        print(f"ratio        {name} takes {ratio['median']:.2f} times as long as ours", end="")
        print(f" ({ratio['min']:.2f} to {ratio['max']:.2f} over the rounds)")
