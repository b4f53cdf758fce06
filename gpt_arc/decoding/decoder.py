"""Reading and continuing sequences, each token once: every block keeps their keys and values.

    decoder = Decoder(model.eval())
    logits = decoder.read([[1, 2, 3], [4]])      # (2, V): of the token after each prompt
    logits = decoder.step([5, 6])                # (2, V): each row goes on by one token
    logits = decoder.extend([[7, 8], [9, 10]])   # (2, 2, V): by several, with the logits after each

Rows may differ in length: row b's token i lies in slot i of its own, and a row never looks beyond its own tokens. When
a row has filled the context, its oldest quarter is forgotten and the rest encoded anew from position 0 on, whatever the
kind of positions; from there on the model sees between three quarters and all of its context.
"""

import contextlib
from collections.abc import Sequence
from itertools import repeat
from typing import Literal

import torch
import torch.fx.experimental._config
import torch.nn as nn
from torch import Tensor

from gpt_arc.decoding.linear import InferenceLinear, for_inference, packable
from gpt_arc.errors import UserError
from gpt_arc.nn.attention import KVCache
from model import GPT


class BlockCache(nn.Module):
    """The keys and values of one block, (B, K, S, D) each: room for S tokens of B rows."""

    def __init__(self, model: GPT, rows: int, slots: int, dtype: torch.dtype):
        super().__init__()
        shape = rows, model.config.kv_heads, slots, model.config.head_width
        for name in ("keys", "values"):
            zeros = torch.zeros(shape, dtype=dtype, device=model.token_embedding.weight.device)
            self.register_buffer(name, zeros, persistent=False)

    def view(self, rows: int, slots: int, positions: Tensor | None) -> KVCache:
        """The first rows and slots."""
        return KVCache(self.keys[:rows, :, :slots], self.values[:rows, :, :slots], positions)


