"""Documents from files and from the hub: the same in every format and from any position; damage is reported."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import threading
import types
from collections import deque
from pathlib import Path

import pytest

from gpt_arc.data import documents
from gpt_arc.data.documents import Files, HubDocuments, InputSettings, Piped, Text, find_files, merge_inputs, read_text
from gpt_arc.data.rows import parsed_rows
from gpt_arc.errors import UserError

TEXTS = [
    "The first.\n",
    "Zweitens: größer, schöner 🌧 und <|endoftext|>\r\n\twith tabs",
    "  third \n\n with    spaces   \n",
    "x" * 500,
    *(f"{n} more of these, " * n for n in range(1, 200)),
]
PACKED = ["txt", "txt.gz", "txt.zst", "txt.bz2", "txt.xz"]
FORMATS = [
    *PACKED,
    "jsonl",
    "json.gz",
    "jsonl.zst",
    "ndjson.xz",
    "jsonlines.bz2",
    "array.json",
    "csv",
    "csv.gz",
    "parquet",
]


def pack(name, content):
    if name.endswith(".gz"):
        return gzip.compress(content)
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames, as parallel compressors write
        return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))
    if name.endswith(".bz2"):
        return bz2.compress(content)
    return lzma.compress(content) if name.endswith(".xz") else content


def write(folder, texts, form):
    """Writes `texts` in a format: one file each for txt, otherwise one file for all."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = arrow.table({"id": range(len(texts)), "text": texts})
        parquet.write_table(table, folder / "a.parquet", row_group_size=50)
    elif form.startswith("txt"):
        for i, text in enumerate(texts):
            (folder / f"{i:06}.{form}").write_bytes(pack(form, text.encode()))
    elif form.startswith("csv"):
        table = io.StringIO(newline="")
        csv.writer(table).writerows([("id", "text"), *enumerate(texts)])
        (folder / f"a.{form}").write_bytes(pack(form, table.getvalue().encode()))
    elif form == "array.json":
        (folder / "a.json").write_text(json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=1))
    else:
        lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
        (folder / f"a.{form}").write_bytes(pack(form, lines.encode()))
    return folder


def read(source, cut="space", position=None):
    """Whole documents, and the number of pieces they were read in."""
    texts, pieces = [""], 0
    for text, ends in source.pieces(cut, position):
        texts[-1] += text
        pieces += 1
        if ends:
            texts.append("")
    return texts[:-1], pieces


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_documents_from_any_position(tmp_path, form):
    source = Files(find_files([f"{write(tmp_path, TEXTS, form)}/*"]), "text")
    assert read(source)[0] == TEXTS and source.bytes_read == source.total_bytes
    positions = [json.dumps(source.position()) for _ in source.pieces("space")]
    for count in (1, 17, 50, 51, 128, len(TEXTS) - 1, len(TEXTS)):
        resumed = Files(find_files([f"{tmp_path}/*"]), "text")
        assert read(resumed, position=json.loads(positions[count - 1]))[0] == TEXTS[count:]
        assert resumed.position() == source.position()
        assert resumed.identity() == source.identity() and source.bytes_read == source.total_bytes


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("cut", ["anywhere", "space", "never"])
def test_a_long_text_is_read_in_pieces_cut_before_white_space(tmp_path, monkeypatch, form, cut):
    monkeypatch.setattr(documents, "PIECE", 64)
    monkeypatch.setattr(documents, "BEGINNING", 1)
    text = " ".join(TEXTS[:40]) + "\u3000\n ö" * 40 + "y" * 300 + "\n\n"
    (tmp_path / f"a.{form}").write_bytes(pack(form, b"\xef\xbb\xbf" + text.encode()))  # a byte-order mark first
    source = Files([tmp_path / f"a.{form}"], "text")
    pieces, positions = [], []
    for piece, ends in source.pieces(cut):
        pieces.append(piece)
        positions.append(source.position())
        assert ends == (sum(map(len, pieces)) == len(text))
    assert "".join(pieces) == text and all(pieces) and source.is_one
    assert len(pieces) == 1 if cut == "never" else len(pieces) > 100
    if cut == "space":
        assert all(after[0] in " \n" and not before[-1].isspace() for before, after in zip(pieces, pieces[1:]))
    for k in range(0, len(pieces), 13):
        assert "".join(piece for piece, _ in source.pieces(cut, positions[k])) == "".join(pieces[k + 1 :])


