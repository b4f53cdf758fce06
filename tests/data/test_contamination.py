"""Overlap of a corpus with benchmarks: every rule of the three papers by hand, and everything against slow
references."""

import json
import os
import pickle
import random
import string
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_arc.data import contamination
from gpt_arc.data import contamination as contamination_module
from gpt_arc.data.contamination import (
    SEPARATOR,
    BloomFilter,
    FilterSettings,
    Items,
    Vocabulary,
    WindowIndex,
    decontaminate,
    filter_keys,
    letters_of,
    measure,
    pieces_of,
    read_items,
    substrings_of,
    word_of,
    words_compared,
    words_of,
)
from gpt_arc.data.documents import Files
from gpt_arc.errors import UserError
from slow_contamination import slow_clean, slow_words

ITEM = "the quick brown fox jumps over the lazy dog near an old mill"  # 13 words
PUBLISHED = FilterSettings()
SMALL = FilterSettings(words=3, window=4, shortest_piece=6, most_pieces=2, most_documents=2)


# The rules, character by character


def slow_letters(text):
    return "".join(c for c in text if c.isalnum())


def slow_eights(text):
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return [tuple(words[at : at + 8]) for at in range(len(words) - 7)]


def corpus_of(folder, texts):
    path = Path(folder) / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Files([path], "text")


def items_of(*texts, files=None):
    files = files or [0] * len(texts)
    return Items(
        list(texts), [*range(1, len(texts) + 1)], np.array(files), [f"{n}.jsonl" for n in range(max(files) + 1)]
    )


def written(path, key="text"):
    return [json.loads(line)[key] for line in path.read_text().split("\n")[:-1]]


@pytest.fixture
def clean(tmp_path):
    """Cleans documents; returns the remaining text and the report."""

    def call(documents, items=(ITEM,), workers=1):
        output = tmp_path / "clean.jsonl"
        report = decontaminate(corpus_of(tmp_path, documents), items_of(*items), PUBLISHED, output, workers)
        return written(output), report

    return call


@pytest.fixture
def overlap(tmp_path):
    """Compares items with documents; returns the report's lines and counts."""

    def call(documents, *items, files=None, **kwargs):
        output = tmp_path / "overlap.jsonl"
        kwargs = {"workers": 1} | kwargs
        report = measure(corpus_of(tmp_path, documents), items_of(*items, files=files), output, **kwargs)
        return [json.loads(line) for line in output.read_text().splitlines()], report

    return call


def filler(size, seed=0):
    """Text of `size` characters that occurs in no item."""
    rng = random.Random(seed)
    text = " ".join("".join(rng.choices("bcdfg", k=rng.randint(3, 9))) for _ in range(size))[:size]
    return text[:-1] + "b"


# The filter


def test_a_shared_ngram_is_removed_with_200_characters_on_each_side(clean):
    before, after = filler(1000, 1), filler(700, 2)
    texts, report = clean([f"{before} {ITEM} {after}", "short and kept"])
    assert texts == [before[:-199], after[199:], "short and kept"]
    assert report["documents"] == {"read": 2, "unchanged": 1, "cut": 1, "dropped": 0, "left_without_pieces": 0}
    assert report["pieces"] == {"kept": 2, "too_short": 0}
    assert report["characters"]["removed"] == len(ITEM) + 400
    assert report["ngrams"] == {"words": 13, "different": 1, "found": 1, "ignored": 0}


@pytest.mark.parametrize(
    "spelled",
    [
        ITEM.upper(),
        ITEM.replace(" ", "\n"),
        ITEM.replace(" ", " \r\n\t\u3000"),
        ITEM.replace("fox", "«fox»").replace("dog", "„dog“…"),
        ITEM.replace("quick", "qu-ick").replace("lazy", "la’zy"),
        ITEM.replace(" over", " — & ! over"),
        "“" + ITEM.title().replace(" ", ", ") + "?!”",
    ],
)
def test_case_punctuation_and_white_space_are_ignored(clean, spelled):
    before, after = filler(500, 1), filler(500, 2)
    texts, _ = clean([f"{before} {spelled} {after}"])
    assert texts == [before[:-199], after[199:]]


