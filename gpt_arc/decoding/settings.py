"""The settings of sampling."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from gpt_arc.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token. Raises UserError for settings that define no distribution."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token (greedy)."""
    top_k: int | None = None
    """Keep the k most likely tokens and any that tie with the last of them."""
    top_p: float | None = None
    """Keep the most likely tokens up to and including the one that makes their sum reach p (arXiv:1904.09751)."""
    min_p: float | None = None
    """Keep the tokens at least p times as likely as the most likely one (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that occurred before, multiplies negative ones
    (CTRL, arXiv:1909.05858)."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature = {self.temperature} must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k} must be at least 1, or left out to keep every token")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} = {value} must lie in (0, 1], or be left out to keep every token")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(
                f"repetition_penalty = {self.repetition_penalty} must lie in [0.01, 100]; 1 changes nothing"
            )


@dataclass(frozen=True)
class SampleConfig:
    model: tyro.conf.Positional[str | None] = None
    """A model directory, a run folder (its best checkpoint), or gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    openai-gpt, or hf:OWNER/NAME. None: the newest run under out/."""
    out_dir: str | None = None
    """The same, as a flag."""
    init_from: str = "resume"
    """The same again, as in nanoGPT. resume: use the other two."""
    start: str = ""
    """The prompt; FILE:prompt.txt reads it from a file. Empty: start from nothing."""
    prompts: Path | None = None
    """A file of prompts, one per line."""
    interactive: bool = False
    """Read prompts until the input ends (Ctrl-D). Ctrl-C ends a continuation, or at the prompt the program."""
    chat: str | None = None
    """Chat with this model, trained by stages/sft.py; reads the keyboard like interactive."""
    system: str | None = None
    """The system turn that starts a chat."""
    json: bool = False
    """Print a JSON object for each continuation: tokens, the model's log-probabilities, times."""
    num_samples: int = 1
    """Continuations of each prompt."""
    batch_size: int = 16
    """Most continuations to generate at the same time."""
    max_new_tokens: int = 500
    """Most tokens of a continuation."""
    sampling: Sampling = Sampling(temperature=0.8)
    num_beams: int | None = None
    """Search for the likeliest continuations with this many beams instead of sampling."""
    length_penalty: float = 1.0
    """Beams are ranked by log-probability / length^this: 0 favours short ones."""
    draft: str | None = None
    """A smaller model of the same tokenizer that proposes tokens: the same distribution, faster."""
    draft_tokens: int = 4
    """Tokens that the draft proposes at a time."""
    stop: str | None = None
    """End a continuation before this text."""
    seed: int = 1337
    """Seed of the random numbers."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or any torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights. auto: bfloat16 if the hardware multiplies it natively and the model isn't tiny."""
    int8: bool = False
    """Round the weights to 8 bits: for one continuation at a time (batch_size 1), compiled, on a CPU."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the decoding step. auto: if it saves more time than it takes; not available with a draft."""

    @property
    def names(self) -> list[str]:
        """The names given for the model."""
        names = [self.model, self.out_dir, None if self.init_from == "resume" else self.init_from, self.chat]
        return [name for name in names if name is not None]

    @property
    def typed(self) -> bool:
        """Whether prompts come from the keyboard, one at a time."""
        return self.interactive or self.chat is not None

    @property
    def compiling(self) -> bool | str:
        """`compile`; int8 requires it."""
        return True if self.int8 and self.compile == "auto" else self.compile

    def __post_init__(self):
        least_of = {"num_samples": 1, "batch_size": 1, "max_new_tokens": 0, "seed": 0, "draft_tokens": 1}
        if self.num_beams is not None:
            least_of |= {"num_beams": 1, "length_penalty": 0, "max_new_tokens": 1}
        for name, least in least_of.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be {least} or more")
        if self.seed >= 2**63:
            raise ValueError(f"seed = {self.seed} must be less than 2**63")
        if len(self.names) > 1:
            raise ValueError(f"the model is named more than once, {' and '.join(self.names)}: leave one out")
        asked = [name for name in ("start", "prompts", "interactive", "chat") if getattr(self, name)]
        if len(asked) > 1:
            raise ValueError(f"both {asked[0]} and {asked[1]} say where prompts come from: leave one out")
        for name in ("draft", "chat"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is an empty name: leave it out to go on without one")
        if self.chat is not None and (self.num_samples > 1 or self.num_beams is not None):
            raise ValueError("a chat has one answer to each turn, and draws it: leave num_samples and num_beams out")
        if self.chat is None and self.system is not None:
            raise ValueError("system is what a chat begins with: name the model by --chat")
        if self.stop == "":
            raise ValueError("stop is an empty text: leave it out to go on to max_new_tokens")
        if self.draft is not None and True in (self.compile, self.int8):
            raise ValueError("with a draft the model reads several tokens at a time: leave compile and int8 out")
        if self.num_beams is not None:
            for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
                if getattr(self.sampling, name) != getattr(Sampling, name):
                    raise ValueError(f"num_beams draws nothing, so {name} has no meaning: leave one of them out")
            for name in ("draft", "stop"):
                if getattr(self, name) is not None:
                    raise ValueError(f"beams end at the end of a text alone: leave {name} or num_beams out")
            if self.length_penalty > 100:
                raise ValueError(f"length_penalty = {self.length_penalty} must lie in [0, 100]")
            if self.num_samples > self.num_beams:
                raise ValueError(f"num_samples = {self.num_samples} is more than num_beams = {self.num_beams} find")
