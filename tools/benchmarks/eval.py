"""`bench.py eval`: scoring multiple choice, against EleutherAI's lm-evaluation-harness.

    python tools/bench.py eval configs/gpt2.toml --transformers=True
    python tools/bench.py eval configs/gpt2.toml --n_layer=4 --items=100 --transformers=True --json=eval.json

An item is a context and several options, with random tokens and lengths; the architecture gets random weights. The
score is each option's log-probability after its context. Each competitor has its own process with the same weights and
items, and they take turns, round by round; a round scores all items:

- ours: `score_continuations`, as stages/eval.py and our harness adapter call it.
- harness: the harness's own adapter to transformers (HFLM), given tokens, with the fastest of --batch_sizes. It is
  chosen during the warm-up, on options of similar length. "auto" would take the largest that fits, up to 64.
- both a second time with 16-bit weights, if --dtype is not float32.

The largest difference of log-probabilities compares the two in float32. The floor reads each context once and each
option after it, at 2 FLOPs per parameter and token, attention not counted, at the rate measured between the rounds for
products of two 1024 x 1024 matrices.
"""

import contextlib
import dataclasses
import itertools
import logging
import random
from abc import ABC, abstractmethod
from dataclasses import asdict
from statistics import median
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic.dataclasses import dataclass

from benchmarks.processes import (
    ModelBench,
    check_requirements,
    child_process,
    json_settings,
    machine_name,
    ratio_of_medians,
    read_model_arguments,
    spread,
    synchronized_time,
    take_turns,
    write_results,
)
from gpt_arc.errors import UserError
from gpt_arc.extras import import_extra
from gpt_arc.settings import STRICT, Count
from gpt_arc.tables import counted

TRIALS = 2  # batches per candidate size when choosing the harness's batch size


