"""`bench.py sample`: greedy continuations of random prompts, beside nanoGPT and transformers.

Each program has a process of its own with the same weights and prompts, and they take turns, round by round, so that
whatever else the machine does affects them alike:

- ours: the decoder, in --dtype and compiled unless --compile=False.
- nanoGPT as it ships, from your checkout: float32, its own `generate`, which samples and recomputes everything for each
  token. Its GELU is the erf form; where a model has the tanh form its tokens differ a little, its time doesn't.
- transformers' `generate`: eager, greedy, with its cache where the architecture has one, in our --dtype.

The prefill of the others is timed as the generation of one token, their decoding as the time for the rest. Memory is
the peak of the process, on a GPU that of its tensors. The floor is the time to read the matrices, and the keys and
values of the tokens held, at the rate at which memory was read between the rounds.
"""

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, NamedTuple

import tyro
from pydantic.dataclasses import dataclass

from benchmarks.processes import (
    check_nanogpt_fits,
    check_places,
    nanogpt_model,
    peak_memory,
    plain,
    read_model_arguments,
    running,
    show_ratios,
    spread,
    take_turns,
)
from gpt_arc.errors import UserError, first_line
from gpt_arc.files import write_file
from gpt_arc.settings import STRICT

OURS, PEERS = "ours.safetensors", "peers.safetensors"  # the weights, by our names and by transformers'
PROBE_BYTES, PROBE_PASSES = 256 * 2**20, 5  # of the memory's rate


@dataclass(frozen=True, config=STRICT)
class SampleBench:
    model: tyro.conf.Positional[str]
    """A config file (.toml), whose architecture gets random weights and may be changed by flags such as --n_layer=6;
    or a run folder, a model directory, or a published model: gpt2, hf:OWNER/NAME."""
    batch_size: int = 1
    """Rows that go on side by side."""
    prompt_tokens: int = 16
    """Tokens of each row's prompt, drawn at random."""
    max_new_tokens: int = 128
    """Tokens that each row goes on by."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of our weights and of transformers'. auto: as sample.py chooses."""
    compile: bool = True
    """Compile our decoder; the time goes into the warm-up."""
    int8: bool = False
    """Round our weights to 8 bits, for one row of compiled code on a CPU."""
    rounds: int = 5
    """Rounds that are measured, after one that warms up."""
    seed: int = 1337
    """The source of random weights and prompts."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT, the folder with its model.py, to measure too."""
    transformers: bool = False
    """Measure transformers too."""
    json: Path | None = None
    """A file for the results."""

    def __post_init__(self):
        least = {"batch_size": 1, "prompt_tokens": 1, "max_new_tokens": 2, "rounds": 1, "seed": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} = {getattr(self, name)} must be {number} or more")
        if self.seed >= 2**63:
            raise ValueError(f"seed = {self.seed} must be less than 2**63")


