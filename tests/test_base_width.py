"""base_width: learning rates that are right at one width are right at others (muP, arXiv:2203.03466)."""

import dataclasses
import math
from pydoc_data.topics import topics
from statistics import mean

import pytest
import torch
from torch import nn

import coordinate_check
from coordinate_check import SMALL, at, changes
from gpt_arc.planning.fits import best_rate
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater, build_optimizers
from model import GPT

CPU = torch.device("cpu")


def test_what_a_step_changes_does_not_depend_on_the_width():
    """The coordinate check: without base_width, logits move with the width."""
    assert changes(at(512)) == pytest.approx(changes(SMALL), rel=0.35)
    plain = dataclasses.replace(SMALL, base_width=None)
    (_, narrow_logits), (_, wide_logits) = changes(plain), changes(at(512, plain))
    assert wide_logits > 2.5 * narrow_logits


def test_the_check_is_drawn(tmp_path, monkeypatch, capsys):
    flags = ["--widths", "64", "128", f"--output={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["coordinate_check.py", *flags])
    coordinate_check.main()
    assert (tmp_path / "coordinate_check.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split()[-2:] for line in capsys.readouterr().out.splitlines() if line.startswith("with")]
    assert [float(value) for value in rows[2]] == pytest.approx([1.15, 1.05], abs=0.1)  # logits, as documented


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="--widths: 70 is not a multiple of 16"):
        coordinate_check.Options(widths=(64, 70))


def test_initial_weights_follow_the_width():
    torch.manual_seed(0)
    model = GPT(at(256))
    head, query = model.head.weight.std().item(), model.blocks[0].attention.qkv.weight.std().item()
    assert head == pytest.approx(0.02 / 4, rel=0.05) and query == pytest.approx(0.02 / 2, rel=0.05)
    assert model.blocks[0].mlp.projection.weight.std().item() == pytest.approx(0.02 / 2 / math.sqrt(4), rel=0.05)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_rates_and_decay_follow_the_width():
    model = GPT(at(256))
    config = TrainingConfig(learning_rate=0.1, weight_decay=0.2)
    groups = build_optimizers(model, config)["optimizer"].param_groups
    names = {p: name for name, p in model.named_parameters()}
    tables, matrices, vectors = ({names[p] for p in group["params"]} for group in groups)
    assert tables == {"token_embedding.weight"} and "head.weight" in matrices
    assert all(name.endswith(("bias", "norm.weight")) or "norm" in name for name in vectors)
    assert [group.get("rate", 1.0) for group in groups] == [1.0, 0.25, 1.0]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.8, 0.0]  # times the rate, as much as before


def test_at_its_own_width_nothing_changes():
    plain = dataclasses.replace(SMALL, base_width=None)
    torch.manual_seed(0)
    a = GPT(SMALL)
    torch.manual_seed(0)
    b = GPT(plain)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    groups = [build_optimizers(model, TrainingConfig())["optimizer"].param_groups for model in (a, b)]
    assert [len(group["params"]) for group in groups[0]] == [len(group["params"]) for group in groups[1]]


def test_a_tied_head_is_refused():
    with pytest.raises(ValueError, match="needs tied_head = false"):
        dataclasses.replace(SMALL, tied_head=True)


def test_other_modules_have_no_width():
    assert len(build_optimizers(nn.Linear(3, 3), TrainingConfig())["optimizer"].param_groups) == 2


def loss_after_training(config, rate, tokens, seed, steps=100):
    """Mean loss of the last quarter of `steps` updates by AdamW, each of 8 windows of `tokens`."""
    torch.manual_seed(seed)
    model, generator, losses = GPT(config), torch.Generator().manual_seed(1), []
    updater = Updater(model, TrainingConfig(learning_rate=rate, weight_decay=0.0, beta2=0.99), CPU, "float32")
    for step in range(steps):
        starts = torch.randint(len(tokens) - config.block_size - 1, (8, 1), generator=generator)
        windows = tokens[starts + torch.arange(config.block_size + 1)]
        loss = model(windows[:, :-1], windows[:, 1:])
        updater.backward(loss.total / loss.count)
        updater.update(rate * min(1, (step + 1) / 10, 2 * (steps - step) / steps), loss.total.detach())
        losses.append(loss.total.item() / loss.count.item())
    return sum(losses[-steps // 4 :]) / (steps // 4)


@pytest.mark.slow
def test_the_best_rate_at_a_width_is_the_best_at_four_times_the_width():
    """On the manual of Python by characters. docs/results/scaling.md has the best rates."""
    text = "".join(topics[name] for name in sorted(topics))[:200_000]
    characters = sorted(set(text))
    tokens = torch.tensor([characters.index(character) for character in text])
    config = dataclasses.replace(SMALL, block_size=32, vocab_size=len(characters), norm="layernorm", bias=False)
    best = {}
    for name, model, rates, seeds in (
        ("width 64", config, (2e-3, 4e-3, 8e-3), 3),  # the narrower the model, the more seeds differ
        ("width 256", at(256, config), (2e-3, 4e-3, 8e-3), 1),
        ("width 256, plain", dataclasses.replace(at(256, config), base_width=None), (5e-4, 1e-3, 2e-3), 1),
    ):
        losses = [mean(loss_after_training(model, rate, tokens, seed) for seed in range(seeds)) for rate in rates]
        best[name] = best_rate(rates, losses)
        print(name, *(f"{rate:g}: {loss:.3f}" for rate, loss in zip(rates, losses)), f"best {best[name]}", sep=", ")
    assert 1 / 1.5 < best["width 256"] / best["width 64"] < 1.5
    assert best["width 256, plain"] < best["width 64"] / 1.5
