"""Log-probabilities of continuations: what perplexity, multiple choice and cloze tasks rest on.

    scores = score_continuations(model.eval(), [Request(context, continuation), ...])
    scores = score_continuations(model.eval(), rolling_windows(tokens, prefix, 1024, 512))    # a text of any length

Requests of equal context read it once, as long as they fit into a batch: its keys and values serve all of their
continuations. Logits are computed only of what is scored.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from gpt_arc import runtime
from gpt_arc.tokenizer import Tokenizer
from model import GPT, KVCache
from ops import logits_at_once


class Request(NamedTuple):
    """Score `continuation` after `context`, both token ids and neither empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    log_probability: float  # of the whole continuation, in nats: the sum over its tokens
    is_greedy: bool  # whether each of its tokens is the likeliest, the first of equals counting
    tokens: int


class Group(NamedTuple):
    """A context, and the continuations that are asked of it."""

    context: tuple[int, ...]
    continuations: list[tuple[int, Sequence[int]]]  # each with the number of its request

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that is read: the last token of a continuation isn't."""
        return len(self.context) + max(len(tokens) for _, tokens in self.continuations) - 1


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

    `batch_tokens` bounds what is read at once, each context counted with each continuation and padding included, where
    a single sequence isn't longer; `dtype` is that of matrix products. A context too long to be read with its
    continuation loses its beginning, see `truncated`.
    """
    by_context: dict[tuple[int, ...], list[tuple[int, Sequence[int]]]] = defaultdict(list)
    count = 0
    for number, request in enumerate(requests):
        by_context[truncated(request, model.config.block_size)].append((number, request.continuation))
        count += 1
    groups = [piece for item in by_context.items() for piece in _pieces(Group(*item), batch_tokens)]
    groups.sort(key=lambda group: group.length, reverse=True)
    scores: list[Score | None] = [None] * count
    bar = tqdm(total=count, desc=progress, unit="request", leave=False, disable=None if progress else True)
    with runtime.autocast(_device(model), dtype):
        for batch in _batches(groups, batch_tokens):
            for number, score in _score_batch(model, batch):
                scores[number] = score
                bar.update()
    bar.close()
    return scores


def _device(model: GPT) -> torch.device:
    return model.token_embedding.weight.device


def _pieces(group: Group, batch_tokens: int) -> Iterator[Group]:
    """The group, the longest continuations first, cut where they come to more than `batch_tokens`."""
    continuations = sorted(group.continuations, key=lambda item: len(item[1]), reverse=True)
    start = 0
    while start < len(continuations):
        end = start + max(batch_tokens // Group(group.context, continuations[start : start + 1]).length, 1)
        yield Group(group.context, continuations[start:end])
        start = end


def _batches(groups: Sequence[Group], batch_tokens: int) -> Iterator[list[Group]]:
    """Groups in batches whose continuations, each padded to the longest sequence, come to `batch_tokens` at most."""
    batch: list[Group] = []
    rows = 0
    for group in groups:  # the first of a batch is the longest
        more = len(group.continuations)
        if batch and (rows + more) * batch[0].length > batch_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(group)
        rows += more
    if batch:
        yield batch


def _score_batch(model: GPT, groups: list[Group]) -> Iterator[tuple[int, Score]]:
    """Read each context once, and then, from a copy of its keys and values, each of its continuations.

    Where contexts are a small part of it all, each sequence is read as a whole: that takes one pass, without masks.
    """
    device = _device(model)
    rows = [(g, number, tokens) for g, group in enumerate(groups) for number, tokens in group.continuations]
    targets = [torch.tensor(tokens, device=device) for _, _, tokens in rows]
    slots = max(group.length for group in groups)
    longest = max(len(own) for own in targets) - 1  # tokens that are read of a continuation
    read_once = len(groups) * max(len(group.context) for group in groups) + len(rows) * longest
    if read_once > 0.9 * len(rows) * slots:
        whole = _padded([[*groups[g].context, *own[:-1]] for g, _, own in rows], device)
        hidden = model.hidden(whole)
        starts = [len(groups[g].context) - 1 for g, _, _ in rows]
        found = [row[start : start + len(own)] for row, start, own in zip(hidden, starts, targets)]
        yield from _scored(model, rows, targets, found)
        return
    contexts = _padded([group.context for group in groups], device)
    cache = _empty_cache(model, len(groups), slots) if longest else None
    hidden = model.hidden(contexts, cache=cache)
    owner = torch.tensor([g for g, _, _ in rows], device=device)
    ends = torch.tensor([len(group.context) - 1 for group in groups], device=device)[owner]  # (R,)
    found = hidden[owner, ends].split(1)  # first tokens are predicted from these
    if cache is not None:
        # a shorter row reads its last token again and again, which keeps the same keys and values at the same place
        sizes = torch.tensor([len(own) for own in targets], device=device)
        steps = torch.arange(1, longest + 1, device=device).minimum(sizes[:, None] - 1)  # (R, longest)
        sequences = torch.cat((contexts[owner, ends][:, None], pad_sequence(targets, batch_first=True)), dim=1)
        copies = [KVCache(of.keys[owner], of.values[owner], ends[:, None] + steps) for of in cache]
        continued = model.hidden(sequences.gather(1, steps), cache=copies)
        found = [torch.cat((first, row[: len(own) - 1])) for first, row, own in zip(found, continued, targets)]
    yield from _scored(model, rows, targets, found)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids (rows, longest) int64, with 0 where a row has ended."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def _empty_cache(model: GPT, rows: int, slots: int) -> list[KVCache]:
    device = _device(model)
    weight = model.token_embedding.weight
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
    shape = rows, model.config.kv_heads, slots, model.config.head_width
    new = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * model.config.n_layer))
    return [KVCache(keys, values, None) for keys, values in zip(new, new)]


def _scored(
    model: GPT, rows: Sequence[tuple[int, int, Sequence[int]]], targets: Sequence[Tensor], hidden: Sequence[Tensor]
) -> Iterator[tuple[int, Score]]:
    """The score of each row, from the hidden states (tokens, C) that its tokens are predicted from."""
    hidden, wanted = torch.cat(list(hidden)), torch.cat(list(targets))
    at_once = max(logits_at_once(hidden.device.type) // model.config.vocab_size, 1)
    logs, greedy = [], []
    for states, own in zip(hidden.split(at_once), wanted.split(at_once)):
        logits = model.logits(states).float()
        logs.append(logits.log_softmax(-1).gather(1, own[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == own)
    sizes = [len(own) for own in targets]
    for (_, number, _), log, right in zip(rows, torch.cat(logs).double().split(sizes), torch.cat(greedy).split(sizes)):
        yield number, Score(log.sum().item(), bool(right.all()), len(log))