# ---- the programs, each in a process of its own; what they compute is fetched, so that clocks wait for a GPU


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process needs to know."""

    settings: SampleBench
    config: Any  # GPTConfig, whose import takes torch
    device: str
    dtype: str
    prompts: list[list[int]]
    folder: Path  # of OURS and PEERS


class Round(NamedTuple):
    first: float  # seconds until the first token of every row
    whole: float  # seconds until the last
    peak: int  # bytes of memory, so far
    held: float = math.nan  # tokens of a row that a step of ours attended to, on average


class Ours:
    def __init__(self, job: Job):
        import torch

        from gpt_arc.decoding.decoder import Decoder
        from model import GPT

        self.job = job
        with torch.device("meta"):
            model = GPT(job.config).to(getattr(torch, job.dtype))
        model = model.to_empty(device=job.device).eval()
        fill(model, job.folder / OURS)
        self.decoder = Decoder(model)
        self.decoder.prepare(job.settings.batch_size, job.settings.compile, job.settings.int8)

    def generate(self) -> Iterator[list[int]]:
        """The next token of each row, max_new_tokens times."""
        logits = self.decoder.read(self.job.prompts, room=self.job.settings.max_new_tokens)
        for _ in range(self.job.settings.max_new_tokens - 1):
            column = logits.argmax(-1).tolist()
            yield column
            logits = self.decoder.step(column)
        yield logits.argmax(-1).tolist()

    def round(self) -> Round:
        start = time.perf_counter()
        columns = self.generate()
        next(columns)
        first = time.perf_counter() - start
        held = [len(self.decoder.sequences[0]) for _ in columns]
        return Round(first, time.perf_counter() - start, peak_memory(self.job.device), mean(held))

    def sizes(self) -> dict[str, Any]:
        """How the weights are laid out, and the bytes of one of them and of a number in a key or value."""
        layout = getattr(self.decoder.head, "layout", "plain")
        weight = 1 if layout == "int8" else self.decoder.model.token_embedding.weight.itemsize
        return {"layout": layout, "weight": weight, "cache": self.decoder.cache[0].keys.itemsize}

    def memory_rate(self) -> float:
        return memory_rate(self.job.device)


class Peer:
    """Another program, with the weights of PEERS; `generate` continues the prompts by so many tokens."""

    def __init__(self, job: Job, model: Any, transposed: tuple[str, ...] = ()):
        import torch

        fill(model, job.folder / PEERS, transposed)
        self.job, self.model = job, model.to(job.device).eval()
        self.prompts = torch.tensor(job.prompts, device=job.device)

    def round(self) -> Round:
        first, whole = (self.seconds(count) for count in (1, self.job.settings.max_new_tokens))
        if whole <= first:  # something else on a busy machine held up the shorter work
            return self.round()
        return Round(first, whole, peak_memory(self.job.device))

    def seconds(self, count: int) -> float:
        start = time.perf_counter()
        self.generate(count).tolist()
        return time.perf_counter() - start


class NanoGPT(Peer):
    def __init__(self, job: Job):
        model = nanogpt_model(job.settings.nanogpt, job.config, dropout=0.0)
        super().__init__(job, model, ("c_attn.weight", "c_proj.weight", "c_fc.weight"))

    def generate(self, count: int) -> Any:
        return self.model.generate(self.prompts, count)


class Transformers(Peer):
    def __init__(self, job: Job):
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


def fill(model: Any, path: Path, transposed: tuple[str, ...] = ()) -> None:
    """Copy a file's tensors into the parameters of their names, one at a time: what stays open counts as memory.

    Those whose names end in one of `transposed` lie in the file the other way round.
    """
    import torch
    from safetensors import safe_open

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(name)
            parameter.copy_(tensor.T if name.endswith(transposed) else tensor)


def memory_rate(device: str) -> float:
    """Bytes a second at which the device reads its memory. It takes memory, which counts for the process it runs in."""
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


# ---- what is asked


def read_arguments(args: list[str]) -> tuple[SampleBench, Any]:
    return read_model_arguments(SampleBench, __doc__, args)


def check_fits(settings: SampleBench, config: Any) -> None:
    """Raises UserError for what a program can't compute."""
    names, beyond = ["prompt_tokens"], ""
    if settings.nanogpt is not None or settings.transformers:
        names, beyond = ["prompt_tokens", "max_new_tokens"], ", beyond which the others don't do the same work"
    tokens = sum(getattr(settings, name) for name in names)
    if tokens > config.block_size:
        context = f"the context, block_size = {config.block_size}"
        raise UserError(f"{' + '.join(names)} = {tokens} is more than {context}{beyond}")
    if settings.transformers:
        from gpt_arc.weights.huggingface import architecture_of

        architecture_of(config)
    if settings.nanogpt is not None:
        check_nanogpt_fits(config)


# ---- figures


def figures(settings: SampleBench, warmup: Round, *rounds: Round) -> dict[str, Any]:
    """What the rounds of one program come to."""
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
    """What a decode step has to read: each matrix once, and the keys and values of `held` tokens a row."""
    width, heads, size = config.n_embd, config.n_head, config.head_width
    attention = (heads + 2 * config.kv_heads) * size * width + heads * size * width
    mlp = (3 if config.activation == "swiglu" else 2) * config.mlp_width * width
    weights = config.n_layer * (attention + mlp) + config.vocab_size * width
    band = min(held, config.attention_band or held)  # what every second block sees
    tokens = (config.n_layer + 1) // 2 * held + config.n_layer // 2 * band
    cache = rows * tokens * 2 * config.kv_heads * size
    return {"weight_bytes": weights * sizes["weight"], "cache_bytes": cache * sizes["cache"]}


