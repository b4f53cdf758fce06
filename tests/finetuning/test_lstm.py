"""The LSTM in place of a GPT: as many weights, causal, and it learns."""

import dataclasses

import pytest
import torch

from gpt_arc.finetuning.lstm import LSTM
from gpt_arc.nn.meta import meta_device
from helpers import randomised
from model import GPT, GPTConfig

TINY = GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=2, n_embd=32)


def on_meta(kind, config):
    with meta_device():
        return kind(config)


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(512, 40_481, norm_position="post", init="gpt1"),
        GPTConfig(),
        GPTConfig(256, 98, 6, 6, 384, norm_position="post"),
        GPTConfig(256, 98, 4, 4, 128, positions="rotary", activation="swiglu", bias=False, tied_head=False),
    ],
)
def test_the_lstm_has_as_many_weights_as_the_gpt(config):
    expected, actual = (on_meta(kind, config).num_parameters() for kind in (GPT, LSTM))
    assert actual == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("width", [16, 32, 48])
def test_no_other_number_of_units_is_closer(width, positions):
    config = dataclasses.replace(TINY, n_embd=width, positions=positions)
    expected, actual, units = GPT(config).num_parameters(), LSTM(config).num_parameters(), LSTM(config).lstm.hidden_size
    for other_units in (units - 1, units + 1):
        size = 4 * other_units * (width + other_units + 2) + other_units * width + width
        present = 4 * units * (width + units + 2) + units * width + width
        assert abs(actual - expected) <= abs(actual - present + size - expected)


@pytest.mark.parametrize("settings", [{}, {"norm_position": "post"}, {"tied_head": False, "head_bias": True}])
def test_states_are_causal(settings):
    model = randomised(LSTM(dataclasses.replace(TINY, **settings)))
    tokens = torch.randint(0, 23, (2, 12), generator=torch.Generator().manual_seed(0))
    hidden = model.hidden(tokens)
    for place in (1, 6, 11):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 23
        changed_hidden = model.hidden(changed)
        assert torch.equal(changed_hidden[:, :place], hidden[:, :place])
        assert ((changed_hidden - hidden)[:, place:].abs().amax(-1) > 1e-6).all()
        torch.testing.assert_close(model.hidden(tokens[:, :place]), hidden[:, :place], rtol=1e-5, atol=1e-6)


def test_states_follow_the_published_recurrence():
    """Hochreiter and Schmidhuber's cell with a forget gate, one token at a time."""
    model = randomised(LSTM(dataclasses.replace(TINY, norm_position="post", vocab_size=5)))
    (tokens,) = torch.tensor([[3, 0, 4, 4, 1]])
    lstm, state, cell, states = model.lstm, torch.zeros(1), torch.zeros(1), []
    state = cell = torch.zeros(lstm.hidden_size)
    for token in tokens:
        x = model.token_embedding.weight[token]
        gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ state + lstm.bias_hh_l0
        entered, forgotten, candidate, shown = gates.chunk(4)
        cell = forgotten.sigmoid() * cell + entered.sigmoid() * candidate.tanh()
        state = shown.sigmoid() * cell.tanh()
        states.append(model.projection.weight @ state + model.projection.bias)
    torch.testing.assert_close(model.hidden(tokens[None])[0], torch.stack(states), rtol=1e-5, atol=1e-5)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="13 tokens are more than the context, block_size = 12"):
        LSTM(TINY).hidden(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_in_training(dtype):
    torch.manual_seed(0)
    model = LSTM(TINY)
    tokens = (torch.arange(13) + torch.arange(8)[:, None]) % 23
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = model(tokens[:, :-1], tokens[:, 1:]).total / tokens[:, 1:].numel()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 2.9 < losses[0] < 3.4 and losses[-1] < 0.5
    assert all(parameter.grad is not None for parameter in model.parameters())
