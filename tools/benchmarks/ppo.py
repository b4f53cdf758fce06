"""`bench.py ppo`: reinforcement learning with stages/ppo.py, against trl's PPOTrainer.

    python tools/bench.py ppo --trl=True
    python tools/bench.py ppo --n_layer=4 --episodes=8192 --trl=True --json=ppo.json

The task has a true reward, a rule: the number of a response's letters that occur in its prompt, over max_new_tokens. A
small GPT-2 with 26 letters first learns from examples of half that length, which copy three letters in five. Both
competitors start from it, with the same weights, prompts, reward, batches, passes, rates and limits. For each seed
every competitor does a run in its own process, and they take turns after every iteration, so that other load on the
machine affects them all equally:

- ours: stages/ppo.py, run from its command line, in float32.
- ours 16 bit, with --sixteen_bit=True: the same in bfloat16.
- trl: its experimental PPOTrainer in float32, with a value network from the same weights (pip install trl==1.12.0).

Everything else keeps its default: ours clips gradients to norm 1, divides rewards by their deviation and has Adam's
beta2 .95 and epsilon 1e-5; trl does neither, and has .999 and 1e-8. trl assigns the score, and a value, to the state
after a response's end. Each draws responses and the order of prompts from its own generators.

An iteration is timed from one scoring of responses to the next: updates, writing, values, reference. The first
iterations, loading and saving aren't counted. Rewards are compared over the last fifth of the episodes, with Welch's
interval.
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

from benchmarks.processes import (
    Call,
    check_requirements,
    child_process,
    json_settings,
    machine_name,
    peak_memory,
    reporting,
    spread,
    write_results,
)
from gpt_arc.errors import UserError
from gpt_arc.extras import import_extra
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Natural, NonNegative, Positive, ResultFile, Seed, UnitInterval
from gpt_arc.tables import counted

TRL = "1.12.0"  # the last release with a PPOTrainer, in trl.experimental
UNCOUNTED = 2  # iterations at the start whose time doesn't count
LETTERS, PROMPT_LETTERS, COPIED = string.ascii_lowercase, (4, 8), 0.6
EXAMPLES, EXAMPLE_BATCH, EXAMPLE_RATE = 4096, 32, 1e-3  # of the supervised training
POLICY, PROMPTS = "policy", "prompts.jsonl"
SHARED_SETTINGS = (  # settings of stages/ppo.py that have the same names here
    "episodes", "minibatches", "inner_epochs", "max_new_tokens", "temperature", "learning_rate", "kl_coef", "gamma",
    "gae_lambda", "clip", "value_clip", "value_coef",
)  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class PPOBench:
    n_layer: Count = 2
    """Blocks of the policy."""
    n_head: Count = 4
    """Attention heads per block."""
    n_embd: Count = 128
    """Width of the policy."""
    block_size: Count = 64
    """Context length of the policy."""
    prompts: Count = 512
    """Number of prompts."""
    supervised_updates: Natural = 400
    """Supervised updates before, which produce the policy that both programs start from."""
    episodes: Count = 4096
    """Responses per run, a multiple of episodes_per_iteration."""
    episodes_per_iteration: Count = 64
    """Responses between updates, a multiple of minibatches."""
    minibatches: Count = 4
    """Updates per pass over an iteration's responses."""
    inner_epochs: Count = 4
    """Passes over an iteration's responses."""
    max_new_tokens: Count = 16
    """Maximum tokens in a response."""
    learning_rate: Positive = 5e-4
    """Constant learning rate."""
    temperature: Positive = 1.0
    """Sampling temperature of the policy, also applied to the reference."""
    kl_coef: NonNegative = 0.02
    """Penalty per nat of KL to the reference."""
    gamma: UnitInterval = 1.0
    """Discount of later rewards."""
    gae_lambda: UnitInterval = 0.95
    """Weight of longer estimates of an advantage."""
    clip: Positive = 0.2
    """Clipping range of the policy's ratio."""
    value_clip: Positive = 0.2
    """Clipping range of a value's change."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    seeds: Count = 3
    """Runs per program, one per seed."""
    seed: Seed = 1337
    """Seed of the policy, the prompts and the first run; later runs add 1 each."""
    trl: bool = False
    """Measure trl's PPOTrainer too."""
    sixteen_bit: bool = False
    """Measure ours in bfloat16 too. (trl's bf16=True doesn't reach its Accelerator.)"""
    device: str = "cpu"
    """auto (cuda, else mps, else cpu), or a torch device."""
    json: ResultFile | None = None
    """A file for the results."""

    def __post_init__(self):
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
    """The true reward: the number of the response's letters that occur in the prompt, over `most`."""
    return sum(letter in prompt for letter in response) / most


