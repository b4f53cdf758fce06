"""The playground's server: its page, and OpenAI's API for completions of one or several models."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Sent
from torch import Tensor

from gpt_arc.attention_view import MOST_TOKENS, view_data, with_view
from gpt_arc.chat.format import ChatFormat, Turn
from gpt_arc.data.text_stream import TextStream
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding import batch
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.probabilities import row_generators
from gpt_arc.decoding.prompts import prompt_tokens
from gpt_arc.errors import NotFinite, UserError
from gpt_arc.nn.attention_maps import attention_maps
from gpt_arc.serving.engine import Choice, Engine, Piece
from gpt_arc.serving.protocol import (
    MOST_CHOICES,
    MOST_IMAGES,
    ApiError,
    AttentionRequest,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    Message,
    Writer,
    parse,
)
from gpt_arc.tables import to_json
from gpt_arc.vision.images import decode_image
from gpt_arc.vision.model import VisionGPT

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("playground.html")
LARGEST_BODY = 32 << 20  # bytes


@dataclass
class Model:
    """A model that is served."""

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    chat: ChatFormat | None
    rows: int  # continuations at a time
    max_new_tokens: int  # most that a client may ask for
    vision: VisionGPT | None = None  # around the decoder's model, if it reads images

    def __post_init__(self):
        self.context = self.decoder.model.config.block_size
        self.created = int(time.time())

    def describe(self) -> dict[str, Any]:
        about = {"context": self.context, "chat": self.chat is not None, "images": self.vision is not None}
        about["max_tokens"] = self.max_new_tokens
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "gpt-arc", **about}

    def see(self, images: Sequence[ImagePart]) -> Tensor | None:
        """Returns the embeddings (N, C) of all images; None if there are none. Raises ApiError."""
        if not images:
            return None
        if self.vision is None:
            raise ApiError(400, f"{self.name} reads text alone: leave the images out", "messages")
        if len(images) > MOST_IMAGES:
            raise ApiError(400, f"the messages have {len(images)} images, and {MOST_IMAGES} are the most", "messages")
        try:
            pictures = [decode_image(image.content, Path(f"image {i}")) for i, image in enumerate(images, 1)]
        except UserError as error:
            raise ApiError(400, str(error), "messages") from None
        return torch.cat([self.vision.see(picture) for picture in pictures])

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """Returns messages as turns, with the ids of their images' embeddings. Raises ApiError."""
        if self.chat is None:
            message = f"{self.name} hasn't learned conversations: use /v1/completions, or another model"
            raise ApiError(400, message, "model")
        size = self.vision.embeddings_per_image if self.vision else 0
        turns, first = [], -1
        for message in messages:
            ids = [range(first - i * size, first - (i + 1) * size, -1) for i, _ in enumerate(message.images)]
            first -= len(ids) * size
            role = "system" if message.role == "developer" else message.role
            turns.append(Turn(role, message.text, images=tuple(ids)))
        return turns

    def text_of(self, request: AttentionRequest) -> list[int]:
        """Returns the tokens of a text or conversation. Raises ApiError."""
        if not request.messages:
            return self._prompt(request.prompt)
        return self._latest(self.turns(request.messages), self.context)

    def _latest(self, turns: Sequence[Turn], room: int) -> list[int]:
        """Returns the prompt of the latest turns that fit. Raises ApiError."""
        assert self.chat is not None  # `turns` saw to it
        try:
            return self.chat.prompt(self.chat.latest(turns, room))
        except UserError as error:
            raise ApiError(400, str(error), "messages", "context_length_exceeded") from None

    def prompts(self, request: CompletionRequest | ChatRequest) -> tuple[list[list[int]], int]:
        """Returns the tokens of a request's prompts and the most tokens of a continuation. Raises ApiError."""
        if isinstance(request, ChatRequest):
            return self._conversation(request)
        limit = request.max_tokens
        prompts = [self._prompt(prompt) for prompt in request.prompts]
        return prompts, self._checked(limit, "max_tokens")

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        rows = self.decoder.model.config.vocab_size
        if isinstance(prompt, str):
            try:
                tokens = prompt_tokens(prompt, self.tokenizer)
            except UserError as error:
                raise ApiError(400, str(error), "prompt") from None
        else:
            tokens = prompt
            if not tokens or not all(0 <= token < rows for token in tokens):
                raise ApiError(400, f"the prompt must have tokens, from 0 to {rows - 1}", "prompt")
        if len(tokens) > self.context:
            raise ApiError(
                400, f"the prompt has {len(tokens)} tokens, and the model's context {self.context}", "prompt",
                "context_length_exceeded",
            )  # fmt: skip
        return tokens

    def _conversation(self, request: ChatRequest) -> tuple[list[list[int]], int]:
        """A conversation that is too long for the context loses its oldest turns, as in `sample.py --chat`."""
        turns = self.turns(request.messages)
        limit = self._checked(request.max_completion_tokens or request.max_tokens or self.max_new_tokens, "max_tokens")
        return [self._latest(turns, self.context - min(limit, self.context // 2))], limit

    def _checked(self, limit: int, name: str) -> int:
        if limit > self.max_new_tokens:
            raise ApiError(400, f"{name} = {limit} is more than {self.max_new_tokens}, the most of this server", name)
        return limit

    def choices(
        self, request: CompletionRequest | ChatRequest, images: Tensor | None = None
    ) -> tuple[list[Choice], int]:
        """Returns the choices of a request and the number of its prompts' tokens. Raises ApiError.

        `images`: what `see` returned.
        """
        prompts, limit = self.prompts(request)
        if len(prompts) * request.n > MOST_CHOICES:
            raise ApiError(400, f"{len(prompts)} prompts of n = {request.n} are more than {MOST_CHOICES} choices", "n")
        is_chat = isinstance(request, ChatRequest)
        seed = secrets.randbits(62) if request.seed is None else request.seed
        repeated = [prompt for prompt in prompts for _ in range(request.n)]
        choices = [
            Choice(
                index,
                batch.LiveRequest(prompt, request.sampling, generator, request.alternatives, images),
                TextStream(self.tokenizer, *self._reading(prompt, is_chat, request.stop)),
                limit,
            )
            for index, (prompt, generator) in enumerate(zip(repeated, row_generators(seed, range(len(repeated)))))
        ]
        return choices, sum(map(len, prompts))

    def _reading(self, prompt: list[int], is_chat: bool, stop: str | list[str]) -> tuple:
        """What a `TextStream` needs besides the tokenizer: an answer of a chat is decoded without its prompt."""
        return ((), stop, self.chat.end) if is_chat and self.chat else (prompt, stop)


class Playground:
    """The application for some models. Whoever knows the token may use it."""

    def __init__(self, models: Sequence[Model], token: str, port: int):
        self.models = {model.name: model for model in models}
        self.token, self.port = token, port
        self.engines: dict[str, Engine] = {}
        page = with_view(PAGE.read_text(encoding="utf-8"))
        parts = [re.findall(f"<{name}>(.*?)</{name}>", page, re.DOTALL) for name in ("script", "style")]
        script, style = (" ".join(f"'sha256-{_digest(part)}'" for part in each) for each in parts)
        policy = f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:"
        self.policy, self.page = f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'", page
        self.app = Guard(
            Starlette(
                routes=[
                    Route("/", self.show),
                    Route("/v1/models", self.list_models),
                    Route("/v1/models/{name:path}", self.show_model),
                    Route("/v1/completions", self.complete, methods=["POST"]),
                    Route("/v1/chat/completions", self.complete, methods=["POST"]),
                    Route("/attention", self.attention, methods=["POST"]),
                ],
                exception_handlers={ApiError: _refuse, 404: _not_found, 405: _not_found},
                lifespan=self.lifespan,
            ),
            self,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engines = {name: Engine(model.decoder, model.rows) for name, model in self.models.items()}
        tasks = [asyncio.create_task(engine.serve()) for engine in self.engines.values()]
        yield
        for task in tasks:
            task.cancel()

    async def show(self, request: Request) -> Response:
        return HTMLResponse(self.page)

    async def list_models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [model.describe() for model in self.models.values()]})

    async def show_model(self, request: Request) -> Response:
        return _json(self.model(request.path_params["name"]).describe())

    def model(self, name: str) -> Model:
        """Returns the model of a name. Raises ApiError."""
        if name not in self.models:
            message = f"there is no model {name}; the models are {', '.join(self.models)}"
            raise ApiError(404, message, "model", "model_not_found")
        return self.models[name]

    async def complete(self, request: Request) -> Response:
        """Answers both kinds of requests."""
        kind = ChatRequest if "chat" in request.url.path else CompletionRequest
        parsed = parse(kind, await _body(request))
        model = self.model(parsed.model)
        engine, images = self.engines[model.name], None
        if isinstance(parsed, ChatRequest):
            images = await self.see(model, parsed.messages)
        choices, prompt_size = model.choices(parsed, images)
        writer = Writer(parsed, model.tokenizer, prompt_size)
        if engine.is_full(len(choices)):
            raise ApiError(429, "too many requests wait already: try again later")
        pieces = engine.run(choices)
        if parsed.stream:
            return Stream(_events(writer, pieces), media_type="text/event-stream")
        collected = asyncio.ensure_future(_collect(pieces))
        disconnected = asyncio.ensure_future(_until_disconnected(request))
        await asyncio.wait({collected, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        disconnected.cancel()
        if not collected.done():
            collected.cancel()
            return Response(status_code=499)  # nobody reads it
        try:
            return _json(writer.whole(collected.result()))
        except Exception as error:
            raise _as_api_error(error) from error

    async def see(self, model: Model, messages: Sequence[Message]) -> Tensor | None:
        """`Model.see` of the messages' images."""
        images = [image for message in messages for image in message.images]
        return await self.engines[model.name].call(model.see, images) if images else None

    async def attention(self, request: Request) -> Response:
        """Answers with the attention maps of the latest tokens of a text or conversation, for the page to draw."""
        parsed = parse(AttentionRequest, await _body(request))
        model = self.model(parsed.model)
        images, tokens = await self.see(model, parsed.messages), model.text_of(parsed)
        arguments = model.decoder.model, tokens, images, MOST_TOKENS
        maps = await self.engines[model.name].call(attention_maps, *arguments)
        shown = tokens[-MOST_TOKENS:]
        texts = ["[image]" if token < 0 else model.tokenizer.decode([token]) for token in shown]
        return _json(view_data(maps, texts) | {"earlier": len(tokens) - len(shown)})


class Guard:
    """Refuses what a page from elsewhere could send to a local server, and whoever doesn't know the token.

    A page that has pointed its own domain at this machine is known by the Host, other pages by the Origin.
    """

    def __init__(self, app: ASGIApp, playground: Playground):
        self.app, self.playground = app, playground
        self.hosts = {f"{name}:{playground.port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Sent) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = self.playground.policy
                headers["cache-control"], headers["x-content-type-options"] = "no-store", "nosniff"
                headers["referrer-policy"], headers["cross-origin-resource-policy"] = "no-referrer", "same-origin"
            await send(message)

        error = self.refusal(Headers(scope=scope), scope["path"])
        answer = self.app if error is None else _json(error.body, error.status)
        await answer(scope, receive, send_with_headers)

    def refusal(self, headers: Headers, path: str) -> ApiError | None:
        origin = headers.get("origin")
        if headers.get("host") not in self.hosts:
            return ApiError(403, f"this server is http://{HOST}:{self.playground.port}")
        if origin is not None and origin.removeprefix("http://") not in self.hosts:
            return ApiError(403, f"pages of {origin} may not use this server")
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if path != "/" and not hmac.compare_digest(token.encode(), self.playground.token.encode()):
            return ApiError(401, "the token is wrong or missing: send the one that the server printed as the API key",
                            code="invalid_api_key")  # fmt: skip
        return None


class Stream(StreamingResponse):
    """Closes what it streams when the client has gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore  it is a generator
            await super().__call__(scope, receive, send)


async def _events(writer: Writer, pieces: AsyncIterator[list[Piece]]) -> AsyncIterator[str]:
    """Yields server-sent events: a chunk for each token, then [DONE]. An error is the last one."""
    begun: set[int] = set()
    tokens = 0
    try:
        async with aclosing(pieces):  # type: ignore  it is a generator
            async for ready in pieces:
                chunks = []
                for piece in ready:
                    chunks.append(writer.chunk(piece, piece.index not in begun))
                    begun.add(piece.index)
                tokens += len(ready)
                yield "".join(map(_event, chunks))
    except Exception as error:
        yield _event(_as_api_error(error).body)
        return
    if writer.request.stream_options.include_usage:
        yield _event(writer.last_chunk(tokens))
    yield "data: [DONE]\n\n"


def _event(content: Any) -> str:
    return f"data: {to_json(content)}\n\n"


async def _collect(pieces: AsyncIterator[list[Piece]]) -> list[Piece]:
    async with aclosing(pieces):  # type: ignore  it is a generator
        return [piece async for ready in pieces for piece in ready]


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise ApiError(413, f"the request has more than {LARGEST_BODY:,} bytes")
    return body


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    return ApiError(500, str(error) if isinstance(error, NotFinite) else f"the model failed: {error}")


def _json(content: Any, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error.body, error.status)


async def _not_found(request: Request, error: Exception) -> Response:
    return _json(ApiError(404, f"{request.method} {request.url.path} is nothing that this server has").body, 404)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def listen(port: int) -> socket.socket:
    """Returns a socket on this machine alone; port 0 takes a free one. Raises UserError if the port is in use."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(f"port {port} can't be used ({error.strerror}): name another by --port") from None


def server_of(playground: Playground) -> uvicorn.Server:
    """Returns the server; `run` serves until it is interrupted."""
    config = uvicorn.Config(
        playground.app, lifespan="on", ws="none", log_level="warning", timeout_graceful_shutdown=1, server_header=False
    )
    return uvicorn.Server(config)
