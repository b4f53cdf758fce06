"""The training part of tools/bench.py: optimizer steps of train.py's own parts, beside other programs'.

    python tools/bench.py train configs/gpt2.toml --batch_size=1 --nanogpt=../nanoGPT --transformers=True
    python tools/bench.py train configs/tinyshakespeare.toml --batch_size=16 --dropout=0 --compile=True

It takes train.py's settings of the model, the batch and the training. A step is one batch of batch_size random
sequences: reading them, forward, backward, update. Each program has a process of its own, and they take turns, round by
round:

- ours: model, data, loss scaling and update as train.py puts them together.
- nanoGPT, from your checkout, as its train.py does on a CPU: float32; and once more under autocast, if ours is.
- transformers: its model of the architecture, autocast as ours, with torch's fused AdamW, its Trainer's default.

The others are handed random batches and read nothing. The floor is 6 FLOPs a parameter and token, of experts those that
a token takes, attention not counted, over the rate of products of two 1024 x 1024 matrices between the rounds.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from pydantic.dataclasses import dataclass

from benchmarks.processes import (
    check_nanogpt_fits,
    check_places,
    nanogpt_model,
    now,
    peak_memory,
    plain,
    running,
    show_ratios,
    spread,
    take_turns,
)
from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT
from gpt_arc.training.config import Config, DataConfig, TrainingConfig, build_config, read_settings

PHASES = ("data", "forward", "backward", "update")
TOP_OPERATORS = 14


@dataclass(frozen=True, config=STRICT)
class StepBench:
    """What is asked of every measurement of optimizer steps."""

    rounds: int = 3
    """Rounds that are measured, after one that warms up."""
    steps: int = 5
    """Optimizer steps of a program in a round."""
    transformers: bool = False
    """Measure transformers too."""
    profile: bool = False
    """Show where the time of our steps goes, by torch's operators."""
    json: Path | None = None
    """A file for the results."""

    def __post_init__(self):
        for name in ("rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be 1 or more")


@dataclass(frozen=True, config=STRICT)
class TrainBench(StepBench):
    nanogpt: Path | None = None
    """A checkout of nanoGPT, the folder with its model.py, to measure too."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process needs to know."""

    settings: StepBench
    config: Config
    device: str
    dtype: str
    compile: bool


class Round(NamedTuple):
    steps: list[list[float]]  # seconds of each step's PHASES
    losses: list[float]  # in nats a token, with those of routers
    peak: int  # bytes of memory, so far


class Program:
    """Steps of a model; what is its own is in `setup`, `forward`, `backward` and `update`."""

    def __init__(self, job: Job):
        import torch

        self.job, self.device = job, torch.device(job.device)
        self.shape = job.config.data.batch_size, job.config.model.block_size
        torch.manual_seed(job.config.training.seed)
        self.setup()

    def next_batch(self) -> Sequence[Any]:
        import torch

        tokens = torch.randint(self.job.config.model.vocab_size, (self.shape[0], self.shape[1] + 1))
        return tokens[:, :-1].contiguous().to(self.device), tokens[:, 1:].contiguous().to(self.device)

    def round(self) -> Round:
        seconds, losses = [], []
        for _ in range(self.job.settings.steps):
            times = [now(self.device)]
            batch = self.next_batch()
            times.append(now(self.device))
            loss = self.forward(*batch)  # mean, in nats
            times.append(now(self.device))
            self.backward(loss)
            times.append(now(self.device))
            self.update(loss)
            losses.append(loss.item())
            times.append(now(self.device))
            seconds.append([b - a for a, b in zip(times, times[1:])])
        return Round(seconds, losses, peak_memory(self.job.device))

    def operators(self) -> list[dict[str, Any]]:
        """Where the time of a round goes, the most expensive operators first; on a GPU the time of its kernels."""
        from torch.profiler import profile

        with profile() as profiled:
            self.round()
        time_of = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        found = [(event.key, getattr(event, time_of), event.count) for event in profiled.key_averages()]
        whole, steps = sum(time for _, time, _ in found), self.job.settings.steps
        found = sorted(found, key=lambda operator: -operator[1])[:TOP_OPERATORS]
        return [
            {"name": name, "share": time / whole, "ms": time / steps / 1000, "calls": calls / steps}
            for name, time, calls in found
        ]


