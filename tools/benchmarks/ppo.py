"""The reinforcement learning part of tools/bench.py: stages/ppo.py beside trl's PPOTrainer.

    python tools/bench.py ppo --trl=True
    python tools/bench.py ppo --n_layer=4 --episodes=8192 --trl=True --json=ppo.json

The task has a true reward, a rule: how many letters of a response its prompt has, as a share of max_new_tokens. A small
GPT-2 of 26 letters first learns from examples, half as long, in which three letters in five are copied. From there both
programs go on, with the same weights, prompts, reward, batches, passes, rates and limits. Each seed is a run of each
program, in a process of its own, and they take turns after every iteration, so that whatever else the machine does
meets them alike:

- ours: stages/ppo.py by its command line, in float32.
- ours 16 bit, with --sixteen_bit=True: the same in bfloat16.
- trl: its experimental PPOTrainer in float32, with a value network from the same weights (pip install trl==1.12.0).

What is not set alike is as it comes: ours shortens gradients to norm 1, divides rewards by their deviation and has
Adam's beta2 .95 and epsilon 1e-5; trl does neither, and has .999 and 1e-8. trl gives the score, and a value, to the
state after a response's end. They draw responses and the order of prompts from generators of their own.

An iteration is timed from one scoring of responses to the next: updates, writing, values, reference. The first ones,
loading and saving aren't counted. The reward is compared over the last fifth of the episodes, by Welch's interval.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import runpy
import string
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from pydantic.dataclasses import dataclass

from benchmarks.processes import check_places, peak_memory, plain, reporting, running, spread
from gpt_arc.errors import UserError
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT

TRL = "1.12.0"  # the last release with a PPOTrainer, in trl.experimental
UNCOUNTED = 2  # iterations at the start whose time doesn't count
LETTERS, PROMPT_LETTERS, COPIED = string.ascii_lowercase, (4, 8), 0.6
EXAMPLES, EXAMPLE_BATCH, EXAMPLE_RATE = 4096, 32, 1e-3  # of the supervised start
POLICY, PROMPTS = "policy", "prompts.jsonl"
SAME = (  # settings of stages/ppo.py that have the same names here
    "episodes", "minibatches", "inner_epochs", "max_new_tokens", "temperature", "learning_rate", "kl_coef", "gamma",
    "gae_lambda", "clip", "value_clip", "value_coef",
)  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class PPOBench:
    n_layer: int = 2
    """Blocks of the policy."""
    n_head: int = 4
    """Attention heads of each."""
    n_embd: int = 128
    """Width of the policy."""
    block_size: int = 64
    """Context of the policy."""
    prompts: int = 512
    """Different prompts."""
    supervised_updates: int = 400
    """Updates on examples before, which make the policy that both programs start from."""
    episodes: int = 4096
    """Responses of a run, a multiple of episodes_per_iteration."""
    episodes_per_iteration: int = 64
    """Responses between updates, a multiple of minibatches."""
    minibatches: int = 4
    """Updates that the responses of an iteration are parted into."""
    inner_epochs: int = 4
    """Passes over the responses of an iteration."""
    max_new_tokens: int = 16
    """Tokens of a response, at most."""
    learning_rate: float = 5e-4
    """The same in every update."""
    temperature: float = 1.0
    """Of the policy, the reference included."""
    kl_coef: float = 0.02
    """Reward that a nat of KL to the reference costs."""
    gamma: float = 1.0
    """Discount of later rewards."""
    gae_lambda: float = 0.95
    """Weight of longer estimates of an advantage."""
    clip: float = 0.2
    """Of the policy's ratio."""
    value_clip: float = 0.2
    """Of a value's change."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    seeds: int = 3
    """Runs of each program."""
    seed: int = 1337
    """The source of the policy and the prompts, and the first run's seed; the others' follow it."""
    trl: bool = False
    """Measure trl's PPOTrainer too."""
    sixteen_bit: bool = False
    """Measure ours in bfloat16 too. (trl's bf16=True doesn't reach its Accelerator.)"""
    device: str = "cpu"
    """auto (cuda, else mps, else cpu), or a device of torch's."""
    json: Path | None = None
    """A file for the results."""

    def __post_init__(self):
        least = {"prompts": 1, "supervised_updates": 0, "max_new_tokens": 1, "seeds": 1, "seed": 0}
        least |= {"episodes_per_iteration": 1, "minibatches": 1, "inner_epochs": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} = {getattr(self, name)} must be {number} or more")
        if self.episodes_per_iteration % self.minibatches:
            multiple = f"a multiple of minibatches = {self.minibatches}"
            raise ValueError(f"episodes_per_iteration = {self.episodes_per_iteration} must be {multiple}")
        if self.episodes % self.episodes_per_iteration or self.iterations <= UNCOUNTED:
            multiple = f"a multiple of episodes_per_iteration = {self.episodes_per_iteration}"
            raise ValueError(f"episodes = {self.episodes} must be {multiple}, of more than {UNCOUNTED} iterations")
        if self.prompts < self.episodes_per_iteration:
            raise ValueError(f"prompts = {self.prompts} must be episodes_per_iteration or more: trl draws no fewer")
        longest = PROMPT_LETTERS[1] + 2 + self.max_new_tokens
        if longest > self.block_size:
            raise ValueError(f"block_size = {self.block_size} must be {longest} or more: a prompt and its response")

    @property
    def iterations(self) -> int:
        return self.episodes // self.episodes_per_iteration


