"""Decoding of tokens that arrive one at a time."""

from collections.abc import Sequence

from gpt_arc.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what incomplete or invalid bytes decode to
CONTEXT = 8  # tokens


class TextStream:
    """The text of a continuation as it grows. Incomplete characters and beginnings of the stop text are held back.

    A continuation ends at one of the tokenizer's `ends`, at the token `end` or where the text `stop` begins, or one of
    several. The text excludes all three.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        stop: str | Sequence[str] | None = None,
        end: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.stops = [stop] if isinstance(stop, str) else list(stop or ())
        self._ends = {*tokenizer.ends, end}
        self.text = ""
        self.ended = False  # by a token or the stop text
        self.complete = False  # ended, or because there are no more tokens
        self._held = 0  # characters of `text` that may be the beginning of the stop text
        # Tokens are decoded with a few before them, because some tokenizers drop the space before a text's first word.
        self._before = self._last([token for token in prompt[-2 * CONTEXT :] if token not in self._ends])
        self._tokens: list[int] = []  # tokens after those, ending within a character
        self._decoded = 0  # their characters that are already in `text`

    @property
    def certain(self) -> str:
        """The text that no further token can change."""
        return self.text[: len(self.text) - self._held]

    def push(self, token: int) -> None:
        """Append a token, unless the continuation is complete. Sets `ended` if the token ends it."""
        if self.complete:
            return
        if token in self._ends:
            self.end()
            self.ended = True
            return
        self._tokens.append(token)
        decoded = self._decode()
        whole = decoded.rstrip(UNFINISHED)
        self._add(whole[self._decoded :])
        self._decoded = len(whole)
        if whole == decoded:
            self._before, self._tokens, self._decoded = self._last(self._before + self._tokens), [], 0

    def end(self) -> None:
        """Finish the text: there are no more tokens."""
        if not self.complete:
            self._add(self._decode()[self._decoded :])
        self.complete, self._held = True, 0

    def _last(self, tokens: list[int]) -> list[int]:
        """The last CONTEXT tokens, or a few more if those would begin within a character."""
        start = max(len(tokens) - CONTEXT, 0)
        least = max(start - CONTEXT, 0)
        while start > least and self.tokenizer.decode(tokens[start:]).startswith(UNFINISHED):
            start -= 1
        return tokens[start:]

    def _decode(self) -> str:
        return self.tokenizer.decode(self._before + self._tokens)[len(self.tokenizer.decode(self._before)) :]

    def _add(self, piece: str) -> None:
        self.text += piece
        old = len(self.text) - len(piece)
        places = [self.text.find(stop, max(old - len(stop) + 1, 0)) for stop in self.stops]
        first = min((place for place in places if place >= 0), default=None)
        if first is not None:
            self.text, self.ended, self.complete, self._held = self.text[:first], True, True, 0
        else:
            self._held = max((self._beginning(stop) for stop in self.stops), default=0)

    def _beginning(self, stop: str) -> int:
        """Returns how many characters at the end of the text may be the beginning of `stop`."""
        sizes = range(min(len(stop) - 1, len(self.text)), 0, -1)
        return next((size for size in sizes if stop.startswith(self.text[-size:])), 0)
