"""Reward models: a GPT whose head returns one number, with their files and their agreement with preferences.

model, tokenizer, chat = load_reward_model("out/reward")      # trained by stages/reward.py
scores = score_sequences(model, [chat.prompt(turns) + chat.response("Red.")], 8, device, "float32")
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gpt_arc.alignment.rankings import padded
from gpt_arc.chat.format import ChatFormat, load_chat_model
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.device import autocast
from gpt_arc.errors import UserError, check_finite
from gpt_arc.files import command, replacing
from gpt_arc.manifest import record_files
from gpt_arc.weights.directory import local_directory, of_one_checkpoint, save_model
from gpt_arc.weights.edit import fold_shift
from gpt_arc.weights.tensor_files import read_tensors
from model import GPT

HEAD = "reward.safetensors"


class ScalarHead(nn.Linear):
    """Maps each hidden state to a number, always in float32.

    Its weights are drawn from N(0, std^2), or 0 if std is 0. As in openai/lm-human-preferences, rewards start from
    N(0, 1/(C + 1)) and values from 0.
    """

    def __init__(self, width: int, std: float):
        super().__init__(width, 1)
        nn.init.normal_(self.weight, std=std) if std else nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns one number (...) for each hidden state (..., C)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.type_as(self.weight)).squeeze(-1)


class RewardModel(nn.Module):
    """A GPT with a scalar head: a sequence's score is the head's output at its last token."""

    def __init__(self, trunk: GPT, std: float | None = None):
        super().__init__()
        self.trunk = trunk
        width = trunk.config.n_embd
        self.head = ScalarHead(width, 1 / math.sqrt(width + 1) if std is None else std)
        for unused in (*([] if trunk.config.tied_head else [trunk.head.weight]), trunk.head_bias):
            if unused is not None:
                unused.requires_grad_(False)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Returns scores (N,) of tokens (N, T) padded after `lengths` (N,)."""
        hidden = self.trunk.hidden(tokens, lengths=lengths)
        return self.head(hidden[torch.arange(len(lengths), device=tokens.device), lengths - 1])


@torch.no_grad()
def fold_bias(model: RewardModel) -> None:
    """Moves the head's bias into that of the last norm, if it has one. The scores stay the same."""
    model.head.bias.fill_(fold_shift(model.trunk, model.head.weight, model.head.bias.item()))


@torch.no_grad()
def score_sequences(
    model: RewardModel, sequences: Sequence[Sequence[int]], batch_size: int, device: torch.device, dtype: str
) -> Tensor:
    """Returns scores (N,) float32, on the CPU, of N sequences of tokens. Raises NotFinite for one that isn't."""
    training = model.training
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.zeros(len(sequences))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        with autocast(device, dtype):
            scores[rows] = model(*padded([sequences[i] for i in rows], device)).float().cpu()
    model.train(training)
    check_finite(scores.tolist())
    return scores


def preference_report(gaps: Sequence[float] | np.ndarray, groups: int = 5) -> dict[str, Any]:
    """Reports how well scores agree with preferences. A gap is the better response's score minus the worse one's.

    `accuracy` is the share of pairs in the right order, with its standard error; equal scores count half. `by_gap`
    splits the pairs into groups of equal size by absolute gap, each with the share in the right order and the share
    that the Bradley-Terry model predicts, sigmoid(gap). `calibration_error` is the mean absolute difference of the two
    (arXiv:1706.04599, equation 3).
    """
    gaps = np.asarray(gaps, dtype=np.float64)
    gaps = gaps[np.argsort(np.abs(gaps), kind="stable")]
    agreed, predicted = np.where(gaps == 0, 0.5, gaps > 0), 1 / (1 + np.exp(-np.abs(gaps)))
    report: dict[str, Any] = {"pairs": len(gaps), "accuracy": float(agreed.mean())}
    report["standard_error"] = float(agreed.std(ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else 0.0
    report["by_gap"] = [
        {
            "from": float(abs(gaps[group[0]])),
            "to": float(abs(gaps[group[-1]])),
            "pairs": len(group),
            "predicted": float(predicted[group].mean()),
            "agreed": float(agreed[group].mean()),
        }
        for group in np.array_split(np.arange(len(gaps)), min(groups, len(gaps)))
    ]
    errors = (group["pairs"] * abs(group["predicted"] - group["agreed"]) for group in report["by_gap"])
    report["calibration_error"] = sum(errors) / len(gaps)
    return report


def save_reward_model(model: RewardModel, tokenizer: Tokenizer, chat: ChatFormat, directory: Path | str) -> None:
    """Writes a model directory with chat.json and the head's weights."""
    save_model(model.trunk, tokenizer, directory)
    chat.save(directory)
    with replacing(Path(directory) / HEAD) as temporary:
        tensors = {name: tensor.detach().cpu() for name, tensor in model.head.state_dict().items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
    record_files(Path(directory), HEAD)


def is_reward_model(path: Path | str) -> bool:
    """Whether `path` is a reward model's directory or the folder of a run that trained one."""
    directory = local_directory(path)
    return directory is not None and (directory / HEAD).is_file()


@of_one_checkpoint
def load_reward_model(path: Path | str) -> tuple[RewardModel, Tokenizer, ChatFormat]:
    """Loads a reward model on the CPU, its tokenizer and its chat format. Raises UserError."""
    directory = Path(path)
    trunk, tokenizer, chat = load_chat_model(directory)
    model = RewardModel(trunk)
    if not (directory / HEAD).exists():
        train = command("stages/reward.py", directory, "--train=RANKINGS.jsonl")
        raise UserError(f"{directory} has no reward head ({HEAD}): train one with: {train}")
    shapes = {name: tensor.shape for name, tensor in model.head.state_dict().items()}
    model.head.load_state_dict(read_tensors(directory / HEAD, shapes, torch.float32))
    return model, tokenizer, chat
