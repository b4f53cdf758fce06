"""Convert a model that reads images between transformers' LLaVA and a model directory.

    python tools/llava.py llava-folder out/llava        from a folder that transformers saved
    python tools/llava.py out/sft llava-folder          to one: transformers.LlavaForConditionalGeneration reads it

A run folder or model directory is written as a LLaVA, a LLaVA as a model directory for sample.py and stages/sft.py. The
tokenizer comes along. A model that no LLaVA equals is refused, and so is one whose text model isn't supported.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import sys
from pathlib import Path

from pydantic.dataclasses import dataclass

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import new_directory
from gpt_arc.flags import parse_flags
from gpt_arc.manifest import record_files
from gpt_arc.next_steps import reads_text_alone
from gpt_arc.settings import STRICT, Positional


@dataclass(frozen=True, config=STRICT)
class Options:
    source: Positional[str]
    """The model: a folder that transformers saved, a run folder or a model directory."""
    folder: Positional[Path]
    """The folder to write, which must be new or empty."""


def main() -> None:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    from gpt_arc.data.tokenizer import holds_tokenizer, load_tokenizer
    from gpt_arc.vision.llava import is_llava, read_llava, write_llava
    from gpt_arc.vision.model import load_vision, save_vision
    from gpt_arc.weights.directory import load_model, model_directory, reads_images, save_model
    from gpt_arc.weights.tensor_files import check_range

    if options.folder.exists() and (not options.folder.is_dir() or any(options.folder.iterdir())):
        raise UserError(f"{options.folder} exists: name a new folder")
    if is_llava(Path(options.source)):
        source = Path(options.source)
        model, tokenizer = read_llava(source), load_tokenizer(source) if holds_tokenizer(source) else None
        check_range(model.state_dict(), options.source)
        with new_directory(options.folder.resolve()) as temporary:
            save_model(model.text, tokenizer, temporary)
            save_vision(model, temporary)
    else:
        directory = model_directory(options.source)
        if not reads_images(directory):
            raise reads_text_alone(directory)
        text, tokenizer = load_model(directory)
        vision = load_vision(directory, text)
        check_range(vision.state_dict(), options.source)
        with new_directory(options.folder.resolve()) as temporary:
            write_llava(vision, temporary)
            if tokenizer is not None:
                tokenizer.save(temporary)
                record_files(temporary, *tokenizer.files())
    print(f"wrote {options.folder}")


if __name__ == "__main__":
    entry_point(main)()
