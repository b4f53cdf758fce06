"""Documents from files and the Hugging Face hub, in a fixed order that can be resumed at any position.

    documents = Files(find_files(["papers/", "more.jsonl.gz"]), field="text")
    for text, ends in documents.pieces("space"):      # `ends`: this text ends its document
        where = documents.position()                  # JSON; documents.pieces("space", where) resumes there

Each text file or page of HTML, and each line of JSON, element of an array and row of a table is a document; null is an
empty document.
"""

import abc
import bisect
import codecs
import contextlib
import errno
import glob
import hashlib
import io
import itertools
import json
import logging
import lzma
import os
import re
import sys
import tempfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson
from pydantic.dataclasses import dataclass

from gpt_arc.data.formats import (
    KINDS,
    PACKED,
    WITH_FIELDS,
    Kind,
    array_elements,
    ending,
    kind_of_content,
    table_rows,
    text_of_page,
    unpack,
)
from gpt_arc.data.json_lines import parse_line
from gpt_arc.data.tokenizer import well_formed
from gpt_arc.errors import UserError, first_line
from gpt_arc.extras import import_extra
from gpt_arc.settings import STRICT

PIECE = 2**18  # bytes of a text file read at a time
BEGINNING = 2**16  # minimum characters of a document's first piece, unless the document is shorter
ROWS = 128  # of parquet held at a time
KNOWN = (".txt", ".jsonl", ".ndjson", ".jsonlines", ".parquet")  # the files read from a folder without a pattern
BOUNDARY = re.compile(r"\S[ \n]")
Cut = Literal["anywhere", "space", "never"]  # where a document may be split; "space" means before white space


def available_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Documents(abc.ABC):
    """Texts in a fixed order. Text files come in pieces if they may be split, every other document whole."""

    name: str  # for messages
    total_bytes: int | None = None  # None if unknown
    bytes_read: int = 0
    is_one: bool = False  # a single text rather than a collection
    revision: str | None = None  # the version of a mutable source: set by the caller to resume, otherwise by `pieces`

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """A JSON value that identifies the documents, and any change made to them, without reading them."""

    @abc.abstractmethod
    def pieces(self, cut: Cut, position: Any = None) -> Iterator[tuple[str, bool]]:
        """Yields texts from `position` on and whether each ends its document. Raises UserError for damaged files."""

    @abc.abstractmethod
    def position(self) -> Any:
        """The position after the last text yielded."""

    def utf_8(self) -> Iterator[bytes]:
        """Yields all texts in UTF-8, which isn't checked, in blocks that may end within a character."""
        for text, _ in self.pieces("anywhere"):
            yield text.encode()


class Text(Documents):
    """A single text in memory."""

    is_one = True

    def __init__(self, text: str, name: str):
        self.text, self.name = text, name

    def identity(self) -> dict[str, Any]:
        return {"sha256": hashlib.sha256(self.text.encode()).hexdigest()}

    def pieces(self, cut: Cut, position: bool | None = None) -> Iterator[tuple[str, bool]]:
        if position is None:
            yield self.text, True

    def position(self) -> bool:
        return True


