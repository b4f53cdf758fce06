"""gpt-arc models as EleutherAI's lm-evaluation-harness runs them: the model type `gpt-arc`."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from gpt_arc.data.text_stream import TextStream
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.probabilities import row_generators
from gpt_arc.decoding.settings import Sampling
from gpt_arc.device import DTYPES, resolve_device, resolve_dtype
from gpt_arc.errors import UserError
from gpt_arc.evaluation.score import Request, rolling_windows, score_continuations
from gpt_arc.weights.directory import load_text_model

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError:
    raise UserError("EleutherAI's lm-evaluation-harness is not installed: pip install -e '.[eval]'") from None


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


WITHOUT_EFFECT = {"num_beams": 1}  # what tasks set besides what `_generation` takes, to a value that changes nothing


@register_model("gpt-arc")
class HarnessModel(TemplateLM):
    """The model that the harness calls `gpt-arc`.

    `pretrained` is what sample.py takes: a run folder, a model directory, or the name of a published model. `dtype` is
    the type of the weights, auto the fastest there is; `batch_tokens` bounds what is read at once; `seed` is the source
    of chance where a task draws. A text is read after the tokenizer's start_token, and one that merely spells a special
    token is encoded as text. Raises UserError for a model that can't be loaded or has no tokenizer.
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
        model, tokenizer = load_text_model(str(pretrained), dtype=weights)
        self.model, self.text_tokenizer = model.to(self._device).eval(), tokenizer
        self.batch_tokens, self.seed = batch_tokens, seed

    @property
    def max_length(self) -> int:
        """The context in tokens."""
        return self.model.config.block_size

    @property
    def max_gen_toks(self) -> int:
        """How many tokens to make where a task doesn't say."""
        return 256

    @property
    def eot_token_id(self) -> int | None:
        return self.text_tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """What an empty context stands for, and the token before the first of a text."""
        return self.text_tokenizer.start_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids of the text alone: `add_special_tokens` has no effect. Raises UserError, see `Tokenizer.encode`."""
        return self.text_tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """The log-probability in nats of each continuation, and whether greedy decoding makes it.

        A request is the texts, the context's tokens and the continuation's. A context that is too long loses its
        beginning; raises ValueError for a continuation that is longer than the model's context.
        """
        progress = None if disable_tqdm else "scoring"
        asked = [Request(context, continuation) for _, context, continuation in requests]
        answers = []
        for (texts, _, _), score in zip(
            requests, score_continuations(self.model, asked, self.batch_tokens, progress=progress)
        ):
            answers.append((score.log_probability, score.is_greedy))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[float]:
        """The log-probability in nats of each text of any length, its windows being `rolling_windows`."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            own = list(rolling_windows(tokens, self.prefix_token_id, self.max_length))
            windows += own
            owners += [number] * len(own)
        progress = None if disable_tqdm else "scoring"
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, score_continuations(self.model, windows, self.batch_tokens, progress=progress)):
            totals[owner] += score.log_probability
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to one of the texts `until`, the end of the text or max_gen_toks.

        Greedy unless the task says do_sample or a temperature. As in the harness, of a long context what leaves room
        for max_gen_toks is read; where nothing would, what the model's context holds. Raises UserError for settings
        that have no counterpart here.
        """
        alike: dict[tuple[Sampling, tuple[str, ...], int], list[tuple[int, list[int]]]] = defaultdict(list)
        for number, request in enumerate(requests):
            context, settings = request.args
            sampling, until, length = how = self._generation(settings)
            room = self.max_length - length if length < self.max_length else self.max_length
            alike[how].append((number, (self.tok_encode(context) or [self.prefix_token_id])[-room:]))
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="generating", unit="request", leave=False, disable=disable_tqdm or None)
        for (sampling, until, length), asked in alike.items():
            asked.sort(key=lambda item: len(item[1]), reverse=True)
            start = 0
            while start < len(asked):
                longest = min(len(asked[start][1]) + length, self.max_length)
                batch = asked[start : start + max(self.batch_tokens // longest, 1)]
                for (number, _), text in zip(batch, self._generate(batch, sampling, until, length)):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                start += len(batch)
                bar.update(len(batch))
        bar.close()
        return texts

    def _generation(self, settings: dict[str, Any]) -> tuple[Sampling, tuple[str, ...], int]:
        """How to draw, where to stop and after how many tokens, from a task's generation_kwargs. Raises UserError."""
        left = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        until = tuple(text for text in left.pop("until") if text)
        length, temperature = left.pop("max_gen_toks"), left.pop("temperature", 1.0)
        filters = {name: left.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in left}
        for name in ("top_k", "min_p"):  # where transformers takes 0 as none
            filters[name] = filters.get(name) or None
        sampling = Sampling(temperature if left.pop("do_sample") else 0.0, **filters)
        for name, value in left.items():
            if name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]:
                raise UserError(f"the task generates with {name} = {value}, which has no counterpart here")
        return sampling, until, length

    def _generate(
        self, batch: Sequence[tuple[int, list[int]]], sampling: Sampling, until: Sequence[str], length: int
    ) -> list[str]:
        """Continuations of the prompts of a batch, each with its request's number, which decides what it draws."""
        prompts = [tokens for _, tokens in batch]
        streams = [TextStream(self.text_tokenizer, tokens) for tokens in prompts]

        def stopped(row: int, token: int) -> bool:
            streams[row].push(token)
            return streams[row].ended or any(text in streams[row].text for text in until)

        generators = row_generators(self.seed, [number for number, _ in batch])
        for _ in generate(self.model, prompts, length, sampling, generators=generators, stopped=stopped):
            pass
        for stream in streams:
            stream.end()
        return [postprocess_generated_text(stream.text, list(until), None) for stream in streams]
