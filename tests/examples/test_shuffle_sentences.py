"""examples/shuffle_sentences.py: the same sentences in another order, in documents of the same shape."""

import random
from pathlib import Path

import numpy as np
import pytest

import shuffle_sentences
from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.errors import entry_point
from helpers import write_dataset

END = 256
BYTES = BPETokenizer({bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": END})
DOCUMENTS = [
    "First of all. Then more.\nA paragraph of its own.",
    "See e.g. this one. Or that! What of it? Nothing.",
    "Just words.",
    *(f"Number {i} is here. It follows {i}." for i in range(20)),
]
MAIN = entry_point(shuffle_sentences.main)


def pieces(text):
    return [paragraph.replace("e.g. ", "e.g.").replace("! ", ". ").replace("? ", ". ").split(". ")
            for paragraph in text.split("\n")]  # fmt: skip


def test_sentences_move_and_shapes_stay():
    shuffled = shuffle_sentences.shuffled(DOCUMENTS, random.Random(0))
    shapes = [[len(paragraph) for paragraph in pieces(text)] for text in DOCUMENTS]
    assert [[len(paragraph) for paragraph in pieces(text)] for text in shuffled] == shapes
    assert sorted(" ".join(shuffled).split()) == sorted(" ".join(DOCUMENTS).split())
    text = "\n".join(shuffled)
    assert "See e.g. this one." in text and all(f"It follows {i}." in text for i in range(20))  # whole sentences
    assert sum(f"Number {i} is here. It follows {i}." in text for i in range(20)) < 5
    assert shuffle_sentences.shuffled(DOCUMENTS, random.Random(0)) == shuffled


@pytest.fixture
def ordered(tmp_path, monkeypatch):
    """A folder with data/ordered."""
    monkeypatch.chdir(tmp_path)
    tokens = np.concatenate([[*BYTES.encode(text), END] for text in DOCUMENTS])
    write_dataset(Path("data/ordered"), BYTES, {"train": tokens, "val": tokens[:100]})
    return tokens


def test_the_dataset_differs_in_the_order_of_training_alone(ordered, output_of):
    for _ in range(2):  # the second time it replaces the first
        output = output_of(MAIN, "shuffle_sentences.py", "ordered", "--name=shuffled", "--seed=3")
        assert output == f"data/shuffled: 23 documents, {len(ordered):,} tokens in the train split\n"
    corpus = open_corpus([Source("shuffled", 1.0)], verify=True)
    assert corpus and corpus.tokenizer == BYTES
    folder = corpus.directories[0]
    assert np.array_equal(TokenFiles(folder, "val").read(0, 100), ordered[:100])
    train = corpus.split("train", 16, 257, True).read(0, len(ordered))
    assert sorted(train.tolist()) == sorted(ordered.tolist()) and not np.array_equal(train, ordered)
    texts = [BYTES.decode(part[:-1].tolist()) for part in np.split(train, np.flatnonzero(train == END) + 1)[:-1]]
    assert texts == shuffle_sentences.shuffled(DOCUMENTS, random.Random(3))


def test_mistakes_are_refused(ordered, output_of):
    refused = output_of(MAIN, "shuffle_sentences.py", "ordered", "--name=ordered")
    assert "ordered would replace the dataset in order: choose another --name" in refused
    assert "there is no dataset none" in output_of(MAIN, "shuffle_sentences.py", "none", "--name=shuffled")
    letters = CharTokenizer("abc")
    write_dataset(Path("data/letters"), letters, {"train": np.array([0, 1, 2]), "val": np.array([0, 1, 2])})
    refused = output_of(MAIN, "shuffle_sentences.py", "letters", "--name=shuffled")
    assert "data/letters has no token between its documents: prepare it with a BPE tokenizer" in refused
