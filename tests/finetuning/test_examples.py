"""Labelled files, and sequences made from examples, against figure 1 of GPT-1's paper and slow implementations."""

import csv
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.finetuning.examples import (
    Columns,
    Example,
    SpecialTokens,
    classes_of,
    fitted,
    label_number,
    label_value,
    read_examples,
    sequences_of,
)

SPECIAL = SpecialTokens.after(50_000)
START, DELIMITER, EXTRACT = 50_000, 50_001, 50_002
TEXTS = Columns("text")
PAIR = Columns("premise", "hypothesis")


class Words:
    """A substitute for a tokenizer: one token per word, its length."""

    @staticmethod
    def encode(text):
        return [len(word) for word in text.split()]


class Counted:
    """A substitute for a tokenizer: reads "5 2" as five tokens from 20, that is, 20 to 24."""

    @staticmethod
    def encode(text):
        count, start = map(int, text.split())
        return list(range(10 * start, 10 * start + count))


def sequences(texts, task, max_tokens=512, tokenizer=Words):
    return sequences_of(Example(tuple(texts), None, "here"), task, tokenizer, SPECIAL, max_tokens)


# ---- sequences


def test_the_entailment_example_has_18_tokens_and_is_read_at_position_17():
    texts = "The old man spoke to the young girl", "An elderly person talked to a child"
    (sequence,), cut = sequences(texts, "entailment")
    assert len(sequence) == 18 and sequence.index(EXTRACT) == 17 and not cut
    assert sequence[0] == START and sequence.index(DELIMITER) == 9


@pytest.mark.parametrize(
    ("task", "texts", "expected"),
    [
        ("classification", ["a bb ccc"], [[START, 1, 2, 3, EXTRACT]]),
        ("classification", [""], [[START, EXTRACT]]),
        ("entailment", ["a bb", "ccc"], [[START, 1, 2, DELIMITER, 3, EXTRACT]]),
        (
            "similarity",
            ["a bb", "ccc"],
            [[START, 1, 2, DELIMITER, 3, EXTRACT], [START, 3, DELIMITER, 1, 2, EXTRACT]],
        ),
        (
            "multiple_choice",
            ["a bb", "ccc", "dddd eeeee", ""],
            [
                [START, 1, 2, DELIMITER, 3, EXTRACT],
                [START, 1, 2, DELIMITER, 4, 5, EXTRACT],
                [START, 1, 2, DELIMITER, EXTRACT],
            ],
        ),
    ],
)
def test_layouts_match_figure_1(task, texts, expected):
    assert sequences(texts, task) == (expected, False)


def test_only_texts_beyond_the_maximum_length_are_cut():
    assert sequences(["6 1"], "classification", 8, Counted) == ([[START, *range(10, 16), EXTRACT]], False)
    assert sequences(["7 1"], "classification", 8, Counted) == ([[START, *range(10, 16), EXTRACT]], True)
    assert sequences(["3 1", "2 2"], "entailment", 8, Counted)[1] is False
    whole = [START, 10, 11, 12, DELIMITER, 20, 21, EXTRACT]
    assert sequences(["9 1", "2 2"], "entailment", 8, Counted) == ([whole], True)


def test_cutting_one_option_leaves_the_others_unchanged():
    actual, cut = sequences(["2 1", "1 2", "9 3"], "multiple_choice", 8, Counted)
    assert cut and actual == [
        [START, 10, 11, DELIMITER, 20, EXTRACT],
        [START, 10, 11, DELIMITER, 30, 31, 32, EXTRACT],
    ]


def cut_one_by_one(segments, room):
    """The reference: while there are too many tokens, the longest segment (the last of equals) loses its last token."""
    segments = [list(segment) for segment in segments]
    while len([token for segment in segments for token in segment]) > room:
        victim = segments[0]
        for segment in segments[1:]:
            if len(segment) >= len(victim):
                victim = segment
        victim.pop()
    return segments


@given(st.lists(st.lists(st.integers(0, 99), max_size=30), min_size=1, max_size=3), st.integers(3, 40))
def test_the_longest_segment_is_cut_first(segments, room):
    before = [list(segment) for segment in segments]
    fitting = fitted(segments, room)
    assert fitting == cut_one_by_one(segments, room) and segments == before
    assert sum(map(len, fitting)) == min(room, sum(map(len, segments)))


