"""The model against published sizes, other implementations and closed forms."""

import dataclasses
import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt_arc.nn import attention, head_loss
from gpt_arc.nn.attention import (
    attend_by_groups,
    attend_by_products,
    causal_mask,
    create_block_mask,
    positions_and_masks,
    repeat_heads,
)
from gpt_arc.nn.functional import dropout, ngram_ids, rotate, sinusoids
from gpt_arc.nn.head_loss import HeadLoss, add_product
from gpt_arc.nn.meta import meta_device
from gpt_arc.nn.names import Activation, Stretch
from gpt_arc.nn.positions import alibi_bias, alibi_slopes
from gpt_arc.settings import mistake
from gpt_arc.weights.huggingface import hf_tensors
from model import GPT, Attention, GPTConfig

TINY = GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=4, n_embd=32)
aten = torch.ops.aten
GPT1 = dict(norm_position="post", init="gpt1")


def on_meta(config: GPTConfig) -> GPT:
    with meta_device():
        return GPT(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPTConfig(8, 65, 4, 4, 64, tied_head=False, head_bias=True), 208_961),
        (GPTConfig(512, 40_478, **GPT1), 116_534_784),
        (GPTConfig(512, 40_478 + 3, **GPT1), 116_537_088),
        (GPTConfig(), 124_439_808),
        (GPTConfig(n_layer=24, n_head=16, n_embd=1024), 354_823_168),
        (GPTConfig(n_layer=36, n_head=20, n_embd=1280), 774_030_080),
        (GPTConfig(n_layer=48, n_head=25, n_embd=1600), 1_557_611_200),
        (GPTConfig(2048, n_layer=96, n_head=96, n_embd=12_288), 174_604_259_328),
    ],
)
def test_parameter_counts_are_the_published_models(config, expected):
    assert on_meta(config).num_parameters() == expected


def test_parameters_without_embeddings_are_12_l_c_squared_and_vectors():
    # Kaplan et al. count 12 L C^2; biases and norms add 13 C a layer, and 2 C of the final norm
    model = on_meta(GPTConfig())
    assert model.num_parameters(embeddings=False) == 12 * (12 * 768**2 + 13 * 768) + 2 * 768


@pytest.mark.parametrize("settings", [{}, {"tied_head": False, "head_bias": True}, {"ngrams": 4, "ngram_rows": 100}])
def test_parameters_without_embeddings_leave_out_tables_and_head(settings):
    char = GPTConfig(8, 65, 4, 4, 64, **settings)  # configs/char_tiny.toml has the second settings
    assert on_meta(char).num_parameters(embeddings=False) == 4 * (12 * 64**2 + 13 * 64) + 2 * 64 == 200_064


def random_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Sets weights and biases large enough that each affects the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 1:
                parameter.add_(1.0)


