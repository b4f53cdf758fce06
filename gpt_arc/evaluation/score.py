"""Log-probabilities of continuations: what perplexity, multiple choice and cloze tasks rest on.

    scores = score_continuations(model.eval(), [Request(context, continuation), ...])
    scores = score_continuations(model.eval(), rolling_windows(tokens, prefix, 1024, 512))    # a text of any length

Requests of equal context read it once: its keys and values serve all of their continuations. What is read together is
of like length, so that little of it is padding, and logits are computed only of what is scored.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, starmap
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from gpt_arc.data.batches import pad_rows
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.cache import BlockCache, empty_cache
from gpt_arc.device import autocast
from gpt_arc.nn.attention import KVCache
from gpt_arc.nn.head_loss import logits_at_once
from model import GPT

FULL_SPEED = 256  # rows of a product that a CPU computes at nine tenths of its best rate: more may wait for like length
Item = TypeVar("Item")


class Request(NamedTuple):
    """Score `continuation` after `context`, both token ids and neither empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    log_probability: float  # of the whole continuation, in nats: the sum over its tokens
    is_greedy: bool  # whether each of its tokens is the likeliest, the first of equals counting
    tokens: int


class Group(NamedTuple):
    """A context, and the continuations that are asked of it, each with the number of its request."""

    context: tuple[int, ...]
    continuations: list[tuple[int, Sequence[int]]]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that is read: the last token of a continuation isn't."""
        return len(self.context) + max(len(tokens) for _, tokens in self.continuations) - 1

    @property
    def worth_sharing(self) -> bool:
        """Whether reading the context once saves more than a second pass for the continuations costs."""
        own = sum(len(tokens) - 1 for _, tokens in self.continuations)
        return len(self.context) + own < 0.9 * (len(self.context) * len(self.continuations) + own)


class Row(NamedTuple):
    """A continuation that is read after one of several contexts."""

    context: int  # its place among them
    number: int  # of the request
    tokens: Sequence[int]


