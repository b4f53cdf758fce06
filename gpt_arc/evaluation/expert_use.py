"""Which experts of a mixture the tokens of a text are routed to, and how far the class of a token predicts it.

    use = expert_use(model.eval(), windows(tokenizer, split.read, len(split), model.config.block_size))
    use[0].load, use[0].explained       # for the first block with experts

Shapes: E experts, N tokens, each with k experts, G classes of tokens, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gpt_arc.data.batches import pad_rows
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.errors import check_finite
from gpt_arc.nn.experts import Experts
from model import GPT

CLASSES: tuple[str, ...] = ("newline", "space", "capital", "word begins", "in a word", "digit", "punctuation", "other")


def token_class(text: str, before: str) -> str:
    """Returns the class, one of CLASSES, of a token with this text after the text `before`.

    White space is a newline if it contains one, else a space. Any other token is classed by its first character that
    isn't white space: a capital letter anywhere is "capital"; another letter is "in a word" after a letter, else "word
    begins"; what is neither letter nor digit is punctuation. Tokens without text, such as part of a character's bytes,
    are "other".
    """
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return "other"
    stripped = text.lstrip()
    if not stripped:
        return "newline" if "\n" in text else "space"
    first, previous = stripped[0], text[: -len(stripped)][-1:] or before[-1:]
    if first.isalpha():
        if first.isupper():
            return "capital"
        return "in a word" if previous.isalpha() else "word begins"
    return "digit" if first.isdigit() else "punctuation"


def token_classes(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Returns the index in CLASSES of each token's class, judged after the token before it."""
    known: dict[tuple[int | None, int], int] = {}
    classes, before = [], None
    for token in tokens:
        if (before, token) not in known:
            known[before, token] = CLASSES.index(_class_of_pair(tokenizer, before, token))
        classes.append(known[before, token])
        before = token
    return classes


def _class_of_pair(tokenizer: Tokenizer, before: int | None, token: int) -> str:
    if token == tokenizer.end_of_text:
        return "other"
    alone = tokenizer.decode([token])
    if before is None:
        return token_class(alone, "")
    first, pair = tokenizer.decode([before]), tokenizer.decode([before, token])  # some spaces only show in context
    return token_class(pair.removeprefix(first) if pair.startswith(first) else alone, first)


class Use(NamedTuple):
    """The choices of one block's router."""

    block: int  # from 1
    by_class: Tensor  # (G, E) int64 counts of choices; a token makes k of them
    by_token: Tensor  # (V, E) likewise, by token id
    experts_per_token: int  # k
    router_entropy: float  # mean over tokens of the entropy of the router's probabilities, in nats

    @property
    def load(self) -> Tensor:
        """Each expert's share (E,) of all choices, in float64."""
        counts = self.by_class.sum(0).double()
        return counts / counts.sum()

    @property
    def cv(self) -> float:
        """Coefficient of variation: the standard deviation of the loads over their mean. 0 if use is equal."""
        return (self.load.std(correction=0) / self.load.mean()).item()

    @property
    def max_over_mean(self) -> float:
        return (self.load.max() / self.load.mean()).item()

    @property
    def mutual_information(self) -> float:
        """Mutual information of a token's class and one of its k experts, in nats.

        With n choices, chance alone gives about G E / 2n.
        """
        joint = self.by_class.double() / self.by_class.sum()
        return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)

    @property
    def explained(self) -> float | None:
        """The mutual information over its maximum, which it reaches if the class determines all k experts.

        The maximum is the entropy of the loads minus log k, since the k experts of one token differ. None if all
        tokens use the same experts.
        """
        largest = entropy(self.load) - math.log(self.experts_per_token)
        return None if largest < 1e-9 else self.mutual_information / largest

    def typical(self, expert: int, count: int) -> list[tuple[int, int]]:
        """Returns the tokens that most exceed the expert's share of all choices, and how often it got each."""
        choices = self.by_token[:, expert]
        surplus = choices - self.by_token.sum(1) * self.load[expert]
        best = surplus.topk(min(count, len(choices))).indices.tolist()
        return [(token, int(choices[token])) for token in best if surplus[token] > 0]


