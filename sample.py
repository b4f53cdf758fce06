"""Continues a prompt with a trained model and prints the text as it is generated.

    python sample.py                                   the newest run under out/
    python sample.py out/quickstart --start="The "     a run folder, or any model directory
    python sample.py gpt2-xl --start="The "            published weights from the Hugging Face hub
    python sample.py --start=FILE:prompt.txt --num_samples=3 --temperature=0.8 --top_k=200 --top_p=0.95
    python sample.py --temperature=0                   greedy: always the most likely token
    python sample.py --num_beams=4                     the likeliest text that beam search finds
    python sample.py gpt2-xl --draft=gpt2              speculative decoding: a small model proposes tokens
    python sample.py --interactive=True                prompts from the keyboard, one after the other
    python sample.py --chat out/sft                    a conversation; --system="Be brief." sets its tone
    python sample.py out/sft --image=cat.png --start="What is this?"    a model trained on images; /image FILE in a chat
    python sample.py out/bert_mini --start="The [MASK] statement"    a bidirectional model fills gaps
    python sample.py out/translate --start="a source"  the target that a model of stages/translate.py makes of it
    python sample.py --prompts=FILE --json=True        one prompt per line in, one JSON object per line out

A model is a run folder, a model directory, or the name of published weights.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


# Modules that need torch are imported in functions, so that wrong settings are refused at once.

import io
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt_arc.decoding.prompts import encode_prompt, naming_prompt, prompt_batches
from gpt_arc.decoding.screen import Continuation, Screen
from gpt_arc.decoding.settings import SampleConfig
from gpt_arc.errors import UserError, entry_point, naming
from gpt_arc.flags import parse_flags
from gpt_arc.next_steps import reads_text_alone
from gpt_arc.tables import to_json

if TYPE_CHECKING:
    from gpt_arc.decoding.generate import Step

SHOW = "/image "  # in a chat, before the file of an image for the next question


class Sampler:
    """A model that continues prompts as the settings say."""

    def __init__(self, config: SampleConfig, first_prompts: int):
        """`first_prompts`: how many prompts are continued together. Raises UserError for a model that doesn't fit."""
        from gpt_arc.chat.format import load_chat, require_chat
        from gpt_arc.data.pairs import boundary_token
        from gpt_arc.decoding.dialogue import Dialogue
        from gpt_arc.decoding.images import load_images
        from gpt_arc.decoding.load import load_decoder, set_decoding_threads
        from gpt_arc.decoding.speculative import Acceptance, check_draft
        from gpt_arc.training import runs
        from gpt_arc.weights.directory import of_one_checkpoint, reads_images

        self.config, self.acceptance = config, Acceptance()
        # beam search decodes one prompt at a time, speculation one continuation
        self.batch_size = config.num_samples if config.num_beams else 1 if config.draft else config.batch_size
        count = config.num_samples * first_prompts
        rows = config.num_beams or min(self.batch_size, count)
        steps = config.max_new_tokens * math.ceil(count / self.batch_size)

        @of_one_checkpoint
        def load(directory: Path) -> tuple:
            decoder, tokenizer = load_decoder(directory, config, rows, steps)
            chat = None
            if config.chat or config.image:
                chat = load_chat(directory, tokenizer, decoder.model.config.vocab_size)
                chat = require_chat(directory, chat)
            images = load_images(directory, decoder) if config.image or chat and reads_images(directory) else None
            return directory, decoder, tokenizer, chat, images

        name = config.names[0] if config.names else runs.newest_run()
        self.directory, self.decoder, self.tokenizer, chat, self.images = load(name)
        self.translates = self.decoder.model.config.encoder_layers > 0
        self.boundary = boundary_token(self.tokenizer)
        if self.translates:
            if config.draft:
                raise UserError(f"{self.directory} turns sources into targets, which draft isn't for: leave it out")
            self.batch_size = config.num_samples  # of one source
            self.decoder.read_source([self.boundary])
        set_decoding_threads(self.decoder, config.threads, rows)
        self.context, self.dialogue = self.decoder.model.config.block_size, None
        for path in config.image:
            self.images.show(path)
        if chat:
            self.dialogue = Dialogue(chat, self.context, config.max_new_tokens, config.system)
        if config.draft:
            self.draft, draft_tokenizer = of_one_checkpoint(load_decoder)(config.draft, config, rows, steps)
            if draft_tokenizer != self.tokenizer:
                raise UserError(f"the draft {config.draft} has another tokenizer than the model: name another")
            check_draft(self.decoder, self.draft)

    def continuations(self, prompts: Sequence[str]) -> list[Continuation]:
        """Returns the empty continuations of prompts, or the empty answer of a chat; none where an image is shown."""
        config = self.config
        if self.dialogue:
            if config.typed and prompts[0].startswith(SHOW):
                if self.images is None:
                    raise reads_text_alone(self.directory)
                self.images.show(Path(prompts[0].removeprefix(SHOW).strip()))
                return []
            return [self.dialogue.ask(prompts[0], config.stop, self.images.take() if self.images else ())]
        from gpt_arc.data.pairs import encode_source

        encode, tokens = (encode_source if self.translates else encode_prompt), {}
        for number, prompt in enumerate(prompts):
            with naming_prompt(config, number):
                tokens[prompt] = encode(prompt, self.tokenizer, self.context)
        each = [prompt for prompt in prompts for _ in range(config.num_samples)]
        if self.translates:
            self.sources = tokens
            start = [self.boundary], self.tokenizer, config.stop, self.boundary
            return [Continuation(prompt, *start) for prompt in each]
        return [Continuation(prompt, tokens[prompt], self.tokenizer, config.stop) for prompt in each]

    def steps(self, batch: Sequence[Continuation], first: int) -> Iterator["Step"]:
        """Decodes a batch whose first row is number `first` of all, which seeds its generator.

        Beam search gives its best continuations one after the other.
        """
        from gpt_arc.decoding.beam import beam_search
        from gpt_arc.decoding.generate import Step, generate
        from gpt_arc.decoding.probabilities import row_generators
        from gpt_arc.decoding.speculative import speculative

        config, prompts = self.config, [row.prompt_tokens for row in batch]
        generators = row_generators(config.seed, range(first, first + len(batch)))
        settings = {"sampling": config.sampling, "stopped": lambda row, token: batch[row].ended}
        if self.translates:
            self.decoder.read_source(self.sources[batch[0].prompt])
        if config.num_beams:
            ends = [self.boundary] if self.translates else sorted(self.tokenizer.ends)
            width, penalty = config.num_beams, config.length_penalty
            beams = beam_search(self.decoder, prompts[0], config.max_new_tokens, width, penalty, ends)
            for row, beam in enumerate(beams[: len(batch)]):
                for token, log_probability in zip(beam.tokens, beam.log_probabilities):
                    yield Step([row], [token], [log_probability])
        elif config.draft:
            settings |= {"draft_tokens": config.draft_tokens, "generator": generators[0], "acceptance": self.acceptance}
            yield from speculative(self.decoder, self.draft, prompts[0], config.max_new_tokens, **settings)
        else:
            yield from generate(self.decoder, prompts, config.max_new_tokens, generators=generators, **settings)


