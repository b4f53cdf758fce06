"""Ask a model about an image, and draw which parts of it the model attends to while it answers.

    python tools/image_attention.py out/sft --image cat.png --question "What is this?" --plot attention.png

Prints the answer and the share of attention that the image gets: the mean over blocks, heads and the answer's tokens.
The plot covers each patch with grey, the more the less attention it gets.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys
from pathlib import Path

from pydantic.dataclasses import dataclass

from gpt_arc.errors import entry_point
from gpt_arc.extras import import_extra
from gpt_arc.files import replacing
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Picture, Positional


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Options:
    model: Positional[str]
    """A run folder, whose best checkpoint is used, or a model directory."""
    image: Path
    """The image: PNG, JPEG or WebP."""
    question: str
    """A question about it."""
    plot: Picture
    """A .png file for the plot."""


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    figure_class = import_extra("matplotlib.figure").Figure

    from gpt_arc.evaluation.image_attention import ask, attention_to, draw_attention, load_image_reader

    reader = load_image_reader(options.model)
    (answer,) = ask(reader, [options.question], [options.image])
    image, shares = attention_to(reader, options.question, options.image, answer)
    figure = figure_class(figsize=(4, 4), layout="constrained")
    draw_attention(figure.add_subplot(title=f"{options.question}\n{answer}"), image, shares)
    with replacing(options.plot) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    print(answer)
    print(f"attention to the image {shares.sum():.1%}, to its patches from {shares.min():.1%} to {shares.max():.1%}")
    print(f"plot           {options.plot}")


if __name__ == "__main__":
    entry_point(main)()