def test_a_character_or_line_end_may_span_two_reads(tmp_path, monkeypatch):
    text = "añ🌧\r\n" * 20
    monkeypatch.setattr(documents, "BEGINNING", 1)
    (tmp_path / "a.txt").write_text(text, newline="")
    for size in range(1, 12):
        monkeypatch.setattr(documents, "PIECE", size)
        assert read(Files([tmp_path / "a.txt"], "text"))[0] == [text]


def test_blank_lines_are_skipped_and_lone_surrogates_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a\\ud83dz"}\n\n  \n{"text": "\\ud83c\\udf27"}')
    assert read(Files([tmp_path / "a.jsonl"], "text"))[0] == ["a\ufffdz", "🌧"]


def test_null_is_an_empty_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": ""}\n')
    assert read(Files([tmp_path / "a.jsonl"], "text"))[0] == ["a", "", ""]
    write(tmp_path, ["a", None, ""], "parquet")
    assert read(Files([tmp_path / "a.parquet"], "text"))[0] == ["a", "", ""]


def test_a_text_in_memory_is_one_document():
    text = Text("a\r\nb", "it")
    assert list(text.pieces("space")) == [("a\r\nb", True)] and text.is_one
    assert list(text.pieces("space", text.position())) == []
    assert text.identity() == {"sha256": hashlib.sha256(b"a\r\nb").hexdigest()}


