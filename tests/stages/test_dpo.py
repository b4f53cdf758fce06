"""stages/dpo.py as a user runs it: the optimum it approaches, its updates written out, resuming."""

import itertools
import json
import math
import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from gpt_arc.chat.format import TEMPLATES, ChatFormat, load_chat_model
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.training.checkpoints import load_state
from gpt_arc.training.log import read_metrics
from gpt_arc.training.optim import Updater
from gpt_arc.weights.directory import save_model
from helpers import command, interrupt_at, randomised
from model import GPT, GPTConfig
from policy_tree import (
    PLAIN,
    distribution,
    make_tree,
    optimum,
    save_chat_model,
    total_variation,
    utility,
    weights_of,
)
from ranked_texts import rankings, write
from stages import dpo

LETTERS = CharTokenizer("abcdefgh")
CHAT = ChatFormat.new(TEMPLATES["markers"], LETTERS, 8)
QUICK = ("--device=cpu", "--dtype=float32", "--learning_rate=1e-3", "--batch_size=2", "--gradient_accumulation_steps=2")
TRAIN = ("base", "--train=train.jsonl", "--warmup=0", *QUICK)


def config_of(**settings):
    return GPTConfig(**{"block_size": 16, "vocab_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16} | settings)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_chat_model(randomised(GPT(config_of(dropout=0.1))), CHAT, "base")
    write("train.jsonl", rankings(13))
    write("val.jsonl", rankings(6, seed=1))
    return tmp_path


@pytest.fixture
def run(workplace, stage_runner):
    return partial(stage_runner, dpo)


def lines_of(folder):
    return read_metrics(Path(folder) / "metrics.jsonl")


# ---- the optimum


def drawn_rankings(reference, count, responses, seed=0):
    """Responses drawn from the reference, ranked by utility and Gumbel noise: pairs as Bradley and Terry have them."""
    draw = random.Random(seed)
    outcomes, weights = list(reference), [math.exp(log) for log in reference.values()]
    for _ in range(count):
        chosen = draw.choices(outcomes, weights, k=responses)
        noisy = [utility(PLAIN.decode(outcome)) - math.log(-math.log(draw.random())) for outcome in chosen]
        yield [chosen[i] for i in sorted(range(responses), key=lambda i: -noisy[i])]


def likeliest(reference, rankings, beta):
    """The distribution over outcomes, any at all, whose DPO loss on the rankings is the lowest."""
    number = {outcome: i for i, outcome in enumerate(reference)}
    pairs = [(number[a], number[b]) for ranking in rankings for a, b in itertools.combinations(ranking, 2)]
    better, worse = torch.tensor(pairs).T
    ratios = torch.zeros(len(number), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([ratios], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -torch.nn.functional.logsigmoid(beta * (ratios[better] - ratios[worse])).mean()
        value.backward()
        return value

    optimizer.step(loss)
    logs = (torch.tensor(list(reference.values())) + ratios.detach()).log_softmax(0)
    return dict(zip(reference, logs.tolist()))


@pytest.mark.slow
def test_preferences_of_a_known_utility_lead_to_its_optimum(workplace):
    """What is left is the rankings': the distribution they make likeliest is as far from the optimum.

    A response that was cut at DEPTH can't be told from one that ended there in a file of texts, so the reference always
    ends: its last token is the end's.
    """
    make_tree()
    beta = 0.5
    reference = {outcome: log for outcome, log in distribution("tree").items() if outcome[-1] == PLAIN.end}
    z = math.log(sum(map(math.exp, reference.values())))
    reference = {outcome: log - z for outcome, log in reference.items()}
    assert len(reference) == 13
    drawn = list(drawn_rankings(reference, 8192, 4))
    write("train.jsonl", [{"prompt": "a", "responses": [PLAIN.decode(o) for o in ranking]} for ranking in drawn])
    flags = (
        f"--beta={beta} --epochs=6 --batch_size=256 --gradient_accumulation_steps=1 --learning_rate=3e-3 --warmup=0 "
        "--val_fraction=0 --device=cpu --dtype=float32"
    ).split()
    result = command("stages/dpo.py", "tree", "--train=train.jsonl", *flags, timeout=600)
    assert result.returncode == 0, result.stderr
    found = {outcome: log for outcome, log in distribution("out/dpo").items() if outcome[-1] == PLAIN.end}
    z = math.log(sum(map(math.exp, found.values())))
    found = {outcome: log - z for outcome, log in found.items()}
    best, likely = optimum(reference, beta), likeliest(reference, drawn, beta)
    assert total_variation(found, likely) < 0.01  # .003, and the next .010, of which the rankings make .009
    assert total_variation(found, best) < 0.03 < 0.4 < total_variation(reference, best)


# ---- an update, written out


def log_probability(model, prompt, response):
    """Of a response, computed token by token from hand-built tokens."""
    asked, answered = [9, *LETTERS.encode(prompt), 10], [*LETTERS.encode(response), 11]
    return sum(
        model(torch.tensor([asked + answered[:i]]))[0, -1].log_softmax(-1)[token] for i, token in enumerate(answered)
    )


def loss_of(model, reference, row, beta):
    """The mean over the pairs of a ranking, and of how many the better has the larger ratio."""
    ratios = [
        log_probability(model, row["prompt"], text) - log_probability(reference, row["prompt"], text).item()
        for text in row["responses"]
    ]
    pairs = [(i, j) for i, j in itertools.permutations(range(len(ratios)), 2) if row["ranks"][i] < row["ranks"][j]]
    margins = [beta * (ratios[i] - ratios[j]) for i, j in pairs]
    losses = [(1 + (-margin).exp()).log() for margin in margins]
    return (
        sum(losses) / len(pairs),
        sum(margin.item() > 0 for margin in margins) / len(pairs),
        sum(margins) / len(pairs),
    )


def test_updates_are_the_gradients_of_their_definition(run, monkeypatch):
    """The second one, since the first finds the model at the reference."""
    rows = rankings(6)
    write("train.jsonl", rows)
    found, update = [], Updater.update

    def recorded(self, *args):
        found.append(([p.detach().clone() for p in self.parameters], [p.grad.clone() for p in self.parameters]))
        return update(self, *args)

    monkeypatch.setattr(Updater, "update", recorded)
    run(*TRAIN, "--epochs=2", "--beta=0.3", "--batch_size=3", "--val=val.jsonl", "--grad_clip=0", "--adam_eps=1e-4")
    (model, *_), (reference, *_) = load_chat_model("base"), load_chat_model("base")
    model.eval(), reference.eval()
    lines = lines_of("out/dpo")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and len(found) == 2
    with torch.no_grad():
        for parameter, tensor in zip(model.parameters(), found[1][0]):
            parameter.copy_(tensor)
    losses, right, margins = zip(*(loss_of(model, reference, row, 0.3) for row in rows))
    assert lines[1]["loss"] == pytest.approx(sum(losses).item() / 6, rel=1e-4) and lines[1]["loss"] < 0.65
    assert lines[1]["accuracy"] == pytest.approx(sum(right) / 6, abs=1e-5)
    assert lines[1]["margin"] == pytest.approx(sum(margins).item() / 6, rel=1e-3)
    expected = torch.autograd.grad(sum(losses) / 6, list(model.parameters()))
    for mine, gradient in zip(found[1][1], expected):
        torch.testing.assert_close(mine, gradient, rtol=1e-3, atol=1e-4)
    after = load_chat_model("out/dpo/last")[0].eval()
    rows = map(json.loads, Path("val.jsonl").read_text().splitlines())
    losses, right, _ = zip(*(loss_of(after, reference, row, 0.3) for row in rows))
    assert lines[1]["val_loss"] == pytest.approx(sum(losses).item() / 6, rel=1e-4)
    assert lines[1]["val_accuracy"] == pytest.approx(sum(right) / 6, abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_position": "post", "positions": "sinusoidal"},
        {"positions": "rotary", "norm": "rmsnorm", "bias": False, "activation": "swiglu", "attention_band": 3},
        {"n_kv_head": 1, "tied_head": False, "head_bias": True},
    ],
)
def test_architectures(run, settings):
    save_chat_model(GPT(config_of(**settings)), CHAT, "base")
    run(*TRAIN, "--epochs=3", "--learning_rate=1e-2")
    lines = lines_of("out/dpo")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["loss"] < 0.68


# ---- one process, several, all at once, in parts


def test_batching_and_processes_change_only_rounding(run):
    """13 rankings in updates of 4, the last of 1: then one of two processes has nothing to do."""
    flags = (*TRAIN, "--val=val.jsonl", "--adam_eps=1e-4", "--epochs=2")
    run(*flags, "--out_dir=whole", "--batch_size=4", "--gradient_accumulation_steps=1")
    run(*flags, "--out_dir=parts", "--batch_size=1", "--gradient_accumulation_steps=4",
        "--activation_checkpointing=True")  # fmt: skip
    result = command("stages/dpo.py", *flags, "--backend=gloo", "--out_dir=two", processes=2, torchrun=True)
    assert result.returncode == 0 and result.stdout.count("finished step 8") == 1, result.stderr
    for name in ("parts", "two"):
        torch.testing.assert_close(weights_of("whole/last"), weights_of(f"{name}/last"), rtol=1e-3, atol=1e-5)
        for line, other in zip(lines_of("whole")[1:], lines_of(name)[1:], strict=True):
            assert other == {key: pytest.approx(value, rel=1e-3, abs=1e-4) for key, value in line.items()}
    moved = weights_of("whole/last")["blocks.0.mlp.up.weight"] - weights_of("base")["blocks.0.mlp.up.weight"]
    assert moved.abs().max() > 1e-3


# ---- runs that stop

STOPPABLE = (*TRAIN, "--val=val.jsonl", "--epochs=2")


def assert_same_runs(a, b):
    for place in ("last", "best"):
        first, second = weights_of(f"{a}/{place}"), weights_of(f"{b}/{place}")
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert lines_of(a) == lines_of(b)
    assert load_state(Path(a, "last"))["progress"] == load_state(Path(b, "last"))["progress"]


@pytest.mark.parametrize("updates", [2, 4])  # within an epoch, and at its end
def test_an_interrupted_run_resumes_exactly(run, monkeypatch, updates):
    run(*STOPPABLE, "--out_dir=whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, updates - 1)  # at which the next one looks
        stopped = run(*STOPPABLE, "--out_dir=halves")
    assert stopped.code == 130
    assert f"stopped after step {updates}, saved; resume with: python dpo.py --resume=halves" in stopped.output
    assert f"halves, from step {updates}" in run("halves", "--resume=True")
    assert_same_runs("whole", "halves")
    save_chat_model(randomised(GPT(config_of()), 7), CHAT, "base")
    refused = run("halves", "--resume=True")
    assert refused.code == 2 and "was started on other data or another model" in refused.message


def test_a_crashed_run_resumes_from_its_last_epoch(run, monkeypatch):
    """Nothing is written where it breaks, as where it is killed."""
    update, made = Updater.update, []

    def counted(self, *args):
        made.append(1)
        return update(self, *args) if len(made) < 6 else 1 / 0

    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(Updater, "update", counted)
        patched.setattr(sys, "argv", ["dpo.py", *STOPPABLE, "--out_dir=broken"])
        dpo.main()
    assert len(lines_of("broken")) == 5
    assert "broken, from step 4" in run("broken", "--resume=True")
    run(*STOPPABLE, "--out_dir=whole")
    assert_same_runs("whole", "broken")


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("base",), "name the rankings to learn from by --train"),
        (("mute", *TRAIN[1:]), "mute doesn't know how turns are marked (chat.json): train it by stages/sft.py first"),
        ((*TRAIN, "--train=none.jsonl"), "there is no file none.jsonl"),
        ((*TRAIN, "--train=ties.jsonl"), "no ranking of the train split fits into 16 tokens"),
        ((*TRAIN, "--beta=0"), "beta = 0.0 must be more than 0"),
        ((*TRAIN, "--epochs=0"), "epochs = 0 must be at least 1"),
        ((*TRAIN, "--out_dir=base"), "out_dir = base holds the model that model names"),
        (("base", "--resume=True"), "base is not a run of dpo.py that could go on"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(run, flags, message):
    write("ties.jsonl", [{"prompt": "a", "responses": ["a", "b"], "ranks": [1, 1]}])
    save_model(GPT(config_of()), LETTERS, "mute")
    refused = run(*flags)
    assert refused.code == 2 and message in refused.message and refused.message.count("\n") == 1, refused.message
    assert refused.message.startswith("dpo.py: ") and not Path("out").exists()
