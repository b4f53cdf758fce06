"""Kinds of files by name or content, and how to read what is packed, tables, arrays of JSON and pages of HTML."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, Literal

from gpt_arc.errors import UserError
from gpt_arc.extras import import_extra

BLOCK = 2**18  # bytes read at a time
Kind = Literal["text", "page", "lines", "array", "table", "parquet"]
KINDS: dict[str, Kind] = {  # by the name's ending
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "page"),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), "lines"),
    **dict.fromkeys((".csv", ".tsv"), "table"),
    ".parquet": "parquet",
}
WITH_FIELDS = ("lines", "array", "table", "parquet")
UNREADABLE = {  # how files begin that people take for text
    b"PK\x03\x04": "a .zip archive, or a document that is one inside, such as .docx or .epub",
    b"7z\xbc\xaf\x27\x1c": "a .7z archive",
    b"Rar!": "a .rar archive",
    b"%PDF-": "a PDF",
}
TAR = 257  # where a .tar has the word "ustar"
PACKED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}  # how each begins


def ending(path: Path) -> str:
    """The ending of a name without that of its packing: .jsonl for a.jsonl.gz."""
    return (Path(path.stem) if path.suffix.lower() in PACKED else path).suffix.lower()


def refuse_unreadable(begin: bytes, path: Path) -> None:
    """Raises UserError, with a mend, if a file begins as one that has to be unpacked or converted first."""
    what = next((name for magic, name in UNREADABLE.items() if begin.startswith(magic)), None)
    what = "a .tar archive" if begin[TAR:].startswith(b"ustar") else what
    what = next((f"another packed file ({name})" for name, magic in PACKED.items() if begin.startswith(magic)), what)
    if what is not None:
        raise UserError(f"{path} holds {what}: unpack it, or convert it to text, and give the files that come of it")


def kind_of_content(begin: bytes, path: Path, field: str) -> Kind:
    """The kind of a file whose name doesn't tell it. JSON counts only if its first object has the field."""
    if begin.startswith(b"PAR1"):
        return "parquet"
    refuse_unreadable(begin, path)
    text = begin.decode("utf-8-sig", "ignore").lstrip()
    many: Kind = "array" if text.startswith("[") else "lines"
    if ending(path) == ".json":
        return many
    if text[:14].lower().startswith(("<!doctype html", "<html")):
        return "page"
    try:
        first, _ = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())
    except (ValueError, RecursionError):
        return "text"
    return many if isinstance(first, dict) and field in first else "text"