@pytest.mark.parametrize("spelled", [ITEM.replace("quick", "qu ick"), ITEM.replace("fox", "f€x"), ITEM[4:], ITEM[:-5]])
def test_different_words_or_only_twelve_are_kept(clean, spelled):
    text = f"{filler(500)} {spelled} {filler(500)}"
    assert clean([text])[0] == [text]


def test_a_longer_overlap_is_one_cut(clean):
    item = " ".join(f"w{n}" for n in range(40))
    before, after = filler(500, 1), filler(500, 2)
    texts, report = clean([f"{before} {item} {after}"], [item])
    assert texts == [before[:-199], after[199:]] and report["ngrams"]["found"] == 28


@pytest.mark.parametrize("between", [1, 399, 400, 401, 599, 600, 601])
def test_a_piece_between_cuts_is_kept_from_200_characters(clean, between):
    before, middle, after = filler(500, 1), " " + filler(between, 3)[1:-1] + " ", filler(500, 2)
    middle = middle if between > 1 else " "
    assert len(middle) == between
    texts, report = clean([f"{before} {ITEM}{middle}{ITEM} {after}"])
    expected = [before[:-199], after[199:]]
    if between >= 600:
        expected.insert(1, middle[200:-200])
    assert texts == expected
    assert report["pieces"] == {"kept": len(expected), "too_short": int(400 < between < 600)}


def test_overlaps_at_the_ends_of_a_document_leave_at_most_one_piece(clean):
    text = filler(500)
    texts, report = clean([f"{ITEM} {text}", f"{text} {ITEM}", ITEM, f"a {ITEM} b"])
    assert texts == [text[199:], text[:-199]]
    assert report["documents"]["left_without_pieces"] == 2 and report["pieces"]["too_short"] == 0


@pytest.mark.parametrize(("size", "long_enough"), [(199, False), (200, True)])
def test_pieces_shorter_than_200_characters_are_dropped(clean, size, long_enough):
    texts, report = clean([filler(size + 199) + " " + ITEM])
    assert [len(text) for text in texts] == [size] * long_enough
    assert report["pieces"] == {"kept": int(long_enough), "too_short": int(not long_enough)}


@pytest.mark.parametrize("pieces", [9, 10, 11])
@pytest.mark.parametrize("size", [401, 700])  # leaves pieces of 1 or 300 characters between overlaps
def test_documents_in_more_than_ten_pieces_are_dropped(clean, pieces, size):
    middle = f" {filler(size - 2)} "
    text = filler(500) + " " + (ITEM + middle) * (pieces - 2) + ITEM + " " + filler(500)
    texts, report = clean([text])
    assert report["documents"]["dropped"] == int(pieces > 10)
    assert len(texts) == (0 if pieces > 10 else 2 if size == 401 else pieces)


@pytest.mark.parametrize("documents", [10, 11])
def test_ngrams_in_more_than_ten_documents_are_kept(clean, documents):
    texts = [f"{filler(500, n)} {ITEM} {ITEM} {filler(500, n + 100)}" for n in range(documents)]
    cleaned, report = clean(texts)
    assert report["ngrams"]["ignored"] == int(documents > 10)
    assert cleaned == texts if documents > 10 else len(cleaned) == 20
    assert report["files"][0]["documents"] == (0 if documents > 10 else 10)


def test_a_common_ngram_is_removed_only_where_it_overlaps_a_rare_one(clean):
    item = ITEM + " hill"  # two n-grams; the first is common
    texts = [f"{filler(300, n)} {ITEM} {filler(300, n + 50)}" for n in range(10)]
    cleaned, report = clean([*texts, f"{filler(500, 98)} {item} {filler(500, 99)}"], [item])
    assert cleaned == [*texts, filler(500, 98)[: -199 + 4], filler(500, 99)[199:]]
    assert report["ngrams"] == {"words": 13, "different": 2, "found": 2, "ignored": 1}


