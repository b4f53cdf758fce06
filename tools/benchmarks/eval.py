"""The evaluation part of tools/bench.py: multiple choice scored by us, beside EleutherAI's lm-evaluation-harness.

    python tools/bench.py eval configs/gpt2.toml --transformers=True
    python tools/bench.py eval configs/gpt2.toml --n_layer=4 --items=100 --transformers=True --json=eval.json

An item is a context and some options, all of random tokens and lengths; the architecture gets random weights. Scored is
each option's log-probability after its context. Each program has a process of its own with the same weights and items,
and they take turns, round by round; a round is all items:

- ours: `score_continuations`, as stages/eval.py and our adapter to the harness call it.
- harness: the harness's own adapter to transformers (HFLM), given the tokens, in the fastest of --batch_sizes, which it
  finds while it warms up, by options of like length. With "auto" it would take the largest that fits, up to 64.
- both again with weights in 16 bits, if --dtype is not float32.

The largest difference of log-probabilities is that of the two in float32. The floor is what the scores take at least,
each context read once and each option after it, 2 FLOPs a parameter and token with attention not counted, over the rate
of products of two 1024 x 1024 matrices between the rounds.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import random
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Literal

import tyro
from pydantic.dataclasses import dataclass

from benchmarks.processes import check_places, now, plain, read_model_arguments, running, spread, take_turns
from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.settings import STRICT

TRIALS = 2  # batches of each size by which the harness's is chosen


@dataclass(frozen=True, config=STRICT)
class EvalBench:
    model: tyro.conf.Positional[str]
    """A config file (.toml), whose architecture may be changed by flags such as --n_layer=6; or, for its architecture
    alone, a run folder, a model directory, or a published model: gpt2, hf:OWNER/NAME."""
    items: int = 1000
    """Items of a round."""
    options: int = 4
    """Options of an item."""
    min_context: int = 60
    """Tokens of the shortest context."""
    max_context: int = 100
    """Tokens of the longest context."""
    min_option: int = 5
    """Tokens of the shortest option."""
    max_option: int = 20
    """Tokens of the longest option."""
    batch_tokens: int = 8192
    """What we read at once, in tokens."""
    batch_sizes: tuple[int, ...] = (1, 8, 32, 64)
    """What the harness may read at once, in options with their contexts."""
    rounds: int = 3
    """Rounds that are measured, after one that warms up."""
    transformers: bool = False
    """Measure the harness with transformers too."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in the rows beside float32's. auto: what the hardware multiplies fastest."""
    seed: int = 1337
    """The source of random weights and items."""
    json: Path | None = None
    """A file for the results."""

    def __post_init__(self):
        least = dict.fromkeys(("items", "options", "min_context", "min_option", "batch_tokens", "rounds"), 1)
        for name, number in (least | {"seed": 0}).items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} = {getattr(self, name)} must be {number} or more")
        if self.seed >= 2**63:
            raise ValueError(f"seed = {self.seed} must be less than 2**63")
        for what in ("context", "option"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if high < low:
                raise ValueError(f"max_{what} = {high} is less than min_{what} = {low}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes = {self.batch_sizes} must be some numbers of 1 or more")


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process needs to know."""

    settings: EvalBench
    config: Any  # GPTConfig, whose import takes torch
    device: str
    dtype: str  # of the programs in 16 bits


def draw_items(settings: EvalBench, vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """A context and an option for each option of each item, those of an item one after the other."""
    draw = random.Random(settings.seed)

    def some(least: int, most: int) -> list[int]:
        return draw.choices(range(vocab_size), k=draw.randint(least, most))

    pairs = []
    for _ in range(settings.items):
        context = some(settings.min_context, settings.max_context)
        pairs += [(context, some(settings.min_option, settings.max_option)) for _ in range(settings.options)]
    return pairs


class Program:
    """Scores of all options; what is its own is in `setup` and `work`."""

    sixteen_bit = False

    def __init__(self, job: Job):
        import torch

        from model import GPT

        self.job, self.device = job, torch.device(job.device)
        self.dtype = getattr(torch, job.dtype if self.sixteen_bit else "float32")
        torch.manual_seed(job.settings.seed)
        self.pairs = draw_items(job.settings, job.config.vocab_size)
        self.setup(GPT(job.config).eval())

    def round(self) -> float:
        """The seconds that the scores take."""
        start = now(self.device)
        self.scores = self.work(self.pairs)
        return now(self.device) - start

    def log_probabilities(self) -> list[float]:
        """Those of the last round."""
        return self.scores


class Ours(Program):
    def setup(self, model: Any) -> None:
        self.model = model.to(self.device, self.dtype)

    def work(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        from gpt_arc.evaluation.score import Request, score_continuations

        requests = list(itertools.starmap(Request, pairs))
        scores = score_continuations(self.model, requests, self.job.settings.batch_tokens)
        return [score.log_probability for score in scores]


class Harness(Program):
    def setup(self, model: Any) -> None:
        import transformers
        from lm_eval.models.huggingface import HFLM
        from tokenizers import Tokenizer, models

        from gpt_arc.weights.huggingface import hf_config, hf_tensors

        transformers.logging.set_verbosity_error()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        config = transformers.AutoConfig.for_model(**hf_config(self.job.config, "float32"))
        theirs = transformers.AutoModelForCausalLM.from_config(config)
        theirs.load_state_dict(dict(hf_tensors(model)), strict=False)
        theirs.tie_weights()
        numbers = {str(token): token for token in range(self.job.config.vocab_size)}  # one to hold, none to use
        words = Tokenizer(models.WordLevel(numbers, unk_token="0"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
        self.model = theirs.to(self.device, self.dtype).eval()
        self.harness, self.chosen = HFLM(self.model, tokenizer=tokenizer, backend="causal"), False

    def round(self) -> float:
        if not self.chosen:  # in the round that warms up, while the other programs wait
            self.harness.batch_size_per_gpu, self.chosen = self.fastest(), True
        return super().round()

    def fastest(self) -> int:
        """The batch size with which options next to each other in the harness's order take least."""
        sizes = [size for size in self.job.settings.batch_sizes if size <= len(self.pairs)] or [len(self.pairs)]
        count = min(TRIALS * max(sizes), len(self.pairs))
        first = (len(self.pairs) - count) // 2
        sample = sorted(self.pairs, key=lambda pair: len(pair[0]) + len(pair[1]))[first : first + count]
        seconds = {}
        for size in sizes:
            self.harness.batch_size_per_gpu = size
            self.work(sample[:size])
            start = now(self.device)
            self.work(sample)
            seconds[size] = now(self.device) - start
        return min(seconds, key=seconds.__getitem__)

    def work(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        requests = [(("", ""), *pair) for pair in pairs]
        return [log for log, _ in self.harness._loglikelihood_tokens(requests, disable_tqdm=True)]

    def batch_size(self) -> int:
        return self.harness.batch_size_per_gpu


class Ours16Bit(Ours):
    sixteen_bit = True


class Harness16Bit(Harness):
    sixteen_bit = True


def least_flops(settings: EvalBench, config: Any, weights: int) -> int:
    """2 FLOPs for each of the blocks' `weights` and each token that is read, and those of the logits."""
    pairs = draw_items(settings, config.vocab_size)
    contexts = sum(len(context) for context, _ in pairs[:: settings.options])
    options = sum(len(option) for _, option in pairs)
    read = contexts + options - len(pairs)  # an option's last token is scored and not read
    return 2 * weights * read + 2 * config.n_embd * config.vocab_size * options


def figures(items: int, warmup: float, *rounds: float) -> dict[str, Any]:
    """What the rounds of one program come to, each given by its seconds."""
    seconds = spread(rounds)
    return {
        "items_per_second": items / seconds["median"],
        "round_seconds": seconds,
        "warmup_seconds": warmup,
        "rounds": list(rounds),
    }


def show(results: dict[str, Any]) -> None:
    columns = ["items/s", "round s", "least s", "most s", "floor s", "of it"]
    print("\n" + f"{'':16}" + "".join(f"{column:>11}" for column in columns))
    for name, row in results["programs"].items():
        seconds = "".join(f"{row['round_seconds'][key]:11,.2f}" for key in ("median", "min", "max"))
        floor = f"{row['floor_seconds']:11,.2f}{row['floor_share']:11.0%}" if "floor_seconds" in row else ""
        print(f"{name:16}{row['items_per_second']:11,.2f}{seconds}{floor}")
    print()
    for name, ratio in results["ratios"].items():
        print(f"ratio        {name} takes {ratio['median']:.2f} times as long as {ratio['as']}", end="")
        print(f" ({ratio['min']:.2f} to {ratio['max']:.2f} over the rounds), in batches of {ratio['batch_size']}")
    if "largest_difference" in results:
        print(f"difference   {results['largest_difference']:.1e} nats at most, in float32", end="")
        print(f", of log-probabilities down to {results['least_log_probability']:.0f}")


def bench_eval(args: list[str]) -> None:
    settings, config = read_model_arguments(EvalBench, __doc__, args)
    check_places(settings, ("lm_eval", "transformers"))

    import torch  # slow to import: not before the settings are known to be right

    from gpt_arc.device import device_name, resolve_device, resolve_dtype
    from gpt_arc.planning.cost import describe_parameters, peak_flops
    from gpt_arc.weights.directory import load_config
    from gpt_arc.weights.huggingface import architecture_of
    from model import GPT

    config = load_config(settings.model) if config is None else config
    longest = settings.max_context + settings.max_option - 1
    if longest > config.block_size:
        raise UserError(
            f"max_context + max_option - 1 = {longest} is more than the context, block_size = {config.block_size}"
        )
    if settings.transformers:
        architecture_of(config)
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    with torch.device("meta"):
        model = GPT(config)
    programs: dict[str, type[Program]] = {"ours": Ours}
    programs |= {"harness": Harness} if settings.transformers else {}
    if dtype != "float32":
        programs |= {"ours 16 bit": Ours16Bit}
        programs |= {"harness 16 bit": Harness16Bit} if settings.transformers else {}
    dtype_of = {name: dtype if program.sixteen_bit else "float32" for name, program in programs.items()}
    machine = f"{device_name(device)}, torch {torch.__version__}"
    dtypes = list(dict.fromkeys(dtype_of.values()))
    print(f"machine      {machine}")
    print(f"model        {settings.model}, {describe_parameters(model, ' parameters')}, {' and '.join(dtypes)}")
    print(
        f"work         {settings.items:,} items of {settings.options} options, contexts of {settings.min_context}",
        end="",
    )
    print(f" to {settings.max_context} tokens, options of {settings.min_option} to {settings.max_option}", end="")
    print(f", {settings.rounds} rounds after one to warm up", flush=True)

    def rates() -> dict[str, float | None]:
        name = device_name(device)
        return {dtype: peak_flops(device, name, dtype) for dtype in dtypes}

    with contextlib.ExitStack() as stack:
        job = Job(settings, config, str(device), dtype)
        ask = {name: stack.enter_context(running(name, program, job)) for name, program in programs.items()}
        rounds, seen = take_turns(ask, settings.rounds, rates)
        logs = {name: ask[name]("log_probabilities") for name in programs if not programs[name].sixteen_bit}
        batch_sizes = {name: ask[name]("batch_size") for name in programs if issubclass(programs[name], Harness)}

    results: dict[str, Any] = {"machine": machine, "dtype": dtype, "parameters": model.num_parameters()}
    results |= {"architecture": asdict(config), "settings": plain(settings)}
    results["programs"] = {name: figures(settings.items, *taken) for name, taken in rounds.items()}
    flops = least_flops(settings, config, model.num_parameters(embeddings=False))
    results["floor_flops"] = flops
    for name, row in results["programs"].items():
        if seen[0][dtype_of[name]] is not None:
            floor = flops / median(each[dtype_of[name]] for each in seen)
            row |= {"floor_seconds": floor, "floor_share": floor / row["round_seconds"]["median"]}
    results["ratios"] = {}
    for name, size in batch_sizes.items():
        mine = name.replace("harness", "ours")
        ours, its = results["programs"][mine], results["programs"][name]
        over_rounds = spread([b / a for a, b in zip(ours["rounds"], its["rounds"])])
        both = {"median": its["round_seconds"]["median"] / ours["round_seconds"]["median"]}
        results["ratios"][name] = over_rounds | both | {"as": mine, "batch_size": size}
    if "harness" in logs:
        results["largest_difference"] = max(abs(a - b) for a, b in zip(logs["ours"], logs["harness"]))
        results["least_log_probability"] = min(logs["ours"])
    show(results)
    if settings.json is not None:
        write_file(settings.json.resolve(), json.dumps(results, indent=2) + "\n")