def show(results: dict[str, Any]) -> None:
    """The table, and what follows from it."""
    columns = "prefill tokens/s|decode tokens/s|step ms|least ms|most ms|first token ms|whole s|memory GB"
    print()
    for line in zip(*(column.rsplit(" ", 1) for column in columns.split("|"))):
        print(f"{'':12}" + "".join(f"{word:>12}" for word in line))
    for name, row in results["programs"].items():
        print(f"{name:12} {row['prefill_tokens_per_second']:11,.0f} {row['decode_tokens_per_second']:11,.1f}", end="")
        print("".join(f" {row['step_ms'][key]:11.2f}" for key in ("median", "min", "max")), end="")
        print(f" {row['first_token_ms']:11.1f} {row['whole_seconds']['median']:11.3f} {row['peak_memory_gb']:11.2f}")
    print(f"\nwarm-up      {results['programs']['ours']['warmup_seconds']:.1f} s of ours, compilation included")
    show_ratios(results["ratios"])
    floor = results["floor"]
    print(f"memory       read at {floor['bytes_per_second'] / 1e9:.1f} GB/s; a step has to read", end="")
    print(
        f" {floor['weight_bytes'] / 1e6:,.1f} MB of weights and {floor['cache_bytes'] / 1e6:,.1f} MB of keys and values"
    )
    print(f"floor        {floor['ms']:.2f} ms a step, {floor['share']:.0%} of the {results['layout']} decoder's step")


def write_weights(model: Any, folder: Path, peers: bool) -> None:
    """OURS and, if there are any, PEERS, in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from gpt_arc.weights.huggingface import hf_tensors

    try:
        save_file({name: tensor.detach() for name, tensor in model.named_parameters()}, folder / OURS)
        if peers:
            save_file(dict(hf_tensors(model)), folder / PEERS)
    except SafetensorError as error:  # as of a full disk
        raise UserError(f"the weights can't be written to {folder}: {first_line(error)}") from None


def bench_sample(args: list[str]) -> None:
    settings, config = read_arguments(args)
    check_places(settings)

    import torch  # slow to import: not before the settings are known to be right

    from gpt_arc.decoding.load import resolve_decoding_dtype
    from gpt_arc.device import device_name, resolve_device
    from gpt_arc.planning.cost import describe_parameters
    from gpt_arc.weights.directory import load_config, load_model
    from model import GPT

    trained = config is None
    config = load_config(settings.model) if trained else config
    check_fits(settings, config)
    device = resolve_device(settings.device)
    torch.manual_seed(settings.seed)
    prompts = torch.randint(config.vocab_size, (settings.batch_size, settings.prompt_tokens)).tolist()
    programs = {"ours": Ours}
    programs |= {"nanoGPT": NanoGPT} if settings.nanogpt is not None else {}
    programs |= {"transformers": Transformers} if settings.transformers else {}
    machine = f"{device_name(device)}, torch {torch.__version__}"
    print(f"machine      {machine}", flush=True)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpt-arc-bench-")))
        model = load_model(settings.model)[0] if trained else GPT(config)
        dtype = str(resolve_decoding_dtype(settings.dtype, device, 4 * model.num_parameters()))
        dtype = dtype.removeprefix("torch.")
        print(f"model        {settings.model}, {describe_parameters(model, ' parameters')}, {dtype}")
        print(
            f"work         {settings.batch_size} x ({settings.prompt_tokens} + {settings.max_new_tokens}) tokens",
            end="",
        )
        print(f", {settings.rounds} rounds after a warm-up", flush=True)
        write_weights(model, folder, peers=len(programs) > 1)
        del model
        job = Job(settings, config, str(device), dtype, prompts, folder)
        ask = {name: stack.enter_context(running(name, program, job)) for name, program in programs.items()}
        on_cpu = device.type == "cpu"  # elsewhere it is a process's own memory that is measured
        rate_of_memory = partial(memory_rate, "cpu") if on_cpu else partial(ask["ours"], "memory_rate")
        rounds, rates = take_turns(ask, settings.rounds, rate_of_memory)
        sizes = ask["ours"]("sizes")

    results = {"machine": machine, "dtype": dtype, "layout": sizes["layout"], "architecture": asdict(config)}
    results["settings"] = plain(settings)
    results["programs"] = {name: figures(settings, *taken) for name, taken in rounds.items()}
    pairs = {name: list(zip(rounds["ours"], taken))[1:] for name, taken in rounds.items() if name != "ours"}
    results["ratios"] = {name: spread([its.whole / ours.whole for ours, its in pair]) for name, pair in pairs.items()}
    floor = step_bytes(config, settings.batch_size, rounds["ours"][-1].held, sizes)
    floor |= {"bytes_per_second": median(rates), "ms": 1000 * sum(floor.values()) / median(rates)}
    results["floor"] = floor | {"share": floor["ms"] / results["programs"]["ours"]["step_ms"]["median"]}
    show(results)
    if settings.json is not None:
        write_file(settings.json.resolve(), json.dumps(results, indent=2) + "\n")