def unpack(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    """The content of a file, unpacked if its name or, where that says nothing, its first bytes say so."""
    packing = path.suffix.lower()
    if packing not in PACKED and packing not in KINDS:
        begin = raw.peek(8)
        packing = next((name for name, magic in PACKED.items() if begin.startswith(magic)), "")
    if packing == ".gz":
        return io.BufferedReader(Gunzip(raw, path), BLOCK)
    if packing == ".bz2":
        return bz2.open(raw)
    if packing == ".xz":
        return lzma.open(raw)
    if packing == ".zst":  # unlike zstandard's reader, arrow's detects truncation
        return io.BufferedReader(import_extra("pyarrow").CompressedInputStream(raw, "zstd"), BLOCK)
    return raw


class Gunzip(io.RawIOBase):
    """The content of a .gz, read as gunzip does: what follows the data and isn't gzip is ignored, with a warning."""

    def __init__(self, raw: io.BufferedReader, path: Path):
        self._raw, self._path = raw, path
        self._packed = b""  # what was read and isn't unpacked yet
        self._first = True
        self._member: Any = None  # the decompressor of the member that is being read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._member or self._begin():
            self._packed = self._packed or self._raw.read(BLOCK)
            if not self._packed:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            content = self._member.decompress(self._packed, len(buffer))
            self._packed = self._member.unused_data or self._member.unconsumed_tail
            if self._member.eof:
                self._member = None
            if content:
                buffer[: len(content)] = content
                return len(content)
        return 0

    def _begin(self) -> bool:
        """Begins the first or next of the file's members. Returns whether there is one."""
        packed = self._packed or self._raw.read(BLOCK)
        while not self._first and packed and not packed.strip(b"\0"):  # padding
            packed = self._raw.read(BLOCK)
        packed = packed if self._first else packed.lstrip(b"\0")
        self._packed = packed + self._raw.read(1) if len(packed) == 1 else packed
        if self._packed.startswith(PACKED[".gz"]):
            self._first, self._member = False, zlib.decompressobj(31)  # 31: with gzip's header and checksum
            return True
        if self._packed and self._first:
            raise gzip.BadGzipFile("Not a gzipped file")
        if self._packed:
            print(f"{self._path}: ignored what follows the gzip data, as gunzip does", file=sys.stderr)
            self._raw.seek(0, io.SEEK_END)
            self._packed = b""
        return False


def table_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    """Yields the number of the first line, and the cells by column, of each row of a .csv or .tsv.

    The last columns of a row that is too short are None. The surplus cells of one that is too long are a list under the
    key None, which is missing otherwise. Raises UserError for a damaged file.
    """
    csv.field_size_limit(1 << 30)
    # quotation marks have no meaning in a .tsv, as in GLUE's files
    tabs = ending(path) == ".tsv"
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
    try:
        columns, before = next(reader, []), reader.line_num
        twice = next((name for name in columns if columns.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: two columns are named {twice!r}")
        for cells in reader:
            if cells:
                surplus = {None: cells[len(columns) :]} if len(cells) > len(columns) else {}
                yield before + 1, dict(itertools.zip_longest(columns, cells[: len(columns)])) | surplus
            before = reader.line_num
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def array_elements(blocks: Iterable[str]) -> Iterator[Any]:
    """Yields the elements of an array of JSON whose text arrives in blocks. Raises ValueError if it isn't one."""
    decoder, parts, length, enough = json.JSONDecoder(), [], 0, 0
    state = "["  # what comes next; "first": an element or ]
    for block in itertools.chain(blocks, [""]):
        parts.append(block)
        length += len(block)
        if length < enough and block:  # an element that isn't complete is tried again when the text has doubled
            continue
        text, at = "".join(parts), 0
        while state != "end" and (at := WHITESPACE.match(text, at).end()) < len(text):
            if text[at] == "]" and state in ("first", ","):
                at, state = at + 1, "end"
            elif state in ("[", ","):
                if text[at] != state:
                    raise ValueError(f"{text[at : at + 20]!r} stands where {state} should")
                at, state = at + 1, "first" if state == "[" else "element"
            else:
                try:
                    element, at = decoder.raw_decode(text, at)
                except ValueError:
                    if not block:
                        raise
                    enough = 2 * (len(text) - at)
                    break
                yield element
                state = ","
        parts, length = [text[at:]], len(text) - at
        if state == "end" and parts[0].strip():
            raise ValueError("more follows the array")
    if state != "end":
        raise ValueError("the array has no end")


class _Page(HTMLParser):
    """Collects the text of a page: a line for each paragraph, heading, item or row."""

    LINES = frozenset(
        "address article aside blockquote br dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 "
        "header hr li main nav ol p pre section table title tr ul".split()
    )
    HIDDEN = frozenset(("script", "style", "template", "noscript"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = self._pre = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._hidden += tag in self.HIDDEN
        self._pre += tag == "pre"
        self._line(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self._line(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(self._hidden - (tag in self.HIDDEN), 0)
        self._pre = max(self._pre - (tag == "pre"), 0)
        self._line(tag)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._add(data if self._pre else re.sub(r"\s+", " ", data))

    def _line(self, tag: str) -> None:
        if tag in self.LINES:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self._add(" ")

    def _add(self, text: str) -> None:
        spaced = not self.parts or self.parts[-1][-1].isspace()
        if text := text.lstrip(" ") if spaced and not self._pre else text:
            self.parts.append(text)


def text_of_page(html: str) -> str:
    """The text of a page of HTML, without scripts and styles; entities become characters."""
    page = _Page()
    page.feed(html)
    page.close()
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", "".join(page.parts))).strip()