def copy_into_transformers(gpt: GPT, reference: torch.nn.Module) -> None:
    missing, unexpected = reference.load_state_dict(dict(hf_tensors(gpt)), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    reference.tie_weights()


@pytest.mark.parametrize("generation", ["GPT2", "OpenAIGPT"])
@pytest.mark.parametrize(
    ("layers", "heads", "width", "context", "vocab"), [(2, 4, 32, 12, 23), (3, 3, 48, 17, 101), (1, 5, 35, 9, 7)]
)
def test_logits_equal_transformers_gpts(generation, layers, heads, width, context, vocab):
    import transformers

    gpt = GPT(GPTConfig(context, vocab, layers, heads, width, **(GPT1 if generation == "OpenAIGPT" else {}))).eval()
    random_weights(gpt)
    size = dict(vocab_size=vocab, n_positions=context, n_embd=width, n_layer=layers, n_head=heads)
    config = getattr(transformers, f"{generation}Config")(**size)
    reference = getattr(transformers, f"{generation}LMHeadModel")(config).eval()
    copy_into_transformers(gpt, reference)
    tokens = torch.randint(vocab, (3, context), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(gpt(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_logits_equal_transformers_qwen3():
    """Rotary positions, RMSNorm, SwiGLU, qk-norm, grouped-query heads and a separate head size, all at once."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = GPTConfig(
        block_size=20, vocab_size=31, n_layer=2, n_head=6, n_embd=32, n_kv_head=2, head_size=10, mlp_size=44,
        norm="rmsnorm", norm_eps=1e-6, positions="rotary", rotary_base=5_000.0, activation="swiglu", bias=False,
        qk_norm=True,
    )  # fmt: skip
    gpt = GPT(config).eval()
    random_weights(gpt)
    reference = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=31, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, head_dim=10, max_position_embeddings=20, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 5_000.0}, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    copy_into_transformers(gpt, reference)
    tokens = torch.randint(31, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(gpt(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_causal_attention_worked_by_hand():
    """Four tokens with given scaled scores; those above the diagonal must not count."""
    scores = torch.tensor(
        [[0.675, 9, 9, 9], [0.475, 0.845, 9, 9], [0.535, 0.670, 1.045, 9], [0.520, 0.715, 0.835, 0.950]]
    )
    expected = torch.tensor(
        [[1, 0, 0, 0], [0.4085, 0.5915, 0, 0], [0.2625, 0.3004, 0.4371, 0], [0.195, 0.237, 0.268, 0.300]]
    )
    attention = Attention(GPTConfig(block_size=4, vocab_size=2, n_layer=1, n_head=1, n_embd=4, bias=False))

    class ScoresAsQueries(torch.nn.Module):
        """Keys and values are unit vectors; queries are twice the scores, which attention divides by sqrt(4)."""

        def forward(self, x):
            eye = torch.eye(4)[None]
            return torch.cat((2 * x, eye, eye), dim=-1)

    attention.qkv = ScoresAsQueries()
    attention.projection = torch.nn.Identity()
    weights = attention(scores[None], rotary=None, mask=None)[0]
    torch.testing.assert_close(weights, expected, atol=6e-4, rtol=0)
    values = torch.tensor([[1, 0.5, 0.3, 0.1], [0.2, 1, 0.7, 0.4]])
    torch.testing.assert_close(weights[1, :2] @ values, torch.tensor([0.53, 0.80, 0.54, 0.28]), atol=6e-3, rtol=0)


def variants():
    """One model per option, and some combinations."""
    changes = [
        {}, GPT1, {"norm": "rmsnorm"}, *({"positions": name} for name in ("sinusoidal", "rotary", "alibi", "none")),
        *({"positions": "rotary", "rotary_factor": 3.0, "rotary_context": 4, "rotary_scaling": kind}
          for kind in get_args(Stretch) if kind != "dynamic"),
        *({"activation": activation} for activation in get_args(Activation)[1:]), {"bias": False},
        {"tied_head": False}, {"head_bias": True}, {"qk_norm": True}, {"n_kv_head": 2}, {"n_kv_head": 1},
        {"head_size": 6}, {"mlp_size": 20}, {"attention_band": 4}, {"dropout": 0.3},
        {"positions": "rotary", "norm": "rmsnorm", "qk_norm": True, "n_kv_head": 2, "activation": "swiglu"},
        {"norm_position": "post", "positions": "rotary", "norm": "rmsnorm", "tied_head": False},
        {"positions": "alibi", "attention_band": 4, "n_kv_head": 2, "dropout": 0.3},
        {"mixer": "lstm"}, {"mixer": "lstm", "positions": "none", "head_size": 6, "bias": False},
    ]  # fmt: skip
    return [
        pytest.param(dataclasses.replace(TINY, **c), id=",".join(f"{k}={v}" for k, v in c.items())) for c in changes
    ]


@pytest.mark.parametrize("config", variants())
def test_every_position_sees_exactly_itself_and_the_past(config):
    model = GPT(config).eval()
    random_weights(model)
    tokens = torch.randint(config.vocab_size, (2, config.block_size))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % config.vocab_size
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
        shorter = model(tokens[:, :5])
        torch.testing.assert_close(shorter, model(tokens)[:, :5], atol=1e-4, rtol=1e-4)
    assert (difference[:5] == 0).all() and (difference[5:] > 0).all()


@pytest.mark.parametrize("config", variants())
def test_every_parameter_gets_a_gradient_in_float32_and_under_autocast(config):
    tokens = torch.randint(config.vocab_size, (2, config.block_size))
    for enabled in (False, True):
        model = GPT(config)
        random_weights(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(tokens, tokens)
        loss.total.backward()
        assert loss.total.dtype == torch.float32
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_loss_is_the_sum_over_scored_targets():
    model = GPT(TINY).eval()
    tokens = torch.randint(TINY.vocab_size, (3, 12))
    targets = torch.randint(TINY.vocab_size, (3, 12))
    targets[0, :7] = targets[2] = -1
    with torch.no_grad():
        loss = model(tokens, targets)
        probabilities = model(tokens).softmax(-1)
    by_hand = -sum(
        math.log(probabilities[b, t, targets[b, t]]) for b in range(3) for t in range(12) if targets[b, t] != -1
    )
    assert loss.count == 5 + 12
    assert float(loss.total) == pytest.approx(by_hand, rel=1e-5)
    assert loss.auxiliary == {}


def test_loss_of_a_batch_without_targets_is_zero():
    loss = GPT(TINY)(torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), -1))
    assert loss.total == 0 and loss.count == 0


def test_initial_loss_is_that_of_a_uniform_guess():
    config = dataclasses.replace(TINY, vocab_size=1000)
    tokens = torch.randint(1000, (8, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = GPT(config)(tokens, tokens.roll(-1, dims=1))
    assert float(loss.total / loss.count) == pytest.approx(math.log(1000), abs=0.1)


@pytest.mark.parametrize("init", ["gpt1", "gpt2"])
def test_initial_standard_deviations(init):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=500, n_layer=8, n_head=4, n_embd=128, init=init, tied_head=False))
    residual = 0.02 / math.sqrt(2 * 8) if init == "gpt2" else 0.02
    for name, parameter in model.state_dict().items():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            expected = residual if "projection" in name else 0.02
            if name == "position_embedding.weight" and init == "gpt2":
                expected = 0.01
            # five standard errors of a sample's standard deviation: sigma / sqrt(2 n) each
            tolerance = 5 * expected / math.sqrt(2 * parameter.numel())
            assert float(parameter.std()) == pytest.approx(expected, abs=tolerance), name
            assert abs(float(parameter.mean())) < 5 * expected / math.sqrt(parameter.numel()), name


def test_rotary_attention_depends_only_on_distances():
    query, key = torch.randn(2, 1, 1, 1, 8)
    scores = []
    for shift in (0, 3, 100):
        cosines, sines = sinusoids(torch.tensor([shift, shift + 5]), 8, 10_000.0)
        turned_query = rotate(query, cosines[1:], sines[1:])
        scores.append((turned_query * rotate(key, cosines[:1], sines[:1])).sum())
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores[2], scores[0], atol=1e-4, rtol=1e-4)


def test_rotary_is_multiplication_by_a_complex_number():
    x = torch.randn(1, 1, 5, 8)
    cosines, sines = sinusoids(torch.arange(5), 8, 100.0)
    as_complex = torch.complex(x[..., :4], x[..., 4:])
    frequencies = torch.tensor([100.0 ** (-i / 4) for i in range(4)])
    turned = as_complex * torch.polar(torch.ones(5, 4), torch.arange(5)[:, None] * frequencies)
    torch.testing.assert_close(rotate(x, cosines, sines), torch.cat((turned.real, turned.imag), dim=-1))


def test_grouped_query_heads_are_heads_with_copied_keys_and_values():
    grouped = GPT(dataclasses.replace(TINY, n_kv_head=2)).eval()
    random_weights(grouped)
    full = GPT(TINY).eval()
    state = full.state_dict()
    for name, tensor in grouped.state_dict().items():
        if ".qkv." in name:
            heads = tensor.unflatten(0, (4 + 2 + 2, 8))
            query, key, value = heads.split((4, 2, 2))
            tensor = torch.cat((query, key.repeat_interleave(2, 0), value.repeat_interleave(2, 0))).flatten(0, 1)
        state[name] = tensor
    full.load_state_dict(state)
    tokens = torch.randint(TINY.vocab_size, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(grouped(tokens), full(tokens), atol=1e-5, rtol=1e-5)


def test_each_dropout_acts_in_its_place_and_only_in_training():
    tokens = torch.randint(TINY.vocab_size, (4, 12))
    for place in ("embedding", "attention", "residual"):
        model = GPT(dataclasses.replace(TINY, **{f"{place}_dropout": 0.5}))
        random_weights(model)
        with torch.no_grad():
            assert not torch.equal(model(tokens), model(tokens)), place
            model.eval()
            assert torch.equal(model(tokens), model(tokens)), place


def test_ten_training_steps_equal_transformers_gpt2():
    """Losses of ten AdamW steps, from the same weights on the same data."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt = GPT(TINY)
    size = dict(vocab_size=23, n_positions=12, n_embd=32, n_layer=2, n_head=4)
    reference = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    copy_into_transformers(gpt, reference)
    losses = []
    for model in (gpt, reference):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses.append([])
        for step in range(10):
            window = (torch.tensor([[0], [5], [9], [14]]) + step % 2 + torch.arange(13)) % 23  # counts up
            if model is gpt:
                loss = model(window[:, :-1], window[:, 1:])
                loss = loss.total / loss.count
            else:
                logits = model(window[:, :-1]).logits
                loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


STRETCHED = {"positions": "rotary", "rotary_scaling": "ntk", "rotary_factor": 4.0}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_head": 5}, "n_head = 5 does not divide n_embd = 32"),
        ({"n_kv_head": 3}, "n_kv_head = 3 does not divide n_head = 4"),
        ({"positions": "rotary", "head_size": 7}, "head size 7 must be even"),
        ({"positions": "sinusoidal", "n_embd": 9, "n_head": 3}, "n_embd = 9 must be even"),
        ({"rotary_scaling": "ntk"}, 'rotary_scaling = "ntk" needs positions = "rotary"'),
        (STRETCHED | {"rotary_scaling": None}, "rotary_factor = 4.0 stretches nothing: choose a rotary_scaling"),
        (STRETCHED | {"rotary_scaling": "yarn"}, 'rotary_scaling = "yarn" needs rotary_context'),
        (STRETCHED | {"head_size": 2}, "2 are too few"),
        (STRETCHED | {"rotary_factor": 0.5}, "rotary_factor = 0.5 must be at least 1"),
        (STRETCHED | {"rotary_attention_factor": 1.1}, 'is for rotary_scaling = "yarn", not "ntk"'),
        (STRETCHED | {"rotary_fast": 1.0}, "rotary_fast = 1.0 must be more than rotary_slow = 1.0"),
        (
            {"attention": "bidirectional", "positions": "alibi"},
            'counts back from a token: it needs attention = "causal"',
        ),
        (
            {"attention": "bidirectional", "attention_band": 8},
            'a band of earlier tokens: it needs attention = "causal"',
        ),
        (
            {"mixer": "lstm", "positions": "rotary", "qk_norm": True},
            "mixer = lstm doesn't suit positions = rotary, qk_norm = True: leave mixer out, or set --positions=none "
            "--qk_norm=False",
        ),
        ({"mixer": "lstm", "n_kv_head": 2}, "doesn't suit n_kv_head = 2: leave mixer out, or set --n_kv_head=None"),
        ({"mixer": "lstm", "attention_sinks": 2}, "mixer = lstm doesn't suit attention_sinks = 2"),
        ({"mixer": "lstm", "rotary_factor": 2.0}, "mixer = lstm doesn't suit rotary_factor = 2.0"),
        (
            {"attention": "bidirectional", "attention_sinks": 2},
            "attention_sinks = 2 is for a band of earlier tokens: it",
        ),
        ({"mixer": "lstm", "attention": "bidirectional"}, "mixer = lstm doesn't suit attention = bidirectional"),
        ({"attention_sinks": 4}, "attention_sinks = 4 are seen beside an attention_band"),
        ({"attention_sinks": 4, "attention_band": 8, "positions": "alibi"}, "doesn't suit positions = alibi"),
        ({"encoder_layers": 1, "n_experts": 2}, "encoder_layers = 1: a decoder with an encoder needs"),
        ({"head_transform": True}, 'head_transform needs attention = "bidirectional"'),
        ({"dropout": 1.0}, "dropout = 1.0 must be between 0 and 1, 1 excluded"),
        ({"attention_dropout": -0.1}, "attention_dropout = -0.1"),
        ({"n_layer": 0}, "n_layer = 0 must be between 1 and 1024"),
        ({"mlp_size": 0}, "mlp_size = 0"),
        ({"attention_band": 0}, "attention_band = 0"),
        ({"ngrams": TINY.block_size + 1}, "are longer than the context, block_size = "),
        ({"norm_eps": 0.0}, "norm_eps = 0.0 must be more than 0"),
        ({"activation": "unknown"}, 'activation = "unknown" must be one of "gelu_tanh"'),
        ({"norm_position": "both"}, 'norm_position = "both"'),
    ],
)
def test_impossible_configurations_are_refused(settings, sentence):
    with pytest.raises(ValueError) as refused:
        dataclasses.replace(TINY, **settings)
    assert sentence in mistake(refused.value, GPTConfig)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="13 tokens are more than the context, block_size = 12"):
        GPT(TINY)(torch.zeros(1, 13, dtype=torch.int64))


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 3), size=st.integers(1, 4),
    norm=st.sampled_from(["layernorm", "rmsnorm"]), post=st.booleans(), bias=st.booleans(), tied=st.booleans(),
    positions=st.sampled_from(["learned", "sinusoidal", "rotary", "alibi", "none"]), qk_norm=st.booleans(),
    activation=st.sampled_from(get_args(Activation)), length=st.integers(1, 7),
)  # fmt: skip
def test_any_valid_configuration_runs(
    layers, kv_heads, group, size, norm, post, bias, tied, positions, qk_norm, activation, length
):
    config = GPTConfig(
        block_size=7, vocab_size=11, n_layer=layers, n_head=kv_heads * group, n_kv_head=kv_heads, head_size=2 * size,
        n_embd=8, norm=norm, norm_position="post" if post else "pre", bias=bias, tied_head=tied, positions=positions,
        qk_norm=qk_norm, activation=activation,
    )  # fmt: skip
    model = GPT(config)
    logits = model(torch.zeros(2, length, dtype=torch.int64))
    assert logits.shape == (2, length, 11) and logits.isfinite().all()
    assert model.num_parameters() == sum(tensor.numel() for tensor in model.state_dict().values())


