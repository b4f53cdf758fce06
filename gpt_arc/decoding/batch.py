"""Continuous batching: continuations join and leave a running batch between any two of its steps.

    batch = Batch(decoder)
    for request, token in batch.step(joining=[first, second]): ...
    for request, token in batch.step(joining=[third], leaving=[first]): ...

A continuation has the tokens that `generate` gives it alone: it draws from its own generator, and no row affects
another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.probabilities import draw, sampling_probabilities, tokens_seen, with_log_probabilities
from gpt_arc.decoding.settings import Sampling
from gpt_arc.device import send


@dataclass(eq=False)
class LiveRequest:
    """A continuation to compute."""

    prompt: Sequence[int]
    sampling: Sampling
    generator: torch.Generator
    alternatives: int = 0  # the most likely tokens to report at each step
    images: Tensor | None = field(default=None, repr=False)  # (N, C) embeddings that its tokens below 0 stand for
    seen: Tensor | None = field(default=None, repr=False)  # (V,) the tokens that occurred, if sampling needs them
    first_image: int = 0  # row of its first embedding among those of all requests


class Token(NamedTuple):
    """The next token of a continuation. Log-probabilities are before temperature and filters, in nats."""

    id: int
    log_probability: float
    alternatives: list[tuple[int, float]]  # ids and log-probabilities of the most likely tokens, in order


class LiveBatch:
    """The continuations that a decoder computes together."""

    def __init__(self, decoder: Decoder, rows: int = 1):
        """Reserves space for `rows` continuations, growing as needed."""
        self.decoder = decoder
        self.requests: list[LiveRequest] = []  # one for each row
        self._tokens: list[int] = []  # the latest token of each, which the decoder hasn't read
        decoder.clear(rows, 1)
        decoder.keep([])

    def step(
        self, joining: Sequence[LiveRequest] = (), leaving: Sequence[LiveRequest] = ()
    ) -> list[tuple[LiveRequest, Token]]:
        """Returns the next token of every continuation, after some have left and others have joined.

        Raises NotFinite. After an error the batch is of no further use.
        """
        self._remove(leaving)
        logits = [self.decoder.step(self._tokens)] if self.requests else []
        logits += [self._read(joining)] if joining else []
        self.requests += joining
        if not self.requests:
            return []
        tokens = self._next(torch.cat(logits))
        self._tokens = [token.id for token in tokens]
        return list(zip(self.requests, tokens))

    def _remove(self, leaving: Sequence[LiveRequest]) -> None:
        """Drops rows. The last ones move into their places, so few keys and values are copied."""
        kept = [row for row, request in enumerate(self.requests) if request not in leaving]
        if len(kept) == len(self.requests):
            return
        stays = {row for row in kept if row < len(kept)}
        moved = iter(row for row in kept if row >= len(kept))
        rows = [row if row in stays else next(moved) for row in range(len(kept))]
        self.decoder.keep(rows)
        self.requests = [self.requests[row] for row in rows]
        self._tokens = [self._tokens[row] for row in rows]

    def _read(self, joining: Sequence[LiveRequest]) -> Tensor:
        """Reads prompts, equal ones once. Returns their logits (B, V)."""
        self._lay_out_images(joining)
        prompts = [tuple(_moved(request.prompt, request.first_image)) for request in joining]
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        logits = self.decoder.add(list(places))
        origins = [places[prompt] for prompt in prompts]
        if len(places) < len(joining):
            present = len(self.requests)
            self.decoder.keep([*range(present), *(present + origin for origin in origins)])
            logits = logits[send(origins, logits.device)]
        for request, row in zip(joining, logits):
            seen = tokens_seen(request.sampling, [request.prompt], row[None])
            request.seen = None if seen is None else seen[0]
        return logits

    def _lay_out_images(self, joining: Sequence[LiveRequest]) -> None:
        """Gives the decoder the images of all requests, one after another, without those of requests that have left."""
        requests = [*self.requests, *joining]
        tables = {id(request.images): request.images for request in requests if request.images is not None}
        firsts = dict(zip(tables, accumulate(map(len, tables.values()), initial=0)))
        for request, sequence in zip(self.requests, self.decoder.sequences):
            if request.images is not None:
                sequence[:] = _moved(sequence, firsts[id(request.images)] - request.first_image)
        for request in requests:
            request.first_image = firsts.get(id(request.images), 0)
        self.decoder.images = torch.cat(list(tables.values())) if tables else None

    def _next(self, logits: Tensor) -> list[Token]:
        """Draws a token for each row of logits (B, V); rows of equal sampling together."""
        alike: dict[Sampling, list[int]] = {}
        for row, request in enumerate(self.requests):
            alike.setdefault(request.sampling, []).append(row)
        drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for sampling, rows in alike.items():
            requests, places = [self.requests[row] for row in rows], send(rows, logits.device)
            seen = [request.seen for request in requests if request.seen is not None]
            probabilities = sampling_probabilities(sampling, logits[places], torch.stack(seen) if seen else None)
            drawn[places] = draw(probabilities, [request.generator for request in requests]).to(drawn.device)
        ids, log_probabilities = with_log_probabilities(logits, drawn)
        for request, id in zip(self.requests, ids):
            if request.seen is not None:
                request.seen[id] = True
        return [Token(*values) for values in zip(ids, log_probabilities, self._alternatives(logits))]

    def _alternatives(self, logits: Tensor) -> list[list[tuple[int, float]]]:
        """Returns the most likely tokens of each row, up to the number that its request wants."""
        counts = [min(request.alternatives, logits.size(-1)) for request in self.requests]
        if not any(counts):
            return [[] for _ in counts]
        best, ids = logits.log_softmax(-1).topk(max(counts), dim=-1)
        return [list(zip(row, logs))[:count] for row, logs, count in zip(ids.tolist(), best.tolist(), counts)]


def _moved(tokens: Sequence[int], rows: int) -> list[int]:
    """Returns tokens in which those of images, -1 - i, stand for an embedding that comes `rows` later."""
    return [token - rows if token < 0 else token for token in tokens]
