"""The corpus and labelled sets of examples/gpt1_data.py, made from a few packages of the standard library."""

import json
import random
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

import gpt1_data
from gpt_arc.data.documents import Files
from gpt_arc.data.prepare import CorpusSettings, prepare_documents
from gpt_arc.errors import UserError

SIZES = {"train": 40, "val": 4, "test": 12}
COLUMNS = {
    "package": ["text", "label"],
    "follows": ["premise", "hypothesis", "label"],
    "related": ["text_a", "text_b", "label"],
    "next_sentence": ["context", "options", "label"],
}
DOCSTRING = """Fit the :class:`~torch.nn.Module` to *data*.

    It returns ``self``, see [1]_. Others
    are left, e.g. None at all.

    Parameters
    ----------
    x : int
        The number of steps to take.

    .. math:: a formula that nobody reads here

    Args:
        y (int): how many there are of them
            and where they are

    An example of its use::

        some code that is left out of it

    >>> print("what the example prints, too")
    what the example prints, too
    """


@pytest.fixture(scope="module")
def documents():
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("asyncio", "concurrent", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
    everything = [d for name in names for d in gpt1_data.folder_documents(folder / name, f"python.{name}")]
    return list({document.text: document for document in everything if document.text}.values())


@pytest.fixture
def sets(documents, monkeypatch):
    monkeypatch.setattr(gpt1_data, "LABELS", {name: (f"python.{name}.",) for name in ("asyncio", "email")})
    return gpt1_data.labelled_sets(documents, SIZES, seed=0)


def test_docstrings_become_prose():
    assert gpt1_data.cleaned(DOCSTRING) == [
        ["Fit the Module to data."],
        ["It returns self, see.", "Others are left, e.g. None at all."],
        ["The number of steps to take."],
        ["how many there are of them and where they are"],
        ["An example of its use:"],
    ]


def test_docstrings_are_found_wherever_they_are(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_text('"""This one is of a test."""')
    (tmp_path / "broken.py").write_text("def")
    source = '"""It is a module."""\nif True:\n    class A:\n        def f():\n            "It is this method."\n'
    source += 'add_newdoc("here", "exp", """The exponential\nof a number.""")\n'
    source += 'add_docstr(a.sin, r"""The sine\nof it all.""")\n'
    (tmp_path / "__init__.py").write_text(source)
    texts_by_path = {d.path: d.text for d in gpt1_data.folder_documents(tmp_path, "p") if d.text}
    texts = ["It is a module.", "It is this method.", "The exponential of a number.", "The sine of it all."]
    assert texts_by_path == dict(zip(["p", "p.A.f", "p.exp", "p.sin"], texts))


def test_items_are_complete_balanced_and_reproducible(documents, sets):
    for task, splits in sets.items():
        for split, items in splits.items():
            assert len(items) == SIZES[split] and all(list(item) == COLUMNS[task] for item in items)
            counts = Counter(item["label"] for item in items)
            assert len(counts) == (4 if task == "next_sentence" else 2) and len(set(counts.values())) == 1
    assert (
        gpt1_data.labelled_sets(documents, SIZES, seed=0) == sets != gpt1_data.labelled_sets(documents, SIZES, seed=1)
    )


def test_val_and_test_items_are_not_in_the_corpus(documents, sets, tmp_path, monkeypatch):
    meta = gpt1_data.write(tmp_path / "made", documents, {}, sets, seed=0)
    lines = (tmp_path / "made" / "corpus.jsonl").read_text().splitlines()
    corpus = "\n".join(json.loads(line)["text"] for line in lines)
    assert len(lines) == meta["corpus"]["documents"] and len(corpus) > 100_000
    assert json.loads((tmp_path / "made" / "meta.json").read_text()) == meta
    monkeypatch.chdir(tmp_path)  # prepare_documents refuses a corpus without documents for its val split
    prepare_documents(Files([Path("made/corpus.jsonl")], "text"), CorpusSettings(tokenizer="char"), "text")
    for split in ("val", "test"):
        for task in ("related", "next_sentence"):
            for line in (tmp_path / "made" / task / f"{split}.jsonl").read_text().splitlines():
                item = json.loads(line)
                texts = item.get("options") or [item["text_a"], item["text_b"]]
                assert not any(text in corpus for text in texts)


def test_the_labels_are_true(documents, sets):
    texts = [" ".join(document.sentences) for document in documents]
    for item in sets["follows"]["test"]:
        whole = f"{item['premise']} {item['hypothesis']}"
        assert any(whole in text for text in texts) == (item["label"] == "yes")
        assert any(item["premise"] in text for text in texts)
    for item in sets["next_sentence"]["test"]:
        follows = [any(f"{item['context']} {option}" in text for text in texts) for option in item["options"]]
        assert [i for i, follows_here in enumerate(follows) if follows_here] == [item["label"]]
    for item in sets["package"]["test"]:
        assert not re.search("email|asyncio|python", item["text"], re.IGNORECASE)
    files = {" ".join(gpt1_data.opening(d, set(d.sentences), 2)): d.file for d in documents if d.sentences}
    for item in sets["related"]["test"]:
        assert (files[item["text_a"]] == files[item["text_b"]]) == (item["label"] == "yes")


def test_other_labels_replace_one_without_documents(documents, sets):
    usable = gpt1_data.usable_sentences(documents)
    items = list(gpt1_data.package_items(list(documents), usable, 2000, random.Random(0)))
    counts = Counter(item["label"] for item in items)
    few, many = sorted(counts.values())
    assert few < many < 1000 and {item["label"] for item in items[-20:]} == {max(counts, key=lambda name: counts[name])}
    size = (3 * few + many) // 2  # more than twice the fewer
    more = list(gpt1_data.package_items(list(documents), usable, size, random.Random(0)))
    assert len(more) == size and sorted(Counter(item["label"] for item in more).values()) == [few, size - few]


def test_too_few_documents_are_refused(documents, sets):
    with pytest.raises(UserError, match="package: the documents give .* items for test, but 9000 are needed"):
        gpt1_data.labelled_sets(documents, {"test": 9000}, seed=0)


def test_an_unrelated_folder_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "mine").touch()
    monkeypatch.setattr(sys, "argv", ["gpt1_data.py", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="choose another --output"):
        gpt1_data.main()
    assert (tmp_path / "mine").exists()
