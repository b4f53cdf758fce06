"""The preparation scripts as a user runs them."""

import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from gpt_arc.data import documents as documents_module
from gpt_arc.data import prepare as prepare_module
from gpt_arc.data.datasets import Source, open_corpus, prepare_dataset
from gpt_arc.data.documents import Documents, Files
from gpt_arc.data.prepare import CorpusSettings, _encode, prepare_documents
from gpt_arc.data.token_files import ShardWriter, TokenFiles
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer
from gpt_arc.errors import UserError
from helpers import ROOT, TEXT, killed_at_each_call
from prepare import tinyshakespeare
from prepare import tokenizer as tokenizer_script
from warm import WarmPopen


@pytest.fixture
def prepare(tmp_path, monkeypatch, output_of):
    """Runs a script of prepare/ in an empty folder; returns its output, or the sentence with which it is refused."""
    monkeypatch.chdir(tmp_path)

    def call(script, *args):
        return output_of(lambda: runpy.run_path(str(ROOT / "prepare" / script), run_name="__main__"), script, *args)

    return call


def tokens_of(folder, split):
    files = TokenFiles(folder, split)
    return files.read(0, len(files))


def decoded(folder, split):
    return load_tokenizer(folder).decode(tokens_of(folder, split).tolist())


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A byte-level BPE that the `tokenizers` library trained and saved, and its folder."""
    from pydoc_data.topics import topics

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # a special token spelled in a text is text
    return tokenizer, folder


def pages(count, seed=0):
    """Documents like web pages, made of the manual's paragraphs: short and long, some with other alphabets."""
    from pydoc_data.topics import topics

    rng = random.Random(seed)
    paragraphs = [paragraph for text in topics.values() for paragraph in text.split("\n\n")]
    extras = ["größer 🌧", "漢字かな交じり文", "a <|endoftext|> within", "  \n\n\n   \t x", "1234567 _ __init__ ’s"]
    chosen = [rng.choices(paragraphs + extras * 20, k=rng.choice((1, 2, 5, 20))) for _ in range(count)]
    return [f"{number}\n\n" + "\n\n".join(parts) for number, parts in enumerate(chosen)]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def in_val(text, fraction):
    return int.from_bytes(hashlib.sha256(text[: 2**16].encode()).digest()[:8], "big") / 2**64 < fraction


@functools.cache
def encoded_document(library, text):
    return [*library.encode(text).ids, library.token_to_id("<|endoftext|>")]


def encoded(library, texts):
    return [token for text in texts for token in encoded_document(library, text)]


def test_the_python_manual_is_pydoc_s_text(prepare):
    from pydoc_data.topics import topics

    output = prepare("python_manual.py")
    text = "\n".join(topics.values())
    folder = Path("data/python_manual")
    assert f"{len(text):,} characters" in output
    assert decoded(folder, "train") + decoded(folder, "val") == text
    assert len(decoded(folder, "train")) == len(text) * 9 // 10
    names = ["manifest.json", "meta.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"]
    assert sorted(contents(folder)) == names
    assert "is prepared already" in prepare("python_manual.py")
    assert "is prepared already" not in prepare("python_manual.py", "--overwrite=True")


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("Whan that Aprille\r\nwith his shoures soote 🌧\n".encode() * 20)
    return path


