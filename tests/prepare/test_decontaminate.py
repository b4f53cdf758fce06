"""prepare/decontaminate.py as a user runs it, and on a benchmark of realistic size with planted overlaps."""

import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt_arc.data.contamination import FilterSettings
from helpers import ROOT, command
from slow_contamination import slow_clean

SCRIPT = "prepare/decontaminate.py"
ITEM = "one two three four five six seven eight nine ten eleven twelve thirteen"


def write_lines(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def lines_of(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.txt").write_text(f"{'x' * 399}\n{ITEM.upper()}!\n{'y' * 499}")
    write_lines(tmp_path / "pages" / "b.jsonl", ["short", "größer\u2028"])
    write_lines(tmp_path / "items.jsonl", [ITEM, "nothing of it"], "question")
    return tmp_path


def test_a_cleaned_corpus_has_no_overlap(folder):
    result = command(SCRIPT, *"clean --input pages --items items.jsonl --output clean.jsonl".split())
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "3 documents: 2 unchanged, 1 cut, 0 dropped" in result.stdout
    assert "1 13-gram of the items: 1 found, 0 of them ignored" in result.stdout
    assert [row["text"] for row in lines_of("clean.jsonl")] == ["x" * 200, "y" * 300, "short", "größer\u2028"]
    report = json.loads((folder / "clean.report.json").read_text())
    assert report["files"][0]["items_too_short"] == 1
    args = "report --items items.jsonl --item_fields question --workers=1 --output".split()
    for input, common in (("pages", 6), ("clean.jsonl", 0)):
        result = command(SCRIPT, *args, f"{common}.jsonl", "--input", input)
        assert result.returncode == 0 and not result.stderr, result.stderr
        share, dirty = ("100.00", 1) if common else ("0.00", 0)
        assert f"{share}% of 8-grams (gpt2), {dirty} dirty by 8-grams (gpt3), 0 contaminated (gpt4)" in result.stdout
        row = {"file": "items.jsonl", "item": 1, "gpt2_ngrams": 6, "gpt2_found": common}
        assert lines_of(f"{common}.jsonl")[0] == row | {"gpt3_dirty": bool(dirty), "gpt4_contaminated": False}
        report = json.loads((folder / f"{common}.report.json").read_text())
        assert report["files"][0]["gpt3"] == {"words": 8, "dirty": dirty, "clean": 2 - dirty}


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("clean --output=clean.txt", "clean.txt is written as lines of JSON: its name must end in .jsonl"),
        ("clean --output=no/clean.jsonl", "no/clean.jsonl can't be written: there is no folder no"),
        ("clean --output=items.jsonl --overwrite=True", "items.jsonl is one of the input files"),
        ("clean --output=there.jsonl", "there.jsonl already exists: replace it with --overwrite=True"),
        ("clean --output=a.jsonl --item_fields=text", "items.jsonl:1 has no field 'text': its fields are 'question'"),
        ("clean --output=a.jsonl --words=14", "no item has 14 words"),
        ("clean --output=a.jsonl --words=0", "words = 0 must be at least 1"),
        ("clean --output=a.jsonl --workers=0", "workers = 0 must be at least 1"),
        ("clean --output=a.jsonl --seed=2", "--seed has no effect on clean"),
        ("report --output=a.jsonl --words=8", "--words has no effect on report"),
        ("report --output=a.jsonl --methods", 'methods = [] must be a list of 1 or more of "gpt2", "gpt3", "gpt4"'),
        ("neither --output=a.jsonl", '--task = neither must be one of "clean", "report"'),
    ],
)
def test_mistakes_are_refused_in_one_sentence(folder, output_of, args, sentence):
    (folder / "there.jsonl").touch()
    before = sorted(folder.rglob("*"))
    args = [SCRIPT, *args.split(), "--input=pages", "--items=items.jsonl"]
    assert sentence in output_of(lambda: runpy.run_path(str(ROOT / SCRIPT), run_name="__main__"), *args)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(folder):
    write_lines(folder / "many.jsonl", ["some words of a page " * 100] * 10_000)
    before = sorted(folder.iterdir())
    args = "clean --input many.jsonl --items items.jsonl --output clean.jsonl --workers=2".split()
    with subprocess.Popen(
        [sys.executable, ROOT / SCRIPT, *args],
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as run:
        deadline = time.monotonic() + 60
        while not list(folder.glob(".clean.jsonl.*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGINT)  # to the worker processes too, as a terminal does
        errors = run.communicate(timeout=60)[1].decode()
    assert run.returncode == 130 and "interrupted" in errors and "Traceback" not in errors, errors
    assert sorted(folder.iterdir()) == before


class Planting:
    """Random words that never repeat by accident, and items of them to plant."""

    def __init__(self):
        self.random, self.generator = random.Random(0), np.random.default_rng(0)
        self.words = sorted(
            {"".join(self.random.choices("abcdefghijklmnop", k=self.random.randint(3, 9))) for _ in range(20_000)}
        )

    def text(self, count):
        return " ".join([self.words[n] for n in self.generator.integers(0, len(self.words), count)])

    def spelled(self, words):
        """Words with changed case, punctuation and white space."""
        cases = (str, str.upper, str.title)
        marks = ("{}", "{}", "{},", "“{}”", "({})", "{}—", "{}’{}", "… {}", "{}\n")
        spellings = []
        for word in words:
            word, mark = self.random.choice(cases)(word), self.random.choice(marks)
            spellings.append(mark.format(word[:1], word[1:]) if mark.count("{}") == 2 else mark.format(word))
        return self.random.choice((" ", "\n", " \t")).join(spellings)

    def planted(self, parts, words=150):
        """A document of parts, separated and surrounded by `words` words."""
        return " ".join([self.text(words), *(f"{self.spelled(part)} {self.text(words)}" for part in parts)])


def memory_of_session(leader):
    """Bytes held by the processes of a session, shared memory counted once; 0 without /proc."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == leader:
                total += int(re.search(r"^Pss:\s+(\d+)", (path / "smaps_rollup").read_text(), re.M)[1]) * 1024
        except (OSError, TypeError):  # the process has ended
            pass
    return total


@pytest.mark.slow
def test_exactly_the_planted_overlaps_are_found(tmp_path, monkeypatch):
    """50 MB against 100,000 items: under two minutes of two cores per command."""
    monkeypatch.chdir(tmp_path)
    plant = Planting()
    long = [plant.text(plant.random.randint(20, 100)) for _ in range(50_000)]  # N is 13
    short = [plant.text(plant.random.choice([8] * 3 + [20, 30])) for _ in range(50_000)]  # N is 8
    documents, dirty_long, dirty_short = [], set(), set()
    of_long, of_short = iter(range(0, 50_000, 7)), (n for n in range(50_000) if len(short[n].split()) > 12)

    def some(count):
        number = next(of_long)
        words = long[number].split()
        start = plant.random.randint(0, len(words) - count)
        if count >= 13:
            dirty_long.add(number)
        return words[start : start + count]

    for count in [12] * 30 + [13] * 60:
        documents.append(plant.planted([some(count)]))
    for pieces in [9, 10, 11] * 10:
        documents.append(plant.planted([some(13) for _ in range(pieces - 1)]))
    for size in (10, 11):  # one n-gram in `size` documents, next to a rare 13-gram
        common = some(13)
        documents += [plant.planted([common, some(13)] if n % 2 else [common]) for n in range(size)]
    for count in [7] * 30 + [8] * 29:  # too short for the filter
        number = next(of_short)
        words = short[number].split()
        documents.append(plant.planted([words[3 : 3 + count]]))
        if count == 8:
            dirty_short.add(number)
    assert len(documents) == 200
    planted = len(documents)
    size = sum(map(len, documents))
    while size < 50_000_000:
        documents.append(plant.text(plant.random.randint(50, 800)))
        size += len(documents[-1])
    order = list(range(len(documents)))
    plant.random.shuffle(order)
    write_lines(tmp_path / "pages.jsonl", [documents[n] for n in order])
    write_lines(tmp_path / "long.jsonl", long)
    write_lines(tmp_path / "short.jsonl", short)

    def run(*args):
        before, memory = os.times(), 0
        argv = [sys.executable, ROOT / SCRIPT, *args, "--input=pages.jsonl", "--items", "long.jsonl", "short.jsonl"]
        with subprocess.Popen(argv, start_new_session=True) as process:
            while process.poll() is None:
                memory = max(memory, memory_of_session(process.pid))
                time.sleep(0.1)
        after = os.times()
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        print(f"{args[0]}: {size / 1e6:.0f} MB of text, {seconds:.1f} CPU s, {memory / 2**30:.2f} GiB in all processes")
        assert process.returncode == 0 and seconds < 2 * 120

    run("clean", "--output=clean.jsonl")
    planted_at = [n for n in order if n < planted]
    expected, counts = slow_clean([documents[n] for n in planted_at], [*long, *short], FilterSettings())
    untouched_texts = [documents[n] for n in order if n >= planted]
    cleaned = [row["text"] for row in lines_of("clean.jsonl")]
    untouched = set(untouched_texts)
    assert [text for text in cleaned if text not in untouched] == expected
    assert [text for text in cleaned if text in untouched] == untouched_texts
    assert counts["dropped"] == 10 and counts["cut"] == 60 + 20 + 10 + 5 and counts["unchanged"] == 30 + 59 + 6
    documents_counted = json.loads((tmp_path / "clean.report.json").read_text())["documents"]
    counts = counts | {"read": len(documents), "unchanged": counts["unchanged"] + len(untouched_texts)}
    assert documents_counted == counts

    run("report", "--output=overlap.jsonl")
    report = json.loads((tmp_path / "overlap.report.json").read_text())
    assert [entry["gpt3"]["words"] for entry in report["files"]] == [13, 8]
    rows = lines_of("overlap.jsonl")
    dirty = [
        {row["item"] - 1 for row in rows if row["file"] == f"{name}.jsonl" and row["gpt3_dirty"]}
        for name in ("long", "short")
    ]
    assert dirty == [dirty_long, dirty_short]
