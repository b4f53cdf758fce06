"""The preparation scripts as a user runs them."""

import hashlib
import json
import runpy
import sys
import urllib.error
from pathlib import Path

import pytest

from conftest import ROOT
from gpt_arc import corpus
from gpt_arc.data import open_dataset, prepare_dataset
from gpt_arc.errors import UserError
from gpt_arc.token_files import TokenFiles
from gpt_arc.tokenizer import BPETokenizer, load_tokenizer
from prepare import tinyshakespeare


@pytest.fixture
def prepare(tmp_path, monkeypatch, output_of):
    """Run a script of prepare/ in an empty folder; the result is its output, or the sentence that refuses."""
    monkeypatch.chdir(tmp_path)

    def call(script, *args):
        return output_of(lambda: runpy.run_path(str(ROOT / "prepare" / script), run_name="__main__"), script, *args)

    return call


def decoded(folder, split):
    files = TokenFiles(folder, split)
    return load_tokenizer(folder).decode(files.read(0, len(files)).tolist())


def test_the_python_manual_is_the_text_that_python_carries(prepare):
    from pydoc_data.topics import topics

    output = prepare("python_manual.py")
    text = "\n".join(topics.values())
    folder = Path("data/python_manual")
    assert f"{len(text):,} characters" in output
    assert decoded(folder, "train") + decoded(folder, "val") == text
    assert len(decoded(folder, "train")) == len(text) * 9 // 10
    assert "is prepared already" in prepare("python_manual.py")


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("Whan that Aprille\r\nwith his shoures soote 🌧\n".encode() * 20)
    return path


def test_a_text_by_characters(prepare, book):
    prepare("text.py", f"--input={book}", "--name=book", "--tokenizer=char")
    text = book.read_bytes().decode()  # line ends as they are
    folder = Path("data/book")
    assert decoded(folder, "train") == text[: len(text) * 9 // 10]
    assert decoded(folder, "val") == text[len(text) * 9 // 10 :]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["vocab_size"] == len(set(text)) == open_dataset(folder).tokenizer.vocab_size
    assert meta["tokens"] == {"train": len(decoded(folder, "train")), "val": len(decoded(folder, "val"))}


def test_a_folder_by_bpe_ends_every_document(prepare, tmp_path, monkeypatch):
    alphabet = {bytes([byte]): byte for byte in range(256)}
    small = BPETokenizer(alphabet | {b"th": 256, b"the": 257}, {"<|endoftext|>": 258})
    monkeypatch.setattr(corpus.BPETokenizer, "gpt2", lambda: small)
    (tmp_path / "texts" / "below").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text("the second <|endoftext|>")
    (tmp_path / "texts" / "below" / "c.txt").write_text("third")
    (tmp_path / "texts" / "a.txt").write_text("the first")
    (tmp_path / "texts" / "ignored.md").write_text("not this")
    prepare("text.py", "--input", "texts", "--name", "texts", "--tokenizer", "gpt2")
    folder = Path("data/texts")
    tokens = TokenFiles(folder, "train").read(0, len(TokenFiles(folder, "train"))).tolist()
    assert decoded(folder, "train") == "the first<|endoftext|>the second <|endoftext|><|endoftext|>t<|endoftext|>"
    assert decoded(folder, "val") == "hird<|endoftext|>"
    assert tokens.count(258) == 3 and tokens[:2] == [257, ord(" ")]


def test_nothing_is_overwritten_unasked(prepare, book):
    flags = (f"--input={book}", "--name=book", "--tokenizer=char")
    prepare("text.py", *flags)
    assert "is prepared already" in prepare("text.py", *flags)
    book.write_text("another text altogether")
    before = decoded(Path("data/book"), "train")
    assert "exists and holds something else" in prepare("text.py", *flags)
    assert decoded(Path("data/book"), "train") == before
    prepare("text.py", *flags, "--overwrite=True")
    assert decoded(Path("data/book"), "train") != before
    assert [path.name for path in Path("data").iterdir()] == ["book"]


def test_a_damaged_dataset_is_prepared_again(prepare, book):
    flags = (f"--input={book}", "--name=book", "--tokenizer=char")
    prepare("text.py", *flags)
    whole = decoded(Path("data/book"), "train")
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])):
        damage(Path("data/book/train.bin"))
        assert "is prepared already" not in prepare("text.py", *flags)
        assert decoded(Path("data/book"), "train") == whole


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--input=nowhere.txt", "--name=x"], "nowhere.txt can't be read"),
        (["--input=empty.txt", "--name=x", "--tokenizer=char"], "empty.txt has 0 characters"),
        (["--input=latin.txt", "--name=x", "--tokenizer=char"], "latin.txt is not UTF-8 text: byte 0xE9 at offset 3"),
        (["--input=.", "--name=x", "--pattern=*.docx"], "no file below . matches --pattern *.docx"),
        (["--input=.", "--name=x", "--pattern=/etc/*"], "no file below . matches"),
        (["--input=good.txt", "--name=../x"], "must be a plain folder name"),
        (["--input=good.txt", "--name="], "must be a plain folder name"),
        (["--input=good.txt"], "--name"),
        (["--input=good.txt", "--name=x", "--tokenizer=words"], "invalid choice 'words'"),
        (["--input=good.txt", "--nam=x"], "--nam"),
    ],
)
def test_mistakes_are_one_sentence(prepare, tmp_path, args, sentence):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert sentence in prepare("text.py", *args)
    assert not Path("data").exists()


def test_tinyshakespeare_is_checked_and_says_what_to_do_offline(prepare, book, monkeypatch):
    assert "is not TinyShakespeare" in prepare("tinyshakespeare.py", "--input", str(book))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    message = prepare("tinyshakespeare.py")
    assert "no network" in message and "--input FILE" in message and "configs/quickstart.toml" in message


def test_tinyshakespeare_from_a_file(tmp_path, monkeypatch):
    """The real text isn't shipped: any other stands for it, once the checksum is that text's."""
    monkeypatch.chdir(tmp_path)
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 5
    (tmp_path / "input.txt").write_text(text)
    monkeypatch.setattr(tinyshakespeare, "SHA256", hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setattr(sys, "argv", ["tinyshakespeare.py", "--input", "input.txt"])
    tinyshakespeare.main()
    assert decoded(Path("data/tinyshakespeare"), "train") + decoded(Path("data/tinyshakespeare"), "val") == text


def test_training_prepares_a_small_corpus_and_names_the_command_for_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare_dataset("python_manual") == Path("data/python_manual")
    assert len(TokenFiles(Path("data/python_manual"), "val")) > 10_000
    with pytest.raises(UserError, match="prepare/text.py --input FILE_OR_FOLDER --name novels"):
        prepare_dataset("novels")