def test_the_report_counts_by_file(tmp_path):
    items = items_of(ITEM, "too short", f"{ITEM} hill", "a b", files=[0, 0, 1, 2])
    documents = corpus_of(tmp_path, [f"{filler(500)} {ITEM}", f"{filler(500)} {ITEM[4:]} hill", f"{ITEM} hill"])
    report = decontaminate(documents, items, FilterSettings(), tmp_path / "clean.jsonl", 1)
    columns = ("items", "items_too_short", "ngrams", "ngrams_found", "ngrams_ignored", "documents")
    assert [[entry[column] for column in columns] for entry in report["files"]] == [
        [2, 1, 1, 1, 0, 2],
        [1, 0, 2, 2, 0, 3],
        [1, 1, 0, 0, 0, 0],
    ]
    assert [entry["file"] for entry in report["files"]] == ["0.jsonl", "1.jsonl", "2.jsonl"]


def test_items_that_are_all_too_short_are_refused(clean):
    with pytest.raises(UserError, match="no item has 13 words"):
        clean(["a"], ["one two three"])


texts = st.lists(st.text("ab,.A’ \n", max_size=60) | st.text(max_size=20), max_size=6)


@settings(max_examples=40, deadline=None)
@given(texts, texts.map(lambda items: [*items, "a b a"]))
def test_the_filter_equals_a_slow_one(documents, items):
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "clean.jsonl"
        report = decontaminate(corpus_of(folder, documents), items_of(*items), SMALL, output, 1)
        expected, counts = slow_clean(documents, items, SMALL)
        assert written(output) == expected
        assert report["documents"] == counts
        assert report["characters"]["written"] == sum(map(len, expected))


@given(st.integers(0, 60), st.sets(st.integers(0, 59)), st.integers(1, 9), st.integers(0, 9))
def test_pieces_are_the_uncut_characters(length, starts, size, window):
    hits = [(start, start + size) for start in sorted(starts) if start + size <= length]
    uncut = set(range(length)) - {n for a, b in hits for n in range(a - window, b + window)}
    pieces = pieces_of(length, hits, window)
    assert [n for a, b in pieces for n in range(a, b)] == sorted(uncut)
    assert all(a < b for a, b in pieces) and all(b < c for (_, b), (c, _) in zip(pieces, pieces[1:]))


def test_processes_block_sizes_and_caches_change_nothing(tmp_path, monkeypatch):
    rng = random.Random(3)
    documents = [" ".join(rng.choices("abc,", k=rng.randint(0, 300))) for _ in range(60)]
    items = items_of(*(" ".join(rng.choices("abc", k=14)) for _ in range(300)), files=[0] * 100 + [1] * 200)
    corpus = corpus_of(tmp_path, documents)
    sets = FilterSettings(words=7, window=3, shortest_piece=5, most_documents=20)
    results = []
    for workers, batch, block, cached in ((1, 2**20, 2**16, 2**18), (2, 500, 7, 3), (3, 64, 64, 1)):
        for name, value in (("BATCH", batch), ("BLOCK", block), ("CACHED", cached)):
            monkeypatch.setattr(contamination_module, name, value)
        monkeypatch.setattr(contamination, "_word_keys", contamination._WordKeys())
        paths = tmp_path / f"{workers}c.jsonl", tmp_path / f"{workers}m.jsonl"
        reports = (
            decontaminate(corpus, items, sets, paths[0], workers),
            measure(corpus, items, paths[1], workers=workers),
        )
        results.append((reports, [path.read_bytes() for path in paths]))
    assert results[0] == results[1] == results[2] and results[0][0][0]["documents"]["cut"]


def test_a_killed_process_is_reported_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="lack of memory: --workers=1 needs less"):
        list(contamination._each_batch(corpus_of(tmp_path, ["a"]), lambda texts: os._exit(9), 2, "ending"))