def test_a_text_by_characters(prepare, book):
    output = prepare("text.py", f"--input={book}", "--name=book", "--tokenizer=char")
    assert "val: the last 0.1 of the characters" in output
    text = book.read_bytes().decode()  # with its line ends
    folder = Path("data/book")
    assert decoded(folder, "train") == text[: len(text) * 9 // 10]
    assert decoded(folder, "val") == text[len(text) * 9 // 10 :]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["vocab_size"] == len(set(text)) == load_tokenizer(folder).vocab_size
    assert meta["tokens"] == {"train": len(decoded(folder, "train")), "val": len(decoded(folder, "val"))}


@pytest.mark.parametrize("piece", [4, 5, 7, 100])
def test_characters_are_found_wherever_a_block_ends(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(documents_module, "PIECE", piece)
    text = "".join(random.Random(piece).choices("ab\né\u07ff✓\uffff😀", k=200))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    files = Files([tmp_path / "a.txt"], "text")
    assert prepare_module._survey(files, True) == (len(text), sorted(set(text)))
    assert prepare_module._survey(files, False) == (len(text), [])


def test_documents_go_to_a_split_by_a_hash_of_their_text(prepare, library, tmp_path):
    tokenizer, folder = library
    texts = pages(400)
    write_lines(tmp_path / "a.jsonl", texts[:200])
    flags = ("--input=a.jsonl", f"--tokenizer={folder}", "--val_fraction=0.2")
    output = prepare("text.py", *flags, "--name=x")
    assert "val: 0.2 of the documents, by a hash" in output
    for split, side in (("train", False), ("val", True)):
        expected = encoded(tokenizer, [text for text in texts[:200] if in_val(text, 0.2) == side])
        assert tokens_of(Path("data/x"), split).tolist() == expected
    assert 20 < sum(in_val(text, 0.2) for text in texts[:200]) < 60
    write_lines(tmp_path / "0.jsonl", texts[200:])  # more documents in front: the others keep their splits
    prepare("text.py", "--input=0.jsonl", *flags, "--name=y")
    before, after = (decoded(Path("data") / name, "val") for name in "xy")
    assert after.endswith(before) and len(after) > len(before)
    meta = json.loads(Path("data/y/meta.json").read_text())
    assert meta["documents"] == 400 and meta["tokens"]["val"] == len(tokens_of(Path("data/y"), "val"))


def test_the_share_of_tokens_is_printed(prepare, tmp_path):
    """One document of two is long: with half of the documents, val has far more or less than half of the tokens."""
    texts = ["ab", "e" * 100]
    write_lines(tmp_path / "a.jsonl", texts)
    (short_in_val, long_in_val) = (in_val(text, 0.5) for text in texts)
    assert short_in_val != long_in_val
    output = prepare("text.py", "--input=a.jsonl", "--name=x", "--tokenizer=char", "--val_fraction=0.5")
    share = 100 / 102 if long_in_val else 2 / 102
    assert "val: 0.5 of the documents" in output and f" ({share:.1%} of the tokens)" in output


def test_a_folder_split_by_its_tail_ends_every_document(prepare, library, tmp_path):
    (tmp_path / "texts" / "below").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text("the second <|endoftext|>")
    (tmp_path / "texts" / "below" / "c.txt").write_text("third")
    (tmp_path / "texts" / "a.txt").write_text("the first")
    (tmp_path / "texts" / "empty.txt").write_text("")
    (tmp_path / "texts" / "ignored.md").write_text("not this")
    flags = ("--input", "texts", "--name", "texts", f"--tokenizer={library[1]}")
    prepare("text.py", *flags, "--split=tail")
    folder = Path("data/texts")
    expected = ["the first", "the second <|endoftext|>", "t"]
    assert tokens_of(folder, "train").tolist() == encoded(library[0], expected)
    assert tokens_of(folder, "val").tolist() == encoded(library[0], ["hird"])


def test_a_long_text_is_the_same_in_pieces_and_shards(prepare, library, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt_arc.data.documents.PIECE", 5000)
    monkeypatch.setattr("gpt_arc.data.documents.BEGINNING", 1)
    monkeypatch.setattr(prepare_module, "BATCH", 3000)
    text = "\n".join(pages(60))
    (tmp_path / "a.txt").write_text(text)
    prepare("text.py", "--input=a.txt", "--name=x", f"--tokenizer={library[1]}", "--shard_tokens=7000")
    cut = len(text) * 9 // 10
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        expected = encoded(library[0], [part])
        assert tokens_of(Path("data/x"), split).tolist() == expected
        shards = sorted(Path("data/x").glob(f"{split}_*.bin"))
        assert [path.name for path in shards] == [f"{split}_{i:06}.bin" for i in range(-(-len(expected) // 7000))]
        assert [int(np.fromfile(path, "<i4", 3)[2]) for path in shards[:-1]] == [7000] * (len(shards) - 1)


def test_a_long_document_goes_to_one_split_in_every_format(prepare, library, tmp_path, monkeypatch):
    """Its beginning decides, however it is cut into pieces; the first space may be far away."""
    monkeypatch.setattr("gpt_arc.data.documents.PIECE", 5000)
    texts = [f"{seed} " + "x" * (2**16 - seed) + "\n".join(pages(40, seed)) for seed in range(12)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    write_lines(tmp_path / "a.jsonl", texts)
    val = [text for text in texts if in_val(text, 0.4)]
    assert 0 < len(val) < 12
    for inputs in ("*.txt", "a.jsonl"):
        flags = (f"--input={inputs}", "--name=x", "--overwrite=True", "--val_fraction=0.4")
        prepare("text.py", *flags, f"--tokenizer={library[1]}")
        assert tokens_of(Path("data/x"), "val").tolist() == encoded(library[0], val)
        assert tokens_of(Path("data/x"), "train").tolist() == encoded(library[0], [t for t in texts if t not in val])
        prepare("text.py", *flags, "--tokenizer=char")
        assert decoded(Path("data/x"), "val") == "".join(val)


@pytest.mark.parametrize("workers", [1, 7])
def test_workers_make_no_difference(prepare, library, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(prepare_module, "BATCH", 2000)
    write_lines(tmp_path / "a.jsonl", pages(100))
    flags = ("--input=a.jsonl", f"--tokenizer={library[1]}", "--shard_tokens=5000")
    prepare("text.py", *flags, "--name=x")
    prepare("text.py", *flags, "--name=y", f"--workers={workers}")
    assert contents("data/x") == contents("data/y") and len(contents("data/x")) > 8


SLOWED = f"""
import runpy, signal, sys, time
from gpt_arc.data import prepare as corpus
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
corpus.BATCH = 4000
encode = corpus._encode
pause = float(sys.argv.pop(1))
def slowly(*args):
    time.sleep(pause)
    return encode(*args)
corpus._encode = slowly
sys.argv[0] = {str(ROOT / "prepare" / "text.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*flags, pause=0.02):
    """prepare/text.py in another process, whose workers sleep `pause` seconds for every 4,000 characters."""
    args = [sys.executable, "-c", SLOWED, str(pause), *flags]
    return WarmPopen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def saved_tokens(name):
    try:
        progress = json.loads(Path(f"data/.{name}.partial/progress.json").read_text())
        return progress["train"] + progress["val"]
    except FileNotFoundError:
        return 0


def kill_and_resume(prepare, library, tmp_path, kills, size):
    """Prepares texts undisturbed, and again with kills: one early, then `kills` at random moments after a save."""
    rng = random.Random(0)
    write_lines(tmp_path / "a.jsonl", pages(size))
    (tmp_path / "b.txt").write_text("\n".join(pages(size, 1)))
    flags = ["--input", "b.txt", "a.jsonl", f"--tokenizer={library[1]}", "--shard_tokens=10000", "--split=tail"]
    prepare("text.py", *flags, "--name=undisturbed")
    process = start(*flags, "--name=killed")
    while not any(Path("data/.killed.partial/dataset").glob("*")):
        time.sleep(0.005)
    process.kill()
    process.wait()
    for _ in range(kills):
        before = saved_tokens("killed")
        process = start(*flags, "--name=killed", "--workers=1")
        while saved_tokens("killed") == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not Path("data/killed").exists()
    assert "resuming after" in prepare("text.py", *flags, "--name=killed", "--workers=2")
    assert contents("data/killed") == contents("data/undisturbed")
    assert sorted(path.name for path in Path("data").iterdir()) == ["killed", "undisturbed"]  # no hidden folders


def test_a_killed_run_resumes_to_the_same_bytes(prepare, library, tmp_path):
    kill_and_resume(prepare, library, tmp_path, kills=2, size=150)


@pytest.mark.slow
def test_a_run_killed_ten_times_resumes_to_the_same_bytes(prepare, library, tmp_path):
    kill_and_resume(prepare, library, tmp_path, kills=10, size=600)


def test_ctrl_c_says_how_to_resume_and_other_settings_are_refused(prepare, library, tmp_path):
    write_lines(tmp_path / "a.jsonl", pages(150))
    flags = ["--input=a.jsonl", f"--tokenizer={library[1]}", "--shard_tokens=10000", "--name=x"]
    process = start(*flags, pause=0.2)  # half a minute in all, so the signal comes first
    while not saved_tokens("x"):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    saved = f"{saved_tokens('x'):,} tokens, saved in data/.x.partial"
    assert process.returncode == 130
    assert f"text.py: interrupted: repeat the command to resume after {saved}\n" in output.decode()
    assert b"Traceback" not in output
    refused = prepare("text.py", *flags, "--val_fraction=0.3")
    assert "with other settings or texts (val_fraction): repeat its command" in refused and saved_tokens("x")
    assert "resuming" not in prepare("text.py", *flags, "--val_fraction=0.3", "--overwrite=True")
    for split, side in (("train", False), ("val", True)):
        expected = encoded(library[0], [text for text in pages(150) if in_val(text, 0.3) == side])
        assert tokens_of(Path("data/x"), split).tolist() == expected


def test_ctrl_c_saves_what_was_written(tmp_path, library, monkeypatch):
    """Even before the first of the regular saves; and it says so if nothing was written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_module, "BATCH", 4000)
    documents = Files([write_lines(tmp_path / "a.jsonl", pages(60))], "text")
    settings = CorpusSettings(tokenizer=str(library[1]), workers=1)

    def batches_until(last, name):
        encoded = []

        def encode(*args):
            encoded.append(args)
            if len(encoded) == last:
                raise KeyboardInterrupt
            return _encode(*args)

        monkeypatch.setattr(prepare_module, "_encode", encode)
        prepare_documents(documents, settings, name)
        return len(encoded)

    batches = batches_until(None, "undisturbed")
    with pytest.raises(KeyboardInterrupt, match="^interrupted before anything was saved: repeat the command to start"):
        batches_until(1, "x")
    assert not Path("data/.x.partial").exists()
    saved = r"\d+,\d+ tokens, saved in data/\.x\.partial"
    with pytest.raises(KeyboardInterrupt, match=f"^interrupted: repeat the command to resume after {saved}$"):
        batches_until(9, "x")
    assert batches_until(None, "x") == batches - 8 and contents("data/x") == contents("data/undisturbed")


class Changing(Documents):
    """Documents that their owner may change: `states` holds them by revision, the latest last."""

    name, states = "changing", {}

    def identity(self):
        return {"dataset": "changing"}

    def pieces(self, cut, position=None):
        self.revision = self.revision or list(self.states)[-1]
        self.read = position or 0
        for text in self.states[self.revision][self.read :]:
            self.read += 1
            yield text, True

    def position(self):
        return self.read


@pytest.mark.parametrize("rule", ["hash", "tail"])
def test_an_interrupted_run_resumes_with_the_revision_it_began_with(tmp_path, monkeypatch, library, rule):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_module, "BATCH", 1000)
    settings = CorpusSettings(tokenizer=str(library[1]), split=rule, shard_tokens=1000, workers=1)
    monkeypatch.setattr(Changing, "states", {"first": pages(100)})
    prepare_documents(Changing(), settings, "undisturbed")
    encode, calls = _encode, []

    def stopped(*args):
        calls.append(args)
        if len(calls) in (20, 40):
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(prepare_module, "_encode", stopped)
    for number in range(2):
        with pytest.raises(KeyboardInterrupt, match="repeat the command to resume"):
            prepare_documents(Changing(), settings, "x")
        Changing.states[f"later {number}"] = pages(10 * number + 5, seed=number + 1)
    prepare_documents(Changing(), settings, "x")
    assert contents("data/x") == contents("data/undisturbed")
    assert json.loads(Path("data/x/meta.json").read_text())["revision"] == "first"


def test_two_runs_do_not_share_a_folder(prepare, book):
    Path("data").mkdir()
    flags = (f"--input={book}", "--name=x", "--tokenizer=char")
    with open("data/.x.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "data/x is being prepared by another process" in prepare("text.py", *flags)
    assert "data/x:" in prepare("text.py", *flags)  # after that process has ended
    assert [path.name for path in Path("data").iterdir()] == ["x"]


def test_a_second_run_uses_the_dataset_that_the_first_prepared(prepare, book, monkeypatch):
    flags = (f"--input={book}", "--name=x", "--tokenizer=char")
    prepare("text.py", *flags)
    Path("data/x").rename("elsewhere")

    def first_ends(*args):  # just before the second gets the lock
        monkeypatch.setattr(fcntl, "flock", flock)
        Path("elsewhere").rename("data/x")

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", first_ends)
    assert "is prepared already" in prepare("text.py", *flags)


def test_a_dataset_belongs_to_the_tokenizer_not_its_name(prepare, library, tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", pages(30))
    flags = ("--input=a.jsonl", "--name=x", "--tokenizer=gpt2")
    named = [load_tokenizer(library[1])]
    monkeypatch.setattr(prepare_module, "find_tokenizer", lambda name: named[-1])
    prepare("text.py", *flags)
    assert "is prepared already" in prepare("text.py", *flags)
    named.append(BPETokenizer(named[0].ranks, {"<|end|>": named[0].vocab_size - 1}))
    assert "holds something else" in prepare("text.py", *flags)
    named.append(BPETokenizer.train(pages(10), 300))
    assert "holds something else" in prepare("text.py", *flags)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("split", ["hash", "tail"])
def test_empty_documents_are_skipped_and_counted(prepare, library, tmp_path, monkeypatch, form, split):
    monkeypatch.setattr(prepare_module, "BATCH", 1)  # so the last one comes alone
    texts = [*pages(20), None, "", "the last", None]
    if form == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet")
    else:
        write_lines(tmp_path / "a.jsonl", texts)
    flags = (f"--input=a.{form}", f"--tokenizer={library[1]}", f"--split={split}", "--val_fraction=0.2")
    assert "of the tokens), 3 empty documents skipped\n" in prepare("text.py", *flags, "--name=x")
    assert json.loads(Path("data/x/meta.json").read_text())["documents"] == 21
    write_lines(tmp_path / "a.jsonl", [text for text in texts if text])
    assert "empty" not in prepare("text.py", "--input=a.jsonl", *flags[1:], "--name=y")
    for kind in ("train", "val"):
        assert tokens_of(Path("data/x"), kind).tolist() == tokens_of(Path("data/y"), kind).tolist()


def peak_memory(*flags):
    """The peak resident memory in MB of prepare/text.py, without its worker processes."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print(*open('/proc/self/status')))\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "prepare" / "text.py"), *flags]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"VmHWM:\s+(\d+) kB", output)[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux reports a single program's peak")
@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_memory_stays_flat_if_the_tokenizer_allows_cuts(tmp_path, monkeypatch, library, tokenizer):
    assert load_tokenizer(library[1]).cuts_at_space
    monkeypatch.chdir(tmp_path)
    page = " ".join(pages(100))
    peaks = {}
    for megabytes in (12, 48):
        Path("a.txt").write_text((page * (megabytes * 10**6 // len(page) + 1)).replace("\n", " "))  # one line
        flags = (f"--name={megabytes}", f"--tokenizer={library[1] if tokenizer == 'bpe' else 'char'}")
        peaks[megabytes] = peak_memory("--input=a.txt", "--shard_tokens=1000000", "--workers=1", *flags)
    assert peaks[48] < peaks[12] + 15 and peaks[48] < 250


def test_a_tokenizer_that_forbids_cuts_encodes_whole_documents(prepare, tmp_path, monkeypatch, library):
    monkeypatch.setattr("gpt_arc.data.documents.PIECE", 5000)
    monkeypatch.setattr("gpt_arc.data.documents.BEGINNING", 1)
    prefixing = tokenizers.Tokenizer.from_str(library[0].to_str())
    prefixing.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)  # a space before each text
    (tmp_path / "other").mkdir()
    prefixing.save("other/tokenizer.json")
    prefixing.encode_special_tokens = True
    texts = ["\n".join(pages(40, seed)) for seed in range(12)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    prepare("text.py", "--input=*.txt", "--name=x", "--tokenizer=other", "--val_fraction=0.4")
    expected = encoded(prefixing, [text for text in texts if not in_val(text, 0.4)])
    assert tokens_of(Path("data/x"), "train").tolist() == expected


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_parts_are_joined_into_what_one_machine_writes(prepare, library, tmp_path, tokenizer):
    texts = pages(60)
    for number in range(6):
        write_lines(tmp_path / f"{number}.jsonl", texts[number * 10 : number * 10 + 10])
    (tmp_path / "7.jsonl").write_text("")
    named = "char" if tokenizer == "char" else library[1]
    flags = ("--input=*.jsonl", "--name=x", f"--tokenizer={named}", "--shard_tokens=3000", "--val_fraction=0.05")
    prepare("text.py", *flags)
    Path("data/x").rename("alone")
    for number in (2, 0):
        prepare("text.py", *flags, f"--shard={number}/3")
    assert "data/x-1-of-3 is missing: prepare it with --shard=1/3" in prepare("text.py", *flags)
    prepare("text.py", *flags, "--shard=1/3")
    assert "data/x-1-of-3 is prepared already" in prepare("text.py", *flags, "--shard=1/3")
    assert "data/x-0-of-3 is made of other texts" in prepare("text.py", *flags, "--shard_tokens=4000")
    assert "joined data/x-0-of-3, data/x-1-of-3, data/x-2-of-3" in prepare("text.py", *flags)
    assert contents("data/x") == contents("alone") and len(contents("alone")) > 6
    counts = [json.loads(Path(f"data/x-{i}-of-3/meta.json").read_text())["documents"] for i in range(3)]
    assert sum(counts) == 60 and min(counts) > 5


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--shard=3/3"], "shard = 3/3 must be I/N, with I from 0 to N - 1"),
        (["--shard=1"], "shard = 1 must be I/N"),
        (["--shard=0/2"], "can't be divided into 2 parts, as no file is divided"),
        (["--shard=0/1", "--split=tail"], "--split=tail can't be combined with --shard=0/1, since a part doesn't know"),
        (
            ["--shard=0/2", "--input=a.txt"],
            "a.txt is a single text, which can't be prepared in parts: leave out --shard",
        ),
    ],
)
def test_impossible_parts_are_refused(prepare, tmp_path, flags, sentence):
    write_lines(tmp_path / "a.jsonl", pages(5))
    (tmp_path / "a.txt").write_text("a text")
    inputs = [] if "--input=a.txt" in flags else ["--input=a.jsonl"]
    assert sentence in prepare("text.py", *inputs, "--name=x", "--tokenizer=char", *flags)


def test_every_part_has_documents_if_enough_files_do(prepare, tmp_path):
    """The first file has nearly all bytes, and two are empty; seven parts are one more than files with text."""
    for number, count in enumerate([0, 300, 1, 1, 0, 1, 1, 1]):
        write_lines(tmp_path / f"{number}.jsonl", [f"{number} {i}" for i in range(count)])
    flags = ("--input=*.jsonl", "--name=x", "--tokenizer=char")
    prepare("text.py", *flags)
    Path("data/x").rename("alone")
    for parts in (6, 7):
        outputs = [prepare("text.py", *flags, f"--shard={number}/{parts}") for number in range(parts)]
        counts = [json.loads(Path(f"data/x-{i}-of-{parts}/meta.json").read_text())["documents"] for i in range(parts)]
        assert counts == [300, 1, 1, 1, 1, 1, 0][:parts]
        assert [" has no text, because" in output for output in outputs] == [count == 0 for count in counts]
        assert f"joined data/x-0-of-{parts}" in prepare("text.py", *flags)
        assert contents("data/x") == contents("alone")
        for folder in Path("data").iterdir():
            shutil.rmtree(folder)


def test_a_complete_set_of_parts_is_joined_whatever_lies_beside_it(prepare, tmp_path):
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", pages(20, number))
    flags = ("--input=*.jsonl", "--name=x", "--tokenizer=char")
    prepare("text.py", *flags, "--shard=1/3")
    refused = prepare("text.py", *flags)
    assert "data/x-0-of-3 is missing: prepare it with --shard=0/3, or delete data/x-1-of-3 to prepare" in refused
    for part in ("0/3", "2/3", "1/2"):
        prepare("text.py", *flags, f"--shard={part}")
    output = prepare("text.py", *flags)
    assert "joined data/x-0-of-3, data/x-1-of-3, data/x-2-of-3, which can be deleted" in output
    assert "data/x-1-of-2 don't belong to these 3 parts" in output
    shutil.rmtree("data/x-0-of-3")
    assert "data/x is prepared already" in prepare("text.py", *flags)
    write_lines(tmp_path / "0.jsonl", pages(20, 7))
    refused = prepare("text.py", *flags, "--overwrite=True")
    assert "data/x-0-of-3 is missing" in refused
    refused = prepare("text.py", *flags, "--shard=1/3")
    assert "data/x-1-of-3 exists and holds something else: replace it with --overwrite=True" in refused
    prepare("text.py", *flags, "--shard=0/3")
    refused = prepare("text.py", *flags, "--overwrite=True")
    assert "data/x-1-of-3 is made of other texts or settings: prepare it with --shard=1/3 --overwrite=True" in refused


def test_parts_that_divide_the_files_otherwise_are_not_joined(prepare, tmp_path, monkeypatch):
    for number in range(4):
        write_lines(tmp_path / f"{number}.jsonl", pages(5, number))
    flags = ("--input=*.jsonl", "--name=x", "--tokenizer=char")
    prepare("text.py", *flags, "--shard=0/2")
    with monkeypatch.context() as patch:  # as another version might
        patch.setattr(Files, "share", lambda self, number, count: (3 * number, 3 + number))
        prepare("text.py", *flags, "--shard=1/2")
    assert "data/x-1-of-2 is made of other texts or settings" in prepare("text.py", *flags)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_data_folder_that_can_t_be_written_is_refused_with_a_mend(prepare, book, monkeypatch, error):
    Path("data").mkdir()
    mkdir, access = os.mkdir, os.access

    def refused(path, *args):
        if Path(path).parent == Path("data"):
            raise type(error)(*error.args, str(path))
        mkdir(path, *args)

    def is_accessible(path, mode):
        return access(path, mode) and not str(path).startswith("data")

    monkeypatch.setattr(os, "mkdir", refused)
    monkeypatch.setattr(os, "access", is_accessible)
    monkeypatch.setattr("filelock.FileLock.acquire", lambda lock: refused(lock.lock_file))
    output = prepare("text.py", f"--input={book}", "--name=x", "--tokenizer=char")
    mend = "work in a folder" if error.errno == 30 else "change the permissions of this file or of the folder it is in"
    assert f"data/.x.partial: {error.strerror}: {mend}" in output and "locked" not in output


@pytest.mark.parametrize("script", ["text.py", "tokenizer.py"])
def test_a_file_named_data_is_refused_with_a_mend(prepare, book, script):
    Path("data").write_text("")
    flags = ["--vocab_size=300"] if script == "tokenizer.py" else ["--tokenizer=char"]
    output = prepare(script, f"--input={book}", "--name=x", *flags)
    assert output.endswith(
        "data: File exists: a file has the name that a folder needs; rename it, or work in another folder\n"
    )


def test_documents_that_nothing_would_separate_are_refused(prepare, tmp_path, library):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(library[0].to_str().replace("<|endoftext|>", "<|end|>"))
    write_lines(tmp_path / "a.jsonl", pages(20))
    (tmp_path / "a.txt").write_text("\n".join(pages(20)))
    flags = ("--name=x", "--tokenizer=other", "--split=tail")
    message = prepare("text.py", "--input=a.jsonl", *flags)
    assert "the documents of a.jsonl would run into one another: name the" in message and not Path("data").exists()
    assert "data/x:" in prepare("text.py", "--input=a.txt", *flags)  # a single text has no neighbour
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert "data/x:" in prepare("text.py", "--input=a.jsonl", *flags, "--overwrite=True")


def test_progress_never_exceeds_what_is_on_the_disk(prepare, library, tmp_path, monkeypatch):
    """`disk` holds each file and folder as it was last flushed."""
    monkeypatch.setattr(prepare_module, "BATCH", 4000)
    write_lines(tmp_path / "a.jsonl", pages(100))
    disk, flush, rename, saved = {}, os.fsync, os.replace, []

    def recorded(descriptor):
        flush(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        disk[path] = os.listdir(path) if os.path.isdir(path) else Path(path).read_bytes()

    def replaced(old, new):
        if Path(new).name == "progress.json":
            dataset, progress = Path(new).parent.resolve() / "dataset", json.loads(disk[str(Path(old).resolve())])
            for split in ("train", "val"):
                shards = [f"{split}_{i:06}.bin" for i in range(math.ceil(progress[split] / 3000))]
                assert set(shards) <= set(disk[str(dataset)])
                tokens = b"".join(disk[str(dataset / name)][1024:] for name in shards)[: 2 * progress[split]]
                saved.append((split, progress[split], tokens))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", replaced)
    prepare("text.py", "--input=a.jsonl", "--name=x", f"--tokenizer={library[1]}", "--shard_tokens=3000")
    assert len({count for _, count, _ in saved}) > 5
    for split, count, tokens in saved:
        assert tokens == TokenFiles(Path("data/x"), split).read(0, count).astype("<u2").tobytes()


@pytest.mark.parametrize("overwrite", [(), ("--overwrite=True",)])
def test_a_run_killed_after_it_finished_blocks_no_other(prepare, book, monkeypatch, overwrite):
    """It leaves a work folder without a dataset."""
    flags = (f"--input={book}", "--name=x", "--tokenizer=char", "--shard_tokens=200")
    monkeypatch.setattr(prepare_module, "BATCH", 100)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_remove", lambda folder: None)
        prepare("text.py", *flags)
    before = contents("data/x")
    assert sorted(os.listdir("data/.x.partial")) == ["plan.json", "progress.json"]
    output = prepare("text.py", *flags, *overwrite)
    assert "resuming" not in output and ("is prepared already" in output) == (not overwrite)
    assert contents("data/x") == before and os.listdir("data") == ["x"]


def test_a_finished_dataset_keeps_the_progress_of_another_run(prepare, book, tmp_path):
    flags = (f"--input={book}", "--name=x", "--tokenizer=char")
    prepare("text.py", *flags)
    Path("data/.x.partial").mkdir()
    Path("data/.x.partial/plan.json").write_text('{"of": "others"}')
    assert "is prepared already" in prepare("text.py", *flags)
    assert Path("data/.x.partial/plan.json").exists()


def test_a_half_removed_work_folder_is_not_resumed(prepare, book, monkeypatch):
    flags = (f"--input={book}", "--name=x", "--tokenizer=char")
    work = Path("data/.x.partial")
    (work / "dataset").mkdir(parents=True)
    for name in ("plan.json", "progress.json"):
        (work / name).write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, **kwargs: None)  # as if killed before it began
        prepare("text.py", *flags, "--overwrite=True")
    assert not (work / "progress.json").exists() and not (work / "plan.json").exists()
    assert "resuming" not in prepare("text.py", *flags) and os.listdir("data") == ["x"]


def test_nothing_is_overwritten_without_overwrite(prepare, book):
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


def test_what_is_not_a_folder_is_not_overwritten(prepare, book):
    Path("data").mkdir()
    Path("data/file").touch()
    Path("data/link").symlink_to("nowhere")
    Path("other").mkdir()
    Path("data/folder").symlink_to("../other")
    flags = (f"--input={book}", "--tokenizer=char", "--overwrite=True")
    for name in ("file", "link"):
        refused = f"data/{name} is not a folder: delete it, or choose another name"
        assert refused in prepare("text.py", *flags, f"--name={name}")
    prepare("text.py", *flags, "--name=folder")  # in place of the link
    assert sorted(os.listdir("data")) == ["file", "folder", "link"] and not os.listdir("other")
    assert len(contents("data/folder")) == 5


def test_a_damaged_dataset_is_prepared_again(prepare, book):
    flags = (f"--input={book}", "--name=book", "--tokenizer=char")
    prepare("text.py", *flags)
    whole = decoded(Path("data/book"), "train")
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])):
        damage(Path("data/book/train_000000.bin"))
        assert "is prepared already" not in prepare("text.py", *flags)
        assert decoded(Path("data/book"), "train") == whole


GOOD = {"good.txt": b"good", "one.jsonl": b'{"text": "a"}\n', "bad.jsonl": b'{"text": "a"}\n{"text"\n'}


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--input=nowhere.txt", "--name=x"], "nowhere.txt can't be read"),
        (["--input=empty.txt", "--name=x", "--tokenizer=char"], "0 characters in empty.txt: at least two are needed"),
        (["--input=empty.jsonl", "--name=x"], "there is no text in empty.jsonl"),
        (["--input=latin.txt", "--name=x", "--tokenizer=char"], "latin.txt is not UTF-8 text: byte 0xE9 at offset 3"),
        (["--input=split.txt", "--name=x", "--tokenizer=char"], "split.txt is not UTF-8 text: byte 0xC3 at offset 2"),
        (["--name=x", "--input="], "--input is empty"),
        (["--input=.", "--name=x", "--pattern=*.docx"], "no file below . matches --pattern *.docx"),
        (["--input=.", "--name=x", "--pattern=/etc/*"], "no file below . matches"),
        (["--input=bad.jsonl", "--name=x"], "bad.jsonl:2 is not a line of JSON"),
        (["--input=one.jsonl", "--field=body", "--name=x"], "one.jsonl:1 has no field 'body': there are 'text'"),
        (["--input=one.jsonl", "--name=x", "--val_fraction=0.001"], "raise --val_fraction, or split with --split=tail"),
        (["--input=one.jsonl", "--name=x", "--val_fraction=0.999"], "lower --val_fraction, or split with --split=tail"),
        (
            ["--input=one.jsonl", "--name=x", "--val_fraction=1"],
            "val_fraction = 1 must be between 0 and 1, 0 and 1 excluded",
        ),
        (["--input=one.jsonl", "--name=x", "--shard_tokens=0"], "shard_tokens = 0 must be at least 1"),
        (["--input=one.jsonl", "--name=x", "--workers=0"], "workers = 0 must be at least 1"),
        (["--input=good.txt", "--name=../x"], "must be a plain folder name"),
        (["--input=good.txt", "--name="], "must be a plain folder name"),
        (["--input=good.txt", f"--name={'x' * 300}"], "must be a plain folder name of at most 200 bytes"),
        (["--input=good.txt"], "--name"),
        (["--input=good.txt", "--name=x", "--tokenizer=words"], "words"),
        (["--input=good.txt", "--nam=x"], "--nam"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(prepare, library, tmp_path, args, sentence):
    for name, content in GOOD.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n\n')
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "split.txt").write_bytes(b"12\xc3a\xa9")  # UTF-8 but for the a
    default = [] if any("--tokenizer" in arg for arg in args) else [f"--tokenizer={library[1]}"]
    assert sentence in prepare("text.py", *args, *default)
    assert not Path("data").exists()


@pytest.mark.parametrize("script", ["openwebtext.py", "fineweb.py"])
def test_a_share_with_another_default_has_the_same_bounds(prepare, script):
    assert "--val_fraction = 1 must be between 0 and 1, 0 and 1 excluded" in prepare(script, "--val_fraction=1")


def test_a_full_disk_is_reported_in_one_sentence(prepare, book, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt_arc.data.token_files.ShardWriter.append", full)
    message = prepare("text.py", f"--input={book}", "--name=x", "--tokenizer=char")
    assert message == "text.py: data/.x.partial: No space left on device\n" and not Path("data").exists()


def test_ctrl_c_ends_the_training_of_a_tokenizer(tmp_path, monkeypatch, capsys, book):
    """Although the library doesn't return to Python before it is done."""
    monkeypatch.chdir(tmp_path)
    ended = threading.Event()

    def trained(texts, vocab_size):
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait(30)

    monkeypatch.setattr(BPETokenizer, "train", trained)
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", f"--input={book}", "--name=x", "--vocab_size=300"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(SystemExit, match="^130$"):
            tokenizer_script.main()
    finally:
        signal.signal(signal.SIGINT, before)
    ended.set()
    assert not Path("data").exists()
    message = "tokenizer.py: interrupted, and nothing is saved: repeat the command to start again\n"
    assert capsys.readouterr().err == message


def test_a_disk_that_fills_later_says_what_was_saved(prepare, book, monkeypatch):
    write, free = ShardWriter.append, 300

    def full(writer, tokens):
        if writer.written > free:
            raise OSError(28, "No space left on device")
        write(writer, tokens)

    flags = (f"--input={book}", "--name=x", "--tokenizer=char")
    prepare("text.py", *flags)
    before = contents("data/x")
    shutil.rmtree("data/x")
    monkeypatch.setattr(prepare_module, "BATCH", 100)
    monkeypatch.setattr(prepare_module, "SAVE_EVERY", 100)
    monkeypatch.setattr("gpt_arc.data.documents.PIECE", 100)
    monkeypatch.setattr("gpt_arc.data.documents.BEGINNING", 1)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", full)
        saved = r"mend this, then repeat the command to resume after \d+ tokens, saved in data/\.x\.partial\n"
        output = prepare("text.py", *flags)
        assert re.search(f"text.py: data/.x.partial: No space left on device: {saved}$", output)
    assert "resuming after" in prepare("text.py", *flags) and contents("data/x") == before


def test_a_tokenizer_is_trained_and_used(prepare, tmp_path, monkeypatch):
    texts = pages(100)
    write_lines(tmp_path / "a.jsonl", texts)
    flags = ("--input=a.jsonl", "--name=x", "--vocab_size=400")
    assert "data/x/tokenizer.json: 400 tokens" in prepare("tokenizer.py", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(BPETokenizer, "train", None)  # refused before training
        assert "already contains a tokenizer: replace it with --overwrite=True" in prepare("tokenizer.py", *flags)
    assert "300 tokens" in prepare("tokenizer.py", *flags[:2], "--vocab_size=300", "--overwrite=True")
    assert "400 tokens" in prepare("tokenizer.py", *flags, "--overwrite=True")
    prepared = prepare("text.py", "--input=a.jsonl", "--name=x", "--tokenizer=x")
    assert "vocabulary 400" in prepared
    library = tokenizers.Tokenizer.from_file("data/x/tokenizer.json")
    library.encode_special_tokens = True
    assert library.get_vocab_size() == 400 and library.token_to_id("<|endoftext|>") == 399
    expected = encoded(library, [text for text in texts if not in_val(text, 0.1)])
    assert tokens_of(Path("data/x"), "train").tolist() == expected
    assert "is prepared already" in prepare("text.py", "--input=a.jsonl", "--name=x", "--tokenizer=x")
    monkeypatch.setattr(BPETokenizer, "train", None)
    for overwrite in ((), ("--overwrite=True",)):
        assert "data/x already contains a dataset" in prepare("tokenizer.py", *flags, *overwrite)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--vocab_size=256"], "a vocabulary of 256 is too small"),
        (["--vocab_size=300", "--name=gpt2"], "--tokenizer gpt2 already means another tokenizer"),
        (["--vocab_size=5000"], "no pairs are left to merge in few.txt, so there are fewer than 5,000"),
        (["--vocab_size=300", "--input=empty.txt"], "there is no text in empty.txt"),
        ([], "--vocab_size"),
    ],
)
def test_impossible_vocabularies_are_refused(prepare, tmp_path, args, sentence):
    (tmp_path / "few.txt").write_text("few words, few pairs")
    (tmp_path / "empty.txt").write_text("")
    inputs = [] if any("--input" in arg for arg in args) else ["--input=few.txt"]
    assert sentence in prepare("tokenizer.py", *inputs, "--name=x", *args)


@pytest.mark.parametrize("script", ["openwebtext.py", "fineweb.py"])
def test_web_corpora_from_local_files(prepare, library, tmp_path, script):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pages(200)
    (tmp_path / "files").mkdir()
    for number in range(2):
        rows = texts[number * 100 : number * 100 + 100]
        table = arrow.table({"text": rows, "url": ["x"] * 100})
        parquet.write_table(table, tmp_path / "files" / f"{number}.parquet")
    flags = ("--input=files", f"--tokenizer={library[1]}", "--val_fraction=0.1")
    prepare(script, *flags)
    folder = Path("data") / script.removesuffix(".py")
    for split, side in (("train", False), ("val", True)):
        expected = encoded(library[0], [text for text in texts if in_val(text, 0.1) == side])
        assert tokens_of(folder, split).tolist() == expected
    assert "is prepared already" in prepare(script, *flags)


def test_a_folder_with_the_hub_s_layout(prepare, library, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    texts = pages(120)
    corpus = tmp_path / "owner" / "pages"
    for config in ("de", "en"):
        (corpus / config).mkdir(parents=True)
        for number, split in enumerate(("train", "train", "validation")):
            rows = [f"{config} {text}" for text in texts[number * 40 : number * 40 + 40]]
            path = corpus / config / f"{split}-0000{number}-of-00002.parquet"
            parquet.write_table(arrow.table({"body": rows, "id": range(40)}), path)
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("de", "en"))
    (corpus / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    flags = ("owner/pages", "--config=en", "--field=body", f"--tokenizer={library[1]}", "--val_fraction=0.2")
    monkeypatch.setattr(prepare_module, "BATCH", 4000)
    encode, calls = _encode, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(prepare_module, "_encode", stopped)
    with pytest.raises(AssertionError, match="130"):  # of a process ended by Ctrl-C
        prepare("hub.py", *flags, "--shard_tokens=1000", "--workers=1")
    assert "resuming after" in prepare("hub.py", *flags, "--shard_tokens=1000")
    for split, side in (("train", False), ("val", True)):
        expected = [f"en {text}" for text in texts[:80] if in_val(f"en {text}", 0.2) == side]
        assert tokens_of(Path("data/pages"), split).tolist() == encoded(library[0], expected)
    assert "is prepared already" in prepare("hub.py", *flags, "--shard_tokens=1000")
    prepare("hub.py", *flags, "--hub_split=validation", "--name=held_out", "--split=tail")
    tokens = [token for split in ("train", "val") for token in tokens_of(Path("data/held_out"), split).tolist()]
    end = library[0].token_to_id("<|endoftext|>")
    assert tokens.count(end) in (40, 41)
    (corpus / "en" / "train-00000-of-00002.parquet").unlink()
    assert "holds something else" in prepare("hub.py", *flags, "--shard_tokens=1000")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--hub_split=nope"], "as a dataset (Bad split: nope"),
        (["--field=nope"], "as a dataset (Column name"),
        (["--config=nope"], "as a dataset (BuilderConfig 'nope' not found"),
        (["--branch=v1"], "pages is a folder, so there is nothing to choose with --branch: leave it out"),
        (["--hub_split=x", "--input=pages"], "--input names files, so there is nothing to choose with --hub_split"),
    ],
)
def test_what_a_dataset_of_the_hub_lacks_is_no_matter_of_the_network(prepare, library, tmp_path, flags, sentence):
    pytest.importorskip("datasets")
    (tmp_path / "pages").mkdir()
    write_lines(tmp_path / "pages" / "train.jsonl", pages(5))
    output = prepare("hub.py", "pages", f"--tokenizer={library[1]}", *flags)
    assert sentence in output and "when connected" not in output
    assert "so there is nothing" in sentence or output.endswith("--config, --hub_split, --field and --branch\n")


def test_the_hub_scripts_differ_in_what_they_stream(prepare, monkeypatch):
    settings = []
    monkeypatch.setattr("gpt_arc.data.hub_corpora.prepare_documents", lambda *args: settings.append(args))
    prepare("openwebtext.py")
    prepare("fineweb.py", "--sample=sample-100BT", "--name=large")
    prepare("fineweb.py")
    prepare("hub.py", "owner/pages", "--branch=v1", "--hub_split=test")
    assert [(documents.identity(), name) for documents, _, name in settings] == [
        ({"dataset": "Skylion007/openwebtext", "field": "text"}, "openwebtext"),  # as in older datasets
        ({"dataset": "HuggingFaceFW/fineweb-edu", "field": "text", "name": "sample-100BT"}, "large"),
        ({"dataset": "HuggingFaceFW/fineweb-edu", "field": "text", "name": "sample-10BT"}, "fineweb"),
        ({"dataset": "owner/pages", "field": "text", "split": "test", "branch": "v1"}, "pages"),
    ]
    assert [one.val_fraction for _, one, _ in settings] == [0.0005, 0.001, 0.001, 0.1]


def test_what_a_dataset_holds_is_shown(prepare, library, tmp_path):
    texts = [f"{number} is a number" for number in range(50)]
    write_lines(tmp_path / "a.jsonl", texts)
    prepare("text.py", "--input=a.jsonl", "--name=x", f"--tokenizer={library[1]}", "--val_fraction=0.2")
    prepare("text.py", "--input=a.jsonl", "--name=y", f"--tokenizer={library[1]}", "--val_fraction=0.3")
    counts = {name: json.loads(Path(f"data/{name}/meta.json").read_text())["tokens"] for name in "xy"}
    output = prepare("show.py", "x", "--documents=2")
    train = [text for text in texts if not in_val(text, 0.2)]
    for part in (
        f"train        {counts['x']['train']} tokens in 1 file",
        f"documents    50, {sum(counts['x'].values()) / 50:.1f} tokens each",
        "end of text  600, '<|endoftext|>'",
        "special      600 '<|endoftext|>'",
        f"--- 1: {len(library[0].encode(train[0]).ids) + 1} tokens\n{train[0]}<|endoftext|>\n--- 2: ",
        open_corpus([Source("x", 1.0)]).fingerprint,
    ):
        assert part in output
    Path("m.toml").write_text("".join(f'[[data.mixture]]\nname = "{name}"\nweight = 1\n' for name in "xy"))
    total = sum(sum(count.values()) for count in counts.values())
    for names in (("x", "y"), ("m.toml",)):
        last = prepare("show.py", *names, "--documents=0").splitlines()[-1].split()
        assert last[:2] == ["sum", "100"] and last[-1] == f"{total:,}"
    assert "there is no dataset nowhere" in prepare("show.py", "nowhere")


def test_no_document_is_shown_after_the_last(prepare, library, tmp_path):
    """A text split by its tail ends with the end of text."""
    write_lines(tmp_path / "a.jsonl", ["the first text", "the second text"])
    prepare("text.py", "--input=a.jsonl", f"--tokenizer={library[1]}", "--name=x", "--split=tail")
    output = prepare("show.py", "x", "--documents=5")
    assert "--- 2:" in output and "--- 3:" not in output and "0 tokens" not in output


def test_folders_are_shown_whatever_they_lack(prepare, library, tmp_path, monkeypatch):
    for number, text in enumerate(("a", "b", "")):
        write_lines(tmp_path / f"{number}.jsonl", [text])
    flags = ("--input=*.jsonl", f"--tokenizer={library[1]}", "--name=x", "--val_fraction=0.000001")
    for part in range(2):
        prepare("text.py", *flags, f"--shard={part}/2")
    monkeypatch.chdir("data/x-0-of-2")
    output = prepare("show.py", ".")
    assert "train        2 tokens in 1 file" in output and "val          " not in output.split("documents")[0]
    assert "--- 1: 2 tokens\na<|endoftext|>" in output
    assert f"{library[1]} holds a tokenizer, but no tokens" in prepare("show.py", str(library[1]))
    assert "there is no dataset /" in prepare("show.py", "/")


def test_a_fineweb_sample_and_local_files_exclude_each_other(prepare, tmp_path):
    write_lines(tmp_path / "a.jsonl", pages(3))
    message = prepare("fineweb.py", "--input=a.jsonl", "--sample=sample-100BT", "--tokenizer=char")
    assert "--sample=sample-100BT selects what to stream, but --input names files" in message


def test_tinyshakespeare_is_checked_and_offline_help_is_shown(prepare, book, monkeypatch):
    assert "is not TinyShakespeare" in prepare("tinyshakespeare.py", "--input", str(book))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    message = prepare("tinyshakespeare.py")
    assert "no network" in message and "--input FILE" in message and "configs/quickstart.toml" in message


def test_tinyshakespeare_from_a_file(tmp_path, monkeypatch):
    """The real text isn't shipped; any other text passes with its own checksum."""
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


@pytest.mark.parametrize("config", ["gpt1_mini", "in_context", "instructgpt_mini"])
def test_a_config_whose_data_an_example_makes_names_the_example(config, tmp_path, monkeypatch):
    """The config names the example that makes its data; so does the refusal, and that script prepares the dataset."""
    text = (ROOT / f"configs/{config}.toml").read_text()
    example, name = re.search(r"bash examples/\w+\.sh", text)[0], re.search(r'dataset = "(\w+)"', text)[1]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"prepare it with `ONLY=data {example}`"):
        prepare_dataset(name)
    assert f"--name {name}" in (ROOT / example.split()[1]).read_text()


def test_an_old_dataset_survives_a_kill_at_any_call_of_overwriting(prepare, tmp_path, monkeypatch):
    settings, texts = CorpusSettings(tokenizer="char"), {"old": TEXT, "new": TEXT[::-1]}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    prepare_documents(Files([tmp_path / "old"], "text"), settings, "x")

    def start(case):
        shutil.copytree(tmp_path / "data", case / "data")

    def overwrite(case):
        monkeypatch.chdir(case)
        prepare_documents(Files([tmp_path / "new"], "text"), dataclasses.replace(settings, overwrite=True), "x")

    ends = set()
    for _ in killed_at_each_call(tmp_path, monkeypatch, start, overwrite):
        corpus = open_corpus([Source("x", 1.0)])
        (directory,) = corpus.directories
        text = decoded(directory, "train") + decoded(directory, "val")
        (end,) = (name for name, content in texts.items() if content == text)
        ends.add(end)
        Path("data/.x.lock").unlink(missing_ok=True)  # the lock itself ends with a process
        prepare_documents(Files([tmp_path / end], "text"), settings, "x")
        assert decoded(Path("data/x"), "train") + decoded(Path("data/x"), "val") == text
        assert end == "old" or os.listdir("data") == ["x"]
        replaced = dataclasses.replace(settings, overwrite=True)
        prepare_documents(Files([tmp_path / "new"], "text"), replaced, "x")  # goes on with what the kill left
        directory = open_corpus([Source("x", 1.0)], verify=True).directories[0]
        assert decoded(directory, "train") + decoded(directory, "val") == texts["new"] and os.listdir("data") == ["x"]
    assert ends == {"old", "new"}


def test_a_dataset_s_files_are_bound_together(prepare, book, tmp_path):
    flags = (f"--input={book}", "--name=x", "--tokenizer=char")
    prepare("text.py", *flags)
    other = CharTokenizer(sorted({*book.read_text(), "\u2603"}))
    for name, change in (
        ("tokenizer.json", lambda path: other.save(path.parent)),
        ("meta.json", lambda path: path.write_text(path.read_text().replace(": 0.1", ": 0.2"))),
        ("train_000000.bin", lambda path: path.write_bytes(path.read_bytes() + b"xx")),
        ("val_000000.bin", lambda path: path.unlink()),
    ):
        path = Path("data/x", name)
        before = path.read_bytes()
        change(path)
        with pytest.raises(UserError, match=f"data/x/{name} .* manifest.json"):
            open_corpus([Source("x", 1.0)])
        path.write_bytes(before)
    path = Path("data/x/train_000000.bin")
    content = bytearray(path.read_bytes())
    content[1100] ^= 1
    path.write_bytes(content)
    assert open_corpus([Source("x", 1.0)])
    with pytest.raises(UserError, match="train_000000.bin has other contents .* or prepare the dataset again"):
        open_corpus([Source("x", 1.0)], verify=True)
    assert "is prepared already" not in prepare("text.py", *flags)  # it is prepared again
    assert open_corpus([Source("x", 1.0)], verify=True)


def test_a_tokenizer_is_not_written_into_a_dataset_that_was_prepared_meanwhile(prepare, tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", pages(100))
    train = BPETokenizer.train

    def slow(texts, vocab_size):
        prepare_documents(Files([Path("a.jsonl")], "text"), CorpusSettings(tokenizer="char"), "x")
        return train(texts, vocab_size)

    monkeypatch.setattr(BPETokenizer, "train", slow)
    message = prepare("tokenizer.py", "--input=a.jsonl", "--name=x", "--vocab_size=300")
    assert "data/x already contains a dataset" in message
    assert open_corpus([Source("x", 1.0)], verify=True)