def entropy(probabilities: Tensor) -> float:
    """Returns the entropy in nats of probabilities of any shape that add up to 1."""
    return torch.special.entr(probabilities).sum().item()


@contextlib.contextmanager
def watched(model: GPT) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """Runs the block with the routers recorded: for each block with experts, the (N, k) choices and (N, E) logits.

    Each forward pass appends one pair.
    """
    records: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.experts]

    def recording(route, record: list[tuple[Tensor, Tensor]]):
        def recorded_route(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            chosen, gates, logits = route(x)
            record.append((chosen, logits))
            return chosen, gates, logits

        return recorded_route

    try:
        for experts, record in zip(model.experts, records):
            experts.route = recording(experts.route, record)  # an attribute of this module hides its class's method
        yield records
    finally:
        for experts in model.experts:
            vars(experts).pop("route", None)


class Window(NamedTuple):
    """One sequence for the model, and the index in CLASSES of each token's class."""

    tokens: list[int]
    classes: list[int]


def windows(
    tokenizer: Tokenizer, read: Callable[[int, int], Iterable[int]], length: int, size: int, most: int = 0
) -> list[Window]:
    """Returns adjacent windows of `size` tokens; if `most` > 0, evenly spaced ones with up to `most` tokens in all.

    `read(start, count)` returns tokens of a text of `length` tokens, fewer at its end.
    """
    every = range(0, length, size)
    count = min(len(every), max(1, most // size)) if most else len(every)
    selected = []
    for start in (every[i * len(every) // count] for i in range(count)):
        before = min(start, 1)  # the class of the window's first token depends on the token before it
        tokens = [int(token) for token in read(start - before, size + before)]
        selected.append(Window(tokens[before:], token_classes(tokenizer, tokens)[before:]))
    return selected


def expert_use(model: GPT, windows: Sequence[Window], batch_tokens: int = 8192) -> list[Use]:
    """Returns the use of experts in each block with experts, for a model in evaluation mode on any device.

    Raises NotFinite for logits that aren't.
    """
    config, device = model.config, model.head_weight.device
    blocks = [number for number, block in enumerate(model.blocks, start=1) if isinstance(block.mlp, Experts)]
    sizes = len(CLASSES), config.vocab_size
    counts = [[torch.zeros(size * config.n_experts, dtype=torch.int64) for size in sizes] for _ in blocks]
    entropies, rows = [0.0] * len(blocks), max(1, batch_tokens // config.block_size)
    for first in tqdm(range(0, len(windows), rows), "reading", leave=False, disable=None):
        batch = windows[first : first + rows]
        tokens, classes = (pad_rows(column, value=-1) for column in zip(*batch))
        real = (tokens >= 0).flatten()  # not padding, which comes last and so doesn't affect the tokens before it
        groups = [ids.flatten()[real] for ids in (classes, tokens)]
        with torch.inference_mode(), watched(model) as records:
            model.hidden(tokens.clamp(min=0).to(device))
        for i, [(chosen, logits)] in enumerate(records):
            chosen, logits = chosen.cpu()[real], logits.cpu()[real]
            entropies[i] += torch.special.entr(logits.softmax(-1)).sum().item()
            for ids, count in zip(groups, counts[i]):
                count += torch.bincount((ids[:, None] * config.n_experts + chosen).flatten(), minlength=len(count))
    check_finite(entropies)
    total = sum(len(window.tokens) for window in windows)
    return [
        Use(
            block,
            by_class.view(-1, config.n_experts),
            by_token.view(-1, config.n_experts),
            config.experts_per_token,
            entropy_sum / total,
        )
        for block, (by_class, by_token), entropy_sum in zip(blocks, counts, entropies)
    ]