class Ours(Program):
    def setup(self) -> None:
        import torch

        from gpt_arc.data.batches import prefetch, training_batches
        from gpt_arc.data.order import TrainingOrder
        from gpt_arc.device import autocast, set_up_device, to_device
        from gpt_arc.training.compile import compile_in_place
        from gpt_arc.training.optim import Updater
        from gpt_arc.training.routers import RouterMeter
        from gpt_arc.training.schedule import learning_rate_at
        from model import GPT

        config = self.job.config
        set_up_device(self.device, self.job.dtype)
        self.model = GPT(config.model).to(self.device)
        self.model.activation_checkpointing = config.training.activation_checkpointing
        if self.job.compile:
            tokens = torch.zeros(self.shape, dtype=torch.int64)
            failure = compile_in_place(self.model, self.model, [tokens, tokens], self.device, self.job.dtype)
            if failure:
                raise UserError(f"the model can't be compiled here: {failure}")
        self.routers = RouterMeter(self.model)
        self.updater = Updater(self.model, config.training, self.device, self.job.dtype)
        self.learning_rate = learning_rate_at(0, config.training)
        self.autocast = lambda: autocast(self.device, self.job.dtype)
        tokens = RandomTokens(config.model.vocab_size)
        order = TrainingOrder(tokens.COUNT, config.model.block_size, config.training.seed)
        size = config.data.batch_size
        batches = training_batches(tokens, order, 0, size, size, config.model.block_size)
        self.batches = prefetch(batches, self.device)
        self.to_device = to_device

    def next_batch(self) -> Sequence[Any]:
        return self.to_device(next(self.batches), self.device)

    def forward(self, tokens: Any, targets: Any) -> Any:
        with self.autocast():
            loss = self.model(tokens, targets)
        return loss.total / targets.numel() + sum(loss.auxiliary.values())

    def backward(self, loss: Any) -> None:
        self.updater.backward(loss)
        self.routers.add()

    def update(self, loss: Any) -> None:
        made, *_ = self.updater.update(self.learning_rate, loss.detach())
        self.routers.step(made)


class RandomTokens:
    """Stands in for a split of token files."""

    COUNT, separator = 1 << 22, None

    def __init__(self, vocab_size: int):
        self.tokens = np.random.default_rng(0).integers(vocab_size, size=self.COUNT, dtype=np.uint16)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]


class Peer(Program):
    """Another program's model and optimizer, in a plain loop."""

    dtype = "float32"

    def forward(self, tokens: Any, targets: Any) -> Any:
        from gpt_arc.device import autocast

        with autocast(self.device, self.dtype):
            return self.loss(tokens, targets)

    def backward(self, loss: Any) -> None:
        loss.backward()

    def update(self, loss: Any) -> None:
        import torch

        if self.job.config.training.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.job.config.training.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class NanoGPT(Peer):
    def setup(self) -> None:
        training, config = self.job.config.training, self.job.config.model
        self.model = nanogpt_model(self.job.settings.nanogpt, config, config.dropout).to(self.device)
        betas = training.beta1, training.beta2
        self.optimizer = self.model.configure_optimizers(
            training.weight_decay, training.learning_rate, betas, self.device.type
        )

    def loss(self, tokens: Any, targets: Any) -> Any:
        return self.model(tokens, targets)[1]


class NanoGPTAutocast(NanoGPT):
    def setup(self) -> None:
        super().setup()
        self.dtype = self.job.dtype


class Transformers(Peer):
    def setup(self) -> None:
        import torch
        import transformers

        from gpt_arc.weights.huggingface import hf_config

        self.dtype = self.job.dtype
        transformers.logging.set_verbosity_error()  # or it tells of its own default loss
        content = hf_config(self.job.config.model, "float32")
        if "output_router_logits" in content:  # without them it leaves its loss of routers out
            content["output_router_logits"] = content["router_aux_loss_coef"] > 0
        config = transformers.AutoConfig.for_model(**content)
        self.model = transformers.AutoModelForCausalLM.from_config(config).to(self.device).train()
        learning_rate = self.job.config.training.learning_rate
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, fused=True)

    def loss(self, tokens: Any, targets: Any) -> Any:
        return self.model(tokens, labels=tokens).loss