def test_an_interruption_leaves_no_file(tmp_path, monkeypatch):
    corpus, items = corpus_of(tmp_path, [filler(300), ITEM]), items_of(ITEM)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(contamination.json, "dumps", stop)  # where a line is written
    output = tmp_path / "new.jsonl"
    for make in (decontaminate, corpus, items, PUBLISHED, output), (measure, corpus, items, output):
        with pytest.raises(KeyboardInterrupt):
            make[0](*make[1:])
        assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_an_input_that_can_be_read_only_once_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a file that can be read twice"):
        decontaminate(Files([tmp_path / "pipe"], "text"), items_of(ITEM), FilterSettings(), tmp_path / "a.jsonl")


# Words, characters and windows of them


def test_words_are_lowercase_without_punctuation():
    spelled = ["Don't", "«ÉTÉ»!", "3.5%", "$5", "a_b", "—", "...", "¿Qué?", "x²", "日本。", "€", "e\u0301"]
    assert [word_of(token) for token in spelled] == [
        *("dont", "été", "35", "5", "ab", "", "", "qué", "x²", "日本", "€", "e\u0301")
    ]


@given(st.text())
def test_words_equal_a_slow_implementation(text):
    vocabulary = Vocabulary()
    sequences = words_of([text, "", text], vocabulary)
    names = {number: word for word, number in vocabulary.words.items()}
    words = [word for word, _, _ in slow_words(text)]
    assert [names.get(number) for number in sequences.numbers] == [*words, None, None, *words, None]
    assert sequences.lengths.tolist() == [len(words), 0, len(words)] and SEPARATOR not in names
    vocabulary.growing = False
    assert words_of(["hitherto-unheard"], vocabulary).numbers.tolist() == [SEPARATOR, SEPARATOR]
    assert vocabulary == pickle.loads(pickle.dumps(vocabulary))


def test_long_strings_are_compared_but_not_cached(clean):
    vocabulary, data = Vocabulary(), "0123456789abcdef" * 1000
    assert words_of([f"a {data} a {data}", "b"], vocabulary).numbers.tolist() == [1, 2, 1, 2, 0, 3, 0]
    assert list(vocabulary) == ["a", "b"]
    assert len(filter_keys([f"{data} " * 9])[0]) == 2 and data not in contamination._word_keys
    item = ITEM.replace("fox", data)
    assert clean([f"{filler(500)} {item}"], [item])[0] == [filler(500)[:-199]]


def test_batches_of_empty_documents_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(contamination, "BATCH", 640)
    corpus = corpus_of(tmp_path, [""] * 25 + ["x" * 5000, "y"])
    assert [(len(texts), size) for texts, size in contamination._batches(corpus)] == [(10, 640)] * 2 + [
        (6, 5384),
        (1, 65),
    ]


def test_all_punctuation_is_removed():
    marks = [chr(n) for n in range(0x110000) if unicodedata.category(chr(n)).startswith("P")]
    assert word_of("".join(marks) + string.punctuation) == "" and len(marks) > 800


@given(st.text())
def test_letters_equal_a_slow_implementation(text):
    assert "".join(map(chr, letters_of(text))) == slow_letters(text)


@pytest.mark.parametrize("block", [1, 5, 2**16])
@pytest.mark.parametrize("length", [1, 2, 13, 50])
def test_windows_are_found_at_every_occurrence(monkeypatch, block, length):
    monkeypatch.setattr(contamination, "BLOCK", block)
    rng = np.random.default_rng(length)
    indexed = rng.integers(1, 3, 300).astype(np.int32)
    searched = np.concatenate(
        (rng.integers(0, 3, 200), indexed[100:180], rng.integers(1, 3, 50), indexed[-60:])
    ).astype(np.int32)
    starts = np.sort(rng.choice(300 - length + 1, 60, replace=False))
    index = WindowIndex(indexed, starts, length)
    windows = [tuple(indexed[start : start + length]) for start in starts]
    assert index.count == len(set(windows))
    number_of = dict(zip(windows, index.numbers.tolist()))
    assert len(set(number_of.values())) == index.count and len(set(zip(windows, index.numbers))) == index.count
    expected = [(at, number_of.get(tuple(searched[at : at + length]))) for at in range(len(searched) - length + 1)]
    places, numbers = index.find(searched)
    assert list(zip(places.tolist(), numbers.tolist())) == [pair for pair in expected if pair[1] is not None] != []


