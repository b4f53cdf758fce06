"""OpenAI's API for completions: what requests may hold, and the form of answers and errors."""

import base64
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt_arc.chat.format import IMAGE
from gpt_arc.data.text_stream import UNFINISHED
from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.settings import Sampling
from gpt_arc.reading import mistake_in
from gpt_arc.serving.engine import Piece
from gpt_arc.settings import Count, Seed

T = TypeVar("T", bound=BaseModel)
MOST_CHOICES = 128  # of a request, all its prompts together
MOST_ALTERNATIVES = 20
MOST_IMAGES = 16  # of a request
# settings of OpenAI's API that this server lacks, with the values that mean nothing
LACKING: dict[str, tuple] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (0,)),
    **dict.fromkeys(("suffix", "prediction", "audio", "web_search_options", "verbosity", "reasoning_effort"), ()),
    **dict.fromkeys(("logit_bias", "metadata", "tools", "functions"), ({}, [])),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **{"best_of": (1,), "echo": (False,), "store": (False,), "parallel_tool_calls": (True, False)},
    **{"response_format": ({"type": "text"},), "modalities": (["text"],), "service_tier": ("auto", "default")},
    **{"user": (), "safety_identifier": (), "prompt_cache_key": ()},
}
IGNORED = {"user", "safety_identifier", "prompt_cache_key"}  # they don't change an answer

Text = Annotated[str, MinLen(1)]


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error"}
        self.status, kind = status, kinds.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class Common(BaseModel):
    """What both kinds of requests may hold."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str
    n: Annotated[int, Ge(1), Le(MOST_CHOICES)] = 1
    temperature: Annotated[float, Ge(0), Le(2)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    stop: Text | Annotated[list[Text], MaxLen(4)] = []
    seed: Seed | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # not in OpenAI's API; named as in vLLM's
    top_k: Count | None = None
    min_p: Annotated[float, Gt(0), Le(1)] | None = None
    repetition_penalty: Annotated[float, Ge(0.01), Le(100)] = 1.0

    @property
    def sampling(self) -> Sampling:
        top_p = None if self.top_p == 1 else self.top_p
        return Sampling(self.temperature, self.top_k, top_p, self.min_p, self.repetition_penalty)


class CompletionRequest(Common):
    KIND: ClassVar[str] = "text_completion"
    prompt: str | list[int] | Annotated[list[str] | list[list[int]], MinLen(1), MaxLen(MOST_CHOICES)]
    max_tokens: Count = 16
    logprobs: Annotated[int, Ge(0), Le(MOST_ALTERNATIVES)] | None = None

    @property
    def alternatives(self) -> int:
        return self.logprobs or 0

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, as texts or tokens."""
        prompt: Any = self.prompt
        return prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # every image is read in the one size that the model reads


class ImagePart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["image_url"]
    image_url: ImageUrl

    @property
    def content(self) -> bytes:
        """The image's file. Raises ApiError unless the URL holds it."""
        head, _, data = self.image_url.url.partition(",")
        try:
            if head.startswith("data:image/") and head.endswith(";base64"):
                return base64.b64decode(data, validate=True)
        except ValueError:
            pass
        message = "an image_url must be data:image/png;base64,... or of another type of image: nothing is fetched"
        raise ApiError(400, message, "messages")


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None

    @property
    def images(self) -> list[ImagePart]:
        """Its images. Raises ApiError."""
        images = [part for part in self.content if isinstance(part, ImagePart)]
        if images and self.role != "user":
            raise ApiError(400, f"an image in a message of the role {self.role}: users alone show images", "messages")
        if images and any(isinstance(part, TextPart) and IMAGE in part.text for part in self.content):
            raise ApiError(400, f"{IMAGE} stands for an image: leave it out of a text beside one", "messages")
        return images

    @property
    def text(self) -> str:
        """Its text, in which IMAGE stands for each image."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text if isinstance(part, TextPart) else IMAGE for part in self.content)


class ChatRequest(Common):
    KIND: ClassVar[str] = "chat.completion"
    messages: Annotated[list[Message], MinLen(1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Ge(0), Le(MOST_ALTERNATIVES)] = 0

    @property
    def alternatives(self) -> int:
        return self.top_logprobs


class AttentionRequest(BaseModel):
    """What a page asks attention maps of: a text or a conversation. Not in OpenAI's API."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str
    prompt: str = ""
    messages: list[Message] = []  # in place of a prompt


