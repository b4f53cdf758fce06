"""Makes a dataset whose sentences are in random order, from one that examples/gpt1_data.py made the text of.

    python examples/shuffle_sentences.py gpt1_text --name=gpt1_shuffled

A model that reads it learns words and sentences, but not how one sentence leads to the next. All sentences of the train
split are dealt out anew to its documents, each of which keeps its paragraphs and their numbers of sentences. The val
split stays in order, so the val losses of both datasets compare.
"""

import random
import shutil
import sys
from collections.abc import Sequence
from itertools import islice

import numpy as np
from pydantic.dataclasses import dataclass

from gpt1_data import SENTENCE_END
from gpt_arc.data.datasets import find_dataset, prepare_dataset
from gpt_arc.data.token_files import ShardWriter, TokenFiles
from gpt_arc.data.tokenizer import load_tokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import DATA_ROOT, new_directory, write_file
from gpt_arc.flags import parse_flags
from gpt_arc.manifest import MANIFEST, record_files
from gpt_arc.reading import read_json
from gpt_arc.settings import STRICT, Positional, Seed
from gpt_arc.tables import counted, to_json

META = "meta.json"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    dataset: Positional[str]
    """The dataset in order."""
    name: str
    """Name of the shuffled dataset, written to data/NAME; replaces an older one."""
    seed: Seed = 0
    """Seed of the order."""


def shuffled(documents: Sequence[str], rng: random.Random) -> list[str]:
    """Returns documents of the same shape, paragraphs of sentences, with the sentences of all in random order."""
    layout = [[SENTENCE_END.split(paragraph) for paragraph in text.split("\n")] for text in documents]
    sentences = [sentence for paragraphs in layout for paragraph in paragraphs for sentence in paragraph]
    rng.shuffle(sentences)
    dealt = iter(sentences)
    return ["\n".join(" ".join(islice(dealt, len(paragraph))) for paragraph in paragraphs) for paragraphs in layout]


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if options.name == options.dataset:
        raise UserError(f"{options.name} would replace the dataset in order: choose another --name")
    source, output = find_dataset(options.dataset) or prepare_dataset(options.dataset), DATA_ROOT / options.name
    tokenizer, files = load_tokenizer(source), TokenFiles(source, "train")
    if (end := tokenizer.end_of_text) is None:
        raise UserError(f"{source} has no token between its documents: prepare it with a BPE tokenizer")
    tokens = files.read(0, len(files))
    documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]
    texts = shuffled([tokenizer.decode(document[:-1].tolist()) for document in documents], random.Random(options.seed))
    with new_directory(output) as folder:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("train*", META, MANIFEST), dirs_exist_ok=True)
        writer = ShardWriter(folder, "train", tokenizer.vocab_size, shard_tokens=10**8)
        for text in texts:
            writer.append(np.array([*tokenizer.encode(text), end]))
        writer.close()
        meta = read_json(source / META)
        meta["tokens"]["train"] = writer.written
        meta["shuffled"] = options.seed
        write_file(folder / META, to_json(meta, indent=1) + "\n")
        record_files(folder, *sorted(path.name for path in folder.iterdir()))
    print(f"{output}: {counted(len(texts), 'document')}, {counted(writer.written, 'token')} in the train split")


if __name__ == "__main__":
    entry_point(main)()
