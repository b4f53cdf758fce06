"""Documents out of files and of the Hugging Face hub: in an order that never changes, and from any point of it on.

    documents = Files(find_files(["papers/", "more.jsonl.gz"]), field="text")
    for text, ends in documents.pieces("space"):      # `ends`: the document ends with this text
        where = documents.position()                  # JSON-able; documents.pieces("space", where) goes on there

A text file is one document, a line of JSON or a row of parquet another; one without text (null) is an empty document.
"""

import abc
import codecs
import contextlib
import glob
import gzip
import hashlib
import importlib
import io
import json
import logging
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic.dataclasses import dataclass

from gpt_arc.data.tokenizer import well_formed
from gpt_arc.errors import UserError, first_line
from gpt_arc.settings import STRICT

PIECE = 2**18  # bytes of a text file that are read at a time
BEGINNING = 2**16  # characters that the first piece of a document has at least, if the document has
ROWS = 128  # of parquet that are held at a time
PACKED = (".gz", ".zst")
JSON_LINES, PARQUET = (".jsonl", ".json"), (".parquet",)
KNOWN = (".txt", ".jsonl", ".parquet")  # what is read of a folder unless a pattern says
BOUNDARY = re.compile(r"\S[ \n]")
Cut = Literal["anywhere", "space", "never"]  # where a document may be cut into pieces: "space" is before white space


class Documents(abc.ABC):
    """Texts in a fixed order. Text files come in pieces where they may be cut, every other document whole."""

    name: str  # what a message calls them
    total_bytes: int | None = None  # of what is to be read, None where nobody knows
    bytes_read: int = 0
    is_one: bool = False  # whether they are a single text rather than a collection
    revision: str | None = None  # which state of what may change is read: given to go on, else set on beginning

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON-able, and found without reading: the same identity means the same documents."""

    @abc.abstractmethod
    def pieces(self, cut: Cut, position: Any = None) -> Iterator[tuple[str, bool]]:
        """Texts, each with whether its document ends there, from `position` on. Raises UserError for damaged files."""

    @abc.abstractmethod
    def position(self) -> Any:
        """Where `pieces` goes on after the text that came last."""


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
    """The documents of files: text, JSON lines or parquet, as their names end; text and JSON lines also packed."""

    def __init__(self, paths: list[Path], field: str):
        self.paths, self.field = paths, field
        self.name = str(paths[0]) if len(paths) == 1 else f"{len(paths):,} files"
        self._stats = [path.stat() for path in paths]
        self.total_bytes = sum(stat.st_size for stat in self._stats)
        self.is_one = len(paths) == 1 and not _holds_many(paths[0])

    def identity(self) -> dict[str, Any]:
        listing = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in zip(self.paths, self._stats)]
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()  # a million names would swell meta.json
        return {"files": len(listing), "bytes": self.total_bytes, "names_sizes_times": digest, "field": self.field}

    def position(self) -> list:
        return self._position

    def pieces(self, cut: Cut, position: list | None = None) -> Iterator[tuple[str, bool]]:
        first, place = self._position = position or [0, None]
        before = sum(stat.st_size for stat in self._stats[:first])
        for index, path in enumerate(self.paths[first:], first):
            many = _holds_many(path)
            if _ends(path, PARQUET):
                found = _read_parquet(path, self.field, place)
            elif _ends(path, JSON_LINES):
                found = _read_json_lines(path, self.field, place)
            else:
                found = _read_text(path, cut, place)
            for text, place, read in found:
                self._position = [index + 1, None] if place is None else [index, place]
                self.bytes_read = before + read
                yield text, many or place is None
            before, place = before + self._stats[index].st_size, None


class HubDocuments(Documents):
    """The rows of a dataset on the Hugging Face hub, streamed; `options` are those of `datasets.load_dataset`.

    `revision` is a commit there: what is read on is what was begun, whatever its owner has changed since.
    """

    def __init__(self, dataset: str, field: str = "text", **options: Any):
        self.name, self.dataset, self.field, self.options = dataset, dataset, field, options
        self._rows: Any = None

    def identity(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "field": self.field, **self.options}

    def position(self) -> dict:
        return self._rows.state_dict()

    def pieces(self, cut: Cut, position: dict | None = None) -> Iterator[tuple[str, bool]]:
        try:
            try:
                self._rows = self._load("main")
            except RuntimeError:  # a dataset that is still a script: the hub keeps a copy of it in parquet
                self._rows = self._load("refs/convert/parquet")
            if position is not None:
                self._rows.load_state_dict(position)
            for row in self._rows:
                text = _text_of(row, self.field, self.dataset)
                self.bytes_read += len(text)
                yield text, True
        except UserError:
            raise
        except Exception as error:  # every library between here and the network raises its own
            raise UserError(
                f"{self.dataset} can't be had from the Hugging Face hub ({first_line(error)}): connect, and the same "
                "command goes on from here, or give its parquet files by --input FOLDER"
            ) from None

    def _load(self, branch: str) -> Any:
        datasets, hub = extra("datasets"), extra("huggingface_hub")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
        commit = self.revision or hub.HfApi().dataset_info(self.dataset, revision=branch).sha
        rows = datasets.load_dataset(self.dataset, split="train", streaming=True, revision=commit, **self.options)
        self.revision = commit
        return rows.select_columns([self.field])


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InputSettings:
    """Which files hold the documents."""

    input: tuple[str, ...]
    """Files, folders and glob patterns."""
    field: str = "text"
    """The field of JSON lines, or the column of parquet, that holds the text."""
    pattern: str | None = None
    """Which files of a folder, at any depth. None: .txt, .jsonl and .parquet."""

    def files(self) -> Files:
        """The documents. Raises UserError for an input that names no file."""
        return Files(find_files(self.input, self.pattern), self.field)


def find_files(inputs: Iterable[str], pattern: str | None = None) -> list[Path]:
    """The files that `inputs` name: files, folders and glob patterns; each once, those of one input sorted.

    Of a folder come the files below it that match `pattern`, without one those of a known kind. Raises UserError for
    an input that names none.
    """
    files: dict[Path, None] = {}
    for named in inputs:
        if not named:
            raise UserError("--input names nothing: give it files, folders or glob patterns")
        path = Path(named)
        if path.is_dir():
            below = (file for file in path.rglob("*") if file.is_file())
            found = [file for file in below if (file.match(pattern) if pattern else _ends(file, KNOWN))]
            if not found:
                wanted = f"matches --pattern {pattern}" if pattern else f"ends in {', '.join(KNOWN)}"
                raise UserError(f"no file below {named} {wanted}: --pattern chooses others, as --pattern '*.md'")
        elif path.exists():
            found = [path]
        else:
            found = [Path(file) for file in glob.glob(named, recursive=True) if Path(file).is_file()]
            if not found:
                raise UserError(f"{named} can't be read: there is no such file or folder, nor files of such names")
        files |= dict.fromkeys(sorted(found))
    return list(files)


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises UserError if it can't be read, or naming the first byte that is not UTF-8."""
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe, which can't tell how far it was read
        return _decode(bytes.decode, path.read_bytes(), path, 0).removeprefix("\ufeff")
    return "".join(text for text, _, _ in _read_text(path, "never", None))