class Decoder(nn.Module):
    """The sequences that `model`, in eval mode, is reading. Between two `read`s it may be trained."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model
        self.sequences: list[list[int]] = []  # the tokens that each row holds
        self.cache = nn.ModuleList()  # a `BlockCache` for each block
        self.head = model.logits
        self.compiled: Literal["no", "blocks", "step"] = "no"
        self.one_step = self.forward  # for one token a row

    def prepare(self, rows: int, compile: bool, int8: bool = False) -> None:
        """Lay the model out for decoding `rows` at a time; it can't be trained or saved any more.

        `compile`: see there. `int8` rounds the weights to 8 bits, for a single row of compiled code on a CPU.
        """
        on_cpu = self._device.type == "cpu"
        if int8 and not (on_cpu and compile and rows == 1):
            raise UserError("int8 is for one row at a time of compiled code on a CPU: batch_size 1 and compile True")
        if int8:
            self.head = for_inference(self.model, "int8")
        elif on_cpu and compile and rows == 1:
            self.head = for_inference(self.model, "plain")
        elif on_cpu and packable(self.model.token_embedding.weight.dtype):
            self.head = for_inference(self.model, "packed")
        if compile:
            self.compile()

    def compile(self) -> None:
        """Compile what `step` computes, when it is first called.

        On a CPU a block, the same code for all of them and for any number of slots. On a GPU the whole step with fixed
        shapes, which CUDA graphs launch at once: there rows that `keep` leaves out go on costing.
        """
        if self._device.type == "cpu":
            self.compiled = "blocks"
            # or sizes that are equal when a block is compiled, of rows and heads perhaps, would have to stay so
            torch.fx.experimental._config.use_duck_shape = False
            parts = [*self.model.blocks, *([self.head] if isinstance(self.head, InferenceLinear) else [])]
            for part in parts:
                part.compile(dynamic=True)
        else:
            self.compiled = "step"
            self.one_step = torch.compile(self.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def _eager(self) -> contextlib.AbstractContextManager:
        """In which the blocks run as they are: compiled ones are for one token a row."""
        return contextlib.nullcontext() if self.compiled == "no" else torch.compiler.set_stance("force_eager")

    @property
    def _device(self) -> torch.device:
        return self.model.token_embedding.weight.device

    def clear(self, rows: int, room: int | None = None) -> None:
        """Forget everything; there are `rows` empty rows, with room for `room` tokens each (more is made as needed).

        None: the whole context.
        """
        context = self.model.config.block_size
        slots = context if room is None or self.compiled == "step" else min(max(room, 1), context)
        self.sequences = [[] for _ in range(rows)]
        self._reserve(rows, slots, keep=False)

    def _new_cache(self, rows: int, slots: int) -> nn.ModuleList:
        dtype = self.model.token_embedding.weight.dtype
        if self._device.type == "cpu" and self.compiled == "no":
            dtype = torch.float32  # attention to one query in 16 bits takes the CPU's library three times as long
        return nn.ModuleList(BlockCache(self.model, rows, slots, dtype) for _ in self.model.blocks)

    def _reserve(self, rows: int, slots: int, keep: bool = True) -> tuple[int, int]:
        """Have room for so many rows and slots, and `keep` what is there: how many of both a step looks at."""
        need_rows, need_slots = rows, slots
        if self.compiled == "blocks":  # all rows or slots would be another layout than some: compiled apart
            need_rows, need_slots = rows + (rows > 1), slots + 1
        old = self.cache
        have_rows, have_slots = (old[0].keys.size(0), old[0].keys.size(2)) if old else (0, 0)
        if have_rows < need_rows or have_slots < need_slots:
            if keep:
                if need_slots > have_slots:  # by doubling, so that a long sequence is seldom copied
                    need_slots = max(need_slots, min(2 * have_slots, self.model.config.block_size))
                need_rows, need_slots = max(need_rows, have_rows), max(need_slots, have_slots)
            self.cache = self._new_cache(need_rows, need_slots)
            for new, kept in zip(self.cache, old if keep else []):
                new.keys[:have_rows, :, :have_slots] = kept.keys
                new.values[:have_rows, :, :have_slots] = kept.values
        all_rows, all_slots = self.cache[0].keys.size(0), self.cache[0].keys.size(2)
        if self.compiled == "step":
            return all_rows, all_slots
        if self.compiled == "blocks" and all_rows > 2:  # the code for one row is apart from that for several
            return max(rows, 2), slots
        return rows, slots

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], room: int | None = None) -> Tensor:
        """Start anew with a row for each prompt, of which the last block_size tokens are read.

        Returns logits (B, V), float32, of the token that follows each. `room` is for how many tokens beyond the prompts
        to have space from the start. Raises ValueError for an empty prompt.
        """
        if not prompts or not all(prompts):
            raise ValueError("a prompt has no tokens, or there is none: begin with the tokenizer's start_token")
        context = self.model.config.block_size
        longest = max(map(len, prompts))
        self.clear(len(prompts), None if room is None else longest + room)
        self.sequences = [list(prompt[-context:]) for prompt in prompts]
        with self._eager():
            return self.head(self._encode(list(range(len(prompts))))).float()

    def _encode(self, rows: list[int]) -> Tensor:
        """Read the sequences of some rows from their beginning: hidden states (R, C) of the last token of each."""
        sequences = [self.sequences[row] for row in rows]
        longest = max(map(len, sequences))
        tokens = torch.tensor([[*tokens, *repeat(0, longest - len(tokens))] for tokens in sequences])
        whole = len(rows) == len(self.sequences)
        cache = self.cache if whole else self._new_cache(len(rows), longest)
        with self._eager():
            views = [part.view(len(rows), longest, None) for part in cache]
            hidden = self.model.hidden(tokens.to(self._device), cache=views)
        for part, new in zip(self.cache, [] if whole else cache):
            part.keys[rows, :, :longest], part.values[rows, :, :longest] = new.keys, new.values
        last = torch.tensor([len(tokens) - 1 for tokens in sequences], device=self._device)
        return hidden[torch.arange(len(rows), device=self._device), last]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row: logits (B, V), float32, of the next."""
        return self.extend([[token] for token in tokens])[:, -1]

    @torch.inference_mode()
    def extend(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Append T tokens to each row: logits (B, T, V), float32, of the token after each of them.

        Raises ValueError for more than block_size.
        """
        size, live, context = len(chunks[0]), len(self.sequences), self.model.config.block_size
        if len(chunks) != live or any(len(chunk) != size for chunk in chunks):
            raise ValueError(f"{live} rows take as many chunks, all of one length: there are {len(chunks)}")
        if size > context:
            raise ValueError(f"{size} tokens are more than the context, block_size = {context}")
        self._slide(size)
        rows, slots = self._reserve(live, max(map(len, self.sequences)) + size)
        idle = [[0] * size] * (rows - live)  # rows that nobody reads
        tokens = torch.tensor([*chunks, *idle], device=self._device)
        previous = self._previous([*chunks, *idle])
        lengths = torch.tensor([*map(len, self.sequences), *repeat(0, rows - live)], device=self._device)
        if size > 1:
            with self._eager():
                logits = self.forward(tokens, lengths, slots, previous)
        elif self.compiled == "step":
            torch.compiler.cudagraph_mark_step_begin()  # the logits of the step before are no longer needed
            logits = self.one_step(tokens, lengths, slots, previous).clone()  # the next step writes where they lie
        else:
            logits = self.forward(tokens, lengths, slots, previous)
        for sequence, chunk in zip(self.sequences, chunks):
            sequence.extend(chunk)
        return logits[:live]

    def _slide(self, size: int) -> None:
        """Make every row forget what the context has no room for, if `size` tokens follow."""
        context = self.model.config.block_size
        full = [row for row, sequence in enumerate(self.sequences) if len(sequence) + size > context]
        kept = min(context - max(context // 4, 1), context - size)
        for row in full:
            self.sequences[row] = self.sequences[row][len(self.sequences[row]) - kept :]
        if full and kept:
            self._encode(full)

    def _previous(self, chunks: Sequence[Sequence[int]]) -> Tensor | None:
        """The tokens (B, T, n - 1) before each of those that rows go on by, for a model with n-grams."""
        count = self.model.config.ngrams - 1
        if not count:
            return None
        ends = [sequence[-count:] for sequence in self.sequences] + [[]] * (len(chunks) - len(self.sequences))
        rows = [[*repeat(0, count - len(end)), *end, *chunk] for end, chunk in zip(ends, chunks)]
        return torch.tensor(rows, device=self._device).unfold(1, count, 1)[:, :-1].flip(-1)

    def forward(self, tokens: Tensor, lengths: Tensor, slots: int, previous: Tensor | None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) that go on after `lengths` (B,) tokens, looking at so many slots."""
        positions = lengths[:, None] + torch.arange(tokens.size(1), device=tokens.device)
        views = [part.view(len(tokens), slots, positions) for part in self.cache]
        hidden = self.model.hidden(tokens, cache=views, previous=previous)
        return self.head(hidden).float()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; one may come several times, and those left out end."""
        slots = max(len(self.sequences[row]) for row in rows)
        self.sequences = [list(self.sequences[row]) for row in rows]
        self._reserve(len(rows), slots)
        moved = [place for place, row in enumerate(rows) if place != row]
        if not moved:
            return
        places, origins = torch.tensor([moved, [rows[place] for place in moved]], device=self._device)
        for part in self.cache:
            for kept in (part.keys, part.values):
                kept[places, :, :slots] = kept[origins, :, :slots]

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget the last tokens of each row, so many; all it has, where they are fewer."""
        self.sequences = [tokens[: max(len(tokens) - count, 0)] for tokens, count in zip(self.sequences, counts)]
