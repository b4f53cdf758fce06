"""The settings of sampling."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from gpt_arc.settings import STRICT, Count, Natural, NonNegative, Positional, PositiveShare, Seed, Threads


@dataclass(frozen=True, config=STRICT)
class Sampling:
    """How to draw the next token. Settings out of bounds raise ValueError."""

    temperature: NonNegative = 1.0
    """Divides the logits; 0 always takes the most likely token (greedy)."""
    top_k: Count | None = None
    """Keep the k most likely tokens and any that tie with the last of them."""
    top_p: PositiveShare | None = None
    """Keep the most likely tokens up to and including the one that makes their sum reach p (arXiv:1904.09751)."""
    min_p: PositiveShare | None = None
    """Keep the tokens at least p times as likely as the most likely one (arXiv:2407.01082)."""
    repetition_penalty: Annotated[float, Ge(0.01), Le(100)] = 1.0
    """Divides positive logits of tokens that occurred before, multiplies negative ones
    (CTRL, arXiv:1909.05858)."""


@dataclass(frozen=True, config=STRICT)
class SampleConfig:
    model: Positional[str | None] = None
    """A model directory, a run folder (its best checkpoint), or gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    openai-gpt, or hf:OWNER/NAME. None: the newest run under out/."""
    out_dir: str | None = None
    """The model by its run folder or directory, as a flag instead of the first argument."""
    init_from: str = "resume"
    """The model by its name, as in nanoGPT, such as gpt2-xl. resume: the model that `model` or `out_dir` names."""
    start: str = ""
    """The prompt; FILE:prompt.txt reads it from a file, without the line break that ends it. Empty: none."""
    image: tuple[Path, ...] = ()
    """Images that the prompt asks about (PNG, JPEG, WebP), for a model trained on them by stages/sft.py."""
    prompts: Path | None = None
    """A file of prompts, one per line."""
    interactive: bool = False
    """Read prompts until the input ends (Ctrl-D). Ctrl-C ends a continuation, or at the prompt the program."""
    chat: str | None = None
    """Chat with this model, trained by stages/sft.py; reads the keyboard like interactive. /image FILE shows it an
    image."""
    system: str | None = None
    """The system turn that starts a chat."""
    json: bool = False
    """Print a JSON object for each continuation: tokens, the model's log-probabilities, times."""
    num_samples: Count = 1
    """Continuations of each prompt."""
    batch_size: Count = 16
    """Most continuations to generate at the same time."""
    max_new_tokens: Natural = 500
    """Most tokens of a continuation."""
    sampling: Sampling = Sampling(temperature=0.8)
    num_beams: Count | None = None
    """Search for the likeliest continuations with this many beams instead of sampling."""
    length_penalty: NonNegative = 1.0
    """Beams are ranked by log-probability / length^this: 0 favours short ones."""
    draft: str | None = None
    """A smaller model of the same tokenizer that proposes tokens: the same distribution, faster."""
    draft_tokens: Count = 4
    """Tokens that the draft proposes at a time."""
    stop: str | None = None
    """End a continuation before this text."""
    seed: Seed = 1337
    """Seed of the random numbers."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or any torch device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights. auto: bfloat16 if the hardware multiplies it natively and the model isn't tiny."""
    cache: Literal["auto", "bfloat16", "int8"] = "auto"
    """Type of the keys and values that are kept of the tokens read. auto: that of the weights, or float32 where a CPU
    computes faster with it. int8: rounded to 8 bits, with a scale for each token and head."""
    prefill: Count | None = None
    """Read this many tokens of a prompt at a time, in less memory. None: all at once."""
    int8: bool = False
    """Round the weights to 8 bits: for one continuation at a time (batch_size 1), compiled, on a CPU."""
    threads: Threads | Literal["auto"] = "auto"
    """CPU threads. auto: OMP_NUM_THREADS or, if that isn't set, more than one only where a short measurement shows that
    they pay."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the decoding step. auto: if it saves more time than it takes; not available with a draft."""

    FIRST: ClassVar[tuple[str, ...]] = (
        *("start", "num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "chat", "interactive"),
        *("prompts", "json", "seed"),
    )

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
        if self.image:
            if self.chat is None and not self.start:
                raise ValueError("image is what a question is about: ask it by --start, or name the model by --chat")
            for name, alone in (("num_samples", 1), ("num_beams", None), ("draft", None)):
                if getattr(self, name) != alone:
                    raise ValueError(
                        f"a question about an image has one answer, and the model draws it: leave {name} out"
                    )
        if self.chat is None and self.system is not None:
            raise ValueError("system is what a chat begins with: name the model by --chat")
        if self.stop == "":
            raise ValueError("stop is an empty text: leave it out to go on to max_new_tokens")
        if self.draft is not None and True in (self.compile, self.int8):
            raise ValueError("with a draft the model reads several tokens at a time: leave compile and int8 out")
        if self.num_beams is not None:
            if not self.max_new_tokens:
                raise ValueError("max_new_tokens = 0 must be at least 1, for num_beams to search")
            for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
                if getattr(self.sampling, name) != getattr(Sampling, name):
                    raise ValueError(f"num_beams draws nothing, so {name} has no meaning: leave one of them out")
            for name in ("draft", "stop"):
                if getattr(self, name) is not None:
                    raise ValueError(f"beams end at the end of a text alone: leave {name} or num_beams out")
            if self.length_penalty > 100:
                raise ValueError(f"length_penalty = {self.length_penalty} must be between 0 and 100")
            if self.num_samples > self.num_beams:
                raise ValueError(f"num_samples = {self.num_samples} is more than num_beams = {self.num_beams} find")
