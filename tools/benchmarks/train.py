"""`bench.py train`: optimizer steps built from train.py's parts, against other libraries.

    python tools/bench.py train configs/gpt2.toml --batch_size=1 --nanogpt=../nanoGPT --transformers=True
    python tools/bench.py train configs/tinyshakespeare.toml --batch_size=16 --dropout=0 --compile=True

Accepts train.py's settings for the model, the batch and the training. A step is one batch of batch_size random
sequences: reading it, forward, backward, update. Each competitor has its own process, and they take turns, round by
round:

- ours: model, data, loss scaling and update, put together as in train.py.
- nanoGPT, from your checkout, as its train.py does on a CPU: float32; and a second time under autocast if ours uses it.
- transformers: its model of the architecture under the same autocast, with its Trainer's default, torch's fused AdamW.

The competitors get random batches and read no data. The floor is 6 FLOPs per (active) parameter and token, attention
not counted, at the rate measured between the rounds for products of two 1024 x 1024 matrices.
"""

import contextlib
import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from pydantic.dataclasses import dataclass

from benchmarks.processes import (
    check_nanogpt_fits,
    check_requirements,
    child_process,
    config_files,
    json_settings,
    machine_name,
    nanogpt_model,
    peak_memory,
    round_ratios,
    show_ratios,
    spread,
    synchronized_time,
    take_turns,
    with_config_file,
    write_results,
)
from gpt_arc.errors import UserError
from gpt_arc.files import HELP, command
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, ResultFile
from gpt_arc.tables import counted
from gpt_arc.training.config import Config, DataConfig, TrainingConfig, build_config, read_settings

PHASES = ("data", "forward", "backward", "update")
TOP_OPERATORS = 14


@dataclass(frozen=True, config=STRICT)
class StepBench:
    """Settings of every measurement of optimizer steps."""

    rounds: Count = 3
    """Measured rounds, after one warm-up round."""
    steps: Count = 5
    """Optimizer steps per program and round."""
    transformers: bool = False
    """Measure transformers too."""
    profile: bool = False
    """Show the time of our steps by torch operator."""
    json: ResultFile | None = None
    """A file for the results."""


@dataclass(frozen=True, config=STRICT)
class TrainBench(StepBench):
    nanogpt: Path | None = None
    """A nanoGPT checkout (the folder with its model.py) to measure too."""


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """Input of a child process."""

    settings: StepBench
    config: Config
    device: str
    dtype: str
    compile: bool


class TrainRound(NamedTuple):
    steps: list[list[float]]  # seconds of each step's PHASES
    losses: list[float]  # in nats per token, router losses included
    peak: int  # peak memory so far, in bytes


class TrainWorker(ABC):
    """Optimizer steps of a model."""

    def __init__(self, job: TrainJob):
        import torch

        self.job, self.device = job, torch.device(job.device)
        self.shape = job.config.data.batch_size, job.config.model.block_size
        torch.manual_seed(job.config.training.seed)
        self.setup()

    @abstractmethod
    def setup(self) -> None:
        """Builds the model and its optimizer."""

    @abstractmethod
    def forward(self, tokens: Any, targets: Any) -> Any:
        """Returns the mean loss in nats."""

    @abstractmethod
    def backward(self, loss: Any) -> None: ...

    @abstractmethod
    def update(self, loss: Any) -> None: ...

    def next_batch(self) -> Sequence[Any]:
        import torch

        tokens = torch.randint(self.job.config.model.vocab_size, (self.shape[0], self.shape[1] + 1))
        return tokens[:, :-1].contiguous().to(self.device), tokens[:, 1:].contiguous().to(self.device)

    def round(self) -> TrainRound:
        seconds, losses = [], []
        for _ in range(self.job.settings.steps):
            times = [synchronized_time(self.device)]
            batch = self.next_batch()
            times.append(synchronized_time(self.device))
            loss = self.forward(*batch)
            times.append(synchronized_time(self.device))
            self.backward(loss)
            times.append(synchronized_time(self.device))
            self.update(loss)
            losses.append(loss.item())
            times.append(synchronized_time(self.device))
            seconds.append([end - start for start, end in zip(times, times[1:])])
        return TrainRound(seconds, losses, peak_memory(self.job.device))

    def operators(self) -> list[dict[str, Any]]:
        """Profiles a round: the most expensive operators first, by the time of their kernels on a GPU."""
        from torch.profiler import profile

        with profile() as profiled:
            self.round()
        attribute = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        operators = [(event.key, getattr(event, attribute), event.count) for event in profiled.key_averages()]
        total, steps = sum(time for _, time, _ in operators), self.job.settings.steps
        operators = sorted(operators, key=lambda operator: -operator[1])[:TOP_OPERATORS]
        return [
            {"name": name, "share": time / total, "ms": time / steps / 1000, "calls": calls / steps}
            for name, time, calls in operators
        ]


