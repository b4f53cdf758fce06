"""Rankings encoded as tokens, and the pairs of responses that a loss compares."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_arc.chat.files import Ranking
from gpt_arc.chat.format import ChatFormat, Turn
from gpt_arc.chat.preview import marked
from gpt_arc.data.batches import pad_rows
from gpt_arc.device import send
from gpt_arc.distributed import say
from gpt_arc.errors import UserError
from gpt_arc.tables import counted


class EncodedRanking(NamedTuple):
    """The responses to one prompt, and which response of each pair is better."""

    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]  # indices of the better and the worse response of each pair that isn't tied

    @property
    def sequences(self) -> list[list[int]]:
        return [self.prompt + response for response in self.responses]


class EncodedRankings(NamedTuple):
    examples: list[EncodedRanking]
    pairs: int
    ties: int  # pairs of equal rank or of equal responses, not in `pairs`
    dropped: int  # rankings too long for the context, or with nothing but ties


def encode_rankings(rankings: Sequence[Ranking], chat: ChatFormat, context: int) -> EncodedRankings:
    """Encodes rankings, dropping old turns until the prompt and the longest response fit into `context` tokens.

    Raises UserError naming the row if its text can't be encoded.
    """
    examples, ties, dropped = [], 0, 0
    for ranking in rankings:
        try:
            responses = [chat.response(response) for response in ranking.responses]
            prompt = fitting_prompt(chat, ranking.turns, context - max(map(len, responses)))
        except UserError as error:
            raise UserError(f"{ranking.place}: {error}") from None
        pairs = [(i, j) for i, j in ranking.pairs() if responses[i] != responses[j]]
        ties += math.comb(len(responses), 2) - len(pairs)
        if pairs and prompt is not None:
            examples.append(EncodedRanking(prompt, responses, pairs))
        else:
            dropped += 1
    return EncodedRankings(examples, sum(len(example.pairs) for example in examples), ties, dropped)


def encode_split(split: str, rankings: Sequence[Ranking], chat: ChatFormat, context: int) -> list[EncodedRanking]:
    """Encodes the rankings of a split and prints how many were kept. Raises UserError if none was."""
    examples, pairs, ties, dropped = encode_rankings(rankings, chat, context)
    parts = [f"{counted(len(examples), 'ranking')}, {counted(pairs, 'pair')}"]
    parts += [f"{counted(ties, 'pair')} dropped: tied, or equal responses"] * (ties > 0)
    parts += [f"{counted(dropped, 'ranking')} dropped: all ties, or too long"] * (dropped > 0)
    say(f"{split:<15}{'; '.join(parts)}")
    if not examples:
        raise UserError(
            f"no ranking of the {split} split fits into {context} tokens and prefers one response to another"
        )
    return examples


def preview_rankings(rankings: Sequence[Ranking], chat: ChatFormat, context: int) -> int:
    """Prints rankings as they are trained on, with the responses marked. Returns the exit code."""
    for ranking in rankings:
        encoded = encode_rankings([ranking], chat, context)
        say(ranking.place + "; dropped: all ties, or too long" * encoded.dropped)
        for example in encoded.examples:
            for rank, response in zip(ranking.ranks, example.responses):
                scored = [False] * len(example.prompt) + [True] * len(response)
                say(f"{rank:g}: {marked(example.prompt + response, scored, chat)}")
    return 0


def fitting_prompt(chat: ChatFormat, turns: Sequence[Turn], room: int) -> list[int] | None:
    """Encodes the latest turns that fit into `room` tokens. Returns None if the last turn alone is too long."""
    prompt = chat.prompt(turns)
    if len(prompt) <= room:
        return prompt
    try:
        return chat.prompt(chat.latest(turns, room))
    except UserError:
        return None


class Pairs(NamedTuple):
    """The pairs of several rankings, as indices into the concatenation of their responses."""

    better: Tensor  # (P,) int64
    worse: Tensor  # (P,) int64
    weights: Tensor  # (P,) float32, 1 / (pairs of the ranking)


def pairs_of(rankings: Sequence[EncodedRanking], device: torch.device) -> Pairs:
    first, weighted_pairs = 0, []
    for ranking in rankings:
        weighted_pairs += [(first + i, first + j, 1 / len(ranking.pairs)) for i, j in ranking.pairs]
        first += len(ranking.responses)
    better, worse, weights = zip(*weighted_pairs)
    return Pairs(*(send(x, device) for x in (better, worse, weights)))


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns tokens (N, T) int64, padded with 0, and lengths (N,)."""
    return pad_rows(sequences, device), send([len(sequence) for sequence in sequences], device)