@given(
    st.sampled_from(["classification", "entailment", "similarity", "multiple_choice"]),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    st.integers(8, 50),
)
def test_cut_sequences_keep_special_tokens_and_part_of_each_text(task, counts, max_tokens):
    texts = [f"{count} {i}" for i, count in enumerate(counts, start=1)]
    texts = texts[: {"classification": 1, "multiple_choice": 3}.get(task, 2)]
    cut_sequences, cut = sequences(texts, task, max_tokens, Counted)
    pairs = task != "classification"
    needed = [1 + sum(counts[i] for i in (0, o)[: 1 + pairs]) + 1 + pairs for o in range(1, len(texts))] or [
        counts[0] + 2
    ]
    assert cut == any(length > max_tokens for length in needed)
    for sequence in cut_sequences:
        assert len(sequence) <= max_tokens and sequence[0] == START and sequence[-1] == EXTRACT
        assert sequence.count(START) == sequence.count(EXTRACT) == 1 and sequence.count(DELIMITER) == pairs
        parts = " ".join(map(str, sequence[1:-1])).split(str(DELIMITER))
        assert all(part.strip() for part in parts)
    if task == "similarity":
        swapped, _ = sequences(texts[::-1], task, max_tokens, Counted)
        assert swapped == cut_sequences[::-1]


def test_an_unknown_character_is_named_with_its_row():
    with pytest.raises(UserError, match=r"train.csv, line 7: the character 'z'"):
        sequences_of(Example(("abz",), None, "train.csv, line 7"), "classification", CharTokenizer("ab"), SPECIAL, 16)


# ---- files

ROWS = [
    {"premise": "it rains", "hypothesis": "it is wet", "label": "yes"},
    {"premise": 'she said "no"', "hypothesis": "she spoke, briefly", "label": "yes"},
    {"premise": "naïve 漢字", "hypothesis": "  spaced  ", "label": "2"},
]


def write(path, rows, encoding="utf-8"):
    """Writes rows in the format of the suffix."""
    with open(path, "w", encoding=encoding, newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines("\t".join(map(str, cells)) + "\n" for cells in (rows[0], *(row.values() for row in rows)))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_all_formats_give_the_same_examples(tmp_path, suffix, encoding):
    path = write(tmp_path / f"rows.{suffix}", ROWS, encoding)
    examples = read_examples(path, "entailment", PAIR)
    assert [(*e.texts, e.label) for e in examples] == [tuple(row.values()) for row in ROWS]
    first_line = 1 if suffix == "jsonl" else 2
    assert [e.place for e in examples] == [f"{path}, line {first_line + i}" for i in range(3)]


def test_windows_line_ends_are_not_part_of_the_text(tmp_path):
    for suffix, content in (("csv", b"text,label\r\na b,x\r\n"), ("tsv", b"text\tlabel\r\na b\tx\r\n")):
        (tmp_path / f"rows.{suffix}").write_bytes(content)
        (example,) = read_examples(tmp_path / f"rows.{suffix}", "classification", TEXTS)
        assert (example.texts, example.label) == (("a b",), "x")


def test_rows_are_numbered_by_the_line_they_begin_in(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,"label"\n"one\ntwo\nthree",a\n\n"four\nfive",b\nsix,c\n')
    examples = read_examples(path, "classification", TEXTS)
    assert [(e.texts[0], e.label, e.place.removeprefix(str(path))) for e in examples] == [
        ("one\ntwo\nthree", "a", ", line 2"),
        ("four\nfive", "b", ", line 6"),
        ("six", "c", ", line 8"),
    ]
    path.write_text('"long\nname",text,label\n0,"a\nb",x\n0,"c",\n')
    with pytest.raises(UserError, match="line 5: label is empty"):
        read_examples(path, "classification", TEXTS)
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "a", "label": 1}\n\n  \n{"text": "b", "label": 2}\n')
    assert [e.place[-1] for e in read_examples(lines, "classification", TEXTS)] == ["1", "4"]


def test_a_tsv_has_no_quoting(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n"an open quote, and a comma\ta\nhe said "x" to \'y\tb\n')
    assert [(e.texts[0], e.label) for e in read_examples(path, "classification", TEXTS)] == [
        ('"an open quote, and a comma', "a"),
        ('he said "x" to \'y', "b"),
    ]


@pytest.mark.parametrize(
    ("value", "label"),
    [(1, "1"), (0, "0"), (-2.5, "-2.5"), (True, "true"), (False, "false"), (" good ", "good"), ("1", "1")],
)
def test_labels_may_be_numbers_texts_or_booleans(tmp_path, value, label):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": value}])
    assert read_examples(path, "classification", TEXTS)[0].label == label


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_nan_is_a_missing_value_and_never_a_text(tmp_path, suffix):
    path, rows = tmp_path / f"rows.{suffix}", [{"text": "a", "label": math.nan}]
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows[0] if suffix == "jsonl" else rows))
    assert read_examples(path, "classification", TEXTS, labelled=False)[0].label is None
    with pytest.raises(UserError, match="(line|item|row) 1: label is empty"):
        read_examples(path, "classification", TEXTS)


