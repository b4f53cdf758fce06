"""Responses that a policy writes, and the rewards they are given.

reward = load_reward("out/reward", ...)            # a reward model's directory
reward = load_reward("examples.judge:utility", ...)       # or any Python function
responses = write_responses(decoder, prompts, end, 64, 1.0, seeds)
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_arc.chat import ChatFormat
from gpt_arc.decoder import Decoder
from gpt_arc.errors import UserError
from gpt_arc.generate import generate, row_generators
from gpt_arc.preferences import is_reward_model, load_reward_model, score_sequences
from gpt_arc.sampling import Sampling


class Prompt(NamedTuple):
    tokens: list[int]
    row: dict[str, Any]  # of the file that it was read from


class Rollouts(NamedTuple):
    """N responses and what is known of them; tensors of tokens are (N, R), of states before each token."""

    sequences: list[list[int]]  # prompt and response
    prompt_lengths: Tensor  # (N,) int64
    responses: Tensor  # int64, 0 after the end
    mask: Tensor  # bool: which tokens are there
    ended: Tensor  # (N,) bool: whether by the end token
    logs: Tensor  # log-probabilities by the policy that wrote them
    reference: Tensor  # by the reference
    entropies: Tensor
    values: Tensor  # by the critic of that time
    scores: Tensor  # (N,)
    monitored: Tensor  # (N,)


Scorer = Callable[[Sequence[Prompt], Sequence[list[int]]], Tensor]


def write_responses(
    decoder: Decoder, prompts: Sequence[Sequence[int]], end: int, most: int, temperature: float, seed: int,
    numbers: Sequence[int], at_once: int,
) -> list[list[int]]:  # fmt: skip
    """A response of at most `most` tokens to each prompt, `at_once` at a time, drawn at a temperature.

    What a response draws depends on the seed and its own of the `numbers` alone. It has the token `end` if it got so
    far.
    """
    responses: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of like length read together
    for first in range(0, len(order), at_once):
        rows = order[first : first + at_once]
        generators = row_generators(seed, [numbers[row] for row in rows])
        steps = generate(
            decoder, [prompts[row] for row in rows], most, Sampling(temperature=temperature),
            generators=generators, stopped=lambda row, token: token == end,
        )  # fmt: skip
        for step in steps:
            for row, token in zip(step.rows, step.tokens):
                responses[rows[row]].append(token)
    return responses


def load_reward(name: str, chat: ChatFormat, device: torch.device, dtype: str, batch_size: int) -> Scorer:
    """What scores prompts and responses (N,): a reward model's directory, or a function, `module:function`.

    The function is called with the prompts' rows, dicts, and the responses as texts, and returns as many numbers. Its
    module may lie in the current folder. Raises UserError.
    """
    if is_reward_model(name):
        model, tokenizer, its_chat = load_reward_model(name)
        if its_chat != chat or tokenizer != chat.tokenizer:
            raise UserError(f"the reward model {name} reads conversations otherwise than the policy writes them")
        model.to(device).eval().requires_grad_(False)
        context = model.trunk.config.block_size

        def by_model(prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> Tensor:
            sequences = [prompt.tokens + response for prompt, response in zip(prompts, responses)]
            longest = max(map(len, sequences), default=0)
            if longest > context:
                raise UserError(
                    f"the reward model {name} reads {context} tokens, and there is a response up to {longest}"
                )
            return score_sequences(model, sequences, batch_size, device, dtype)

        return by_model
    function = _imported(name)

    def by_function(prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> Tensor:
        texts = [chat.decode(response) for response in responses]
        numbers = list(function([prompt.row for prompt in prompts], texts))
        if len(numbers) != len(texts) or not all(math.isfinite(number) for number in numbers):
            raise UserError(f"{name} must return a finite number for each of {len(texts)} responses: {numbers[:3]} ...")
        return torch.tensor([float(number) for number in numbers])

    return by_function


def _imported(name: str) -> Callable[[list[dict[str, Any]], list[str]], Sequence[float]]:
    module, _, function = name.partition(":")
    if not function:
        raise UserError(f"reward = {name} is neither a reward model's directory nor a function, module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward = {name} can't be imported: {error}") from None
    if not callable(found) or inspect.isclass(found):
        raise UserError(f"reward = {name} is no function")
    return found