def read_arguments(args: list[str], cls: type, description: str, example: str) -> tuple[Any, Config]:
    """The settings, of the dataclass `cls`, and train.py's of the config file, with the flags over both."""
    files = [arg for arg in args if arg.endswith(".toml") and not arg.startswith("-")]
    if len(files) != 1 and not {"-h", "--help"} & set(args):
        raise UserError(f"name one config file: python tools/bench.py {example}")
    from model import GPTConfig  # whose import takes torch

    default = build_config(read_settings(Path(files[0])), files[0]) if files else Config()
    both = dataclasses.make_dataclass(
        "Both", [("settings", cls), ("model", GPTConfig), ("data", DataConfig), ("training", TrainingConfig)]
    )
    data = dataclasses.replace(default.data, tokens_per_step=None, gradient_accumulation_steps=None)
    defaults = both(cls(), default.model, data, default.training)
    parsed = parse_flags(both, description, [arg for arg in args if arg not in files], defaults)
    return parsed.settings, Config(parsed.model, parsed.data, parsed.training)


def figures(tokens: int, warmup: Round, *rounds: Round) -> dict[str, Any]:
    """What the rounds of one program come to; medians are over all steps of all of them."""
    steps = [step for round in rounds for step in round.steps]
    seconds = spread([sum(step) for step in steps])
    return {
        "tokens_per_second": tokens / seconds["median"],
        "step_ms": {name: 1000 * value for name, value in seconds.items()},
        "phases_ms": {name: 1000 * median(step[i] for step in steps) for i, name in enumerate(PHASES)},
        "peak_memory_gb": max(round.peak for round in rounds) / 1e9,
        "warmup_seconds": sum(map(sum, warmup.steps)),
        "first_step_seconds": sum(warmup.steps[0]),
        "losses": [loss for round in (warmup, *rounds) for loss in round.losses],
    }


def show(results: dict[str, Any]) -> None:
    columns = ["tokens/s", "step ms", "least ms", "most ms", *(f"{name} ms" for name in PHASES), "memory GB"]
    width = max(14, *(len(name) + 1 for name in results["programs"]))
    print("\n" + " " * width + "".join(f"{column:>12}" for column in columns))
    for name, row in results["programs"].items():
        step, phases = row["step_ms"], row["phases_ms"]
        numbers = [step["median"], step["min"], step["max"], *(phases[phase] for phase in PHASES)]
        print(
            f"{name:{width}}{row['tokens_per_second']:12,.0f}" + "".join(f"{number:12,.1f}" for number in numbers),
            end="",
        )
        print(f"{row['peak_memory_gb']:12.2f}")
    print(f"\nfirst step   {results['programs']['ours']['first_step_seconds']:.1f} s of ours, compilation included")
    show_ratios(results["ratios"])
    floor = results["floor"]
    if floor["flops_per_second"] is not None:
        rate = f"{floor['flops_per_second'] / 1e9:,.0f} GFLOP/s of {results['dtype']} products"
        print(f"floor        {floor['tokens_per_second']:,.0f} tokens/s at {rate}", end="")
        print(f"; ours reaches {floor['share']:.0%} of it")
    if results["operators"]:
        print("\noperators of ours, a step:    share          ms       calls")
    for row in results["operators"]:
        print(f"{row['name'][:28]:28}{row['share']:7.1%}{row['ms']:12,.2f}{row['calls']:12,.0f}")


def median_step(round: Round) -> float:
    return median(map(sum, round.steps))


