"""Rankings as tokens, and the reward model that learns from them: a GPT with a number for a head.

model, tokenizer, chat = load_reward_model("out/reward")      # trained by stages/reward.py
scores = score_sequences(model, [chat.prompt(turns) + chat.response("Red.")], 8, device, "float32")
"""

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt_arc import runtime
from gpt_arc.chat import ChatFormat, Ranking, Turn, load_chat
from gpt_arc.checkpoint import load_model, model_directory, save_model
from gpt_arc.distributed import say
from gpt_arc.errors import UserError
from gpt_arc.files import replacing
from gpt_arc.tokenizer import Tokenizer
from model import GPT

HEAD = "reward.safetensors"


class EncodedRanking(NamedTuple):
    """The responses to one prompt, and which is better than which."""

    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]  # numbers of the better and the worse of each pair that isn't tied

    @property
    def sequences(self) -> list[list[int]]:
        return [self.prompt + response for response in self.responses]


class EncodedRankings(NamedTuple):
    examples: list[EncodedRanking]
    pairs: int
    ties: int  # pairs that say nothing
    dropped: int  # rankings too long for the context, or all of whose pairs are ties


def encode_rankings(rankings: Sequence[Ranking], chat: ChatFormat, context: int) -> EncodedRankings:
    """Rankings whose prompt and longest response take `context` tokens at most, old turns being left out for that.

    Raises UserError naming the row for text that has no tokens.
    """
    examples, ties, dropped = [], 0, 0
    for ranking in rankings:
        pairs, count = ranking.pairs(), len(ranking.responses)
        ties += math.comb(count, 2) - len(pairs)
        try:
            responses = [chat.response(response) for response in ranking.responses]
            prompt = fitting_prompt(chat, ranking.turns, context - max(map(len, responses)))
        except UserError as error:
            raise UserError(f"{ranking.place}: {error}") from None
        if pairs and prompt is not None:
            examples.append(EncodedRanking(prompt, responses, pairs))
        else:
            dropped += 1
    return EncodedRankings(examples, sum(len(example.pairs) for example in examples), ties, dropped)


def described_rankings(split: str, rankings: Sequence[Ranking], chat: ChatFormat, context: int) -> list[EncodedRanking]:
    """The rankings of a split that say something, their figures printed. Raises UserError if there are none."""
    examples, pairs, ties, dropped = encode_rankings(rankings, chat, context)
    parts = [f"{len(examples):,} rankings, {pairs:,} pairs"]
    parts += [f"{ties:,} ties dropped"] * (ties > 0)
    parts += [f"{dropped:,} rankings without a pair or too long left out"] * (dropped > 0)
    say(f"{split:<15}{'; '.join(parts)}")
    if not examples:
        raise UserError(f"no ranking of the {split} split tells responses apart and fits into {context} tokens")
    return examples


def fitting_prompt(chat: ChatFormat, turns: Sequence[Turn], room: int) -> list[int] | None:
    """The prompt of the latest turns that take `room` tokens at most; None where the last turn alone takes more."""
    prompt = chat.prompt(turns)
    if len(prompt) <= room:
        return prompt
    try:
        return chat.prompt(chat.latest(turns, room))
    except UserError:
        return None


class Pairs(NamedTuple):
    """The pairs of several rankings, whose responses are numbered one after another."""

    better: Tensor  # (P,) int64
    worse: Tensor  # (P,) int64
    weights: Tensor  # (P,) float32, 1 over the number of pairs of the ranking


def pairs_of(rankings: Sequence[EncodedRanking], device: torch.device) -> Pairs:
    first, found = 0, []
    for ranking in rankings:
        found += [(first + i, first + j, 1 / len(ranking.pairs)) for i, j in ranking.pairs]
        first += len(ranking.responses)
    better, worse, weights = zip(*found)
    return Pairs(*(torch.tensor(x, device=device) for x in (better, worse, weights)))


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) int64, 0 after the end of a sequence, and lengths (N,)."""
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    rows = [[*sequence, *repeat(0, longest - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64, device=device), torch.tensor(lengths, device=device)


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
        with runtime.autocast(device, dtype):
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


def load_policy(path: Path | str) -> tuple[GPT, Tokenizer, ChatFormat]:
    """`load_chat_model`, but for a reward model, which no longer writes. Raises UserError."""
    if is_reward_model(path):
        raise UserError(f"{path} is a reward model: name the model that it was made of")
    return load_chat_model(path)


def load_chat_model(path: Path | str) -> tuple[GPT, Tokenizer, ChatFormat]:
    """A model that knows how conversations are written, its tokenizer and that. Raises UserError."""
    directory = model_directory(path)
    model, tokenizer = load_model(directory)
    chat = tokenizer and load_chat(directory, tokenizer)
    if chat is None:
        raise UserError(f"{directory} doesn't know how turns are marked (chat.json): train it by stages/sft.py first")
    return model, tokenizer, chat