def show_all(sampler: Sampler, batches: Iterable[list[str]]) -> None:
    """Prints the continuations of all prompts. An error or Ctrl-C ends a typed prompt's answer, not the program."""
    config, started = sampler.config, 0
    for prompts in batches:
        try:
            continuations = sampler.continuations(prompts)
            if not started:
                print(f"sampling from {sampler.directory}", file=sys.stderr)
            screen = Screen(continuations, config.json, with_prompts=not (sampler.dialogue or sampler.translates))
            for start in range(0, len(continuations), sampler.batch_size):
                batch = continuations[start : start + sampler.batch_size]
                started += len(batch)
                with naming(sampler.directory):
                    screen.follow(batch, sampler.steps(batch, started - len(batch)))
        except UserError as error:
            if not config.typed:
                raise
            if config.json:  # every input line gets an output line
                print(to_json({"prompt": prompts[0], "error": str(error)}), flush=True)
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            if not config.typed:
                raise
            print(file=sys.stderr)


def main() -> None:
    config = parse_flags(SampleConfig, __doc__, sys.argv[1:])
    batches = prompt_batches(config)

    from gpt_arc.decoding.gaps import load_filler, show_filled

    if filler := load_filler(config):
        show_filled(filler, batches, config)
        return
    sampler = Sampler(config, first_prompts=len(batches[0]) if isinstance(batches, list) else 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows a question mark
    show_all(sampler, batches)
    if config.draft:
        acceptance = sampler.acceptance
        print(f"{acceptance.accepted} of {acceptance.proposed} proposed tokens were accepted", file=sys.stderr)


if __name__ == "__main__":
    entry_point(main)()
