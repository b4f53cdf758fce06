"""From logits to tokens: filtered distributions, and three ways to go on with them, each on a `Decoder`.

`generate` draws for many rows at once, `speculative` draws from the same distribution with the help of a smaller model,
`beam_search` looks for the likeliest continuation. The first two yield tokens as they are made.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt_arc.decoder import Decoder
from gpt_arc.errors import UserError
from gpt_arc.sampling import Sampling
from model import GPT


def sampling_probabilities(sampling: Sampling, logits: Tensor, seen: Tensor | None = None) -> Tensor:
    """The distribution to draw from, (..., V) float32; `seen` (..., V) says which tokens were there before."""
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return filtered_probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


def tokens_seen(sampling: Sampling, sequences: Sequence[Sequence[int]], logits: Tensor) -> Tensor | None:
    """Which tokens occur in each sequence, (B, V) like the logits; None where no setting asks."""
    if sampling.repetition_penalty == 1:
        return None
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    for row, sequence in enumerate(sequences):
        seen[row, list(sequence)] = True
    return seen


def filtered_probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Softmax after temperature, then top-k, top-p and min-p, each as `Sampling` says: (..., V) float32."""
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if top_k is not None:  # temperature keeps the order, so it may as well come after
        smallest = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    temperature = max(temperature, 1e-37)  # float32 takes a divisor below this for 0
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0, however low the temperature
    probabilities = logits.softmax(-1)
    if top_p is not None:
        size = probabilities.size(-1)
        ordered, order = probabilities.topk(min(size, 1024), dim=-1)
        if (ordered.sum(-1) < top_p).any():  # seldom: so that the whole vocabulary need not be sorted each time
            ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # those more likely reach p already
        beyond[..., 0] = False
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered.masked_fill(beyond, 0.0))
    if min_p is not None:
        least = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def row_generators(seed: int, rows: Iterable[int]) -> list[torch.Generator]:
    """A generator for each row number, so that what a row draws depends on no other row."""
    states = (np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)[0] for row in rows)
    return [torch.Generator().manual_seed(int(state) >> 1) for state in states]


