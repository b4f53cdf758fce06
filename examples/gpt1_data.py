"""Makes a corpus and four labelled sets for GPT-1's two stages from installed text: docstrings.

    python examples/gpt1_data.py
    python prepare/tokenizer.py --input data/gpt1_arc/corpus.jsonl --name gpt1_text --vocab_size 8192
    python prepare/text.py --input data/gpt1_arc/corpus.jsonl --name gpt1_text --tokenizer gpt1_text

GPT-1 is pre-trained once, on plain text, and fine-tuned on every task. The text here is the docstrings of CPython's
standard library, scikit-learn, scipy, numpy and torch, and `pydoc_data.topics`. The libraries are read, not imported,
and nothing is downloaded. Duplicate docstrings are dropped. A hash assigns each docstring to train, val or test, and
the corpus is the train part. A sentence that shares its last words with a sentence of another docstring is in no
labelled item, so the val and test items are new to the model. In half a minute the script writes

    corpus.jsonl                              a docstring a line, as "text"
    package/{train,val,test}.jsonl            classification: text, label
    follows/{train,val,test}.jsonl            entailment: premise, hypothesis, label (yes, no)
    related/{train,val,test}.jsonl            similarity: text_a, text_b, label (yes, no)
    next_sentence/{train,val,test}.jsonl      multiple choice: context, options (four), label (from 0)
    meta.json                                 counts, and the sources with their versions

`package`: which library, or part of one, has the docstring that begins like this? Names of packages, modules and of the
documented object are masked. `follows`: does the hypothesis continue the premise, half a sentence, or are its words
shuffled? `related`: do these two openings of docstrings come from one file, or from two libraries? `next_sentence`:
which of four sentences of similar length follows these two?

The labels are balanced, except where --train_size is larger than 3,700: `package` then has every docstring of torch.nn
that it can use, and more of other libraries. The same versions of the libraries and of Python, and the same seed, give
the same files.
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
from gpt_arc.settings import STRICT, Count

LIBRARIES = {"sklearn": "scikit-learn", "scipy": "scipy", "numpy": "numpy", "torch": "torch"}  # folder -> library
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "externals", "_vendor", "idlelib", "lib2to3"}
VAL_SIZE = 200
LABELS = {  # labels of `package` -> prefixes of module names
    "scikit-learn": ("sklearn.",),
    "scipy": ("scipy.",),
    "numpy": ("numpy.",),
    "python": ("python.",),
    "torch.distributed": ("torch.distributed.",),
    "torch.nn": ("torch.nn.", "torch.ao."),  # also the quantized modules
    "torch.compile": ("torch._inductor.", "torch._dynamo.", "torch.fx."),
}


HEADING = re.compile(r"\s*([=\-~^*#\"'.+`])\1{2,}\s*")  # the line below a heading
NOTHING = re.compile(  # blank lines, rules, tables, "x : int", "Returns:"
    r"\s*|\s*([=\-~^*#\"'.+`])\1{2,}\s*|\s*(\+[-=+]+.*|\|.*\||[=\-]{2,}( +[=\-]{2,})+)\s*"
    r"|\s*[\w*][\w*, .()]* : .*|\s*:\w+:\s*|\s*[A-Z]\w*( \w+)?:\s*|\s*\{.*\}\s*"
)
REMARK = re.compile(
    r"\s*\.\. (note|warning|tip|important|versionadded|versionchanged|deprecated)::"
)  # its text is kept
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
    """Folder to write; replaces an older one from this script."""
    seed: int = 0
    """Seed for drawing the items; the split of docstrings doesn't depend on it."""
    train_size: Count = 500
    """Items per task for fine-tuning."""
    test_size: Count = 1000
    """Items per task for testing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A cleaned docstring as paragraphs of sentences."""

    path: str  # of the documented object: sklearn.linear_model._logistic.LogisticRegression.fit
    file: str  # module that contains it: sklearn.linear_model._logistic
    paragraphs: list[list[str]]

    @cached_property
    def text(self) -> str:
        return "\n".join(" ".join(sentences) for sentences in self.paragraphs)

    @cached_property
    def sentences(self) -> list[str]:
        return sum(self.paragraphs, [])

    @cached_property
    def split(self) -> str:
        salted = f"labelled {self.text}"  # prepare/text.py hashes the text alone for its val split
        share = int.from_bytes(hashlib.sha256(salted.encode()).digest()[:4]) / 2**32
        return "test" if share < 0.2 else "val" if share < 0.27 else "train"

    @property
    def package(self) -> str:
        return ".".join(self.path.split(".")[:2])


def cleaned(docstring: str) -> list[list[str]]:
    """Returns the sentences of each paragraph, without examples, tables, headings and markup."""
    lines = inspect.cleandoc(docstring).expandtabs().splitlines()
    paragraphs: list[list[str]] = [[]]
    skipped_from = None  # more deeply indented lines are skipped: code, formulas and so on
    in_example, hanging, indentation = False, False, 0
    for line, after in zip(lines, [*lines[1:], ""]):
        indented = len(line) - len(line.lstrip())
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith((">>>", "$ ")))
        if skipped_from is not None and line.strip() and indented <= skipped_from:
            skipped_from = None
        skipped = in_example or skipped_from is not None or HEADING.fullmatch(after) or NOTHING.fullmatch(line)
        if not skipped and (line.lstrip().startswith(".. ") or line.rstrip().endswith("::")):
            skipped_from = None if REMARK.match(line) else indented
            skipped = line.lstrip().startswith(".. ")
        if skipped:
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
    """Yields path and text of every docstring below `tree`, also those that add_newdoc gives to C code."""
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
    """Yields the docstrings of the Python files in the folder of `package`."""
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # warnings about the file, such as invalid escapes
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # templates, for example
            continue
        module = ".".join((package, *parts)).removesuffix(".__init__")
        for path, docstring in ((module, ast.get_docstring(tree, clean=False) or ""), *docstrings(tree, module)):
            yield Document(path, module, cleaned(docstring))


