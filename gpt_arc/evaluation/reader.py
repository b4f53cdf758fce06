"""A model as an evaluation uses it: it scores pairs of texts and answers prompts.

reader = Reader(model.eval(), tokenizer, batch_tokens=8192)
scores = reader.score([("The cat", " sat"), ...], "my task")
texts = reader.answers(["Q: What is 1 plus 1?\\nA:", ...], task, seed=0)
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from gpt_arc.chat.format import IMAGE, ChatFormat, Turn
from gpt_arc.data.batches import pad_rows
from gpt_arc.data.text_stream import TextStream
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.beam import beam_search
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.probabilities import row_generators
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import UserError
from gpt_arc.evaluation.score import Encoded, Request, Score, encode_pairs, score_continuations
from gpt_arc.evaluation.tasks import Task
from gpt_arc.evaluation.word_search import length_batches
from gpt_arc.tables import counted
from gpt_arc.vision.data import load_pixels
from gpt_arc.vision.model import VisionGPT
from model import GPT


class Reader(NamedTuple):
    """A model with its tokenizer, which scores texts and answers prompts.

    With `chat`, each prompt is a user's turn, and what follows it is the response. `vision` is the model with its image
    encoder, for questions about images.
    """

    model: GPT
    tokenizer: Tokenizer
    batch_tokens: int
    chat: ChatFormat | None = None
    vision: VisionGPT | None = None

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the tokens that the model reads before it answers."""
        return self.tokenizer.encode_prompt(text) if self.chat is None else self.chat.prompt([Turn("user", text)])

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], places: Sequence[str] | None = None) -> Encoded:
        """Encodes contexts and continuations as `score.encode_pairs` does, or as users' turns and responses to them."""
        if self.chat is None:
            return encode_pairs(self.tokenizer, pairs, self.model.config.block_size, places)
        places = places or [f"text {number} of {len(pairs)}" for number in range(1, len(pairs) + 1)]
        requests = []
        for place, (context, continuation) in zip(places, pairs):
            try:
                request = Request(self.encode_prompt(context), self.chat.response(continuation.lstrip())[:-1])
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
            size, most = len(request.continuation), self.model.config.block_size
            if not 0 < size <= most:
                raise UserError(f"{place}: the answer or option has {size} tokens, and 1 to {most} can be scored")
            requests.append(request)
        return Encoded(requests, 0)

    def score(self, pairs: Sequence[tuple[str, str]], label: str, places: Sequence[str] | None = None) -> list[Score]:
        """Scores the second text of each pair after the first, as `encode_pairs` splits them. Raises UserError.

        `label` names the texts in the progress bar, and with `places`, one for each pair, in messages.
        """
        try:
            requests, merged = self.encode_pairs(pairs, places)
        except UserError as error:
            raise UserError(f"{label}, {error}") from None
        if merged:
            print(
                f"{label}: in {merged:,} of {counted(len(requests), 'text')} a token spans the end of the context; "
                "their scores begin with that token",
                file=sys.stderr,
            )
        scores = score_continuations(self.model, requests, self.batch_tokens, progress=label)
        room = self.model.config.block_size + 1
        cut = sum(len(request.context) + len(request.continuation) > room for request in requests)
        if cut:
            print(
                f"{label}: cut {cut:,} of {counted(len(requests), 'text')} at the start to fit the context",
                file=sys.stderr,
            )
        return scores

    def encode_image_prompt(self, text: str, room: int) -> list[int]:
        """Returns the tokens of a question about an image, placeholders from -1 on for its embeddings.

        Raises UserError if they are more than `room` or the model reads text alone.
        """
        if self.vision is None or self.chat is None:
            raise UserError("questions about images are for a chat model trained on them: name one and add --chat=True")
        ids = range(-1, -1 - self.vision.embeddings_per_image, -1)
        tokens = self.chat.prompt([Turn("user", IMAGE + text, images=(ids,))])
        if len(tokens) > room:
            raise UserError(f"a question about an image takes {len(tokens)} tokens, and the context leaves {room}")
        return tokens

    @torch.inference_mode()
    def score_about_images(
        self, pairs: Sequence[tuple[str, str]], images: Sequence[Path | None], label: str, places: Sequence[str]
    ) -> list[Score]:
        """Scores responses to questions, the pairs, about `images`. Raises UserError.

        `label` names the pairs in the progress bar and, with `places`, in messages.
        """
        requests = []
        for place, (question, response) in zip(places, pairs):
            try:
                tokens = self.chat.response(response.lstrip())[:-1] if self.chat else []
                prompt = self.encode_image_prompt(question, self.model.config.block_size + 1 - max(len(tokens), 1))
                if not tokens:
                    raise UserError("the option is empty")
            except UserError as error:
                raise UserError(f"{label}, {place}: {error}") from None
            requests.append(Request(prompt, tokens))
        scores: dict[int, Score] = {}
        lengths = [len(request.context) + len(request.continuation) for request in requests]
        bar = tqdm(total=len(pairs), desc=label, unit="option", leave=False, disable=None)
        for batch in length_batches(lengths, self.batch_tokens):
            embeddings, prompts = self._show([requests[i].context for i in batch], [images[i] for i in batch])
            inputs = pad_rows([*prompt, *requests[i].continuation[:-1]] for prompt, i in zip(prompts, batch))
            states = self.model.hidden(inputs.to(embeddings.device), images=embeddings)
            for row, i in enumerate(batch):
                first, tokens = len(requests[i].context) - 1, torch.tensor(requests[i].continuation)
                logs = self.model.logits(states[row, first : first + len(tokens)]).float().log_softmax(-1).cpu()
                likelihood = logs.gather(1, tokens[:, None]).sum().item()
                scores[i] = Score(likelihood, bool((logs.argmax(-1) == tokens).all()), len(tokens))
            bar.update(len(batch))
        bar.close()
        return [scores[i] for i in range(len(pairs))]

    def answers(
        self, prompts: Sequence[str], task: Task, seed: int, images: Sequence[Path | None] | None = None
    ) -> list[str]:
        """Returns the model's continuation of each prompt, up to one of the task's stop texts.

        A sampled answer depends only on the seed and on its prompt's index. A prompt that is too long is cut at the
        start, so that the answer fits into the context. `images` has the image of each prompt.
        """
        room = max(self.model.config.block_size - task.max_new_tokens, 1)
        if images is None:
            tokens = [self.encode_prompt(prompt)[-room:] for prompt in prompts]
        else:
            tokens = [self.encode_image_prompt(prompt, room) for prompt in prompts]
        streams = [self._stream(prompt) for prompt in tokens]
        bar = tqdm(total=len(prompts), desc=task.name, unit="answer", leave=False, disable=None)
        if task.num_beams > 1:
            ends = self._stop_tokens(task)
            for prompt, stream in zip(tokens, streams):
                best = beam_search(self.model, prompt, task.max_new_tokens, task.num_beams, task.length_penalty, ends)[
                    0
                ]
                for token in best.tokens:
                    stream.push(token)
                bar.update()
        else:
            lengths = [len(prompt) + task.max_new_tokens for prompt in tokens]
            for batch in length_batches(lengths, self.batch_tokens):
                decoder, rows = Decoder(self.model), [tokens[i] for i in batch]
                if images is not None:
                    decoder.images, rows = self._show(rows, [images[i] for i in batch])
                self._generate(decoder, rows, [streams[i] for i in batch], task, row_generators(seed, batch))
                bar.update(len(batch))
        bar.close()
        for stream in streams:
            stream.end()
        stop = "|".join(map(re.escape, task.stop))
        return [re.split(stop, stream.text)[0] if stop else stream.text for stream in streams]

    def _stream(self, prompt: list[int]) -> TextStream:
        if self.chat is None:
            return TextStream(self.tokenizer, prompt)
        return TextStream(self.tokenizer, end=self.chat.end)  # a response is decoded without its prompt

    @torch.inference_mode()
    def _show(
        self, prompts: Sequence[Sequence[int]], images: Sequence[Path | None]
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Returns the embeddings (N, C) of the image of each prompt, and the prompts with placeholders for them."""
        assert self.vision is not None  # `encode_image_prompt` saw to it
        vision, weight = self.vision, self.vision.encoder.patches.weight
        pixels = load_pixels([path for path in images if path], vision.preprocessing, vision.image_size)
        embeddings = vision.embed_images(pixels.to(weight)).flatten(0, 1)
        firsts = range(0, len(prompts) * vision.embeddings_per_image, vision.embeddings_per_image)
        return embeddings, [[t - first if t < 0 else t for t in prompt] for first, prompt in zip(firsts, prompts)]

    def _generate(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        streams: list[TextStream],
        task: Task,
        generators: list[torch.Generator],
    ) -> None:
        """Pushes the tokens that follow each prompt into its stream."""
        sampling = Sampling(temperature=0) if task.top_k == 1 else Sampling(top_k=task.top_k)

        def stopped(row: int, token: int) -> bool:
            streams[row].push(token)
            return streams[row].ended or any(stop in streams[row].text for stop in task.stop)

        for _ in generate(decoder, prompts, task.max_new_tokens, sampling, generators=generators, stopped=stopped):
            pass

    def _stop_tokens(self, task: Task) -> list[int]:
        """Returns the tokens that end a beam: those that end a text, and every token that contains a stop text."""
        pieces = ((token, self.tokenizer.decode([token])) for token in range(self.tokenizer.vocab_size))
        tokens = [token for token, piece in pieces if any(stop in piece for stop in task.stop)]
        return [*tokens, *(self.chat or self.tokenizer).ends]
