"""Samples of text from a model in training."""

from gpt_arc.data.text_stream import TextStream
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.probabilities import row_generators
from gpt_arc.decoding.prompts import encode_prompt
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import UserError
from gpt_arc.training.config import Config
from model import GPT

CHARACTERS = 200  # of a sample, about


class TrainingSampler:
    """Continues one prompt with a model as it trains, always with the same random numbers, none of them training's."""

    def __init__(self, model: GPT, tokenizer: Tokenizer | None, start: str, seed: int):
        """Raises UserError for a prompt that the tokenizer can't encode."""
        if tokenizer is None:
            raise UserError("the dataset has no tokenizer to show samples with: --sample_interval=0 shows none")
        self.model, self.tokenizer, self.start, self.seed = model, tokenizer, start, seed
        self.prompt = encode_prompt(start, tokenizer, model.config.block_size)

    def sample(self) -> str:
        """Returns the prompt and its continuation."""
        text = TextStream(self.tokenizer, self.prompt)
        self.model.eval()
        for step in generate(
            self.model, [self.prompt], CHARACTERS, Sampling(temperature=0.8), generators=row_generators(self.seed, [0]),
            stopped=lambda row, token: text.ended or len(text.text) >= CHARACTERS,
        ):  # fmt: skip
            text.push(step.tokens[0])
        self.model.train()
        return self.start + text.text


def make_sampler(config: Config, model: GPT, tokenizer: Tokenizer | None) -> TrainingSampler | None:
    """Returns what shows the samples of a run; None if it shows none. Raises UserError."""
    if not config.logging.sample_interval or config.run.eval_only:
        return None
    return TrainingSampler(model, tokenizer, config.logging.sample_start, config.training.seed)
