"""Rankings as tokens, and the reward model that learns from them: a GPT with a number for a head.

model, tokenizer, chat = load_reward_model("out/reward")      # trained by stages/reward.py
scores = score_sequences(model, [chat.prompt(turns) + chat.response("Red.")], 8, device, "float32")
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt_arc.alignment.rankings import padded
from gpt_arc.chat.format import ChatFormat, load_chat_model
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.device import autocast
from gpt_arc.errors import UserError
from gpt_arc.files import replacing
from gpt_arc.weights.directory import model_directory, save_model
from model import GPT

HEAD = "reward.safetensors"


class ScalarHead(nn.Linear):
    """A number for each hidden state, always in float32.

    Drawn from N(0, 1/(C + 1)) for rewards, 0 for values, as openai/lm-human-preferences lm_human_preferences does.
    """

    def __init__(self, width: int, std: float):
        super().__init__(width, 1)
        nn.init.normal_(self.weight, std=std) if std else nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Numbers (...) of hidden states (..., C)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.type_as(self.weight)).squeeze(-1)


class RewardModel(nn.Module):
    """A trunk under a scalar head: the number at a sequence's last token is its score."""

    def __init__(self, trunk: GPT, std: float | None = None):
        super().__init__()
        self.trunk = trunk
        width = trunk.config.n_embd
        self.head = ScalarHead(width, 1 / math.sqrt(width + 1) if std is None else std)
        for unused in (*([] if trunk.config.tied_head else [trunk.head.weight]), trunk.head_bias):
            if unused is not None:
                unused.requires_grad_(False)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Scores (N,) of tokens (N, T) that are `lengths` (N,) long."""
        hidden = self.trunk.hidden(tokens)
        return self.head(hidden[torch.arange(len(lengths), device=tokens.device), lengths - 1])


@torch.no_grad()
def score_sequences(
    model: RewardModel, sequences: Sequence[Sequence[int]], batch_size: int, device: torch.device, dtype: str
) -> Tensor:
    """Scores (N,) float32, on the CPU, of sequences of tokens."""
    training = model.training
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.zeros(len(sequences))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        with autocast(device, dtype):
            scores[rows] = model(*padded([sequences[i] for i in rows], device)).float().cpu()
    model.train(training)
    return scores


def preference_report(gaps: Sequence[float], groups: int = 5) -> dict[str, Any]:
    """How well scores agree with preferences, from each pair's score of the better response less that of the worse.

    accuracy: the share of pairs in the right order, an equal pair counting half, with its standard error. `by_gap`: of
    groups of equal size by the absolute gap, the share that agrees and the one that Bradley and Terry's model predicts,
    sigmoid of the gap; calibration_error: their mean absolute difference (arXiv:1706.04599, equation 3).
    """
    gaps = np.asarray(gaps, dtype=np.float64)
    gaps = gaps[np.argsort(np.abs(gaps), kind="stable")]
    agreed, predicted = np.where(gaps == 0, 0.5, gaps > 0), 1 / (1 + np.exp(-np.abs(gaps)))
    report: dict[str, Any] = {"pairs": len(gaps), "accuracy": float(agreed.mean())}
    report["standard_error"] = float(agreed.std(ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else 0.0
    report["by_gap"] = [
        {
            "from": float(abs(gaps[own[0]])),
            "to": float(abs(gaps[own[-1]])),
            "pairs": len(own),
            "predicted": float(predicted[own].mean()),
            "agreed": float(agreed[own].mean()),
        }
        for own in np.array_split(np.arange(len(gaps)), min(groups, len(gaps)))
    ]
    errors = (group["pairs"] * abs(group["predicted"] - group["agreed"]) for group in report["by_gap"])
    report["calibration_error"] = sum(errors) / len(gaps)
    return report


def save_reward_model(model: RewardModel, tokenizer: Tokenizer, chat: ChatFormat, directory: Path | str) -> None:
    """Write a reward model's directory: a model directory with chat.json and the head."""
    save_model(model.trunk, tokenizer, directory)
    chat.save(directory)
    with replacing(Path(directory) / HEAD) as temporary:
        tensors = {name: tensor.detach().cpu() for name, tensor in model.head.state_dict().items()}
        save_file(tensors, temporary, metadata={"format": "pt"})


def is_reward_model(path: Path | str) -> bool:
    """Whether `path` is a reward model's directory or a run folder of one."""
    return any((Path(path) / place / HEAD).is_file() for place in (".", "best", "last"))


def load_reward_model(path: Path | str) -> tuple[RewardModel, Tokenizer, ChatFormat]:
    """The reward model, on the CPU, its tokenizer and how it reads conversations. Raises UserError."""
    directory = model_directory(path)
    trunk, tokenizer, chat = load_chat_model(directory)
    model = RewardModel(trunk)
    try:
        model.head.load_state_dict(load_file(directory / HEAD))
    except FileNotFoundError:
        raise UserError(f"{directory} is a model without a head for rewards: train one by stages/reward.py") from None
    except (OSError, SafetensorError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(f"{directory / HEAD} is damaged: {str(error).strip().splitlines()[-1].strip()}") from None
    return model, tokenizer, chat


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights, of at most a thousand of each tensor."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        flat = tensor.detach().flatten()
        found.update(flat[:: max(len(flat) // 1000, 1)].float().cpu().numpy().tobytes())
    return found.hexdigest()
