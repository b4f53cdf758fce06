"""Reads and continues sequences with a cache of keys and values, so that each token is read once.

    decoder = Decoder(model.eval())
    logits = decoder.read([[1, 2, 3], [4]])      # (2, V): logits of the token after each prompt
    logits = decoder.step([5, 6])                # (2, V): appends one token to each row
    logits = decoder.extend([[7, 8], [9, 10]])   # (2, 2, V): appends several; logits after each
    logits = decoder.add([[11, 12, 13]])         # (1, V): a third row joins

Rows may differ in length: token i of row b has slot i, and a row never attends beyond its own tokens. When a row has
filled the context, its oldest quarter is dropped and the rest is encoded again from position 0, whatever the kind of
positions. From then on the model sees between three quarters and all of its context. Dynamic rotary scaling changes
what was read with the length of a row, so rows beyond the trained context are read anew at each step.
"""

import contextlib
from collections.abc import Sequence
from itertools import repeat
from typing import Literal

import torch
import torch.fx.experimental._config
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt_arc.data.batches import pad_rows
from gpt_arc.decoding.cache import BlockCache, buffers_of, empty_cache
from gpt_arc.decoding.linear import InferenceLinear, for_inference, packable
from gpt_arc.device import send
from gpt_arc.errors import UserError
from gpt_arc.nn.cross_attention import EncoderStates
from model import GPT


def preceding(tokens: Tensor, count: int) -> Tensor:
    """Returns the `count` tokens before each of tokens (B, count + T) except the first `count`, the nearest first."""
    return tokens.unfold(1, count, 1)[:, :-1].flip(-1)