def gathered(args: list[str]) -> list[str]:
    """A command line with its --input flags as one: --input A --input B means what --input A B does."""
    inputs: list[str] = []
    others: list[str] = []
    target = others
    for arg in args:
        if arg.startswith("--"):
            target = inputs if arg.partition("=")[0] == "--input" else others
        if arg != "--input":
            target.append(arg.removeprefix("--input="))
    return others + (["--input", *inputs] if inputs else [])


def extra(module: str) -> Any:
    """A module that only the extra [data] installs. Raises UserError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.split(".")[0]
        raise UserError(f"{name} is not installed: `pip install -e '.[data]'` brings it") from None


def _ends(path: Path, endings: tuple[str, ...]) -> bool:
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return name.endswith(endings)


def _holds_many(path: Path) -> bool:
    return _ends(path, (*JSON_LINES, *PARQUET))


@contextlib.contextmanager
def _opened(path: Path, offset: int) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file's content from byte `offset` of it on, unpacked; and the file as it is on the disk."""
    try:
        with open(path, "rb") as raw:
            file = raw
            if path.suffix.lower() == ".gz":
                file = gzip.open(raw)
            elif path.suffix.lower() == ".zst":  # unlike zstandard's own reader, arrow's notices a file cut short
                file = io.BufferedReader(extra("pyarrow").CompressedInputStream(raw, "zstd"), PIECE)
            if file is raw:
                raw.seek(offset)
            else:
                while offset > 0 and (skipped := len(file.read(min(offset, PIECE)))):
                    offset -= skipped
            yield file, raw
    except (EOFError, zlib.error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"{path} can't be read: {reason}") from None


