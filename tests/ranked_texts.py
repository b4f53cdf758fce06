"""Texts with a known utility, rankings of them, and the settings that the tests of dpo.py and reward.py share."""

import itertools
import math
import random

from gpt_arc.chat.format import TEMPLATES, ChatFormat
from gpt_arc.data.tokenizer import CharTokenizer
from model import GPTConfig

TEXTS = ["".join(letters) for letters in itertools.product("abc", repeat=3)]
LETTERS = CharTokenizer("abcdefgh")
CHAT = ChatFormat.new(TEMPLATES["markers"], LETTERS, 8)
QUICK = ("--device=cpu", "--dtype=float32", "--learning_rate=1e-3", "--batch_size=2", "--gradient_accumulation_steps=2")


def tiny_config(**settings):
    return GPTConfig(**{"block_size": 16, "vocab_size": 12, "n_head": 2, "n_embd": 16} | settings)


def utility(text):
    return text.count("a") - text.count("b")


def rankings(count, seed=0, responses=(2, 4)):
    """Rankings of three-letter responses, drawn from the Bradley-Terry model: by utility plus Gumbel noise."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        texts = draw.sample(TEXTS, draw.randint(*responses))
        noisy = [utility(text) - math.log(-math.log(draw.random())) for text in texts]
        ranks = [1 + sum(score > value for score in noisy) for value in noisy]
        rows.append({"prompt": "h" * draw.randint(1, 3), "responses": texts, "ranks": ranks})
    return rows