@pytest.mark.parametrize("value", [None, "", "  "])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_missing_label_is_none_or_an_error(tmp_path, value, suffix):
    path = write(tmp_path / f"rows.{suffix}", [{"text": "a", "label": value}])
    assert read_examples(path, "classification", TEXTS, labelled=False)[0].label is None
    with pytest.raises(UserError, match="line .: label is empty"):
        read_examples(path, "classification", TEXTS)
    path = write(tmp_path / f"bare.{suffix}", [{"text": "a"}])
    assert read_examples(path, "classification", TEXTS, labelled=False)[0].label is None


def test_texts_may_be_numbers_and_columns_may_be_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"price": 12, "verdict": "dear", "text": "other"}])
    (example,) = read_examples(path, "classification", Columns("price", label="verdict"))
    assert (example.texts, example.label) == (("12",), "dear")


BAD_ROWS = [
    ("rows.jsonl", '{"text": "a", "label": 1}\n{"text": "a", "label": 1', "line 2: the line is not a JSON object"),
    ("rows.jsonl", '["text"]\n', "line 1: the line is not a JSON object"),
    ("rows.jsonl", '{"txet": "a", "label": 1}', "line 1: there is no column text; the columns are: txet, label"),
    ("rows.jsonl", "{}", "there is no column text; the columns are: none"),
    ("rows.jsonl", '{"text": "a"}', "line 1: there is no column label; the columns are: text"),
    ("rows.jsonl", '{"text": ["a"], "label": 1}', r'line 1: text = \["a"\] is not a text'),
    ("rows.jsonl", '{"text": true, "label": 1}', "line 1: text = true is not a text"),
    ("rows.jsonl", '{"text": "a", "label": [1]}', r"line 1: label = \[1\] is neither a text nor a number"),
    ("rows.csv", "text,label\na,x\nb\n", "line 3: label is empty"),
    ("rows.csv", "text,label\na,x,y\n", "line 2: the row has more columns than the first line"),
    ("rows.csv", "content,label\na,x\n", "line 2: there is no column text; the columns are: content, label"),
    ("rows.tsv", "text,label\na,x\n", "line 2: there is no column text; the columns are: text,label"),
    ("rows.csv", "text,label\n", "rows.csv holds no examples"),
    ("rows.csv", "", "rows.csv holds no examples"),
    ("rows.tsv", "", "rows.tsv holds no examples"),
    ("rows.jsonl", "\n\n", "rows.jsonl holds no examples"),
    ("rows.txt", "a", "rows.txt: examples are read from .jsonl, .json, .csv, .tsv, .parquet files"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_ROWS)
def test_errors_in_a_file_name_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path / name, "classification", TEXTS)