def test_hash_collisions_have_no_effect(monkeypatch):
    mixed = contamination._mixed
    monkeypatch.setattr(contamination, "_mixed", lambda numbers, seed: mixed(numbers, seed) * np.uint64(seed > 0))
    one = WindowIndex(np.array([1, 2, 3], np.int32), np.array([0]), 3)
    assert one.seed == 0 and one.find(np.array([3, 2, 1, 2, 3, 3], np.int32))[0].tolist() == [2]
    two = WindowIndex(np.array([1, 2, 3, 4], np.int32), np.array([0, 1]), 3)
    assert two.seed == 1 and two.count == 2 and two.find(np.array([1, 2, 3, 4], np.int32))[0].tolist() == [0, 1]


# GPT-3's clean and dirty items


@given(st.lists(st.integers(0, 40), min_size=1, max_size=300))
def test_n_is_the_fifth_percentile_between_8_and_13(lengths):
    exact = np.percentile(np.array(lengths), 5)
    assert words_compared(lengths) == min(max(int(exact + 1e-9), 8), 13)


def test_n_by_hand():
    assert words_compared([3] * 100) == 8 and words_compared([100]) == 13
    assert words_compared([9] + [12] * 20) == 12 and words_compared([9] * 2 + [12] * 19) == 9
    assert words_compared([9, 12]) == 9 and words_compared([8, *[28] * 10]) == 13  # 8 + half of 20, cut to 13
    assert words_compared([8, *[14] * 10]) == 11


def test_an_item_is_dirty_if_n_of_its_words_are_in_the_corpus(overlap):
    ten = [" ".join(f"{name}{n}" for n in range(10)) for name in "abcdef"]
    corpus = [
        f"X {ten[0]} y".upper(),
        " ".join(ten[1].split()[1:]),
        " ".join(ten[2].split()[:5]) + "\n" + ", ".join(ten[2].split()[5:9]),
        " ".join(ten[3].split()[:5]),
        " ".join(ten[3].split()[5:]),
        " ".join(ten[4].split()[:5]) + " x " + " ".join(ten[4].split()[5:]),
        "q w",
    ]
    lines, report = overlap(corpus, *ten, methods=["gpt3"])
    assert [line["gpt3_dirty"] for line in lines] == [True, False, False, False, False, False]
    assert report["files"][0]["gpt3"] == {"words": 10, "dirty": 1, "clean": 5}
    lines, report = overlap(corpus, "W!", "Q w", "w q", "", "—", *ten, methods=["gpt3"])
    assert [line["gpt3_dirty"] for line in lines] == [True, True, False, False, False, True, True, True, *[False] * 3]
    assert report["files"][0]["gpt3"]["words"] == 8


def test_every_file_has_its_own_n(overlap):
    twelve = " ".join(f"t{n}" for n in range(12))
    items = [f"{twelve} end of it", f"{twelve[:-4]} and"]
    lines, report = overlap([twelve], *items, items[0], files=[0, 1, 1], methods=["gpt3"])
    assert [entry["gpt3"]["words"] for entry in report["files"]] == [13, 12]
    assert [line["gpt3_dirty"] for line in lines] == [False, False, True]
    assert [(line["file"], line["item"]) for line in lines] == [("0.jsonl", 1), ("1.jsonl", 2), ("1.jsonl", 3)]


# GPT-2's filter


@pytest.mark.parametrize("rate", [pytest.param(1e-2, marks=pytest.mark.slow), 1e-4])
def test_the_bloom_filter_has_all_keys_and_few_false_positives(rate):
    size = int(2**25 / (-np.log(rate / 2) / np.log(2) ** 2))  # full, at the smallest size
    keys = np.random.default_rng(0).integers(0, 2**63, 2 * size + 2**20, dtype=np.uint64)
    bloom = BloomFilter(size, rate)
    assert bloom.size == 2**25
    bloom.add(keys[:100_000])
    assert bloom.contains(keys[:100_000]).all()
    for at in range(100_000, size, 2**19):
        bloom.add(keys[at : min(at + 2**19, size)])
    wrong = int(bloom.contains(keys[size : size + 2**20]).sum())
    assert wrong <= rate * 2**20 and wrong >= rate * 2**20 / 8


