"""Datasets keep their bytes: what an earlier version wrote from these texts is written today, whatever encodes it."""

import gzip
import hashlib
import json
import random
from pathlib import Path

import pytest

from gpt_arc.data import prepare as prepare_module
from gpt_arc.data.documents import Files, find_files
from gpt_arc.data.prepare import CorpusSettings, prepare_documents
from gpt_arc.data.tokenizer import BPETokenizer

WORDS = "the of and to a in that is was he for it with as his on be at by I this had not are but from or have an they"
OTHERS = [*"größer 漢字かな交じり文 🌧️ e\u0301 <|endoftext|> 1234567 _x1".split(), "\u00a0", "it's", "\t", "\r\n"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def texts(count):
    rng = random.Random(0)
    words = [*WORDS.split(), *WORDS.split(), *OTHERS]
    pages = []
    for number in range(count):
        chosen = [words[int(rng.random() * len(words))] for _ in range(int(10 ** (1 + 2 * rng.random())))]
        spaces = [" ", " ", " ", "\n", "  ", "\n\n"]
        pages.append(f"{number}" + "".join(spaces[int(rng.random() * 6)] + word for word in chosen))
    return pages


def merges():
    """The tokens of a small vocabulary in merge order: single bytes, then the beginnings of words."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in [f" {word}" for word in WORDS.split()] + ["größer", "漢字", "  ", "\n\n"]:
        content = word.encode()
        tokens += [content[:end] for end in range(2, len(content) + 1) if content[:end] not in tokens]
    return tokens


def save_tokenizers(folder):
    """Three tokenizers: one like GPT-2's, one like Qwen's, and one that puts a space before a text."""
    bpe = BPETokenizer({token: id for id, token in enumerate(merges())}, {"<|endoftext|>": len(merges())})
    (folder / "gpt2-like").mkdir()
    bpe.save(folder / "gpt2-like")
    table = json.loads((folder / "gpt2-like" / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
    table["normalizer"] = {"type": "NFC"}
    write_json(folder / "qwen-like", table)
    table["normalizer"] = None
    table["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    write_json(folder / "prefixing", table)


def write_json(folder, table):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(table))


def write_corpora(folder):
    pages = texts(300)
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in [*pages[:100], None, "", *pages[100:]])
    book = "\n".join(pages).encode()
    contents = {
        "lines/a.jsonl": lines.encode(),
        "packed/a.jsonl.gz": gzip.compress(lines.encode()),
        "book/book.txt": b"\xef\xbb\xbf" + book,
        "texts/empty.txt": b"",
        **{f"texts/{number:03}.txt": text.encode() for number, text in enumerate(pages[:60])},
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


BEFORE = {  # SHA-256 of the token files that commit 8382955 wrote
    ("lines", "char", "hash"): "739cba6353fd24f8",
    ("lines", "char", "tail"): "45298c48ab8f5608",
    ("lines", "gpt2-like", "hash"): "1b4f93a48930cbcf",
    ("lines", "gpt2-like", "tail"): "470eeadb9866d7a9",
    ("lines", "qwen-like", "hash"): "96a0e6c6cc063eb3",
    ("lines", "qwen-like", "tail"): "921a6cf852958824",
    ("lines", "prefixing", "hash"): "b7ede7f3aa41966f",
    ("lines", "prefixing", "tail"): "238328ff128e31f8",
    ("packed", "gpt2-like", "hash"): "1b4f93a48930cbcf",
    ("book", "char", "tail"): "dbade4630e1fd5e3",
    ("book", "gpt2-like", "tail"): "b02bf557e9cbc5ce",
    ("book", "qwen-like", "tail"): "40245f6ef62f4a03",
    ("book", "prefixing", "tail"): "6ce94be846a1754c",
    ("texts", "char", "hash"): "73aafbc3dc6770a7",
    ("texts", "gpt2-like", "hash"): "0648497547480b83",
    ("texts", "gpt2-like", "tail"): "34fe90214e32b125",
    ("texts", "qwen-like", "tail"): "2ab591c95d199fb3",
    ("texts", "prefixing", "tail"): "6b16869bb656b0d9",
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    save_tokenizers(folder)
    write_corpora(folder)
    return folder


def digest_of(dataset):
    digest = hashlib.sha256()
    for path in sorted(dataset.glob("*.bin")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(("corpus", "tokenizer", "split"), BEFORE)
def test_an_earlier_version_wrote_the_same_bytes(corpora, tmp_path, monkeypatch, corpus, tokenizer, split):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_module, "BATCH", 20_000)
    monkeypatch.setattr("gpt_arc.data.documents.PIECE", 5000)
    name = tokenizer if tokenizer == "char" else str(corpora / tokenizer)
    settings = CorpusSettings(tokenizer=name, split=split, val_fraction=0.2, shard_tokens=30_000, workers=3)
    prepare_documents(Files(find_files([str(corpora / corpus)]), "text"), settings, "x")
    assert digest_of(Path("data/x")) == BEFORE[corpus, tokenizer, split]
