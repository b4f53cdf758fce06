"""Prompts of sample.py: where they come from, and their tokens."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from gpt_arc.data.documents import read_text
from gpt_arc.data.tokenizer import Tokenizer, naming_text
from gpt_arc.decoding.settings import SampleConfig
from gpt_arc.errors import NotFinite, UserError


def prompt_batches(config: SampleConfig) -> list[list[str]] | Iterator[list[str]]:
    """Returns the prompts, in lists that may be continued together."""
    if config.typed:
        return typed_prompts()
    if config.prompts is not None:
        lines = read_text(config.prompts).removesuffix("\n").split("\n")
        if lines == [""]:
            raise UserError(f"{config.prompts} holds no prompts")
        return [[line.removesuffix("\r") for line in lines]]
    if config.start.startswith("FILE:"):
        text = read_text(Path(config.start.removeprefix("FILE:")))
        return [[text.removesuffix("\n").removesuffix("\r")]]  # editors end a file with a line break
    return [[config.start]]


def typed_prompts() -> Iterator[list[str]]:
    """Yields each line of the input."""
    while sys.stdin is not None:
        try:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)  # stdout may be a file
            yield [input().removesuffix("\r")]
        except EOFError:
            return


@contextlib.contextmanager
def naming_prompt(config: SampleConfig, number: int) -> Iterator[None]:
    """Runs the block so that a UserError names the file that prompt `number`, counted from 0, comes from."""
    try:
        yield
    except NotFinite:
        raise
    except UserError as error:
        if config.typed or config.prompts is None and not config.start.startswith("FILE:"):
            raise
        place = config.start.removeprefix("FILE:") if config.prompts is None else f"{config.prompts}, line {number + 1}"
        raise UserError(f"{place}: {error}") from None


def encode_prompt(prompt: str, tokenizer: Tokenizer, context: int) -> list[int]:
    """Returns the prompt's tokens, and says if the context is too small for them all. Raises UserError."""
    tokens = prompt_tokens(prompt, tokenizer)
    if len(tokens) > context:
        print(f"keeping the last {context} of the prompt's {len(tokens)} tokens: that is the context", file=sys.stderr)
    return tokens


def prompt_tokens(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the prompt's tokens as `Tokenizer.encode_prompt` does. Raises UserError for text without tokens."""
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"the prompt {prompt[:40]!r} is not UTF-8")  # surrogates stand for undecodable bytes
    with naming_text("prompt", prompt):
        return tokenizer.encode_prompt(prompt)
