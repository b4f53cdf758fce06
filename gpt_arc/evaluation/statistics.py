"""Standard errors, and tests of differences."""

import math
from collections.abc import Sequence

import numpy as np

from gpt_arc.extras import import_extra


def standard_error(values: Sequence[float]) -> float:
    """Of a mean: the sample's standard deviation over the root of its size; 0 for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """That two settings are right (1) equally often, by the items on which they differ: McNemar's exact test."""
    better = sum(b > a for a, b in zip(first, second))
    worse = sum(a > b for a, b in zip(first, second))
    return float(import_extra("scipy.stats").binomtest(better, better + worse).pvalue) if better + worse else 1.0
