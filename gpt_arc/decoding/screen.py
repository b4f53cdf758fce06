"""Shows continuations while they are generated, on a screen or as JSON lines."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from gpt_arc.data.text_stream import TextStream
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.tables import to_json


class Continuation(TextStream):
    """A continuation with its tokens and times; with an `end` token, an answer decoded without its prompt."""

    def __init__(
        self, prompt: str, prompt_tokens: Sequence[int], tokenizer: Tokenizer, stop: str | None, end: int | None = None
    ):
        super().__init__(tokenizer, prompt_tokens if end is None else (), stop, end)
        self.prompt, self.prompt_tokens = prompt, list(prompt_tokens)
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.times: list[float] = []  # of each token, in seconds since decoding began

    def add(self, token: int, log_probability: float, seconds: float) -> None:
        """Adds a token, unless the continuation is complete."""
        if self.complete:
            return
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        self.times.append(seconds)
        self.push(token)

    def report(self) -> dict[str, Any]:
        """Returns the continuation for JSON."""
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
    """Shows continuations in order: the first incomplete one as it grows, or each complete one as a line of JSON."""

    def __init__(self, continuations: Sequence[Continuation], as_json: bool, with_prompts: bool = True):
        self.as_json, self.with_prompts = as_json, with_prompts
        self._waiting = deque(continuations)
        self._shown: int | None = None  # characters of the first waiting one; None before its prompt

    def follow(self, batch: Sequence[Continuation], steps: Iterable[tuple[list[int], list[int], list[float]]]) -> None:
        """Shows a batch as it is decoded. A step holds row numbers in the batch, their tokens and log-probabilities."""
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
        while self._waiting:
            current = self._waiting[0]
            if not self.as_json:
                if self._shown is None:
                    print(current.prompt if self.with_prompts else "", end="")
                    self._shown = 0
                print(current.certain[self._shown :], end="", flush=True)
                self._shown = len(current.certain)
            if not current.complete:
                return
            self._waiting.popleft()
            self._shown = None
            if self.as_json:
                print(to_json(current.report()), flush=True)
            else:
                print("\n" + "-" * 15 if self._waiting else "", flush=True)
