"""Rewards of responses: a reward model's scores, or a function of one's own."""

import importlib
import math
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt_arc.alignment.reward_model import is_reward_model, load_reward_model, score_sequences
from gpt_arc.alignment.rollouts import Prompt, Scorer
from gpt_arc.chat.format import ChatFormat
from gpt_arc.errors import UserError, first_line


def load_reward(name: str, chat: ChatFormat, device: torch.device, dtype: str, batch_size: int) -> Scorer:
    """What scores prompts and responses (N,): a reward model's directory, or a function, `module:function`.

    The function is called with the prompts' rows, dicts, and the responses as texts, and returns as many numbers. Its
    module may lie in the current folder. Raises UserError, and so does what is returned.
    """
    return _by_model(name, chat, device, dtype, batch_size) if is_reward_model(name) else _by_function(name, chat)


def _by_model(name: str, chat: ChatFormat, device: torch.device, dtype: str, batch_size: int) -> Scorer:
    model, tokenizer, its_chat = load_reward_model(name)
    if its_chat != chat or tokenizer != chat.tokenizer:
        raise UserError(f"the reward model {name} reads conversations otherwise than the policy writes them")
    model.to(device).eval().requires_grad_(False)
    context = model.trunk.config.block_size

    def score(prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> Tensor:
        sequences = [prompt.tokens + response for prompt, response in zip(prompts, responses)]
        longest = max(map(len, sequences), default=0)
        if longest > context:
            raise UserError(f"the reward model {name} reads {context} tokens, and there is a response up to {longest}")
        return score_sequences(model, sequences, batch_size, device, dtype)

    return score


def _by_function(name: str, chat: ChatFormat) -> Scorer:
    function = _imported(name)

    def score(prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> Tensor:
        texts = [chat.decode(response) for response in responses]
        try:
            found = function([prompt.row for prompt in prompts], texts)
        except Exception as error:
            raise UserError(f"{name} fails, {_where(error)}") from error
        try:
            numbers = [float(number) for number in found]
        except (TypeError, ValueError):
            raise UserError(f"{name} must return a list of numbers, one for each response, not {found!r:.60}") from None
        if len(numbers) != len(texts):
            raise UserError(f"{name} must return a number for each response: {len(numbers)} for {len(texts)}")
        wrong = next((i for i, number in enumerate(numbers) if not math.isfinite(number)), None)
        if wrong is not None:
            raise UserError(f"{name} must return finite numbers, not {numbers[wrong]}, as for {texts[wrong]!r:.60}")
        return torch.tensor(numbers)

    return score


def _imported(name: str) -> Callable[[list[dict[str, Any]], list[str]], Sequence[float]]:
    module, _, function = name.partition(":")
    if not (module and function):
        raise UserError(f"reward = {name} is neither a reward model's directory nor a function, module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a module may raise
        raise UserError(f"reward = {name} can't be imported, {_where(error)}") from None
    if not callable(found):
        raise UserError(f"reward = {name} is no function")
    return found


def _where(error: Exception) -> str:
    """What an error says, in a line, with the place that it comes from in code that is neither ours nor a library's."""
    libraries = (__file__, "<", sysconfig.get_paths()["stdlib"], *site.getsitepackages())
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    place = f"{os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}: " if frames else ""
    return f"{place}{type(error).__name__}: {first_line(error)}"