def draw_prompt(generator: np.random.Generator) -> str:
    return "".join(generator.choice(list(LETTERS), generator.integers(*PROMPT_LETTERS, endpoint=True)))


def draw_response(generator: np.random.Generator, prompt: str, most: int) -> str:
    """Draws half of `most` letters on average; a share of COPIED or slightly more occur in the prompt."""
    length = generator.integers(1, most)
    copied = generator.random(length) < COPIED
    return "".join(generator.choice(list(prompt if copy else LETTERS)) for copy in copied)


def prepare(settings: PPOBench, folder: Path) -> Any:
    """Writes the prompts and the policy that all competitors start from. Returns the policy's GPTConfig."""
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
    vocabulary = tokenizer.vocab_size + len(chat.added)
    torch.manual_seed(settings.seed)
    model = GPT(
        GPTConfig(
            settings.block_size, vocabulary, n_layer=settings.n_layer, n_head=settings.n_head, n_embd=settings.n_embd
        )
    )
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
class PPOJob:
    """Input of a child process."""

    settings: PPOBench
    folder: Path  # with policy and prompts; output goes here too
    name: str
    seed: int
    device: str
    dtype: str

    @property
    def out(self) -> Path:
        return self.folder / f"{self.name} {self.seed}"


class Iteration(NamedTuple):
    """An iteration's responses, once they are scored."""

    seconds: float  # of work since the previous iteration's scores
    rewards: list[float]
    tokens: float  # mean length of a response without its end token


class RunEnd(NamedTuple):
    """Sent by a child process when its run has ended."""

    kl: list[float]  # nats per response, for each iteration
    peak: int  # peak memory in bytes


class RewardMonitor:
    """Scores responses, reports each iteration to the parent and waits for the signal to continue."""

    def __init__(self, pipe: Any, most: int):
        self.pipe, self.most, self.resumed = pipe, most, time.perf_counter()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        rewards = [overlap(prompt, response, self.most) for prompt, response in zip(prompts, responses)]
        self.pipe.send(Iteration(time.perf_counter() - self.resumed, rewards, fmean(map(len, responses))))
        self.pipe.recv()
        self.resumed = time.perf_counter()
        return rewards


monitor: RewardMonitor | None = None  # of this child process


def reward(rows: Sequence[dict[str, str]], responses: Sequence[str]) -> list[float]:
    """The reward function that stages/ppo.py calls."""
    assert monitor is not None
    return monitor.score([row["prompt"] for row in rows], responses)


def serve_run(pipe: Any, train: Any, job: PPOJob) -> None:
    """Main loop of a child process: a whole run, which reports its KL and memory at the end."""
    global monitor
    with reporting(pipe):
        monitor = RewardMonitor(pipe, job.settings.max_new_tokens)
        kl = train(job)
        pipe.send(RunEnd(kl, peak_memory(job.device)))


def run_ours(job: PPOJob) -> list[float]:
    """Runs stages/ppo.py through its command line; returns the KL of each iteration."""
    settings = job.settings
    flags = {name: getattr(settings, name) for name in SHARED_SETTINGS}
    flags |= {"prompts": job.folder / PROMPTS, "reward": f"{__name__}:reward", "out_dir": job.out}
    flags |= {"batch_size": settings.episodes_per_iteration // settings.minibatches, "gradient_accumulation_steps": 1}
    flags |= {"rollout_batch_size": settings.episodes_per_iteration, "save_interval": settings.iterations}
    flags |= {"dtype": job.dtype, "device": job.device, "seed": job.seed}
    sys.argv = ["ppo.py", str(job.folder / POLICY), *(f"--{name}={value}" for name, value in flags.items())]
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "stages" / "ppo.py"))["main"]()
    lines = (job.out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["kl_k1"] for line in lines]


