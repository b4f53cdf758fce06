"""Reinforcement learning from a reward by proximal policy optimisation: InstructGPT's third step.

    python stages/ppo.py out/sft --prompts prompts.jsonl --reward out/reward
    python stages/ppo.py out/sft --prompts sums.jsonl --reward rules:correct          a Python function, rules.py
    python stages/ppo.py out/sft --prompts prompts.jsonl --reward out/reward --pretraining_dataset openwebtext
    python stages/ppo.py --resume=out/ppo                                   resume a run that was stopped
    torchrun --standalone --nproc_per_node=8 stages/ppo.py configs/ppo.toml
    python sample.py --chat out/ppo                                         talk with it

The policy writes responses to prompts; each gets a score for the whole and pays for leaving the model it began as
(Ziegler et al., arXiv:1909.08593; Ouyang et al., arXiv:2203.02155). A function of a reward is called with the prompts'
rows and the responses as texts and returns numbers. A run writes out/ppo/ (or -2, -3 ...): run.json, metrics.jsonl and
checkpoints.
"""

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from gpt_arc.alignment import losses
from gpt_arc.alignment.rankings import padded
from gpt_arc.alignment.reward_model import RewardModel, ScalarHead, fingerprint, is_reward_model, load_reward_model
from gpt_arc.alignment.rewards import load_reward
from gpt_arc.alignment.rollouts import (
    ActorCritic,
    Rollouts,
    assess,
    gather_rollouts,
    load_policy,
    read_and_encode_prompts,
    write_responses,
)
from gpt_arc.data.batches import windows
from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.device import autocast, to_device
from gpt_arc.distributed import RANK, WORLD_SIZE, say
from gpt_arc.errors import UserError, entry_point
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.settings import STRICT, Count, NonNegative, Positive, Share, UnitInterval
from gpt_arc.training.command_line import run_stage
from gpt_arc.training.epochs import EpochOrder, digest, micro_batches
from gpt_arc.training.optim import follow
from gpt_arc.training.options import StageOptions
from gpt_arc.training.stage_run import StageRun
from gpt_arc.weights.directory import save_model
from model import GPT