class Files(Documents):
    """The documents of JSON, tables, parquet, HTML and text. The name, else the content, tells what a file is.

    All except parquet may be compressed.
    """

    def __init__(self, paths: list[Path], field: str):
        self.paths, self.field = paths, field
        self.kinds = [_kind_of(path, field) for path in paths]
        self.name = str(paths[0]) if len(paths) == 1 else f"{len(paths):,} files"
        self.end = len(paths)  # `pieces` stops before this file
        self._stats = [path.stat() for path in paths]
        self.total_bytes: int = sum(stat.st_size for stat in self._stats)
        self.is_one = len(paths) == 1 and self.kinds[0] not in WITH_FIELDS

    def share(self, number: int, count: int) -> tuple[int, int]:
        """The first and last + 1 of the files that are part `number` of `count`.

        Parts are of about equal bytes, and none is empty unless there are fewer than `count` files with any.
        """
        begins = [0, *itertools.accumulate(stat.st_size for stat in self._stats)]
        filled = [index for index, stat in enumerate(self._stats) if stat.st_size]
        starts = [begins[index] for index in filled]
        bounds, last = [0], 0
        for part in range(1, count):
            target = self.total_bytes * part / count
            near = bisect.bisect_left(starts, target)
            if near == len(starts) or near and target - starts[near - 1] < starts[near] - target:
                near -= 1
            last = max(min(near, len(filled) - count + part), last + 1)  # at least one file for each part
            bounds.append(filled[last] if last < len(filled) else len(self.paths))
        bounds.append(len(self.paths))
        return bounds[number], bounds[number + 1]

    def label(self, path: Path) -> str:
        """What messages call a file."""
        return str(path)

    def summary(self, skipped: Counter[str]) -> str:
        """How many files of each ending are read, and how many are skipped."""
        packings = (path.suffix if path.suffix.lower() in PACKED else "" for path in self.paths)
        read = Counter(f"{ending(path)}{packing}" for path, packing in zip(self.paths, packings))
        left = f"; skipping {_listed(skipped)} (--pattern chooses others)" if skipped else ""
        return f"reading {_listed(read)}{left}"

    def identity(self) -> dict[str, Any]:
        digest = _names_sizes_times(self.paths, self._stats)
        return {"files": len(self.paths), "bytes": self.total_bytes, "names_sizes_times": digest, "field": self.field}

    def position(self) -> list:
        return self._position

    def pieces(self, cut: Cut, position: list | None = None) -> Iterator[tuple[str, bool]]:
        first, place = self._position = position or [0, None]
        before = sum(stat.st_size for stat in self._stats[:first])
        for index, path in enumerate(self.paths[first : self.end], first):
            kind = self.kinds[index]
            many = kind in WITH_FIELDS
            if kind == "text":
                documents = _read_text(path, cut, place)
            elif kind == "page":
                documents = _read_page(path)
            else:
                documents = READERS[kind](path, self.field, place)
            for text, place, read in documents:
                self._position = [index + 1, None] if place is None else [index, place]
                self.bytes_read = before + read
                yield text, many or place is None
            before, place = before + self._stats[index].st_size, None

    def utf_8(self) -> Iterator[bytes]:
        if self.kinds != ["text"]:
            yield from super().utf_8()
            return
        with _opened(self.paths[0], 0) as (file, raw):
            yield file.read(PIECE).removeprefix(codecs.BOM_UTF8)
            while block := file.read(PIECE):
                self.bytes_read = raw.tell()
                yield block


