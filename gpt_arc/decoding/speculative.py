"""Speculative decoding."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import Step
from gpt_arc.decoding.probabilities import (
    draw,
    row_generators,
    sampling_probabilities,
    tokens_seen,
    with_log_probabilities,
)
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import NotFinite, UserError, check_finite
from model import GPT


@dataclass
class Acceptance:
    """Counts the draft's tokens and those that the model accepted."""

    proposed: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / self.proposed if self.proposed else math.nan


def check_draft(decoder: Decoder, drafter: Decoder) -> None:
    """Raises UserError if `drafter` can't propose tokens to `decoder`."""
    vocabularies = [d.model.config.vocab_size for d in (decoder, drafter)]
    if vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"the draft has {vocabularies[1]} tokens and the model {vocabularies[0]}: they must share a vocabulary"
        )
    if decoder.dynamic_context:
        raise UserError(
            'with rotary_scaling = "dynamic" the probability of a token depends on how many tokens are read after it: '
            "leave the draft out"
        )


def speculative(
    model: GPT | Decoder,
    draft: GPT | Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  frozen
    *,
    draft_tokens: int = 4,
    generator: torch.Generator | None = None,
    stopped: Callable[[int, int], bool] = lambda row, token: False,
    acceptance: Acceptance | None = None,
) -> Iterator[Step]:
    """`generate` for one prompt, faster: a smaller model of the same vocabulary proposes several tokens at a time.

    The model reads a proposal in one pass and accepts its tokens in turn, each with probability min(1, p / q). Instead
    of the first rejected token it draws one from max(0, p - q). So the text has exactly the distribution of `generate`
    (arXiv:2211.17192). `acceptance` is updated.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    drafter = draft if isinstance(draft, Decoder) else Decoder(draft)
    check_draft(decoder, drafter)
    if draft_tokens < 1:
        raise UserError(f"draft_tokens = {draft_tokens} must be at least 1")
    generator = row_generators(0, [0])[0] if generator is None else generator
    acceptance = Acceptance() if acceptance is None else acceptance
    for reader in (decoder, drafter):  # the last token is read with the first proposal
        before, room = prompt[-reader.model.config.block_size : -1], max_new_tokens + draft_tokens + 1
        if before:
            reader.read([before], room)
        else:
            reader.clear(1, room)
    tokens, unread, produced = list(prompt), list(prompt[-1:]), 0  # `unread`: by the draft

    def distributions(logits: Tensor, proposed: Sequence[int]) -> Tensor:
        """Next-token probabilities (N, V) for logits (N, V) after the N last prefixes of the text with the proposal."""
        if sampling.repetition_penalty == 1:
            return sampling_probabilities(sampling, logits)
        ends = range(len(proposed) + 1 - len(logits), len(proposed) + 1)
        return sampling_probabilities(
            sampling, logits, tokens_seen(sampling, [[*tokens, *proposed[:end]] for end in ends], logits)
        )

    while produced < max_new_tokens:
        # at most what fits the text and the context, so that the context slides exactly as in `generate`
        room = max(decoder.model.config.block_size - len(decoder.sequences[0]) - 1, 0)
        count = min(draft_tokens, max_new_tokens - produced - 1, room)
        proposal: list[int] = []
        q = []
        for _ in range(count):
            q.append(distributions(drafter.extend([unread])[:, -1], proposal)[0])
            unread = draw(q[-1][None], [generator]).tolist()
            proposal += unread
        logits = decoder.extend([[tokens[-1], *proposal]])[0]  # (count + 1, V)
        p = distributions(logits, proposal)
        accepted = 0
        if proposal:
            index = torch.tensor(proposal)[:, None].to(p.device)
            ratios = (p[:count].gather(1, index) / torch.stack(q).gather(1, index))[:, 0].tolist()
            if any(map(math.isnan, ratios)):  # q is never 0, but p / q may overflow
                check_finite(p.sum(-1).tolist())
                raise NotFinite("its draft computes numbers that are not finite: name another --draft")
            while accepted < count and torch.rand((), generator=generator) < ratios[accepted]:
                accepted += 1
        acceptance.proposed += count
        acceptance.accepted += accepted
        residual = p[accepted]
        if accepted < count:
            residual = (p[accepted] - q[accepted]).clamp(min=0)
            residual = residual if residual.sum() > 0 else p[accepted]
        new = [*proposal[:accepted], *draw(residual[None], [generator]).tolist()]
        decoder.rewind([count - accepted])
        if proposal:  # the draft has read all of it except the last token
            drafter.rewind([max(count - 1 - accepted, 0)])
            unread = new[-1 if accepted < count else -2 :]
        else:
            unread = unread + new
        unread = unread[-drafter.model.config.block_size :]
        for token, log_probability in zip(*with_log_probabilities(logits[: len(new)], torch.tensor(new))):
            yield Step([0], [token], [log_probability])
            produced += 1
            if stopped(0, token):
                return
        tokens += new
