"""Responses that a policy writes, what is known of them, and the rewards they are given.

reward = load_reward("out/reward", ...)            # a reward model's directory
reward = load_reward("examples.judge:utility", ...)       # or any Python function
responses = write_responses(decoder, prompts, end, 64, 1.0, seed, numbers, 128)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt_arc import distributed
from gpt_arc.alignment.losses import log_probabilities, response_states
from gpt_arc.alignment.rankings import fitting_prompt, padded
from gpt_arc.alignment.reward_model import RewardModel, ScalarHead, is_reward_model
from gpt_arc.chat.files import read_prompts
from gpt_arc.chat.format import ChatFormat, load_chat_model
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.probabilities import row_generators
from gpt_arc.decoding.settings import Sampling
from gpt_arc.device import autocast
from gpt_arc.distributed import WORLD_SIZE, say
from gpt_arc.errors import UserError
from model import GPT


def load_policy(path: Path | str) -> tuple[GPT, Tokenizer, ChatFormat]:
    """`load_chat_model`, but for a reward model, which no longer writes. Raises UserError."""
    if is_reward_model(path):
        raise UserError(f"{path} is a reward model: name the model that it was made of")
    return load_chat_model(path)


class Prompt(NamedTuple):
    tokens: list[int]
    row: dict[str, Any]  # of the file that it was read from


def read_and_encode_prompts(path: Path, chat: ChatFormat, room: int) -> list[Prompt]:
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
        raise UserError(
            f"no prompt of {path} fits: max_new_tokens leaves {max(room, 0)} tokens of the context to it; lower it"
        )
    return found


def write_responses(
    decoder: Decoder, prompts: Sequence[Prompt], end: int, most: int, temperature: float, seed: int,
    numbers: Sequence[int], at_once: int,
) -> list[list[int]]:  # fmt: skip
    """A response of at most `most` tokens to each prompt, `at_once` at a time, drawn at a temperature.

    What a response draws depends on the seed and its own of the `numbers` alone. Its last token is `end` if it got so
    far.
    """
    responses: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))  # of like length are read together
    for first in range(0, len(order), at_once):
        rows = order[first : first + at_once]
        steps = generate(
            decoder, [prompts[row].tokens for row in rows], most, Sampling(temperature=temperature),
            generators=row_generators(seed, [numbers[row] for row in rows]),
            stopped=lambda row, token: token == end,
        )  # fmt: skip
        for step in steps:
            for row, token in zip(step.rows, step.tokens):
                responses[rows[row]].append(token)
    return responses


class ActorCritic(nn.Module):
    """A policy and what predicts its returns: a network of its own, or a head on the policy."""

    def __init__(self, policy: GPT, critic: RewardModel | ScalarHead, temperature: float):
        super().__init__()
        self.policy, self.critic, self.temperature = policy, critic, temperature

    def forward(
        self, tokens: Tensor, prompt_lengths: Tensor, responses: Tensor, text: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Log-probabilities, entropies and values, (N, R) each, of responses (N, R) within tokens (N, T).

        With `text`, tokens and targets (B, T), also the policy's language-model loss on it, a sum. All in one pass, as
        DistributedDataParallel has it.
        """
        hidden, length = self.policy.hidden(tokens), responses.size(1)
        states = response_states(hidden, prompt_lengths, length)
        logs, entropies = log_probabilities(self.policy, states, responses, self.temperature)
        if isinstance(self.critic, RewardModel):
            states = response_states(self.critic.trunk.hidden(tokens), prompt_lengths, length)
            values = self.critic.head(states)
        else:
            values = self.critic(states)
        return logs, entropies, values, None if text is None else self.policy(*text).total


class Assessment(NamedTuple):
    """What the models say of each token of N responses, before it: (N, R) each, on the CPU."""

    logs: Tensor  # log-probabilities by the policy that wrote it
    reference: Tensor  # by the reference
    entropies: Tensor  # of the policy
    values: Tensor  # of the critic


@torch.no_grad()
def assess(
    actor: ActorCritic, reference: GPT, prompts: Sequence[Prompt], responses: Sequence[list[int]], batch_size: int,
    device: torch.device, dtype: str,
) -> Assessment:  # fmt: skip
    """What policy, reference and critic say of responses, `batch_size` at a time."""
    known = torch.zeros(4, len(responses), max(map(len, responses), default=0))
    for start in range(0, len(responses), batch_size):
        rows = slice(start, start + batch_size)
        tokens, _ = padded([p.tokens + r[:-1] for p, r in zip(prompts[rows], responses[rows])], device)
        wanted, _ = padded(responses[rows], device)
        prompt_lengths = torch.tensor([len(p.tokens) for p in prompts[rows]], device=device)
        with autocast(device, dtype):
            logs, entropies, values, _ = actor(tokens, prompt_lengths, wanted)
            states = response_states(reference.hidden(tokens), prompt_lengths, wanted.size(1))
            by_reference, _ = log_probabilities(reference, states, wanted, actor.temperature)
        known[:, rows, : wanted.size(1)] = torch.stack((logs, by_reference, entropies, values)).cpu()
    return Assessment(*known)


class Rollouts(NamedTuple):
    """The N responses of all processes and what is known of them, on the CPU."""

    sequences: list[list[int]]  # prompt and response
    prompt_lengths: Tensor  # (N,) int64
    responses: Tensor  # (N, R) int64, 0 after the end
    mask: Tensor  # (N, R) bool: which tokens are there
    ended: Tensor  # (N,) bool: whether by the end token
    known: Assessment  # (N, R) each, 0 after the end
    scores: Tensor  # (N,)
    monitored: Tensor  # (N,)


def gather_rollouts(
    prompts: Sequence[Prompt], responses: Sequence[list[int]], known: Assessment, scores: Tensor, monitored: Tensor,
    end: int,
) -> Rollouts:  # fmt: skip
    """The rollouts of every process, in every process: `prompts` are all, the rest those of this one, every n-th."""
    shares = distributed.gather((responses, torch.stack(known), scores, monitored))
    responses = [shares[i % WORLD_SIZE][0][i // WORLD_SIZE] for i in range(len(prompts))]
    tokens, lengths = padded(responses, torch.device("cpu"))
    mask = torch.arange(tokens.size(1)) < lengths[:, None]
    all_known, all_scores = torch.zeros(4, *tokens.shape), torch.zeros(2, len(prompts))
    for rank, (_, own_known, *own_scores) in enumerate(shares):
        rows = slice(rank, None, WORLD_SIZE)
        all_known[:, rows, : own_known.size(2)] = own_known
        all_scores[:, rows] = torch.stack(own_scores)
    return Rollouts(
        [prompt.tokens + response for prompt, response in zip(prompts, responses)],
        torch.tensor([len(prompt.tokens) for prompt in prompts]),
        tokens,
        mask,
        torch.tensor([response[-1] == end for response in responses]),
        Assessment(*torch.where(mask, all_known, 0.0)),
        *all_scores,
    )


Scorer = Callable[[Sequence[Prompt], Sequence[list[int]]], Tensor]
