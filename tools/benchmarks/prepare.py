"""`bench.py prepare`: seconds and memory of preparing a corpus, beside the tokenizer's own library.

    python tools/bench.py prepare
    python tools/bench.py prepare --megabytes=1000 --tokenizer=gpt2 --json=prepare.json
    python tools/bench.py prepare --input 'pages/*.jsonl' --tokenizer=data/mine --cases lines zst

The corpus is the text of --input or, without it, of the source files and documentation installed here, repeated if they
are too few (which the output says). It is written in each form that --cases names: lines of JSON (lines), the same as a
.zst (zst), parquet, and one text file (text, and char by characters). In each round, all take turns:

- ours: `python prepare/text.py` as a user runs it, from the start of Python to the finished dataset; its peak memory.
- the peer: the library's own encoding of a list of documents in memory on all cores, `encode_ordinary_batch` of
  tiktoken or `encode_batch` of `tokenizers`, on the first --peer_megabytes, without reading or writing anything.
- floors: gigatoken alone, or characters looked up alone, on the first ten times as many megabytes; and reading the
  corpus and writing as many bytes as the dataset has, with fsync, one after the other and both at once.

A ratio compares the rates in MB of text a second within a round. That by CPU time compares MB a second of all cores'
work, which says more on a machine that others use.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import MinLen
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from benchmarks.processes import check_requirements, json_settings, spread, write_results
from gpt_arc.data.documents import Files, available_cores, find_files
from gpt_arc.data.engine import FastEncoder, corpus_encoder
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, LibraryTokenizer, Tokenizer, find_tokenizer
from gpt_arc.errors import UserError
from gpt_arc.extras import import_extra
from gpt_arc.files import resource
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, ResultFile
from gpt_arc.tables import table

Case = Literal["lines", "text", "zst", "parquet", "char"]
FILES: dict[Case, str] = {
    "lines": "corpus.jsonl",
    "text": "corpus.txt",
    "zst": "corpus.jsonl.zst",
    "parquet": "corpus.parquet",
    "char": "corpus.txt",
}
INSTALLED = (".py", ".md", ".rst", ".txt", ".html")
BATCH = 1 << 20  # characters that a thread encodes at a time
CHILD = """
import atexit, runpy, sys
sys.path[:0] = sys.argv[1:3]
from benchmarks.processes import peak_memory
atexit.register(lambda: print(peak_memory("cpu")))
sys.argv[:4] = [sys.argv[3]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareBench:
    input: tuple[str, ...] = ()
    """Files, folders and glob patterns with the text, as for prepare/text.py. Empty: what is installed here."""
    field: str = "text"
    """Field with the text."""
    megabytes: Count = 200
    """Size of the corpus, as text."""
    peer_megabytes: Count = 20
    """How much of it the peer encodes."""
    tokenizer: str = "gpt2"
    """As for prepare/text.py."""
    cases: Annotated[tuple[Case, ...], MinLen(1)] = ("lines", "text", "zst", "parquet", "char")
    """Forms of the corpus; char is a text prepared by characters."""
    rounds: Count = 3
    """Measured rounds; in each, everything takes its turn."""
    json: ResultFile | None = None
    """A file for the results."""


def installed_texts() -> Iterator[str]:
    """Yields the text files below Python's folders and /usr/share/doc, in a fixed order."""
    for folder in dict.fromkeys((*sys.path, "/usr/share/doc")):
        if Path(folder).is_dir() and Path(folder).resolve() != Path.cwd():
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in INSTALLED and path.is_file():
                    with contextlib.suppress(UnicodeDecodeError):
                        yield path.read_text("utf-8")


def write_corpora(texts: Iterator[str], size: int, folder: Path, cases: Sequence[Case]) -> tuple[int, int]:
    """Writes the corpus in the forms of `cases`. Returns its bytes of text and its documents."""
    written = documents = 0
    rows: list[str] = []
    writer: Any = None
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as lines, open(folder / "corpus.txt", "wb") as text_file:
        for text in texts:
            content = text.encode()
            lines.write(json.dumps({"id": documents, "text": text}, ensure_ascii=False) + "\n")
            if {"text", "char"} & set(cases):
                text_file.write(content + b"\n")
            rows.append(text)
            written, documents = written + len(content), documents + 1
            if "parquet" in cases and (len(rows) == 1000 or written >= size):
                arrow = import_extra("pyarrow")
                batch = arrow.table({"text": rows})
                parquet = import_extra("pyarrow.parquet")
                writer = writer or parquet.ParquetWriter(folder / "corpus.parquet", batch.schema)
                writer.write_table(batch)
                rows = []
            if written >= size:
                break
    if writer is not None:
        writer.close()
    if "zst" in cases:
        arrow = import_extra("pyarrow")
        with open(folder / "corpus.jsonl", "rb") as plain, arrow.output_stream(str(folder / FILES["zst"])) as packed:
            while block := plain.read(1 << 24):
                packed.write(block)
    return written, documents


def first_texts(folder: Path, size: int) -> list[str]:
    """The first documents of the corpus, of about `size` bytes in all."""
    texts: list[str] = []
    for text, _ in Files([folder / "corpus.jsonl"], "text").pieces("never"):
        texts.append(text)
        size -= len(text.encode())
        if size <= 0:
            break
    return texts


class Cost(NamedTuple):
    """What a program took for so many MB of text."""

    megabytes: float
    seconds: float
    cpu_seconds: float  # of all threads, and of a child process


def cost(megabytes: float, program: Callable[[], Any]) -> tuple[Cost, Any]:
    """Runs a program. Returns its cost and its result."""

    def cpu_seconds() -> float:
        return time.process_time() + sum(os.times()[2:4])  # the latter of children, in hundredths

    before, began = cpu_seconds(), time.perf_counter()
    result = program()
    return Cost(megabytes, time.perf_counter() - began, cpu_seconds() - before), result


def encode_by_peer(tokenizer: Tokenizer, texts: list[str]) -> None:
    if isinstance(tokenizer, BPETokenizer):
        tokenizer._encoding.encode_ordinary_batch(texts, num_threads=available_cores())
    elif isinstance(tokenizer, LibraryTokenizer):
        tokenizer._library.encode_batch(texts, add_special_tokens=False)


def in_batches(texts: list[str]) -> list[list[str]]:
    """The texts in batches as they are prepared."""
    numbers = (place // BATCH for place in itertools.accumulate(map(len, texts)))
    return [[text for _, text in group] for _, group in itertools.groupby(zip(numbers, texts), itemgetter(0))]


def copy(corpus: Path, dataset: Path, at_once: bool = False) -> None:
    """Reads a corpus and writes as many bytes as its dataset has, then or meanwhile."""
    size = sum(path.stat().st_size for path in dataset.glob("*.bin"))
    block = bytes(1 << 24)

    def read() -> None:
        space = bytearray(len(block))
        with open(corpus, "rb", buffering=0) as file:
            while file.readinto(space):
                pass

    with ThreadPoolExecutor(1) as reader, tempfile.TemporaryFile(dir=dataset, buffering=0) as file:
        reading = reader.submit(read)
        if not at_once:
            reading.result()
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def prepare(folder: Path, case: Case, tokenizer: str) -> float:
    """Prepares a form of the corpus in another process. Returns its peak memory in MB."""
    flags = [f"--input={folder / FILES[case]}", f"--name={case}", "--overwrite=True"]
    flags.append(f"--tokenizer={'char' if case == 'char' else tokenizer}")
    tools, script = Path(__file__).resolve().parents[1], resource("prepare") / "text.py"
    command = [sys.executable, "-c", CHILD, str(tools), str(tools.parent), str(script), *flags]
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if completed.returncode:
        raise UserError(f"{case}: {completed.stderr.strip() or completed.returncode}")
    return int(completed.stdout.split()[-1]) / 1e6


def measure(
    settings: PrepareBench, folder: Path, tokenizer: Tokenizer, name: str, megabytes: float
) -> tuple[dict[str, list[Cost]], dict[str, float]]:
    """Runs the rounds. Returns the costs by program, and the peak memory of our cases in MB."""
    texts = first_texts(folder, settings.peer_megabytes * 10**6)
    more = first_texts(folder, 10 * settings.peer_megabytes * 10**6)
    peer_size, engine_size = (sum(len(text.encode()) for text in one) / 1e6 for one in (texts, more))
    encode, batches = corpus_encoder(tokenizer), in_batches(more)
    look_up = CharTokenizer.from_text("".join(more)).encode_batch
    costs: dict[str, list[Cost]] = {}
    memory: dict[str, float] = {}

    def run(program: str, size: float, *call: Any) -> Any:
        one, result = cost(size, partial(*call))
        costs.setdefault(program, []).append(one)
        return result

    with ThreadPoolExecutor(available_cores()) as workers:
        for _ in tqdm(range(settings.rounds), "rounds", leave=False, disable=None):
            run("peer", peer_size, encode_by_peer, tokenizer, texts)
            if isinstance(encode, FastEncoder):
                run("engine alone", engine_size, lambda: deque(workers.map(encode, batches), maxlen=0))
            for case in settings.cases:
                memory[case] = max(memory.get(case, 0.0), run(case, megabytes, prepare, folder, case, name))
                dataset = folder / "data" / case
                run(f"{case}: reading and writing", megabytes, copy, folder / FILES[case], dataset)
                run(f"{case}: both at once", megabytes, copy, folder / FILES[case], dataset, True)
                if case == "char":
                    run("characters alone", engine_size, lambda: deque(workers.map(look_up, batches), maxlen=0))
    return costs, memory


def figures(costs: dict[str, list[Cost]], memory: dict[str, float], megabytes: float) -> dict[str, dict[str, Any]]:
    """Medians by program: the rate, seconds for the whole corpus, and how many times as fast as the peer it is."""
    rows = {}
    for program, rounds in costs.items():
        pairs = list(zip(rounds, costs["peer"]))
        rates = [one.megabytes / one.seconds for one in rounds]
        cpu_rates = [one.megabytes / one.cpu_seconds for one in rounds]
        rows[program] = {
            "megabytes_per_second": spread(rates),
            "seconds": megabytes / median(rates),
            "cpu_seconds": megabytes / median(cpu_rates),
            "of_the_peer": spread([rate * peer.seconds / peer.megabytes for rate, (_, peer) in zip(rates, pairs)]),
            "by_cpu_time": spread([r * peer.cpu_seconds / peer.megabytes for r, (_, peer) in zip(cpu_rates, pairs)]),
            "peak_megabytes": memory.get(program),
        }
    return rows


def bench_prepare(args: list[str]) -> None:
    settings = parse_flags(PrepareBench, __doc__, args)
    check_requirements(settings)
    tokenizer = find_tokenizer(settings.tokenizer)
    path = Path(settings.tokenizer)
    name = str(path.resolve()) if path.exists() else settings.tokenizer
    if (Path("data") / settings.tokenizer).is_dir():
        name = str((Path("data") / settings.tokenizer).resolve())

    def texts() -> Iterator[str]:
        if not settings.input:
            return installed_texts()
        return (text for text, _ in Files(find_files(settings.input), settings.field).pieces("never"))

    repeats = itertools.count()
    again = itertools.chain.from_iterable(texts() for _ in repeats)
    with tempfile.TemporaryDirectory(prefix="gpt-arc-bench-") as temporary:
        folder = Path(temporary)
        size, documents = write_corpora(again, settings.megabytes * 10**6, folder, settings.cases)
        passes = next(repeats)
        print(f"corpus       {size / 1e6:,.0f} MB in {documents:,} documents, {passes} times the text at hand")
        costs, memory = measure(settings, folder, tokenizer, name, size / 1e6)
    rows = figures(costs, memory, size / 1e6)
    cells: list[list[Any]] = [["", "MB/s", "seconds", "CPU s", "of the peer", "by CPU time", "peak MB"]]
    for program, row in rows.items():
        ratio, peak = row["of_the_peer"], row["peak_megabytes"]
        cells.append([
            program,
            f"{row['megabytes_per_second']['median']:.1f}",
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            f"{row['by_cpu_time']['median']:.2f}",
            peak and f"{peak:.0f}",
        ])  # fmt: skip
    print(table(cells))
    corpus = {"bytes": size, "documents": documents}
    write_results(settings.json, {"settings": json_settings(settings), **corpus, "programs": rows})
