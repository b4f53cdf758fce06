"""Texts whose utility is known, and rankings of them."""

import itertools
import json
import math
import random
from pathlib import Path

TEXTS = ["".join(letters) for letters in itertools.product("abc", repeat=3)]


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def utility(text):
    return text.count("a") - text.count("b")


def rankings(count, seed=0, responses=(2, 4)):
    """Responses of three letters, ranked as Bradley and Terry's model does: by utility and Gumbel noise."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        texts = draw.sample(TEXTS, draw.randint(*responses))
        noisy = [utility(text) - math.log(-math.log(draw.random())) for text in texts]
        ranks = [1 + sum(other > own for other in noisy) for own in noisy]
        rows.append({"prompt": "h" * draw.randint(1, 3), "responses": texts, "ranks": ranks})
    return rows
