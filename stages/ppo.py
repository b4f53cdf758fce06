"""Reinforcement learning from a reward by proximal policy optimisation: InstructGPT's third step.

    python stages/ppo.py out/sft --prompts prompts.jsonl --reward out/reward
    python stages/ppo.py out/sft --prompts sums.jsonl --reward rules:correct          a Python function, rules.py
    python stages/ppo.py out/sft --prompts prompts.jsonl --reward out/reward --pretraining_dataset openwebtext
    python stages/ppo.py out/ppo --resume=True                              go on with a run that was stopped
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
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gpt_arc import data, distributed, rl
from gpt_arc.chat import ChatFormat, read_prompts
from gpt_arc.checkpoint import save_model
from gpt_arc.config import Source
from gpt_arc.decoder import Decoder
from gpt_arc.distributed import RANK, WORLD_SIZE, say
from gpt_arc.errors import UserError, entry_point
from gpt_arc.preferences import (
    RewardModel,
    ScalarHead,
    fitting_prompt,
    is_reward_model,
    load_chat_model,
    load_reward_model,
    padded,
)
from gpt_arc.rollouts import Prompt, Rollouts, Scorer, load_reward, write_responses
from gpt_arc.runtime import autocast, to_device
from gpt_arc.stage import EpochOrder, Stage, StageOptions, digest, micro_batches, run_stage
from model import GPT


@dataclass(frozen=True)
class Options(StageOptions):
    prompts: Path | None = None
    """What to respond to (.jsonl, .csv, .tsv): rows with a prompt, or with messages."""
    reward: str | None = None
    """A reward model's directory, or a Python function, module:function, of rows and responses."""
    monitor: str | None = None
    """Another reward that is logged and not learned from."""
    episodes: int = 256_000
    """Responses in all (InstructGPT's 256,000)."""
    gradient_accumulation_steps: int = 8
    minibatches: int = 8
    """Updates that the responses of an iteration are parted into: an iteration has batch_size x
    gradient_accumulation_steps x minibatches of them (InstructGPT's 512)."""
    inner_epochs: int = 1
    """Passes over the responses of an iteration (4 in lm-human-preferences)."""
    max_new_tokens: int = 64
    """Tokens of a response, at most."""
    temperature: float = 1.0
    """Of the policy, the reference included."""
    rollout_batch_size: int = 128
    """Responses that a process writes at the same time, at most."""
    kl_coef: float = 0.02
    """Reward that a nat of KL to the reference costs (InstructGPT's beta)."""
    kl_target: float | None = None
    """Adapt kl_coef so that responses come to this KL in nats. None: fixed."""
    kl_horizon: float = 10_000
    """Episodes in which kl_coef may double or so."""
    no_end_reward: float | None = None
    """Score of a response that doesn't end by itself (-1 in lm-human-preferences). None: as it is scored."""
    value_network: Literal["reward", "policy", "shared"] | None = None
    """What predicts returns: a copy of the reward model, a copy of the policy, or a head on the policy itself. None:
    the reward model where there is one, else a copy of the policy."""
    gamma: float = 1.0
    """Discount of later rewards."""
    gae_lambda: float = 0.95
    """Weight of longer estimates of an advantage (arXiv:1506.02438)."""
    clip: float = 0.2
    """How far the ratio to the policy that wrote a response may move from 1."""
    value_clip: float = 0.2
    """How far a value may move from what it was."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    whiten_rewards: bool = True
    """Divide rewards by their standard deviation over an iteration."""
    whiten_advantages: bool = True
    """Make advantages of an iteration of mean 0 and standard deviation 1."""
    pretraining_dataset: str | None = None
    """A prepared dataset whose language-model loss is mixed in (PPO-ptx)."""
    pretraining_coef: float = 27.8
    """Weight of that loss, of nats a token."""
    pretraining_batch_size: int = 64
    """Windows of it in an update."""
    ema_decay: float | None = None
    """Keep a moving average of the weights, and save that as the model (InstructGPT's .992). None: the weights."""
    save_interval: int = 20
    """Iterations between checkpoints."""
    learning_rate: float = 9e-6
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    adam_eps: float = 1e-5

    PATHS: ClassVar[tuple[str, ...]] = ("model", "reward", "monitor")

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "minibatches", "inner_epochs", "max_new_tokens", "rollout_batch_size", "pretraining_batch_size",
            "save_interval", "episodes",
        ):  # fmt: skip
            self.require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("kl_coef", "value_coef", "pretraining_coef"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "zero or more")
        for name in ("temperature", "kl_horizon", "clip", "value_clip"):
            self.require(name, 0 < getattr(self, name) < math.inf, "more than zero")
        for name in ("gamma", "gae_lambda"):
            self.require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self.require("kl_target", self.kl_target is None or 0 < self.kl_target < math.inf, "more than zero")
        self.require("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "in [0, 1)")

    @property
    def episodes_per_iteration(self) -> int:
        return self.examples_per_update * self.minibatches


class ActorCritic(nn.Module):
    """The policy and what predicts its returns: a network of its own, or a head on the policy."""

    def __init__(self, policy: GPT, critic: RewardModel | ScalarHead, temperature: float):
        super().__init__()
        self.policy, self.critic, self.temperature = policy, critic, temperature

    def forward(
        self, tokens: Tensor, prompt_lengths: Tensor, responses: Tensor, pretraining: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Log-probabilities, entropies and values, (N, R) each, of responses (N, R) within tokens (N, T).

        With windows of `pretraining`, tokens and targets, also their language-model loss, a sum.
        """
        hidden, length = self.policy.hidden(tokens), responses.size(1)
        states = rl.response_states(hidden, prompt_lengths, length)
        logs, entropies = rl.log_probabilities(self.policy, states, responses, self.temperature)
        if isinstance(self.critic, RewardModel):
            states = rl.response_states(self.critic.trunk.hidden(tokens), prompt_lengths, length)
            values = self.critic.head(states)
        else:
            values = self.critic(states)
        return logs, entropies, values, None if pretraining is None else self.policy(*pretraining).total


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


def read_tokens(path: Path, chat: ChatFormat, room: int) -> list[Prompt]:
    """Prompts of at most `room` tokens, longer ones less their oldest turns. Raises UserError if none is left."""
    found, dropped = [], 0
    for conversation in read_prompts(path):
        try:
            tokens = fitting_prompt(chat, conversation.turns, room)
        except UserError as error:
            raise UserError(f"{conversation.place}: {error}") from None
        if tokens is None:
            dropped += 1
        else:
            found.append(Prompt(tokens, conversation.row))
    say(f"prompts        {len(found):,}" + (f"; {dropped:,} too long left out" if dropped else ""))
    if not found:
        raise UserError(f"no prompt of {path} leaves room for max_new_tokens in the context: {room} tokens are left")
    return found


@torch.no_grad()
def collect(
    actor: ActorCritic, reference: GPT, decoder: Decoder, prompts: Sequence[Prompt], first: int, score: Scorer,
    monitor: Scorer | None, chat: ChatFormat, options: Options, stage: Stage,
) -> Rollouts:  # fmt: skip
    """Responses to prompts, the episodes `first`, first + 1 ..., by all processes: policy, reference, value, score."""
    own = range(RANK, len(prompts), WORLD_SIZE)
    asked = [prompts[i] for i in own]
    responses = write_responses(
        decoder, [p.tokens for p in asked], chat.end, options.max_new_tokens, options.temperature, options.seed,
        [first + i for i in own], options.rollout_batch_size,
    )  # fmt: skip
    width = max(map(len, responses))
    known = torch.zeros(4, len(asked), width)  # log-probabilities by policy and reference, entropies, values
    for start in range(0, len(asked), options.batch_size):
        rows = slice(start, start + options.batch_size)
        tokens, _ = padded([p.tokens + r[:-1] for p, r in zip(asked[rows], responses[rows])], stage.device)
        wanted, _ = padded(responses[rows], stage.device)
        prompt_lengths = torch.tensor([len(p.tokens) for p in asked[rows]], device=stage.device)
        with autocast(stage.device, stage.dtype):
            logs, entropies, values, _ = actor(tokens, prompt_lengths, wanted)
            states = rl.response_states(reference.hidden(tokens), prompt_lengths, wanted.size(1))
            by_reference, _ = rl.log_probabilities(reference, states, wanted, options.temperature)
        known[:, rows, : wanted.size(1)] = torch.stack((logs, by_reference, entropies, values.float())).cpu()
    scores = score(asked, responses)
    if options.no_end_reward is not None:
        scores = torch.where(torch.tensor([r[-1] == chat.end for r in responses]), scores, options.no_end_reward)
    monitored = scores if monitor is None else monitor(asked, responses)

    # the responses of all processes, in the order of the prompts
    shares = distributed.gather((responses, known, scores, monitored))
    responses = [shares[i % WORLD_SIZE][0][i // WORLD_SIZE] for i in range(len(prompts))]
    tokens, lengths = padded(responses, torch.device("cpu"))
    known, scores, monitored = torch.zeros(4, *tokens.shape), torch.zeros(len(prompts)), torch.zeros(len(prompts))
    for rank, (_, some, some_scores, some_monitored) in enumerate(shares):
        own = slice(rank, None, WORLD_SIZE)
        known[:, own, : some.size(2)], scores[own], monitored[own] = some, some_scores, some_monitored
    return Rollouts(
        [p.tokens + r for p, r in zip(prompts, responses)],
        torch.tensor([len(p.tokens) for p in prompts]),
        tokens,
        torch.arange(tokens.size(1)) < lengths[:, None],
        torch.tensor([r[-1] == chat.end for r in responses]),
        *known,
        scores,
        monitored,
    )


def train(options: Options, stage: Stage) -> int:
    # ---- policy, reference, critic, reward
    for name in ("prompts", "reward"):
        if getattr(options, name) is None:
            raise UserError(f"name the {name} by --{name}")
    policy, tokenizer, chat = load_chat_model(stage.origin)
    reference = load_chat_model(options.model)[0].to(stage.device).eval().requires_grad_(False)
    critic = build_critic(options, policy)
    context = policy.config.block_size
    if isinstance(critic, RewardModel) and critic.trunk.config.block_size < context:
        raise UserError(f"the value network reads {critic.trunk.config.block_size} tokens, the policy {context}")
    score = load_reward(options.reward, chat, stage.device, stage.dtype, options.rollout_batch_size)
    monitor = options.monitor and load_reward(
        options.monitor, chat, stage.device, stage.dtype, options.rollout_batch_size
    )
    ema = None if options.ema_decay is None else copy.deepcopy(policy).to(stage.device).requires_grad_(False)

    # ---- prompts, pre-training data, and the plan in figures
    prompts = read_tokens(options.prompts, chat, context - options.max_new_tokens)
    order = EpochOrder(len(prompts), 1, options.seed)
    size = options.episodes_per_iteration
    iterations = math.ceil(options.episodes / size)
    per_iteration = options.inner_epochs * options.minibatches
    windows = None
    if options.pretraining_dataset:
        windows = data.open_corpus((Source(options.pretraining_dataset, 1.0),))
        if windows is None or windows.tokenizer != tokenizer:
            what = "there is no prepared dataset of that name" if windows is None else "it has another tokenizer"
            raise UserError(f"pretraining_dataset = {options.pretraining_dataset}: {what}")
        windows = windows.split("train", context, policy.config.vocab_size, False)
        window_order = windows.training_order(context, options.seed)
    say(f"parameters     {policy.num_parameters():,}, critic {sum(p.numel() for p in critic.parameters()):,}")
    say(f"iterations     {iterations:,} of {size} episodes, {per_iteration} updates each")

    # ---- the run, where a stopped one stood
    stage.open(digest([options.model, options.reward, [prompt.tokens for prompt in prompts]]))
    actor = ActorCritic(policy, critic, options.temperature).eval()  # dropout would be taken for a change of policy
    for module in (policy, *([critic.trunk] if isinstance(critic, RewardModel) else [])):
        module.activation_checkpointing = options.activation_checkpointing
    replica = stage.place(actor)
    updater = stage.updater(actor, iterations * per_iteration)
    stage.restore(updater, {"critic": critic} | ({} if ema is None else {"policy": policy}))
    decoder = Decoder(policy)
    progress = stage.progress
    kl_coef = progress.numbers.get("kl_coef", options.kl_coef)

    def write(directory: Path) -> None:
        save_model(policy if ema is None else ema, tokenizer, directory)
        chat.save(directory)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop: responses, rewards, advantages, updates. Losses are sums over the tokens of responses, divided by how
    # many there are in the minibatch of all processes.
    while stage.goes_on(iterations, "iteration"):
        # responses and their scores
        started = time.perf_counter()
        first = progress.step * size
        asked = [prompts[row] for row in order.take(first, size)]
        found = collect(actor, reference, decoder, asked, first, score, monitor, chat, options, stage)
        wrote = time.perf_counter() - started

        # rewards and advantages
        mask, log_ratio = found.mask, found.logs - found.reference
        rewards = rl.penalised_rewards(found.scores, log_ratio, mask, kl_coef)
        whitened = rl.whiten(rewards, mask, shift_mean=False) if options.whiten_rewards else rewards
        advantages, returns = rl.advantages(whitened, found.values, mask, options.gamma, options.gae_lambda)
        if options.whiten_advantages:
            advantages = rl.whiten(advantages, mask)

        # updates
        sums = torch.zeros(5)  # of policy loss, value loss, clipped tokens, clipped values, pre-training loss
        counted, rate, norm = 0, math.nan, math.nan
        for j in range(per_iteration):
            epoch, place = divmod(j, options.minibatches)
            shuffled = np.random.default_rng((options.seed, progress.step, epoch)).permutation(size)
            rows = shuffled[place * options.examples_per_update :][: options.examples_per_update]
            tokens = int(mask[torch.from_numpy(rows)].sum())
            micros = list(micro_batches(rows.tolist(), options.batch_size))
            update = progress.step * per_iteration + j
            own_sums = torch.zeros(5, device=stage.device)
            for i, (own, counts) in enumerate(micros, start=1):
                longest = int(mask[own].sum(1).max())
                batch = (found.responses, found.logs, found.values, advantages, returns, mask)
                wanted, old, old_values, gains, aims, there = to_device(
                    [each[own, :longest] for each in batch], stage.device
                )
                read = padded([found.sequences[row][:-1] for row in own], stage.device)[0]
                text = None
                if windows:
                    count = options.pretraining_batch_size
                    starts = window_order.starts(update * count, count)[
                        (i - 1) * WORLD_SIZE + RANK :: len(micros) * WORLD_SIZE
                    ]
                    text = to_device(data.windows(windows, starts, context), stage.device) if len(starts) else None
                with stage.last_sync(replica, i == len(micros)):
                    with autocast(stage.device, stage.dtype):
                        logs, _, values, text_loss = replica(
                            read, found.prompt_lengths[own].to(stage.device), wanted, text
                        )
                    losses, clipped = rl.policy_losses(logs, old, gains, options.clip)
                    value_losses, value_clipped = rl.value_losses(values, old_values, aims, options.value_clip)
                    means = [(each * there).sum() / tokens for each in (losses, value_losses, clipped, value_clipped)]
                    text_mean = 0.0 * logs.sum() if text is None else text_loss / (count * context)
                    loss = counts * (means[0] + options.value_coef * means[1]) + options.pretraining_coef * text_mean
                    updater.backward(loss * WORLD_SIZE)
                own_sums += torch.stack([*(counts * mean.detach() for mean in means), text_mean.detach()])
            done = stage.update(updater, update, *own_sums)
            if done is None:
                continue
            rate, norm, means = done
            sums += torch.tensor(means)
            counted += 1
            if ema is not None:
                with torch.no_grad():
                    for average, weight in zip(ema.parameters(), policy.parameters()):
                        average.lerp_(weight, 1 - options.ema_decay)

        # what happened
        progress.step += 1
        kl = torch.where(mask, log_ratio, 0.0).sum(1)
        estimates = {name: each[mask].sum().item() / size for name, each in rl.kl_estimates(log_ratio).items()}
        names = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "pretraining_loss")
        line = {
            "episodes": progress.step * size,
            "score": found.scores.mean().item(),
            "score_std": found.scores.std().item(),
            "monitored": None if monitor is None else found.monitored.mean().item(),
            "reward": (found.scores - kl_coef * kl).mean().item(),
            **{f"kl_{name}": value for name, value in estimates.items()},
            "kl_coef": kl_coef,
            "entropy": found.entropies[mask].mean().item(),
            "response_tokens": mask.sum(1).float().mean().item(),
            "ended": found.ended.float().mean().item(),
            "explained_variance": rl.explained_variance(found.values[mask], returns[mask]),
            **dict(zip(names, (sums / max(counted, 1)).tolist())),
            "learning_rate": rate,
            "grad_norm": norm,
            "rollout_seconds": wrote,
            "seconds": time.perf_counter() - started,
        }
        if not windows:
            del line["pretraining_loss"]
        if options.kl_target:
            kl_coef = rl.adapted(kl_coef, kl.mean().item(), options.kl_target, options.kl_horizon, size)
        progress.numbers["kl_coef"] = kl_coef
        shown = f"score {line['score']:.3f}, KL {line['kl_k1']:.3f}"
        stage.tell({n: v for n, v in line.items() if v is None or math.isfinite(v)}, shown, iterations)
        if progress.step % options.save_interval == 0:
            stage.save(write)
    return stage.finish(write)


def main() -> int:
    return run_stage(Options, __doc__, "ppo", train)


if __name__ == "__main__":
    entry_point(main)()
