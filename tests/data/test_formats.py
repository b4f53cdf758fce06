"""Kinds of files by name and content; gzip as gunzip reads it; arrays and pages."""

import gzip
import io
import json
import subprocess

import pytest

from gpt_arc.data import formats
from gpt_arc.data.documents import Files
from gpt_arc.data.formats import Gunzip, array_elements, text_of_page


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.md", '{"text": 1}', "text"),
        ("a.log", '{"text": "a"}\n{"text": "b"}\n', "lines"),
        ("a", '\ufeff\n[\n {"text": "a"}]', "array"),
        ("a", '{"body": "a"}\n', "text"),
        ("a.py", '{"text"}', "text"),
        ("a", "[link] text", "text"),
        ("a.json", '{"body": "a"}', "lines"),
        ("a.json", " [1]", "array"),
        ("a.page", "<!DOCTYPE html><p>a", "page"),
        ("a", "<htmlish", "page"),
        ("a.JSONLINES.GZ", '{"body": "a"}', "lines"),
        ("a.gz", '{"text": "a"}', "lines"),
        ("a.tsv", "", "table"),
        ("a", "", "text"),
    ],
)
def test_the_kind_comes_from_the_name_else_from_the_content(tmp_path, name, content, kind):
    packed = gzip.compress(content.encode()) if name.lower().endswith(".gz") else content.encode()
    (tmp_path / name).write_bytes(packed)
    assert Files([tmp_path / name], "text").kinds == [kind]
    if "." not in name:
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert Files([tmp_path / name], "text").kinds == [kind]


MEMBERS = [gzip.compress(b"one " * 1000), gzip.compress(b""), gzip.compress(bytes(range(256)) * 9)]


@pytest.mark.parametrize("block", [1, 7, 2**18])
@pytest.mark.parametrize("end", [b"", b"\0" * 600, b"garbage", b"\0\0garbage", b"\x1fx"])
def test_a_gz_is_read_as_gunzip_reads_it(tmp_path, monkeypatch, capsys, end, block):
    monkeypatch.setattr(formats, "BLOCK", block)
    path = tmp_path / "a.gz"
    path.write_bytes(b"".join(MEMBERS) + end)
    reference = subprocess.run(["gzip", "-dc", path], capture_output=True)
    with open(path, "rb") as raw:
        content = io.BufferedReader(Gunzip(raw, path), 1000)
        assert content.read() == reference.stdout and content.read() == b""
    garbage = b"garbage" in reference.stderr
    assert ("a.gz: ignored what follows the gzip data" in capsys.readouterr().err) == garbage


VALUES = [{}, {"a": [1, {"b": "]} ,["}]}, [], "x", {"long": "y" * 500}, None, {"é🌧": -1.5e3}]


@pytest.mark.parametrize("size", [1, 2, 3, 50, 10_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_in_blocks_of_any_size(size, indent):
    for values in (VALUES, [], [VALUES]):
        text = f"\n {json.dumps(values, indent=indent)} \n"
        assert list(array_elements(text[i : i + size] for i in range(0, len(text), size))) == values


@pytest.mark.parametrize("text", ["", "[", "[1", '["a"', "[,]", "[1,]", "[1 2]", "[1]]", '{"a": 1}', "[1] x", "[1,,2]"])
def test_what_is_no_array_is_refused(text):
    for size in (1, 100):
        with pytest.raises(ValueError):
            list(array_elements(text[i : i + size] for i in range(0, len(text), size)))


def test_an_array_without_an_end_is_not_parsed_again_for_every_block():
    blocks = ["[{" + '"a": "' + "x" * 1000] + ["y" * 1000] * 20_000
    with pytest.raises(ValueError):
        list(array_elements(blocks))


def test_a_page_becomes_text():
    html = """<!doctype html><html><head><title>A &amp; B</title><style>p { color: red }</style></head>
    <body><script>if (a < b) document.write("<p>no</p>")</script>
    <h1>First&nbsp;heading</h1><p>One   <b>bold</b>
    line.</p><p>Two<br/>lines</p><ul><li>x</li><li>y</li></ul>
    <pre>kept   spaces
      here</pre><table><tr><td>1</td><td>2</td></tr></table>caf&eacute; &#x1F327;</body></html>"""
    lines = [line for line in text_of_page(html).split("\n") if line]
    assert lines == [
        *("A & B", "First heading", "One bold line.", "Two", "lines", "x", "y", "kept   spaces", "      here"),
        *("1 2", "café 🌧"),
    ]
