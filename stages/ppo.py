"""Reinforcement learning from a reward by proximal policy optimisation: InstructGPT's third step.

    python stages/ppo.py out/sft --prompts prompts.jsonl --reward out/reward
    python stages/ppo.py out/sft --prompts sums.jsonl --reward rules:correct          a Python function, rules.py
    python stages/ppo.py out/sft --prompts prompts.jsonl --reward out/reward --pretraining_dataset openwebtext
    python stages/ppo.py --resume=out/ppo                                   continue a stopped run; a reward
                                                                            function has to be named again
    torchrun --standalone --nproc_per_node=8 stages/ppo.py ppo.toml
    python sample.py --chat out/ppo                                         talk with it

The policy writes responses to prompts. Each response is scored as a whole, less a penalty for its KL from the model
that the run starts from (Ziegler et al., arXiv:1909.08593; Ouyang et al., arXiv:2203.02155). A reward function is
called with the prompts' rows and the responses as texts and returns a number for each. A run writes out/ppo/ (or
out/ppo-2, -3 ...): run.json, metrics.jsonl and checkpoints.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401
    from gpt_arc.training.arguments import check_stage_arguments
    from gpt_arc.training.stage_options import PPOOptions

    check_stage_arguments(PPOOptions, __doc__)


import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gpt_arc.alignment import losses
from gpt_arc.alignment.policy import ActorCritic, ReferencePolicy, fingerprint, load_policy
from gpt_arc.alignment.rankings import padded
from gpt_arc.alignment.reward_model import RewardModel, ScalarHead, is_reward_model, load_reward_model
from gpt_arc.alignment.rewards import Scorer, load_reward
from gpt_arc.alignment.rollouts import (
    ModelOutputs,
    Prompt,
    Rollouts,
    gather_rollouts,
    model_outputs,
    read_and_encode_prompts,
    update_writer,
    write_responses,
    writer_of,
)
from gpt_arc.chat.format import ChatFormat
from gpt_arc.data.batches import windows
from gpt_arc.data.datasets import Corpus, open_dataset
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.load import resolve_decoding_compile
from gpt_arc.device import autocast, to_device
from gpt_arc.distributed import RANK, WORLD_SIZE, say
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command
from gpt_arc.nn.head_loss import IGNORED
from gpt_arc.planning.cost import describe_parameters
from gpt_arc.tables import counted
from gpt_arc.training.command_line import run_stage
from gpt_arc.training.epochs import EpochOrder, digest, micro_batches
from gpt_arc.training.optim import Updater, update_average
from gpt_arc.training.routers import RouterMeter, freeze_routers
from gpt_arc.training.stage_options import PPOOptions
from gpt_arc.training.stage_run import StageRun
from gpt_arc.weights.directory import save_model
from model import GPT


def build_critic(reward: str, network: str | None, policy: GPT) -> RewardModel | ScalarHead:
    """Builds the value network. Raises UserError if it should be a reward model and there is none."""
    from_reward = is_reward_model(reward)
    if network == "shared":
        return ScalarHead(policy.config.n_embd, 0.0)
    if network == "policy" or network is None and not from_reward:
        return RewardModel(copy.deepcopy(policy), std=0.0)
    if not from_reward:
        raise UserError(f"value_network = reward, but reward = {reward} is not a reward model: use policy or shared")
    return load_reward_model(reward)[0]


class PretrainingText:
    """Windows of a prepared dataset; the policy's language-model loss on them is mixed into the updates."""

    def __init__(self, corpus: Corpus, options: PPOOptions, context: int, vocab_size: int):
        self.split = corpus.split("train", context, vocab_size, False)
        self.order = self.split.training_order(context, options.seed)
        self.context, self.windows = context, options.pretraining_batch_size
        self.tokens = self.windows * context  # per update

    def read(self, first: int, updates: int) -> None:
        """Read the windows of an iteration: of `updates` updates from update `first` on."""
        starts = self.order.starts(first * self.windows, updates * self.windows)
        self.first, self.rows = first, windows(self.split, starts, self.context)

    def part(self, update: int, i: int, parts: int, device: torch.device) -> list[Tensor] | None:
        """This process's tokens and targets (B, T) in part `i` (from 0) of an update; None if no process has any.

        A process that has none where others do gets a window that isn't scored.
        """
        if i * WORLD_SIZE >= self.windows:
            return None
        start = (update - self.first) * self.windows
        each = slice(start + i * WORLD_SIZE + RANK, start + self.windows, parts * WORLD_SIZE)
        tokens, targets = (rows[each] for rows in self.rows)
        if not len(tokens):
            tokens, targets = self.rows[0][:1], torch.full_like(self.rows[1][:1], IGNORED)
        return to_device([tokens, targets], device)


