"""Show which experts of a trained mixture a text's tokens go to, by block and by class of token.

    python tools/expert_use.py out/moe --dataset tinyshakespeare             the val split of a prepared dataset
    python tools/expert_use.py out/moe --text book.txt --top 5               and each expert's most typical tokens
    python tools/expert_use.py out/moe --text book.txt --plot use.png --json use.json

Prints for each block: the load of each expert, i.e. its share of all choices; the load's CV (standard deviation over
mean); the largest load over the mean; and the entropy of the router's probabilities. Then, for each class of tokens,
the percentage of its choices that goes to each expert. The mutual information of class and expert, in nats, says how
far the classes explain the choices; it is also given as a share of its value if a token's class determined its
experts.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point, naming
from gpt_arc.extras import import_extra
from gpt_arc.files import command
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, Natural, Picture, Positional, ResultFile

if TYPE_CHECKING:
    from gpt_arc.data.tokenizer import Tokenizer
    from gpt_arc.evaluation.expert_use import Use, Window


@dataclass(frozen=True, config=STRICT)
class Options:
    model: Positional[str]
    """A run folder, whose best checkpoint is used, a model directory, or a published mixture: hf:OWNER/NAME."""
    text: Path | None = None
    """A text file to read."""
    dataset: str | None = None
    """A prepared dataset to read, instead of a text."""
    split: Literal["train", "val"] = "val"
    """Which split of the dataset."""
    tokens: Natural = 20_000
    """Maximum tokens to read, in evenly spaced windows of the model's context length. 0: all."""
    top: Natural = 0
    """Print this many of each expert's most over-represented tokens, with their counts."""
    plot: Picture | None = None
    """A .png file for a plot of the classes' shares, one panel per block."""
    json: ResultFile | None = None
    """A file for the figures."""
    batch_tokens: Count = 8192
    """Tokens read at once."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. auto: the fastest on this hardware."""


def check(options: Options) -> None:
    """Raises UserError early for settings that would fail later, some only after the work is done."""
    if (options.text is None) == (options.dataset is None):  # checked here so that misspelled flags are reported first
        raise UserError("name what to read, either --text FILE or --dataset NAME")
    if options.plot:
        import_extra("matplotlib.figure")


def read_windows(options: Options, tokenizer: "Tokenizer", vocab_size: int, block_size: int) -> "list[Window]":
    """Returns the windows of tokens to read. Raises UserError if there are none."""
    from gpt_arc.data.datasets import Source, open_corpus
    from gpt_arc.data.documents import read_text
    from gpt_arc.evaluation.expert_use import windows

    if options.text:
        tokens = tokenizer.encode(read_text(options.text))
        if not tokens:
            raise UserError(f"{options.text} is empty")
        return windows(tokenizer, lambda start, n: tokens[start : start + n], len(tokens), block_size, options.tokens)
    assert options.dataset is not None  # `check` refuses both and neither
    corpus = open_corpus((Source(options.dataset, 1.0),))
    if corpus is None:
        raise UserError(f"there is no prepared dataset {options.dataset}, neither below data/ nor at that path")
    if corpus.tokenizer != tokenizer:
        raise UserError(
            f"{options.dataset} was prepared with another tokenizer than the model's: pass its text with --text"
        )
    split = corpus.split(options.split, 1, vocab_size, False)  # shorter than the context is fine
    return windows(tokenizer, split.read, len(split), block_size, options.tokens)


def class_shares(use: "Use") -> dict[str, list[float]]:
    """For each class with tokens, the share of its choices per expert (E,)."""
    from gpt_arc.evaluation.expert_use import CLASSES

    return {name: (row / row.sum()).tolist() for name, row in zip(CLASSES, use.by_class.double()) if row.sum()}


