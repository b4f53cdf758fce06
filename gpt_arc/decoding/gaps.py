"""Fills the gaps of a text, [MASK], with a bidirectional model."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt_arc.data.masking import MASK, mask_token, sentence_marks
from gpt_arc.data.tokenizer import Tokenizer, naming_text
from gpt_arc.decoding.load import resolve_decoding_dtype
from gpt_arc.decoding.probabilities import draw, row_generators, sampling_probabilities
from gpt_arc.decoding.prompts import naming_prompt
from gpt_arc.decoding.settings import SampleConfig, Sampling
from gpt_arc.device import resolve_device
from gpt_arc.errors import UserError, check_finite, naming
from gpt_arc.tables import to_json
from gpt_arc.training import runs
from gpt_arc.weights.directory import load_config, load_text_model, of_one_checkpoint
from model import GPT

FOR_CONTINUING = (  # settings that filling has no use for; max_new_tokens and batch_size are only bounds
    "image", "chat", "num_beams", "length_penalty", "draft", "draft_tokens", "stop", "int8", "prefill", "cache"
)  # fmt: skip


class Filled(NamedTuple):
    """A text whose gaps are filled."""

    text: str
    tokens: list[int]  # in the gaps, in the text's order
    log_probabilities: list[float]  # of each when it was chosen, in nats


class GapFiller:
    """A bidirectional model that fills gaps, one token in each."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: Path | str):
        """`name` is the model's, for messages."""
        self.model, self.tokenizer, self.name, self.mask = model.eval(), tokenizer, name, mask_token(tokenizer)
        self.marks = sentence_marks(tokenizer, model.config.next_sentence)
        self.device = model.token_embedding.weight.device

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text; where tokens hold the space before a word, the gap holds the one before it.

        Raises UserError for a text without a gap, one longer than the context or one that the vocabulary lacks.
        """
        pieces = text.split(MASK)
        if len(pieces) == 1:
            raise UserError(
                f"{self.name} reads in both directions and fills gaps: write {MASK} where a token is missing, such as "
                f'--start="The {MASK} statement"'
            )
        if self.tokenizer.joins_space:
            pieces[:-1] = [piece.removesuffix(" ") for piece in pieces[:-1]]
        tokens: list[int] = []
        with naming_text("text", text):
            for i, piece in enumerate(pieces):
                tokens += [self.mask] * (i > 0)
                tokens += self.tokenizer.encode_from(piece, 0, after_special=i > 0)[0] if piece else []
        if self.marks:
            tokens = [self.marks[0], *tokens, self.marks[1]]
        if len(tokens) > self.model.config.block_size:
            size = f"has {len(tokens)} tokens, and the model reads {self.model.config.block_size}"
            raise UserError(f"the text {text[:40]!r} {size}: shorten it")
        return tokens

    @torch.inference_mode()
    def fill(self, text: str, sampling: Sampling, generator: torch.Generator) -> Filled:
        """Fills the gaps one after the other, always the one whose token is the most certain.

        Raises UserError, see `encode`, or NotFinite.
        """
        tokens = self.encode(text)
        gaps = [place for place, token in enumerate(tokens) if token == self.mask]
        left, chosen = list(gaps), {}
        while left:
            logits = self.model(torch.tensor([tokens], device=self.device))[0, left].float()
            logits[:, self.mask] = logits[:, self.tokenizer.text_size :] = -torch.inf  # these stand for no text
            logs = logits.log_softmax(-1)
            i = int(logs.amax(-1).argmax())
            token = int(draw(sampling_probabilities(sampling, logits[i : i + 1]), [generator]))
            chosen[left[i]], tokens[left[i]] = logs[i, token].item(), token
            check_finite([logs[i].amax().item()])
            del left[i]
        filling, filled = [tokens[place] for place in gaps], tokens[1:-1] if self.marks else tokens
        return Filled(self.tokenizer.decode(filled), filling, [chosen[gap] for gap in gaps])


def load_filler(config: SampleConfig) -> GapFiller | None:
    """Returns the model that `config` names as a GapFiller; None for a causal one.

    Raises UserError for settings that filling has no use for.
    """

    @of_one_checkpoint
    def load(directory: Path) -> GapFiller | None:
        if load_config(directory).attention == "causal":
            return None
        default = SampleConfig()
        unfit = [name for name in FOR_CONTINUING if getattr(config, name) != getattr(default, name)]
        unfit += ["repetition_penalty"] * (config.sampling.repetition_penalty != 1)
        unfit += ["compile"] * (config.compile is True)
        if unfit:
            raise UserError(f"{directory} fills gaps, and {unfit[0]} is for continuing a text: leave it out")
        device = resolve_device(config.device)
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        model, tokenizer = load_text_model(directory, resolve_decoding_dtype(config.dtype, device, size), causal=False)
        if config.threads != "auto":
            torch.set_num_threads(config.threads)
        return GapFiller(model.to(device), tokenizer, directory)

    return load(config.names[0] if config.names else runs.newest_run())


def show_filled(filler: GapFiller, batches: Iterable[list[str]], config: SampleConfig) -> None:
    """Prints the prompts with their gaps filled, each `num_samples` times. A bad typed prompt ends its answer alone."""
    number = 0
    for place, prompt in enumerate(prompt for prompts in batches for prompt in prompts):
        for _ in range(config.num_samples):
            line: dict[str, Any] = {"prompt": prompt}
            try:
                with naming(filler.name), naming_prompt(config, place):
                    filled = filler.fill(prompt, config.sampling, row_generators(config.seed, [number])[0])
                line |= filled._asdict()
            except UserError as error:
                if not config.typed:
                    raise
                print(error, file=sys.stderr)
                line["error"] = str(error)
            number += 1
            if config.json:
                print(to_json(line), flush=True)
            elif "text" in line:
                print(line["text"], flush=True)
