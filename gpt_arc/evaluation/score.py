"""Log-probabilities of continuations, the basis of perplexity, multiple choice and cloze tasks.

    scores = score_continuations(model.eval(), [Request(context, continuation), ...])
    scores = score_continuations(model.eval(), rolling_windows(tokens, prefix, 1024, 512))    # a text of any length

Requests with equal contexts share one pass over the context, whose keys and values serve all continuations. A batch
holds sequences of similar length, so that little of it is padding, and logits are computed only for scored tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, starmap, takewhile
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from gpt_arc.data.batches import pad_rows
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.cache import BlockCache, empty_cache
from gpt_arc.device import autocast, send
from gpt_arc.errors import UserError, check_finite
from gpt_arc.nn.attention import KVCache
from gpt_arc.nn.head_loss import logits_at_once
from model import GPT

FULL_SPEED = 256  # rows at which a CPU multiplies at nine tenths of its best rate; a larger batch may end early
Item = TypeVar("Item")


class Request(NamedTuple):
    """A `continuation` to score after a `context`; both are token ids and neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    log_probability: float  # in nats, summed over the continuation's tokens
    is_greedy: bool  # whether each token is the likeliest; the first of equals wins
    tokens: int


class Group(NamedTuple):
    """A context and its continuations, each with the number of its request."""

    context: tuple[int, ...]
    continuations: list[tuple[int, Sequence[int]]]

    @property
    def length(self) -> int:
        """Length of the longest input, which doesn't include a continuation's last token."""
        return len(self.context) + max(len(tokens) for _, tokens in self.continuations) - 1

    @property
    def worth_sharing(self) -> bool:
        """Whether reading the context once saves more than the second pass, for the continuations, costs."""
        after = sum(len(tokens) - 1 for _, tokens in self.continuations)
        return len(self.context) + after < 0.9 * (len(self.context) * len(self.continuations) + after)


class ScoredRow(NamedTuple):
    """A continuation of one of several contexts."""

    context: int  # index of the context
    number: int  # of the request
    tokens: Sequence[int]


class Branches(NamedTuple):
    """A block's `KVCache` for rows that continue shared contexts; a context is copied only when the block runs."""

    keys: Tensor  # (G, K, S, D) of the contexts, with room for the continuations
    values: Tensor  # (G, K, S, D)
    positions: Tensor  # (R, T) slots of the tokens being read
    contexts: Tensor  # (R,) the context of each row

    def add(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return KVCache(self.keys[self.contexts], self.values[self.contexts], self.positions).add(key, value)


def truncated(request: Request, block_size: int) -> tuple[int, ...]:
    """Returns the end of a request's context that fits into the model's context with the continuation.

    The continuation's last token isn't an input, so block_size + 1 tokens are kept in all. Raises ValueError if the
    continuation alone is longer than block_size, or either is empty.
    """
    if not len(request.context) or not len(request.continuation):
        raise ValueError("a request needs at least one token of context and one of continuation")
    if len(request.continuation) > block_size:
        raise ValueError(f"a continuation of {len(request.continuation)} tokens exceeds the context of {block_size}")
    return tuple(request.context[-(block_size + 1 - len(request.continuation)) :])


class Encoded(NamedTuple):
    requests: list[Request]
    merged: int  # requests whose continuation begins within the context, see `encode_pairs`


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], block_size: int, places: Sequence[str] | None = None
) -> Encoded:
    """Encodes contexts and continuations, each pair as one text, whose tokens are split where the context ends.

    As in EleutherAI's lm-evaluation-harness, white space at the context's end moves to the continuation, since most
    tokenizers put it into the first token there, and an empty context becomes the tokenizer's start_token.

    The tokens of the context alone needn't be the first tokens of the text: " wor" and "ld peace" are " world" and
    " peace". Then the harness scores " peace" alone, after " wor". Here the continuation begins with the first token
    that differs, and so it does for all pairs with that context: each is scored by the probability of one piece of
    text, the end of the context with the continuation.

    `places` name the pairs in messages. Raises UserError for a continuation that can't be encoded, adds no token or is
    longer than the model's context, `block_size`.
    """
    places = places or [f"text {number} of {len(pairs)}" for number in range(1, len(pairs) + 1)]
    contexts: dict[str, list[int]] = {}
    kept: dict[str, int] = {}  # tokens of each context that all its pairs begin with
    texts: list[tuple[str, list[int]]] = []
    for place, (context, continuation) in zip(places, pairs):
        stripped = context.rstrip()
        try:
            if stripped not in contexts:
                contexts[stripped] = tokenizer.encode(stripped)
            tokens = tokenizer.encode(context + continuation)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        texts.append((stripped, tokens))
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(contexts[stripped], tokens)))
        kept[stripped] = min(common, kept.get(stripped, common))
    requests = []
    for place, (context, tokens) in zip(places, texts):
        start = kept[context]
        if (size := len(tokens) - start) == 0:
            raise UserError(f"{place}: the answer or option adds no token to its context")
        if size > block_size:
            raise UserError(f"{place}: a continuation of {size} tokens exceeds the context of {block_size}")
        before = [*tokenizer.declared.prefix, *tokens[:start]] or [tokenizer.start_token]
        requests.append(Request(before, tokens[start:]))
    return Encoded(requests, sum(kept[context] < len(contexts[context]) for context, _ in texts))


