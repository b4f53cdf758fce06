"""How far back a model uses its context: loss by position, copying of random text, and passkey retrieval.

figures = measure_recall(model.eval(), tokenizer, prose, length=512, rows=64, seed=0)
"""

import random
import string
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.errors import UserError, check_finite
from gpt_arc.nn.names import Stretch
from gpt_arc.weights.edit import with_settings
from model import GPT

COPY = "copy {}|{}"  # random characters, and the same again
KEY = "key {}: {} key {}"  # digits, prose, and the same digits
COPIED = string.ascii_lowercase + string.digits  # which random characters are drawn from
BATCH_TOKENS = 8192


class Recall(NamedTuple):
    losses: list[float]  # in nats, by position of the token that is read
    copied: float  # share of the characters of the second copy that are the likeliest
    found: float  # share of the keys of which all tokens are the likeliest


def random_key(rng: random.Random) -> str:
    return f"{rng.randrange(10_000):04}"


def stretched(model: GPT, length: int, kind: Stretch | None = None, context: int | None = None) -> GPT | None:
    """Returns a model with the same weights and a context of `length`; None if it has learned fewer positions.

    `kind` stretches rotary positions from `context` to it.
    """
    if length > model.config.block_size and model.config.positions == "learned":
        return None
    settings: dict[str, Any] = {"block_size": length}
    if kind and context and length > context:
        settings |= {"rotary_scaling": kind, "rotary_context": context, "rotary_factor": length / context}
    return with_settings(model, **settings).eval()


def measure_recall(model: GPT, tokenizer: Tokenizer, prose: Sequence[int], length: int, rows: int, seed: int) -> Recall:
    """Measures `rows` inputs of `length` tokens each of prose, copies and keys.

    `prose` is read in evenly spaced windows. Raises UserError if it is too short, or `length` is.
    """
    rng, size = random.Random(seed), length + 1  # the last token is only a target
    if len(prose) < size:
        raise UserError(f"a text of {len(prose)} tokens is too short for windows of {length}")
    begins = [i * (len(prose) - size) // max(rows - 1, 1) for i in range(rows)]
    nats, _ = outcomes(model, [prose[begin : begin + size] for begin in begins])
    copies = [copy_row(tokenizer, size, rng) for _ in range(rows)]
    _, copied = outcomes(model, [row for row, _ in copies])
    keys = [key_row(tokenizer, prose, size, rng) for _ in range(rows)]
    _, found = outcomes(model, [row for row, _ in keys])
    return Recall(
        nats.mean(0).tolist(),
        torch.cat([hits[-count:] for hits, (_, count) in zip(copied, copies)]).float().mean().item(),
        sum(hits[-count:].all().item() for hits, (_, count) in zip(found, keys)) / rows,
    )


def copy_row(tokenizer: Tokenizer, size: int, rng: random.Random) -> tuple[list[int], int]:
    """Returns up to `size` tokens, random characters and the same again, and how many the second copy has."""
    characters = [tokens[0] for character in COPIED if len(tokens := tokenizer.encode(character)) == 1]
    before, between, _ = (tokenizer.encode(text) if text else [] for text in COPY.split("{}"))
    count = (size - len(before) - len(between)) // 2
    if count < 1:
        raise UserError(f"a length of {size - 1} tokens has no room for two copies")
    copied = rng.choices(characters, k=count)
    return [*before, *copied, *between, *copied], count


def key_row(tokenizer: Tokenizer, prose: Sequence[int], size: int, rng: random.Random) -> tuple[list[int], int]:
    """Returns `size` tokens, prose with a key anywhere in it and repeated after it, and how many tokens the key has.

    The repetition ends the row.
    """
    (before, between, question, _), key = KEY.split("{}"), random_key(rng)
    first, last, question = (tokenizer.encode(text) for text in (before + key + between, question + key, question))
    count = len(last) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(question, last)))
    room = size - len(first) - len(last)
    if room < 0:
        raise UserError(f"a length of {size - 1} tokens has no room for a key and its repetition")
    begin, depth = rng.randrange(len(prose) - room + 1), rng.randrange(room + 1)
    middle = begin + depth
    return [*prose[begin:middle], *first, *prose[middle : begin + room], *last], count


@torch.inference_mode()
def outcomes(model: GPT, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Returns the loss in nats at each token of rows after the first, and whether it is the likeliest: (N, T) each.

    Raises NotFinite for a loss that isn't.
    """
    nats, hits = [], []
    for batch in torch.tensor(rows, device=model.token_embedding.weight.device).split(
        BATCH_TOKENS // len(rows[0]) or 1
    ):
        logits = model(batch[:, :-1]).float()
        nats.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").cpu())
        hits.append((logits.argmax(-1) == batch[:, 1:]).cpu())
    check_finite([torch.cat(nats).sum().item()])
    return torch.cat(nats), torch.cat(hits)