def damaged(content, damage):
    return {"cut": content[: len(content) * 2 // 3], "changed": content[:40] + b"\0\0\0\0" + content[44:]}[damage]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"good " * 300_000 + b"caf\xe9 ", "a.txt is not UTF-8 text: byte 0xE9 at offset 1500003"),
        ("a.txt", "größ".encode()[:3], "byte 0xC3 at offset 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "a.jsonl:2 is not a line of JSON: Expecting"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "a.jsonl:2 is not UTF-8 text: byte 0xE9 at offset 27"),
        ("a.jsonl", b'{"title": "a", "id": 3}\n', "a.jsonl:1 has no field 'text': there are 'title', 'id'; choose"),
        ("a.jsonl", b'{"text": ["a"]}\n', "a.jsonl:1: the field 'text' is of type list, not text"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1 is not an object"),
        ("a.parquet", b"PAR1 no parquet PAR1", "a.parquet can't be read as parquet"),
        ("a.txt.gz", b"no gzip", "a.txt.gz can't be read: Not a gzipped file"),
        ("a.txt.gz", "cut", "a.txt.gz can't be read: Compressed file ended before"),
        ("a.jsonl.gz", "changed", "a.jsonl.gz can't be read"),
        ("a.txt.zst", b"no zstd", "a.txt.zst can't be read"),
        ("a.txt.zst", "cut", "a.txt.zst can't be read: Truncated"),
        ("a.txt.bz2", "cut", "a.txt.bz2 can't be read: Compressed file ended before"),
        ("a.txt.bz2", b"no bzip2", "a.txt.bz2 can't be read: Invalid data stream"),
        ("a.txt.xz", "cut", "a.txt.xz can't be read: Compressed file ended before"),
        ("a.txt.xz", b"no xz at all", "a.txt.xz can't be read: Input format not supported"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', "a.json, after element 1, is not an array of JSON: Expecting"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "a.json, after element 1, is not an array of JSON"),
        ("a.json", b'[{"text": "a"}] {', "a.json, after element 1, is not an array of JSON: more follows the array"),
        ("a.json", b'["text"]', "a.json, element 1 is not an object"),
        ("a.csv", b"id,text\n1,a,b\n", "a.csv:2 has more cells than the first line has columns"),
        ("a.csv", b"text,text\n", "a.csv: two columns are named 'text'"),
        ("a.csv", b"id,txt\n1,a\n", "a.csv:2 has no field 'text': there are 'id', 'txt'"),
        (
            "a.txt",
            "good".encode("utf-16"),
            "byte 0xFF at offset 0; if it is text, convert it first, as with: iconv -f utf-16",
        ),
        ("a.csv", b"id,text\n1,caf\xe9\n", "a.csv:2 is not UTF-8 text: byte 0xE9 at offset 13"),
        ("a.csv", b"text\na\rb\n", "a.csv, line 2: new-line character seen in unquoted field"),
        ("a.parquet", "cut", "a.parquet can't be read as parquet"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, sentence):
    path = tmp_path / name
    if isinstance(content, str):
        write(
            tmp_path,
            [hashlib.sha256(bytes([i % 251])).hexdigest() + str(i) for i in range(1000)],
            name.partition(".")[2],
        )
        path = next(tmp_path.iterdir())
        path.rename(tmp_path / name)
        content = damaged((tmp_path / name).read_bytes(), content)
    if not name.endswith(".txt"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(Files([tmp_path / name], "text"))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_an_element_without_the_field_is_no_damaged_array(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"body": "b"}]')
    with pytest.raises(UserError, match="^[^ ]*a.json, element 2 has no field 'text': there are 'body'"):
        read(Files([tmp_path / "a.json"], "text"))


@pytest.mark.parametrize("reader", ["documents", "rows"])
def test_one_row_group_of_parquet_is_held_at_a_time(reader, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [os.urandom(500).hex() for _ in range(4000)]
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=200)  # 0.2 MB each
    before, held = arrow.total_allocated_bytes(), []

    def measure(*_):
        held.append(arrow.total_allocated_bytes() - before)

    if reader == "documents":
        deque(map(measure, Files([tmp_path / "a.parquet"], "text").pieces("never")), maxlen=0)
    else:
        parsed_rows(tmp_path / "a.parquet", measure)
    assert len(held) == 4000 and max(held) < 1e6


def test_a_parquet_column_must_exist_and_hold_text(tmp_path):
    write(tmp_path, ["a"], "parquet")
    for field, sentence in (
        ("txt", "has no field 'txt': there are 'id', 'text'"),
        ("id", "row 1: the field 'id' is of type int, not text"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(Files([tmp_path / "a.parquet"], field))


def test_a_missing_library_is_named_with_its_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(UserError, match=r"pyarrow is not installed: `pip install -e '.\[data\]'`"):
        read(Files([tmp_path / "a.txt.zst"], "text"))


def test_files_are_found_once_and_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.txt", "b/below/1.jsonl.gz", "b/10.parquet", "b/no.md", "b/TEXT.TXT", "a.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def paths(*inputs, **kwargs):
        return [str(path) for path in find_files(list(inputs), **kwargs)]

    of_b = ["b/10.parquet", "b/2.txt", "b/TEXT.TXT", "b/below/1.jsonl.gz"]
    assert paths("b") == paths("b/", "b/2.txt") == of_b
    assert paths("?.txt", "b") == ["a.txt", "c.txt", *of_b]
    assert paths("b/**/*.gz", "c.txt") == ["b/below/1.jsonl.gz", "c.txt"]
    assert paths("b", pattern="*.md") == paths("b/no.md") == ["b/no.md"]
    for wrong in ("nowhere", "*.csv", "-"):
        sentence = "give it alone" if wrong == "-" else "can't be read: there is no such file or folder"
        with pytest.raises(UserError, match=sentence):
            find_files([wrong])
    with pytest.raises(UserError, match="no file below b matches --pattern"):
        find_files(["b"], "*.csv")


def test_a_folder_s_summary_counts_what_is_read_and_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in (
        "a/1.txt",
        "a/2.TXT",
        "a/3.jsonl.gz",
        "a/b/4.txt",
        "a/b/5.pdf",
        "a/b/README",
        "a/6.md.gz",
        "other/7.txt",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    os.symlink(tmp_path / "other", "a/linked")
    os.symlink(tmp_path / "a", "a/b/loop")
    os.symlink("nowhere", "a/broken.txt")
    files = InputSettings(input=("a",)).files()
    assert [str(path) for path in files.paths] == ["a/1.txt", "a/2.TXT", "a/3.jsonl.gz", "a/b/4.txt", "a/linked/7.txt"]
    output = capsys.readouterr().out
    assert output.startswith("reading 4 .txt, 1 .jsonl.gz; skipping ") and output.endswith(
        "(--pattern chooses others)\n"
    )
    for part in (
        "1 .pdf",
        "1 .md",
        "1 without an ending",
        "1 that is no file",
        "1 of a folder that a link leads to again",
    ):
        assert part in output
    InputSettings(input=("a/1.txt",)).files()
    assert capsys.readouterr().out == ""


def test_a_field_of_a_text_is_refused(tmp_path):
    write_text = {"a.txt": "a", "b.html": "<p>b", "c.jsonl": '{"body": "c"}\n'}
    for name, text in write_text.items():
        (tmp_path / name).write_text(text)
    for name in ("a.txt", "b.html"):
        with pytest.raises(UserError, match=f"{name} is a text without fields: leave out --field=body"):
            InputSettings(input=(str(tmp_path / "c.jsonl"), str(tmp_path / name)), field="body").files()
    assert read(InputSettings(input=(str(tmp_path / "c.jsonl"),), field="body").files())[0] == ["c"]


@pytest.mark.parametrize("form", FORMATS)
def test_standard_input_is_read_whatever_it_holds(tmp_path, monkeypatch, form):
    texts = TEXTS[1:2] if form.startswith("txt") else TEXTS
    (path,) = write(tmp_path, texts, form).iterdir()
    results = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
        source = InputSettings(input=("-",)).files()
        results.append((source.identity(), source.name, source.is_one, read(source)[0]))
    expected = texts
    if form.startswith("csv"):  # has no sign of being a table
        expected = [gzip.decompress(path.read_bytes()).decode() if form == "csv.gz" else path.read_bytes().decode()]
    assert results[0] == results[1] and results[0][1:] == ("standard input", len(expected) == 1, expected)


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("name", ["a.parquet.{}", "a.parquet", "a"])
def test_a_packed_parquet_is_refused_with_a_mend(tmp_path, packing, name):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["x"]}), tmp_path / "plain")
    (tmp_path / name.format(packing)).write_bytes(pack(f"txt.{packing}", (tmp_path / "plain").read_bytes()))
    with pytest.raises(UserError, match=r"is a packed \.parquet, which packs itself: unpack it first"):
        Files([tmp_path / name.format(packing)], "text")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.zip", b"PK\x03\x04rest", "holds a .zip archive"),
        ("a.pdf", b"%PDF-1.7", "holds a PDF"),
        ("a.tar.gz", gzip.compress(b"a".ljust(257, b"\0") + b"ustar\0" + bytes(250)), "holds a .tar archive"),
        ("a.gz.gz", gzip.compress(gzip.compress(b"a text")), "holds another packed file (.gz)"),
    ],
    ids=["zip", "pdf", "tar.gz", "gz.gz"],
)
def test_archives_are_refused_with_a_mend(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(sentence)}.*: unpack it, or convert it to text"):
        Files([tmp_path / name], "text")


def test_links_that_lead_nowhere_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    Path("broken.txt").symlink_to("gone.txt")
    for name, sentence in (
        ("circle", "circle can't be read: a symbolic link leads back to itself"),
        ("circle/a.txt", "circle/a.txt can't be read: a symbolic link leads back to itself"),
        ("broken.txt", "broken.txt can't be read: it is a symbolic link to gone.txt, which doesn't exist"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
            find_files([name])


def test_messages_name_the_pipe_not_its_copy(monkeypatch):
    for content, sentence in (
        (b"a\xff", "standard input is not UTF-8 text"),
        (b"PK\x03\x04", "standard input holds a .zip"),
    ):
        with pytest.raises(UserError, match=f"^{sentence}"):
            list(Piped(io.BytesIO(content), "standard input", "text").pieces("never"))


def test_a_pipe_among_other_inputs_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="pipe reads a pipe, and nothing beside it: give it alone$"):
        InputSettings(input=(str(tmp_path / "a.txt"), str(tmp_path / "pipe"))).files()


def test_inputs_may_be_given_by_one_flag_or_several():
    together = ["--name=x", "--input", "a", "b", "c=d"]
    assert merge_inputs(["--input", "a", "b", "--name=x", "--input=c=d"]) == together
    assert merge_inputs(["--input=a", "--name=x", "--input", "b", "c=d"]) == together
    assert merge_inputs(["--name", "x"]) == ["--name", "x"] and merge_inputs(["--inputs=a"]) == ["--inputs=a"]


def test_a_hub_dataset_is_read_from_any_position(tmp_path, monkeypatch):
    """A local folder stands in for the hub; the stream is the library's."""
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "1", TEXTS, "parquet")
    write(tmp_path / "2", TEXTS[::-1], "parquet")
    branches = {"main": "m1", "refs/convert/parquet": "p1"}
    files_of_commit, loads = {"p1": "12"}, []  # the files of each commit that can be loaded
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info",
        lambda self, name, revision: types.SimpleNamespace(sha=branches[revision]),
    )

    def local(path, load=datasets.load_dataset, **kwargs):
        loads.append((path, kwargs.pop("name"), kwargs.pop("revision")))
        if loads[-1][2] not in files_of_commit:
            raise RuntimeError("Dataset scripts are no longer supported")
        files = [str(tmp_path / number / "a.parquet") for number in files_of_commit[loads[-1][2]]]
        return load("parquet", data_files=files, cache_dir=str(tmp_path / "cache"), **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", local)
    source = HubDocuments("owner/pages", name="sample")
    expected = TEXTS + TEXTS[::-1]
    texts, positions = [], []
    for text, ends in source.pieces("space"):
        assert ends
        texts.append(text)
        positions.append(json.dumps(source.position()))
    assert texts == expected and loads == [("owner/pages", "sample", commit) for commit in ("m1", "p1")]
    assert source.revision == "p1"
    branches |= {"main": "m2", "refs/convert/parquet": "p2"}  # the owner changes the dataset
    files_of_commit |= {"m2": "2", "p2": "2"}
    for count in (1, 49, 50, 100, len(TEXTS), len(TEXTS) + 60, len(expected)):
        resumed = HubDocuments("owner/pages", name="sample")
        resumed.revision = source.revision
        assert read(resumed, position=json.loads(positions[count - 1]))[0] == expected[count:]
    assert read(source)[0] == expected  # also from the beginning
    assert read(HubDocuments("owner/pages", name="sample"))[0] == TEXTS[::-1] and loads[-1][2] == "m2"
    assert source.identity() == {"dataset": "owner/pages", "field": "text", "name": "sample"}


def test_an_unreachable_hub_is_reported_in_one_sentence(monkeypatch):
    pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(UserError, match=r"^owner/pages can't be read .*Couldn't reach the hub\): .*--input FOLDER$"):
        next(HubDocuments("owner/pages").pieces("space"))


def test_a_pipe_is_read_whole(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes("\ufeffün\n".encode()), daemon=True)
    writer.start()
    assert read_text(pipe) == "ün\n"
    writer.join()


def test_a_named_pipe_is_read_like_standard_input(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text('{"text": "a"}\n{"text": "b"}\n'), daemon=True)
    writer.start()
    source = InputSettings(input=(str(pipe),)).files()
    assert read(source)[0] == ["a", "b"] and source.name == str(pipe) and not source.is_one
    writer.join()
