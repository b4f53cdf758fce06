"""What scores responses: a reward model or any Python function.

score = load_reward("out/reward", chat, device, "float32", 128)                # a reward model's directory
score = load_reward("examples.judge:utility", chat, device, "float32", 128)    # module:function
scores = score(prompts, responses)                                             # (N,)
"""

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
from gpt_arc.alignment.rollouts import Prompt
from gpt_arc.chat.format import ChatFormat
from gpt_arc.errors import UserError, first_line, naming
from gpt_arc.extras import names_function

Scorer = Callable[[Sequence[Prompt], Sequence[list[int]]], Tensor]
Function = Callable[[list[dict[str, Any]], list[str]], Any]  # returns a number for each text, which is checked
LIBRARIES = (sysconfig.get_paths()["stdlib"], *site.getsitepackages())


def load_reward(
    name: str, chat: ChatFormat, device: torch.device, dtype: str, batch_size: int, setting: str = "reward"
) -> Scorer:
    """Loads a scorer of responses: a reward model's directory, or a function named as `module:function`.

    A function is called with the prompts' rows (dicts) and the responses as texts, and returns a number for each. Its
    module may be in the current folder. Both this function and the scorer raise UserError, which names the `setting`.
    """
    if is_reward_model(name):
        return _model_scorer(name, chat, device, dtype, batch_size, setting)
    return _function_scorer(name, chat, setting)


def _model_scorer(
    name: str, chat: ChatFormat, device: torch.device, dtype: str, batch_size: int, setting: str
) -> Scorer:
    model, tokenizer, reward_chat = load_reward_model(name)
    if reward_chat != chat or tokenizer != chat.tokenizer:
        raise UserError(f"the {setting} model {name} has another chat format or tokenizer than the policy")
    model.to(device).eval().requires_grad_(False)
    context = model.trunk.config.block_size

    def score(prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> Tensor:
        sequences = [prompt.tokens + response for prompt, response in zip(prompts, responses)]
        longest = max(map(len, sequences), default=0)
        if longest > context:
            raise UserError(f"the {setting} model {name} reads at most {context} tokens; a response ends at {longest}")
        with naming(f"the {setting} model {name}"):
            return score_sequences(model, sequences, batch_size, device, dtype)

    return score


def _function_scorer(name: str, chat: ChatFormat, setting: str) -> Scorer:
    function = _import_function(name, setting)

    def score(prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> Tensor:
        texts = [chat.decode(response) for response in responses]
        try:
            result = function([prompt.row for prompt in prompts], texts)
        except Exception as error:
            raise UserError(f"{setting} = {name} failed: {_describe(error)}") from error
        try:
            scores = [float(number) for number in result]
        except (TypeError, ValueError):
            raise UserError(
                f"{setting} = {name} must return a list of numbers, one per response, not {result!r:.60}"
            ) from None
        if len(scores) != len(texts):
            raise UserError(
                f"{setting} = {name} must return one number per response, not {len(scores)} for {len(texts)}"
            )
        for text, number in zip(texts, scores):
            if not math.isfinite(number):
                raise UserError(f"{setting} = {name} must return finite numbers, not {number} for {text!r:.60}")
        return torch.tensor(scores)

    return score


def _import_function(name: str, setting: str) -> Function:
    if not names_function(name):
        raise UserError(f"{setting} = {name} is neither a reward model's directory nor a function (module:function)")
    module, function = name.split(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder
    try:
        value = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # a module may raise anything
        reason = _describe(error)
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name} in this folder or installed"
        raise UserError(f"{setting} = {name} can't be imported: {reason}") from None
    if value is None:
        raise UserError(f"{setting} = {name} can't be imported: {module} has no function {function}")
    if not callable(value):
        raise UserError(f"{setting} = {name} is not a function")
    return value


def _describe(error: Exception) -> str:
    """One line: the innermost place in the user's code that the error comes from, its type and its message."""
    not_the_users = (__file__, "<", *LIBRARIES)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_the_users)]
    place = f"{os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}: " if frames else ""
    return f"{place}{type(error).__name__}: {first_line(error)}"
