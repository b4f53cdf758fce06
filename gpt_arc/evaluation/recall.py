"""How a model uses what stands far back in its context: loss by position, induction, and passkey retrieval."""

import random

COPY = "copy {}|{}"  # letters, and the same letters
KEY = "key {}: {} key {}"  # digits, prose, and the same digits


def random_key(rng: random.Random) -> str:
    return f"{rng.randrange(10_000):04}"
