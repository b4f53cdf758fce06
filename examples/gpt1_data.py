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
    paraphrase/{train,val,test}.jsonl         similarity: text_a, text_b, label (same, different)
    next_sentence/{train,val,test}.jsonl      multiple choice: context, options (four), label (from 0)
    meta.json                                 counts, and the sources with their versions

`package`: which library, or part of one, has a docstring that begins so? Names of packages, of modules and of what is
described are masked. `follows`: is the hypothesis a later sentence of the docstring that begins with the premise, or
of another one, from the same file where there is one? `paraphrase`: two versions of a sentence, with other words in
two to four places; do they mean the same? Which words do says the table below, and every word of it is about as
often of the one label as of the other. `next_sentence`: which sentence comes after these two, of four
of about a length from one package?

The labels are balanced. The same versions of the libraries and of Python, and the same seed, give the same files.
"""

import ast
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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import DATA_ROOT, new_directory
from gpt_arc.flags import parse_flags

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

# Two words that mean the same | two that mean something else; ";" between entries, "_" for a space within one.
VERBS = """
compute calculate | discard reject; create construct | remove delete; start launch | finish terminate;
use employ | ignore disregard; require need | allow enable; specify indicate | estimate approximate;
convert transform | preserve retain; contain include | obtain acquire; check verify | assume presume;
modify alter | describe explain; copy duplicate | combine merge; handle manage | observe watch;
provide supply | expect anticipate; raise signal | suppress silence; increase enlarge | decrease reduce;
connect link | separate divide; store save | load fetch; perform execute | avoid prevent;
call invoke | inspect examine; select pick | decline refuse; ensure guarantee | attempt try;
represent denote | generate produce; depend rely | differ vary; wait pause | continue proceed;
update refresh | compare contrast; limit restrict | evaluate assess; extend expand | shorten truncate;
determine decide | replace supplant
"""
NOUNS = """
error mistake | result outcome; function routine | object entity; argument parameter | element component;
method technique | example illustration; name title | size extent; type kind | position location;
number count | range interval; task job | rule principle; problem issue | solution answer; part portion | pair couple;
step stage | purpose goal; option choice | constraint restriction; difference distinction | similarity likeness;
cost expense | benefit advantage; warning alert | comment remark; feature trait | sample specimen;
way manner | time moment; directory folder | device machine; approach strategy | condition circumstance;
version edition | source origin; case instance | reason cause
"""
OTHERS = """
maximum largest | minimum smallest; first initial | last final; before prior_to | after subsequent_to;
larger bigger | smaller tinier; large big | small little; always at_all_times | never at_no_time;
many a_lot_of | few not_many; same identical | different distinct; new novel | old outdated;
previous preceding | next subsequent; fast quick | slow sluggish; faster quicker | slower more_sluggish;
often frequently | rarely seldom; usually typically | occasionally sometimes; also additionally | only solely;
possible feasible | impossible infeasible; correct accurate | incorrect wrong; empty blank | full complete;
above over | below under; at_least no_fewer_than | at_most no_more_than; greater_than in_excess_of | less_than short_of;
because since | although though; therefore consequently | however nevertheless; must shall | may might;
should ought_to | can could; automatically by_itself | manually by_hand; optional discretionary | mandatory compulsory;
important significant | irrelevant unimportant; simple easy | complex complicated; useful helpful | useless pointless;
specific particular | general universal; entire whole | partial incomplete; exactly precisely | approximately roughly;
explicitly expressly | implicitly tacitly; return give_back | take accept; returns gives_back | takes accepts;
returned given_back | taken accepted; find discover | keep maintain; finds discovers | keeps maintains;
found discovered | kept maintained; show display | hide conceal; shows displays | hides conceals;
shown displayed | hidden concealed; such_as like | except_for apart_from; inside within | outside beyond;
for_example for_instance | in_contrast on_the_contrary; according_to as_per | regardless_of irrespective_of;
in_addition_to besides | instead_of rather_than; each every | another a_further; better superior | worse inferior;
available accessible | missing absent; currently at_present | previously formerly; high elevated | low modest;
long lengthy | short brief; once one_time | twice two_times; together jointly | individually one_by_one;
valid legitimate | invalid illegitimate; multiple several | single sole; constant fixed | random arbitrary
"""
PLACES = 2, 4  # the fewest and the most words of a sentence that are replaced

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


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, eq=False)
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
    premises = {document: opening(document, usable, 2) for document in documents}
    later = {d: [s for s in d.sentences[len(premises[d]) :] if s in usable] for d in documents if premises[d]}
    there = [document for document in later if later[document]]
    files, packages = grouped(there, lambda d: d.file), grouped(there, lambda d: d.package)
    labels = balanced(["yes", "no"], size, rng)
    for document in there:
        others = [d for d in files[document.file] if d is not document]
        others = others or [d for d in packages[document.package] if d is not document]
        if others and labels:
            source = document if labels[-1] == "yes" else rng.choice(others)
            premise, hypothesis = " ".join(premises[document]), rng.choice(later[source])
            yield {"premise": premise, "hypothesis": hypothesis, "label": labels.pop()}


def inflected(word: str, kind: str) -> list[str]:
    """A regular verb in its four forms, a noun in its two, another word as it is."""
    y = re.search("[^aeiou]y$", word) is not None
    s = word[:-1] + "ies" if y else word + ("es" if word.endswith(("s", "sh", "ch")) else "s")
    stem = word.removesuffix("e")
    forms = [word, s, word[:-1] + "ied" if y else stem + "ed", stem + "ing"]
    return forms[: {"verb": 4, "noun": 2, "other": 1}[kind]]


def meanings() -> dict[str, tuple[list[str], list[str]]]:
    """By word of the table: those of its meaning, itself among them, and those of the other."""
    table = {}
    for kind, entries in ("verb", VERBS), ("noun", NOUNS), ("other", OTHERS):
        for entry in entries.split(";"):
            words = (inflected(word, kind) for word in entry.replace("|", " ").split())
            for a, b, c, d in zip(*([form.replace("_", " ") for form in forms] for forms in words)):
                table |= {a: ([a, b], [c, d]), b: ([a, b], [c, d]), c: ([c, d], [a, b]), d: ([c, d], [a, b])}
    return table


def paraphrase_items(documents: list[Document], usable: set[str], size: int, rng: random.Random) -> Iterator[dict]:
    table = meanings()
    words = "|".join(sorted(table, key=len, reverse=True))  # the longest first: "for example" before "example"
    pattern = re.compile(rf"(?<![\w.-])(?:(a)n? )?({words})(?![\w-]|\.\w)", re.IGNORECASE)
    used: Counter[tuple[str, str]] = Counter()  # a label and a meaning

    def allowed(place: re.Match) -> bool:
        """Whether a meaning stays about as frequent as the other, so that a word alone tells nothing of the label."""
        own, other = table[place[2].lower()]
        return used[labels[-1], own[0]] <= used[labels[-1], other[0]]

    def put(sentence: str, place: re.Match, new: str) -> str:
        new = new[0].upper() + new[1:] if place[2][0].isupper() else new
        article = place[1] + ("n " if re.match("[aeio]|u(?!s|ni)", new) else " ") if place[1] else ""
        return sentence[: place.start()] + article + new + sentence[place.end() :]

    labels = balanced(["same", "different"], size, rng)
    for sentence in (s for document in documents for s in document.sentences if s in usable):
        if not labels:
            return
        places = [place for place in pattern.finditer(sentence) if allowed(place)]
        if len(places) < PLACES[0]:
            continue
        texts = [sentence, sentence]
        chosen = rng.sample(places, min(len(places), rng.randint(*PLACES)))
        for place in sorted(chosen, key=lambda place: -place.start()):  # from the end, so that places stay
            own, other = table[place[2].lower()]
            used[labels[-1], own[0]] += 1
            pair = rng.sample(own, 2) if labels[-1] == "same" else [rng.choice(own), rng.choice(other)]
            texts = [put(text, place, word) for text, word in zip(texts, pair)]
        rng.shuffle(texts)
        yield {"text_a": texts[0], "text_b": texts[1], "label": labels.pop()}


def next_sentence_items(documents: list[Document], usable: set[str], size: int, rng: random.Random) -> Iterator[dict]:
    triples = [(d, *(d.sentences[i : i + 3])) for d in documents for i in range(0, len(d.sentences) - 2, 3)]
    triples = [triple for triple in triples if usable.issuperset(triple[1:])]
    rng.shuffle(triples)
    packages = grouped(triples, lambda triple: triple[0].package)
    labels = balanced(range(4), size, rng)
    for document, first, second, true in triples:
        others = {triple[3] for triple in packages[document.package] if triple[0] is not document}
        shorter = sorted((s for s in others if len(s) <= len(true)), key=lambda s: (-len(s), s))
        longer = sorted((s for s in others if len(s) > len(true)), key=lambda s: (len(s), s))
        if len(others) >= 3 and labels:
            n_shorter = rng.randint(max(0, 3 - len(longer)), min(3, len(shorter)))
            options = rng.sample(shorter[:6], n_shorter) + rng.sample(longer[:6], 3 - n_shorter)
            rng.shuffle(options)
            options.insert(labels[-1], true)
            yield {"context": f"{first} {second}", "options": options, "label": labels.pop()}


TASKS = dict(
    package=package_items, follows=follows_items, paraphrase=paraphrase_items, next_sentence=next_sentence_items
)


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
