"""Beam search."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from gpt_arc.decoding.decoder import Decoder
from gpt_arc.errors import UserError, check_finite
from model import GPT


class Hypothesis(NamedTuple):
    """A continuation found by beam search."""

    tokens: list[int]
    log_probabilities: list[float]  # of each token, in nats
    score: float  # their sum / len(tokens)^length_penalty


def beam_search(
    model: GPT | Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> list[Hypothesis]:
    """Returns the `num_beams` best continuations, best first, found by extending the `num_beams` likeliest beginnings.

    A continuation ends with a stop token, which counts towards its length, or at max_new_tokens. Its score is the sum
    of its tokens' log-probabilities divided by length^length_penalty: 0 compares sums, 1 compares means. Positive
    values favour long continuations. Raises NotFinite for logits that aren't.
    """
    if num_beams < 1 or max_new_tokens < 1:
        raise UserError(f"num_beams = {num_beams} and max_new_tokens = {max_new_tokens} must be at least 1")
    if not 0 <= length_penalty <= 100:
        raise UserError(f"length_penalty = {length_penalty} must lie in [0, 100]")
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    stop_tokens = sorted(set(stop_tokens))
    logits = decoder.read([prompt], room=max_new_tokens)
    beams: list[tuple[list[int], list[float]]] = [([], [])]
    totals = torch.zeros(1, dtype=torch.float64)
    finished: list[Hypothesis] = []
    for length in range(1, max_new_tokens + 1):
        logs = logits.cpu().double().log_softmax(-1)  # (beams, V)
        check_finite(logs.amax(-1).tolist())
        sums = totals[:, None] + logs
        ends = stop_tokens if length < max_new_tokens else list(range(sums.size(-1)))
        scores = sums[:, ends] / length**length_penalty
        if ends:
            for score, i in zip(*(x.tolist() for x in scores.flatten().topk(min(num_beams, scores.numel())))):
                origin, token = i // len(ends), ends[i % len(ends)]
                (tokens, earlier), last = beams[origin], logs[origin, token].item()
                finished.append(Hypothesis([*tokens, token], [*earlier, last], score))
            finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:num_beams]
        if length == max_new_tokens:
            break
        sums[:, stop_tokens] = -math.inf
        totals, chosen = sums.flatten().topk(min(num_beams, sums.numel()))
        chosen = chosen[totals > -math.inf]
        totals = totals[: len(chosen)]
        # a sum can only fall, and the greatest length divides it by most
        possible = totals[0].item() / max_new_tokens**length_penalty if len(chosen) else -math.inf
        if not len(chosen) or (len(finished) == num_beams and finished[-1].score >= possible):
            break
        origins, tokens = (chosen // sums.size(-1)).tolist(), (chosen % sums.size(-1)).tolist()
        beams = [
            ([*beams[origin][0], token], [*beams[origin][1], logs[origin, token].item()])
            for origin, token in zip(origins, tokens)
        ]
        decoder.keep(origins)
        logits = decoder.step(tokens)
    return finished
