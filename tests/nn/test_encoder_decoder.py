"""Models with an encoder against torch.nn.Transformer, and how they decode."""

import itertools
import math

import pytest
import torch
from torch import nn

from gpt_arc.decoding.beam import beam_search
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import UserError
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.schedule import learning_rate_at
from gpt_arc.weights.directory import load_model, require_causal, save_model
from helpers import randomised
from model import GPT, GPTConfig

SIZES = dict(block_size=9, vocab_size=13, n_layer=3, encoder_layers=2, n_head=2, n_embd=8, mlp_size=20)
SETTINGS = dict(activation="relu", positions="sinusoidal", embedding_scale=math.sqrt(8))


def make(**settings):
    return randomised(GPT(GPTConfig(**SIZES | SETTINGS | settings)), scale=0.4)


def attention_of(attention):
    """Our tensors under the names of nn.MultiheadAttention."""
    if hasattr(attention, "qkv"):
        weight, bias = attention.qkv.weight, attention.qkv.bias
    else:
        parts = attention.query, attention.key_value
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    return {"in_proj_weight": weight, "in_proj_bias": bias, "out_proj.weight": attention.projection.weight,
            "out_proj.bias": attention.projection.bias}  # fmt: skip


def layer_of(block):
    """Our tensors under the names of nn.TransformerEncoderLayer, or of a decoder's with cross-attention."""
    norms = [block.attention_norm, *([block.cross_norm] if hasattr(block, "cross") else []), block.mlp_norm]
    modules = {f"norm{i}": norm for i, norm in enumerate(norms, 1)}
    modules |= {"linear1": block.mlp.up, "linear2": block.mlp.projection}
    state = {f"{name}.{kind}": tensor for name, m in modules.items() for kind, tensor in m.state_dict().items()}
    attentions = {"self_attn": block.attention} | ({"multihead_attn": block.cross} if hasattr(block, "cross") else {})
    return state | {f"{n}.{kind}": tensor for n, a in attentions.items() for kind, tensor in attention_of(a).items()}


def torchs(model):
    """nn.Transformer with the same weights; with post-norm it has no norms after the last layers, as in the paper."""
    config, pre = model.config, model.config.norm_position == "pre"
    layer = dict(d_model=config.n_embd, nhead=config.n_head, dim_feedforward=config.mlp_width, dropout=0.0)
    layer |= dict(activation="relu", batch_first=True, norm_first=pre)
    norms = [nn.LayerNorm(config.n_embd) if pre else None for _ in range(2)]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), config.encoder_layers, norms[0], False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), config.n_layer, norms[1])
    whole = nn.Transformer(config.n_embd, config.n_head, 1, 1, 1, 0.0, "relu", encoder, decoder, batch_first=True)
    for blocks, stack in ((model.encoder, encoder), (model.blocks, decoder)):
        for block, theirs in zip(blocks, stack.layers, strict=True):
            theirs.load_state_dict(layer_of(block))
    if pre:
        norms[0].load_state_dict(model.encoder_norm.state_dict())
        norms[1].load_state_dict(model.final_norm.state_dict())
    return whole.eval()


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@torch.no_grad()
def test_hidden_states_equal_those_of_torch(norm_position):
    model = make(norm_position=norm_position)
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(13, (3, length), generator=generator) for length in (9, 7))
    lengths = torch.tensor([9, 5, 1])
    padding = torch.arange(9) >= lengths[:, None]
    expected = torchs(model)(
        model.embed(source, torch.arange(9)),
        model.embed(target, torch.arange(7)),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(7),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    torch.testing.assert_close(
        model.hidden(target, source=model.encode(source, lengths)), expected, rtol=1e-5, atol=1e-5
    )
    alone = model.hidden(target[1:2], source=model.encode(source[1:2, :5]))
    torch.testing.assert_close(alone, expected[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"positions": "rotary", "n_kv_head": 1, "norm": "rmsnorm", "bias": False}])
@torch.no_grad()
def test_decoding_with_a_cache_equals_computing_the_whole_target(settings):
    model = make(**settings)
    decoder, source = Decoder(model), [3, 1, 4, 1, 5]
    decoder.read_source(source)
    steps = generate(decoder, [[0], [0]], 6, Sampling(temperature=0))
    rows = list(zip(*(step.tokens for step in steps)))
    tokens = [0]
    for _ in range(6):
        hidden = model.hidden(torch.tensor([tokens]), source=model.encode(torch.tensor([source])))
        tokens.append(int(model.logits(hidden)[0, -1].argmax()))
    assert rows == [tuple(tokens[1:])] * 2


@torch.no_grad()
def test_beams_find_the_likeliest_target_of_all():
    model = make(vocab_size=5)
    source = torch.tensor([[2, 3, 4]])
    best = {}
    for words in itertools.chain.from_iterable(itertools.product(range(1, 5), repeat=n) for n in range(4)):
        tokens = torch.tensor([[0, *words]])
        logs = model.logits(model.hidden(tokens, source=model.encode(source)))[0].log_softmax(-1)
        best[(*words, 0)] = sum(logs[i, token].item() for i, token in enumerate((*words, 0)))
    decoder = Decoder(model)
    decoder.read_source(source[0].tolist())
    found = beam_search(decoder, [0], 4, 256, length_penalty=0, stop_tokens=[0])
    ended = [beam for beam in found if beam.tokens[-1] == 0]
    expected = max(best, key=best.get)
    assert tuple(ended[0].tokens) == expected and ended[0].score == pytest.approx(best[expected], abs=1e-4)


def test_the_learning_rate_is_the_papers():
    """d^-.5 min(step^-.5, step warmup^-1.5), here with the peak in place of (d warmup)^-.5, steps from 1."""
    config = TrainingConfig(max_iters=1000, learning_rate=3.0, warmup_iters=99, schedule="inverse_sqrt", min_lr=0.0)
    for step in (1, 50, 99, 100, 101, 400, 1000):
        expected = 3.0 * 100**0.5 * min(step**-0.5, step * 100**-1.5)
        assert learning_rate_at(step - 1, config) == pytest.approx(expected)


def test_what_an_encoder_needs(tmp_path):
    model = make()
    save_model(model, None, tmp_path)
    loaded = load_model(tmp_path)[0]
    assert loaded.config == model.config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="turns sources into targets"):
        require_causal("model", model)
    with pytest.raises(ValueError, match="a source goes with an encoder"):
        model(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="a source has 10 tokens"):
        model.encode(torch.zeros(1, 10, dtype=torch.int64))
    for settings in ({"attention": "bidirectional"}, {"n_experts": 4}):
        with pytest.raises(ValueError, match="encoder_layers = 2"):
            GPTConfig(**SIZES | settings)
