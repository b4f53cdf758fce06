"""The preparation benchmark: the forms of a corpus hold the same text, and the figures follow from their times."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import prepare as prepare_module
from benchmarks.prepare import Cost, cost, figures, write_corpora
from gpt_arc.data.documents import Files
from gpt_arc.data.tokenizer import BPETokenizer
from gpt_arc.errors import entry_point
from tools import bench


def test_the_forms_of_a_corpus_hold_the_same_documents(tmp_path):
    pytest.importorskip("pyarrow")
    texts = [f"document {number} größer\n" for number in range(3000)]
    cases = ("lines", "text", "zst", "parquet")
    size, documents = write_corpora(iter(texts), 40_000, tmp_path, cases)
    assert 40_000 <= size < 40_030 and sum(len(text.encode()) for text in texts[:documents]) == size
    for case in cases:
        pieces = [text for text, _ in Files([tmp_path / prepare_module.FILES[case]], "text").pieces("never")]
        expected = texts[:documents]
        assert pieces == (["".join(text + "\n" for text in expected)] if case == "text" else expected)


def test_ours_the_peer_and_the_floors_are_measured(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    texts = [f"document {number} " * 200 for number in range(50)]
    Path("a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    os.makedirs("data/mine")
    BPETokenizer.train(texts, 300).save(Path("data/mine"))
    calls = []

    def prepared(folder, case, tokenizer):
        dataset = folder / "data" / case
        dataset.mkdir(parents=True, exist_ok=True)
        (dataset / "train_000000.bin").write_bytes(b"x" * 1000)
        calls.append((case, tokenizer))
        return 123.0

    monkeypatch.setattr(prepare_module, "prepare", prepared)
    flags = "--input a.jsonl --field=body --megabytes=1 --peer_megabytes=1 --rounds=2 --cases lines char".split()
    output = output_of(entry_point(bench.main), "bench.py", "prepare", *flags, "--tokenizer=mine", "--json=r.json")
    results = json.loads(Path("r.json").read_text())
    assert calls == [("lines", str(tmp_path / "data/mine")), ("char", str(tmp_path / "data/mine"))] * 2
    assert "1 MB in" in output
    rows = {line[:28].strip(): line[28:].split() for line in output.splitlines()[2:]}
    programs = results["programs"]
    assert list(rows) == list(programs) and "engine alone" in rows and "char: reading and writing" in rows
    assert "char: both at once" in rows and "characters alone" in rows
    for program, row in programs.items():
        rate = row["megabytes_per_second"]
        assert rate["min"] <= rate["median"] <= rate["max"]
        assert row["seconds"] == pytest.approx(results["bytes"] / 1e6 / rate["median"])
        assert row["peak_megabytes"] == (123.0 if program in ("lines", "char") else None)
    assert rows["lines"][-1] == "123" and programs["peer"]["of_the_peer"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_figures_follow_from_the_costs():
    costs = {"peer": [Cost(10, 5, 10), Cost(10, 4, 10)], "lines": [Cost(100, 10, 20), Cost(100, 10, 10)]}
    row = figures(costs, {"lines": 200.0}, 100)["lines"]
    assert row["megabytes_per_second"]["median"] == 10 and row["seconds"] == 10
    assert row["of_the_peer"] == {"median": 4.5, "min": 4.0, "max": 5.0}  # 10 against 2 and 2.5 MB/s
    assert row["cpu_seconds"] == pytest.approx(100 / 7.5) and row["by_cpu_time"]["median"] == 7.5


def test_a_form_is_prepared_as_a_user_does_it(tmp_path):
    write_corpora(iter(["one text, and another"] * 50), 1000, tmp_path, ("text", "char"))
    one, megabytes = cost(1e-3, lambda: prepare_module.prepare(tmp_path, "char", "gpt2"))
    assert 0.1 < one.cpu_seconds < 60 and 20 < megabytes < 500 and (tmp_path / "data" / "char" / "meta.json").exists()