def test_ngram_embeddings_are_added_to_token_embeddings():
    """The input of the blocks: equal n-grams read the same row of their length's table, whatever the vocabulary."""
    rows, longest = 997, 4
    config = dataclasses.replace(TINY, n_layer=1, positions="rotary", ngrams=longest, ngram_rows=rows)
    model = GPT(config)
    tokens = torch.randint(6, (5, 12), generator=torch.Generator().manual_seed(0))
    read = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: read.append(inputs[0].detach()))
    model(tokens)
    table = model.ngram_embedding.weight.detach()
    assert len(table) == (longest - 1) * rows
    for row, sequence in enumerate(tokens.tolist()):
        for place, token in enumerate(sequence):
            expected, key = model.token_embedding.weight[token].detach(), token
            for k in range(1, longest):  # Horner's rule from the last token backwards, 0 before the first
                key = (key * 1_640_531_527 + (sequence[place - k] + 1 if place >= k else 0)) % (2**31 - 1)
                expected = expected + table[key % rows + (k - 1) * rows]
            torch.testing.assert_close(read[0][row, place], expected)


def test_ngrams_rarely_share_a_row():
    """All bigrams of 40 tokens have their own row among 64,000; trigrams use at least as many rows as at random."""
    every = torch.cartesian_prod(*[torch.arange(40)] * 3)
    used = ngram_ids(every[:, 2:], torch.full((1,), 9), every[:, None, :2].flip(-1), 3, 40**3)
    assert used[..., 0].unique().numel() > 0.95 * 40**2
    assert used[..., 1].min() >= 40**3 and used[..., 1].max() < 2 * 40**3
    assert used[..., 1].unique().numel() / 40**3 > 0.98 * (1 - 1 / math.e)


