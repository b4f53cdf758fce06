"""Rollouts: responses that a policy writes to prompts, with the models' outputs and the scores for them.

responses = write_responses(decoder, prompts, chat.ends, 64, 1.0, seed, numbers, 128)
outputs = model_outputs(actor, reference, prompts, responses, 8, device, "float32")
rollouts = gather_rollouts(all_prompts, responses, outputs, scores, monitored, chat.ends)
"""

import copy
import math
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_arc import distributed
from gpt_arc.alignment.policy import ActorCritic, ReferencePolicy
from gpt_arc.alignment.rankings import fitting_prompt, padded
from gpt_arc.chat.files import read_prompts
from gpt_arc.chat.format import ChatFormat
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.probabilities import row_generators
from gpt_arc.decoding.settings import Sampling
from gpt_arc.device import DTYPES, autocast, send
from gpt_arc.distributed import WORLD_SIZE, say
from gpt_arc.errors import UserError
from gpt_arc.tables import counted
from model import GPT


class Prompt(NamedTuple):
    tokens: list[int]
    row: dict[str, Any]  # as read from the file


def read_and_encode_prompts(path: Path, chat: ChatFormat, room: int, columns: Sequence[str] = ()) -> list[Prompt]:
    """Reads prompts, dropping old turns until each fits into `room` tokens. Raises UserError if none fits."""
    prompts, dropped = [], 0
    for conversation in read_prompts(path, columns):
        try:
            tokens = fitting_prompt(chat, conversation.turns, room)
        except UserError as error:
            raise UserError(f"{conversation.place}: {error}") from None
        if tokens is None:
            dropped += 1
        else:
            prompts.append(Prompt(tokens, conversation.row))
    say(f"prompts        {len(prompts):,}" + (f"; {dropped:,} dropped: too long" if dropped else ""))
    if not prompts:
        raise UserError(
            f"no prompt of {path} fits: max_new_tokens leaves {counted(max(room, 0), 'token')} "
            "of the context for it; lower it"
        )
    return prompts


def writer_of(policy: GPT, device: torch.device, dtype: str, divided: bool = False) -> GPT:
    """Returns the model that writes responses: on a GPU, a copy of the policy in 16 bits, which it reads twice as fast.

    Elsewhere, and in float32, it is the policy itself, unless that is about to be `divided` among processes.
    `update_writer` brings the copy up to date.
    """
    shrinks = device.type == "cuda" and DTYPES[dtype] != torch.float32
    if not (shrinks or divided):
        return policy
    return copy.deepcopy(policy).to(DTYPES[dtype] if shrinks else None).requires_grad_(False)


@torch.no_grad()
def update_writer(writer: GPT, policy: GPT, whole: Callable[[Tensor], Tensor]) -> None:
    """Copies the policy's weights, each made `whole`, to its writer. Every process must call this."""
    if writer is not policy:
        for copied, tensor in zip(writer.state_dict().values(), policy.state_dict().values()):
            copied.copy_(whole(tensor))


def write_responses(
    decoder: Decoder, prompts: Sequence[Prompt], ends: Set[int], max_new_tokens: int, temperature: float, seed: int,
    numbers: Sequence[int], batch_size: int,
) -> list[list[int]]:  # fmt: skip
    """Samples a response to each prompt, `batch_size` at a time.

    A response ends with one of the tokens `ends`, or after `max_new_tokens`. Its random draws depend only on the seed
    and on its number in `numbers`.
    """
    responses: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))  # similar lengths share a batch
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        steps = generate(
            decoder, [prompts[row].tokens for row in rows], max_new_tokens, Sampling(temperature=temperature),
            generators=row_generators(seed, [numbers[row] for row in rows]),
            stopped=lambda row, token: token in ends,
        )  # fmt: skip
        for step in steps:
            for row, token in zip(step.rows, step.tokens):
                responses[rows[row]].append(token)
    return responses


