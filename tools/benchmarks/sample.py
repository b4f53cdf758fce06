"""`bench.py sample`: greedy continuations of random prompts, against nanoGPT and transformers.

Each competitor has its own process with the same weights and prompts, and they take turns, round by round, so that
other load on the machine affects them all equally:

- ours: the decoder, in --dtype and compiled unless --compile=False.
- nanoGPT as it ships, from your checkout: float32, its own `generate`, which samples and recomputes everything for each
  token. Its GELU is the erf form: for a model with the tanh form a few tokens differ, but the time doesn't.
- transformers' `generate`: eager, greedy, with its cache where the architecture has one, in our --dtype.

For the others, prefill time is the time to generate one token, and decoding time is the remainder. Memory is the peak
of the process, or of its tensors on a GPU. The floor is the time to read the matrices and the cached keys and values,
at the rate measured between the rounds for reading memory.
"""

import contextlib
import dataclasses
import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge
from pydantic.dataclasses import dataclass

from benchmarks.processes import (
    ModelBench,
    check_nanogpt_fits,
    check_requirements,
    child_process,
    json_settings,
    machine_name,
    nanogpt_model,
    peak_memory,
    read_model_arguments,
    round_ratios,
    show_ratios,
    spread,
    take_turns,
    write_results,
)
from gpt_arc.errors import UserError
from gpt_arc.files import name_failed_writes
from gpt_arc.settings import STRICT, Count, Positional
from gpt_arc.tables import counted

OURS, PEERS = "ours.safetensors", "peers.safetensors"  # weights under our names and under transformers'
PROBE_BYTES, PROBE_PASSES = 256 * 2**20, 5  # for measuring the rate at which memory is read


@dataclass(frozen=True, config=STRICT)
class SampleBench(ModelBench):
    model: Positional[str]
    """A config (quickstart, or a .toml file), whose architecture gets random weights and may be changed by flags such
    as --n_layer=6; or a run folder, a model directory, or a published model: gpt2, hf:OWNER/NAME."""
    batch_size: Count = 1
    """Rows that are continued in parallel."""
    prompt_tokens: Count = 16
    """Random tokens in each row's prompt."""
    max_new_tokens: Annotated[int, Ge(2)] = 128
    """Tokens generated per row."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of our weights and of transformers'. auto: as sample.py chooses."""
    compile: bool = True
    """Compile our decoder; the time goes into the warm-up."""
    int8: bool = False
    """Round our weights to 8 bits, for one row of compiled code on a CPU."""
    rounds: Count = 5
    nanogpt: Path | None = None
    """A nanoGPT checkout (the folder with its model.py) to measure too."""


# ---- workers: tokens are copied to the CPU, so the clock includes the GPU's work


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """Input of a child process."""

    settings: SampleBench
    config: Any  # GPTConfig; importing it would import torch
    device: str
    dtype: str
    prompts: list[list[int]]
    folder: Path  # with OURS and PEERS


class SampleRound(NamedTuple):
    first: float  # seconds until the first token of every row
    whole: float  # seconds until the last token
    peak: int  # peak memory so far, in bytes
    held: float = math.nan  # ours only: mean number of tokens per row that a step attended to


class OurSampler:
    def __init__(self, job: SampleJob):
        import torch

        from gpt_arc.decoding.decoder import Decoder
        from gpt_arc.nn.meta import meta_device
        from model import GPT

        self.job = job
        with meta_device():
            model = GPT(job.config).to(getattr(torch, job.dtype))
        model = model.to_empty(device=job.device).eval()
        load_tensors(model, job.folder / OURS)
        self.decoder = Decoder(model)
        self.decoder.prepare(job.settings.batch_size, job.settings.compile, job.settings.int8)

    def generate(self) -> Iterator[list[int]]:
        """Yields the next token of each row, max_new_tokens times."""
        logits = self.decoder.read(self.job.prompts, room=self.job.settings.max_new_tokens)
        for _ in range(self.job.settings.max_new_tokens - 1):
            column = logits.argmax(-1).tolist()
            yield column
            logits = self.decoder.step(column)
        yield logits.argmax(-1).tolist()

    def round(self) -> SampleRound:
        start = time.perf_counter()
        columns = self.generate()
        next(columns)
        first = time.perf_counter() - start
        held = [len(self.decoder.sequences[0]) for _ in columns]
        return SampleRound(first, time.perf_counter() - start, peak_memory(self.job.device), mean(held))

    def sizes(self) -> dict[str, Any]:
        """Layout of the weights, and bytes per weight and per number in the cache."""
        layout = getattr(self.decoder.head, "layout", "plain")
        weight = 1 if layout == "int8" else self.decoder.model.token_embedding.weight.itemsize
        return {"layout": layout, "weight": weight, "cache": self.decoder.cache[0].keys.itemsize}

    def memory_rate(self) -> float:
        return memory_rate(self.job.device)


