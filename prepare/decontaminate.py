"""Remove a benchmark from a training corpus, or count how much of the benchmark the corpus contains.

    python prepare/decontaminate.py clean --input pages/ --items lambada.jsonl race/ --output clean.jsonl
    python prepare/decontaminate.py report --input clean.jsonl --items lambada.jsonl --output lambada.overlap.jsonl
    python prepare/decontaminate.py report --input clean.jsonl --items race.jsonl --item_fields article question \\
        --methods gpt3 --output race.overlap.jsonl

--input takes the same inputs as prepare/text.py, and the cleaned corpus is a valid input again. An item is a line of
JSON (.jsonl), with all its strings (or only --item_fields), at any depth, joined in order; any other text file is one
item. Counts are written next to the output: clean.report.json. The corpus is streamed twice, with one whole document in
memory at a time.

clean is the filter GPT-3 used on its training data (Brown et al. 2020, appendix C). Words are separated by white space
and compared in lowercase without punctuation (Unicode punctuation and ASCII symbols); a token that is only punctuation
is not a word. If a document shares 13 consecutive words with an item, they and 200 characters on each side are cut out.
Pieces of fewer than 200 characters are dropped, and so are documents cut into more than 10 pieces. 13-grams found in
more than 10 documents are kept. Where the paper leaves details open:
  - positions refer to the original text: an n-gram extends from the first character of its first word to the last
    character of its last word, including punctuation that touches them, and the characters on each side are counted in
    the original text;
  - cuts that overlap or touch are merged; a cut at the beginning or end of a document leaves no empty piece;
  - pieces are counted before short ones are dropped, so a document is dropped for the number of matches;
  - a document counts once per n-gram, however often it contains it; each copy of a document counts;
  - a document without cuts is kept unchanged, however short; each piece becomes a separate document;
  - an item of fewer than 13 words can't be found; the report counts these items.

report writes one line per item, and the counts per file, treating each file as a benchmark:
  - gpt3: an item is dirty if the corpus contains N consecutive words of it, with words as above. N is the 5th
    percentile of the items' lengths in words, interpolated linearly, rounded down, at least 8, at most 13. A shorter
    item is compared whole; one without words is clean.
  - gpt2: the number of an item's 8-grams in the corpus (Radford et al. 2019), where words are lowercase sequences of
    letters and digits. The corpus's 8-grams are held in a Bloom filter, 5 bytes each, with a false-positive rate of at
    most 10^-8. Repeated n-grams of a benchmark count each time.
  - gpt4: an item is contaminated if a document contains one of three 50-character substrings, drawn from different
    positions by --seed and the item's text (OpenAI 2023, appendix C). Only letters and digits are compared, with their
    case. A shorter item is compared whole; one without letters or digits is clean.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic.dataclasses import dataclass

from gpt_arc.data.contamination import METHODS, FilterSettings, Method, decontaminate, measure, read_items
from gpt_arc.data.documents import InputSettings, find_files, merge_inputs
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import command, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.next_steps import next_steps
from gpt_arc.settings import STRICT, Count, Positional
from gpt_arc.tables import counted, to_json


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options(FilterSettings, InputSettings):
    task: Positional[Literal["clean", "report"]]
    """clean: write the corpus without the text it shares with the items. report: write each item's overlap with it."""
    items: tuple[str, ...]
    """Files of a benchmark: .jsonl and .txt files, folders and glob patterns."""
    item_fields: tuple[str, ...] = ()
    """The fields to compare of an item's line. None: all strings."""
    output: Path
    """The .jsonl file to write: cleaned documents, or a line for each item."""
    methods: Annotated[tuple[Method, ...], MinLen(1)] = METHODS
    """How the report compares texts: by the method of these papers."""
    seed: int = 0
    """Seed for choosing the substrings of gpt4."""
    workers: Count | None = None
    """Processes. None: one per core."""
    overwrite: bool = False
    """Replace the output if it exists."""

    def __post_init__(self):
        foreign = [*FilterSettings.__dataclass_fields__] if self.task == "report" else ["methods", "seed"]
        for name in foreign:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"--{name} has no effect on {self.task}: leave it out")


def report_of(output: Path) -> Path:
    return output.with_suffix(".report.json")


def check_output(output: Path, inputs: list[Path], overwrite: bool) -> None:
    """Raises UserError if `output` can't be written or would replace a file."""
    if output.suffix != ".jsonl":
        raise UserError(f"{output} is written as lines of JSON: its name must end in .jsonl")
    if not output.parent.is_dir():
        raise UserError(f"{output} can't be written: there is no folder {output.parent}")
    for path in (output, report_of(output)):
        if path.resolve() in {other.resolve() for other in inputs}:
            raise UserError(f"{path} is one of the input files: choose another --output")
        if path.exists() and (path.is_dir() or not overwrite):
            raise UserError(f"{path} already exists: replace it with --overwrite=True, or choose another --output")


def summary(report: dict[str, Any]) -> str:
    """Summarizes the report of `clean` in two sentences."""
    documents, ngrams, characters = report["documents"], report["ngrams"], report["characters"]
    gram = f"{ngrams['words']}-gram"
    removed = documents["dropped"] + documents["left_without_pieces"]
    return (
        f"{counted(documents['read'], 'document')}: {documents['unchanged']:,} unchanged, "
        f"{documents['cut']:,} cut, {removed:,} dropped; "
        f"{characters['removed']:,} of {characters['read']:,} characters removed\n"
        f"{counted(ngrams['different'], gram)} of the items: {ngrams['found']:,} found, "
        f"{ngrams['ignored']:,} of them ignored as common"
    )


def lines(report: dict[str, Any]) -> str:
    """Formats the counts of `report`, one line per file."""
    rows = []
    for entry in report["files"]:
        parts = []
        if "gpt2" in entry and entry["gpt2"]["ngrams"]:
            parts.append(f"{entry['gpt2']['percent']:.2f}% of 8-grams (gpt2)")
        if "gpt3" in entry:
            parts.append(f"{entry['gpt3']['dirty']:,} dirty by {entry['gpt3']['words']}-grams (gpt3)")
        if "gpt4" in entry:
            parts.append(f"{entry['gpt4']['contaminated']:,} contaminated (gpt4)")
        rows.append(f"{entry['file']}, {counted(entry['items'], 'item')}: {', '.join(parts)}")
    return "\n".join(rows)


def main() -> None:
    options = parse_flags(Options, __doc__, merge_inputs(sys.argv[1:]))
    documents, paths = options.files(), find_files(options.items)
    check_output(options.output, [*documents.paths, *paths], options.overwrite)
    items = read_items(paths, options.item_fields)
    print(f"{options.task}: {documents.name} against {counted(len(items.texts), 'item')}", flush=True)
    if options.task == "clean":
        report = decontaminate(documents, items, options, options.output, options.workers)
        print(summary(report))
    else:
        report = measure(documents, items, options.output, options.methods, options.seed, options.workers)
        print(lines(report))
    write_file(report_of(options.output), to_json(report, indent=1) + "\n")
    print(f"{options.output} and {report_of(options.output)} written")
    if options.task == "clean":
        step = command("prepare/text.py", "--input", options.output, "--name=NAME")
        print(next_steps({step: "make a dataset of it"}))


if __name__ == "__main__":
    entry_point(main)()