def prepare(settings: StepBench, config: Config) -> Job:
    """Our job on this machine, told on the screen. Raises UserError for a config whose steps can't be measured."""
    import torch

    from gpt_arc.device import resolve_device, resolve_dtype
    from gpt_arc.planning.cost import describe_parameters
    from gpt_arc.training.compile import resolve_compile
    from model import GPT

    if config.data.document_mask:
        raise UserError("random tokens have no documents: leave document_mask out")
    if config.sequences_per_step != config.data.batch_size:
        raise UserError("a step is measured with one batch: leave tokens_per_step and gradient_accumulation_steps out")
    if config.model.vocab_size > 1 << 16:
        raise UserError(f"vocab_size = {config.model.vocab_size} is more than the random tokens of 16 bits")
    device = resolve_device(config.training.device)
    dtype = resolve_dtype(config.training.dtype, device)
    compile = resolve_compile(config.training.compile, device, 0)[0]
    with torch.device("meta"):
        model = GPT(config.model)
    print(f"machine      {machine(device)}")
    print(f"model        {describe_parameters(model, ' parameters')}, {dtype}", end="")
    print(f", {'compiled' if compile else 'not compiled'}")
    print(f"work         {config.data.batch_size} x {config.model.block_size} tokens a step,", end="")
    print(f" {settings.rounds} rounds of {settings.steps} steps after one to warm up", flush=True)
    return Job(settings, config, str(device), dtype, compile)


def machine(device: Any) -> str:
    import torch

    from gpt_arc.device import device_name

    return f"{device_name(device)}, torch {torch.__version__}"


def compare(job: Job, programs: dict[str, tuple[type[Program], Job]]) -> dict[str, Any]:
    """What comes of the programs taking turns, each with its own job; `job` is that of "ours", which is one of them."""
    import torch

    from gpt_arc.device import device_name
    from gpt_arc.planning.cost import peak_flops
    from model import GPT

    settings, config, device = job.settings, job.config, torch.device(job.device)
    with contextlib.ExitStack() as stack:
        ask: dict[str, Callable[[str | None], Any]] = {
            name: stack.enter_context(running(name, program, its)) for name, (program, its) in programs.items()
        }
        rate_of_products = functools.partial(peak_flops, device, device_name(device), job.dtype)
        rounds, rates = take_turns(ask, settings.rounds, rate_of_products)
        operators = ask["ours"]("operators") if settings.profile else []

    results: dict[str, Any] = {"machine": machine(device), "dtype": job.dtype, "compiled": job.compile}
    results |= {"config": asdict(config), "settings": plain(settings)}
    tokens = config.data.batch_size * config.model.block_size
    results["programs"] = {name: figures(tokens, *taken) for name, taken in rounds.items()}
    pairs = {name: list(zip(rounds["ours"], taken))[1:] for name, taken in rounds.items() if name != "ours"}
    results["ratios"] = {
        name: spread([median_step(its) / median_step(ours) for ours, its in pair]) for name, pair in pairs.items()
    }
    with torch.device("meta"):
        flops = 6 * GPT(config.model).num_parameters(active=True)
    rate = None if rates[0] is None else median(rates)
    results["floor"] = {"flops_per_second": rate, "flops_per_token": flops}
    if rate is not None:
        share = results["programs"]["ours"]["tokens_per_second"] / (rate / flops)
        results["floor"] |= {"tokens_per_second": rate / flops, "share": share}
    results["operators"] = operators
    return results


def write_results(settings: StepBench, results: dict[str, Any]) -> None:
    if settings.json is not None:
        write_file(settings.json.resolve(), json.dumps(results, indent=2) + "\n")


def bench_train(args: list[str]) -> None:
    settings, config = read_arguments(args, TrainBench, __doc__, "train configs/gpt2.toml")
    check_places(settings)
    if settings.nanogpt is not None:
        check_nanogpt_fits(config.model)

    from gpt_arc.weights.huggingface import (
        architecture_of,  # takes torch, slow to import: not before the settings are known to be right
    )

    if settings.transformers:
        architecture_of(config.model)
    job = prepare(settings, config)
    programs: dict[str, type[Program]] = {"ours": Ours}
    if settings.nanogpt is not None:
        programs |= {"nanoGPT": NanoGPT} | ({} if job.dtype == "float32" else {"nanoGPT 16 bit": NanoGPTAutocast})
    programs |= {"transformers": Transformers} if settings.transformers else {}
    results = compare(job, {name: (program, job) for name, program in programs.items()})
    show(results)
    write_results(settings, results)