def test_a_million_keys_give_no_false_positive_at_the_default_rate():
    keys = np.random.default_rng(2).integers(0, 2**63, 1_300_000, dtype=np.uint64)
    bloom = BloomFilter(300_000)
    bloom.add(keys[:300_000])
    assert bloom.contains(keys[:300_000]).all() and not bloom.contains(keys[300_000:]).any()
    assert BloomFilter(10**6).size / 10**6 == pytest.approx(39.8, abs=0.1) and BloomFilter(10**6).probes == 28
    assert BloomFilter(0).contains(keys[:10]).tolist() == [False] * 10


def test_the_percentage_counts_every_8_gram_of_letters_and_digits(overlap):
    corpus = ["A b c_d e-f g... H i j", "k l m n", "o p q r s t u v"]
    items = ["a-b; c d E f'g h I", "k l m n o p q r", "a b c d e f", "o p q r s t u v o p q r s t u v"]
    lines, report = overlap(corpus, *items, methods=["gpt2"])
    assert [(line["gpt2_ngrams"], line["gpt2_found"]) for line in lines] == [(2, 2), (1, 0), (0, 0), (9, 2)]
    assert report["files"][0]["gpt2"] == {"ngrams": 12, "found": 4, "percent": 100 * 4 / 12}
    assert overlap(corpus, "a b", methods=["gpt2"])[1]["files"][0]["gpt2"]["percent"] is None


@given(st.lists(st.text("ab1_.A é\n", max_size=60), max_size=5))
def test_keys_are_equal_exactly_where_8_grams_are(texts):
    keys, owners = filter_keys(texts)
    expected = [(number, gram) for number, text in enumerate(texts) for gram in slow_eights(text)]
    assert owners.tolist() == [number for number, _ in expected]
    grams = [gram for _, gram in expected]
    assert len(set(zip(keys.tolist(), grams))) == len(set(keys.tolist())) == len(set(grams))


# GPT-4's substrings


def test_substrings_are_three_of_50_characters_at_different_places():
    letters = np.arange(1, 301)
    for seed in map(str, range(100)):
        chosen = substrings_of(letters, seed)
        begins = [part[0] for part in chosen]
        assert len(set(begins)) == 3 and begins == sorted(begins)
        assert all(part.tolist() == list(range(part[0], part[0] + 50)) for part in chosen)
    begins = [part[0] for seed in range(3000) for part in substrings_of(letters, str(seed))]
    assert min(begins) == 1 and max(begins) == 251 and np.mean(begins) == pytest.approx(126, abs=4)
    assert [len(substrings_of(letters[:size], "")) for size in (0, 1, 49, 50, 51, 52, 53)] == [0, 1, 1, 1, 2, 3, 3]
    assert [part.tolist() for part in substrings_of(letters[:49], "")] == [letters[:49].tolist()]


def test_spaces_and_symbols_are_ignored_but_case_and_letters_count(overlap):
    item = "It was a bright cold day in April, and the clocks were striking thirteen (13)."
    whole = f"He wrote: “{item}”"
    for corpus, expected in (
        ([whole], True),
        ([item.replace(" ", "\n\t— ")], True),
        (["Itwasabright…colddayinApril|andtheclocksWERE".replace("WERE", "were") + "strikingthirteen13"], True),
        ([whole.upper()], False),
        ([whole.replace("c", "k")], False),
        ([whole[:45], whole[45:]], False),  # two documents
    ):
        lines, report = overlap(corpus, item, methods=["gpt4"])
        assert [line["gpt4_contaminated"] for line in lines] == [expected]
        assert report["files"][0]["gpt4"] == {"contaminated": int(expected), "clean": int(not expected)}


def test_a_short_item_is_compared_whole_and_one_without_letters_is_clean(overlap):
    lines, _ = overlap(["the cat\nsat.", "on"], "cats", "Cats", "at", "onthe", "", "?!", "saton", methods=["gpt4"])
    assert [line["gpt4_contaminated"] for line in lines] == [True, False, True, False, False, False, False]