def run_trl(job: PPOJob) -> list[float]:
    """Runs trl's PPOTrainer; returns the KL of each iteration."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.simplefilter("ignore", FutureWarning)  # transformers warns about trl's gradient checkpointing argument
    import datasets
    import torch
    import transformers
    from tokenizers import Tokenizer, models
    from transformers.modeling_outputs import BaseModelOutput

    from gpt_arc.chat.format import Turn, load_chat_model
    from gpt_arc.weights.huggingface import hf_config, hf_tensors

    trl_ppo = import_extra("trl.experimental.ppo")
    transformers.logging.set_verbosity_error()
    transformers.set_seed(job.seed)
    settings, size = job.settings, job.settings.episodes_per_iteration
    policy_model, tokenizer, chat = load_chat_model(job.folder / POLICY)

    # trl recognizes padding by a token, which then can't count as text: use one the policy never learned to write
    pad, end, answer = (chat.ids[mark] for mark in ("<|system|>", "<|end|>", "<|assistant|>"))
    config_dict: dict[str, Any] = hf_config(policy_model.config, "float32") | {"pad_token_id": pad, "eos_token_id": end}
    config = transformers.AutoConfig.for_model(**config_dict, num_labels=1)
    weights = dict(hf_tensors(policy_model))
    policy, reference = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    value_network = transformers.AutoModelForSequenceClassification.from_config(config)
    for model in (policy, reference, value_network):
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight", "score.weight"}, missing
        model.tie_weights()
    torch.nn.init.zeros_(value_network.score.weight)  # as in ours

    class Rule(torch.nn.Module):
        """The true reward in the shape of a transformers trunk, whose hidden states are the rewards."""

        base_model_prefix = "rule"

        def __init__(self):
            super().__init__()
            self.score = torch.nn.Identity()

        def rule(self, input_ids, attention_mask, **_):
            prompts, responses = [], []
            for row, mask in zip(input_ids.tolist(), attention_mask.tolist()):
                row = [token for token, keep in zip(row, mask) if keep]
                start = row.index(answer) + 1
                prompts.append(tokenizer.decode(row[:start]))
                responses.append(chat.decode(row[start:]))
            assert monitor is not None
            rewards = torch.tensor(monitor.score(prompts, responses), device=input_ids.device)
            return BaseModelOutput(hidden_states=(rewards[:, None, None].expand(*input_ids.shape, 1),))

    vocabulary = dict(zip([*LETTERS, *chat.added], range(policy_model.config.vocab_size)))
    processing = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), pad_token="<|system|>", eos_token="<|end|>",
        padding_side="left",
    )  # fmt: skip
    rows = map(json.loads, (job.folder / PROMPTS).read_text().splitlines())
    prompts = [{"input_ids": chat.prompt([Turn("user", row["prompt"])])} for row in rows]
    arguments = trl_ppo.PPOConfig(
        output_dir=str(job.out),
        total_episodes=settings.episodes,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,  # more steps would mean fewer updates per iteration
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

    class KLRecorder(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            kl.append(logs["objective/kl"])

    trainer = trl_ppo.PPOTrainer(
        arguments, processing, policy, reference, Rule(), datasets.Dataset.from_list(prompts), value_network,
        callbacks=[KLRecorder()],
    )  # fmt: skip
    trainer.train()
    return kl


class PPORun(NamedTuple):
    """A competitor's run with one seed."""

    iterations: list[Iteration]
    ended: RunEnd


def take_iterations(calls: dict[str, Call], iterations: int) -> dict[str, PPORun]:
    """Runs all competitors to the end, one iteration at a time in turn."""
    from tqdm import tqdm

    answers = {name: [call(None)] for name, call in calls.items()}
    for _ in tqdm(range(iterations), "iterations", leave=False, disable=None):
        for name, call in calls.items():
            answers[name].append(call("continue"))
    return {name: PPORun(iterations, end) for name, (*iterations, end) in answers.items()}


