"""Continue a prompt with a trained model.

python sample.py                                   the newest run under out/
python sample.py out/quickstart --start="The "     a run folder, or any model directory
python sample.py gpt2-xl --start="The "            published weights of the Hugging Face hub
python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.8 --top_k=200 --top_p=0.95
python sample.py --temperature=0                   greedy: always the most likely token
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from gpt_arc.errors import UserError, entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    model: tyro.conf.Positional[str | None] = None
    """A model directory, a run folder, whose best checkpoint is taken, or gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    openai-gpt, or hf:OWNER/NAME. None: the newest run under out/."""
    out_dir: str | None = None
    """The same, as a flag."""
    init_from: str = "resume"
    """The same again, as nanoGPT has it. resume: what the other two say."""
    start: str = ""
    """The prompt; FILE:prompt.txt reads it from a file. Empty: the model begins by itself."""
    num_samples: int = 1
    """How many continuations."""
    max_new_tokens: int = 500
    """Tokens of each continuation, at most."""
    temperature: float = 0.8
    """Divides the logits: below 1 the likely tokens gain, and 0 always takes the likeliest (greedy)."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the likeliest tokens until their probabilities sum to p, the one that crosses p included."""
    stop: str | None = None
    """End a continuation where this text begins."""
    seed: int = 1337
    """The source of chance."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device of torch's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the products. auto: bfloat16 where the hardware multiplies it natively."""
    compile: bool = False
    """torch.compile the model first."""

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("max_new_tokens", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} must be {least} or more")
        if self.seed >= 2**63:
            raise ValueError(f"seed = {self.seed} must be less than 2**63")
        named = [self.model, self.out_dir, None if self.init_from == "resume" else self.init_from]
        named = [name for name in named if name is not None]
        if len(named) > 1:
            raise ValueError(f"the model is named more than once, {' and '.join(named)}: leave one out")
        if self.stop == "":
            raise ValueError("stop is an empty text: leave it out to go on to max_new_tokens")


def text_until_end(tokens: list[int], tokenizer: Tokenizer, stop: str | None) -> tuple[str, bool]:
    """The text of a continuation before its end-of-text token or the stop text, and whether one of them came."""
    ended = tokenizer.end_of_text in tokens
    text = tokenizer.decode(tokens[: tokens.index(tokenizer.end_of_text)] if ended else tokens)
    if stop is not None and stop in text:
        return text[: text.index(stop)], True
    return text, ended


def main() -> None:
    config = parse_flags(SampleConfig, __doc__, sys.argv[1:])

    import torch  # slow to import: not before the settings are known to be right

    from gpt_arc import runs, runtime
    from gpt_arc.checkpoint import load_model, model_directory
    from gpt_arc.documents import read_text
    from gpt_arc.generate import check_sampling, generate

    check_sampling(config.temperature, config.top_k, config.top_p)
    named = config.out_dir if config.init_from == "resume" else config.init_from
    named = named if config.model is None else config.model
    directory = model_directory(runs.newest_run() if named is None else named)
    model, tokenizer = load_model(directory)
    if tokenizer is None:
        raise UserError(f"{directory} has no tokenizer, so its tokens can't be turned into text")
    device = runtime.resolve_device(config.device)
    dtype = runtime.resolve_dtype(config.dtype, device)
    model.to(device).eval()
    if config.compile:
        model.compile(dynamic=True)

    prompt = config.start
    if prompt.startswith("FILE:"):
        prompt = read_text(Path(prompt.removeprefix("FILE:")))
    try:
        tokens = tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"the prompt, --start: {error}") from None
    print(f"sampling from {directory}", file=sys.stderr)
    context = model.config.block_size
    if len(tokens) > context:
        print(f"the prompt's last {context} of {len(tokens)} tokens are kept: that is the context", file=sys.stderr)
    first = tokens[-context:] or [tokenizer.start_token]

    rows = torch.tensor([first] * config.num_samples, device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    continuations: list[list[int]] = [[] for _ in range(config.num_samples)]
    with runtime.autocast(device, dtype):
        for column in generate(
            model, rows, config.max_new_tokens, config.temperature, config.top_k, config.top_p, generator
        ):
            for continuation, token in zip(continuations, column.tolist()):
                continuation.append(token)
            if all(text_until_end(continuation, tokenizer, config.stop)[1] for continuation in continuations):
                break

    sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows a question mark
    for number, continuation in enumerate(continuations):
        if number:
            print("-" * 15)
        print(prompt + text_until_end(continuation, tokenizer, config.stop)[0])


if __name__ == "__main__":
    entry_point(main)()
