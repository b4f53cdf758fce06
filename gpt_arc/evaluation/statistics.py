"""Standard errors and significance tests."""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from gpt_arc.extras import import_extra


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean; 0 for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the p-value of McNemar's exact test: are two settings right (1) equally often on the same items?"""
    better = sum(b > a for a, b in zip(first, second))
    worse = sum(a > b for a, b in zip(first, second))
    return float(import_extra("scipy.stats").binomtest(better, better + worse).pvalue) if better + worse else 1.0


def mean_and_error(values: Sequence[float], digits: int = 3) -> str:
    """Returns the mean, with its standard error if there are two or more values."""
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {standard_error(values):.{digits}f}" if len(values) > 1 else mean