def _read_text(path: Path, cut: Cut, start: int | None) -> Iterator[tuple[str, int | None, int]]:
    """Pieces of a text, the byte offset after each (None after the last) and the bytes read of the disk."""
    offset = read = start or 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    waiting: list[str] = []  # what has been read since the last cut
    with _opened(path, offset) as (file, raw):
        while block := file.read(PIECE):
            read += len(block)
            text = _decode(decoder.decode, block, path, read - len(block) - len(decoder.getstate()[0]))
            if read == len(block) and text.startswith("\ufeff"):  # a byte-order mark is no text
                text, offset = text[1:], 3
            at = _place_to_cut(text, cut) if len(block) == PIECE else 0  # fewer bytes are the last
            if at and sum(map(len, waiting)) + at >= BEGINNING:
                piece = "".join((*waiting, text[:at]))
                offset += len(piece.encode())
                yield piece, offset, raw.tell()
                waiting, text = [], text[at:]
            waiting.append(text)
        _decode(partial(decoder.decode, final=True), b"", path, read - len(decoder.getstate()[0]))
        yield "".join(waiting), None, raw.tell()


def _decode(decode: Callable[[bytes], str], content: bytes, place: Path | str, offset: int) -> str:
    """`decode` of bytes at `offset`. Raises UserError naming the first that is not UTF-8."""
    try:
        return decode(content)
    except UnicodeDecodeError as error:
        wrong, at = error.object[error.start], offset + error.start
        raise UserError(f"{place} is not UTF-8 text: byte 0x{wrong:02X} at offset {at}") from None


def _place_to_cut(text: str, cut: Cut) -> int:
    """The last place where `text` may be cut so that something is left, 0 if there is none."""
    if cut != "space":
        return max(0, len(text) - 1) if cut == "anywhere" else 0
    for start in (max(0, len(text) - 4096), 0):
        found = deque(BOUNDARY.finditer(text, start), maxlen=1)  # the last of them
        if found:
            return found[0].start() + 1
    return 0


def _read_json_lines(path: Path, field: str, start: list[int] | None) -> Iterator[tuple[str, list[int], int]]:
    """Texts of the lines, where the next line starts (byte offset, lines before it) and the bytes read of the disk."""
    offset, number = start or (0, 0)
    with _opened(path, offset) as (file, raw):
        for line in file:
            begin, number = offset, number + 1
            offset += len(line)
            if line.isspace():
                continue
            text = _decode(bytes.decode, line, f"{path}:{number}", begin)
            try:
                row = json.loads(text.removeprefix("\ufeff") if begin == 0 else text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number} is not a line of JSON: {first_line(error)}") from None
            yield _text_of(row, field, f"{path}:{number}"), [offset, number], raw.tell()


def _read_parquet(path: Path, field: str, start: int | None) -> Iterator[tuple[str, int, int]]:
    """Texts of the rows, the number of rows up to and with each, and the bytes that this is of the file, about."""
    parquet, arrow = extra("pyarrow.parquet"), extra("pyarrow")
    skipped, row, size = start or 0, 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"{path} has no field {field!r}: {_fields(file.schema_arrow.names)}")
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            first = 0
            while first < len(sizes) and row + sizes[first] <= skipped:
                row, first = row + sizes[first], first + 1
            for batch in file.iter_batches(ROWS, list(range(first, len(sizes))), columns=[field], use_threads=False):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row > skipped:
                        read = size * row // file.metadata.num_rows
                        yield _text_of({field: text}, field, f"{path}, row {row}"), row, read
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as parquet: {first_line(error)}") from None


def _text_of(row: Any, field: str, place: str) -> str:
    """A row's text, empty where it is null. Raises UserError for no text, saying which fields there are."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is not an object with fields, as {{{json.dumps(field)}: ...}} would be")
    if field not in row:
        raise UserError(f"{place} has no field {field!r}: {_fields(row)}")
    text = "" if row[field] is None else row[field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise UserError(f"{place}: the field {field!r} is no text but of the type {kind}; --field names another")
    return well_formed(text)


def _fields(names: Iterable[str]) -> str:
    return f"there are {', '.join(map(repr, names)) or 'none'}; --field names one"