def documents_of(rows: int, length: int, seed: int = 2) -> torch.Tensor:
    """Document numbers (rows, length): documents of random length, including one of a single token."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(rows, length, generator=generator) < 0.25
    begins[0, 3:5] = True
    return begins.cumsum(1)


BANDED = [
    {"ngrams": 3, "ngram_rows": 50},
    {"positions": "rotary", "n_kv_head": 2, "qk_norm": True},
    {"positions": "sinusoidal", **GPT1},
    {"positions": "alibi", "n_kv_head": 2},
    {"positions": "rotary", "rotary_scaling": "dynamic", "rotary_factor": 3.0, "rotary_context": 2},
]


WITH_SINKS = [change | {"attention_sinks": 2} for change in BANDED if change.get("positions") != "alibi"]


@pytest.mark.parametrize(
    "change, band",
    [
        *((change, band) for change in BANDED for band in (None, 1, 3, 5, 11)),
        *((change, 3) for change in WITH_SINKS),
        ({"mixer": "lstm"}, None),
    ],
    ids=str,
)
def test_documents_in_one_window_are_independent(change, band):
    config = dataclasses.replace(TINY, block_size=29, attention_band=band, **change)
    model = GPT(config).eval()
    random_weights(model)
    tokens, documents = torch.randint(23, (2, 29)), documents_of(2, 29)
    targets = torch.randint(23, (2, 29))
    together = model(tokens, documents=documents)
    loss = model(tokens, targets, documents).total
    alone_loss = 0.0
    for row in range(2):
        for document in documents[row].unique():
            inside = documents[row] == document
            single = model(tokens[row : row + 1, inside])
            torch.testing.assert_close(together[row, inside], single[0], atol=1e-5, rtol=1e-5)
            alone_loss += model(tokens[row : row + 1, inside], targets[row : row + 1, inside]).total
    torch.testing.assert_close(loss, alone_loss, atol=1e-4, rtol=1e-5)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, alone_loss)]
    for gradient, expected in zip(*gradients):
        torch.testing.assert_close(gradient, expected, atol=1e-4 * float(expected.abs().max()) + 1e-5, rtol=1e-4)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 4, 7, 12])
@pytest.mark.parametrize("band", [1, 2, 3, 5, 11, 12, 50])
def test_a_band_is_a_mask_over_the_scores(length, band, sinks):
    """Attention in chunks against the scores of every pair, masked one by one."""
    attention = torch.manual_seed(0) and Attention(dataclasses.replace(TINY, n_kv_head=2, qk_norm=True))
    x = torch.randn(2, length, 32)
    query, key, value = attention.qkv(x).unflatten(-1, (8, 8)).transpose(1, 2).split((4, 2, 2), dim=1)
    query, key = attention.query_norm(query), attention.key_norm(key).repeat_interleave(2, 1)
    scores = query @ key.transpose(-2, -1) / math.sqrt(8)
    for i in range(length):
        for j in range(length):
            if not (i - band < j <= i or j < sinks and j <= i):
                scores[..., i, j] = -math.inf
    mixed = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    expected = attention.projection(mixed.transpose(1, 2).flatten(2))
    earliest = (torch.arange(length) - band + 1).clamp(min=0).expand(2, length)
    mask = causal_mask(earliest, band, 0.0, len(earliest), sinks=sinks)
    torch.testing.assert_close(attention(x, None, mask), expected, atol=1e-5, rtol=1e-5)


def test_a_band_as_wide_as_the_context_is_dense_and_a_narrower_one_isnt():
    dense = GPT(dataclasses.replace(TINY, n_layer=3)).eval()
    random_weights(dense)
    tokens = torch.randint(23, (2, 12))

    def logits(band):
        model = GPT(dataclasses.replace(TINY, n_layer=3, attention_band=band)).eval()
        model.load_state_dict(dense.state_dict())
        return model(tokens)

    with torch.no_grad():
        for band in (12, 13, 1000):
            assert torch.equal(logits(band), dense(tokens))
        assert not torch.allclose(logits(11), dense(tokens))


def test_logits_equal_transformers_gpt_neo():
    """GPT-Neo alternates global and local attention as GPT-3 does. It has no query, key and value biases and doesn't
    divide the scores, so the queries are scaled beforehand."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    gpt = GPT(GPTConfig(24, 31, n_layer=4, n_head=2, n_embd=32, attention_band=5)).eval()
    random_weights(gpt)
    config = GPTNeoConfig(
        vocab_size=31, max_position_embeddings=24, hidden_size=32, num_layers=4, num_heads=2, window_size=5,
        attention_types=[[["global", "local"], 2]], activation_function="gelu_new",
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    reference = GPTNeoForCausalLM(config).eval()
    state = {
        "transformer.wte.weight": gpt.token_embedding.weight, "transformer.wpe.weight": gpt.position_embedding.weight,
        "transformer.ln_f.weight": gpt.final_norm.weight, "transformer.ln_f.bias": gpt.final_norm.bias,
    }  # fmt: skip
    for i, block in enumerate(gpt.blocks):
        torch.nn.init.zeros_(block.attention.qkv.bias)
        query, key, value = block.attention.qkv.weight.split(32)
        parts = {
            "ln_1": block.attention_norm, "attn.attention.out_proj": block.attention.projection,
            "ln_2": block.mlp_norm, "mlp.c_fc": block.mlp.up, "mlp.c_proj": block.mlp.projection,
        }  # fmt: skip
        tensors = {f"{name}.{kind}": w for name, module in parts.items() for kind, w in module.named_parameters()}
        tensors |= {f"attn.attention.{name}.weight": w for name, w in (("k_proj", key), ("v_proj", value))}
        tensors["attn.attention.q_proj.weight"] = query / math.sqrt(16)
        state |= {f"transformer.h.{i}.{name}": tensor for name, tensor in tensors.items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    reference.tie_weights()
    tokens = torch.randint(31, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(gpt(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_the_cost_of_banded_attention_grows_with_the_band():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(band, length, sinks=0):
        model = GPT(GPTConfig(length, 23, n_layer=2, n_head=4, n_embd=32, attention_band=band, attention_sinks=sinks))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model.hidden(torch.zeros(1, length, dtype=torch.int64))
        return counter.get_flop_counts()["Global"][torch.ops.aten.bmm]  # all but the linear layers

    dense = flops(None, 256)
    pair = 4 * 256 * 256 * 32  # scores and weighted values for all pairs, 2 FLOPs each
    assert dense == 2 * pair
    for band in (8, 16, 64):
        assert flops(band, 256) == pair + 4 * 256 * (2 * band) * 32
    assert flops(16, 256, sinks=4) == pair + 4 * 256 * (2 * 16 + 4) * 32
    assert flops(16, 512) - 4 * pair == 2 * (flops(16, 256) - pair)  # linear in the context


@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("band, sinks", [(None, 0), (50, 0), (50, 4)])
def test_flex_attention_as_compiled_for_gpus_equals_the_eager_path(band, sinks, traced, monkeypatch):
    """As for a GPU, traced or not, and run by the reference implementation: inductor's CPU kernels don't take masks."""
    shape = dict(n_layer=2, n_head=4, n_embd=64, n_kv_head=2, positions="rotary")
    model = GPT(GPTConfig(200, 23, attention_band=band, attention_sinks=sinks, **shape)).eval()
    random_weights(model)
    tokens, documents = torch.randint(23, (2, 200)), documents_of(2, 200)
    cases = ({"documents": documents}, {}) if band else ({"documents": documents},)
    with torch.no_grad():
        expected = [model(tokens, **case) for case in cases]
        monkeypatch.setattr("gpt_arc.nn.attention.FLEX_DEVICES", ("cpu",))
        used = []
        monkeypatch.setattr(
            "gpt_arc.nn.attention.create_block_mask", lambda *a, **k: used.append(1) or create_block_mask(*a, **k)
        )
        if traced:
            model.compile(backend="aot_eager")
        else:
            monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
            monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        for case, logits in zip(cases, expected):
            torch.testing.assert_close(model(tokens, **case), logits, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    assert used


# ---- the training step


def head_inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden, head, bias = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((rows, 8), (11, 8), (11,))
    )
    targets = torch.randint(-1, 11, (rows,), generator=generator)
    return hidden, head, bias, targets


def plain_loss(hidden, head, bias, targets):
    return F.cross_entropy(F.linear(hidden, head, bias).float(), targets, ignore_index=-1, reduction="sum")


def gradients_of(loss_of, *inputs):
    parameters = [x if x is None or not x.is_floating_point() else x.clone().requires_grad_() for x in inputs]
    loss = loss_of(*parameters)
    (0.37 * loss).backward()
    return loss.detach(), *(x.grad for x in parameters if x is not None and x.is_floating_point())


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("at_once", [1, 3 * 11, 1 << 20])
def test_the_loss_in_chunks_is_cross_entropy(rows, with_bias, at_once, monkeypatch):
    monkeypatch.setattr(head_loss, "logits_at_once", lambda device: at_once)
    hidden, head, bias, targets = head_inputs(rows)
    inputs = hidden, head, bias if with_bias else None, targets
    actual = gradients_of(lambda *x: HeadLoss.apply(*x, None, True), *inputs)
    for x, expected in zip(actual, gradients_of(plain_loss, *inputs), strict=True):
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    assert torch.allclose(HeadLoss.apply(*inputs, None, False), actual[0])


def test_the_gradient_of_logits_as_compiled_for_gpus_equals_the_other(monkeypatch):
    logits, target = torch.randn(6, 11), torch.randint(11, (6, 1))
    logits[:, 9:] = -math.inf  # surplus columns
    target %= 9
    expected = head_loss.log_probabilities(logits, target, torch.float32, True)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda size, device: arange(size))
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), to=logits.to, size=logits.size, dtype=logits.dtype)
    monkeypatch.setattr(torch.Tensor, "type_as", lambda x, other: x.to(other.dtype))
    actual = head_loss.log_probabilities(on_gpu, target, torch.float32, True)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
def test_rows_of_logits_that_are_aligned_for_gpus_change_nothing(with_bias, monkeypatch):
    monkeypatch.setattr(head_loss, "ALIGNED_DEVICES", ("cpu",))
    monkeypatch.setattr(head_loss, "logits_at_once", lambda device: 20 * 11)
    gradients = []
    monkeypatch.setattr(head_loss, "add_product", lambda *inputs: gradients.append(inputs[1]) or add_product(*inputs))
    hidden, head, bias, targets = head_inputs(50)
    inputs = hidden, head, bias if with_bias else None, targets
    actual = gradients_of(lambda *x: HeadLoss.apply(*x, None, True), *inputs)
    for x, expected in zip(actual, gradients_of(plain_loss, *inputs), strict=True):
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    assert gradients and all(gradient.size(0) == 11 and gradient.stride(1) == 64 for gradient in gradients)


def test_the_loss_in_chunks_is_as_precise_in_16_bits_as_autocast():
    inputs = head_inputs(500)
    exact = gradients_of(plain_loss, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        chunked, autocast = (
            gradients_of(lambda *x: HeadLoss.apply(*x, None, True), *inputs),
            gradients_of(plain_loss, *inputs),
        )
    for x, y, expected in zip(chunked, autocast, exact, strict=True):
        assert x.dtype == torch.float32
        assert (x - expected).norm() <= 1.5 * (y - expected).norm() + 1e-6 * expected.norm()


def test_each_cross_entropy_is_multiplied_by_its_weight(monkeypatch):
    monkeypatch.setattr(head_loss, "logits_at_once", lambda device: 7 * 11)
    inputs, weights = head_inputs(50), torch.rand(50, generator=torch.Generator().manual_seed(1))

    def weighted(hidden, head, bias, targets):
        losses = F.cross_entropy(F.linear(hidden, head, bias), targets, ignore_index=-1, reduction="none")
        return (losses * weights).sum()

    actual = gradients_of(lambda *x: HeadLoss.apply(*x, weights, True), *inputs)
    for x, expected in zip(actual, gradients_of(weighted, *inputs), strict=True):
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_the_loss_of_float64_inputs_is_float64():
    inputs = head_inputs(50, torch.float64)

    def exact_loss(hidden, head, bias, targets):
        return F.cross_entropy(F.linear(hidden, head, bias), targets, ignore_index=-1, reduction="sum")

    actual = gradients_of(lambda *x: HeadLoss.apply(*x, None, True), *inputs)
    for x, expected in zip(actual, gradients_of(exact_loss, *inputs), strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, expected, atol=1e-12, rtol=1e-12)


def test_a_frequent_token_with_a_large_feature_doesn_t_overflow_float16():
    """The head's gradient is summed before a loss scale multiplies it, so a smaller scale wouldn't help."""
    hidden = torch.full((4096, 4), 20.0)
    inputs = hidden, torch.zeros(11, 4), torch.zeros(11), torch.zeros(4096, dtype=torch.int64)
    exact = gradients_of(plain_loss, *inputs)
    assert exact[2].abs().max() * 2 > torch.finfo(torch.float16).max * 0.37  # a plain sum would overflow
    with torch.autocast("cpu", torch.float16):
        actual = gradients_of(lambda *x: HeadLoss.apply(*x, None, True), *inputs)
    for x, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(x, expected, atol=1e-3, rtol=2e-3)


def test_the_chunks_of_the_loss_have_one_size(monkeypatch):
    sizes = []
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda x, size: sizes.append(size) or split(x, size))
    monkeypatch.setattr(head_loss, "logits_at_once", lambda device: 100 * 11)
    HeadLoss.apply(*head_inputs(401), None, True)
    assert set(sizes) == {81}  # five equal chunks, not four of 100 and one of 1


def test_a_frozen_head_gets_no_gradient():
    hidden, head, bias, targets = head_inputs(9)
    hidden.requires_grad_()
    loss = HeadLoss.apply(hidden, head, bias, targets, None, True)
    saved_shapes = [None if x is None else x.shape for x in loss.grad_fn.saved_tensors]
    assert saved_shapes == [hidden.shape, None, bias.shape]
    loss.backward()
    assert hidden.grad.norm() > 0 and head.grad is None


def test_one_query_attends_by_groups_as_by_repeated_heads():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 8, 1, 6, generator=generator)
    key, value = (torch.randn(3, 2, 20, 6, generator=generator) for _ in range(2))
    allowed = (torch.arange(20) < torch.tensor([[20], [7], [1]]))[:, None, None]
    biases = alibi_bias(allowed, alibi_slopes(8), torch.tensor([[19], [6], [0]]))
    for mask in (allowed, biases):
        expected = F.scaled_dot_product_attention(query, repeat_heads(key, 8), repeat_heads(value, 8), mask)
        torch.testing.assert_close(attend_by_groups(query, key, value, mask, 0.0), expected)


def test_the_tiles_of_a_band_are_made_once_for_all_rows(monkeypatch):
    monkeypatch.setattr("gpt_arc.nn.attention.FLEX_DEVICES", ("cpu",))
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    config, tokens = GPTConfig(attention_band=50), torch.zeros(4, 300, dtype=torch.int64)
    for documents, rows in ((None, 1), (tokens, 4)):
        band = positions_and_masks(config, tokens, documents, None, None, 0.0)[1][1]
        assert band.kv_num_blocks.size(0) == rows


def test_repeated_heads_are_adjacent():
    x = torch.tensor([3.0, 5.0])[None, :, None, None]
    assert repeat_heads(x, 6).flatten().tolist() == [3, 3, 3, 5, 5, 5]
    assert repeat_heads(x, 2) is x


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("length", "kv_heads"), [(1, 4), (5, 2), (128, 1), (129, 4), (300, 2), (512, 4), (700, 4)])
def test_attention_by_products_equals_pytorch_s(length, kv_heads, documents):
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, 4, length, 6, generator=generator, requires_grad=True)
    key, value = (torch.randn(2, kv_heads, length, 6, generator=generator, requires_grad=True) for _ in range(2))
    outward = torch.randn(2, 4, length, 6, generator=generator)
    earliest = torch.arange(length) // 7 * 7 * torch.tensor([[1], [0]])
    mask = causal_mask(earliest, None, 0.0, len(earliest)) if documents else None
    actual = attend_by_products(query, key, value, mask, 0.0)
    expected = F.scaled_dot_product_attention(query, key, value, mask, is_causal=not documents, enable_gqa=True)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for x, y in zip(*(torch.autograd.grad(out, (query, key, value), outward) for out in (actual, expected))):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_attention_by_products_is_as_precise_in_16_bits_as_autocast():
    """Against plain products of 16-bit numbers with 16-bit results, as autocast computes them."""
    exact = [torch.randn(2, 4, 256, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    query, key, value = (x.bfloat16() for x in exact)
    expected = F.scaled_dot_product_attention(*exact, is_causal=True)
    hidden = torch.full((256, 256), -math.inf).triu(1)
    with torch.autocast("cpu", torch.bfloat16):
        plain = ((query @ key.mT).float() / 4 + hidden).softmax(-1) @ value
    actual = attend_by_products(query, key, value, None, 0.0)
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() < 1.2 * (plain - expected).norm() < 0.02 * expected.norm()


def test_dropout_zeroes_attention_weights_and_scales_the_others():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 3, 200, 200)
    value = torch.eye(200).expand(3, 200, 200)
    weights = attend_by_products(query[:, None][0], key[:, None][0], value[None], None, 0.0)
    dropped = attend_by_products(query[:, None][0], key[:, None][0], value[None], None, 0.25)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
    assert abs(kept.sum() / (weights != 0).sum() - 0.75) < 0.01


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.98])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_dropout_has_the_right_rate_and_independent_draws(rate, dtype):
    torch.manual_seed(0)
    x = torch.ones(301, 401, dtype=dtype, requires_grad=True)
    y = dropout(x, rate)
    kept = (y != 0).float()
    nothing, scale = y.unique().tolist()
    assert y.dtype == dtype and nothing == 0
    assert abs(scale * (1 - rate) - 1) < 2**-17 / (1 - rate) + (2**-8 if dtype == torch.bfloat16 else 1e-7)
    spread = math.sqrt(rate * (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < 4 * spread / math.sqrt(kept.numel())
    flat = kept.flatten() - kept.mean()
    for distance in (1, 2, 3, 4, 401):  # neighbours are uncorrelated, even within one 64-bit random number
        assert abs((flat[distance:] * flat[:-distance]).mean()) < 4.5 * spread**2 / math.sqrt(len(flat) - distance)
    y.backward(torch.full_like(y, 3))
    assert torch.equal(x.grad, 3 * y)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, rate), y)