def test_the_drawn_substrings_depend_only_on_item_and_seed(overlap):
    rng = random.Random(0)
    items = ["".join(rng.choices("abcdefgh", k=150)) for _ in range(40)]
    corpus = [item[:75] for item in items]  # contains some of the substrings
    results = [line["gpt4_contaminated"] for line in overlap(corpus, *items, methods=["gpt4"])[0]]
    reversed_results = [line["gpt4_contaminated"] for line in overlap(corpus, *items[::-1], methods=["gpt4"])[0]][::-1]
    other_seed = [line["gpt4_contaminated"] for line in overlap(corpus, *items, methods=["gpt4"], seed=1)[0]]
    assert results == reversed_results != other_seed and 5 < sum(results) < 39


@settings(max_examples=40, deadline=None)
@given(texts, texts.map(lambda items: [*items, "a"]))
def test_the_report_equals_a_slow_one(documents, items):
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "overlap.jsonl"
        report = measure(corpus_of(folder, documents), items_of(*items), output, workers=1)
        lines = [json.loads(line) for line in output.read_text().splitlines()]
    document_words = [[word for word, _, _ in slow_words(text)] for text in documents]
    words = [[word for word, _, _ in slow_words(text)] for text in items]
    letters = [slow_letters(text) for text in documents]
    eights = {gram for text in documents for gram in slow_eights(text)}
    n = words_compared([len(part) for part in words])
    assert report["files"][0]["gpt3"]["words"] == n and len(lines) == len(items)
    for item, line, item_words in zip(items, lines, words):
        size = min(n, len(item_words))
        grams = {tuple(item_words[at : at + size]) for at in range(len(item_words) - size + 1)} if item_words else set()
        dirty = any(
            tuple(part[at : at + size]) in grams for part in document_words for at in range(len(part) - size + 1)
        )
        assert line["gpt3_dirty"] == (dirty and bool(item_words))
        assert line["gpt2_ngrams"] == len(slow_eights(item))
        assert line["gpt2_found"] == sum(gram in eights for gram in slow_eights(item))
        chosen = ["".join(map(chr, part)) for part in substrings_of(letters_of(item), f"0 {item}")]
        assert line["gpt4_contaminated"] == any(part in text for part in chosen for text in letters)


# Items


def test_items_are_lines_of_json_or_whole_texts(tmp_path):
    rows = [
        {"id": 7, "question": "Why?", "choices": ["a", {"text": "b"}], "more": None},
        {"question": "\ud83d"},
        "bare",
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("\ufeffa text\nof two lines\n")
    items = read_items([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    assert items.texts == ["Why?\na\nb", "\ufffd", "bare", "a text\nof two lines\n"]
    assert items.numbers == [1, 3, 5, 1] and items.file_of.tolist() == [0, 0, 0, 1]
    assert items.files == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    assert read_items([tmp_path / "a.jsonl"], ["choices", "id"]).texts == ["a\nb"]


@pytest.mark.parametrize(
    ("name", "content", "fields", "sentence"),
    [
        ("a.jsonl", '{"a": "b"}\nno json\n', [], "a.jsonl:2 is not a line of JSON: Expecting value"),
        (
            "a.jsonl",
            '{"a": "b", "c": 1}\n',
            ["d"],
            "a.jsonl:1 has no field 'd': its fields are 'a', 'c'; change --item_fields",
        ),
        ("a.jsonl", '["a"]', ["d"], "a.jsonl:1 is not an object with fields"),
        ("a.jsonl", "\n", [], "a.jsonl contains no items"),
        ("a.txt", " \n", [], "a.txt contains no items"),
        ("a.parquet", "", [], "a.parquet: items can only be read from .jsonl and text files"),
    ],
)
def test_bad_items_are_refused_with_file_and_line(tmp_path, name, content, fields, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_items([tmp_path / name], fields)
    assert sentence in str(error.value) and "\n" not in str(error.value)
