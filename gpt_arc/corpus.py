"""From text to a prepared dataset: what the scripts in prepare/ share."""

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np

from gpt_arc.errors import UserError
from gpt_arc.token_files import DATA_ROOT, TokenFiles, write_dataset
from gpt_arc.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer

TokenizerName = Literal["char", "gpt2"]


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises UserError if it can't be read, or naming the first byte that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise UserError(f"{path} is not UTF-8 text: byte 0x{wrong:02X} at offset {error.start}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def prepare_text(documents: list[str], tokenizer: TokenizerName, name: str, source: str, overwrite: bool) -> None:
    """Write data/NAME from `documents`; the last tenth of their characters is the val split.

    With GPT-2's tokens an end-of-text token follows every document. A dataset of this name stays if it was made of the
    same text in the same way; otherwise this raises UserError, unless `overwrite`.
    """
    if not name or name.startswith(".") or Path(name).name != name:
        raise UserError(f"name = {name!r} must be a plain folder name: the dataset becomes {DATA_ROOT}/NAME")
    total = sum(map(len, documents))
    if total < 2:
        raise UserError(f"{source} has {total} characters: two are the least that can be split")
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
    made_of = {"sha256": digest.hexdigest(), "tokenizer": tokenizer, "val": "last tenth"}

    directory = DATA_ROOT / name
    if directory.exists() and not overwrite:
        if _made_of(directory) == made_of and _is_whole(directory):
            print(f"{directory} is prepared already")
            return
        if _made_of(directory) != made_of:
            raise UserError(
                f"{directory} exists and holds something else: --overwrite=True replaces it, or choose another name"
            )

    train, val = _split(documents, total * 9 // 10)
    chosen = CharTokenizer.from_text("".join(documents)) if tokenizer == "char" else BPETokenizer.gpt2()
    splits = {"train": _encode(train, chosen), "val": _encode(val, chosen)}
    write_dataset(directory, chosen, splits, {"source": source, "made_of": made_of})
    counts = ", ".join(f"{split} {len(tokens):,} tokens" for split, tokens in splits.items())
    print(f"{directory}: {total:,} characters, vocabulary {chosen.vocab_size:,}, {counts}")


def _made_of(directory: Path) -> dict | None:
    try:
        return json.loads((directory / "meta.json").read_text())["made_of"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_whole(directory: Path) -> bool:
    try:
        for split in ("train", "val"):
            TokenFiles(directory, split)
        load_tokenizer(directory)
        return True
    except UserError:
        return False


def _split(documents: list[str], boundary: int) -> tuple[list[str], list[str]]:
    """Cut at character `boundary` of the whole; a document that it falls into goes to both sides in part."""
    train, val, seen = [], [], 0
    for document in documents:
        cut = min(max(boundary - seen, 0), len(document))
        train += [document[:cut]] if cut else []
        val += [document[cut:]] if cut < len(document) else []
        seen += len(document)
    return train, val


def _encode(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    separator = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return np.concatenate([np.array(tokenizer.encode(document) + separator, dtype=np.int64) for document in documents])