@pytest.mark.slow
def test_compiled_dropout_draws_anew_per_call_and_matches_its_gradient():
    torch.manual_seed(0)
    x = torch.ones(64, 64, requires_grad=True)
    compiled = torch.compile(lambda x: (dropout(x, 0.5), dropout(x, 0.5)), fullgraph=True)
    layer_1, layer_2 = compiled(x)
    next_call, _ = compiled(x)
    for a, b in ((layer_1, layer_2), (layer_1, next_call)):
        assert abs(((a != 0) & (b != 0)).float().mean() - 0.25) < 0.03
    (gradient,) = torch.autograd.grad((layer_1 + 2 * layer_2).sum(), x)
    assert torch.equal(gradient, layer_1 + 2 * layer_2)


def test_products_are_used_in_16_bits_within_the_memory_limit(monkeypatch):
    """Float32 keeps PyTorch's attention."""

    def refused(*args):
        raise AssertionError("by products")

    monkeypatch.setattr(attention, "attend_by_products", refused)
    model, tokens = GPT(TINY), torch.zeros(2, 12, dtype=torch.int64)
    model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(AssertionError, match="by products"):
            model(tokens)
        monkeypatch.setattr(attention, "SCORES_KEPT", 2 * 4 * 12 * 12 - 1)
        model(tokens)