def rolling_windows(
    tokens: Sequence[int], prefix: int, block_size: int, stride: int | None = None
) -> Iterator[Request]:
    """Yields requests that score each token of a text once, the first after the token `prefix`.

    The first window scores block_size tokens; each later one scores the next `stride` (None: block_size) tokens. Its
    input is the block_size tokens before its last one. With stride = block_size these are the windows of EleutherAI's
    lm-evaluation-harness.
    """
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride = {stride} must lie between 1 and the context, {block_size}")
    if len(tokens):
        yield Request([prefix], tokens[:block_size])
    for start in range(block_size, len(tokens), stride):
        end = min(start + stride, len(tokens))
        yield Request(tokens[end - block_size - 1 : start], tokens[start:end])


@torch.inference_mode()
def score_continuations(
    model: GPT,
    requests: Iterable[Request],
    batch_tokens: int = 8192,
    dtype: str = "float32",
    progress: str | None = None,
) -> list[Score]:
    """Returns the scores of the requests, in order, by `model` in eval mode.

    `batch_tokens` bounds the tokens of a batch, padding included and a shared context counted for each continuation; a
    longer sequence is a batch by itself. `dtype` is the type of matrix products. A context that is too long is cut at
    the start, see `truncated`. Raises NotFinite for a log-probability that isn't.
    """
    by_context: dict[tuple[int, ...], list[tuple[int, Sequence[int]]]] = defaultdict(list)
    count = 0
    for number, request in enumerate(requests):
        by_context[truncated(request, model.config.block_size)].append((number, request.continuation))
        count += 1
    shared, alone = [], []
    dynamic = model.config.rotary_scaling == "dynamic"  # a context's keys and values depend on what follows it
    for group in starmap(Group, by_context.items()):
        if group.worth_sharing and not dynamic:
            shared.append(group)
        else:
            alone += [Group(group.context, [item]) for item in group.continuations]
    scores: dict[int, Score] = {}
    bar = tqdm(total=count, desc=progress, unit="request", leave=False, disable=None if progress else True)
    numbered = chain(_score_alone(model, alone, batch_tokens), _score_shared(model, shared, batch_tokens))
    with autocast(_device(model), dtype):
        for number, score in numbered:
            scores[number] = score
            bar.update()
    bar.close()
    return [scores[number] for number in range(count)]


def _device(model: GPT) -> torch.device:
    return model.token_embedding.weight.device


def _batches(
    items: Sequence[Item], length: Callable[[Item], int], batch_tokens: int, device: torch.device, before: int = 0
) -> Iterator[list[Item]]:
    """Yields batches of items, the longest first; an item has `length` tokens after `before` cached ones.

    A batch has at most `batch_tokens` tokens when padded to its longest. On a CPU a large enough batch also ends before
    an item that would be padded by more than an eighth; on a GPU a second pass costs more than the padding.
    """
    batch: list[Item] = []
    for item in sorted(items, key=length, reverse=True):
        if batch:
            size, longest = len(batch), length(batch[0])
            full = (size + 1) * (before + longest) > batch_tokens
            uneven = device.type == "cpu" and size * longest >= FULL_SPEED and 8 * length(item) < 7 * longest
            if full or uneven:
                yield batch
                batch = []
        batch.append(item)
    if batch:
        yield batch


def _score_alone(model: GPT, groups: Sequence[Group], batch_tokens: int) -> Iterator[tuple[int, Score]]:
    """Scores each context with its only continuation, in one pass and without masks."""
    device = _device(model)
    for batch in _batches(groups, lambda group: group.length, batch_tokens, device):
        rows = [ScoredRow(g, *group.continuations[0]) for g, group in enumerate(batch)]
        sequences = [[*group.context, *row.tokens[:-1]] for group, row in zip(batch, rows)]
        lengths = send([len(tokens) for tokens in sequences], device)
        padded = lengths if model.config.rotary_scaling == "dynamic" else None
        hidden = model.hidden(pad_rows(sequences, device), lengths=padded)
        ends = [len(group.context) - 1 for group in batch]
        yield from _scored(model, rows, [h[end : end + len(row.tokens)] for h, end, row in zip(hidden, ends, rows)])