def test_the_first_bad_row_is_named_and_the_others_are_counted(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b"}, {"text": "c", "label": 1}, {"label": 2}, {"text": None}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"line 2: there is no column label.*; 2 more rows of 5 can't be used$"):
        read_examples(path, "classification", TEXTS)


def test_a_missing_file_or_one_that_is_not_utf_8_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="there is no file .*rows.csv"):
        read_examples(tmp_path / "rows.csv", "classification", TEXTS)
    for suffix in ("csv", "jsonl"):
        (tmp_path / f"rows.{suffix}").write_bytes(b"text,label\n" + 5000 * b"abc,1\n" + b"caf\xe9,1\n")
        with pytest.raises(UserError, match="is not UTF-8.* byte 0xE9 at offset 30014"):
            read_examples(tmp_path / f"rows.{suffix}", "classification", TEXTS)


# ---- options

CHOICES = Columns("context", options=("end0", "end1", "end2"))


@pytest.mark.parametrize(
    ("label", "number"),
    [("0", 0), (2, 2), ("A", 0), ("c", 2), ("end1", 1), ("it left", 1), ("then it was gone", 2)],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_an_option_is_labelled_by_number_letter_column_or_text(tmp_path, suffix, label, number):
    row = {"context": "the cat", "end0": "sat", "end1": "it left", "end2": "then it was gone", "label": label}
    (example,) = read_examples(write(tmp_path / f"rows.{suffix}", [row]), "multiple_choice", CHOICES)
    assert example.texts == ("the cat", "sat", "it left", "then it was gone") and example.label == str(number)


@pytest.mark.parametrize("label", ["3", "D", "d", "end3", "sat down", "-1", "1.0", "true"])
def test_a_label_that_matches_no_option_is_refused(tmp_path, label):
    row = {"context": "the cat", "end0": "sat", "end1": "it left", "end2": "then it was gone", "label": label}
    with pytest.raises(UserError, match=f"line 1: the label '{label}' means none of the 3 options"):
        read_examples(write(tmp_path / "rows.jsonl", [row]), "multiple_choice", CHOICES)


def test_options_may_be_a_list_and_a_question_joins_the_context(tmp_path):
    columns = Columns("context", "question", ("options",))
    row = {"context": "It rained.", "question": "Is it wet?", "options": ["yes", "no"], "label": "B"}
    in_csv = row | {"options": json.dumps(row["options"])}
    for path in (write(tmp_path / "rows.jsonl", [row]), write(tmp_path / "rows.csv", [in_csv])):
        (example,) = read_examples(path, "multiple_choice", columns)
        assert example.texts == ("It rained. Is it wet?", "yes", "no") and example.label == "1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("yes", 'options = "yes" is not a list of two texts or more'),
        (["yes"], "is not a list of two texts or more"),
        (["yes", 1], "is not a list of two texts or more"),
        (None, "options is empty"),
    ],
)
def test_invalid_options_are_refused(tmp_path, options, message):
    path = write(tmp_path / "rows.jsonl", [{"context": "a", "options": options, "label": 0}])
    with pytest.raises(UserError, match=message):
        read_examples(path, "multiple_choice", Columns.usual("multiple_choice"))


# ---- labels


def labelled(*labels):
    return [Example(("",), label, f"rows.csv, line {i}") for i, label in enumerate(labels, start=2)]


def test_classes_are_in_numerical_or_alphabetical_order():
    assert classes_of(labelled("10", "9", "-1", "9")) == ("-1", "9", "10")
    assert classes_of(labelled("10", "9", "b", "a")) == ("10", "9", "a", "b")


def test_an_untrained_label_is_refused_with_its_line():
    trained, unknown, none = labelled("b", "x", None)
    assert label_number(trained, ("a", "b")) == 1 and label_number(none, ("a", "b")) == -1
    with pytest.raises(UserError, match="rows.csv, line 3: the label 'x' is not one of the classes trained on: a, b$"):
        label_number(unknown, ("a", "b"))
    with pytest.raises(UserError, match="trained on: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ...$"):
        label_number(unknown, [str(i) for i in range(11)])


def test_a_numeric_label_is_a_finite_number():
    number, none, *wrong = labelled("2.5", None, "high", "nan", "inf")
    assert label_value(number) == 2.5 and math.isnan(label_value(none))
    for example in wrong:
        with pytest.raises(UserError, match=f"the label '{example.label}' is not a number"):
            label_value(example)