def overlap(prompt: str, response: str, most: int) -> float:
    """The true reward: how many letters of the response its prompt has, as a share of the `most` there may be."""
    return sum(letter in prompt for letter in response) / most


def draw_prompt(generator: np.random.Generator) -> str:
    return "".join(generator.choice(list(LETTERS), generator.integers(*PROMPT_LETTERS, endpoint=True)))


def draw_response(generator: np.random.Generator, prompt: str, most: int) -> str:
    """Half of `most` letters on average, of which the share COPIED or a little more is the prompt's."""
    length = generator.integers(1, most)
    copied = generator.random(length) < COPIED
    return "".join(generator.choice(list(prompt if own else LETTERS)) for own in copied)


def prepare(settings: PPOBench, folder: Path) -> Any:
    """Write the policy that the programs start from, and the prompts. Returns its GPTConfig."""
    import torch

    from gpt_arc.chat.batches import conversation_batch, encode_conversations
    from gpt_arc.chat.files import Conversation
    from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn
    from gpt_arc.data.tokenizer import CharTokenizer
    from gpt_arc.training.config import TrainingConfig
    from gpt_arc.training.optim import Updater
    from gpt_arc.weights.directory import save_model
    from model import GPT, GPTConfig

    tokenizer, generator = CharTokenizer(LETTERS), np.random.default_rng(settings.seed)
    chat = ChatFormat.new(TEMPLATES["markers"], tokenizer, tokenizer.vocab_size)
    sizes = {"n_layer": settings.n_layer, "n_head": settings.n_head, "n_embd": settings.n_embd}
    vocabulary = tokenizer.vocab_size + len(chat.added)
    torch.manual_seed(settings.seed)
    model = GPT(GPTConfig(block_size=settings.block_size, vocab_size=vocabulary, **sizes))
    conversations = []
    for _ in range(EXAMPLES):
        prompt = draw_prompt(generator)
        response = draw_response(generator, prompt, settings.max_new_tokens)
        conversations.append(Conversation((Turn("user", prompt), Turn("assistant", response)), "", {}))
    examples = encode_conversations(conversations, chat, settings.block_size).examples
    updates = settings.supervised_updates
    updater = Updater(model, TrainingConfig(learning_rate=EXAMPLE_RATE), torch.device("cpu"), "float32")
    for _ in range(updates):
        batch = [examples[i] for i in generator.integers(len(examples), size=EXAMPLE_BATCH)]
        loss = model(*conversation_batch(batch, None))
        updater.backward(loss.total / loss.count)
        updater.update(EXAMPLE_RATE, loss.total.detach())
    save_model(model, tokenizer, folder / POLICY)
    chat.save(folder / POLICY)
    prompts = [{"prompt": draw_prompt(generator)} for _ in range(settings.prompts)]
    write_file(folder / PROMPTS, "".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return model.config


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process needs to know."""

    settings: PPOBench
    folder: Path  # with policy and prompts; that may be written to
    name: str
    seed: int
    device: str
    dtype: str

    @property
    def out(self) -> Path:
        return self.folder / f"{self.name} {self.seed}"


class Scored(NamedTuple):
    """The responses of an iteration."""

    seconds: float  # of work, since the ones before
    rewards: list[float]
    tokens: float  # of a response, on average, without its end


class Ended(NamedTuple):
    """What a program says once its run is over."""

    kl: list[float]  # nats a response, of each iteration
    peak: int  # bytes of memory


class Watch:
    """Tells the parent of what is scored, and waits for its word to go on."""

    def __init__(self, pipe: Any, most: int):
        self.pipe, self.most, self.resumed = pipe, most, time.perf_counter()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        rewards = [overlap(prompt, response, self.most) for prompt, response in zip(prompts, responses)]
        self.pipe.send(Scored(time.perf_counter() - self.resumed, rewards, fmean(map(len, responses))))
        self.pipe.recv()
        self.resumed = time.perf_counter()
        return rewards


watch: Watch | None = None  # of this process


def reward(rows: Sequence[dict[str, str]], responses: Sequence[str]) -> list[float]:
    """What stages/ppo.py calls for rewards."""
    return watch.score([row["prompt"] for row in rows], responses)


def serve_run(pipe: Any, program: Any, job: Job) -> None:
    """The life of a process: a whole run, whose KL and memory are told at its end."""
    global watch
    with reporting(pipe):
        watch = Watch(pipe, job.settings.max_new_tokens)
        kl = program(job)
        pipe.send(Ended(kl, peak_memory(job.device)))


def run_ours(job: Job) -> list[float]:
    """stages/ppo.py, from its command line on."""
    settings = job.settings
    flags = {name: getattr(settings, name) for name in SAME}
    flags |= {"prompts": job.folder / PROMPTS, "reward": f"{__name__}:reward", "out_dir": job.out}
    flags |= {"batch_size": settings.episodes_per_iteration // settings.minibatches, "gradient_accumulation_steps": 1}
    flags |= {"rollout_batch_size": settings.episodes_per_iteration, "save_interval": settings.iterations}
    flags |= {"dtype": job.dtype, "device": job.device, "seed": job.seed}
    sys.argv = ["ppo.py", str(job.folder / POLICY), *(f"--{name}={value}" for name, value in flags.items())]
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "stages" / "ppo.py"))["main"]()  # as the command does
    lines = (job.out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["kl_k1"] for line in lines]


def run_trl(job: Job) -> list[float]:
    """trl's PPOTrainer."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what trl says of gradient checkpointing
    import datasets
    import torch
    import transformers
    from tokenizers import Tokenizer, models
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from gpt_arc.chat.format import Turn, load_chat_model
    from gpt_arc.weights.huggingface import hf_config, hf_tensors

    transformers.logging.set_verbosity_error()
    transformers.set_seed(job.seed)
    settings, size = job.settings, job.settings.episodes_per_iteration
    ours, tokenizer, chat = load_chat_model(job.folder / POLICY)

    # trl tells padding by a token, which then counts as none: one that the policy never learned to write
    pad, end, answer = (chat.ids[mark] for mark in ("<|system|>", "<|end|>", "<|assistant|>"))
    described = hf_config(ours.config, "float32") | {"pad_token_id": pad, "eos_token_id": end}
    config = transformers.AutoConfig.for_model(**described, num_labels=1)
    weights = dict(hf_tensors(ours))
    policy, reference = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    value_network = transformers.AutoModelForSequenceClassification.from_config(config)
    for model in (policy, reference, value_network):
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight", "score.weight"}, missing
        model.tie_weights()
    torch.nn.init.zeros_(value_network.score.weight)  # as ours

    class Rule(torch.nn.Module):
        """The true reward in the form of a trunk of transformers', whose states are the rewards themselves."""

        base_model_prefix = "rule"

        def __init__(self):
            super().__init__()
            self.score = torch.nn.Identity()

        def rule(self, input_ids, attention_mask, **_):
            prompts, responses = [], []
            for row, there in zip(input_ids.tolist(), attention_mask.tolist()):
                row = [token for token, is_there in zip(row, there) if is_there]
                start = row.index(answer) + 1
                prompts.append(tokenizer.decode(row[:start]))
                responses.append(chat.decode(row[start:]))
            found = torch.tensor(watch.score(prompts, responses), device=input_ids.device)
            return transformers.modeling_outputs.BaseModelOutput(
                hidden_states=(found[:, None, None].expand(*input_ids.shape, 1),)
            )

    vocabulary = dict(zip([*LETTERS, *chat.added], range(ours.config.vocab_size)))
    processing = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), pad_token="<|system|>", eos_token="<|end|>",
        padding_side="left",
    )  # fmt: skip
    rows = map(json.loads, (job.folder / PROMPTS).read_text().splitlines())
    prompts = [{"input_ids": chat.prompt([Turn("user", row["prompt"])])} for row in rows]
    arguments = PPOConfig(
        output_dir=str(job.out),
        total_episodes=settings.episodes,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,  # of the batch of an iteration: with more there would be fewer updates
        num_mini_batches=settings.minibatches,
        num_ppo_epochs=settings.inner_epochs,
        local_rollout_forward_batch_size=size,
        response_length=settings.max_new_tokens,
        stop_token="eos",
        temperature=settings.temperature,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        kl_coef=settings.kl_coef,
        gamma=settings.gamma,
        lam=settings.gae_lambda,
        cliprange=settings.clip,
        cliprange_value=settings.value_clip,
        vf_coef=settings.value_coef,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=job.device == "cpu",
        seed=job.seed,
        num_sample_generations=0,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    kl = []

    class Notes(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            kl.append(logs["objective/kl"])

    trainer = PPOTrainer(
        arguments, processing, policy, reference, Rule(), datasets.Dataset.from_list(prompts), value_network,
        callbacks=[Notes()],
    )  # fmt: skip
    trainer.train()
    return kl


class Run(NamedTuple):
    """A run of a program."""

    iterations: list[Scored]
    ended: Ended


def take_turns(ask: dict[str, Any], iterations: int) -> dict[str, Run]:
    """Let the programs have an iteration in turn until their runs are over."""
    from tqdm import tqdm

    found = {name: [load(None)] for name, load in ask.items()}
    for _ in tqdm(range(iterations), "iterations", leave=False, disable=None):
        for name in ask:
            found[name].append(ask[name]("go on"))
    return {name: Run(answers[:-1], answers[-1]) for name, answers in found.items()}


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs of one program, a seed each, come to."""
    seconds = [scored.seconds for run in runs for scored in run.iterations[UNCOUNTED:]]
    size, last = len(runs[0].iterations[0].rewards), -(-len(runs[0].iterations) // 5)
    each = spread(seconds)
    return {
        "episodes_per_second": size / each["median"],
        "iteration_seconds": each,
        "reward_at_first": fmean(fmean(run.iterations[0].rewards) for run in runs),
        "rewards": [fmean(fmean(scored.rewards) for scored in run.iterations[-last:]) for run in runs],
        "kl": fmean(fmean(run.ended.kl[-last:]) for run in runs),
        "tokens": fmean(fmean(scored.tokens for scored in run.iterations[-last:]) for run in runs),
        "peak_memory_gb": max(run.ended.peak for run in runs) / 1e9,
        "curves": [[fmean(scored.rewards) for scored in run.iterations] for run in runs],
        "kl_curves": [run.ended.kl for run in runs],
        "token_curves": [[scored.tokens for scored in run.iterations] for run in runs],
        "seconds": [[scored.seconds for scored in run.iterations] for run in runs],
    }


def compared(ours: dict[str, Any], its: dict[str, Any]) -> dict[str, Any]:
    """Our speed over trl's, and what our reward has beyond its own, as a share, with Welch's 95% interval."""
    from scipy.stats import ttest_ind

    pairs = zip(ours["seconds"], its["seconds"])
    ratios = [median(theirs[UNCOUNTED:]) / median(own[UNCOUNTED:]) for own, theirs in pairs]
    mean = fmean(its["rewards"])
    found: dict[str, Any] = {"reward": fmean(ours["rewards"]) / mean - 1, "interval": None}
    if len(ours["rewards"]) > 1:
        interval = ttest_ind(ours["rewards"], its["rewards"], equal_var=False).confidence_interval(0.95)
        found["interval"] = [interval.low / mean, interval.high / mean]
    speed = spread(ratios) | {"median": ours["episodes_per_second"] / its["episodes_per_second"]}
    return found | {"speed": speed}


def show(results: dict[str, Any]) -> None:
    columns = ["episodes/s", "iteration s", "reward", "least", "most", "KL", "tokens", "memory GB"]
    print("\n" + f"{'':14}" + "".join(f"{column:>12}" for column in columns))
    for name, row in results["programs"].items():
        rewards = spread(row["rewards"]) | {"mean": fmean(row["rewards"])}
        print(f"{name:14}{row['episodes_per_second']:12,.1f}{row['iteration_seconds']['median']:12,.3f}", end="")
        print("".join(f"{rewards[key]:12.4f}" for key in ("mean", "min", "max")), end="")
        print(f"{row['kl']:12.2f}{row['tokens']:12.1f}{row['peak_memory_gb']:12.2f}")
    print()
    for name, each in results["comparisons"].items():
        speed, interval = each["speed"], each["interval"]
        within = "" if interval is None else f", 95% interval {interval[0]:+.1%} to {interval[1]:+.1%}"
        print(f"reward       {name}: {each['reward']:+.1%} beside trl{within}")
        print(f"speed        {name}: {speed['median']:.2f} times trl's episodes/s", end="")
        print(f" ({speed['min']:.2f} to {speed['max']:.2f} over the seeds)")


def has_ppo_trainer() -> bool:
    found = importlib.util.find_spec("trl")
    return found is not None and any(
        (Path(p) / "experimental" / "ppo").is_dir() for p in found.submodule_search_locations
    )


def bench_ppo(args: list[str]) -> None:
    settings = parse_flags(PPOBench, __doc__, args)
    check_places(settings)
    if settings.trl and not has_ppo_trainer():
        raise UserError(f"no trl with a PPOTrainer is installed, and the latest have none: pip install trl=={TRL}")

    import torch  # slow to import: not before the settings are known to be right

    from gpt_arc.device import device_name, resolve_device
    from model import GPT

    device = resolve_device(settings.device)
    if settings.trl and device.index:
        raise UserError("the PPOTrainer takes the first GPU: choose it by CUDA_VISIBLE_DEVICES, and say --device=cuda")
    programs = {"ours": (run_ours, "float32")}
    programs |= {"ours 16 bit": (run_ours, "bfloat16")} if settings.sixteen_bit else {}
    programs |= {"trl": (run_trl, "float32")} if settings.trl else {}
    machine = f"{device_name(device)}, torch {torch.__version__}"
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory(prefix="gpt-arc-bench-") as place:
        config = prepare(settings, Path(place))
        with torch.device("meta"):
            parameters = GPT(config).num_parameters()
        least, most = PROMPT_LETTERS
        print(f"machine      {machine}, {torch.get_num_threads()} threads")
        print(f"policy       {parameters:,} parameters, {settings.prompts:,} prompts of {least} to {most} letters")
        print(f"work         {settings.seeds} runs of {settings.iterations} iterations, each", end="")
        print(
            f" {settings.episodes_per_iteration} responses and {settings.inner_epochs * settings.minibatches} updates"
        )
        sys.stdout.flush()
        for seed in range(settings.seed, settings.seed + settings.seeds):
            with contextlib.ExitStack() as stack:
                ask = {}
                for name, (program, dtype) in programs.items():
                    job = Job(settings, Path(place), name, seed, str(device), dtype)
                    ask[name] = stack.enter_context(running(name, program, job, serve_run))
                for name, run in take_turns(ask, settings.iterations).items():
                    runs[name].append(run)

    results: dict[str, Any] = {"machine": machine, "parameters": parameters, "settings": plain(settings)}
    results["trl"] = importlib.metadata.version("trl") if settings.trl else None
    results["programs"] = {name: figures(each) for name, each in runs.items()}
    ours, theirs = dict(results["programs"]), results["programs"].get("trl")
    ours.pop("trl", None)
    results["comparisons"] = {name: compared(row, theirs) for name, row in ours.items()} if theirs else {}
    show(results)
    if settings.json is not None:
        write_file(settings.json.resolve(), json.dumps(results, indent=2) + "\n")