class PeerSampler(ABC):
    """Another library's model with the weights in PEERS."""

    def __init__(self, job: SampleJob, model: Any, transposed: tuple[str, ...] = ()):
        import torch

        load_tensors(model, job.folder / PEERS, transposed)
        self.job, self.model = job, model.to(job.device).eval()
        self.prompts = torch.tensor(job.prompts, device=job.device)

    @abstractmethod
    def generate(self, count: int) -> Any:
        """Returns the prompts (B, T), continued by `count` tokens."""

    def round(self) -> SampleRound:
        first, whole = (self.seconds(count) for count in (1, self.job.settings.max_new_tokens))
        if whole <= first:  # other load on the machine delayed the shorter run: repeat
            return self.round()
        return SampleRound(first, whole, peak_memory(self.job.device))

    def seconds(self, count: int) -> float:
        start = time.perf_counter()
        self.generate(count).tolist()
        return time.perf_counter() - start


class NanoGPTSampler(PeerSampler):
    def __init__(self, job: SampleJob):
        assert job.settings.nanogpt is not None
        model = nanogpt_model(job.settings.nanogpt, job.config, dropout=0.0)
        super().__init__(job, model, ("c_attn.weight", "c_proj.weight", "c_fc.weight"))

    def generate(self, count: int) -> Any:
        return self.model.generate(self.prompts, count)


class TransformersSampler(PeerSampler):
    def __init__(self, job: SampleJob):
        import torch
        import transformers

        from gpt_arc.weights.huggingface import hf_config

        transformers.logging.set_verbosity_error()
        config = transformers.AutoConfig.for_model(**hf_config(job.config, job.dtype))
        dtype = getattr(torch, job.dtype)
        super().__init__(job, transformers.AutoModelForCausalLM.from_config(config, dtype=dtype))

    def generate(self, count: int) -> Any:
        exactly = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return self.model.generate(self.prompts, attention_mask=self.prompts.new_ones(self.prompts.shape), **exactly)


def load_tensors(model: Any, path: Path, transposed: tuple[str, ...] = ()) -> None:
    """Copies a file's tensors into the parameters of the same names, one at a time: an open file counts as memory.

    Tensors whose names end in one of `transposed` are stored transposed.
    """
    import torch
    from safetensors import safe_open

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(name)
            parameter.copy_(tensor.T if name.endswith(transposed) else tensor)


def memory_rate(device: str) -> float:
    """Bytes per second that the device reads from memory. Allocates memory, which counts toward this process's peak."""
    import torch

    numbers, seconds = torch.ones(PROBE_BYTES // 4, device=device), []
    for _ in range(PROBE_PASSES):
        start = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - start)
    if device.startswith("cuda"):
        del numbers
        torch.cuda.reset_peak_memory_stats(device)
    return PROBE_BYTES / median(seconds)


# ---- settings


def read_arguments(args: list[str]) -> tuple[SampleBench, Any]:
    return read_model_arguments(SampleBench, __doc__, args)


def check_fits(settings: SampleBench, config: Any) -> None:
    """Raises UserError for settings or an architecture that a competitor can't compute."""
    names, reason = ["prompt_tokens"], ""
    if settings.nanogpt is not None or settings.transformers:
        names, reason = ["prompt_tokens", "max_new_tokens"], "; beyond it the others do different work"
    tokens = sum(getattr(settings, name) for name in names)
    if tokens > config.block_size:
        context = f"the context, block_size = {config.block_size}"
        raise UserError(f"{' + '.join(names)} = {tokens} is more than {context}{reason}")
    if settings.transformers:
        from gpt_arc.weights.huggingface import architecture_of

        architecture_of(config)
    if settings.nanogpt is not None:
        check_nanogpt_fits(config)


# ---- summarize


def summarize(settings: SampleBench, warmup: SampleRound, *rounds: SampleRound) -> dict[str, Any]:
    """Figures of one competitor."""
    rows, steps = settings.batch_size, settings.max_new_tokens - 1
    step = spread([(round.whole - round.first) / steps for round in rounds])
    first = median(round.first for round in rounds)
    return {
        "prefill_tokens_per_second": rows * settings.prompt_tokens / first,
        "decode_tokens_per_second": rows / step["median"],
        "step_ms": {name: 1000 * seconds for name, seconds in step.items()},
        "first_token_ms": 1000 * first,
        "whole_seconds": spread([round.whole for round in rounds]),
        "peak_memory_gb": max(round.peak for round in rounds) / 1e9,
        "warmup_seconds": warmup.whole,
        "rounds": [{"first_seconds": round.first, "whole_seconds": round.whole} for round in rounds],
    }


def step_bytes(config: Any, rows: int, held: float, sizes: dict[str, Any]) -> dict[str, float]:
    """Bytes that a decoding step must read: each matrix once, and the keys and values of `held` tokens per row."""
    width, heads, size = config.n_embd, config.n_head, config.head_width
    attention = (heads + 2 * config.kv_heads) * size * width + heads * size * width
    mlp = (3 if config.gated else 2) * config.mlp_width * width
    weights = config.n_layer * (attention + mlp) + config.vocab_size * width
    band = min(held, config.attention_band or held)  # every second block sees a band
    tokens = (config.n_layer + 1) // 2 * held + config.n_layer // 2 * band
    cache = rows * tokens * 2 * config.kv_heads * size
    return {"weight_bytes": weights * sizes["weight"], "cache_bytes": cache * sizes["cache"]}