class OurTrainer(TrainWorker):
    def setup(self) -> None:
        import torch

        from gpt_arc.data.batches import prefetch, training_batches
        from gpt_arc.data.order import TrainingOrder
        from gpt_arc.device import autocast, set_up_device, to_device
        from gpt_arc.training.compile import compile_in_place
        from gpt_arc.training.kernels import choose_kernels
        from gpt_arc.training.optim import Updater
        from gpt_arc.training.routers import RouterMeter
        from gpt_arc.training.schedule import learning_rate_at
        from model import GPT

        config = self.job.config
        set_up_device(self.device, self.job.dtype)
        self.model = GPT(config.model).to(self.device)
        choose_kernels(self.model, config.training)
        if self.job.compile:
            tokens = torch.zeros(self.shape, dtype=torch.int64)
            failure = compile_in_place(
                self.model,
                self.model,
                [tokens, tokens],
                self.device,
                self.job.dtype,
                by_block=config.training.compile == "blocks",
                graphs=config.training.compile == "graphs",
            )
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
        updated, *_ = self.updater.update(self.learning_rate, loss.detach())
        self.routers.step(updated)


class RandomTokens:
    """Stands in for a split of token files."""

    COUNT, separator, masking = 1 << 22, None, None

    def __init__(self, vocab_size: int):
        self.tokens = np.random.default_rng(0).integers(vocab_size, size=self.COUNT, dtype=np.uint16)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]

    def dataset_of(self, start: int) -> range:
        return range(self.COUNT)


class PeerTrainer(TrainWorker):
    """Another library's model and optimizer in a plain loop."""

    dtype = "float32"
    model: Any
    optimizer: Any

    @abstractmethod
    def loss(self, tokens: Any, targets: Any) -> Any:
        """Returns the mean loss in nats."""

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


class NanoGPTTrainer(PeerTrainer):
    def setup(self) -> None:
        training, config = self.job.config.training, self.job.config.model
        settings = self.job.settings
        assert isinstance(settings, TrainBench) and settings.nanogpt is not None
        self.model = nanogpt_model(settings.nanogpt, config, config.dropout).to(self.device)
        betas = training.beta1, training.beta2
        self.optimizer = self.model.configure_optimizers(
            training.weight_decay, training.learning_rate, betas, self.device.type
        )

    def loss(self, tokens: Any, targets: Any) -> Any:
        return self.model(tokens, targets)[1]


class NanoGPTAutocastTrainer(NanoGPTTrainer):
    def setup(self) -> None:
        super().setup()
        self.dtype = self.job.dtype


