"""Which recipe of configs/ suits a text, and for how many steps."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """Settings that suit any text, and when."""

    config: str  # below configs/
    settings: dict[str, Any]  # in place of the config's
    most_epochs: float  # beyond these the loss on other text rises, or hardly falls, or wasn't measured
    least_tokens: int  # read in all, to end lower than the recipe above


RECIPES = {  # from the cheapest step to the dearest
    "ngrams": Recipe("speedrun_cpu", {"batch_size": 24, "block_size": 64}, most_epochs=1.5, least_tokens=0),
    "middle": Recipe(
        "speedrun",
        {"batch_size": 24, "block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 128, "ngrams": 4}
        | {"muon_rate": 0.01, "learning_rate": 0.01},
        most_epochs=1,
        least_tokens=800_000,
    ),
    "deep": Recipe("speedrun", {"batch_size": 16, "block_size": 256}, most_epochs=8, least_tokens=1_600_000),
}
MOST_CHARACTERS = 8192  # of a vocabulary by characters, as large as Chinese needs
VAL_TOKENS = 100_000  # read in an evaluation, at most


def tokenizer_for(distinct: int) -> str:
    """The tokenizer for a text of `distinct` characters.

    A small model spends most of a step on a vocabulary as large as GPT-2's, and learns more from characters.
    """
    return "char" if distinct <= MOST_CHARACTERS else "gpt2"


def choose(train: int, val: int, rates: Mapping[str, float], minutes: float) -> tuple[str, dict[str, Any]]:
    """Returns the name in RECIPES for splits of `train` and `val` tokens, and the settings that adapt its config.

    `rates` has the tokens per second that each recipe was measured to train on. Embeddings of n-grams learn most from
    the first pass over a text and then overfit; deeper models learn less from a token at first, but go on to a lower
    loss. So the last recipe wins that can read enough, within the time and its epochs. A short text is left to n-grams
    whatever the time. docs/results/speedrun.md has the figures.
    """
    tokens = {name: min(rates[name] * 60 * minutes, recipe.most_epochs * train) for name, recipe in RECIPES.items()}
    name = [name for name, recipe in RECIPES.items() if tokens[name] >= recipe.least_tokens][-1]
    settings = RECIPES[name].settings
    block_size = max(1, min(settings["block_size"], train - 1, val - 1))
    batch = settings["batch_size"] * block_size  # tokens
    steps = max(1, int(tokens[name] / batch))
    if name == "ngrams":  # speedrun_cpu.toml's rate, .02, is for its 200 steps; fewer take a higher one
        settings = settings | {"muon_rate": round(min(0.04, 0.02 * max(1, 200 / steps) ** 0.25), 4)}
    return name, settings | {
        "block_size": block_size,
        "max_iters": steps,
        "eval_interval": math.ceil(steps / 4),
        "sample_interval": steps,
        "eval_iters": 0 if val <= VAL_TOKENS else VAL_TOKENS // batch,
    }
