"""Reading and continuing sequences, each token once: every block remembers its keys and values.

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

import torch
import torch.fx.experimental._config
import torch.nn as nn
from torch import Tensor

from gpt_arc.errors import UserError
from gpt_arc.frozen import FrozenLinear, freeze, packable
from model import GPT, Memory


class Slots(nn.Module):
    """The memory of one block: keys and values (B, K, S, D)."""

    def __init__(self, model: GPT, rows: int, slots: int, dtype: torch.dtype):
        super().__init__()
        shape = rows, model.config.kv_heads, slots, model.config.head_width
        for name in ("keys", "values"):
            zeros = torch.zeros(shape, dtype=dtype, device=model.token_embedding.weight.device)
            self.register_buffer(name, zeros, persistent=False)

    def view(self, rows: int, slots: int, positions: Tensor | None) -> Memory:
        """The first rows and slots."""
        return Memory(self.keys[:rows, :, :slots], self.values[:rows, :, :slots], positions)


class Decoder(nn.Module):
    """The sequences that `model`, in eval mode, is reading. Between two `read`s it may be trained."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model
        self.texts: list[list[int]] = []  # what each row remembers
        self.memory = nn.ModuleList()  # one `Slots` a block
        self.head = model.logits
        self.compiled = False
        self.run = self.forward  # of one token a row

    def prepare(self, rows: int, compile: bool, int8: bool = False) -> None:
        """Lay the model out for decoding `rows` at a time; it can't be trained or saved any more.

        `compile`: see there. `int8` rounds the weights to 8 bits, for a single row of compiled code on a CPU.
        """
        on_cpu = self._device.type == "cpu"
        if int8 and not (on_cpu and compile and rows == 1):
            raise UserError("int8 is for one row at a time of compiled code on a CPU: batch_size 1 and compile True")
        if int8:
            self.head = freeze(self.model, "int8")
        elif on_cpu and compile and rows == 1:
            self.head = freeze(self.model, "plain")
        elif on_cpu and packable(self.model.token_embedding.weight.dtype):
            self.head = freeze(self.model, "packed")
        if compile:
            self.compile()

    def compile(self) -> None:
        """Compile what `step` computes, when it is first called.

        On a CPU a block, the same code for all of them and for any number of slots. On a GPU the whole step with fixed
        shapes, which CUDA graphs launch at once: there rows that `keep` leaves out go on costing.
        """
        self.compiled = True
        if self._device.type == "cpu":
            # or sizes that are equal when a block is compiled, of rows and heads perhaps, would have to stay so
            torch.fx.experimental._config.use_duck_shape = False
            parts = [*self.model.blocks, *([self.head] if isinstance(self.head, FrozenLinear) else [])]
            for part in parts:
                part.compile(dynamic=True)
        else:
            self.run = torch.compile(self.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def _eager(self) -> contextlib.AbstractContextManager:
        """In which the blocks run as they are: compiled ones are for one token a row."""
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()

    @property
    def _static(self) -> bool:
        """Whether a step is compiled for fixed shapes."""
        return self.run != self.forward

    @property
    def _device(self) -> torch.device:
        return self.model.token_embedding.weight.device

    def clear(self, rows: int, room: int | None = None) -> None:
        """Forget everything; there are `rows` empty rows, with memory for `room` tokens each (more is made as needed).

        None: the whole context.
        """
        context = self.model.config.block_size
        slots = context if room is None or self._static else min(max(room, 1), context)
        self.texts = [[] for _ in range(rows)]
        self._reserve(rows, slots, keep=False)

    def _slots(self, rows: int, slots: int) -> nn.ModuleList:
        dtype = self.model.token_embedding.weight.dtype
        if self._device.type == "cpu" and not self.compiled:
            dtype = torch.float32  # attention to one query in 16 bits takes the CPU's library three times as long
        return nn.ModuleList(Slots(self.model, rows, slots, dtype) for _ in self.model.blocks)

    def _reserve(self, rows: int, slots: int, keep: bool = True) -> None:
        """Have memory for so many rows and slots; `keep` what it holds."""
        if self.compiled and not self._static:  # all rows or slots would be another layout than some: compiled apart
            rows, slots = rows + (rows > 1), slots + 1
        old = self.memory
        have = old[0].keys.shape if old else (0, 0, 0)
        if have[0] >= rows and have[2] >= slots:
            return
        if not keep:
            self.memory = self._slots(rows, slots)
            return
        if slots > have[2]:  # by doubling, so that a long text is seldom copied
            slots = max(slots, min(2 * have[2], self.model.config.block_size))
        self.memory = self._slots(max(rows, have[0]), max(slots, have[2]))
        for new, kept in zip(self.memory, old):
            new.keys[: have[0], :, : have[2]], new.values[: have[0], :, : have[2]] = kept.keys, kept.values

    @torch.no_grad()
    def read(self, prompts: Sequence[Sequence[int]], room: int | None = None) -> Tensor:
        """Start anew with a row for each prompt, of which the last block_size tokens are read.

        Returns logits (B, V), float32, of the token that follows each. `room` is for how many tokens beyond the prompts
        to take memory now. Raises ValueError for an empty prompt.
        """
        if not prompts or not all(prompts):
            raise ValueError("a prompt has no tokens, or there is none: begin with the tokenizer's start_token")
        context = self.model.config.block_size
        longest = max(map(len, prompts))
        self.clear(len(prompts), None if room is None else longest + room)
        self.texts = [list(prompt[-context:]) for prompt in prompts]
        return self._encode(list(range(len(prompts))))

    def _encode(self, rows: list[int]) -> Tensor:
        """Read the texts of some rows from their beginning: logits (R, V) after the last token of each."""
        texts = [self.texts[row] for row in rows]
        longest = max(map(len, texts))
        tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=self._device)
        whole = len(rows) == len(self.texts)
        memory = self.memory if whole else self._slots(len(rows), longest)
        last = torch.tensor([len(text) - 1 for text in texts], device=self._device)
        with self._eager():
            hidden = self.model.hidden(tokens, memory=[slots.view(len(rows), longest, None) for slots in memory])
            logits = self.head(hidden[torch.arange(len(rows), device=self._device), last]).float()
        if not whole:
            for slots, part in zip(self.memory, memory):
                slots.keys[rows, :, :longest], slots.values[rows, :, :longest] = part.keys, part.values
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row: logits (B, V), float32, of the next."""
        return self.extend([[token] for token in tokens])[:, -1]

    @torch.no_grad()
    def extend(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Append T tokens to each row: logits (B, T, V), float32, of the token after each of them.

        Raises ValueError for more than block_size.
        """
        size, context = len(chunks[0]), self.model.config.block_size
        if len(chunks) != len(self.texts) or any(len(chunk) != size for chunk in chunks):
            raise ValueError(f"{len(self.texts)} rows take as many chunks, all of one length: there are {len(chunks)}")
        if size > context:
            raise ValueError(f"{size} tokens are more than the context, block_size = {context}")
        full = [row for row, text in enumerate(self.texts) if len(text) + size > context]
        if full:
            kept = min(context - max(context // 4, 1), context - size)
            for row in full:
                self.texts[row] = self.texts[row][len(self.texts[row]) - kept :]
            if kept:
                self._encode(full)
        live, slots = len(self.texts), max(map(len, self.texts)) + size
        self._reserve(live, slots)
        rows, _, all_slots, _ = self.memory[0].keys.shape
        if self._static:
            slots = all_slots  # and all rows
        else:  # compiled code for one row is apart from that for several
            rows = max(live, min(rows - 1, 2)) if self.compiled else live
        idle = [[0] * size] * (rows - live)  # rows that nobody reads
        tokens = torch.tensor([*chunks, *idle], device=self._device)
        lengths = torch.tensor([*map(len, self.texts), *repeat(0, rows - live)], device=self._device)
        if size == 1:
            if self._static:
                torch.compiler.cudagraph_mark_step_begin()  # the logits of the step before are no longer needed
            logits = self.run(tokens, lengths, slots)
            logits = logits.clone() if self._static else logits  # the next step writes where they lie
        else:
            with self._eager():
                logits = self.forward(tokens, lengths, slots)
        for text, chunk in zip(self.texts, chunks):
            text.extend(chunk)
        return logits[:live]

    def forward(self, tokens: Tensor, lengths: Tensor, slots: int) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) that go on after `lengths` (B,) tokens, looking at so many slots."""
        positions = lengths[:, None] + torch.arange(tokens.size(1), device=tokens.device)
        hidden = self.model.hidden(tokens, memory=[part.view(len(tokens), slots, positions) for part in self.memory])
        return self.head(hidden).float()

    @torch.no_grad()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; one may come several times, and those left out end."""
        slots = max(len(self.texts[row]) for row in rows)
        self.texts = [list(self.texts[row]) for row in rows]
        self._reserve(len(rows), slots)
        moved = [place for place, row in enumerate(rows) if place != row]
        if not moved:
            return
        places, origins = torch.tensor([moved, [rows[place] for place in moved]], device=self._device)
        for part in self.memory:
            for memory in (part.keys, part.values):
                memory[places, :, :slots] = memory[origins, :, :slots]

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget the last tokens of each row, so many; all it has, where they are fewer."""
        self.texts = [text[: max(len(text) - count, 0)] for text, count in zip(self.texts, counts)]
