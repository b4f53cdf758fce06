"""Cached decoding against full forward passes, which know nothing of caches."""

import copy
import dataclasses
import os
import shutil
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_arc.decoding import linear
from gpt_arc.decoding.cache import BlockCache, buffers_of
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import UserError
from gpt_arc.nn.attention import KVCache
from gpt_arc.nn.names import Stretch
from helpers import randomised
from model import GPT, GPTConfig

TINY = GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=4, n_embd=32)
GROUPED = {"positions": "rotary", "n_kv_head": 2, "attention_band": 5, "norm": "rmsnorm", "qk_norm": True}
BIASED = {"tied_head": False, "head_bias": True}
STRETCHED = {"positions": "rotary", "rotary_factor": 4.0, "rotary_context": 5, "n_kv_head": 2}
DYNAMIC = STRETCHED | {"rotary_scaling": "dynamic"}
VARIANTS = [
    {}, {"positions": "sinusoidal"}, {"positions": "rotary"}, {"norm_position": "post"}, {"norm": "rmsnorm"},
    {"qk_norm": True}, {"n_kv_head": 1}, {"n_kv_head": 2}, {"head_size": 6}, {"activation": "swiglu"},
    {"ngrams": 2}, {"ngrams": 4, "ngram_rows": 50},
    {"attention_band": 1}, {"attention_band": 3}, {"attention_band": 50}, {"bias": False}, BIASED,
    {"attention_band": 3, "attention_sinks": 2},
    {"n_layer": 4, "attention_band": 2, "n_kv_head": 2, "positions": "sinusoidal", "norm_position": "post"},
    {"positions": "none"}, {"positions": "alibi"}, {"positions": "alibi", "attention_band": 3, "n_kv_head": 2},
    *(STRETCHED | {"rotary_scaling": kind} for kind in get_args(Stretch) if kind != "dynamic"),
    {**GROUPED, "activation": "swiglu", "bias": False, **BIASED},
    {"mixer": "lstm"}, {"mixer": "lstm", "positions": "none", "head_size": 6, "bias": False, "norm": "rmsnorm"},
]  # fmt: skip

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads would wait for each other at every tiny product: minutes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def name_of(change: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in change.items()) or "gpt2"


def tiny_gpt(**change) -> GPT:
    return randomised(GPT(dataclasses.replace(TINY, **change)))


