"""Measure how far back models use their context: at the trained length and at multiples of it.

    python tools/long_context.py out/long_context --dataset long_512 --context 64
    python tools/long_context.py out/rotary --dataset long_512 --context 64 --stretch ntk yarn
    python tools/long_context.py out/a out/b --dataset mine --plot loss.png --json figures.json

Prints for each model and length: the loss in nats on the val split; the share of characters predicted right in the
second copy of random ones (induction); and the share of four-digit keys, hidden anywhere in prose, that are repeated
at its end (passkey retrieval). A model is measured at lengths beyond its context without training, except one with
learned positions, which has none there. --stretch also measures rotary models with their positions scaled to each
length.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


# Modules that need torch are imported in functions: --help needs none.

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import MinLen
from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point, naming
from gpt_arc.extras import import_extra
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Picture, Positional, ResultFile, Seed
from gpt_arc.tables import table

if TYPE_CHECKING:
    from gpt_arc.evaluation.recall import Recall


@dataclass(frozen=True, config=STRICT)
class Options:
    models: Positional[Annotated[tuple[str, ...], MinLen(1)]]
    """Run folders, whose best checkpoints are used, model directories, or hf:OWNER/NAME."""
    dataset: str
    """A prepared dataset, whose val split is read."""
    context: Count | None = None
    """The trained length. None: each model's context."""
    multiples: Annotated[tuple[Count, ...], MinLen(1)] = (1, 2, 4, 8)
    """Measure at these multiples of it."""
    stretch: tuple[Literal["linear", "ntk", "dynamic", "yarn", "llama3"], ...] = ()
    """Measure rotary models without a rotary_scaling also with these."""
    rows: Count = 64
    """Windows of the val split, pairs of copies, and keys, each at every length."""
    seed: Seed = 1337
    """Seed of the random characters and keys."""
    plot: Picture | None = None
    """A .png file for a plot of the loss by position, at the longest length."""
    json: ResultFile | None = None
    """A file for the figures, with the loss at each position."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. auto: the fastest on this hardware."""


def measure(options: Options, name: str) -> "dict[str, dict[int, Recall]]":
    """Returns the figures of a model by length, under its name and under its name with each scaling."""
    from gpt_arc.data.datasets import Source, open_corpus
    from gpt_arc.device import DTYPES, resolve_device, resolve_dtype
    from gpt_arc.evaluation.recall import measure_recall, stretched
    from gpt_arc.weights.directory import load_text_model

    device = resolve_device(options.device)
    model, tokenizer = load_text_model(name, DTYPES[resolve_dtype(options.dtype, device)])
    corpus = open_corpus((Source(options.dataset, 1.0),))
    if corpus is None:
        raise UserError(f"there is no prepared dataset {options.dataset}, neither below data/ nor at that path")
    if corpus.tokenizer != tokenizer:
        raise UserError(f"{options.dataset} was prepared with another tokenizer than that of {name}")
    split = corpus.split("val", 1, model.config.vocab_size, False)
    prose = split.read(0, len(split)).tolist()
    model, context = model.to(device), options.context or model.config.block_size
    can_stretch = model.config.positions == "rotary" and model.config.rotary_scaling is None
    figures = {}
    for kind in (None, *(options.stretch if can_stretch else ())):
        label = f"{name}, {kind}" if kind else name
        figures[label] = {}
        for length in (multiple * context for multiple in options.multiples):
            longer = stretched(model, length, kind, context)
            if longer is not None:
                with naming(f"{label} at {length} tokens"):
                    figures[label][length] = measure_recall(
                        longer, tokenizer, prose, length, options.rows, options.seed
                    )
    return figures


def report(figures: "dict[str, dict[int, Recall]]", lengths: list[int]) -> str:
    """Three tables: loss, copies and keys by model and length."""
    tables = []
    for title, shown in (
        ("loss, nats", lambda recall: f"{sum(recall.losses) / len(recall.losses):.3f}"),
        ("copied, %", lambda recall: f"{100 * recall.copied:.1f}"),
        ("keys found, %", lambda recall: f"{100 * recall.found:.1f}"),
    ):
        rows = [[label, *(shown(by[size]) if size in by else "-" for size in lengths)] for label, by in figures.items()]
        tables.append(table([[title, *map(str, lengths)], *rows]))
    return "\n\n".join(tables)


def draw(figures: "dict[str, dict[int, Recall]]", path: Path) -> None:
    """Plots the mean loss in 32 stretches of positions, at each model's longest length."""
    from gpt_arc.files import replacing

    figure = import_extra("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, by_length in figures.items():
        losses = by_length[max(by_length)].losses
        width = -(-len(losses) // 32)
        parts = [losses[begin : begin + width] for begin in range(0, len(losses), width)]
        places = [begin + len(part) / 2 for begin, part in zip(range(0, len(losses), width), parts)]
        axes.plot(places, [sum(part) / len(part) for part in parts], label=label)
    axes.set_xlabel("position")
    axes.set_ylabel("loss, nats")
    axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    if options.plot:
        import_extra("matplotlib.figure")

    from gpt_arc.files import write_file
    from gpt_arc.tables import to_json

    figures = {label: by for name in options.models for label, by in measure(options, name).items()}
    print(report(figures, sorted({length for by in figures.values() for length in by})))
    if options.plot:
        draw(figures, options.plot)
        print(f"\nplot           {options.plot}")
    if options.json:
        content = {label: {length: recall._asdict() for length, recall in by.items()} for label, by in figures.items()}
        write_file(options.json, to_json({"options": asdict(options), "models": content}, indent=1, default=str) + "\n")
        print(f"figures        {options.json}")


if __name__ == "__main__":
    entry_point(main)()
