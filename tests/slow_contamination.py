"""A plain implementation of the contamination analysis, to compare with."""

import re
import unicodedata
from collections import Counter


def slow_words(text):
    """Words, each with its begin and end, including adjacent punctuation."""
    words, start = [], 0
    for end in range(len(text) + 1):
        if end == len(text) or text[end].isspace():
            letters = [c for c in text[start:end] if unicodedata.category(c)[0] != "P" and c not in "$+<=>^`|~"]
            if letters:
                words.append(("".join(letters).lower(), start, end))
            start = end + 1
    return words


def slow_clean(documents, items, rules):
    """The remaining texts, and the counts of documents."""
    size = rules.words

    def grams(words):
        return [tuple(word for word, _, _ in words[at : at + size]) for at in range(len(words) - size + 1)]

    shared = {gram for item in items for gram in grams(slow_words(item))}
    words = [slow_words(text) for text in documents]
    having = Counter(gram for part in words for gram in set(grams(part)) & shared)
    shared = {gram for gram in shared if having[gram] <= rules.most_documents}
    texts, counts = [], dict.fromkeys(("read", "unchanged", "cut", "dropped", "left_without_pieces"), 0)
    for text, part in zip(documents, words):
        counts["read"] += 1
        cut = set()
        for at, gram in enumerate(grams(part)):
            if gram in shared:
                cut |= set(range(part[at][1] - rules.window, part[at + size - 1][2] + rules.window))
        if not cut:
            texts.append(text)
            counts["unchanged"] += 1
            continue
        stays = "".join("\0" if n in cut else "x" for n in range(len(text)))
        spans = [match.span() for match in re.finditer("x+", stays)]
        long = [text[a:b] for a, b in spans if b - a >= rules.shortest_piece]
        if len(spans) > rules.most_pieces:
            counts["dropped"] += 1
        else:
            texts += long
            counts["cut" if long else "left_without_pieces"] += 1
    return texts, counts