class Piped(Files):
    """The documents of standard input or another pipe, which is copied to a temporary file, as it may be read twice.

    A resumed preparation needs the same content again.
    """

    def __init__(self, pipe: BinaryIO, name: str, field: str):
        self._folder = tempfile.TemporaryDirectory(prefix="gpt-arc-")  # deleted with this object
        path, digest = Path(self._folder.name, "content"), hashlib.sha256()
        with open(path, "wb") as file:
            while block := pipe.read(PIECE):
                digest.update(block)
                file.write(block)
        self._path, self._pipe = path, name
        with self._naming():
            super().__init__([path], field)
        self.name, self._digest = name, digest.hexdigest()

    def label(self, path: Path) -> str:
        return self.name

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Runs the block so that messages name the pipe instead of the temporary file."""
        try:
            yield
        except UserError as error:
            raise UserError(str(error).replace(str(self._path), self._pipe)) from None

    def pieces(self, cut: Cut, position: list | None = None) -> Iterator[tuple[str, bool]]:
        with self._naming():
            yield from super().pieces(cut, position)

    def utf_8(self) -> Iterator[bytes]:
        with self._naming():
            yield from super().utf_8()

    def identity(self) -> dict[str, Any]:
        return {"sha256": self._digest, "field": self.field}


class HubDocuments(Documents):
    """The rows of a dataset on the Hugging Face hub, or of a local folder laid out like one, streamed.

    `branch` is a branch, tag or commit; None: the main branch. `options` are passed to `datasets.load_dataset`.
    `revision` is a commit, so that resuming reads the same data even if the owner has changed the dataset since.
    """

    def __init__(
        self, dataset: str, field: str = "text", split: str = "train", branch: str | None = None, **options: Any
    ):
        self.name, self.dataset, self.field, self.options = dataset, dataset, field, options
        self.split, self.branch = split, branch
        self._rows: Any = None

    def identity(self) -> dict[str, Any]:
        identity = {"dataset": self.dataset, "field": self.field, **self.options}
        if self.split != "train":
            identity["split"] = self.split
        if self.branch is not None:
            identity["branch"] = self.branch
        if Path(self.dataset).is_dir():
            paths = [path for path in sorted(Path(self.dataset).rglob("*")) if path.is_file()]
            identity["names_sizes_times"] = _names_sizes_times(paths, [path.stat() for path in paths])
        return identity

    def position(self) -> dict:
        return self._rows.state_dict()

    def pieces(self, cut: Cut, position: dict | None = None) -> Iterator[tuple[str, bool]]:
        try:
            try:
                self._rows = self._load(self.branch or "main")
            except RuntimeError:  # the dataset is a script: the hub keeps a parquet copy
                self._rows = self._load("refs/convert/parquet")
            if position is not None:
                self._rows.load_state_dict(position)
            for row in self._rows:
                text = _text_of(row, self.field, self.dataset)
                self.bytes_read += len(text)
                yield text, True
        except UserError:
            raise
        except Exception as error:  # each library between here and the network raises its own type
            is_local = Path(self.dataset).is_dir()
            place = "as a dataset" if is_local else "from the Hugging Face hub"
            mend = "repeat the command when connected to resume, or give its parquet files with --input FOLDER"
            if is_local or isinstance(error, ValueError):  # nothing that another attempt would change
                mend = "choose what it has with --config, --hub_split, --field and --branch"
            raise UserError(f"{self.dataset} can't be read {place} ({first_line(error)}): {mend}") from None

    def _load(self, branch: str) -> Any:
        datasets, hub = import_extra("datasets"), import_extra("huggingface_hub")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
        commit = self.revision
        if commit is None and not Path(self.dataset).is_dir():
            commit = hub.HfApi().dataset_info(self.dataset, revision=branch).sha
        rows = datasets.load_dataset(self.dataset, split=self.split, streaming=True, revision=commit, **self.options)
        self.revision = commit
        return rows.select_columns([self.field])


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InputSettings:
    """Files with the documents."""

    input: tuple[str, ...]
    """Files, folders and glob patterns; - is standard input."""
    field: str | None = None
    """Field of JSON, or column of a table or parquet, with the text. None: text."""
    pattern: str | None = None
    """Files to read in a folder, at any depth. None: .txt, JSON lines and parquet."""

    def files(self) -> Files:
        """The documents, after printing what was found in folders.

        Raises UserError for an input that names no file, and for a field of files that have none.
        """
        field = self.field or "text"
        if self.input == ("-",):
            return self._checked(Piped(sys.stdin.buffer, "standard input", field))
        if len(self.input) == 1 and Path(self.input[0]).is_fifo():
            with open(self.input[0], "rb") as pipe:
                return self._checked(Piped(pipe, self.input[0], field))
        for name in self.input:
            if Path(name).is_fifo():
                raise UserError(f"--input {name} reads a pipe, and nothing beside it: give it alone")
        skipped: Counter[str] = Counter()
        files = self._checked(Files(find_files(self.input, self.pattern, skipped), field))
        if any(Path(name).is_dir() for name in self.input):
            print(files.summary(skipped), flush=True)
        return files

    def _checked(self, files: Files) -> Files:
        without = next((path for path, kind in zip(files.paths, files.kinds) if kind not in WITH_FIELDS), None)
        if self.field is not None and without:
            raise UserError(f"{files.label(without)} is a text without fields: leave out --field={self.field}")
        return files


def find_files(inputs: Iterable[str], pattern: str | None = None, skipped: Counter[str] | None = None) -> list[Path]:
    """The files named by `inputs`, which may be files, folders or glob patterns; sorted per input, without duplicates.

    A folder contributes the files at any depth, also behind links, that match `pattern` or, without a pattern, end in
    KNOWN; `skipped` counts the others by ending. Raises UserError for an input without files.
    """
    files: dict[Path, None] = {}
    skipped = Counter() if skipped is None else skipped
    for name in inputs:
        if not name:
            raise UserError("--input is empty: give it files, folders or glob patterns")
        path = Path(name)
        if path.is_dir():
            matches = []
            for file in _files_below(path, skipped):
                if file.match(pattern) if pattern else ending(file) in KNOWN:
                    matches.append(file)
                else:
                    skipped[ending(file) or "without an ending"] += 1
            if not matches:
                condition = f"matches --pattern {pattern}" if pattern else f"ends in {', '.join(KNOWN)}"
                raise UserError(f"no file below {name} {condition}: choose others, as with --pattern '*.md'")
        elif path.exists():
            matches = [path]
        elif name == "-":
            raise UserError("--input - reads standard input, and nothing beside it: give it alone")
        else:
            matches = [Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file()]
            if not matches:
                raise UserError(f"{name} can't be read: {_why_missing(path)}")
        files |= dict.fromkeys(sorted(matches))
    return list(files)


def _why_missing(path: Path) -> str:
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a symbolic link leads back to itself"
    if path.is_symlink():
        return f"it is a symbolic link to {os.readlink(path)}, which doesn't exist"
    return "there is no such file or folder, and no match as a pattern"


def _files_below(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Yields the files below a folder. A folder that links lead to again is read once."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            skipped["of a folder that a link leads to again"] += 1
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        for path in (Path(parent, name) for name in names):
            if path.is_file():
                yield path
            else:
                skipped["that is no file or a broken link"] += 1


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises UserError if it can't be read or isn't UTF-8, naming the first bad byte."""
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe, which has no position
        return _decode(bytes.decode, path.read_bytes(), path, 0).removeprefix("\ufeff")
    return "".join(text for text, _, _ in _read_text(path, "never", None))


