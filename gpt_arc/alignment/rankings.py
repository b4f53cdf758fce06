"""Rankings as tokens, and their pairs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_arc.chat.files import Ranking
from gpt_arc.chat.format import ChatFormat, Turn
from gpt_arc.data.batches import pad_rows
from gpt_arc.distributed import say
from gpt_arc.errors import UserError


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
    return pad_rows(sequences, device), torch.tensor([len(sequence) for sequence in sequences], device=device)