@dataclass(frozen=True, config=STRICT)
class EvalBench(ModelBench):
    items: Count = 1000
    """Items per round."""
    options: Count = 4
    """Options per item."""
    min_context: Count = 60
    """Tokens of the shortest context."""
    max_context: Count = 100
    """Tokens of the longest context."""
    min_option: Count = 5
    """Tokens of the shortest option."""
    max_option: Count = 20
    """Tokens of the longest option."""
    batch_tokens: Count = 8192
    """Tokens that our code reads at once."""
    batch_sizes: Annotated[tuple[Count, ...], MinLen(1)] = (1, 8, 32, 64)
    """Options, with their contexts, that the harness reads at once."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in the rows other than float32. auto: the fastest on this hardware."""

    def __post_init__(self):
        for what in ("context", "option"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if high < low:
                raise ValueError(f"max_{what} = {high} is less than min_{what} = {low}")


@dataclasses.dataclass(frozen=True)
class EvalJob:
    """Input of a child process."""

    settings: EvalBench
    config: Any  # GPTConfig; importing it would import torch
    device: str
    dtype: str  # of the 16-bit workers


def draw_items(settings: EvalBench, vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """Returns (context, option) for every option of every item, grouped by item."""
    draw = random.Random(settings.seed)

    def random_tokens(least: int, most: int) -> list[int]:
        return draw.choices(range(vocab_size), k=draw.randint(least, most))

    pairs = []
    for _ in range(settings.items):
        context = random_tokens(settings.min_context, settings.max_context)
        pairs += [(context, random_tokens(settings.min_option, settings.max_option)) for _ in range(settings.options)]
    return pairs


class EvalWorker(ABC):
    """Scores all options."""

    sixteen_bit = False

    def __init__(self, job: EvalJob):
        import torch

        from model import GPT

        self.job, self.device = job, torch.device(job.device)
        self.dtype = getattr(torch, job.dtype if self.sixteen_bit else "float32")
        torch.manual_seed(job.settings.seed)
        self.pairs = draw_items(job.settings, job.config.vocab_size)
        self.setup(GPT(job.config).eval())

    @abstractmethod
    def setup(self, model: Any) -> None:
        """Prepares to score with the weights of `model`, a GPT."""

    @abstractmethod
    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        """Returns the log-probability of each option after its context."""

    def round(self) -> float:
        """Seconds it takes to score all options."""
        start = synchronized_time(self.device)
        self.scores = self.score(self.pairs)
        return synchronized_time(self.device) - start

    def log_probabilities(self) -> list[float]:
        """Scores of the last round."""
        return self.scores


class OurScorer(EvalWorker):
    def setup(self, model: Any) -> None:
        self.model = model.to(self.device, self.dtype)

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        from gpt_arc.evaluation.score import Request, score_continuations

        requests = list(itertools.starmap(Request, pairs))
        scores = score_continuations(self.model, requests, self.job.settings.batch_tokens)
        return [score.log_probability for score in scores]


class HarnessScorer(EvalWorker):
    def setup(self, model: Any) -> None:
        import transformers
        from tokenizers import Tokenizer, models

        from gpt_arc.weights.huggingface import hf_config, hf_tensors

        transformers.logging.set_verbosity_error()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        config = transformers.AutoConfig.for_model(**hf_config(self.job.config, "float32"))
        peer = transformers.AutoModelForCausalLM.from_config(config)
        peer.load_state_dict(dict(hf_tensors(model)), strict=False)
        peer.tie_weights()
        numbers = {
            str(token): token for token in range(self.job.config.vocab_size)
        }  # HFLM needs a tokenizer and never uses it
        words = Tokenizer(models.WordLevel(numbers, unk_token="0"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")
        self.model = peer.to(self.device, self.dtype).eval()
        adapter = import_extra("lm_eval.models.huggingface").HFLM
        self.harness, self.chosen = adapter(self.model, tokenizer=tokenizer, backend="causal"), False

    def round(self) -> float:
        if not self.chosen:  # in the warm-up round, while the other workers wait
            self.harness.batch_size_per_gpu, self.chosen = self.fastest(), True
        return super().round()

    def fastest(self) -> int:
        """The fastest batch size for options that are neighbors in the harness's order."""
        sizes = [size for size in self.job.settings.batch_sizes if size <= len(self.pairs)] or [len(self.pairs)]
        count = min(TRIALS * max(sizes), len(self.pairs))
        first = (len(self.pairs) - count) // 2
        sample = sorted(self.pairs, key=lambda pair: len(pair[0]) + len(pair[1]))[first : first + count]
        seconds = {}
        for size in sizes:
            self.harness.batch_size_per_gpu = size
            self.score(sample[:size])
            start = synchronized_time(self.device)
            self.score(sample)
            seconds[size] = synchronized_time(self.device) - start
        return min(seconds, key=seconds.__getitem__)

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        requests = [(("", ""), *pair) for pair in pairs]
        return [log for log, _ in self.harness._loglikelihood_tokens(requests, disable_tqdm=True)]

    def batch_size(self) -> int:
        return self.harness.batch_size_per_gpu


class OurScorer16Bit(OurScorer):
    sixteen_bit = True


class HarnessScorer16Bit(HarnessScorer):
    sixteen_bit = True


def minimum_flops(settings: EvalBench, config: Any, weights: int) -> int:
    """2 FLOPs per token read and weight of the blocks (`weights`), plus the FLOPs of the logits."""
    pairs = draw_items(settings, config.vocab_size)
    contexts = sum(len(context) for context, _ in pairs[:: settings.options])
    options = sum(len(option) for _, option in pairs)
    read = contexts + options - len(pairs)  # an option's last token is scored, not read
    return 2 * weights * read + 2 * config.n_embd * config.vocab_size * options


def summarize(items: int, warmup: float, *rounds: float) -> dict[str, Any]:
    """Figures of one competitor from the seconds of its rounds."""
    seconds = spread(rounds)
    return {
        "items_per_second": items / seconds["median"],
        "round_seconds": seconds,
        "warmup_seconds": warmup,
        "rounds": list(rounds),
    }


def show(results: dict[str, Any]) -> None:
    columns = ["items/s", "round s", "min s", "max s", "floor s", "of floor"]
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
        print(f"difference   {results['largest_difference']:.1e} nats at most in float32", end="")
        print(f", of log-probabilities down to {results['least_log_probability']:.0f}")


def bench_eval(args: list[str]) -> None:
    settings, config = read_model_arguments(EvalBench, __doc__, args)
    check_requirements(settings, ("lm_eval", "transformers"))

    from gpt_arc.device import device_name, resolve_device, resolve_dtype
    from gpt_arc.nn.meta import meta_device
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
    with meta_device():
        model = GPT(config)
    workers: dict[str, type[EvalWorker]] = {"ours": OurScorer}
    workers |= {"harness": HarnessScorer} if settings.transformers else {}
    if dtype != "float32":
        workers |= {"ours 16 bit": OurScorer16Bit}
        workers |= {"harness 16 bit": HarnessScorer16Bit} if settings.transformers else {}
    dtype_of = {name: dtype if program.sixteen_bit else "float32" for name, program in workers.items()}
    machine = machine_name(device)
    dtypes = list(dict.fromkeys(dtype_of.values()))
    print(f"machine      {machine}")
    print(f"model        {settings.model}, {describe_parameters(model, ' parameters')}, {' and '.join(dtypes)}")
    print(
        f"work         {settings.items:,} items of {settings.options} options, contexts of {settings.min_context}",
        end="",
    )
    print(f" to {settings.max_context} tokens, options of {settings.min_option} to {settings.max_option}", end="")
    print(f", {counted(settings.rounds, 'round')} after a warm-up round", flush=True)

    def rates() -> dict[str, float | None]:
        name = device_name(device)
        return {dtype: peak_flops(device, name, dtype) for dtype in dtypes}

    with contextlib.ExitStack() as stack:
        job = EvalJob(settings, config, str(device), dtype)
        calls = {name: stack.enter_context(child_process(name, program, job)) for name, program in workers.items()}
        rounds, measured_rates = take_turns(calls, settings.rounds, rates)
        logs = {name: calls[name]("log_probabilities") for name in workers if not workers[name].sixteen_bit}
        batch_sizes = {name: calls[name]("batch_size") for name in workers if issubclass(workers[name], HarnessScorer)}

    results: dict[str, Any] = {"machine": machine, "dtype": dtype, "parameters": model.num_parameters()}
    results |= {"architecture": asdict(config), "settings": json_settings(settings)}
    results["programs"] = {name: summarize(settings.items, *seconds) for name, seconds in rounds.items()}
    flops = minimum_flops(settings, config, model.num_parameters(embeddings=False))
    results["floor_flops"] = flops
    for name, row in results["programs"].items():
        if measured_rates[0][dtype_of[name]] is not None:
            floor = flops / median(rates[dtype_of[name]] for rates in measured_rates)
            row |= {"floor_seconds": floor, "floor_share": floor / row["round_seconds"]["median"]}
    results["ratios"] = {}
    for name, size in batch_sizes.items():
        our_name = name.replace("harness", "ours")
        ours, other = results["programs"][our_name], results["programs"][name]
        results["ratios"][name] = ratio_of_medians(ours, other) | {"as": our_name, "batch_size": size}
    if "harness" in logs:
        results["largest_difference"] = max(abs(a - b) for a, b in zip(logs["ours"], logs["harness"]))
        results["least_log_probability"] = min(logs["ours"])
    show(results)
    write_results(settings.json, results)