def parse(cls: type[T], body: bytes) -> T:
    """Reads a request. Raises ApiError."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the request's body is not JSON") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the request's body is not a JSON object")
    values = {name: value for name, value in values.items() if value is not None}
    for name in LACKING.keys() & values.keys():
        value = values.pop(name)
        if name not in IGNORED and value not in LACKING[name]:
            raise ApiError(400, f"this server has no {name}: leave it out", name)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        names = [str(part) for part in error.errors(include_url=False)[0]["loc"]]
        raise ApiError(400, f"the request is wrong: {mistake_in(error)}", names[0] if names else None) from None


@dataclass
class Writer:
    """Writes the answers to one request, whole or in chunks."""

    request: CompletionRequest | ChatRequest
    tokenizer: Tokenizer
    prompt_tokens: int

    def __post_init__(self):
        self.is_chat = isinstance(self.request, ChatRequest)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Returns the answer to a request that isn't streamed, from all its pieces."""
        choices = []
        for index in sorted({piece.index for piece in pieces}):
            part = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in part)
            content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choices.append(
                {"index": index, **content, "logprobs": self.logprobs(part), "finish_reason": part[-1].finish}
            )
        return {**self._head(""), "choices": choices, "usage": self.usage(len(pieces))}

    def chunk(self, piece: Piece, first: bool) -> dict[str, Any]:
        """Returns what a stream sends of a token; `first` of its choice."""
        content: dict[str, Any] = {"text": piece.text}
        if self.is_chat:
            content = {"delta": {**({"role": "assistant"} if first else {}), "content": piece.text}}
        choice = {"index": piece.index, **content, "logprobs": self.logprobs([piece]), "finish_reason": piece.finish}
        return {**self._head(".chunk"), "choices": [choice]}

    def last_chunk(self, tokens: int) -> dict[str, Any]:
        """Returns the chunk that ends a stream with its usage."""
        return {**self._head(".chunk"), "choices": [], "usage": self.usage(tokens)}

    def _head(self, kind: str) -> dict[str, Any]:
        kind = self.request.KIND + kind if self.is_chat else self.request.KIND
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def usage(self, tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Returns the log-probabilities of tokens and of the most likely ones in their places, if they are wanted."""
        tokens = [piece.token for piece in pieces]
        if isinstance(self.request, ChatRequest):
            if not self.request.logprobs:
                return None
            return {
                "content": [
                    self._entry(token.id, token.log_probability)
                    | {"top_logprobs": [self._entry(*alternative) for alternative in token.alternatives]}
                    for token in tokens
                ],
                "refusal": None,
            }
        if self.request.logprobs is None:
            return None
        alternatives = [
            {self.text(id): log for id, log in reversed(token.alternatives)} for token in tokens
        ]  # of equal texts, the likelier token's
        return {
            "tokens": [self.text(token.id) for token in tokens],
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": [dict(reversed(each.items())) for each in alternatives],
            "text_offset": [piece.offset for piece in pieces],
        }

    def _entry(self, id: int, log_probability: float) -> dict[str, Any]:
        text = self.text(id)
        return {
            "token": text,
            "logprob": log_probability,
            "bytes": None if UNFINISHED in text else list(text.encode()),
        }

    def text(self, id: int) -> str:
        """Returns a token's text by itself."""
        return self.tokenizer.decode([id])
