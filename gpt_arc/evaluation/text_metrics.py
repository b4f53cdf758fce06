"""Compares generated texts with references: BLEU by sacrebleu, ROUGE by rouge-score, both in the extra [eval].

counts = [bleu_counts(text, reference) for text, reference in pairs]
value, error = bleu(counts)                  # corpus BLEU from 0 to 1, with its standard error
rouge([(text, reference), ...])["ROUGE-L"]   # F1 of each text
"""

import math
import re
from collections.abc import Sequence

import numpy as np

from gpt_arc.extras import import_extra

SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\s*\n\s*")
ORDERS = 4  # longest n-grams of BLEU


def first_sentences(text: str, count: int) -> str:
    """Returns the first sentences of a text, one a line.

    A sentence ends with its line, or with a full stop, question or exclamation mark before white space; closing quotes
    and brackets belong to it.
    """
    sentences, start = [], 0
    text = text.strip()
    for match in SENTENCE_END.finditer(text):
        sentences.append(text[start : match.end()].rstrip())
        start = match.end()
    return "\n".join([sentence for sentence in (*sentences, text[start:]) if sentence][:count])


def bleu_counts(text: str, reference: str) -> list[int]:
    """Returns BLEU's counts: matching 1- to 4-grams, all 1- to 4-grams, words of the text, words of the reference.

    Words are split as sacrebleu does by default ("13a", with case), so that figures can be compared.
    """
    score = import_extra("sacrebleu.metrics").BLEU(max_ngram_order=ORDERS).corpus_score([text], [[reference]])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def bleu(counts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Returns corpus BLEU (0 to 1; Papineni et al. 2002) from `bleu_counts`, and its jackknife standard error."""
    compute = import_extra("sacrebleu.metrics").BLEU.compute_bleu

    def score(total: np.ndarray) -> float:
        *grams, text_words, reference_words = total.tolist()
        matching, all_grams = grams[:ORDERS], grams[ORDERS:]
        return compute(matching, all_grams, text_words, reference_words, smooth_method="exp").score / 100

    table = np.array(counts)
    whole, size = table.sum(0), len(table)
    if size < 2:
        return score(whole), 0.0
    leave_one_out = [score(whole - row) for row in table]
    return score(whole), math.sqrt((size - 1) * np.var(leave_one_out))


def rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
    """Returns each text's F1 by words, by word pairs and by longest common subsequence with its reference (Lin 2004).

    Words are stemmed. The subsequence is the summary-level one, with one sentence a line (`rougeLsum`).
    """
    kinds = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeLsum"}
    scorer = import_extra("rouge_score.rouge_scorer").RougeScorer(list(kinds.values()), use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in pairs]
    return {name: [score[kind].fmeasure for score in scores] for name, kind in kinds.items()}