def merge_inputs(args: list[str]) -> list[str]:
    """Merge the --input flags of a command line: --input A --input B becomes --input A B."""
    inputs: list[str] = []
    others: list[str] = []
    target = others
    for arg in args:
        if arg.startswith("--"):
            target = inputs if arg.partition("=")[0] == "--input" else others
        if arg != "--input":
            target.append(arg.removeprefix("--input="))
    return others + (["--input", *inputs] if inputs else [])


def _kind_of(path: Path, field: str) -> Kind:
    kind = KINDS.get(ending(path))
    if kind not in (None, "parquet"):
        return kind
    if path.is_fifo():  # what is read of it is gone
        return "text"
    with _opened(path, 0) as (file, raw):
        packed = file is not raw or any(raw.peek(8).startswith(magic) for magic in PACKED.values())
        kind = kind or kind_of_content(file.read(PIECE), path, field)
    if kind == "parquet" and packed:
        raise UserError(f"{path} is a packed .parquet, which packs itself: unpack it first, as with gunzip or zstd -d")
    return kind


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name or 'without an ending'}" for name, count in counts.items())


def _names_sizes_times(paths: list[Path], stats: list[os.stat_result]) -> str:
    """A hash, since a million names would swell meta.json."""
    listing = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


@contextlib.contextmanager
def _opened(path: Path, offset: int) -> Iterator[tuple[io.BufferedIOBase, io.BufferedReader]]:
    """Opens a file at byte `offset` of its uncompressed content. Yields that content and the raw file."""
    try:
        with open(path, "rb") as raw:
            file = unpack(raw, path)
            if file is raw:
                raw.seek(offset)
            else:
                while offset > 0 and (skipped := len(file.read(min(offset, PIECE)))):
                    offset -= skipped
            yield file, raw
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"{path} can't be read: {reason}") from None


def _read_text(path: Path, cut: Cut, start: int | None) -> Iterator[tuple[str, int | None, int]]:
    """Yields pieces of a text, the byte offset after each (None after the last) and the bytes read from disk."""
    offset = read = start or 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    waiting: list[str] = []  # text read since the last cut
    with _opened(path, offset) as (file, raw):
        while block := file.read(PIECE):
            begin = read - len(decoder.getstate()[0])  # of the text that this block completes
            read += len(block)
            text = _decode(decoder.decode, block, path, begin)
            if begin == 0 and text.startswith("\ufeff"):  # skip the byte-order mark
                text, begin = text[1:], 3
            at = _place_to_cut(text, cut) if len(block) == PIECE else None  # a short block is the last
            if at is not None and sum(map(len, waiting)) + at >= BEGINNING:
                offset = begin + (at if text.isascii() else len(text[:at].encode()))
                waiting += [text[:at]] if at else []
                yield "".join(waiting), offset, read if file is raw else raw.tell()
                waiting, text = [], text[at:]
            waiting.append(text)
        _decode(partial(decoder.decode, final=True), b"", path, read - len(decoder.getstate()[0]))
        yield "".join(waiting), None, read if file is raw else raw.tell()


def _decode(decode: Callable[[bytes], str], content: bytes, place: Path | str, offset: int) -> str:
    """Decode bytes at `offset`. Raises UserError naming the first byte that is not UTF-8."""
    try:
        return decode(content)
    except UnicodeDecodeError as error:
        wrong, at = error.object[error.start], offset + error.start
        encoding = "utf-16" if at == 0 and wrong in codecs.BOM_UTF16 else "windows-1252"
        convert = f"if it is text, convert it first, as with: iconv -f {encoding} -t utf-8"
        raise UserError(f"{place} is not UTF-8 text: byte 0x{wrong:02X} at offset {at}; {convert}") from None


