"""A corpus and four labelled sets for GPT-1's two stages, from text that is installed anyway: docstrings.

    python examples/gpt1_data.py
    python prepare/tokenizer.py --input data/gpt1_arc/corpus.jsonl --name gpt1_text --vocab_size 8192
    python prepare/text.py --input data/gpt1_arc/corpus.jsonl --name gpt1_text --tokenizer gpt1_text

GPT-1 is pre-trained once, on plain text, and fine-tuned on every task. The text here is the docstrings of CPython's
standard library, of scikit-learn, scipy, numpy and torch, and `pydoc_data.topics`. The libraries are read, not
imported, and nothing is downloaded. Of equal docstrings one is kept. A hash of each says whether it is of train, val
or test; the corpus is those of train. A sentence whose last words end one of another docstring too is in no labelled
item, so what is asked in val and test was not read before. It takes half a minute to write

    corpus.jsonl                              a docstring a line, as "text"
    package/{train,val,test}.jsonl            classification: text, label
    follows/{train,val,test}.jsonl            entailment: premise, hypothesis, label (yes, no)
    related/{train,val,test}.jsonl            similarity: text_a, text_b, label (yes, no)
    next_sentence/{train,val,test}.jsonl      multiple choice: context, options (four), label (from 0)
    meta.json                                 counts, and the sources with their versions

`package`: which library, or part of one, has a docstring that begins so? Names of packages, of modules and of what is
described are masked. `follows`: is the hypothesis how the premise, half a sentence, goes on, or are its words shuffled?
`related`: are these two docstrings' openings of one file, or of two libraries? `next_sentence`: which sentence comes
after these two, of four of about a length?

The labels are balanced. The same versions of the libraries and of Python, and the same seed, give the same files.
"""

import ast
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import DATA_ROOT, new_directory
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT

LIBRARIES = {"sklearn": "scikit-learn", "scipy": "scipy", "numpy": "numpy", "torch": "torch"}  # by name of the folder
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "externals", "_vendor", "idlelib", "lib2to3"}
VAL_SIZE = 200
LABELS = {  # of `package`: the modules that begin with one of these
    "scikit-learn": ("sklearn.",),
    "scipy": ("scipy.",),
    "numpy": ("numpy.",),
    "python": ("python.",),
    "torch.distributed": ("torch.distributed.",),
    "torch.nn": ("torch.nn.", "torch.ao."),  # modules, and those for integers
    "torch.compile": ("torch._inductor.", "torch._dynamo.", "torch.fx."),
}