def show(results: dict[str, Any]) -> None:
    columns = "prefill tokens/s|decode tokens/s|step ms|min ms|max ms|first token ms|whole s|memory GB"
    print()
    for line in zip(*(column.rsplit(" ", 1) for column in columns.split("|"))):
        print(f"{'':12}" + "".join(f"{word:>12}" for word in line))
    for name, row in results["programs"].items():
        print(f"{name:12} {row['prefill_tokens_per_second']:11,.0f} {row['decode_tokens_per_second']:11,.1f}", end="")
        print("".join(f" {row['step_ms'][key]:11.2f}" for key in ("median", "min", "max")), end="")
        print(f" {row['first_token_ms']:11.1f} {row['whole_seconds']['median']:11.3f} {row['peak_memory_gb']:11.2f}")
    print(f"\nwarm-up      {results['programs']['ours']['warmup_seconds']:.1f} s for ours, including compilation")
    show_ratios(results["ratios"])
    floor = results["floor"]
    print(f"memory       read at {floor['bytes_per_second'] / 1e9:.1f} GB/s; a step must read", end="")
    print(
        f" {floor['weight_bytes'] / 1e6:,.1f} MB of weights and {floor['cache_bytes'] / 1e6:,.1f} MB of keys and values"
    )
    print(f"floor        {floor['ms']:.2f} ms per step, {floor['share']:.0%} of the {results['layout']} decoder's step")


def write_weights(model: Any, folder: Path, peers: bool) -> None:
    """Writes OURS and, with `peers`, PEERS, in float32."""
    from safetensors.torch import save_file

    from gpt_arc.weights.huggingface import hf_tensors

    with name_failed_writes(folder):
        save_file({name: tensor.detach() for name, tensor in model.named_parameters()}, folder / OURS)
        if peers:
            save_file(dict(hf_tensors(model)), folder / PEERS)


def bench_sample(args: list[str]) -> None:
    settings, config = read_arguments(args)
    check_requirements(settings)

    import torch  # slow: import once the settings are valid

    from gpt_arc.decoding.load import resolve_decoding_dtype
    from gpt_arc.device import resolve_device
    from gpt_arc.planning.cost import describe_parameters
    from gpt_arc.weights.directory import load_config, load_model, require_causal
    from model import GPT

    trained = config is None
    config = load_config(settings.model) if trained else config
    check_fits(settings, config)
    device = resolve_device(settings.device)
    torch.manual_seed(settings.seed)
    prompts = torch.randint(config.vocab_size, (settings.batch_size, settings.prompt_tokens)).tolist()
    workers = {"ours": OurSampler}
    workers |= {"nanoGPT": NanoGPTSampler} if settings.nanogpt is not None else {}
    workers |= {"transformers": TransformersSampler} if settings.transformers else {}
    machine = machine_name(device)
    print(f"machine      {machine}", flush=True)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpt-arc-bench-")))
        model = require_causal(settings.model, load_model(settings.model)[0] if trained else GPT(config))
        dtype = str(resolve_decoding_dtype(settings.dtype, device, 4 * model.num_parameters()))
        dtype = dtype.removeprefix("torch.")
        print(f"model        {settings.model}, {describe_parameters(model, ' parameters')}, {dtype}")
        print(
            f"work         {settings.batch_size} x ({settings.prompt_tokens} + {settings.max_new_tokens}) tokens",
            end="",
        )
        print(f", {counted(settings.rounds, 'round')} after a warm-up", flush=True)
        write_weights(model, folder, peers=len(workers) > 1)
        del model
        job = SampleJob(settings, config, str(device), dtype, prompts, folder)
        calls = {name: stack.enter_context(child_process(name, worker, job)) for name, worker in workers.items()}
        on_cpu = device.type == "cpu"  # elsewhere the process measures its own memory
        read_rate = partial(memory_rate, "cpu") if on_cpu else partial(calls["ours"], "memory_rate")
        rounds, rates = take_turns(calls, settings.rounds, read_rate)
        sizes = calls["ours"]("sizes")

    results = {"machine": machine, "dtype": dtype, "layout": sizes["layout"], "architecture": asdict(config)}
    results["settings"] = json_settings(settings)
    results["programs"] = {name: summarize(settings, *its_rounds) for name, its_rounds in rounds.items()}
    results["ratios"] = round_ratios(rounds, lambda round: round.whole)
    floor = step_bytes(config, settings.batch_size, rounds["ours"][-1].held, sizes)
    floor |= {"bytes_per_second": median(rates), "ms": 1000 * sum(floor.values()) / median(rates)}
    results["floor"] = floor | {"share": floor["ms"] / results["programs"]["ours"]["step_ms"]["median"]}
    show(results)
    write_results(settings.json, results)
