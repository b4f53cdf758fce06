"""Turns the space-separated tokens of old benchmarks back into running text, which GPT-2 was measured on.

Perplexity by word still counts the words of the original text (Radford et al. 2019, section 3.1).
"""

import re
from collections.abc import Callable

PAIRS = [(r"\( ", "("), (r" \)", ")"), (r"\[ ", "["), (r" \]", "]"), (r'" ([^"\n]*?) "', r'"\1"')]


def _heading(match: re.Match) -> str:
    signs = match[2].replace(" ", "")
    return f"{match[1]}{signs}{match[3]}{signs}{match[4]}"


def wikitext(text: str) -> str:
    """Detokenizes WikiText-2 and -103: `@-@`, `@,@` and `@.@`, headings, and spaces before punctuation."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r"(?m)^( ?)((?:= )+=) (.+) \2( ?)$", _heading, text)
    for pattern, replacement in (
        *PAIRS,
        (r" ([,.;:!?%])", r"\1"),
        (r" ('(?:s|t|m|d|re|ve|ll)\b)", r"\1"),
        (r"s ' ", "s' "),
    ):
        text = re.sub(pattern, replacement, text)
    return text


def penn_treebank(text: str) -> str:
    """Detokenizes Mikolov's Penn Treebank: contractions, dollars, spaces before punctuation; <unk> and N stay."""
    text = re.sub(r" n't\b", "n't", text)
    for pattern, replacement in ((r" ('(?:s|t|m|d|re|ve|ll)?(?= ))", r"\1"), (r"\$ ", "$"), (r" ([,.;:!?%])", r"\1")):
        text = re.sub(pattern, replacement, text)
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {"none": str, "wikitext": wikitext, "ptb": penn_treebank}