def installed_documents() -> tuple[list[Document], dict[str, dict[str, Any]]]:
    """Returns the distinct documents of all sources, and each source's version, documents and bytes."""
    from pydoc_data.topics import topics

    sources = {}
    for folder, name in LIBRARIES.items():
        spec = importlib.util.find_spec(folder)
        if spec is None or spec.origin is None:
            raise UserError(f"{name} is not installed: pip install {name}")
        sources[name] = importlib.metadata.version(name), folder_documents(Path(spec.origin).parent, folder)
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
    """Returns the sentences that items may use: complete ones whose last words end no sentence of another document."""

    def end(sentence: str) -> str:
        return " ".join(sentence.lower().split()[-5:])

    pieces = ((*d.sentences, *re.split(r"(?<=[.!?])\s", d.text)) for d in documents)  # also splits before lower case
    counts = Counter(words for group in pieces for words in set(map(end, group)))
    whole = (s for d in documents for s in d.sentences if 5 <= len(s.split()) <= 40 and WHOLE.fullmatch(s))
    return {s for s in whole if counts[end(s)] == 1}


def opening(document: Document, usable: set[str], most: int) -> list[str]:
    """Returns the usable sentences at the start of a document."""
    return list(itertools.takewhile(usable.__contains__, document.paragraphs[0][:most]))


def grouped(values: Iterable[Any], key: Callable[[Any], str | None]) -> dict[str | None, list[Any]]:
    groups = defaultdict(list)
    for value in values:
        groups[key(value)].append(value)
    return groups


def balanced(labels: Iterable[Any], size: int, rng: random.Random) -> list[Any]:
    """Returns `size` shuffled labels, whose counts differ by at most one."""
    drawn = list(itertools.islice(itertools.cycle(labels), size))
    rng.shuffle(drawn)
    return drawn


# Each task takes shuffled documents, the usable sentences, a number of items and a source of randomness. It may yield
# fewer items.


def package_items(documents: list[Document], usable: set[str], size: int, rng: random.Random) -> Iterator[dict]:
    def label_of(document: Document) -> str | None:
        return next((label for label, starts in LABELS.items() if f"{document.path}.".startswith(starts)), None)

    telling = {part for starts in LABELS.values() for start in starts for part in re.split(r"[._]+", start) if part}
    parts = re.compile("|".join(sorted(part for part in telling if len(part) > 4)), re.IGNORECASE)
    telling |= {name.strip("_").lower() for document in documents for name in document.file.split(".")[:2]}
    groups = grouped((document for document in documents if opening(document, usable, 1)), label_of)
    for label in balanced(LABELS, size, rng):
        if not groups[label]:  # the library with most documents left takes its place
            label = max(LABELS, key=lambda name: len(groups[name]))
        if not groups[label]:
            return
        document = groups[label].pop()
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
    usable_documents = [document for document in documents if opening(document, usable, 1)]
    files = grouped(usable_documents, lambda document: document.file)
    packages = {document.package for document in usable_documents}
    elsewhere = {package: [d for d in usable_documents if d.package != package] for package in packages}
    labels = balanced(["yes", "no"], size, rng)
    for document in usable_documents:
        siblings = [d for d in files[document.file] if d is not document]
        if not labels or not siblings:
            continue
        other = rng.choice(siblings if labels[-1] == "yes" else elsewhere[document.package])
        texts = [" ".join(opening(d, usable, 2)) for d in (document, other)]
        yield {"text_a": texts[0], "text_b": texts[1], "label": labels.pop()}


def next_sentence_items(documents: list[Document], usable: set[str], size: int, rng: random.Random) -> Iterator[dict]:
    triples = [(d, d.sentences[i : i + 3]) for d in documents for i in range(0, len(d.sentences) - 2, 3)]
    triples = [(document, sentences) for document, sentences in triples if usable.issuperset(sentences)]
    rng.shuffle(triples)
    last = sorted({sentences[2] for _, sentences in triples}, key=lambda sentence: (len(sentence), sentence))
    labels = balanced(range(4), size, rng)
    for document, (first, second, true) in triples:
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
    """Returns the items of each task and split. Raises UserError if there are too few documents."""
    usable = usable_sentences(documents)
    sets: dict[str, dict[str, list[dict]]] = {task: {} for task in TASKS}
    for (task, items_of), (split, size) in itertools.product(TASKS.items(), sizes.items()):
        rng = random.Random(f"{seed} {task} {split}")
        split_documents = [document for document in documents if document.split == split]
        rng.shuffle(split_documents)
        items = sets[task][split] = list(items_of(split_documents, usable, size, rng))
        if len(items) < size:
            raise UserError(f"{task}: the documents give {len(items)} items for {split}, but {size} are needed")
    return sets


def write(output: Path, documents: list[Document], sources: dict, sets: dict, seed: int) -> dict[str, Any]:
    """Writes the folder `output` and returns the content of its meta.json."""
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
        raise UserError(f"{options.output} exists and was not written by this script: choose another --output")
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
