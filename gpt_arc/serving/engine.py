"""Continuous batching for an asyncio server: clients' continuations join a running batch as they come.

Steps run in one thread; everything else happens in the event loop, between two steps, so no locks are needed. A
continuation whose reader has gone leaves before the next step.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeVar

from gpt_arc.data.text_stream import TextStream
from gpt_arc.decoding.batch import LiveBatch, LiveRequest, Token
from gpt_arc.decoding.decoder import Decoder

T = TypeVar("T")
MOST_WAITING = 512  # continuations


class Piece(NamedTuple):
    """What one token adds to a continuation."""

    index: int
    text: str  # may be empty: incomplete characters and beginnings of a stop text are held back
    offset: int  # of the token in the continuation's text
    token: Token
    finish: Literal["stop", "length"] | None  # why the continuation ends, in its last piece


class Choice:
    """A continuation that a client wants: its request, and its text so far."""

    def __init__(self, index: int, request: LiveRequest, stream: TextStream, max_new_tokens: int):
        self.index, self.request, self.stream, self.room = index, request, stream, max_new_tokens
        self.sent = 0  # characters
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def push(self, token: Token) -> bool:
        """Adds a token. Returns whether the continuation is complete."""
        stream, offset = self.stream, len(self.stream.text)
        self.room -= 1
        stream.push(token.id)
        if not self.room:
            stream.end()
        text, self.sent = stream.certain[self.sent :], len(stream.certain)
        finish = None if not stream.complete else "stop" if stream.ended else "length"
        self.pieces.put_nowait(Piece(self.index, text, offset, token, finish))
        return stream.complete


class Engine:
    """Computes choices in batches of at most `rows`. `serve` does the work, as a task of the server."""

    def __init__(self, decoder: Decoder, rows: int):
        self.decoder, self.rows = decoder, rows
        self._waiting: deque[Choice] = deque()
        self._running: dict[LiveRequest, Choice] = {}
        self._leaving: list[LiveRequest] = []
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running or self._leaving)

    def is_full(self, choices: int) -> bool:
        """Whether there is no room for this many more choices."""
        return len(self._waiting) + choices > MOST_WAITING

    async def serve(self) -> None:
        """Steps for as long as there is a choice, until it is cancelled."""
        batch = None
        with self._thread:
            while True:
                if self.idle:
                    self._work.clear()
                    await self._work.wait()
                leaving, self._leaving = self._leaving, []
                joining = []
                while self._waiting and len(self._running) < self.rows:
                    choice = self._waiting.popleft()
                    self._running[choice.request] = choice
                    joining.append(choice.request)
                try:
                    batch = batch or await self.call(LiveBatch, self.decoder, self.rows)
                    for request, token in await self.call(batch.step, joining, leaving):
                        if request in self._running and self._running[request].push(token):
                            self._leave(request)
                except Exception as error:  # whatever it is, it ends these answers and not the server
                    for choice in self._running.values():
                        choice.pieces.put_nowait(error)
                    batch, self._running, self._leaving = None, {}, []

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Returns what a function returns, run in the model's thread, between two steps."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def run(self, choices: Sequence[Choice]) -> AsyncIterator[list[Piece]]:
        """Yields the choices' pieces as they come. Raises what failed in their batch.

        Closing the iterator ends the choices.
        """
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        for choice in choices:
            choice.pieces = pieces
        self._waiting.extend(choices)
        self._work.set()
        unfinished = len(choices)
        try:
            while unfinished:
                arrived, ready = [await pieces.get()], []
                while not pieces.empty():
                    arrived.append(pieces.get_nowait())
                for piece in arrived:
                    if isinstance(piece, Exception):
                        raise piece
                    ready.append(piece)
                unfinished -= sum(piece.finish is not None for piece in ready)
                yield ready
        finally:
            for choice in choices:
                if choice in self._waiting:
                    self._waiting.remove(choice)
                elif choice.request in self._running:
                    self._leave(choice.request)

    def _leave(self, request: LiveRequest) -> None:
        del self._running[request]
        self._leaving.append(request)
        self._work.set()
