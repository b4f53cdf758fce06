"""Show what prepared datasets hold.

python prepare/show.py book
python prepare/show.py fineweb --documents=10 --characters=1000
python prepare/show.py fineweb openwebtext              with the sum of their tokens
python prepare/show.py configs/gpt3_mixture.toml        the datasets of a mixture, with their shares
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen
from pydantic.dataclasses import dataclass

from gpt_arc.data.datasets import Source, find_dataset, mixture_shares, open_corpus
from gpt_arc.data.token_files import TokenFiles
from gpt_arc.data.tokenizer import holds_tokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import DATA_ROOT, command
from gpt_arc.flags import parse_flags
from gpt_arc.reading import read_json
from gpt_arc.settings import STRICT, Count, Natural, Positional
from gpt_arc.tables import counted, table

SPLITS = ("train", "val")
READ_AT_ONCE = 1 << 16  # tokens


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    datasets: Positional[Annotated[tuple[str, ...], MinLen(1)]]
    """Names below data/, folders, or a config with a mixture."""
    documents: Natural = 3
    """How many of the first documents to show."""
    characters: Count = 300
    """How much of each document to show."""


def sources_of(names: tuple[str, ...]) -> tuple[Source, ...]:
    if len(names) == 1 and names[0].endswith(".toml"):
        from gpt_arc.training.config import read_settings

        settings = read_settings(Path(names[0]))
        return settings.get("mixture") or sources_of((settings.get("dataset") or "python_manual",))
    return tuple(Source(name, 1.0) for name in names)


def first_documents(files: TokenFiles, end: int | None, count: int) -> list[np.ndarray]:
    """The tokens of the first documents, or of the beginning if nothing separates them; at most READ_AT_ONCE in all."""
    tokens = files.read(0, READ_AT_ONCE)
    if end is None:
        return [tokens][:count]
    documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    return [ids for ids in documents if len(ids)][:count]  # nothing follows the last end


def describe(source: Source, options: Options) -> dict[str, Any]:
    """Prints what a dataset holds. Returns its counts."""
    directory = find_dataset(source.name)
    corpus = open_corpus((source,)) if directory else None
    if directory is None or corpus is None:
        folder = next(filter(holds_tokenizer, (DATA_ROOT / source.name, Path(source.name))), None)
        if folder is not None:
            encode = command("prepare/text.py", "--input=TEXT", f"--tokenizer={folder}", "--name=NAME")
            raise UserError(f"{folder} holds a tokenizer, but no tokens: encode text with it by: {encode}")
        raise UserError(
            f"there is no dataset {source.name}, neither {DATA_ROOT / source.name} nor a folder of that path"
        )
    meta = read_json(directory / "meta.json") if (directory / "meta.json").exists() else {}
    splits = {split: TokenFiles(directory, split) for split in SPLITS if any(directory.glob(f"*{split}*.bin"))}
    tokens = {split: len(files) for split, files in splits.items()}
    total, documents, tokenizer = sum(tokens.values()), meta.get("documents"), corpus.tokenizer
    end = None if tokenizer is None else tokenizer.end_of_text
    print(directory)
    for split, files in splits.items():
        print(f"  {split:<12} {counted(len(files), 'token')} in {counted(len(files.paths), 'file')}")
    if documents:
        print(f"  documents    {documents:,}, {total / documents:,.1f} tokens each")
    if meta:
        made_of = meta["made_of"]
        print(f"  source       {meta['source']}{' at ' + meta['revision'] if 'revision' in meta else ''}")
        print(f"  val          {made_of['val_fraction']:g} by {made_of['split']}")
        print(f"  fingerprint  {corpus.fingerprint}")
    if tokenizer is not None:
        print(f"  tokenizer    {type(tokenizer).__name__}, {counted(tokenizer.vocab_size, 'token')}")
        print(f"  end of text  {'none' if end is None else f'{end}, {tokenizer.decode([end])!r}'}")
        special = range(tokenizer.text_size, tokenizer.vocab_size)
        named = ", ".join(f"{id} {tokenizer.decode([id])!r}" for id in special[:20])
        print(f"  special      {named or 'none'}{', ...' if len(special) > 20 else ''}")
    for number, ids in enumerate(
        first_documents(next(iter(splits.values())), tokenizer and tokenizer.end_of_text, options.documents)
    ):
        text = repr(ids[:50].tolist()) if tokenizer is None else tokenizer.decode(ids[: options.characters].tolist())
        print(f"--- {number + 1}: {counted(len(ids), 'token')}\n{text[: options.characters]}")
    return {"documents": documents, "total": total, **tokens}


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    sources = sources_of(options.datasets)
    counts = [describe(source, options) for source in sources]
    if len(counts) > 1:
        columns = ("documents", *SPLITS, "total")
        rows = [
            [source.name, *(f"{count.get(column) or 0:,}" for column in columns)]
            for source, count in zip(sources, counts)
        ]
        rows.append(["sum", *(f"{sum(count.get(column) or 0 for count in counts):,}" for column in columns)])
        shares = [f"{share:.1%}" for share in mixture_shares(sources)] + [""]
        print(table([["", *columns, "share of windows"], *([*row, share] for row, share in zip(rows, shares))]))


if __name__ == "__main__":
    entry_point(main)()