@dataclass(frozen=True, config=STRICT)
class Options(StageOptions):
    prompts: Path | None = None
    """What to respond to (.jsonl, .csv, .tsv): rows with a prompt, or with messages."""
    reward: str | None = None
    """A reward model's directory, or a Python function, module:function, of rows and responses."""
    monitor: str | None = None
    """Another reward that is logged and not learned from. torchrun takes --monitor for its own: name it in a file of
    settings there."""
    episodes: Count = 256_000
    """Responses in all (InstructGPT's 256,000)."""
    gradient_accumulation_steps: Count = 8
    minibatches: Count = 8
    """Updates that the responses of an iteration are parted into: an iteration has batch_size x
    gradient_accumulation_steps x minibatches of them (InstructGPT's 512)."""
    inner_epochs: Count = 1
    """Passes over the responses of an iteration (4 in lm-human-preferences)."""
    max_new_tokens: Count = 64
    """Tokens of a response, at most."""
    temperature: Positive = 1.0
    """Of the policy, the reference included."""
    rollout_batch_size: Count = 128
    """Responses that a process writes at the same time, at most."""
    kl_coef: NonNegative = 0.02
    """Reward that a nat of KL to the reference costs (InstructGPT's beta)."""
    kl_target: Positive | None = None
    """Adapt kl_coef so that responses come to this KL in nats. None: fixed."""
    kl_horizon: Positive = 10_000
    """Episodes in which kl_coef may change by a fifth or so."""
    no_end_reward: float | None = None
    """Score of a response that doesn't end by itself (-1 in lm-human-preferences). None: as it is scored."""
    value_network: Literal["reward", "policy", "shared"] | None = None
    """What predicts returns: a copy of the reward model, a copy of the policy, or a head on the policy itself. None:
    the reward model where there is one, else a copy of the policy."""
    gamma: UnitInterval = 1.0
    """Discount of later rewards."""
    gae_lambda: UnitInterval = 0.95
    """Weight of longer estimates of an advantage (arXiv:1506.02438)."""
    clip: Positive = 0.2
    """How far the ratio to the policy that wrote a response may move from 1."""
    value_clip: Positive = 0.2
    """How far a value may move from what it was."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    whiten_rewards: bool = True
    """Divide rewards by the root of their mean square over an iteration."""
    whiten_advantages: bool = True
    """Make advantages of an iteration of mean 0 and standard deviation 1."""
    pretraining_dataset: str | None = None
    """A prepared dataset whose language-model loss is mixed in (PPO-ptx)."""
    pretraining_coef: NonNegative = 27.8
    """Weight of that loss, of nats a token."""
    pretraining_batch_size: Count = 64
    """Windows of it in an update."""
    ema_decay: Share | None = None
    """Keep a moving average of the weights, and save that as the model (InstructGPT's .992). None: the weights."""
    save_interval: Count = 20
    """Iterations between checkpoints."""
    learning_rate: Positive = 9e-6
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    adam_eps: Positive = 1e-5

    PATHS: ClassVar[tuple[str, ...]] = ("model", "reward", "monitor")

    def __post_init__(self):
        super().__post_init__()
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_coef = 0 must be more than 0, for kl_target to adapt it")

    @property
    def episodes_per_iteration(self) -> int:
        return self.examples_per_update * self.minibatches


def build_critic(options: Options, policy: GPT) -> RewardModel | ScalarHead:
    """The value network. Raises UserError where it is to be a reward model and there is none."""
    from_reward = is_reward_model(options.reward)
    if options.value_network == "shared":
        return ScalarHead(policy.config.n_embd, 0.0)
    if options.value_network == "policy" or options.value_network is None and not from_reward:
        return RewardModel(copy.deepcopy(policy), std=0.0)
    if not from_reward:
        raise UserError(
            f"value_network = reward, but reward = {options.reward} is no reward model: say policy or shared"
        )
    return load_reward_model(options.reward)[0]


class PretrainingText:
    """Windows of a prepared dataset, whose language-model loss is mixed into the updates."""

    def __init__(self, options: Options, tokenizer: Tokenizer, context: int, vocab_size: int):
        corpus = open_corpus((Source(options.pretraining_dataset, 1.0),))
        if corpus is None or corpus.tokenizer != tokenizer:
            what = "there is no prepared dataset of that name" if corpus is None else "it has another tokenizer"
            raise UserError(f"pretraining_dataset = {options.pretraining_dataset}: {what}")
        self.split = corpus.split("train", context, vocab_size, False)
        self.order = self.split.training_order(context, options.seed)
        self.context, self.windows = context, options.pretraining_batch_size
        self.tokens = self.windows * context  # of an update

    def part(self, update: int, i: int, parts: int, device: torch.device) -> list[Tensor] | None:
        """Tokens and targets (B, T) of this process in the i-th of the parts of an update, from 0; None for none."""
        starts = self.order.starts(update * self.windows, self.windows)
        starts = starts[i * WORLD_SIZE + RANK :: parts * WORLD_SIZE]
        return to_device(windows(self.split, starts, self.context), device) if len(starts) else None


def losses_of(
    replica: nn.Module, found: Rollouts, advantages: Tensor, returns: Tensor, rows: list[int],
    text: Sequence[Tensor] | None, options: Options, stage: StageRun,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of some responses the sums (4,), over tokens, of policy loss, value loss, clipped ratios and clipped values.

    And the sum () of the language-model loss of `text`.
    """
    width = int(found.mask[rows].sum(1).max())
    tensors = (found.responses, found.known.logs, found.known.values, advantages, returns, found.mask)
    wanted, old_logs, old_values, advantages, returns, mask = to_device(
        [tensor[rows, :width] for tensor in tensors], stage.device
    )
    tokens, _ = padded([found.sequences[row][:-1] for row in rows], stage.device)
    with autocast(stage.device, stage.dtype):
        logs, _, values, text_loss = replica(tokens, found.prompt_lengths[rows].to(stage.device), wanted, text)
    policy, clipped = losses.policy_losses(logs, old_logs, advantages, options.clip)
    value, value_clipped = losses.value_losses(values, old_values, returns, options.value_clip)
    sums = torch.stack([torch.where(mask, each, 0.0).sum() for each in (policy, value, clipped, value_clipped)])
    return sums, logs.new_zeros(()) if text_loss is None else text_loss


def figures(found: Rollouts, returns: Tensor, kl_coef: float, monitored: bool) -> dict[str, float | None]:
    """What is told of the responses of an iteration."""
    mask, known = found.mask, found.known
    log_ratio = known.logs - known.reference
    kl = {f"kl_{name}": each.sum(1).mean().item() for name, each in losses.kl_estimates(log_ratio).items()}
    return {
        "score": found.scores.mean().item(),
        "score_std": found.scores.std(correction=0).item(),
        "monitored": found.monitored.mean().item() if monitored else None,
        "reward": found.scores.mean().item() - kl_coef * kl["kl_k1"],
        **kl,
        "kl_coef": kl_coef,
        "entropy": known.entropies[mask].mean().item(),
        "response_tokens": mask.sum(1).float().mean().item(),
        "ended": found.ended.float().mean().item(),
        "explained_variance": losses.explained_variance(known.values[mask], returns[mask]),
    }


def train(options: Options, stage: StageRun) -> int:
    # ---- policy, reference, critic, reward
    for name in ("prompts", "reward"):
        if getattr(options, name) is None:
            raise UserError(f"name the {name} by --{name}")
    policy, tokenizer, chat = load_policy(stage.origin)
    reference = load_policy(options.model)[0].to(stage.device).eval().requires_grad_(False)
    critic = build_critic(options, policy)
    context = policy.config.block_size
    if isinstance(critic, RewardModel) and critic.trunk.config.block_size < context:
        raise UserError(f"the value network reads {critic.trunk.config.block_size} tokens, the policy {context}")
    score = load_reward(options.reward, chat, stage.device, stage.dtype, options.rollout_batch_size)
    monitor = None
    if options.monitor is not None:
        monitor = load_reward(options.monitor, chat, stage.device, stage.dtype, options.rollout_batch_size)
    ema = None if options.ema_decay is None else copy.deepcopy(policy).to(stage.device).requires_grad_(False)

    # ---- prompts, pre-training text, and the plan in figures
    prompts = read_and_encode_prompts(options.prompts, chat, context - options.max_new_tokens)
    text = None
    if options.pretraining_dataset:
        text = PretrainingText(options, tokenizer, context, policy.config.vocab_size)
    order = EpochOrder(len(prompts), 1, options.seed)
    size = options.episodes_per_iteration
    iterations = math.ceil(options.episodes / size)
    updates = options.inner_epochs * options.minibatches  # of an iteration
    say(f"parameters     {describe_parameters(policy)}; critic {describe_parameters(critic)}")
    say(f"iterations     {iterations:,} of {size:,} episodes, {updates} updates each")

    # ---- the run, where a stopped one stood
    stage.open(digest([fingerprint(reference), [prompt.tokens for prompt in prompts]]))
    actor = ActorCritic(policy, critic, options.temperature).eval()  # dropout would be taken for a change of policy
    for module in (policy, *([critic.trunk] if isinstance(critic, RewardModel) else [])):
        module.activation_checkpointing = options.activation_checkpointing
    replica = stage.place(actor)
    updater = stage.updater(actor, iterations * updates)
    stage.restore(updater, {"critic": critic} | ({} if ema is None else {"policy": policy}))
    decoder = Decoder(policy)
    progress = stage.progress
    kl_coef = progress.numbers.get("kl_coef", options.kl_coef)

    def write(directory: Path) -> None:
        save_model(policy if ema is None else ema, tokenizer, directory)
        chat.save(directory)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop: policy, reward, score, step. Each process has every n-th of an iteration's responses written and scored;
    # then all of them know all, and share out each update.
    while stage.goes_on(iterations, "iteration"):
        started = time.perf_counter()
        first = progress.step * size

        # policy: responses, and what the models say of them
        asked = [prompts[row] for row in order.take(first, size)]
        own = asked[RANK::WORLD_SIZE]
        responses = write_responses(
            decoder, own, chat.end, options.max_new_tokens, options.temperature, options.seed,
            range(first + RANK, first + size, WORLD_SIZE), options.rollout_batch_size,
        )  # fmt: skip
        known = assess(actor, reference, own, responses, options.batch_size, stage.device, stage.dtype)

        # reward: a number for each response
        with stage.keeping(write):
            scores = score(own, responses)
            monitored = monitor(own, responses) if monitor else scores
        if options.no_end_reward is not None:
            ended = torch.tensor([response[-1] == chat.end for response in responses], dtype=torch.bool)
            scores = torch.where(ended, scores, options.no_end_reward)
        found = gather_rollouts(asked, responses, known, scores, monitored, chat.end)
        rollout_seconds = time.perf_counter() - started

        # score: the reward of each token, and how much better than expected it was
        mask, known = found.mask, found.known
        rewards = losses.penalised_rewards(found.scores, known.logs - known.reference, mask, kl_coef)
        if options.whiten_rewards:
            rewards = losses.whiten(rewards, mask, shift_mean=False)
        advantages, returns = losses.advantages(rewards, known.values, mask, options.gamma, options.gae_lambda)
        if options.whiten_advantages:
            advantages = losses.whiten(advantages, mask)

        # step: updates on minibatches; a loss is a mean over the tokens of the minibatch
        totals, made, rate, norm = torch.zeros(5), 0, math.nan, math.nan
        for j in range(updates):
            epoch, place = divmod(j, options.minibatches)
            shuffled = np.random.default_rng((options.seed, progress.step, epoch)).permutation(size).tolist()
            rows = shuffled[place * options.examples_per_update :][: options.examples_per_update]
            tokens, update = int(mask[rows].sum()), progress.step * updates + j
            micros = list(micro_batches(rows, options.batch_size))
            means = torch.zeros(5, device=stage.device)
            for i, (part, counts) in enumerate(micros):
                windows = text.part(update, i, len(micros), stage.device) if text else None
                with stage.last_sync(replica, i + 1 == len(micros)):
                    sums, text_sum = losses_of(replica, found, advantages, returns, part, windows, options, stage)
                    own_means = torch.stack((*sums * (counts / tokens), text_sum / (text.tokens if text else 1)))
                    loss = own_means[0] + options.value_coef * own_means[1] + options.pretraining_coef * own_means[4]
                    updater.backward(loss * WORLD_SIZE)
                means += own_means.detach()
            done = stage.update(updater, update, *means)
            if done is None:
                continue
            rate, norm, means = done
            totals, made = totals + torch.tensor(means), made + 1
            if ema is not None:
                follow(ema.parameters(), policy.parameters(), options.ema_decay)

        # what happened
        progress.step += 1
        names = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction")
        means = (totals / max(made, 1)).tolist()
        line = {
            "episodes": progress.step * size,
            **figures(found, returns, kl_coef, monitor is not None),
            **dict(zip(names, means)),
            "pretraining_loss": means[4] if text else None,
            "learning_rate": rate,
            "grad_norm": norm,
            "rollout_seconds": rollout_seconds,
            "seconds": time.perf_counter() - started,
        }
        shown = f"score {line['score']:.3f}, KL {line['kl_k1']:.3f}"
        stage.tell({n: v for n, v in line.items() if v is not None and math.isfinite(v)}, shown, iterations)
        if options.kl_target:
            kl_coef = losses.adapted(kl_coef, line["kl_k1"], options.kl_target, options.kl_horizon, size)
        progress.numbers["kl_coef"] = kl_coef
        if progress.step % options.save_interval == 0:
            stage.save(write)
    return stage.finish(write)


def main() -> int:
    return run_stage(Options, __doc__, "ppo", train)


if __name__ == "__main__":
    entry_point(main)()
