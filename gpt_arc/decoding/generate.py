"""Sampling for many rows at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.probabilities import (
    draw,
    row_generators,
    sampling_probabilities,
    tokens_seen,
    with_log_probabilities,
)
from gpt_arc.decoding.settings import Sampling
from gpt_arc.device import send
from model import GPT


class Step(NamedTuple):
    """The result of one decoding step: the next token of each unfinished row."""

    rows: list[int]
    tokens: list[int]
    log_probabilities: list[float]  # of the tokens, before temperature and filters, in nats


def generate(
    model: GPT | Decoder,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  frozen
    *,
    generators: Sequence[torch.Generator] | None = None,
    stopped: Callable[[int, int], bool] = lambda row, token: False,
) -> Iterator[Step]:
    """Continues each prompt, yielding steps as they are computed; repeat a prompt for several samples of it.

    Prompts may differ in length; no row affects another. Equal prompts are read once. Row i draws from generators[i],
    by default from `row_generators` with seed 0. A row ends after max_new_tokens or with the first token for which
    `stopped(row, token)` is true, and then costs nothing more. `Decoder` describes texts longer than the context. The
    model should be in eval mode.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    prompts = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    rows = list(range(len(prompts)))
    generators = row_generators(0, rows) if generators is None else generators
    if max_new_tokens < 1:
        return
    distinct = {tuple(prompt): None for prompt in prompts}
    logits = decoder.read(list(distinct), room=max_new_tokens)
    if len(distinct) < len(prompts):
        place = {prompt: i for i, prompt in enumerate(distinct)}
        origins = [place[tuple(prompt)] for prompt in prompts]
        decoder.keep(origins)
        logits = logits[send(origins, logits.device)]
    seen = tokens_seen(sampling, prompts, logits)
    for length in range(1, max_new_tokens + 1):
        probabilities = sampling_probabilities(sampling, logits, seen)
        drawn = draw(probabilities, [generators[row] for row in rows])
        tokens, log_probabilities = with_log_probabilities(logits, drawn)
        yield Step(rows, tokens, log_probabilities)
        unfinished = [i for i, (row, token) in enumerate(zip(rows, tokens)) if not stopped(row, token)]
        if not unfinished or length == max_new_tokens:
            return
        if seen is not None:
            seen.scatter_(1, drawn.to(seen.device)[:, None], True)
        if len(unfinished) < len(rows):
            decoder.keep(unfinished)
            rows, tokens = [rows[i] for i in unfinished], [tokens[i] for i in unfinished]
            seen = None if seen is None else seen[send(unfinished, seen.device)]
        logits = decoder.step(tokens)
