"""How near a generated text comes to the right one: BLEU by sacrebleu, ROUGE by rouge-score, libraries of [eval].

counts = [bleu_counts(said, right) for said, right in pairs]
value, error = bleu(counts)                  # of the corpus, 0 to 1, with its standard error
rouge([(said, right), ...])["ROUGE-L"]       # F1 of each text
"""

import math
import re
from collections.abc import Sequence

import numpy as np

from gpt_arc.extras import import_extra

SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\s*\n\s*")
ORDERS = 4  # n-grams of BLEU


def first_sentences(text: str, count: int) -> str:
    """The first sentences of a text, a line each.

    One ends with a full stop, question or exclamation mark before white space, quotes and brackets that close included,
    or with its line.
    """
    sentences, start = [], 0
    text = text.strip()
    for match in SENTENCE_END.finditer(text):
        sentences.append(text[start : match.end()].rstrip())
        start = match.end()
    return "\n".join([one for one in (*sentences, text[start:]) if one][:count])


def bleu_counts(said: str, right: str) -> list[int]:
    """What BLEU is computed of: 1- to 4-grams that agree, all 1- to 4-grams, words of the text, words of the right one.

    Words are sacrebleu's own ("13a", with case), so that figures can be compared.
    """
    score = import_extra("sacrebleu.metrics").BLEU(max_ngram_order=ORDERS).corpus_score([said], [[right]])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def bleu(counts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Corpus BLEU (0 to 1; Papineni et al. 2002) of `bleu_counts`, and its standard error, by the jackknife."""
    compute = import_extra("sacrebleu.metrics").BLEU.compute_bleu

    def score(total: np.ndarray) -> float:
        *grams, said, right = total.tolist()
        return compute(grams[:ORDERS], grams[ORDERS:], said, right, smooth_method="exp").score / 100

    table = np.array(counts)
    whole, size = table.sum(0), len(table)
    if size < 2:
        return score(whole), 0.0
    without = [score(whole - one) for one in table]
    return score(whole), math.sqrt((size - 1) * np.var(without))


def rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
    """F1 of words, of pairs of words and of the longest common subsequence, for each text and the right one (Lin 2004).

    Words are stemmed. The subsequence is that of summaries of several sentences, a line each (`rougeLsum`).
    """
    kinds = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeLsum"}
    scorer = import_extra("rouge_score.rouge_scorer").RougeScorer(list(kinds.values()), use_stemmer=True)
    found = [scorer.score(right, said) for said, right in pairs]
    return {name: [one[kind].fmeasure for one in found] for name, kind in kinds.items()}