def _place_to_cut(text: str, cut: Cut) -> int | None:
    """The position where `text` may be cut, with a non-empty remainder, or None. 0: before it."""
    if cut != "space":
        return 0 if cut == "anywhere" else None
    for start in (max(0, len(text) - 4096), 0):
        last = deque(BOUNDARY.finditer(text, start), maxlen=1)
        if last:
            return last[0].start() + 1
    return None


def _read_json_lines(path: Path, field: str, start: list[int] | None) -> Iterator[tuple[str, list[int], int]]:
    """Yields each line's text, the next line's position (byte offset, lines before it) and the bytes read from disk."""
    offset, number = start or (0, 0)
    with _opened(path, offset) as (file, raw):
        for line in file:
            begin, number = offset, number + 1
            offset += len(line)
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:  # blank, or what only the standard library's parser takes or explains
                if line.isspace():
                    continue
                content = _decode(bytes.decode, line, f"{path}:{number}", begin)
                row = parse_line(content.removeprefix("\ufeff") if begin == 0 else content, f"{path}:{number}")
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.isascii():
                text = _text_of(row, field, f"{path}:{number}")
            yield text, [offset, number], offset if file is raw else raw.tell()


def _read_page(path: Path) -> Iterator[tuple[str, None, int]]:
    """Yields the text of a page of HTML, None and the bytes read from disk."""
    ((html, _, read),) = _read_text(path, "never", None)
    yield text_of_page(html), None, read


def _read_table(path: Path, field: str, start: int | None) -> Iterator[tuple[str, int, int]]:
    """Yields the text of each row of a .csv or .tsv, the number of rows so far and the bytes read from disk."""
    with _opened(path, 0) as (file, raw):
        for number, (line, row) in enumerate(table_rows(_decoded_lines(file, path), path), 1):
            if None in row:
                raise UserError(f"{path}:{line} has more cells than the first line has columns")
            if number > (start or 0):
                yield _text_of(row, field, f"{path}:{line}"), number, raw.tell()


def _decoded_lines(file: io.BufferedIOBase, path: Path) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file, 1):
        text = _decode(bytes.decode, line, f"{path}:{number}", offset)
        yield text if offset else text.removeprefix("\ufeff")
        offset += len(line)


def _read_array(path: Path, field: str, start: int | None) -> Iterator[tuple[str, int, int]]:
    """Yields the text of each element of an array of JSON, the number of them so far and the bytes read from disk."""
    number = 0
    read = 0

    def blocks() -> Iterator[str]:
        nonlocal read
        for text, _, at in _read_text(path, "anywhere", None):
            read = at
            yield text

    try:
        for number, row in enumerate(array_elements(blocks()), 1):
            if number > (start or 0):
                yield _text_of(row, field, f"{path}, element {number}"), number, read
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, after element {number}, is not an array of JSON: {first_line(error)}") from None


def _read_parquet(path: Path, field: str, start: int | None) -> Iterator[tuple[str, int, int]]:
    """Yields each row's text, the number of rows so far and, approximately, the bytes read from disk."""
    parquet, arrow = import_extra("pyarrow.parquet"), import_extra("pyarrow")
    skipped, row, size = start or 0, 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"{path} has no field {field!r}: {_fields(file.schema_arrow.names)}")
            for group in range(file.num_row_groups):  # one at a time: of several, all are held until the last is read
                if row + (rows := file.metadata.row_group(group).num_rows) <= skipped:
                    row += rows
                    continue
                for batch in file.iter_batches(ROWS, [group], columns=[field], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        if row > skipped:
                            read = size * row // file.metadata.num_rows
                            yield _text_of({field: text}, field, f"{path}, row {row}"), row, read
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as parquet: {first_line(error)}") from None


def _text_of(row: Any, field: str, place: str) -> str:
    """A row's text, empty for null. Raises UserError listing the fields if there is no text."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is not an object with fields, as {{{json.dumps(field)}: ...}} would be")
    if field not in row:
        raise UserError(f"{place} has no field {field!r}: {_fields(row)}")
    text = "" if row[field] is None else row[field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"{place}: the field {field!r} is of type {kind}, not text; choose another with --field")
    return well_formed(text)


def _fields(names: Iterable[str]) -> str:
    return f"there are {', '.join(map(repr, names)) or 'none'}; choose one with --field"


READERS = {"lines": _read_json_lines, "array": _read_array, "table": _read_table, "parquet": _read_parquet}