def test_activation_checkpointing_saves_memory_and_changes_no_result():
    saved_bytes, losses, gradients = [], [], []
    tokens = torch.randint(23, (4, 12), generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(TINY, dropout=0.1, n_layer=4))
        model.activation_checkpointing = checkpointing
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            loss = model(tokens, tokens).total
        loss.backward()
        saved_bytes.append(sum(sizes))
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert saved_bytes[1] < saved_bytes[0] / 2 and losses[0] == losses[1]
    assert all(torch.equal(x, y) for x, y in zip(*gradients))


@pytest.mark.parametrize("change", [{}, {"activation": "swiglu", "n_kv_head": 2, "bias": False}], ids=str)
def test_selective_checkpointing_multiplies_less_again_and_changes_no_result(change):
    """The blocks' products of the forward pass are counted: all once more, or the first of each MLP alone."""
    config = dataclasses.replace(TINY, dropout=0.1, **change)
    tokens = torch.randint(23, (4, 12), generator=torch.Generator().manual_seed(0))
    flops, gradients = {}, []
    for checkpointing in (False, "selective", True):
        torch.manual_seed(0)
        model = GPT(config)
        model.activation_checkpointing = checkpointing
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens).total.backward()
        flops[checkpointing] = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (aten.mm, aten.addmm))
        gradients.append([p.grad for p in model.parameters()])
    layers = [module for module in model.blocks[0].modules() if isinstance(module, nn.Linear)]
    again = {"selective": [model.blocks[0].mlp.up], True: layers}
    for checkpointing, layers in again.items():
        expected = sum(2 * layer.weight.numel() for layer in layers) * tokens.numel() * config.n_layer
        assert flops[checkpointing] - flops[False] == expected
    for other in gradients[1:]:
        assert all(torch.equal(x, y) for x, y in zip(gradients[0], other))