def summarize(runs: Sequence[PPORun]) -> dict[str, Any]:
    """Figures of one competitor from its runs, one per seed."""
    seconds = [scored.seconds for run in runs for scored in run.iterations[UNCOUNTED:]]
    size, final = len(runs[0].iterations[0].rewards), -(-len(runs[0].iterations) // 5)
    each = spread(seconds)
    return {
        "episodes_per_second": size / each["median"],
        "iteration_seconds": each,
        "reward_at_first": fmean(fmean(run.iterations[0].rewards) for run in runs),
        "rewards": [fmean(fmean(scored.rewards) for scored in run.iterations[-final:]) for run in runs],
        "kl": fmean(fmean(run.ended.kl[-final:]) for run in runs),
        "tokens": fmean(fmean(scored.tokens for scored in run.iterations[-final:]) for run in runs),
        "peak_memory_gb": max(run.ended.peak for run in runs) / 1e9,
        "curves": [[fmean(scored.rewards) for scored in run.iterations] for run in runs],
        "kl_curves": [run.ended.kl for run in runs],
        "token_curves": [[scored.tokens for scored in run.iterations] for run in runs],
        "seconds": [[scored.seconds for scored in run.iterations] for run in runs],
    }


def compare(ours: dict[str, Any], trl: dict[str, Any]) -> dict[str, Any]:
    """Our speed over trl's, and our relative gain in reward with Welch's 95% interval."""
    from scipy.stats import ttest_ind

    pairs = zip(ours["seconds"], trl["seconds"])
    ratios = [median(b[UNCOUNTED:]) / median(a[UNCOUNTED:]) for a, b in pairs]
    mean = fmean(trl["rewards"])
    comparison: dict[str, Any] = {"reward": fmean(ours["rewards"]) / mean - 1, "interval": None}
    if len(ours["rewards"]) > 1:
        interval = ttest_ind(ours["rewards"], trl["rewards"], equal_var=False).confidence_interval(0.95)
        comparison["interval"] = [interval.low / mean, interval.high / mean]
    speed = spread(ratios) | {"median": ours["episodes_per_second"] / trl["episodes_per_second"]}
    return comparison | {"speed": speed}


def show(results: dict[str, Any]) -> None:
    columns = ["episodes/s", "iteration s", "reward", "min", "max", "KL", "tokens", "memory GB"]
    print("\n" + f"{'':14}" + "".join(f"{column:>12}" for column in columns))
    for name, row in results["programs"].items():
        rewards = spread(row["rewards"]) | {"mean": fmean(row["rewards"])}
        print(f"{name:14}{row['episodes_per_second']:12,.1f}{row['iteration_seconds']['median']:12,.3f}", end="")
        print("".join(f"{rewards[key]:12.4f}" for key in ("mean", "min", "max")), end="")
        print(f"{row['kl']:12.2f}{row['tokens']:12.1f}{row['peak_memory_gb']:12.2f}")
    print()
    for name, each in results["comparisons"].items():
        speed, interval = each["speed"], each["interval"]
        interval_text = "" if interval is None else f", 95% interval {interval[0]:+.1%} to {interval[1]:+.1%}"
        print(f"reward       {name}: {each['reward']:+.1%} against trl{interval_text}")
        print(f"speed        {name}: {speed['median']:.2f} times trl's episodes/s", end="")
        print(f" ({speed['min']:.2f} to {speed['max']:.2f} over the seeds)")


def has_ppo_trainer() -> bool:
    spec = importlib.util.find_spec("trl")
    return spec is not None and any(
        (Path(p) / "experimental" / "ppo").is_dir() for p in spec.submodule_search_locations or ()
    )


def bench_ppo(args: list[str]) -> None:
    settings = parse_flags(PPOBench, __doc__, args)
    check_requirements(settings)
    if settings.trl and not has_ppo_trainer():
        raise UserError(
            f"trl with a PPOTrainer is not installed; the latest versions have none: pip install trl=={TRL}"
        )

    import torch  # slow: import once the settings are valid

    from gpt_arc.device import resolve_device
    from gpt_arc.nn.meta import meta_device
    from model import GPT

    device = resolve_device(settings.device)
    if settings.trl and device.index:
        raise UserError("the PPOTrainer uses the first GPU: choose it with CUDA_VISIBLE_DEVICES and set --device=cuda")
    workers = {"ours": (run_ours, "float32")}
    workers |= {"ours 16 bit": (run_ours, "bfloat16")} if settings.sixteen_bit else {}
    workers |= {"trl": (run_trl, "float32")} if settings.trl else {}
    machine = machine_name(device)
    runs: dict[str, list[PPORun]] = {name: [] for name in workers}
    with tempfile.TemporaryDirectory(prefix="gpt-arc-bench-") as folder:
        config = prepare(settings, Path(folder))
        with meta_device():
            parameters = GPT(config).num_parameters()
        least, most = PROMPT_LETTERS
        print(f"machine      {machine}, {counted(torch.get_num_threads(), 'thread')}")
        print(f"policy       {parameters:,} parameters, {settings.prompts:,} prompts of {least} to {most} letters")
        seeds = counted(settings.seeds, "run")
        print(f"work         {seeds} of {counted(settings.iterations, 'iteration')}, each", end="")
        print(
            f" {settings.episodes_per_iteration} responses and {settings.inner_epochs * settings.minibatches} updates"
        )
        sys.stdout.flush()
        for seed in range(settings.seed, settings.seed + settings.seeds):
            with contextlib.ExitStack() as stack:
                calls = {}
                for name, (train, dtype) in workers.items():
                    job = PPOJob(settings, Path(folder), name, seed, str(device), dtype)
                    calls[name] = stack.enter_context(child_process(name, train, job, serve_run))
                for name, run in take_iterations(calls, settings.iterations).items():
                    runs[name].append(run)

    results: dict[str, Any] = {"machine": machine, "parameters": parameters, "settings": json_settings(settings)}
    results["trl"] = importlib.metadata.version("trl") if settings.trl else None
    results["programs"] = {name: summarize(each) for name, each in runs.items()}
    ours, trl = dict(results["programs"]), results["programs"].get("trl")
    ours.pop("trl", None)
    results["comparisons"] = {name: compare(row, trl) for name, row in ours.items()} if trl else {}
    show(results)
    write_results(settings.json, results)