class TransformersTrainer(PeerTrainer):
    def setup(self) -> None:
        import torch
        import transformers

        from gpt_arc.weights.huggingface import hf_config

        self.dtype = self.job.dtype
        transformers.logging.set_verbosity_error()  # hides a warning about its default loss
        content = hf_config(self.job.config.model, "float32")
        if "output_router_logits" in content:  # without router logits it omits the router loss
            content["output_router_logits"] = content["router_aux_loss_coef"] > 0
        config = transformers.AutoConfig.for_model(**content)
        self.model = transformers.AutoModelForCausalLM.from_config(config).to(self.device).train()
        learning_rate = self.job.config.training.learning_rate
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, fused=True)

    def loss(self, tokens: Any, targets: Any) -> Any:
        return self.model(tokens, labels=tokens).loss


def read_arguments(args: list[str], cls: type, description: str | None, example: str) -> tuple[Any, Config]:
    """Returns settings of the dataclass `cls` and the config file's `Config`, both with the flags applied."""
    args = with_config_file(args)
    files = config_files(args)
    if len(files) != 1 and not HELP & set(args):
        raise UserError(f"name one config file: {command('tools/bench.py', *example.split())}")
    from model import GPTConfig  # imports torch

    default = build_config(read_settings(Path(files[0])), files[0]) if files else Config()
    arguments = dataclasses.make_dataclass(
        "Arguments", [("settings", cls), ("model", GPTConfig), ("data", DataConfig), ("training", TrainingConfig)]
    )
    data = dataclasses.replace(default.data, tokens_per_step=None, gradient_accumulation_steps=None)
    defaults = arguments(cls(), default.model, data, default.training)
    parsed = parse_flags(arguments, description, [arg for arg in args if arg not in files], defaults)
    return parsed.settings, Config(parsed.model, parsed.data, parsed.training)


def prepare(settings: StepBench, config: Config) -> TrainJob:
    """Returns our job on this machine and prints it. Raises UserError for a config that can't be measured."""

    from gpt_arc.device import capability_of, device_name, resolve_device, resolve_dtype
    from gpt_arc.nn.meta import meta_device
    from gpt_arc.planning.cost import describe_parameters
    from gpt_arc.training.compile import resolve_compile
    from gpt_arc.training.kernels import check_flash_attention, check_float8, check_residual
    from model import GPT

    if config.data.document_mask:
        raise UserError("random tokens have no documents: leave document_mask out")
    if config.sequences_per_step != config.data.batch_size:
        raise UserError("a measured step is one batch: leave tokens_per_step and gradient_accumulation_steps out")
    if config.model.vocab_size > 1 << 16:
        raise UserError(f"vocab_size = {config.model.vocab_size} is too large: the random tokens have 16 bits")
    device = resolve_device(config.training.device)
    dtype = resolve_dtype(config.training.dtype, device)
    check_residual(config.training, dtype)
    capability, name = capability_of(device), device_name(device)
    check_float8(config.training, capability, name)
    check_flash_attention(config.training, dtype, capability, name)
    compile = resolve_compile(config.training.compile, device, 0)[0]
    with meta_device():
        model = GPT(config.model)
    print(f"machine      {machine_name(device)}")
    print(f"model        {describe_parameters(model, ' parameters')}, {dtype}", end="")
    print(f", {'compiled' if compile else 'not compiled'}")
    print(f"work         {config.data.batch_size} x {config.model.block_size} tokens per step,", end="")
    rounds, steps = counted(settings.rounds, "round"), counted(settings.steps, "step")
    print(f" {rounds} of {steps} after a warm-up round", flush=True)
    return TrainJob(settings, config, str(device), dtype, compile)


def median_step(round: TrainRound) -> float:
    return median(map(sum, round.steps))


def summarize(tokens: int, warmup: TrainRound, *rounds: TrainRound) -> dict[str, Any]:
    """Figures of one competitor, with `tokens` per step; medians are over the steps of all rounds."""
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