class Decoder(nn.Module):
    """The sequences that a model in eval mode is decoding. The model may be trained between two calls of `read`."""

    def __init__(self, model: GPT, cache_dtype: torch.dtype | None = None, prefill: int | None = None):
        """`cache_dtype` is the type of kept keys and values, as for weights if None; in int8 each has a scale.

        `prefill` is how many tokens of a prompt are read at a time. None: all. Raises ValueError for a bidirectional
        model.
        """
        super().__init__()
        if model.config.attention == "bidirectional":
            raise ValueError("a model that reads in both directions has no next token: fill its gaps instead")
        self.model, self.cache_dtype, self.prefill = model, cache_dtype, prefill
        self.sequences: list[list[int]] = []  # tokens of each row
        self.images: Tensor | None = None  # (N, C) embeddings that tokens below 0 stand for: see `GPT.embed`
        self.source: EncoderStates | None = None  # for a model with an encoder: one source, of all rows
        self.cache = empty_cache(model, 0, 0, torch.float32)
        self.dynamic_context = model.config.rotary_context if model.config.rotary_scaling == "dynamic" else None
        self.read_length = 0  # of the longest row when all rows were last read from their beginning
        self.head = model.logits
        self.compiled: Literal["no", "blocks", "step"] = "no"
        self.one_step = self.forward  # used for one token per row
        self.fixed_slots = 0  # of a step that is compiled for this number

    @torch.inference_mode()
    def read_source(self, tokens: Sequence[int]) -> None:
        """Lets the encoder read a source, to which all rows attend from now on."""
        self.source = self.model.encode(send([list(tokens)], self._device))

    def prepare(self, rows: int, compile: bool, int8: bool = False) -> None:
        """Lays out the model for decoding `rows` at a time; it can't be trained or saved any more.

        `compile` calls `compile`. `int8` rounds the weights to 8 bits, for a single row of compiled code on a CPU.
        """
        on_cpu = self._device.type == "cpu"
        if int8 and not (on_cpu and compile and rows == 1):
            raise UserError(
                "int8 is for one row at a time of compiled code on a CPU: set batch_size to 1 and compile to True"
            )
        if int8:
            self.head = for_inference(self.model, "int8")
        elif on_cpu and compile and rows == 1:
            self.head = for_inference(self.model, "plain")
        elif on_cpu and packable(self.model.token_embedding.weight.dtype):
            self.head = for_inference(self.model, "packed")
        if compile:
            self.compile()

    def compile(self, slots: int | None = None) -> None:
        """Compiles the computation of `step` on its first call.

        On a CPU, compiles a block, with the same code for all blocks and any number of slots. On a GPU, compiles the
        whole step with fixed shapes, to be launched as one CUDA graph; rows dropped by `keep` still cost time there.
        `slots` is the length of the longest row; None: the whole context.
        """
        if self._device.type == "cpu":
            self.compiled = "blocks"
            # else sizes that happen to be equal at compilation, such as rows and heads, would have to stay equal
            torch.fx.experimental._config.use_duck_shape = False
            parts = [*self.model.blocks, *([self.head] if isinstance(self.head, InferenceLinear) else [])]
            for part in parts:
                part.compile(dynamic=True)
        else:
            self.compiled, self.fixed_slots = "step", slots or self.model.config.block_size
            self.one_step = torch.compile(self.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def _eager(self) -> contextlib.AbstractContextManager:
        """Context that runs the blocks uncompiled: the compiled code is for one token per row."""
        return contextlib.nullcontext() if self.compiled == "no" else torch.compiler.set_stance("force_eager")

    @property
    def _device(self) -> torch.device:
        return self.model.token_embedding.weight.device

    def clear(self, rows: int, room: int | None = None) -> None:
        """Starts with `rows` empty rows, each with room for `room` tokens, growing as needed.

        None reserves the whole context.
        """
        context = self.model.config.block_size
        slots = context if room is None else min(max(room, self.fixed_slots, 1), context)
        self.sequences = [[] for _ in range(rows)]
        self._reserve(rows, slots, keep=False)

    def _empty_cache(self, rows: int, slots: int) -> Sequence[BlockCache]:
        dtype = self.cache_dtype or self.model.token_embedding.weight.dtype
        if self._device.type == "cpu" and self.compiled == "no" and self.cache_dtype is None:
            dtype = torch.float32  # a CPU's library takes three times as long for one query in 16 bits
        return empty_cache(self.model, rows, slots, dtype)

    def _reserve(self, rows: int, slots: int, keep: bool = True) -> tuple[int, int]:
        """Makes room for `rows` and `slots`; `keep` copies the contents. Returns how many of each a step reads."""
        need_rows, need_slots = rows, slots
        if (
            self.compiled == "blocks"
        ):  # a view of all rows or slots has another layout, which would be compiled separately
            need_rows, need_slots = rows + (rows > 1), slots + 1
        old = self.cache
        have_rows, have_slots = old[0].keys.size(0), old[0].keys.size(2)
        if have_rows < need_rows or have_slots < need_slots:
            if keep:
                if need_slots > have_slots:  # doubled, so that a long sequence is rarely copied
                    need_slots = max(need_slots, min(2 * have_slots, self.model.config.block_size))
                need_rows, need_slots = max(need_rows, have_rows), max(need_slots, have_slots)
            self.cache = self._empty_cache(need_rows, need_slots)
            for new, kept in zip(buffers_of(self.cache), buffers_of(old) if keep else []):
                new[:have_rows, :, :have_slots] = kept
        all_rows, all_slots = self.cache[0].keys.size(0), self.cache[0].keys.size(2)
        if self.compiled == "step":
            return all_rows, all_slots
        if self.compiled == "blocks" and all_rows > 2:  # one row has separate code
            return max(rows, 2), slots
        return rows, slots

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], room: int | None = None) -> Tensor:
        """Starts over with a row for each prompt, reading its last block_size tokens.

        Returns the logits (B, V), float32, of the next token. `room` is the number of tokens beyond the prompts to
        reserve space for. Raises ValueError for an empty prompt.
        """
        longest = max(map(len, prompts), default=0)
        self.clear(len(prompts), None if room is None else longest + room)
        self.sequences = []
        return self.add(prompts)

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Adds a row for each prompt after the present ones, reading its last block_size tokens.

        Returns the logits (B, V), float32, of the new rows' next tokens. Raises ValueError for an empty prompt.
        """
        if not prompts or not all(prompts):
            raise ValueError("a prompt has no tokens, or there is no prompt: begin with the tokenizer's start_token")
        context, first = self.model.config.block_size, len(self.sequences)
        self.sequences += [list(prompt[-context:]) for prompt in prompts]
        self._reserve(len(self.sequences), max(map(len, self.sequences)))
        with self._eager():
            return self.head(self._encode(list(range(first, len(self.sequences))))[:, -1]).float()

    def _encode(self, rows: list[int], count: int = 1) -> Tensor:
        """Reads some rows from their beginning. Returns the hidden states (R, count, C) of their last tokens."""
        sequences = [self.sequences[row] for row in rows]
        longest = max(map(len, sequences))
        tokens = pad_rows(sequences, self._device)
        lengths = send([len(tokens) for tokens in sequences], self._device)
        whole = len(rows) == len(self.sequences)
        self.read_length = longest if whole else max(longest, self.read_length)
        cache = self.cache if whole else self._empty_cache(len(rows), longest)
        padded = lengths if self.dynamic_context else None
        whole_images = self.images is not None and self.model.prefix_attention  # no image is read in parts
        size = longest if self.dynamic_context or whole_images else self.prefill or longest
        hidden, before = [], self.model.config.ngrams - 1
        with self._eager():
            for start in range(0, longest, size):
                stop = min(start + size, longest)
                positions = torch.arange(start, stop, device=self._device).expand(len(rows), -1) if start else None
                views = [part.view(len(rows), stop, positions) for part in cache]
                previous = None
                if start and before:
                    previous = preceding(F.pad(tokens, (before, 0)), before)[:, start:stop]
                given = {"cache": views, "previous": previous, "lengths": padded, "source": self.source}
                hidden.append(self.model.hidden(tokens[:, start:stop], images=self.images, **given))
        places = send(rows, self._device)
        for kept, new in zip(buffers_of(self.cache), [] if whole else buffers_of(cache)):
            kept[places, :, :longest] = new
        last = lengths[:, None] + torch.arange(-count, 0, device=self._device)
        return torch.cat(hidden, dim=1)[torch.arange(len(rows), device=self._device)[:, None], last]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Appends one token to each row. Returns the logits (B, V), float32, of the next."""
        return self.extend([[token] for token in tokens])[:, -1]

    @torch.inference_mode()
    def extend(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Appends T tokens to each row. Returns the logits (B, T, V), float32, of the token after each.

        Raises ValueError for more than block_size tokens.
        """
        size, live, context = len(chunks[0]), len(self.sequences), self.model.config.block_size
        if len(chunks) != live or any(len(chunk) != size for chunk in chunks):
            raise ValueError(f"{live} rows need {live} chunks of one length: there are {len(chunks)}")
        if size > context:
            raise ValueError(f"{size} tokens are more than the context, block_size = {context}")
        self._slide(size)
        longest = max(map(len, self.sequences)) + size
        rows, slots = self._reserve(live, longest)
        if self.dynamic_context and max(longest, self.read_length) > self.dynamic_context:
            self.sequences = [[*sequence, *chunk] for sequence, chunk in zip(self.sequences, chunks)]
            return self.head(self._encode(list(range(live)), size)).float()
        idle = [[0] * size] * (rows - live)  # unused rows of a fixed-size step
        tokens = send([*chunks, *idle], self._device)
        previous = self._previous([*chunks, *idle])
        lengths = send([*map(len, self.sequences), *repeat(0, rows - live)], self._device)
        if size > 1:
            with self._eager():
                logits = self.forward(tokens, lengths, slots, previous)
        elif self.compiled == "step":
            torch.compiler.cudagraph_mark_step_begin()  # the previous step's logits are no longer needed
            logits = self.one_step(tokens, lengths, slots, previous).clone()  # the next step overwrites them
        else:
            logits = self.forward(tokens, lengths, slots, previous)
        for sequence, chunk in zip(self.sequences, chunks):
            sequence.extend(chunk)
        return logits[:live]

    def _slide(self, size: int) -> None:
        """Drops the oldest tokens of rows whose context has no room for `size` more."""
        context = self.model.config.block_size
        full = [row for row, sequence in enumerate(self.sequences) if len(sequence) + size > context]
        kept = min(context - max(context // 4, 1), context - size)
        for row in full:
            self.sequences[row] = self.sequences[row][len(self.sequences[row]) - kept :]
        if full and kept:
            self._encode(full)

    def _previous(self, chunks: Sequence[Sequence[int]]) -> Tensor | None:
        """Returns the tokens (B, T, n - 1) before each token of `chunks`, for a model with n-grams."""
        count = self.model.config.ngrams - 1
        if not count:
            return None
        ends = [sequence[-count:] for sequence in self.sequences] + [[]] * (len(chunks) - len(self.sequences))
        rows = [[*repeat(0, count - len(end)), *end, *chunk] for end, chunk in zip(ends, chunks)]
        return preceding(send(rows, self._device), count)

    def forward(self, tokens: Tensor, lengths: Tensor, slots: int, previous: Tensor | None) -> Tensor:
        """Returns logits (B, T, V) of tokens (B, T) that follow `lengths` (B,) tokens, attending to `slots` slots."""
        positions = lengths[:, None] + torch.arange(tokens.size(1), device=tokens.device)
        views = [part.view(len(tokens), slots, positions) for part in self.cache]
        hidden = self.model.hidden(tokens, cache=views, previous=previous, source=self.source)
        return self.head(hidden).float()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Continues with these rows, in this order. A row may occur several times; the others are dropped."""
        slots = max((len(self.sequences[row]) for row in rows), default=0)
        self.sequences = [list(self.sequences[row]) for row in rows]
        self._reserve(len(rows), slots)
        moved = [place for place, row in enumerate(rows) if place != row]
        if not moved:
            return
        places, origins = send([moved, [rows[place] for place in moved]], self._device)
        for kept in buffers_of(self.cache):
            kept[places, :, :slots] = kept[origins, :, :slots]

    def rewind(self, counts: Sequence[int]) -> None:
        """Drops the last `counts[b]` tokens of row b, or all if it has fewer."""
        self.sequences = [tokens[: max(len(tokens) - count, 0)] for tokens, count in zip(self.sequences, counts)]
