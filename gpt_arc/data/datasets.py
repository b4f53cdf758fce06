"""Prepared datasets: finding and opening them, mixtures, and their splits."""

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from gpt_arc.data.order import MixtureOrder, TrainingOrder, evaluation_starts
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.data.tokenizer import END_OF_TEXT, Tokenizer, holds_tokenizer, load_tokenizer
from gpt_arc.errors import UserError
from gpt_arc.files import DATA_ROOT, command, resource, whole
from gpt_arc.manifest import MANIFEST, check_files
from gpt_arc.reading import read_json
from gpt_arc.settings import STRICT, Natural, Positive
from gpt_arc.tables import counted

if TYPE_CHECKING:
    from gpt_arc.data.masking import Masking  # imports torch

SMALL_CORPORA = ("python_manual", "tinyshakespeare")  # train.py prepares these if they are missing
EXAMPLES = {  # dataset -> the example that makes it
    "gpt1_shuffled": "relatives_arc.sh",
    "gpt1_text": "gpt1_arc.sh",
    "in_context_text": "in_context_arc.sh",
    "instructgpt_text": "instructgpt_arc.sh",
    "long_64": "long_context_arc.sh",
    "long_512": "long_context_arc.sh",
    "toy": "toy_sentiment.sh",
}


@dataclass(frozen=True, config=STRICT)
class Source:
    """One table of [[data.mixture]]."""

    name: str
    """A prepared dataset, as for the setting dataset."""
    weight: Positive
    """Its share of the training windows, in any unit: the weights of a mixture are divided by their sum."""


class Meta(TypedDict, total=False):
    """What is read of meta.json."""

    vocab_size: Natural
    tokens: dict[str, Natural]  # by split


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The prepared datasets of a run, folders of token files, each with its share of the windows.

    `tokenizer` is None for bare shards published by others.
    """

    names: tuple[str, ...]
    directories: tuple[Path, ...]
    weights: tuple[float, ...]  # their sum is 1
    tokenizer: Tokenizer | None

    @property
    def fingerprint(self) -> str:
        """A hash of every meta.json, which distinguishes datasets of the same name."""
        metas = [directory / "meta.json" for directory in self.directories]
        content = [meta.read_bytes() for meta in metas if meta.exists()]
        if len(self.names) > 1:
            content.append(repr((self.names, self.weights)).encode())
        return hashlib.sha256(b"".join(content)).hexdigest() if content else ""

    def separator(self, setting: str = "document_mask") -> int:
        """The token that begins a document, for a `setting`. Raises UserError if there is none."""
        if self.tokenizer is None or self.tokenizer.end_of_text is None:
            raise UserError(
                f"{setting} = true needs an end-of-text token between documents, and {self.directories[0]} has "
                f"no tokenizer with one: prepare the text with a BPE tokenizer, or remove {setting}"
            )
        if not (self.directories[0] / MANIFEST).exists():  # an older version's: <|endoftext|>, if there was one
            former = self.tokenizer.special_token(END_OF_TEXT)
            return self.tokenizer.end_of_text if former is None else former
        return self.tokenizer.end_of_text

    def split(
        self, name: str, block_size: int, vocab_size: int, document_mask: bool, masking: "Masking | None" = None
    ) -> "Split":
        """The split `name` of every dataset. Raises UserError if one is shorter than a window."""
        parts = []
        for directory in self.directories:
            files = TokenFiles(directory, name, vocab_size)
            if len(files) <= block_size:
                raise UserError(
                    f"block_size = {block_size} is longer than the {name} split of {directory}: a window and its "
                    f"last target take {block_size + 1} tokens and it has {len(files)}; prepare more text, "
                    "or train a model of a smaller block_size"
                )
            recorded = _tokens_of(directory, name)
            if recorded not in (None, len(files)):
                raise UserError(
                    f"{directory} has {counted(len(files), 'token')} in its {name} split, its meta.json counts "
                    f"{recorded:,}: a token file is missing or surplus; prepare the dataset again"
                )
            parts.append(files)
        return Split(parts, self.weights, self.separator() if document_mask else None, masking)


def _tokens_of(directory: Path, split: str) -> int | None:
    """The number of tokens recorded in meta.json, or None if there is none, as with others' shards."""
    return recorded_tokens(directory).get(split)


def recorded_tokens(directory: Path) -> dict[str, int]:
    """The number of tokens of each split, as recorded in meta.json; {} if there is none, as with others' shards."""
    return _meta(directory).get("tokens", {})


def _meta(directory: Path) -> Meta:
    path = directory / "meta.json"
    return read_json(path, Meta) if path.exists() else {}


def prepare_missing(sources: Sequence[Source]) -> None:
    """Prepare every missing dataset that is in SMALL_CORPORA. Raises UserError, saying what to run, for any other."""
    for source in sources:
        if find_dataset(source.name) is None:
            prepare_dataset(source.name)