def _score_shared(model: GPT, groups: Sequence[Group], batch_tokens: int) -> Iterator[tuple[int, Score]]:
    """Reads each context once, then scores its continuations from its keys and values."""
    device = _device(model)
    for batch in _batches(groups, lambda group: group.length, batch_tokens, device):
        rows = [ScoredRow(g, *item) for g, group in enumerate(batch) for item in group.continuations]
        longest = max(len(row.tokens) for row in rows) - 1  # input tokens of a continuation
        contexts = pad_rows([group.context for group in batch], device)
        slots = contexts.size(1) + longest if longest else 0  # without a second token nothing is cached
        cache = empty_cache(model, len(batch), slots, _cache_dtype(model)) if slots else []
        hidden = model.hidden(contexts, cache=[part.view(len(batch), slots, None) for part in cache] or None)
        ends = send([len(group.context) - 1 for group in batch], device)
        each = torch.arange(len(batch), device=device)
        back = torch.arange(model.config.ngrams - 1, -1, -1, device=device)
        tails = contexts.gather(1, (ends[:, None] - back).clamp(min=0))
        states = hidden[each, ends]
        for part in _batches(rows, lambda row: len(row.tokens) - 1, batch_tokens, device, before=contexts.size(1)):
            owners = send([row.context for row in part], device)
            row_states = states[owners].split(1)  # (1, C) each: these predict the first tokens
            if len(part[0].tokens) > 1:
                later = _read_on(model, cache, contexts.size(1), part, owners, tails[owners], ends[owners])
                row_states = [
                    torch.cat((first, more[: len(row.tokens) - 1])) for first, more, row in zip(row_states, later, part)
                ]
            yield from _scored(model, part, row_states)


def _read_on(
    model: GPT,
    cache: Sequence[BlockCache],
    used: int,
    rows: Sequence[ScoredRow],
    owners: Tensor,
    tails: Tensor,
    ends: Tensor,
) -> Tensor:
    """Returns hidden states (R, T, C) of the rows' continuations, the longest first, without their last tokens.

    `cache` holds `used` tokens of each context, padding included. For each row, `owners` (R,) is the index of its
    context there, `tails` (R, ngrams) that context's last tokens, and `ends` (R,) the position of the very last.
    """
    longest, device = len(rows[0].tokens) - 1, owners.device
    sequences = torch.cat((tails, pad_rows([row.tokens for row in rows], device)), dim=1)
    # a shorter row repeats its last token, which writes the same keys and values to the same slot
    sizes = send([len(row.tokens) for row in rows], device)
    steps = torch.arange(1, longest + 1, device=device).minimum(sizes[:, None] - 1)  # (R, T)
    slots, positions = slice(used + longest), ends[:, None] + steps
    branches = [Branches(c.keys[:, :, slots], c.values[:, :, slots], positions, owners) for c in cache]
    columns, offsets = steps + tails.size(1) - 1, range(1, model.config.ngrams)
    previous = torch.stack([sequences.gather(1, columns - k) for k in offsets], dim=-1) if offsets else None
    tokens = sequences.gather(1, columns)
    return model.hidden(tokens, cache=branches, previous=previous)  # type: ignore  they stand in for a `KVCache`


def _cache_dtype(model: GPT) -> torch.dtype:
    """The type in which the model computes keys and values."""
    weight = model.token_embedding.weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _scored(model: GPT, rows: Sequence[ScoredRow], hidden: Sequence[Tensor]) -> Iterator[tuple[int, Score]]:
    """Yields the score of each row, from the hidden states (tokens, C) that predict its tokens."""
    joined = torch.cat(list(hidden))
    targets = send([token for row in rows for token in row.tokens], joined.device)
    at_once = max(logits_at_once(joined.device.type) // model.config.vocab_size, 1)
    logs, greedy = [], []
    for states, tokens in zip(joined.split(at_once), targets.split(at_once)):
        logits = model.logits(states).float()
        logs.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == tokens)
    sizes = [len(row.tokens) for row in rows]
    for row, log, right in zip(rows, torch.cat(logs).cpu().double().split(sizes), torch.cat(greedy).cpu().split(sizes)):
        total = log.sum().item()
        check_finite([total])
        yield row.number, Score(total, bool(right.all()), len(log))