@pytest.mark.parametrize("change", [{}, dict(positions="rotary", attention_band=3, dropout=0.1)], ids=str)
def test_a_micro_batch_never_waits_for_the_device(change):
    """Tensors without values raise an error where one is read, as `.item()` does."""
    with FakeTensorMode():
        model, tokens = GPT(dataclasses.replace(TINY, **change)), torch.zeros(2, 12, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, tokens, tokens)
        (loss.total * 0.5).backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
        with pytest.raises(DataDependentOutputException):
            loss.total.item()


@pytest.mark.parametrize(
    "change",
    [
        {},
        pytest.param(
            dict(positions="rotary", norm="rmsnorm", qk_norm=True, n_kv_head=2), marks=pytest.mark.slow, id="modern"
        ),
    ],
)
@pytest.mark.parametrize(
    "checkpointing", [False, *(pytest.param(each, marks=pytest.mark.slow) for each in (True, "selective"))]
)
def test_the_step_is_compiled_once_into_one_graph(change, checkpointing):
    torch._dynamo.reset()
    counters.clear()
    model = GPT(dataclasses.replace(TINY, **change))
    model.activation_checkpointing = checkpointing
    model.compile(backend="aot_eager")
    for seed in range(4):
        tokens = torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, tokens)
        loss.total.backward()
        model.zero_grad()
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()