def minibatch_losses(
    replica: nn.Module, rollouts: Rollouts, advantages: Tensor, returns: Tensor, rows: list[int],
    text: Sequence[Tensor] | None, options: PPOOptions, run: StageRun,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns sums (4,) over the tokens of `rows`: policy loss, value loss, clipped ratios and clipped values.

    Also returns the summed language-model loss () of `text`.
    """
    width = int(rollouts.mask[rows].sum(1).max())
    outputs = rollouts.outputs
    tensors = (rollouts.responses, outputs.log_probs, outputs.values, advantages, returns, rollouts.mask)
    prompt_lengths, responses, old_logs, old_values, advantages, returns, mask = to_device(
        [rollouts.prompt_lengths[rows], *(tensor[rows, :width] for tensor in tensors)], run.device
    )
    tokens, lengths = padded([rollouts.sequences[row][:-1] for row in rows], run.device)
    with autocast(run.device, run.dtype):
        logs, _, values, text_loss = replica(tokens, prompt_lengths, responses, text, lengths)
    policy, clipped = losses.policy_losses(logs, old_logs, advantages, options.clip)
    value, value_clipped = losses.value_losses(values, old_values, returns, options.value_clip)
    sums = torch.stack([torch.where(mask, each, 0.0).sum() for each in (policy, value, clipped, value_clipped)])
    return sums, logs.new_zeros(()) if text_loss is None else text_loss


def rollout_metrics(rollouts: Rollouts, returns: Tensor, kl_coef: float, monitored: bool) -> dict[str, float | None]:
    """Metrics of the responses of an iteration."""
    mask, outputs = rollouts.mask, rollouts.outputs
    log_ratio = outputs.log_probs - outputs.reference_log_probs
    kl = {f"kl_{name}": each.sum(1).mean().item() for name, each in losses.kl_estimates(log_ratio).items()}
    return {
        "score": rollouts.scores.mean().item(),
        "score_std": rollouts.scores.std(correction=0).item(),
        "monitored": rollouts.monitored.mean().item() if monitored else None,
        "reward": rollouts.scores.mean().item() - kl_coef * kl["kl_k1"],
        **kl,
        "kl_coef": kl_coef,
        "entropy": outputs.entropies[mask].mean().item(),
        "response_tokens": mask.sum(1).float().mean().item(),
        "ended": rollouts.ended.float().mean().item(),
        "explained_variance": losses.explained_variance(outputs.values[mask], returns[mask]),
    }


class Setup(NamedTuple):
    """What a run of PPO starts from."""

    policy: GPT
    reference: GPT
    critic: RewardModel | ScalarHead
    average: GPT | None  # moving average of the policy's weights
    tokenizer: Tokenizer
    chat: ChatFormat
    score: Scorer
    monitor: Scorer | None
    prompts: list[Prompt]
    text: PretrainingText | None


def load_setup(options: PPOOptions, run: StageRun) -> Setup:
    """Loads models, rewards, prompts and pre-training text. Raises UserError."""
    if options.prompts is None:
        raise UserError("name the prompts by --prompts")
    if options.reward is None:
        raise UserError("name the reward by --reward")
    policy, tokenizer, chat = load_policy(run.origin)
    reference = load_policy(options.base_model)[0].eval()
    critic = build_critic(options.reward, options.value_network, policy)
    context = policy.config.block_size
    if isinstance(critic, RewardModel):
        if critic.trunk.config.block_size < context:
            raise UserError(f"the value network reads {critic.trunk.config.block_size} tokens, the policy {context}")
        critic.trunk.activation_checkpointing = options.activation_checkpointing
    policy.activation_checkpointing = options.activation_checkpointing

    def scorer(setting: str) -> Scorer:
        name = getattr(options, setting)
        return load_reward(name, chat, run.device, run.dtype, options.rollout_batch_size, setting)

    score = scorer("reward")
    monitor = None if options.monitor is None else scorer("monitor")
    average = None
    if options.ema_decay is not None:
        average = copy.deepcopy(policy).requires_grad_(False)
    prompts = read_and_encode_prompts(options.prompts, chat, context - options.max_new_tokens, options.columns)
    text = None
    if options.pretraining_dataset:
        corpus = open_dataset(options.pretraining_dataset, tokenizer, "pretraining_dataset")
        text = PretrainingText(corpus, options, context, policy.config.vocab_size)
    return Setup(policy, reference, critic, average, tokenizer, chat, score, monitor, prompts, text)


def compiles_rollouts(options: PPOOptions, policy: GPT, device: torch.device, dtype: str) -> bool:
    """Whether the step that writes responses is compiled. On a CPU the policy writes them, which is trained.

    Experts wait for the device within a step, except in bfloat16.
    """
    if device.type != "cuda" or policy.config.n_experts and dtype != "bfloat16":
        if options.compile is True:
            raise UserError(f"compile = true can't work on {device.type} in {dtype} here: leave it out")
        return False
    batches = math.ceil(options.episodes / WORLD_SIZE / options.rollout_batch_size)
    return resolve_decoding_compile(options.compile, device, policy, batches * options.max_new_tokens)


def written_and_scored(
    setup: Setup, decoder: Decoder, share: list[Prompt], numbers: Sequence[int], options: PPOOptions
) -> tuple[list[list[int]], Tensor, Tensor]:
    """Returns responses to this process's `share` of an iteration's prompts, their scores and the monitor's.

    `numbers` are those of the episodes.
    """
    responses = write_responses(
        decoder, share, setup.chat.ends, options.max_new_tokens, options.temperature, options.seed, numbers,
        options.rollout_batch_size,
    )  # fmt: skip
    scores = setup.score(share, responses)
    monitored = setup.monitor(share, responses) if setup.monitor else scores
    if options.no_end_reward is not None:
        ended = torch.tensor([response[-1] in setup.chat.ends for response in responses], dtype=torch.bool)
        scores = torch.where(ended, scores, options.no_end_reward)
    return responses, scores, monitored


def run_models(
    actor: ActorCritic, reference: ReferencePolicy, share: list[Prompt], responses: list[list[int]],
    options: PPOOptions, run: StageRun,
) -> ModelOutputs:  # fmt: skip
    """Returns what the models say of this process's share of an iteration's responses."""
    calls = math.ceil(options.episodes_per_iteration / WORLD_SIZE / options.batch_size)
    with run.parallel.evaluating(actor), run.parallel.evaluating(reference):
        return model_outputs(actor, reference, share, responses, options.batch_size, run.device, run.dtype, calls)


def estimate_advantages(rollouts: Rollouts, kl_coef: float, options: PPOOptions) -> tuple[Tensor, Tensor]:
    """Returns advantages and returns (N, R) from the scores and the KL penalty."""
    mask, outputs = rollouts.mask, rollouts.outputs
    log_ratio = outputs.log_probs - outputs.reference_log_probs
    rewards = losses.penalised_rewards(rollouts.scores, log_ratio, mask, kl_coef)
    if options.whiten_rewards:
        rewards = losses.whiten(rewards, mask, shift_mean=False)
    advantages, returns = losses.advantages(rewards, outputs.values, mask, options.gamma, options.gae_lambda)
    if options.whiten_advantages:
        advantages = losses.whiten(advantages, mask)
    return advantages, returns


def minibatch_rows(step: int, update: int, options: PPOOptions) -> list[int]:
    """The responses of an iteration's minibatch; every inner epoch shuffles them anew."""
    epoch, minibatch = divmod(update, options.minibatches)
    generator = np.random.default_rng((options.seed, step, epoch))
    shuffled = generator.permutation(options.episodes_per_iteration).tolist()
    return shuffled[minibatch * options.examples_per_update :][: options.examples_per_update]


def accumulate_gradients(
    replica: nn.Module, updater: Updater, routers: RouterMeter, rollouts: Rollouts, advantages: Tensor,
    returns: Tensor, rows: list[int], update: int, text: PretrainingText | None, options: PPOOptions, run: StageRun,
) -> Tensor:  # fmt: skip
    """Runs the backward passes of an update.

    Returns this process's share of the means (5,) over the minibatch's tokens: the sums of `minibatch_losses`, and the
    loss of the pre-training text.
    """
    tokens = int(rollouts.mask[rows].sum())
    micros = list(micro_batches(rows, options.batch_size))
    totals = torch.zeros(5, device=run.device)
    for i, (micro, weight) in enumerate(micros):
        windows = text.part(update, i, len(micros), run.device) if text else None
        with run.parallel.sharing_gradients(replica, i + 1 == len(micros)):
            sums, text_sum = minibatch_losses(replica, rollouts, advantages, returns, micro, windows, options, run)
            means = torch.stack((*sums * (weight / tokens), text_sum / (text.tokens if text else 1)))
            loss = means[0] + options.value_coef * means[1] + options.pretraining_coef * means[4]
            updater.backward(loss * WORLD_SIZE)
        totals += means.detach()
        routers.add()
    return totals


def train(options: PPOOptions, run: StageRun) -> int:
    # ---- models, rewards, prompts and the plan
    setup = load_setup(options, run)
    policy, critic, average, prompts, text = setup.policy, setup.critic, setup.average, setup.prompts, setup.text
    reference = ReferencePolicy(setup.reference, options.temperature)
    order = EpochOrder(len(prompts), 1, options.seed)
    size = options.episodes_per_iteration
    iterations = math.ceil(options.episodes / size)
    updates = options.inner_epochs * options.minibatches  # per iteration
    say(f"parameters     {describe_parameters(policy)}; critic {describe_parameters(critic)}")
    say(f"iterations     {iterations:,} of {counted(size, 'episode')}, {counted(updates, 'update')} each")

    # ---- the run: a new one, or a stopped one from its last checkpoint
    run.fit(policy.config)
    run.open(digest([fingerprint(setup.reference), [prompt.tokens for prompt in prompts]]))
    actor = ActorCritic(policy, critic, options.temperature, average).eval()  # dropout would look like another policy
    routers = RouterMeter(policy, frozen=True)  # moving them would be one more change of the policy
    if isinstance(critic, RewardModel):
        freeze_routers(critic.trunk)
    writer = writer_of(policy, run.device, run.dtype, run.parallel.is_sharded).to(run.device)
    replica = run.place(actor)
    run.parallel.place_frozen(reference, run.device)
    updater = run.updater(actor, iterations * updates)
    run.restore(updater, {"critic": critic} | ({} if average is None else {"policy": policy}))
    decoder = Decoder(writer)
    if compiles_rollouts(options, policy, run.device, run.dtype):
        decoder.compile(max(len(prompt.tokens) for prompt in prompts) + options.max_new_tokens)
    progress = run.progress
    kl_coef = progress.numbers.get("kl_coef", options.kl_coef)

    def write(whole: ActorCritic, directory: Path) -> None:
        save_model(whole.average or whole.policy, setup.tokenizer, directory)
        setup.chat.save(directory)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop: rollout and score, advantages, updates, report. Each process writes and scores its share of an
    # iteration's responses; then every process gets all of them, and each update is shared out again.
    while run.goes_on(iterations, "iteration"):
        started = time.perf_counter()
        first = progress.step * size

        # rollout and score
        iteration_prompts = [prompts[row] for row in order.take(first, size)]
        share, numbers = iteration_prompts[RANK::WORLD_SIZE], range(first + RANK, first + size, WORLD_SIZE)
        update_writer(writer, policy, run.parallel.everywhere)
        with run.keeping(write):
            if text:
                text.read(progress.step * updates, updates)
            responses, *scores = written_and_scored(setup, decoder, share, numbers, options)
        outputs = run_models(actor, reference, share, responses, options, run)
        rollouts = gather_rollouts(iteration_prompts, responses, outputs, *scores, setup.chat.ends)
        rollout_seconds = time.perf_counter() - started

        # advantages
        advantages, returns = estimate_advantages(rollouts, kl_coef, options)

        # updates
        totals, finite_updates, rate, norm = torch.zeros(5), 0, math.nan, math.nan
        for j in range(updates):
            rows, update = minibatch_rows(progress.step, j, options), progress.step * updates + j
            means = accumulate_gradients(
                replica, updater, routers, rollouts, advantages, returns, rows, update, text, options, run
            )
            result = run.update(updater, update, *means)
            routers.step(result is not None)
            if result is None:
                continue
            rate, norm, means = result
            totals, finite_updates = totals + torch.tensor(means), finite_updates + 1
            if average is not None and options.ema_decay is not None:
                update_average(average.parameters(), policy.parameters(), options.ema_decay)

        # report
        progress.step += 1
        run.check_finite()
        means = (totals / max(finite_updates, 1)).tolist()
        line = {
            "episodes": progress.step * size,
            **rollout_metrics(rollouts, returns, kl_coef, setup.monitor is not None),
            **dict(zip(("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction"), means)),
            "pretraining_loss": means[4] if text else None,
            "learning_rate": rate,
            "grad_norm": norm,
            **routers.take(),
            "rollout_seconds": rollout_seconds,
            "iteration_seconds": time.perf_counter() - started,
        }
        shown = f"score {line['score']:.3f}, KL {line['kl_k1']:.3f}"
        run.tell(line, shown, iterations)
        if options.kl_target:
            kl_coef = losses.adapted_kl_coefficient(kl_coef, line["kl_k1"], options.kl_target, options.kl_horizon, size)
        progress.numbers["kl_coef"] = kl_coef
        if progress.step % options.save_interval == 0:
            run.save(write)
    steps = {
        command("sample.py", "--chat", run.folder): "talk with it",
        command("stages/eval.py", run.folder, "--chat", "--tasks=TASK.toml", "--data=ITEMS.jsonl"): "measure it",
    }
    return run.finish(write, steps)


def main() -> int:
    return run_stage(PPOOptions, __doc__, "ppo", train)


if __name__ == "__main__":
    entry_point(main)()
