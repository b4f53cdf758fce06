"""Continue a prompt with a trained model, and print the text as it is made.

    python sample.py                                   the newest run under out/
    python sample.py out/quickstart --start="The "     a run folder, or any model directory
    python sample.py gpt2-xl --start="The "            published weights of the Hugging Face hub
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.8 --top_k=200 --top_p=0.95
    python sample.py --temperature=0                   greedy: always the most likely token
    python sample.py --num_beams=4                     the likeliest text that beam search finds
    python sample.py gpt2-xl --draft=gpt2              a small model proposes, the large one disposes
    python sample.py --interactive=True                prompts from the keyboard, one after the other
    python sample.py --chat out/sft                    a conversation; --system="Be brief." sets its tone
    python sample.py --prompts=FILE --json=True        a prompt a line in, a JSON object a line out

A model is a run folder, a model directory, or the name of published weights.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.screen import Continuation, Screen
from gpt_arc.decoding.settings import SampleConfig
from gpt_arc.errors import UserError, entry_point
from gpt_arc.flags import parse_flags


def asked_prompts(config: SampleConfig) -> Iterable[list[str]]:
    """The prompts, in lists of those that may be continued together."""
    from gpt_arc.data.documents import read_text

    if config.typed:
        return typed_prompts()
    if config.prompts is not None:
        lines = read_text(config.prompts).removesuffix("\n").split("\n")
        if lines == [""]:
            raise UserError(f"{config.prompts} holds no prompts")
        return [[line.removesuffix("\r") for line in lines]]
    if config.start.startswith("FILE:"):
        return [[read_text(Path(config.start.removeprefix("FILE:")))]]
    return [[config.start]]


def typed_prompts() -> Iterator[list[str]]:
    while sys.stdin is not None:
        try:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)  # what is printed may go to a file
            yield [input().removesuffix("\r")]
        except EOFError:
            return


def encoded(prompt: str, tokenizer: Tokenizer, context: int) -> list[int]:
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"the prompt {prompt[:40]!r} is not UTF-8")  # a terminal's bytes that are no text
    try:
        tokens = tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"the prompt {prompt[:40]!r}: {error}") from None
    if len(tokens) > context:
        print(f"the prompt's last {context} of {len(tokens)} tokens are kept: that is the context", file=sys.stderr)
    return tokens or [tokenizer.start_token]


def main() -> None:
    config = parse_flags(SampleConfig, __doc__, sys.argv[1:])

    from gpt_arc.chat.format import load_chat
    from gpt_arc.decoding.beam import beam_search
    from gpt_arc.decoding.dialogue import Dialogue
    from gpt_arc.decoding.generate import Step, generate
    from gpt_arc.decoding.load import load_decoder
    from gpt_arc.decoding.probabilities import row_generators
    from gpt_arc.decoding.speculative import Acceptance, speculative
    from gpt_arc.training import runs  # these import torch: not before the settings are known to be right
    from gpt_arc.weights.directory import model_directory

    asked = asked_prompts(config)
    # how many continuations are made together: by beam search those of a prompt, with a draft one
    together = config.num_samples if config.num_beams else 1 if config.draft else config.batch_size
    count = config.num_samples * (1 if config.typed else len(asked[0]))
    rows = config.num_beams or min(together, count)
    steps = config.max_new_tokens * math.ceil(count / together)

    directory = model_directory(config.names[0] if config.names else runs.newest_run())
    decoder, tokenizer = load_decoder(directory, config, rows, steps)
    context, dialogue = decoder.model.config.block_size, None
    if config.chat:
        chat = load_chat(directory, tokenizer)
        if chat is None:
            raise UserError(f"{directory} has no chat.json: it must learn conversations first, by stages/sft.py")
        dialogue = Dialogue(chat, context, config.max_new_tokens, config.system)
    if config.draft:
        drafter, same = load_decoder(model_directory(config.draft), config, rows, steps)
        if same != tokenizer:
            raise UserError(f"the draft {config.draft} has another tokenizer than the model: its tokens mean others")
    acceptance = Acceptance()

    def unanswered(prompts: list[str]) -> list[Continuation]:
        return [
            Continuation(prompt, tokens, tokenizer, config.stop)
            for prompt in prompts
            for tokens in [encoded(prompt, tokenizer, context)] * config.num_samples
        ]

    def steps_of(batch: list[Continuation], first: int) -> Iterator[Step]:
        """What continues a batch, whose first row has the number `first` of all."""
        prompts, length = [row.prompt_tokens for row in batch], config.max_new_tokens
        generators = row_generators(config.seed, range(first, first + len(batch)))
        how = {"sampling": config.sampling, "stopped": lambda row, token: batch[row].ended}
        if config.num_beams:
            ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
            found = beam_search(decoder, prompts[0], length, config.num_beams, config.length_penalty, ends)
            for i, beam in enumerate(found[: len(batch)]):
                yield from (Step([i], [token], [log]) for token, log in zip(beam.tokens, beam.log_probabilities))
        elif config.draft:
            how |= {"draft_tokens": config.draft_tokens, "generator": generators[0], "acceptance": acceptance}
            yield from speculative(decoder, drafter, prompts[0], length, **how)
        else:
            yield from generate(decoder, prompts, length, generators=generators, **how)

    made = 0
    sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows a question mark
    for prompts in asked:
        try:
            todo = [dialogue.ask(prompts[0], config.stop)] if dialogue else unanswered(prompts)
            if not made:
                print(f"sampling from {directory}", file=sys.stderr)
            screen = Screen(todo, config.json, with_prompts=dialogue is None)
            for start in range(0, len(todo), together):
                batch = todo[start : start + together]
                made += len(batch)
                screen.follow(batch, steps_of(batch, made - len(batch)))
        except UserError as error:
            if not config.typed:
                raise
            if config.json:  # a line out for every line in
                print(json.dumps({"prompt": prompts[0], "error": str(error)}), flush=True)
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            if not config.typed:
                raise
            print(file=sys.stderr)
    if config.draft:
        print(f"{acceptance.accepted} of {acceptance.proposed} proposed tokens were accepted", file=sys.stderr)


if __name__ == "__main__":
    entry_point(main)()