class Branches(NamedTuple):
    """A block's `KVCache` of rows that go on from contexts, several from each; copied when it is the block's turn."""

    keys: Tensor  # (G, K, S, D) of the contexts, with room for what follows
    values: Tensor  # (G, K, S, D)
    positions: Tensor  # (R, T) slots of the tokens now being read
    contexts: Tensor  # (R,) the context of each row

    def add(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return KVCache(self.keys[self.contexts], self.values[self.contexts], self.positions).add(key, value)


def truncated(request: Request, block_size: int) -> tuple[int, ...]:
    """The end of a request's context that goes before its continuation: as much as the model can read with it.

    The continuation's last token isn't read, so that block_size + 1 tokens are kept in all. Raises ValueError where the
    continuation alone is longer than block_size, or something is empty.
    """
    if not len(request.context) or not len(request.continuation):
        raise ValueError("a request needs a token of context and one of continuation at least")
    if len(request.continuation) > block_size:
        raise ValueError(f"a continuation of {len(request.continuation)} tokens exceeds the context of {block_size}")
    return tuple(request.context[-(block_size + 1 - len(request.continuation)) :])


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it, cut where the tokens of the whole are those of the context.

    White space at the context's end belongs to the continuation, whose first token has it in most tokenizers, and an
    empty context is the tokenizer's start_token: as in EleutherAI's lm-evaluation-harness. Raises UserError.
    """
    end = len(context.rstrip())
    context, continuation = context[:end], context[end:] + continuation
    before = tokenizer.encode(context)
    after = tokenizer.encode(context + continuation)[len(before) :]
    return before or [tokenizer.start_token], after


def rolling_windows(
    tokens: Sequence[int], prefix: int, block_size: int, stride: int | None = None
) -> Iterator[Request]:
    """Requests that score each token of a text once, the first one after the token `prefix`.

    The first window scores block_size tokens, each further one the next `stride` (None: block_size) with the block_size
    - stride tokens before them and more as context: always the block_size tokens up to the last one scored. With
    stride = block_size these are the windows of EleutherAI's lm-evaluation-harness.
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
    """The score of each request, in their order, by `model` in eval mode.

    `batch_tokens` bounds what is read at once, a context counted with each continuation and padding included, where a
    single sequence isn't longer; `dtype` is that of matrix products. A context too long to be read with its
    continuation loses its beginning, see `truncated`.
    """
    by_context: dict[tuple[int, ...], list[tuple[int, Sequence[int]]]] = defaultdict(list)
    count = 0
    for number, request in enumerate(requests):
        by_context[truncated(request, model.config.block_size)].append((number, request.continuation))
        count += 1
    shared, alone = [], []
    for group in starmap(Group, by_context.items()):
        if group.worth_sharing:
            shared.append(group)
        else:
            alone += [Group(group.context, [item]) for item in group.continuations]
    scores: list[Score | None] = [None] * count
    bar = tqdm(total=count, desc=progress, unit="request", leave=False, disable=None if progress else True)
    found = chain(_score_alone(model, alone, batch_tokens), _score_shared(model, shared, batch_tokens))
    with autocast(_device(model), dtype):
        for number, score in found:
            scores[number] = score
            bar.update()
    bar.close()
    return scores


def _device(model: GPT) -> torch.device:
    return model.token_embedding.weight.device


def _batches(
    items: Sequence[Item], length: Callable[[Item], int], batch_tokens: int, device: torch.device, before: int = 0
) -> Iterator[list[Item]]:
    """Items in batches, the longest first, of which `length` tokens are read and `before` were read of each before.

    Padded to the longest, they come to `batch_tokens` at most. On a CPU a batch ends where an eighth of the next item
    would be padding, if it is large enough; what a GPU reads at once costs it less than reading twice.
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
    """Read each context with its only continuation, in one pass and without masks."""
    device = _device(model)
    for batch in _batches(groups, lambda group: group.length, batch_tokens, device):
        rows = [Row(g, *group.continuations[0]) for g, group in enumerate(batch)]
        hidden = model.hidden(pad_rows([[*group.context, *row.tokens[:-1]] for group, row in zip(batch, rows)], device))
        ends = [len(group.context) - 1 for group in batch]
        yield from _scored(model, rows, [own[e : e + len(row.tokens)] for own, e, row in zip(hidden, ends, rows)])


def _score_shared(model: GPT, groups: Sequence[Group], batch_tokens: int) -> Iterator[tuple[int, Score]]:
    """Read each context once, and then, from its keys and values, each of its continuations."""
    device = _device(model)
    for batch in _batches(groups, lambda group: group.length, batch_tokens, device):
        rows = [Row(g, *item) for g, group in enumerate(batch) for item in group.continuations]
        longest = max(len(row.tokens) for row in rows) - 1  # tokens that are read of a continuation
        contexts = pad_rows([group.context for group in batch], device)
        slots = contexts.size(1) + longest if longest else 0  # without a second token nothing is cached
        cache = empty_cache(model, len(batch), slots, _cache_dtype(model)) if slots else []
        hidden = model.hidden(contexts, cache=[part.view(len(batch), slots, None) for part in cache] or None)
        ends = torch.tensor([len(group.context) - 1 for group in batch], device=device)
        each = torch.arange(len(batch), device=device)
        back = torch.arange(model.config.ngrams - 1, -1, -1, device=device)
        tails = contexts.gather(1, (ends[:, None] - back).clamp(min=0))
        states = hidden[each, ends]
        for part in _batches(rows, lambda row: len(row.tokens) - 1, batch_tokens, device, before=contexts.size(1)):
            owners = torch.tensor([row.context for row in part], device=device)
            found = states[owners].split(1)  # first tokens are predicted from these
            if len(part[0].tokens) > 1:
                own = _read_on(model, cache, contexts.size(1), part, owners, tails[owners], ends[owners])
                found = [torch.cat((first, more[: len(row.tokens) - 1])) for first, more, row in zip(found, own, part)]
            yield from _scored(model, part, found)


def _read_on(
    model: GPT, cache: Sequence[BlockCache], used: int, rows: Sequence[Row], owners: Tensor, tails: Tensor, ends: Tensor
) -> Tensor:
    """Hidden states (R, T, C) of the continuations of rows, the longest first, but for the last tokens.

    `cache` holds `used` tokens of each context, padding included; of the context of each row `owners` (R,) is the place
    there, `tails` (R, ngrams) its last tokens and `ends` (R,) the place of the very last.
    """
    longest, device = len(rows[0].tokens) - 1, owners.device
    sequences = torch.cat((tails, pad_rows([row.tokens for row in rows], device)), dim=1)
    # a shorter row reads its last token again and again, which keeps the same keys and values at the same place
    sizes = torch.tensor([len(row.tokens) for row in rows], device=device)
    steps = torch.arange(1, longest + 1, device=device).minimum(sizes[:, None] - 1)  # (R, T)
    slots, positions = slice(used + longest), ends[:, None] + steps
    branches = [Branches(of.keys[:, :, slots], of.values[:, :, slots], positions, owners) for of in cache]
    places, runs = steps + tails.size(1) - 1, range(1, model.config.ngrams)
    previous = torch.stack([sequences.gather(1, places - k) for k in runs], dim=-1) if runs else None
    return model.hidden(sequences.gather(1, places), cache=branches, previous=previous)


def _cache_dtype(model: GPT) -> torch.dtype:
    """The type in which the model computes keys and values."""
    weight = model.token_embedding.weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _scored(model: GPT, rows: Sequence[Row], hidden: Sequence[Tensor]) -> Iterator[tuple[int, Score]]:
    """The score of each row, from the hidden states (tokens, C) that its tokens are predicted from."""
    hidden = torch.cat(list(hidden))
    wanted = torch.tensor([token for row in rows for token in row.tokens], device=hidden.device)
    at_once = max(logits_at_once(hidden.device.type) // model.config.vocab_size, 1)
    logs, greedy = [], []
    for states, own in zip(hidden.split(at_once), wanted.split(at_once)):
        logits = model.logits(states).float()
        logs.append(logits.log_softmax(-1).gather(1, own[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == own)
    sizes = [len(row.tokens) for row in rows]
    for row, log, right in zip(rows, torch.cat(logs).double().split(sizes), torch.cat(greedy).split(sizes)):
        yield row.number, Score(log.sum().item(), bool(right.all()), len(log))