def compare(job: TrainJob, workers: dict[str, tuple[type[TrainWorker], TrainJob]]) -> dict[str, Any]:
    """Measures the workers, each with its job, and returns the results. `job` is the one of "ours"."""
    import torch

    from gpt_arc.device import device_name
    from gpt_arc.nn.meta import meta_device
    from gpt_arc.planning.cost import peak_flops
    from model import GPT

    settings, config, device = job.settings, job.config, torch.device(job.device)
    with contextlib.ExitStack() as stack:
        calls = {name: stack.enter_context(child_process(name, *worker)) for name, worker in workers.items()}
        product_rate = functools.partial(peak_flops, device, device_name(device), job.dtype)
        rounds, rates = take_turns(calls, settings.rounds, product_rate)
        operators = calls["ours"]("operators") if settings.profile else []

    results: dict[str, Any] = {"machine": machine_name(device), "dtype": job.dtype, "compiled": job.compile}
    results |= {"config": asdict(config), "settings": json_settings(settings)}
    tokens = config.data.batch_size * config.model.block_size
    results["programs"] = {name: summarize(tokens, *its_rounds) for name, its_rounds in rounds.items()}
    results["ratios"] = round_ratios(rounds, median_step)
    with meta_device():
        flops = 6 * GPT(config.model).num_parameters(active=True)
    rate = None if rates[0] is None else median(rates)
    results["floor"] = {"flops_per_second": rate, "flops_per_token": flops}
    if rate is not None:
        share = results["programs"]["ours"]["tokens_per_second"] / (rate / flops)
        results["floor"] |= {"tokens_per_second": rate / flops, "share": share}
    results["operators"] = operators
    return results


def show(results: dict[str, Any]) -> None:
    columns = ["tokens/s", "step ms", "min ms", "max ms", *(f"{name} ms" for name in PHASES), "memory GB"]
    width = max(14, *(len(name) + 1 for name in results["programs"]))
    print("\n" + " " * width + "".join(f"{column:>12}" for column in columns))
    for name, row in results["programs"].items():
        step, phases = row["step_ms"], row["phases_ms"]
        numbers = [step["median"], step["min"], step["max"], *(phases[phase] for phase in PHASES)]
        print(f"{name:{width}}{row['tokens_per_second']:12,.0f}", end="")
        print("".join(f"{number:12,.1f}" for number in numbers) + f"{row['peak_memory_gb']:12.2f}")
    first = results["programs"]["ours"]["first_step_seconds"]
    print(f"\nfirst step   {first:.1f} s for ours, including compilation")
    show_ratios(results["ratios"])
    floor = results["floor"]
    if floor["flops_per_second"] is not None:
        rate = f"{floor['flops_per_second'] / 1e9:,.0f} GFLOP/s of {results['dtype']} products"
        print(f"floor        {floor['tokens_per_second']:,.0f} tokens/s at {rate}", end="")
        print(f"; ours reaches {floor['share']:.0%} of it")
    if results["operators"]:
        print("\nour operators, per step:      share          ms       calls")
    for row in results["operators"]:
        print(f"{row['name'][:28]:28}{row['share']:7.1%}{row['ms']:12,.2f}{row['calls']:12,.0f}")


def bench_train(args: list[str]) -> None:
    settings, config = read_arguments(args, TrainBench, __doc__, "train configs/gpt2.toml")
    check_requirements(settings)
    if settings.nanogpt is not None:
        check_nanogpt_fits(config.model)

    from gpt_arc.weights.huggingface import architecture_of  # slow (torch): import once the settings are valid

    if settings.transformers:
        architecture_of(config.model)
    job = prepare(settings, config)
    workers: dict[str, type[TrainWorker]] = {"ours": OurTrainer}
    if settings.nanogpt is not None:
        workers |= {"nanoGPT": NanoGPTTrainer}
        workers |= {} if job.dtype == "float32" else {"nanoGPT 16 bit": NanoGPTAutocastTrainer}
    workers |= {"transformers": TransformersTrainer} if settings.transformers else {}
    results = compare(job, {name: (worker, job) for name, worker in workers.items()})
    show(results)
    write_results(settings.json, results)