class ModelOutputs(NamedTuple):
    """The models' outputs for each token of N responses, given the tokens before it: (N, R) each, on the CPU."""

    log_probs: Tensor  # by the policy that wrote the response
    reference_log_probs: Tensor
    entropies: Tensor  # of the policy
    values: Tensor  # of the critic


@torch.no_grad()
def model_outputs(
    actor: ActorCritic, reference: ReferencePolicy, prompts: Sequence[Prompt], responses: Sequence[list[int]],
    batch_size: int, device: torch.device, dtype: str, calls: int | None = None,
) -> ModelOutputs:  # fmt: skip
    """Runs policy, reference and critic on responses, `batch_size` at a time.

    Processes that divide the models all make the same number of `calls`: where no response is left, with a token that
    stands in for one.
    """
    calls = math.ceil(len(responses) / batch_size) if calls is None else calls
    outputs = torch.zeros(4, len(responses), max(map(len, responses), default=0))
    for start in range(0, calls * batch_size, batch_size):
        rows = slice(start, start + batch_size)
        pairs = [(p.tokens, r) for p, r in zip(prompts[rows], responses[rows])]
        read = pairs or [([0], [0])]
        tokens, _ = padded([prompt + response[:-1] for prompt, response in read], device)
        targets, _ = padded([response for _, response in read], device)
        prompt_lengths = send([len(prompt) for prompt, _ in read], device)
        with autocast(device, dtype):
            logs, entropies, values, _ = actor(tokens, prompt_lengths, targets)
            reference_logs = reference(tokens, prompt_lengths, targets)
        if pairs:
            outputs[:, rows, : targets.size(1)] = torch.stack((logs, reference_logs, entropies, values)).cpu()
    return ModelOutputs(*outputs)


class Rollouts(NamedTuple):
    """The N responses of all processes with their outputs and scores, on the CPU."""

    sequences: list[list[int]]  # prompt and response
    prompt_lengths: Tensor  # (N,) int64
    responses: Tensor  # (N, R) int64, padded with 0
    mask: Tensor  # (N, R) bool, False for padding
    ended: Tensor  # (N,) bool: whether the response ends with an end token
    outputs: ModelOutputs  # (N, R) each, 0 for padding
    scores: Tensor  # (N,)
    monitored: Tensor  # (N,) scores of the reward that is only logged


def gather_rollouts(
    prompts: Sequence[Prompt], responses: Sequence[list[int]], outputs: ModelOutputs, scores: Tensor, monitored: Tensor,
    ends: Set[int],
) -> Rollouts:  # fmt: skip
    """Gives every process the rollouts of all processes.

    `prompts` are those of all processes, in order. The other arguments are this process's share: prompts RANK,
    RANK + WORLD_SIZE, and so on.
    """
    shares = distributed.gather((responses, torch.stack(outputs), scores, monitored))
    responses = [shares[i % WORLD_SIZE][0][i // WORLD_SIZE] for i in range(len(prompts))]
    tokens, lengths = padded(responses, torch.device("cpu"))
    mask = torch.arange(tokens.size(1)) < lengths[:, None]
    all_outputs, all_scores = torch.zeros(4, *tokens.shape), torch.zeros(2, len(prompts))
    for rank, (_, rank_outputs, *rank_scores) in enumerate(shares):
        rows = slice(rank, None, WORLD_SIZE)
        all_outputs[:, rows, : rank_outputs.size(2)] = rank_outputs
        all_scores[:, rows] = torch.stack(rank_scores)
    return Rollouts(
        [prompt.tokens + response for prompt, response in zip(prompts, responses)],
        torch.tensor([len(prompt.tokens) for prompt in prompts]),
        tokens,
        mask,
        torch.tensor([response[-1] in ends for response in responses]),
        ModelOutputs(*torch.where(mask, all_outputs, 0.0)),
        *all_scores,
    )
