"""The adapter to EleutherAI's lm-evaluation-harness: the model type `gpt-arc`."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from gpt_arc.chat.format import ChatFormat, Turn, load_text_with_chat, require_chat
from gpt_arc.data.text_stream import TextStream
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.probabilities import row_generators
from gpt_arc.decoding.settings import Sampling
from gpt_arc.device import DTYPES, resolve_device, resolve_dtype
from gpt_arc.errors import UserError, naming
from gpt_arc.evaluation.score import Request, encode_pairs, rolling_windows, score_continuations
from gpt_arc.extras import missing_extra
from gpt_arc.settings import build

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError:
    raise missing_extra("lm_eval") from None


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


WITHOUT_EFFECT = {"num_beams": 1}  # settings that `_generation` ignores, at values that change nothing


@register_model("gpt-arc")
class HarnessModel(TemplateLM):
    """The model that the harness calls `gpt-arc`.

    `pretrained` is a run folder, a model directory or the name of a published model, as for sample.py. `dtype` is the
    type of the weights; auto is the fastest that the device has. `batch_tokens` bounds the tokens of a batch; `seed` is
    for tasks that sample. Each text is read after the tokenizer's start_token, and text that spells a special token is
    encoded as text. With --apply_chat_template, texts are turns in the template of the model's chat.json, where text
    that spells one of its marks is the mark. Raises UserError if the model can't be loaded or has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "float32",
        batch_tokens: int = 8192,
        seed: int = 1337,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if device == "cuda:0" and not torch.cuda.is_available():  # the default of the harness's command line
            device = "auto"
        if dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype = {dtype} must be one of auto, {', '.join(DTYPES)}")
        if batch_tokens < 1 or seed < 0:
            raise UserError(f"batch_tokens = {batch_tokens} must be at least 1, and seed = {seed} at least 0")
        self._device = resolve_device(device)
        weights = DTYPES[resolve_dtype(dtype, self._device)]
        self.directory, model, tokenizer, self.declared_chat = load_text_with_chat(str(pretrained), weights)
        self.model, self.text_tokenizer = model.to(self._device).eval(), tokenizer
        self.batch_tokens, self.seed, self.name = batch_tokens, seed, str(pretrained)
        self.chat: ChatFormat | None = None  # once a template is applied

    @property
    def max_length(self) -> int:
        """The context in tokens."""
        return self.model.config.block_size

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate if the task doesn't set a number."""
        return 256

    @property
    def eot_token_id(self) -> int | None:
        return self.text_tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The token before the first of a text, which also stands for an empty context."""
        return self.text_tokenizer.start_token

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of prompts."""
        return str(self.directory.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the chat template in Jinja, for the harness's report. Raises UserError if there is none."""
        if not chat_template:
            return None
        self.chat = require_chat(self.directory, self.declared_chat)
        return self.chat.jinja

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation, up to an answer or, without `add_generation_prompt`, within one."""
        self.chat = require_chat(self.directory, self.declared_chat)
        turns = [Turn(message["role"], message["content"]) for message in chat_history]
        return self.chat.render(turns, continued=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Returns the ids of the text, after the declared prefix unless `add_special_tokens` is False.

        Raises UserError, see `Tokenizer.encode`.
        """
        if self.chat and add_special_tokens is not False:
            return self.chat.encode_rendered(string)
        prefix = self.text_tokenizer.declared.prefix if add_special_tokens is not False else ()
        return [*prefix, *self.text_tokenizer.encode(string)]

    def loglikelihood(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns each continuation's log-probability in nats, and whether greedy decoding would produce it.

        Where a token spans the end of the context, the continuation begins with it, see `encode_pairs`. Raises
        UserError.
        """
        if self.chat:
            return super().loglikelihood(list(requests), disable_tqdm)
        pairs = [request.arguments for request in requests]
        places = [f"{request.task_name}, document {request.doc_id}, option {request.idx}" for request in requests]
        encoded = encode_pairs(self.text_tokenizer, pairs, self.max_length, places).requests
        tokens = [(pair, request.context, request.continuation) for pair, request in zip(pairs, encoded)]
        return self._loglikelihood_tokens(tokens, disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        **kwargs,
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-probability in nats, and whether greedy decoding would produce it.

        A request has the two texts, the context's tokens and the continuation's tokens. A context that is too long is
        cut at the start. Raises ValueError for a continuation that is longer than the model's context.
        """
        progress = None if disable_tqdm else "scoring"
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        with naming(self.name):
            scores = score_continuations(self.model, pairs, self.batch_tokens, progress=progress)
        answers = []
        for (texts, _, _), score in zip(requests, scores):
            answers.append((score.log_probability, score.is_greedy))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability in nats of each text of any length, read in `rolling_windows`."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            text_windows = list(rolling_windows(tokens, self.prefix_token_id, self.max_length))
            windows += text_windows
            owners += [number] * len(text_windows)
        progress = None if disable_tqdm else "scoring"
        totals = [0.0] * len(requests)
        with naming(self.name):
            scores = score_continuations(self.model, windows, self.batch_tokens, progress=progress)
        for owner, score in zip(owners, scores):
            totals[owner] += score.log_probability
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each context, up to an `until` text, end-of-text or max_gen_toks.

        Decoding is greedy unless the task sets do_sample or a temperature. As in the harness, a long context is cut at
        the start to leave room for max_gen_toks; if that leaves nothing, to the model's context. Raises UserError for
        settings that have no counterpart here.
        """
        by_settings: dict[tuple[Sampling, tuple[str, ...], int], list[tuple[int, list[int]]]] = defaultdict(list)
        for number, request in enumerate(requests):
            context, settings = request.arguments
            sampling, until, length = key = self._generation(settings)
            room = self.max_length - length if length < self.max_length else self.max_length
            by_settings[key].append((number, (self.tok_encode(context) or [self.prefix_token_id])[-room:]))
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="generating", unit="request", leave=False, disable=disable_tqdm or None)
        for (sampling, until, length), prompts in by_settings.items():
            prompts.sort(key=lambda item: len(item[1]), reverse=True)
            start = 0
            while start < len(prompts):
                longest = min(len(prompts[start][1]) + length, self.max_length)
                batch = prompts[start : start + max(self.batch_tokens // longest, 1)]
                for (number, _), text in zip(batch, self._generate(batch, sampling, until, length)):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                start += len(batch)
                bar.update(len(batch))
        bar.close()
        return texts

    def _generation(self, settings: dict[str, Any]) -> tuple[Sampling, tuple[str, ...], int]:
        """Returns sampling, stop texts and length from a task's generation_kwargs. Raises UserError."""
        remaining: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        until = tuple(text for text in remaining.pop("until") if text)
        length, temperature = remaining.pop("max_gen_toks"), remaining.pop("temperature", 1.0)
        filters = {
            name: remaining.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in remaining
        }
        for name in ("top_k", "min_p"):  # 0 means "off" in transformers
            filters[name] = filters.get(name) or None
        filters["temperature"] = temperature if remaining.pop("do_sample") else 0.0
        sampling = build(Sampling, filters, dict.fromkeys(filters, "generation_kwargs"))
        for name, value in remaining.items():
            if name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]:
                raise UserError(f"the task generates with {name} = {value}, which has no counterpart here")
        return sampling, until, length

    def _generate(
        self, batch: Sequence[tuple[int, list[int]]], sampling: Sampling, until: Sequence[str], length: int
    ) -> list[str]:
        """Returns the continuations of a batch of (request number, prompt); the number decides what is sampled."""
        prompts = [tokens for _, tokens in batch]
        if self.chat:  # a response is decoded without its prompt
            streams = [TextStream(self.text_tokenizer, end=self.chat.end) for _ in prompts]
        else:
            streams = [TextStream(self.text_tokenizer, tokens) for tokens in prompts]

        def stopped(row: int, token: int) -> bool:
            streams[row].push(token)
            return streams[row].ended or any(text in streams[row].text for text in until)

        generators = row_generators(self.seed, [number for number, _ in batch])
        with naming(self.name):
            for _ in generate(self.model, prompts, length, sampling, generators=generators, stopped=stopped):
                pass
        for stream in streams:
            stream.end()
        return [postprocess_generated_text(stream.text, list(until), None) for stream in streams]
