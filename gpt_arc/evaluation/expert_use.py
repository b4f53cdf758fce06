"""Which experts of a mixture the tokens of a text go to, and how far their kind of text tells it.

    use = expert_use(model.eval(), windows(tokenizer, split.read, len(split), model.config.block_size))
    use[0].load, use[0].explained       # of the first block with experts

Shapes: E experts, N tokens, each with k experts, G classes of tokens, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gpt_arc.data.batches import pad_rows
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.nn.experts import Experts
from model import GPT

CLASSES = ("newline", "space", "capital", "word begins", "in a word", "digit", "punctuation", "other")


def token_class(text: str, before: str) -> str:
    """The kind of a token's text that stands after the text `before`: one of CLASSES.

    White space alone is a newline if it holds one, else space. Else the first character that is not white space tells:
    a capital letter is one anywhere; any other letter is in a word if it follows a letter, else it begins one; what is
    neither letter nor digit is punctuation. Other are tokens without a text, such as a part of a character's bytes.
    """
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return "other"
    bare = text.lstrip()
    if not bare:
        return "newline" if "\n" in text else "space"
    first, previous = bare[0], text[: -len(bare)][-1:] or before[-1:]
    if first.isalpha():
        if first.isupper():
            return "capital"
        return "in a word" if previous.isalpha() else "word begins"
    return "digit" if first.isdigit() else "punctuation"


def token_classes(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """For each token, read after the one before it, the place of its class in CLASSES."""
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
    first, both = tokenizer.decode([before]), tokenizer.decode([before, token])  # where spaces are told in context
    return token_class(both.removeprefix(first) if both.startswith(first) else alone, first)


class Use(NamedTuple):
    """What one block's router did."""

    block: int  # the first of the model's is 1
    by_class: Tensor  # (G, E) int64 choices; a token makes k of them
    by_token: Tensor  # (V, E) likewise, by the token's id
    experts_per_token: int  # k
    router_entropy: float  # mean over tokens of the entropy of the router's probabilities, in nats

    @property
    def load(self) -> Tensor:
        """Share (E,) of all choices that each expert got, in float64."""
        counts = self.by_class.sum(0).double()
        return counts / counts.sum()

    @property
    def cv(self) -> float:
        """The standard deviation of the loads over their mean: 0 of equal use."""
        return (self.load.std(correction=0) / self.load.mean()).item()

    @property
    def max_over_mean(self) -> float:
        return (self.load.max() / self.load.mean()).item()

    @property
    def mutual_information(self) -> float:
        """Of a token's class and one of its k experts, in nats. Of n choices chance alone gives about G E / 2n."""
        joint = self.by_class.double() / self.by_class.sum()
        return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)

    @property
    def explained(self) -> float | None:
        """The mutual information over the largest possible, which is that of classes that settle all k experts:
        the entropy of the loads, less the log k by which a token's own experts differ. None if all take the same."""
        largest = entropy(self.load) - math.log(self.experts_per_token)
        return None if largest < 1e-9 else self.mutual_information / largest

    def typical(self, expert: int, count: int) -> list[tuple[int, int]]:
        """The tokens that the expert gets most beyond its share of all choices, with how often it gets them."""
        own = self.by_token[:, expert]
        surplus = own - self.by_token.sum(1) * self.load[expert]
        best = surplus.topk(min(count, len(own))).indices.tolist()
        return [(token, int(own[token])) for token in best if surplus[token] > 0]


def entropy(probabilities: Tensor) -> float:
    """In nats, of probabilities of any shape that add up to 1."""
    return torch.special.entr(probabilities).sum().item()


@contextlib.contextmanager
def watched(model: GPT) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """For each block with experts what it chooses from here on: of each batch the experts (N, k) and logits (N, E)."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.experts]

    def watching(route, own: list[tuple[Tensor, Tensor]]):
        def watched_route(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            chosen, gates, logits = route(x)
            own.append((chosen, logits))
            return chosen, gates, logits

        return watched_route

    try:
        for experts, own in zip(model.experts, seen):
            experts.route = watching(experts.route, own)  # of this module alone, before its class's
        yield seen
    finally:
        for experts in model.experts:
            vars(experts).pop("route", None)


class Window(NamedTuple):
    """Tokens that the model reads at once, and the places of their classes in CLASSES."""

    tokens: list[int]
    classes: list[int]


def windows(
    tokenizer: Tokenizer, read: Callable[[int, int], Sequence[int]], length: int, size: int, most: int = 0
) -> list[Window]:
    """Windows of `size` tokens side by side, as many as hold `most` tokens, spread evenly over all; 0: all of them.

    `read(start, count)` gives the tokens of a text of `length` tokens, fewer at its end.
    """
    every = range(0, length, size)
    count = min(len(every), max(1, most // size)) if most else len(every)
    found = []
    for start in (every[i * len(every) // count] for i in range(count)):
        before = min(start, 1)  # the token before the window has a say in the first one's class
        tokens = [int(token) for token in read(start - before, size + before)]
        found.append(Window(tokens[before:], token_classes(tokenizer, tokens)[before:]))
    return found


def expert_use(model: GPT, windows: Sequence[Window], batch_tokens: int = 8192) -> list[Use]:
    """The use of experts in each block that has some, by a model in evaluation mode, on any device."""
    config, device = model.config, model.head_weight.device
    blocks = [number for number, block in enumerate(model.blocks, start=1) if isinstance(block.mlp, Experts)]
    sizes = len(CLASSES), config.vocab_size
    counts = [[torch.zeros(size * config.n_experts, dtype=torch.int64) for size in sizes] for _ in blocks]
    entropies, rows = [0.0] * len(blocks), max(1, batch_tokens // config.block_size)
    for first in tqdm(range(0, len(windows), rows), "reading", leave=False, disable=None):
        batch = windows[first : first + rows]
        tokens, classes = (pad_rows(column, value=-1) for column in zip(*batch))
        there = (tokens >= 0).flatten()  # a window may be short; its tokens don't see what comes after them
        groups = [ids.flatten()[there] for ids in (classes, tokens)]
        with torch.inference_mode(), watched(model) as seen:
            model.hidden(tokens.clamp(min=0).to(device))
        for i, [(chosen, logits)] in enumerate(seen):
            chosen, logits = chosen.cpu()[there], logits.cpu()[there]
            entropies[i] += torch.special.entr(logits.softmax(-1)).sum().item()
            for ids, own in zip(groups, counts[i]):
                own += torch.bincount((ids[:, None] * config.n_experts + chosen).flatten(), minlength=len(own))
    read = sum(len(window.tokens) for window in windows)
    return [
        Use(block, *(c.view(-1, config.n_experts) for c in own), config.experts_per_token, total / read)
        for block, own, total in zip(blocks, counts, entropies)
    ]