def tables(use: "Use", tokenizer: "Tokenizer", top: int) -> str:
    """The text printed for a block."""
    from gpt_arc.evaluation.expert_use import CLASSES
    from gpt_arc.tables import table

    known = "" if use.explained is None else f", {use.explained:.1%} of what could be"
    lines = [
        f"block {use.block}: CV {use.cv:.3f}, max/mean {use.max_over_mean:.2f}, router entropy "
        f"{use.router_entropy:.3f} nats; class and expert share {use.mutual_information:.3f} nats{known}"
    ]
    counts = dict(zip(CLASSES, (use.by_class.sum(1) // use.experts_per_token).tolist()))
    experts = range(1, len(use.load) + 1)
    rows = [["", "tokens", *(f"expert {number}" for number in experts)]]
    rows.append(["load, %", f"{sum(counts.values()):,}", *(f"{100 * share:.1f}" for share in use.load.tolist())])
    for name, shares in class_shares(use).items():
        rows.append([name, f"{counts[name]:,}", *(f"{100 * share:.1f}" for share in shares)])
    lines.append(table(rows))
    if top:
        for number in experts:
            best = use.typical(number - 1, top)
            shown = ", ".join(f"{tokenizer.decode([token])!r} {times:,}" for token, times in best)
            lines.append(f"expert {number}: {shown or 'none beyond its share'}")
    return "\n".join(lines)


def draw(uses: "list[Use]", path: Path) -> None:
    """Draws a heat map per block: rows are classes, columns experts, colors the shares of a class's choices."""
    from gpt_arc.files import replacing

    shares = [class_shares(use) for use in uses]
    highest = max(max(row) for block in shares for row in block.values())
    across = min(len(uses), 4)
    down = -(-len(uses) // across)
    figure = import_extra("matplotlib.figure").Figure(
        figsize=(1.6 + 3 * across, 0.6 + 2.6 * down), layout="constrained"
    )
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    for axes, use, block in zip(panels, uses, shares):
        image = axes.imshow(list(block.values()), vmin=0, vmax=highest, aspect="auto")
        axes.set_title(f"block {use.block}", fontsize="medium")
        axes.set_yticks(range(len(block)), list(block))
        if len(use.load) <= 16:
            axes.set_xticks(range(len(use.load)), range(1, len(use.load) + 1))
        axes.set_xlabel("expert")
    for axes in panels[len(uses) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=panels.tolist(), label="share of the class's choices")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def report(uses: "list[Use]", options: Options) -> dict[str, Any]:
    from gpt_arc.evaluation.expert_use import CLASSES

    names = ("block", "cv", "max_over_mean", "router_entropy", "mutual_information", "explained")
    blocks = [
        {name: getattr(use, name) for name in names}
        | {"load": use.load.tolist(), "choices": dict(zip(CLASSES, use.by_class.tolist()))}
        for use in uses
    ]
    return {"options": asdict(options), "experts_per_token": uses[0].experts_per_token, "blocks": blocks}


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    check(options)

    from gpt_arc.chat.format import load_text_with_chat
    from gpt_arc.device import DTYPES, resolve_device, resolve_dtype, set_up_device
    from gpt_arc.evaluation.expert_use import expert_use
    from gpt_arc.files import write_file
    from gpt_arc.tables import to_json

    device = resolve_device(options.device)
    dtype = DTYPES[resolve_dtype(options.dtype, device)]
    set_up_device(device, options.dtype)
    directory, model, tokenizer, _ = load_text_with_chat(options.model, dtype)
    if not model.experts:
        upcycle = command("tools/upcycle.py", options.model, "UPCYCLED", "--n_experts=8")
        raise UserError(f"{options.model} is a dense model: it has no experts; make a mixture of it with: {upcycle}")
    windows = read_windows(options, tokenizer, model.config.vocab_size, model.config.block_size)
    with naming(options.model):
        uses = expert_use(model.to(device).eval(), windows, options.batch_tokens)
    print(*(tables(use, tokenizer, options.top) for use in uses), sep="\n\n")
    if options.plot:
        draw(uses, options.plot)
        print(f"plot           {options.plot}")
    if options.json:
        content = {"checkpoint": directory.resolve(), **report(uses, options)}
        write_file(options.json, to_json(content, indent=1, default=str) + "\n")
        print(f"figures        {options.json}")


if __name__ == "__main__":
    entry_point(main)()
