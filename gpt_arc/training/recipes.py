"""Which recipe of configs/ suits a text, and for how many steps."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """A config that suits any text, and when."""

    batch_size: int
    block_size: int
    most_epochs: float  # beyond these the loss on other text rises or hardly falls
    least_tokens: int  # read in all, to end lower than the recipe above


RECIPES = {  # from the cheapest step to the dearest
    "speedrun_cpu": Recipe(24, 64, most_epochs=1.5, least_tokens=0),
    "speedrun": Recipe(16, 256, most_epochs=8, least_tokens=2_000_000),
}
MOST_CHARACTERS = 512  # of a vocabulary by characters: beyond it, as in Chinese, many are too rare to be learned
VAL_TOKENS = 100_000  # read in an evaluation, at most


def tokenizer_for(distinct: int) -> str:
    """The tokenizer for a text of `distinct` characters: a small model learns most from characters, if they are few."""
    return "char" if distinct <= MOST_CHARACTERS else "gpt2"


def choose(train: int, val: int, rates: Mapping[str, float], minutes: float) -> tuple[str, dict[str, Any]]:
    """Returns the config in RECIPES for splits of `train` and `val` tokens, and the settings that adapt it to them.

    `rates` has the tokens per second that each recipe was measured to train on. The embeddings of n-grams of
    speedrun_cpu learn most from the first pass over a text and then overfit; the deeper model of speedrun learns a
    third as much from a token at first, but goes on to a lower loss. So the last recipe wins that can read enough,
    within the time and its epochs. A short text is left to n-grams whatever the time: docs/speedrun.md has the figures.
    """
    tokens = {name: min(rates[name] * 60 * minutes, recipe.most_epochs * train) for name, recipe in RECIPES.items()}
    name = [name for name, recipe in RECIPES.items() if tokens[name] >= recipe.least_tokens][-1]
    recipe = RECIPES[name]
    block_size = max(1, min(recipe.block_size, train - 1, val - 1))
    batch = recipe.batch_size * block_size  # tokens
    steps = max(1, int(tokens[name] / batch))
    return name, {
        "block_size": block_size,
        "max_iters": steps,
        "eval_interval": math.ceil(steps / 4),
        "eval_iters": 0 if val <= VAL_TOKENS else VAL_TOKENS // batch,
    }
