"""An LSTM in place of attention: the recurrence by hand, and a run from training to sampling and scoring."""

import json
import math
from pathlib import Path

import pytest
import torch

import sample
import train
from gpt_arc.data.datasets import open_dataset
from gpt_arc.errors import UserError, entry_point
from gpt_arc.nn.attention_maps import attention_maps
from gpt_arc.nn.lstm import LSTMMixer
from gpt_arc.reports.attention import prompt_attention
from gpt_arc.weights.directory import load_text_model
from helpers import randomised
from model import GPTConfig
from stages import eval as evaluation

FLAGS = (
    "--block_size=16 --n_layer=2 --n_head=2 --n_embd=16 --positions=none --max_iters=40 --batch_size=4 --seed=1".split()
)


@pytest.mark.parametrize("bias", [False, True])
def test_the_mixer_follows_the_published_recurrence(bias):
    """One unit at a time, as Hochreiter and Schmidhuber's cell with a forget gate."""
    mixer = randomised(LSTMMixer(GPTConfig(8, 5, 1, 2, 6, head_size=2, bias=bias)))
    tensors = {name: tensor.double() for name, tensor in mixer.state_dict().items()}
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    state, cell, expected = torch.zeros(4).double(), torch.zeros(4).double(), []
    for row in x.double():
        before = state.clone()
        for unit in range(4):
            entered, kept, candidate, shown = (
                tensors["lstm.weight_ih_l0"][gate * 4 + unit] @ row
                + tensors["lstm.weight_hh_l0"][gate * 4 + unit] @ before
                + (tensors["lstm.bias_ih_l0"] + tensors["lstm.bias_hh_l0"] if bias else torch.zeros(16))[
                    gate * 4 + unit
                ]
                for gate in range(4)
            )
            cell[unit] = kept.sigmoid() * cell[unit] + entered.sigmoid() * candidate.tanh()
            state[unit] = shown.sigmoid() * cell[unit].tanh()
        expected.append(tensors["projection.weight"] @ state + (tensors["projection.bias"] if bias else 0))
    torch.testing.assert_close(mixer(x[None], None, None)[0], torch.stack(expected).float(), rtol=1e-5, atol=1e-5)


def test_a_run_is_trained_sampled_and_scored(workplace, stage_runner, output_of):
    """Greedy text, with the state kept, is that of full passes; the mean loss too."""
    flags = ("--mixer=lstm", "--device=cpu", "--dtype=float32", "--compile=False", "--out_dir=lstm", *FLAGS)
    stage_runner(train, "sums.toml", *flags)
    assert json.loads(Path("lstm/last/config.json").read_text())["mixer"] == "lstm"
    model, tokenizer = load_text_model("lstm")
    tokens = tokenizer.encode("1 times ")
    for _ in range(8):
        tokens.append(model.eval()(torch.tensor([tokens]))[0, -1].argmax().item())
    greedy = ("--temperature=0", "--max_new_tokens=8", "--start=1 times ", "--device=cpu", "--compile=False")
    assert output_of(entry_point(sample.main), "sample.py", "lstm", *greedy) == tokenizer.decode(tokens) + "\n"

    output_of(entry_point(evaluation.main), "eval.py", "lstm", "--perplexity", "sums", "--json=figures.json")
    split = open_dataset("sums", tokenizer, "dataset").split("val", 1, tokenizer.vocab_size, False)
    text, nats = [tokenizer.start_token, *split.read(0, len(split)).tolist()], 0.0
    for begin in range(0, len(text) - 1, 16):
        end = min(begin + 17, len(text))
        logits = model(torch.tensor([text[end - 17 : end - 1]]))[0].log_softmax(-1)
        nats -= logits[torch.arange(16), text[end - 16 : end]][begin + 17 - end :].sum().item()
    (figures,) = json.loads(Path("figures.json").read_text())["models"][0]["texts"].values()
    assert figures["perplexity"] == pytest.approx(math.exp(nats / (len(text) - 1)), rel=1e-5)

    with pytest.raises(ValueError, match="has no attention to show"):
        attention_maps(model, tokens)
    with pytest.raises(UserError, match="lstm has no attention to show, for its mixer is an lstm"):
        prompt_attention(Path("lstm"), "1 times")