def text_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(TINY.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def forward(model: GPT, text: list[int]) -> torch.Tensor:
    """The model's logits (T, V) for one text, in float32."""
    with torch.no_grad():
        return model(torch.tensor([text]))[0].float()


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


class Rows:
    """The documented rule, on lists: a row that would outgrow the context forgets, and is read from the beginning."""

    def __init__(self, model: GPT, prompts: list[list[int]]):
        self.model, self.context = model, model.config.block_size
        self.sequences = [prompt[-self.context :] for prompt in prompts]

    def last(self) -> torch.Tensor:
        return torch.stack([forward(self.model, text)[-1] for text in self.sequences])

    def extend(self, chunks: list[list[int]]) -> torch.Tensor:
        quarter = max(self.context // 4, 1)
        for text, chunk in zip(self.sequences, chunks):
            if len(text) + len(chunk) > self.context:
                while len(text) > self.context - quarter or len(text) + len(chunk) > self.context:
                    del text[0]
            text += chunk
        return torch.stack([forward(self.model, text)[-len(chunk) :] for text, chunk in zip(self.sequences, chunks)])


class Pair:
    """A decoder and its reference; every call compares the two."""

    def __init__(self, model: GPT, decoder: Decoder | None = None):
        self.model, self.decoder, self.seed = model, decoder or Decoder(model), 0

    def tokens(self, count: int) -> list[int]:
        self.seed += 1
        return text_of(count, self.seed)

    def read(self, lengths: list[int], room: int | None = None) -> None:
        prompts = [self.tokens(length) for length in lengths]
        self.rows = Rows(self.model, prompts)
        assert_same(self.decoder.read(prompts, room), self.rows.last())

    def extend(self, size: int) -> None:
        chunks = [self.tokens(size) for _ in self.rows.sequences]
        expected = self.rows.extend(chunks)
        if size == 1:
            assert_same(self.decoder.step([token for (token,) in chunks]), expected[:, -1])
        else:
            assert_same(self.decoder.extend(chunks), expected)

    def keep(self, rows: list[int]) -> None:
        self.decoder.keep(rows)
        self.rows.sequences = [list(self.rows.sequences[row]) for row in rows]

    def rewind(self, counts: list[int]) -> None:
        self.decoder.rewind(counts)
        for text, count in zip(self.rows.sequences, counts):
            del text[len(text) - count :]


def read_in_chunks(model: GPT, text: list[int], sizes: list[int]) -> torch.Tensor:
    """Logits of every position; the text is read in chunks of these sizes, then token by token."""
    decoder, logits, position = Decoder(model), [], 0
    decoder.clear(1, room=1)
    for size in [*sizes, *[1] * len(text)]:
        if chunk := text[position : position + size]:
            logits.append(decoder.extend([chunk])[0])
            position += len(chunk)
    return torch.cat(logits)


@pytest.mark.parametrize("change", VARIANTS, ids=name_of)
def test_logits_equal_the_full_forward(change):
    model, text = tiny_gpt(**change), text_of(12)
    expected = forward(model, text)
    for size in (1, 2, 3, 7, 12):
        assert_same(read_in_chunks(model, text, [size] * 12), expected)
    for length in (1, 2, 5, 12):
        decoder = Decoder(model)
        logits = [decoder.read([text[:length]]), *(decoder.step([token]) for token in text[length:])]
        assert_same(torch.cat(logits), expected[length - 1 :])


CHUNKED = [tiny_gpt(), tiny_gpt(**GROUPED, **BIASED), tiny_gpt(n_layer=4, attention_band=2, norm_position="post")]


@settings(max_examples=60, deadline=None)
@given(model=st.sampled_from(CHUNKED), length=st.integers(1, 12), sizes=st.lists(st.integers(1, 12), max_size=6))
def test_any_chunks_give_the_same_logits(model, length, sizes):
    text = text_of(length, seed=length)
    assert_same(read_in_chunks(model, text, sizes), forward(model, text))


@pytest.mark.parametrize("change", [*VARIANTS, DYNAMIC], ids=name_of)
def test_rows_of_different_lengths_are_independent(change):
    pair = Pair(tiny_gpt(**change))
    pair.read([1, 12, 5, 1, 8])
    pair.keep([0, 2, 3, 4])
    for size in (1, 2, 1):
        pair.extend(size)


@pytest.mark.parametrize("change", [*VARIANTS, DYNAMIC], ids=name_of)
def test_a_prompt_may_be_read_in_parts(change):
    model = tiny_gpt(**change)
    for prefill in (1, 5):
        pair = Pair(model, Decoder(model, prefill=prefill))
        pair.read([1, 12, 5, 6, 8])
        pair.keep([0, 2, 3, 4])
        for size in (1, 2, 3):
            pair.extend(size)


class RoundedCache(KVCache):
    """Keeps keys and values in float32, rounded to 255 steps of their largest absolute value."""

    def add(self, key, value):
        largest = [x.abs().amax(-1, keepdim=True) for x in (key, value)]
        rounded = [(x / most * 127).round() / 127 * most for x, most in zip((key, value), largest)]
        kept = super().add(*rounded)
        return (key, value) if self.positions is None else kept


@pytest.mark.parametrize("change", [{}, GROUPED, {"positions": "alibi"}, {"attention_band": 3}], ids=name_of)
def test_an_8_bit_cache_rounds_each_key_and_value(change, monkeypatch):
    model = tiny_gpt(**change)
    rounding, plain = Decoder(model, torch.int8), Decoder(model)
    view = BlockCache.view
    for length, size in ((5, 1), (3, 4)):
        logits = []
        for decoder in (rounding, plain):
            if decoder is plain:
                monkeypatch.setattr(BlockCache, "view", lambda *args: RoundedCache(*view(*args)))
            decoder.read([text_of(length), text_of(2, seed=3)], room=0)
            decoder.keep([1, 0, 0])
            logits += [decoder.extend([text_of(size, seed=s) for s in (5, 6, 7)]), decoder.step([1, 2, 3])]
            monkeypatch.setattr(BlockCache, "view", view)
        assert_same(logits[0], logits[2])
        assert_same(logits[1], logits[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_smaller_cache_is_close(dtype):
    model = tiny_gpt(block_size=64, **GROUPED)
    small, plain = Decoder(model, dtype), Decoder(model)
    for decoder in (small, plain):
        decoder.read([text_of(40)])
    for token in text_of(20):
        expected = plain.step([token])
        assert (small.step([token]) - expected).abs().max() < 0.05 * expected.std()
    sizes = [sum(kept.nbytes for kept in buffers_of(decoder.cache)) for decoder in (small, plain)]
    assert sizes[0] / sizes[1] == {torch.bfloat16: 1 / 2, torch.int8: (8 + 4) / (4 * 8)}[dtype]


def test_rows_may_be_dropped_reordered_and_copied():
    pair = Pair(tiny_gpt(**GROUPED))
    pair.read([2, 6, 4], room=1)
    for rows in ([2, 0], [1, 0], [0, 0, 1, 0, 1], [4, 3, 3, 0], [2]):
        pair.keep(rows)
        pair.extend(1)
        if rows != [2]:
            pair.rewind([1] * len(rows))
        pair.extend(2)
        pair.rewind([2] * len(rows))


def test_copies_of_a_row_are_independent():
    pair = Pair(tiny_gpt())
    pair.read([3])
    pair.keep([0, 0])
    for _ in range(4):
        pair.extend(1)
    assert pair.rows.sequences[0] != pair.rows.sequences[1]


def test_a_rewound_row_keeps_nothing_of_the_removed_tokens():
    pair = Pair(tiny_gpt(**GROUPED))
    pair.read([1, 5, 3])
    pair.extend(6)
    pair.rewind([6, 0, 4])
    pair.extend(1)
    pair.rewind([2, 8, 1])
    pair.extend(3)


@pytest.mark.parametrize("room", [None, 0, 1, 5, 100])
def test_the_cache_grows_when_it_is_full(room):
    pair = Pair(tiny_gpt())
    pair.read([2, 3], room)
    assert pair.decoder.cache[0].keys.size(2) == {None: 12, 0: 3, 1: 4, 5: 8, 100: 12}[room]
    for size in (1, 1, 2, 4, 1):
        pair.extend(size)
    assert 12 <= pair.decoder.cache[0].keys.size(2) <= 13


@pytest.mark.parametrize(
    ("lengths_before", "lengths_after"),
    [([9, 9, 4], [2, 5]), ([2], [7]), ([3], [1, 2, 3]), ([2, 1], [9]), ([9], [2, 2])],
)
@pytest.mark.parametrize("room", [None, 0, 1])
def test_reading_again_starts_afresh(lengths_before, lengths_after, room):
    pair = Pair(tiny_gpt(**GROUPED))
    for lengths in (lengths_before, lengths_after):
        pair.read(lengths, room)
        for size in (1, 2):
            pair.extend(size)


def test_cleared_rows_accept_any_chunks():
    pair = Pair(tiny_gpt())
    pair.read([4, 4])
    pair.decoder.clear(3, room=2)
    pair.rows = Rows(pair.model, [[], [], []])
    for size in (1, 3, 1):
        pair.extend(size)


def test_forgetting_worked_by_hand():
    model = tiny_gpt(block_size=8)
    decoder, text = Decoder(model), text_of(20)
    assert_same(decoder.read([text[:6]])[0], forward(model, text[:6])[-1])
    begins = [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]  # first tokens of the windows that end with tokens 6, 7, 8 ...
    for end, begin in enumerate(begins, start=6):
        assert_same(decoder.step([text[end]])[0], forward(model, text[begin : end + 1])[-1])


@pytest.mark.parametrize("change", [{}, {"positions": "sinusoidal"}, GROUPED], ids=name_of)
@pytest.mark.parametrize("context", [1, 2, 3, 4, 7, 9])
def test_a_full_row_forgets_the_oldest_quarter(context, change):
    pair = Pair(tiny_gpt(block_size=context, **change))
    pair.read([1])
    for _ in range(3 * context):
        pair.extend(1)


@pytest.mark.parametrize("change", [{}, GROUPED], ids=name_of)
@pytest.mark.parametrize("context", [2, 3, 4, 9])
def test_rows_of_different_lengths_fill_up_at_different_times(context, change):
    pair = Pair(tiny_gpt(block_size=context, **change))
    pair.read([1, context, context - 1, context // 2, 1], room=1)
    for _ in range(2 * context):
        pair.extend(1)
    pair.keep([4, 1, 1])
    for _ in range(context):
        pair.extend(1)


@pytest.mark.parametrize("context", [1, 2, 4, 9])
def test_chunks_may_exceed_the_context(context):
    for size in range(1, context + 1):
        pair = Pair(tiny_gpt(block_size=context, **GROUPED))
        pair.read([context, 1, max(context - 2, 1)])
        for _ in range(3):
            pair.extend(size)


def test_a_long_prompt_keeps_its_end():
    pair = Pair(tiny_gpt())
    pair.read([13, 12, 40, 2], room=3)
    assert list(map(len, pair.decoder.sequences)) == [12, 12, 12, 2]
    for size in (1, 2):
        pair.extend(size)


STATEFUL = [tiny_gpt(block_size=size, **change) for size in (1, 3, 9) for change in ({}, GROUPED, DYNAMIC)]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_sequence_of_calls_equals_reading_afresh(data):
    read_in_any_way(data)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_many_sequences_of_calls_equal_reading_afresh(data):
    read_in_any_way(data)


def read_in_any_way(data):
    pair = Pair(data.draw(st.sampled_from(STATEFUL)))
    context = pair.model.config.block_size
    calls = st.sampled_from(["read", "extend", "step", "step", "keep", "rewind"])
    for call in ["read", *data.draw(st.lists(calls, max_size=9))]:
        rows = len(pair.rows.sequences) if call != "read" else None
        if call == "read":
            lengths = data.draw(st.lists(st.integers(1, context + 2), min_size=1, max_size=4))
            pair.read(lengths, data.draw(st.none() | st.integers(0, 4)))
        elif call == "keep":
            pair.keep(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
        elif call == "rewind":
            pair.rewind([data.draw(st.integers(0, len(text))) for text in pair.rows.sequences])
        else:
            pair.extend(1 if call == "step" else data.draw(st.integers(1, context)))


def test_bad_prompts_and_chunks_are_refused():
    decoder = Decoder(tiny_gpt())
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="a prompt has no tokens"):
            decoder.read(prompts)
    decoder.read([[1, 2]])
    with pytest.raises(ValueError, match="13 tokens are more than the context, block_size = 12"):
        decoder.extend([text_of(13)])
    assert decoder.sequences == [[1, 2]]


def batches_of(model: GPT, monkeypatch) -> list[tuple[int, int]]:
    """Collects the shapes (rows, tokens) of the model's inputs."""
    batches, hidden = [], model.hidden

    def counted(tokens, **settings):
        batches.append(tuple(tokens.shape))
        return hidden(tokens, **settings)

    monkeypatch.setattr(model, "hidden", counted)
    return batches


def test_within_the_context_each_token_is_read_once(monkeypatch):
    model = tiny_gpt()
    batches, decoder = batches_of(model, monkeypatch), Decoder(model)
    decoder.read([text_of(5)])
    for token in text_of(4):
        decoder.step([token])
    decoder.extend([text_of(3)])
    assert batches == [(1, 5), (1, 1), (1, 1), (1, 1), (1, 1), (1, 3)]


def test_dropped_rows_cost_nothing(monkeypatch):
    model = tiny_gpt()
    batches, decoder = batches_of(model, monkeypatch), Decoder(model)
    decoder.read([text_of(3)] * 5)
    for rows in ([0, 1, 2, 3, 4], [4, 2, 1], [0]):
        decoder.keep(rows)
        decoder.step([7] * len(rows))
        decoder.extend([[7, 8]] * len(rows))
    assert batches == [(5, 3), (5, 1), (5, 2), (3, 1), (3, 2), (1, 1), (1, 2)]


def test_full_rows_are_encoded_again_once_per_quarter_of_the_context(monkeypatch):
    model = tiny_gpt(block_size=16)
    batches, decoder = batches_of(model, monkeypatch), Decoder(model)
    decoder.read([text_of(16), text_of(14)])
    for _ in range(5):
        decoder.step([3, 4])
    assert batches == [(2, 16), (1, 12), (2, 1), (2, 1), (1, 12), (2, 1), (2, 1), (1, 12), (2, 1)]


def test_each_reading_uses_the_model_s_current_weights():
    model = tiny_gpt(**BIASED)
    pair = Pair(model)
    pair.read([4, 2])
    for seed in (1, 2):
        before = forward(model, text_of(4))
        randomised(model, seed)
        assert not torch.allclose(forward(model, text_of(4)), before, atol=0.1)
        pair.read([4, 2])
        pair.extend(1)


@pytest.mark.parametrize("packed_from", [0, 1 << 18], ids=["packed", "plain"])
def test_a_prepared_model_gives_the_same_logits(packed_from, monkeypatch):
    monkeypatch.setattr(linear, "PACKED_FROM", packed_from)
    for change in ({}, {**GROUPED, **BIASED}):
        model = tiny_gpt(**change)
        decoder = Decoder(copy.deepcopy(model))
        decoder.prepare(rows=3, compile=False)
        pair = Pair(model, decoder)
        pair.read([4, 9, 1])
        for size in (1, 1, 3, 1):
            pair.extend(size)


@pytest.mark.parametrize(
    ("rows", "compile", "int8", "layout"),
    [(1, True, False, "plain"), (1, True, True, "int8"), (1, False, False, "packed"), (2, True, False, "packed")],
)
def test_prepare_lays_out_every_matrix_and_the_head(rows, compile, int8, layout, monkeypatch):
    monkeypatch.setattr(linear, "PACKED_FROM", 0)
    decoder = Decoder(tiny_gpt())
    decoder.prepare(rows, compile, int8)
    layers = [module for module in decoder.modules() if isinstance(module, linear.InferenceLinear)]
    assert len(layers) == 2 * 4 + 1 and decoder.head in layers and {layer.layout for layer in layers} == {layout}


@pytest.mark.parametrize(("rows", "compile"), [(1, False), (2, True), (2, False)])
def test_int8_needs_one_row_and_compiled_code(rows, compile):
    model = tiny_gpt()
    with pytest.raises(UserError, match="int8 is for one row at a time of compiled code on a CPU"):
        Decoder(model).prepare(rows, compile, int8=True)
    assert isinstance(model.blocks[0].mlp.up, torch.nn.Linear)


@pytest.fixture
def compilations():
    """The number of graphs compiled since the test began."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def prepared(model: GPT, rows: int, int8: bool = False) -> Pair:
    decoder = Decoder(copy.deepcopy(model))
    decoder.prepare(rows, compile=True, int8=int8)
    return Pair(model, decoder)


@needs_compiler
@pytest.mark.slow
def test_one_row_of_compiled_code_equals_the_full_forward(compilations):
    """The first step compiles the head and a block, dense or banded; nothing is compiled later."""
    pair = prepared(tiny_gpt(block_size=16, **GROUPED, **BIASED), rows=1)
    pair.read([4], room=1)
    assert compilations() == 0
    for size in [*[1] * 5, 3, *[1] * 8, 5, 1, 1]:
        pair.extend(size)
        assert compilations() == 1 + 1
    pair.rewind([6])
    pair.extend(1)
    pair.read([7])
    pair.extend(1)
    assert compilations() == 1 + 1


def rows_come_and_go(pair: Pair) -> None:
    pair.read([3, 9, 1], room=1)
    for size in [*[1] * 5, 3, *[1] * 10, 2, 1]:
        pair.extend(size)
    for rows in ([2, 0], [1], [0, 0]):
        pair.keep(rows)
        for size in (1, 1, 4, 1):
            pair.extend(size)
    pair.read([2, 6])
    pair.extend(1)


@needs_compiler
@pytest.mark.slow
def test_several_rows_of_compiled_code_equal_the_full_forward(monkeypatch, compilations):
    """The head and the blocks, which are all alike, are compiled once; a single row is computed as two."""
    monkeypatch.setattr(linear, "PACKED_FROM", 0)
    pair = prepared(tiny_gpt(block_size=16), rows=3)
    batches = batches_of(pair.decoder.model, monkeypatch)
    rows_come_and_go(pair)
    assert compilations() == 1 + 1
    assert {rows for rows, length in batches if length == 1} == {2, 3}


@pytest.mark.slow
@needs_compiler
def test_dimensions_that_are_equal_at_compilation_may_differ_later(compilations):
    """Compiled with as many rows as heads and slots."""
    pair = prepared(tiny_gpt(n_embd=9, n_head=3), rows=3)
    pair.read([2, 2, 2])
    pair.extend(1)
    for rows in ([0, 1], [0, 1, 0, 1]):
        pair.keep(rows)
        pair.extend(1)
    assert compilations() == 1 + 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("change", [GROUPED, {"positions": "alibi", "attention_band": 5, "n_kv_head": 2}], ids=name_of)
def test_several_rows_of_compiled_banded_attention_equal_the_full_forward(compilations, change):
    rows_come_and_go(prepared(tiny_gpt(block_size=16, **change), rows=3))
    assert compilations() == 1 + 1


@needs_compiler
@pytest.mark.slow
def test_compiled_8_bit_weights_equal_eager_ones(compilations):
    model = tiny_gpt(block_size=16)
    eager, compiled = copy.deepcopy(model), prepared(model, rows=1, int8=True).decoder
    plain = Decoder(eager)
    plain.head = linear.for_inference(eager, "int8")
    assert_same(compiled.read([text_of(3)]), plain.read([text_of(3)]))
    for token in text_of(15, seed=1):
        assert_same(compiled.step([token]), plain.step([token]))


@pytest.mark.parametrize("change", [{}, pytest.param(GROUPED, marks=pytest.mark.slow)], ids=name_of)
def test_the_step_compiled_for_gpus_has_fixed_shapes(change, compilations):
    """Traced as for a GPU, but run without one: every step takes all rows and slots, so one graph serves all."""
    pair = Pair(tiny_gpt(block_size=16, **change))
    compiled = torch.compile(pair.decoder.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    shapes = []

    def run(tokens, lengths, slots, previous):
        shapes.append((*tokens.shape, *lengths.shape, slots))
        return compiled(tokens, lengths, slots, previous)

    pair.decoder.one_step, pair.decoder.compiled, pair.decoder.fixed_slots = run, "step", 16
    rows_come_and_go(pair)
    assert set(shapes) == {(3, 1, 3, 16)} and compilations() == 1


def test_the_step_compiled_for_gpus_may_have_fewer_slots_than_the_context(monkeypatch):
    decoder, shapes = Decoder(model := tiny_gpt(block_size=16)), []

    def compiled(function, **settings):
        def run(tokens, lengths, slots, previous):
            shapes.append((len(tokens), slots))
            return function(tokens, lengths, slots, previous)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(Decoder, "_device", torch.device("meta"))  # anything but a CPU
    decoder.compile(slots=9)
    monkeypatch.undo()
    for lengths in ((3, 5), (2,)):  # fewer rows take as many as before
        prompts = [text_of(length) for length in lengths]
        steps = [step.tokens for step in generate(decoder, prompts, 4, Sampling(temperature=0.0))]
        assert steps == [step.tokens for step in generate(model, prompts, 4, Sampling(temperature=0.0))]
    assert set(shapes) == {(2, 9)}


@pytest.mark.parametrize("route", ["eager", "packed", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", [{}, {**GROUPED, **BIASED}], ids=name_of)
def test_decoding_in_bfloat16_is_as_precise_as_the_model(change, route, monkeypatch, compilations):
    """Against float32 with the same weights. Both round to 8 bits some tens of times, each time by at most 2^-9 of the
    value: together less than 2% of the logits' spread. The direction is chance, hence the margin of a half."""
    monkeypatch.setattr(linear, "PACKED_FROM", 0)
    model = tiny_gpt(**change).bfloat16()
    text, exact, decoder = text_of(12), copy.deepcopy(model).float(), Decoder(copy.deepcopy(model))
    if route == "packed":
        decoder.prepare(rows=3, compile=False)
    if route == "compiled":
        decoder.compiled = "blocks"
        for block in decoder.model.blocks:
            block.compile(dynamic=True, backend="aot_eager")
    logits = [decoder.read([text[:5]] * 3), *(decoder.step([token] * 3) for token in text[5:])]
    expected = forward(exact, text)[4:]
    assert {logit.dtype for logit in logits} == {torch.float32}
    model_error, decoder_error = (
        (x - expected).square().mean().sqrt() for x in (forward(model, text)[4:], torch.stack(logits)[:, 1])
    )
    assert decoder_error < 1.5 * model_error and model_error < 0.02 * expected.std()


@pytest.mark.parametrize("compile", [False, True])
def test_the_cache_has_the_weights_type_if_compiled_and_float32_otherwise(compile):
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder(tiny_gpt().to(dtype))
        decoder.prepare(rows=1, compile=compile)
        decoder.clear(rows=1)
        types = {tensor.dtype for slots in decoder.cache for tensor in (slots.keys, slots.values)}
        assert types == {dtype if compile else torch.float32}


def test_more_rows_need_no_more_slots():
    decoder = Decoder(GPT(GPTConfig(64, 11, 1, 2, 8)).eval())
    decoder.read([[1, 2, 3]], room=20)
    decoder.keep([0, 0, 0])
    assert decoder.cache[0].keys.shape == (3, 2, 23, 4)


class Operations(TorchDispatchMode):
    """Counts the operations that torch runs."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def test_keeping_rows_in_place_copies_nothing():
    decoder = Decoder(GPT(GPTConfig(16, 11, 1, 2, 8)).eval())
    decoder.read([[1, 2, 3], [4, 5, 6]])
    with Operations() as operations:
        decoder.keep([0, 1])
        decoder.keep([0])
        assert operations.count == 0 and decoder.sequences == [[1, 2, 3]]
        decoder.read([[1, 2, 3], [4, 5, 6]])
        before = operations.count
        decoder.keep([1])
        assert operations.count > before


def test_mismatched_chunks_are_refused_before_anything_changes():
    decoder = Decoder(GPT(GPTConfig(16, 11, 1, 2, 8)).eval())
    decoder.read([[1, 2, 3], [4, 5]])
    for chunks in ([[1]], [[1], [2, 3]]):
        with pytest.raises(ValueError, match="2 rows need 2 chunks of one length"):
            decoder.extend(chunks)
    assert decoder.sequences == [[1, 2, 3], [4, 5]]