def draw(probabilities: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """A token for each row of probabilities (B, V), by one uniform number from each row's own generator."""
    uniform = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    probabilities = probabilities.cpu() if probabilities.device.type == "mps" else probabilities  # it has no float64
    cumulative = probabilities.double().cumsum(-1)
    reached = cumulative[:, -1:] * uniform.to(cumulative)
    return torch.searchsorted(cumulative, reached, right=True)[:, 0].clamp(max=probabilities.size(-1) - 1).tolist()


class Step(NamedTuple):
    """What one step of decoding made: for each row that still goes on, its next token."""

    rows: list[int]
    tokens: list[int]
    log_probabilities: list[float]  # of the tokens, by the model itself: before temperature and filters, in nats


def _log_probabilities(logits: Tensor, tokens: list[int]) -> list[float]:
    index = torch.tensor(tokens, device=logits.device)[:, None]
    return (logits.gather(-1, index) - logits.logsumexp(-1, keepdim=True))[:, 0].tolist()


def generate(
    model: GPT | Decoder,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  frozen
    *,
    generators: Sequence[torch.Generator] | None = None,
    stopped: Callable[[int, int], bool] = lambda row, token: False,
) -> Iterator[Step]:
    """Continue each prompt, yielding every step as it is made; for several samples name a prompt several times.

    Prompts may differ in length: each row gets what it would get alone. Equal ones are read once. Each row draws
    from its own of `generators`, by default `row_generators` of seed 0. A row ends after max_new_tokens, or with the
    first token for which `stopped(row, token)` is true, and then costs nothing more. Beyond the context see `Decoder`.
    The model should be in eval mode.
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
        logits = logits[origins]
    seen = tokens_seen(sampling, prompts, logits)
    for length in range(1, max_new_tokens + 1):
        probabilities = sampling_probabilities(sampling, logits, seen)
        tokens = draw(probabilities, [generators[row] for row in rows])
        yield Step(rows, tokens, _log_probabilities(logits, tokens))
        going = [i for i, (row, token) in enumerate(zip(rows, tokens)) if not stopped(row, token)]
        if not going or length == max_new_tokens:
            return
        if seen is not None:
            seen[list(range(len(rows))), tokens] = True
        if len(going) < len(rows):
            decoder.keep(going)
            rows, tokens = [rows[i] for i in going], [tokens[i] for i in going]
            seen = None if seen is None else seen[going]
        logits = decoder.step(tokens)


@dataclass
class Acceptance:
    """How many of the draft's tokens the model has taken."""

    proposed: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        return self.accepted / self.proposed if self.proposed else math.nan


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
    """`generate` for one prompt, whose tokens a smaller model of the same vocabulary proposes, several at a time.

    The model reads a proposal in one pass and accepts its tokens one after the other with probability min(1, p / q);
    the first that it doesn't accept it draws anew from max(0, p - q). So the text has exactly the distribution that
    `generate` draws from (arXiv:2211.17192). `acceptance` is counted on.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    drafter = draft if isinstance(draft, Decoder) else Decoder(draft)
    vocabularies = [d.model.config.vocab_size for d in (decoder, drafter)]
    if vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"the draft has {vocabularies[1]} tokens and the model {vocabularies[0]}: they must be the same"
        )
    if draft_tokens < 1:
        raise UserError(f"draft_tokens = {draft_tokens} must be at least 1")
    generator = row_generators(0, [0])[0] if generator is None else generator
    acceptance = Acceptance() if acceptance is None else acceptance
    for reader in (decoder, drafter):  # neither has read the last token yet
        before, room = prompt[-reader.model.config.block_size : -1], max_new_tokens + draft_tokens + 1
        if before:
            reader.read([before], room)
        else:
            reader.clear(1, room)
    tokens, unread, made = list(prompt), list(prompt[-1:]), 0  # `unread` by the draft

    def distributions(logits: Tensor, proposed: Sequence[int]) -> Tensor:
        """Those after the last `len(logits)` beginnings of the text with what is proposed, (len(logits), V)."""
        if sampling.repetition_penalty == 1:
            return sampling_probabilities(sampling, logits)
        ends = range(len(proposed) + 1 - len(logits), len(proposed) + 1)
        return sampling_probabilities(
            sampling, logits, tokens_seen(sampling, [[*tokens, *proposed[:end]] for end in ends], logits)
        )

    while made < max_new_tokens:
        # no more than fit the rest of the text and of the context, which then slides just as in `generate`
        room = max(decoder.model.config.block_size - len(decoder.sequences[0]) - 1, 0)
        count = min(draft_tokens, max_new_tokens - made - 1, room)
        proposal: list[int] = []
        q = []
        for _ in range(count):
            q.append(distributions(drafter.extend([unread])[:, -1], proposal)[0])
            unread = draw(q[-1][None], [generator])
            proposal += unread
        logits = decoder.extend([[tokens[-1], *proposal]])[0]  # (count + 1, V)
        p = distributions(logits, proposal)
        accepted = 0
        if proposal:
            index = torch.tensor(proposal)[:, None].to(p.device)
            ratios = (p[:count].gather(1, index) / torch.stack(q).gather(1, index))[:, 0].tolist()
            while accepted < count and torch.rand((), generator=generator) < ratios[accepted]:
                accepted += 1
        acceptance.proposed += count
        acceptance.accepted += accepted
        rest = p[accepted]
        if accepted < count:
            rest = (p[accepted] - q[accepted]).clamp(min=0)
            rest = rest if rest.sum() > 0 else p[accepted]
        new = [*proposal[:accepted], *draw(rest[None], [generator])]
        decoder.rewind([count - accepted])
        if proposal:  # of which the draft has read all but the last
            drafter.rewind([max(count - 1 - accepted, 0)])
            unread = new[-1 if accepted < count else -2 :]
        else:
            unread = unread + new
        unread = unread[-drafter.model.config.block_size :]
        for token, log_probability in zip(new, _log_probabilities(logits[: len(new)], new)):
            yield Step([0], [token], [log_probability])
            made += 1
            if stopped(0, token):
                return
        tokens += new


class Hypothesis(NamedTuple):
    """A continuation that beam search found."""

    tokens: list[int]
    log_probabilities: list[float]  # of its tokens, in nats
    score: float  # their sum / len(tokens)^length_penalty


def beam_search(
    model: GPT | Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> list[Hypothesis]:
    """The `num_beams` best continuations found by following the `num_beams` likeliest beginnings, the best first.

    A continuation ends with a stop token, which counts for its length, or at max_new_tokens. Its score is the sum of
    its tokens' log-probabilities over length^length_penalty, so 0 compares sums and 1 means; positive values favour
    long ones.
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
        sums = totals[:, None] + logs
        ends = stop_tokens if length < max_new_tokens else list(range(sums.size(-1)))
        scores = sums[:, ends] / length**length_penalty
        if ends:
            for score, i in zip(*(x.tolist() for x in scores.flatten().topk(min(num_beams, scores.numel())))):
                origin, token = i // len(ends), ends[i % len(ends)]
                (tokens, own), last = beams[origin], logs[origin, token].item()
                finished.append(Hypothesis([*tokens, token], [*own, last], score))
            finished = sorted(finished, key=lambda found: -found.score)[:num_beams]
        if length == max_new_tokens:
            break
        sums[:, stop_tokens] = -math.inf
        totals, chosen = sums.flatten().topk(min(num_beams, sums.numel()))
        chosen = chosen[totals > -math.inf]
        totals = totals[: len(chosen)]
        # a sum only falls from here, and no length divides it by more than the greatest
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