HEADING = re.compile(r"\s*([=\-~^*#\"'.+`])\1{2,}\s*")  # the line below one
NOTHING = re.compile(  # lines above and in tables; "x : int"; "Returns:"
    r"\s*|\s*([=\-~^*#\"'.+`])\1{2,}\s*|\s*(\+[-=+]+.*|\|.*\||[=\-]{2,}( +[=\-]{2,})+)\s*"
    r"|\s*[\w*][\w*, .()]* : .*|\s*:\w+:\s*|\s*[A-Z]\w*( \w+)?:\s*|\s*\{.*\}\s*"
)
REMARK = re.compile(r"\s*\.\. (note|warning|tip|important|versionadded|versionchanged|deprecated)::")  # its text stays
ITEM = re.compile(r"\s*([-*•]|\d+[.)]|:\w+[^:]*:|\*{0,2}\w+( ?\([^)]*\))?:(?!:))\s+")  # "- ", ":param x: ", "x (int): "
INLINE = [
    (re.compile(r"(:[\w-]+)+:`~[\w.]*?(\w+)`"), r"\2"),
    (re.compile(r"(?:(?::[\w-]+)+:)?`+([^`<]*[^`<\s])(\s*<[^`]*>)?`+_*"), r"\1"),
    (re.compile(r"\s?\[\w+\]_"), ""),
    (re.compile(r"(?<!\w)(\*\*?|\|)(\w[^*|]*)\1(?!\w)"), r"\2"),
    (re.compile(r"\s+"), " "),
]
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!e\.g\.)(?<!i\.e\.)(?<!al\.)(?<!vs\.)(?<!cf\.) (?=[\"'(]?[A-Z])")
OTHER_CHARACTERS = re.compile(r"[\W\d_](?<! )")
WHOLE = re.compile(r"[A-Z][^{}\\|<>]*[.]")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    output: Path = DATA_ROOT / "gpt1_arc"
    """Folder to write; an older one of this script goes."""
    seed: int = 0
    """Draws the items, not which docstrings are of train, val and test."""
    train_size: int = 500
    """Items of every task to fine-tune on."""
    test_size: int = 1000
    """Items of every task to test with."""

    def __post_init__(self):
        if min(self.train_size, self.test_size) < 1:
            raise UserError("train_size and test_size must be at least 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A docstring, clean, in paragraphs of sentences."""

    path: str  # of what it describes: sklearn.linear_model._logistic.LogisticRegression.fit
    file: str  # the module that holds it: sklearn.linear_model._logistic
    paragraphs: list[list[str]]

    @cached_property
    def text(self) -> str:
        return "\n".join(" ".join(sentences) for sentences in self.paragraphs)

    @cached_property
    def sentences(self) -> list[str]:
        return sum(self.paragraphs, [])

    @cached_property
    def split(self) -> str:
        salted = f"labelled {self.text}"  # prepare/text.py takes its val split by a hash of the text alone
        share = int.from_bytes(hashlib.sha256(salted.encode()).digest()[:4]) / 2**32
        return "test" if share < 0.2 else "val" if share < 0.27 else "train"

    @property
    def package(self) -> str:
        return ".".join(self.path.split(".")[:2])


def cleaned(docstring: str) -> list[list[str]]:
    """The sentences of each paragraph, without examples, tables, headings and markup."""
    lines = inspect.cleandoc(docstring).expandtabs().splitlines()
    paragraphs: list[list[str]] = [[]]
    skipped_from = None  # lines that are indented further are code, formulas and other things
    in_example, hanging, indentation = False, False, 0
    for line, after in zip(lines, [*lines[1:], ""]):
        indented = len(line) - len(line.lstrip())
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith((">>>", "$ ")))
        if skipped_from is not None and line.strip() and indented <= skipped_from:
            skipped_from = None
        nothing = in_example or skipped_from is not None or HEADING.fullmatch(after) or NOTHING.fullmatch(line)
        if not nothing and (line.lstrip().startswith(".. ") or line.rstrip().endswith("::")):
            skipped_from = None if REMARK.match(line) else indented
            nothing = line.lstrip().startswith(".. ")
        if nothing:
            paragraphs.append([])
            continue
        item = ITEM.match(line)
        if item or indented < indentation or (indented > indentation and not hanging):
            paragraphs.append([])
        hanging = bool(item) or (hanging and bool(paragraphs[-1]))
        indentation = indented
        paragraphs[-1].append(re.sub("::$", ":", line[item.end() if item else 0 :].strip()))
    texts = [" ".join(paragraph) for paragraph in paragraphs]
    for pattern, replacement in INLINE:
        texts = [pattern.sub(replacement, text).strip() for text in texts]
    prose = (t for t in texts if t.count(" ") >= 3 and len(OTHER_CHARACTERS.findall(t)) < 0.3 * len(t))
    return [SENTENCE_END.split(text) for text in prose]


def docstrings(tree: ast.AST, path: str) -> Iterator[tuple[str, str]]:
    """Path and text of every docstring below `tree`, and of those that add_newdoc and add_docstr give to C code."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path}.{node.name}", ast.get_docstring(node, clean=False) or ""
            yield from docstrings(node, f"{path}.{node.name}")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from docstrings(node, path)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if getattr(node.value.func, "id", "").startswith(("add_newdoc", "add_docstr")):
                strings = [leaf.value for leaf in ast.walk(node.value) if isinstance(leaf, ast.Constant)]
                strings = [ast.unparse(node.value.args[0]), *(s for s in strings if isinstance(s, str))]
                name = [s for s in strings if "\n" not in s][-1].split(".")[-1]  # "exp" of ("numpy._core", "exp")
                yield from ((f"{path}.{name}", s) for s in strings if "\n" in s)


def folder_documents(folder: Path, package: str) -> Iterator[Document]:
    """The docstrings of the Python files of a folder, which is called `package`."""
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of the file's own making, as invalid escapes
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # as of templates
            continue
        module = ".".join((package, *parts)).removesuffix(".__init__")
        for path, docstring in ((module, ast.get_docstring(tree, clean=False) or ""), *docstrings(tree, module)):
            yield Document(path, module, cleaned(docstring))


def installed_documents() -> tuple[list[Document], dict[str, dict[str, Any]]]:
    """The documents of all sources, equal ones once; and by source its version, documents and bytes."""
    from pydoc_data.topics import topics

    sources = {}
    for folder, name in LIBRARIES.items():
        found = importlib.util.find_spec(folder)
        if found is None or found.origin is None:
            raise UserError(f"{name} is not installed: pip install {name}")
        sources[name] = importlib.metadata.version(name), folder_documents(Path(found.origin).parent, folder)
    python = sys.version.split()[0]
    sources["python"] = python, folder_documents(Path(sysconfig.get_path("stdlib")), "python")
    manual = (Document(f"manual.topics.{key}", "manual.topics", cleaned(topics[key])) for key in sorted(topics))
    sources["pydoc_data.topics"] = python, manual
    kept: dict[str, Document] = {}
    meta = {}
    for name, (version, documents) in sources.items():
        new = {d.text: d for d in documents if d.text and d.text not in kept}
        kept |= new
        meta[name] = {"version": version, "documents": len(new), "bytes": sum(len(text.encode()) for text in new)}
    return list(kept.values()), meta


def usable_sentences(documents: list[Document]) -> set[str]:
    """Those that may be in an item: whole sentences, whose last words no other document has at a sentence's end."""

    def end(sentence: str) -> str:
        return " ".join(sentence.lower().split()[-5:])

    pieces = ((*d.sentences, *re.split(r"(?<=[.!?])\s", d.text)) for d in documents)  # where no capital follows, too
    counts = Counter(words for several in pieces for words in set(map(end, several)))
    whole = (s for d in documents for s in d.sentences if 5 <= len(s.split()) <= 40 and WHOLE.fullmatch(s))
    return {s for s in whole if counts[end(s)] == 1}


def opening(document: Document, usable: set[str], most: int) -> list[str]:
    """The sentences that a document begins with, as far as they are usable."""
    return list(itertools.takewhile(usable.__contains__, document.paragraphs[0][:most]))


def grouped(values: Iterable[Any], key: Callable[[Any], str | None]) -> dict[str | None, list[Any]]:
    groups = defaultdict(list)
    for value in values:
        groups[key(value)].append(value)
    return groups


def balanced(labels: Iterable[Any], size: int, rng: random.Random) -> list[Any]:
    """`size` labels, each as often as the others or once more."""
    drawn = list(itertools.islice(itertools.cycle(labels), size))
    rng.shuffle(drawn)
    return drawn


# A task takes documents in a drawn order, the usable sentences, how many items, and what draws; the items may be fewer.


def package_items(documents: list[Document], usable: set[str], size: int, rng: random.Random) -> Iterator[dict]:
    def label_of(document: Document) -> str | None:
        return next((label for label, starts in LABELS.items() if f"{document.path}.".startswith(starts)), None)

    telling = {part for starts in LABELS.values() for start in starts for part in re.split(r"[._]+", start) if part}
    parts = re.compile("|".join(sorted(part for part in telling if len(part) > 4)), re.IGNORECASE)
    telling |= {name.strip("_").lower() for document in documents for name in document.file.split(".")[:2]}
    groups = grouped((document for document in documents if opening(document, usable, 1)), label_of)
    labels = balanced(LABELS, size, rng)
    for label, document in ((label, groups[label].pop()) for label in labels if groups[label]):
        text = " ".join(opening(document, usable, 3))
        hidden = telling | {name.strip("_").lower() for name in document.path.split(".")}
        hidden = {word for word in re.findall(r"\w+", text) if word.strip("_").lower() in hidden or parts.search(word)}
        yield {"text": re.sub(rf"\b({'|'.join(sorted(hidden))})\b", "_", text) if hidden else text, "label": label}


def follows_items(documents: list[Document], usable: set[str], size: int, rng: random.Random) -> Iterator[dict]:
    labels = balanced(["yes", "no"], size, rng)
    for sentence in (s for document in documents for s in document.sentences if s in usable and len(s.split()) >= 12):
        if not labels:
            return
        words, end = sentence[:-1].split(), sentence[-1]
        first, rest = words[: len(words) // 2], words[len(words) // 2 :]
        if labels[-1] == "no":
            shuffled = rng.sample(rest, len(rest))
            if shuffled == rest:
                continue
            rest = shuffled
        yield {"premise": " ".join(first), "hypothesis": " ".join(rest) + end, "label": labels.pop()}


def related_items(documents: list[Document], usable: set[str], size: int, rng: random.Random) -> Iterator[dict]:
    there = [document for document in documents if opening(document, usable, 1)]
    files = grouped(there, lambda document: document.file)
    elsewhere = {package: [d for d in there if d.package != package] for package in {d.package for d in there}}
    labels = balanced(["yes", "no"], size, rng)
    for document in there:
        same = [d for d in files[document.file] if d is not document]
        if not labels or not same:
            continue
        other = rng.choice(same if labels[-1] == "yes" else elsewhere[document.package])
        texts = [" ".join(opening(d, usable, 2)) for d in (document, other)]
        yield {"text_a": texts[0], "text_b": texts[1], "label": labels.pop()}


def next_sentence_items(documents: list[Document], usable: set[str], size: int, rng: random.Random) -> Iterator[dict]:
    triples = [(d, *(d.sentences[i : i + 3])) for d in documents for i in range(0, len(d.sentences) - 2, 3)]
    triples = [triple for triple in triples if usable.issuperset(triple[1:])]
    rng.shuffle(triples)
    last = sorted({triple[3] for triple in triples}, key=lambda sentence: (len(sentence), sentence))
    labels = balanced(range(4), size, rng)
    for document, first, second, true in triples:
        if not labels:
            return
        place = last.index(true)
        near = [s for s in last[max(0, place - 8) : place + 9] if s != true and s not in document.sentences]
        if len(near) >= 3:
            options = rng.sample(near, 3)
            rng.shuffle(options)
            options.insert(labels[-1], true)
            yield {"context": f"{first} {second}", "options": options, "label": labels.pop()}


TASKS = dict(package=package_items, follows=follows_items, related=related_items, next_sentence=next_sentence_items)


def labelled_sets(documents: list[Document], sizes: dict[str, int], seed: int) -> dict[str, dict[str, list[dict]]]:
    """The items of each task and split. Raises UserError where the documents don't suffice."""
    usable = usable_sentences(documents)
    sets: dict[str, dict[str, list[dict]]] = {task: {} for task in TASKS}
    for (task, items_of), (split, size) in itertools.product(TASKS.items(), sizes.items()):
        rng = random.Random(f"{seed} {task} {split}")
        there = [document for document in documents if document.split == split]
        rng.shuffle(there)
        items = sets[task][split] = list(items_of(there, usable, size, rng))
        if len(items) < size:
            raise UserError(f"{task}: the documents make {len(items)} items for {split}, and {size} are asked for")
    return sets


def write(output: Path, documents: list[Document], sources: dict, sets: dict, seed: int) -> dict[str, Any]:
    """Write the folder `output`, and return its meta.json."""
    corpus = [{"text": document.text} for document in documents if document.split == "train"]
    size = {"documents": len(corpus), "bytes": sum(len(document["text"].encode()) for document in corpus)}
    counts: dict[str, dict] = {task: {} for task in sets}
    files = {"corpus.jsonl": corpus}
    for task, splits in sets.items():
        for split, items in splits.items():
            files[f"{task}/{split}.jsonl"] = items
            counts[task][split] = Counter(str(item["label"]) for item in items)
    meta = {"seed": seed, "sources": sources, "corpus": size, "tasks": counts}
    with new_directory(output) as folder:
        for name, items in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            (folder / name).write_text(lines, encoding="utf-8")
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if options.output.exists() and not all((options.output / name).is_file() for name in ("corpus.jsonl", "meta.json")):
        raise UserError(f"{options.output} is there and is not of this script: choose another --output")
    documents, sources = installed_documents()
    sizes = {"train": options.train_size, "val": VAL_SIZE, "test": options.test_size}
    meta = write(options.output, documents, sources, labelled_sets(documents, sizes, options.seed), options.seed)
    for name, source in sources.items():
        print(f"{name} {source['version']}: {source['documents']:,} docstrings, {source['bytes']:,} bytes")
    for task, splits in meta["tasks"].items():
        counts = ", ".join(f"{split} {sum(labels.values()):,}" for split, labels in splits.items())
        print(f"{task}: {counts}, of {len(splits['train'])} labels")
    print(
        f"{options.output}: a corpus of {meta['corpus']['documents']:,} docstrings, {meta['corpus']['bytes']:,} bytes"
    )


if __name__ == "__main__":
    entry_point(main)()
