"""Text from tokens that come one at a time."""

import json
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from gpt_arc.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what bytes decode to that are no character, or not one yet
CONTEXT = 8  # tokens


class TextStream:
    """The text of a continuation as it grows, of which no part of a character or of the stop text counts as certain.

    A continuation ends at the token between documents, at the token `end` or where the text `stop` begins; none of
    them belongs to its text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: str | None = None, end: int | None = None
    ):
        self.tokenizer, self.stop = tokenizer, stop
        self._ends = {tokenizer.end_of_text, end}
        self.text = ""
        self.ended = False  # by a token or the stop text
        self.complete = False  # ended, or because there are no more tokens
        self._held = 0  # characters of `text` that may turn out to be the beginning of the stop text
        # Tokens are decoded after the last few before them: some tokenizers drop the space before a text's first word.
        self._before = self._last([token for token in prompt[-2 * CONTEXT :] if token != tokenizer.end_of_text])
        self._tokens: list[int] = []  # those after them, which end within a character
        self._taken = 0  # characters of these that are in `text`

    @property
    def certain(self) -> str:
        """The text that no further token changes."""
        return self.text[: len(self.text) - self._held]

    def push(self, token: int) -> None:
        """Append a token, unless the continuation is complete; sets `ended` if it ends with it."""
        if self.complete:
            return
        if token in self._ends:
            self.end()
            self.ended = True
            return
        self._tokens.append(token)
        decoded = self._decode()
        whole = decoded.rstrip(UNFINISHED)
        self._add(whole[self._taken :])
        self._taken = len(whole)
        if whole == decoded:
            self._before, self._tokens, self._taken = self._last(self._before + self._tokens), [], 0

    def end(self) -> None:
        """There are no more tokens: the rest of the text is what it is."""
        if not self.complete:
            self._add(self._decode()[self._taken :])
        self.complete, self._held = True, 0

    def _last(self, tokens: list[int]) -> list[int]:
        """The last few tokens, a few more where they would begin within a character."""
        start = max(len(tokens) - CONTEXT, 0)
        least = max(start - CONTEXT, 0)
        while start > least and self.tokenizer.decode(tokens[start:]).startswith(UNFINISHED):
            start -= 1
        return tokens[start:]

    def _decode(self) -> str:
        return self.tokenizer.decode(self._before + self._tokens)[len(self.tokenizer.decode(self._before)) :]

    def _add(self, piece: str) -> None:
        self.text += piece
        if self.stop is None:
            return
        place = self.text.find(self.stop, max(len(self.text) - len(piece) - len(self.stop) + 1, 0))
        if place >= 0:
            self.text, self.ended, self.complete, self._held = self.text[:place], True, True, 0
        else:
            beginnings = range(min(len(self.stop) - 1, len(self.text)), 0, -1)
            self._held = next((n for n in beginnings if self.stop.startswith(self.text[-n:])), 0)


class Continuation(TextStream):
    """A continuation and how it came about; with a token that ends it, an answer, whose text stands by itself."""

    def __init__(
        self, prompt: str, prompt_tokens: Sequence[int], tokenizer: Tokenizer, stop: str | None, end: int | None = None
    ):
        super().__init__(tokenizer, prompt_tokens if end is None else (), stop, end)
        self.prompt, self.prompt_tokens = prompt, list(prompt_tokens)
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.times: list[float] = []  # of each token, in seconds since the beginning

    def add(self, token: int, log_probability: float, seconds: float) -> None:
        """`push`, and keep what is told of the token; nothing, once it is complete."""
        if self.complete:
            return
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        self.times.append(seconds)
        self.push(token)

    def report(self) -> dict[str, Any]:
        """What there is to say about the continuation, for JSON."""
        first, last = (self.times[0], self.times[-1]) if self.times else (None, None)
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.tokens,
            "log_probabilities": self.log_probabilities,
            "ended": self.ended,
            "first_token_seconds": first,
            "seconds": last,
            "tokens_per_second": len(self.times) / last if last else None,
        }


class Screen:
    """Shows continuations in their order: the first that isn't complete as it grows, or as JSON, a line for each."""

    def __init__(self, continuations: Sequence[Continuation], as_json: bool, with_prompts: bool = True):
        self.as_json, self.with_prompts = as_json, with_prompts
        self._left = deque(continuations)
        self._shown: int | None = None  # characters of the first one left, None before its prompt

    def follow(self, batch: Sequence[Continuation], steps: Iterable[tuple[list[int], list[int], list[float]]]) -> None:
        """Show what is made of a batch, each step being numbers in the batch, their tokens and log-probabilities."""
        start = time.perf_counter()
        self._show()
        for step in steps:
            seconds = time.perf_counter() - start
            for row, token, log_probability in zip(*step):
                batch[row].add(token, log_probability, seconds)
            self._show()
        for continuation in batch:
            continuation.end()
        self._show()

    def _show(self) -> None:
        while self._left:
            current = self._left[0]
            if not self.as_json:
                if self._shown is None:
                    print(current.prompt if self.with_prompts else "", end="")
                    self._shown = 0
                print(current.certain[self._shown :], end="", flush=True)
                self._shown = len(current.certain)
            if not current.complete:
                return
            self._left.popleft()
            self._shown = None
            if self.as_json:
                print(json.dumps(current.report()), flush=True)
            else:
                print("\n" + "-" * 15 if self._left else "", flush=True)