def open_corpus(sources: Sequence[Source], verify: bool = False) -> Corpus | None:
    """The datasets of a run, or None if one is not prepared.

    Raises UserError if their tokenizers differ or a file is not the one prepared; the contents of token files are
    compared only with `verify`.
    """
    directories = [directory for source in sources if (directory := find_dataset(source.name))]
    if len(directories) < len(sources):
        return None
    for directory in directories:
        check_files(directory, sizes_only=() if verify else (".bin",))
    tokenizers = [load_tokenizer(d) if holds_tokenizer(d) else None for d in directories]
    for directory, tokenizer in zip(directories, tokenizers):
        recorded = _meta(directory).get("vocab_size")
        if tokenizer and recorded not in (None, tokenizer.vocab_size):
            raise UserError(
                f"the tokenizer in {directory} belongs to another dataset: it has {tokenizer.vocab_size:,} tokens, and "
                f"meta.json there records {recorded:,}; prepare the dataset again"
            )
        if tokenizer != tokenizers[0]:
            raise UserError(
                f"{directory} and {directories[0]} have different tokenizers: the datasets of a mixture must share one"
            )
    return Corpus(tuple(source.name for source in sources), tuple(directories), mixture_shares(sources), tokenizers[0])


def open_dataset(name: str, tokenizer: Tokenizer, setting: str) -> Corpus:
    """Opens the prepared dataset that a setting names, for a model with this tokenizer. Raises UserError."""
    corpus = open_corpus((Source(name, 1.0),))
    if corpus is None or corpus.tokenizer != tokenizer:
        problem = "there is no prepared dataset of that name" if corpus is None else "it has another tokenizer"
        raise UserError(f"{setting} = {name}: {problem}")
    return corpus


def mixture_shares(sources: Sequence[Source]) -> tuple[float, ...]:
    """The weights of a mixture, divided by their sum."""
    total = sum(source.weight for source in sources)
    return tuple(source.weight / total for source in sources)


def data_plan(sources: Sequence[Source], split: "Split | None", tokens: int) -> list[str]:
    """One line per dataset: its share of `tokens` and, if it is prepared, the number of epochs."""
    lines = []
    for source, share, part in zip(sources, mixture_shares(sources), split.parts if split else [None] * len(sources)):
        epochs = "not prepared yet"
        if part:
            epochs = f"{counted(tokens * share / len(part), 'epoch', '.3g')} of {counted(len(part), 'token')}"
        lines.append(f"{share:.1%} {source.name}: {epochs}")
    return lines


class Split:
    """One split of a corpus: the concatenated token files of its datasets. No window crosses from one to the next.

    `masking` hides tokens of its windows; None: each token predicts the next.
    """

    def __init__(
        self,
        parts: Sequence[TokenFiles],
        weights: Sequence[float],
        separator: int | None = None,
        masking: "Masking | None" = None,
    ):
        self.parts, self.weights, self.separator, self.masking = parts, weights, separator, masking
        self.bounds = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count as int64, fewer at the end of the dataset that contains `start`."""
        part = self._part(start)
        return self.parts[part].read(start - int(self.bounds[part]), count)

    def dataset_of(self, start: int) -> range:
        """The places of the tokens of the dataset that contains `start`."""
        part = self._part(start)
        return range(int(self.bounds[part]), int(self.bounds[part + 1]))

    def _part(self, start: int) -> int:
        return int(np.searchsorted(self.bounds, start, side="right")) - 1

    def training_order(self, block_size: int, seed: int) -> TrainingOrder | MixtureOrder:
        """The order of the training windows."""
        if len(self.parts) == 1:
            return TrainingOrder(len(self), block_size, seed)
        seeds = np.random.SeedSequence((seed, len(self.parts))).generate_state(len(self.parts), np.uint64)
        orders = [TrainingOrder(len(part), block_size, int(part_seed)) for part, part_seed in zip(self.parts, seeds)]
        return MixtureOrder(orders, self.bounds[:-1], self.weights, seed)

    def evaluation_starts(self, block_size: int, windows: int) -> np.ndarray:
        """Positions of the first tokens of the windows to evaluate: each dataset's share of `windows`.

        0 means every split in full.
        """
        counts = [windows and max(1, round(windows * weight)) for weight in self.weights]
        starts = [evaluation_starts(len(part), block_size, count) for part, count in zip(self.parts, counts)]
        return np.concatenate([bound + first for bound, first in zip(self.bounds, starts)])


def find_dataset(name: str) -> Path | None:
    """The folder of the dataset `name`, a name below data/ or a path. Returns None if it doesn't exist."""
    for directory in (whole(DATA_ROOT / name), whole(Path(name))):
        if next(directory.glob("*.bin"), None):
            return directory
    return None


def prepare_dataset(name: str) -> Path:
    """Prepare a dataset in SMALL_CORPORA. Raises UserError, saying what to run, for any other."""
    script = resource("prepare") / f"{name.removesuffix('_text')}.py"  # of images, also the text about them
    if name not in SMALL_CORPORA:
        text = name if Path(name).exists() else "FILE_OR_FOLDER"
        flags = ("--input", text, "--name", Path(name).stem.lstrip(".") or "NAME", "--tokenizer", "gpt2")
        prepare = f"`{command('prepare/text.py', *flags)}` on your own text"
        prepare = f"`{command(f'prepare/{script.name}')}`" if script.exists() else prepare
        prepare = f"`ONLY=data bash examples/{EXAMPLES[name]}`" if name in EXAMPLES else prepare
        raise UserError(
            f"there is no dataset {name}, neither {DATA_ROOT / name} nor a folder of that path: prepare it with "
            f"{prepare}, or name a prepared one with --dataset"
        )
    print(f"preparing the dataset {name}", flush=True)
    if subprocess.run([sys.executable, script], stdout=sys.stderr).returncode:
        raise UserError(f"the dataset {name} could not be prepared: see the message above")
    return DATA_ROOT / name
