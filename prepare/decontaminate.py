"""Keep a benchmark out of a training corpus, or count how much of the benchmark the corpus has.

    python prepare/decontaminate.py clean --input pages/ --items lambada.jsonl race/ --output clean.jsonl
    python prepare/decontaminate.py report --input clean.jsonl --items lambada.jsonl --output lambada.overlap.jsonl
    python prepare/decontaminate.py report --input clean.jsonl --items race.jsonl --item_fields article question \\
        --methods gpt3 --output race.overlap.jsonl

--input takes what prepare/text.py takes, and the cleaned corpus is again such an input. An item is a line of JSON
(.jsonl), its strings at any depth joined in the line's order or those of --item_fields, or else a whole text file.
Counts are written beside the output: clean.report.json. The corpus is read in a stream, twice; one document is held
whole.

clean is GPT-3's filter of its training data (Brown et al. 2020, appendix C). A word is what stands between white space,
lowercase and without punctuation (Unicode's, and ASCII's symbols); what is punctuation alone is no word. Where a
document has 13 words in a row of an item, they and 200 characters on each side are cut out. Pieces of fewer than 200
characters go, and documents that fall into more than 10 pieces. 13-grams that more than 10 documents have stay. Where
the paper leaves a choice:
  - places are the original text's: an n-gram goes from its first word's first character to its last word's last one,
    punctuation that touches them included, and the characters beside it are counted in the text as it is;
  - cuts that overlap or touch are one; a cut at the beginning or the end of a document leaves no empty piece;
  - pieces are counted as the document is split, before short ones go: a document is dropped for how often it was hit;
  - a document counts once for an n-gram however often it has it, and copies of a document count each;
  - a document that nothing is cut out of stays as it is, however short; each piece becomes a document of its own;
  - an item of fewer than 13 words can't be found; the report counts them.

report writes a line an item, and the counts by file, each file a benchmark:
  - gpt3: dirty, if the corpus has N words of it in a row, words as above. N is the 5th percentile of the items' lengths
    in words, linear between two lengths, rounded down, at least 8, at most 13. An item of fewer words is compared
    whole; one without words is clean.
  - gpt2: how many of its 8-grams the corpus has (Radford et al. 2019), words here being runs of letters and digits,
    lowercase. The corpus's are held in a Bloom filter, 5 bytes each, which takes at most one other in 10^8 for one of
    them. Repeated n-grams of a benchmark count each time.
  - gpt4: contaminated, if a document has one of three substrings of 50 characters, drawn by --seed and the item's text
    from different places (OpenAI 2023, appendix C), of both only letters and digits, their case kept. A shorter item is
    compared whole; one without any is clean.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic.dataclasses import dataclass

from gpt_arc.data.contamination import METHODS, FilterSettings, Method, decontaminate, measure, read_items
from gpt_arc.data.documents import InputSettings, find_files, merge_inputs
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import write_file
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options(FilterSettings, InputSettings):
    task: tyro.conf.Positional[Literal["clean", "report"]]
    """clean: write the corpus without what it shares with the items. report: write what it has of each item."""
    items: tuple[str, ...]
    """Files of a benchmark: .jsonl and .txt files, folders and glob patterns."""
    item_fields: tuple[str, ...] = ()
    """The fields of an item's line that count. None: all strings."""
    output: Path
    """The .jsonl file to write: cleaned documents, or a line for each item."""
    methods: tuple[Method, ...] = METHODS
    """What the report compares, by the paper that did so first."""
    seed: int = 0
    """Chooses the substrings of gpt4."""
    workers: int | None = None
    """Processes. None: one per core."""
    overwrite: bool = False
    """Replace the output where it is there already."""

    def __post_init__(self):
        super().__post_init__()
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers = {self.workers} must be at least 1")
        if not self.methods:
            raise ValueError(f"methods must name some of {', '.join(METHODS)}")
        foreign = [*FilterSettings.__dataclass_fields__] if self.task == "report" else ["methods", "seed"]
        for name in foreign:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"--{name} says nothing to {self.task}: leave it out")


def report_of(output: Path) -> Path:
    return output.with_suffix(".report.json")


def check_output(output: Path, inputs: list[Path], overwrite: bool) -> None:
    """Raises UserError where `output` can't be written, or would replace something."""
    if output.suffix != ".jsonl":
        raise UserError(f"{output} will hold lines of JSON: end its name in .jsonl")
    if not output.parent.is_dir():
        raise UserError(f"{output} can't be written: there is no folder {output.parent}")
    for path in (output, report_of(output)):
        if path.resolve() in {other.resolve() for other in inputs}:
            raise UserError(f"{path} is among the files to read: choose another --output")
        if path.exists() and (path.is_dir() or not overwrite):
            raise UserError(f"{path} exists already: --overwrite=True replaces it, or choose another --output")


def summary(report: dict[str, Any]) -> str:
    """The report of `clean` in two sentences."""
    documents, ngrams, characters = report["documents"], report["ngrams"], report["characters"]
    gone = documents["dropped"] + documents["left_without_pieces"]
    return (
        f"{documents['read']:,} documents: {documents['unchanged']:,} unchanged, {documents['cut']:,} cut, {gone:,} "
        f"gone; {characters['removed']:,} of {characters['read']:,} characters removed\n"
        f"{ngrams['different']:,} {ngrams['words']}-grams of the items: {ngrams['found']:,} found, "
        f"{ngrams['ignored']:,} of them ignored as common"
    )


def lines(report: dict[str, Any]) -> str:
    """The counts of `report`, a line a file."""
    found = []
    for entry in report["files"]:
        parts = []
        if "gpt2" in entry and entry["gpt2"]["ngrams"]:
            parts.append(f"{entry['gpt2']['percent']:.2f}% of 8-grams (gpt2)")
        if "gpt3" in entry:
            parts.append(f"{entry['gpt3']['dirty']:,} dirty by {entry['gpt3']['words']}-grams (gpt3)")
        if "gpt4" in entry:
            parts.append(f"{entry['gpt4']['contaminated']:,} contaminated (gpt4)")
        found.append(f"{entry['file']}, {entry['items']:,} items: {', '.join(parts)}")
    return "\n".join(found)


def main() -> None:
    options = parse_flags(Options, __doc__, merge_inputs(sys.argv[1:]))
    documents, paths = options.files(), find_files(options.items)
    check_output(options.output, [*documents.paths, *paths], options.overwrite)
    items = read_items(paths, options.item_fields)
    print(f"{options.task}: {documents.name} against {len(items.texts):,} items", flush=True)
    if options.task == "clean":
        report = decontaminate(documents, items, options, options.output, options.workers)
        print(summary(report))
    else:
        report = measure(documents, items, options.output, options.methods, options.seed, options.workers)
        print(lines(report))
    write_file(report_of(options.output), json.dumps(report, indent=1) + "\n")
    print(f"{options.output} and {report_of(options.output)} are written")


if __name__ == "__main__":
    entry_point(main)()
