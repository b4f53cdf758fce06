"""stages/dpo.py as a user runs it: the optimum it approaches, an update by hand, resuming."""

import itertools
import json
import math
import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from gpt_arc.chat.format import load_chat_model
from gpt_arc.training.checkpoints import load_state
from gpt_arc.training.optim import Updater
from gpt_arc.weights.directory import save_model
from helpers import command, interrupt_at, lines_of, randomised, untimed, write
from model import GPT
from policy_tree import (
    PLAIN,
    distribution,
    hash_utility,
    make_tree,
    optimum,
    save_chat_model,
    total_variation,
    weights_of,
)
from ranked_texts import CHAT, LETTERS, QUICK, rankings, tiny_config
from stages import dpo

TRAIN = ("base", "--train=train.jsonl", "--warmup=0", *QUICK)


config_of = partial(tiny_config, n_layer=2)


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


# ---- the optimum


def drawn_rankings(reference, count, responses, seed=0):
    """Responses drawn from the reference and ranked by utility plus Gumbel noise: Bradley-Terry pairs."""
    draw = random.Random(seed)
    outcomes, weights = list(reference), [math.exp(log) for log in reference.values()]
    for _ in range(count):
        chosen = draw.choices(outcomes, weights, k=responses)
        noisy = [hash_utility(PLAIN.decode(outcome)) - math.log(-math.log(draw.random())) for outcome in chosen]
        yield [chosen[i] for i in sorted(range(responses), key=lambda i: -noisy[i])]


def likeliest(reference, rankings, beta):
    """The distribution over outcomes with the lowest DPO loss on the rankings."""
    number = {outcome: i for i, outcome in enumerate(reference)}
    pairs = [(number[a], number[b]) for ranking in rankings for a, b in itertools.combinations(ranking, 2)]
    winners, losers = torch.tensor(pairs).T
    ratios = torch.zeros(len(number), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([ratios], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -torch.nn.functional.logsigmoid(beta * (ratios[winners] - ratios[losers])).mean()
        value.backward()
        return value

    optimizer.step(loss)
    logs = (torch.tensor(list(reference.values())) + ratios.detach()).log_softmax(0)
    return dict(zip(reference, logs.tolist()))


@pytest.mark.slow
def test_preferences_of_a_known_utility_lead_to_its_optimum(workplace):
    """The remaining distance comes from the rankings: the distribution with the lowest loss is as far from the optimum.

    In a file of texts, a response cut at DEPTH can't be told from one that ended there, so the reference is restricted
    to responses that end with the end token."""
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
    trained = {outcome: log for outcome, log in distribution("out/dpo").items() if outcome[-1] == PLAIN.end}
    z = math.log(sum(map(math.exp, trained.values())))
    trained = {outcome: log - z for outcome, log in trained.items()}
    best, likely = optimum(reference, beta), likeliest(reference, drawn, beta)
    assert total_variation(trained, likely) < 0.01  # measured .003; the next is .010, .009 of it from the rankings
    assert total_variation(trained, best) < 0.03 < 0.4 < total_variation(reference, best)


# ---- an update by hand


def log_probability(model, prompt, response):
    """The log-probability of a response, token by token, from tokens put together by hand."""
    prompt_tokens, response_tokens = [9, *LETTERS.encode(prompt), 10], [*LETTERS.encode(response), 11]
    return sum(
        model(torch.tensor([prompt_tokens + response_tokens[:i]]))[0, -1].log_softmax(-1)[token]
        for i, token in enumerate(response_tokens)
    )


def loss_of(model, reference, row, beta):
    """The means over a ranking's pairs of loss, accuracy and margin."""
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


def test_an_update_is_the_gradient_of_its_definition(run, monkeypatch):
    """The second update, since the first one starts at the reference."""
    rows = rankings(6)
    write("train.jsonl", rows)
    states, update = [], Updater.update

    def recorded(self, *args):
        states.append(([p.detach().clone() for p in self.parameters], [p.grad.clone() for p in self.parameters]))
        return update(self, *args)

    monkeypatch.setattr(Updater, "update", recorded)
    run(*TRAIN, "--epochs=2", "--beta=0.3", "--batch_size=3", "--val=val.jsonl", "--grad_clip=0", "--adam_eps=1e-4")
    (model, *_), (reference, *_) = load_chat_model("base"), load_chat_model("base")
    model.eval(), reference.eval()
    lines = lines_of("out/dpo")
    assert lines[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-4) and len(states) == 2
    with torch.no_grad():
        for parameter, tensor in zip(model.parameters(), states[1][0]):
            parameter.copy_(tensor)
    losses, right, margins = zip(*(loss_of(model, reference, row, 0.3) for row in rows))
    assert lines[1]["train_loss"] == pytest.approx(sum(losses).item() / 6, rel=1e-4) and lines[1]["train_loss"] < 0.65
    assert lines[1]["accuracy"] == pytest.approx(sum(right) / 6, abs=1e-5)
    assert lines[1]["margin"] == pytest.approx(sum(margins).item() / 6, rel=1e-3)
    expected = torch.autograd.grad(sum(losses) / 6, list(model.parameters()))
    for actual, gradient in zip(states[1][1], expected):
        torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-4)
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
    assert lines[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["train_loss"] < 0.68


# ---- batches and processes


@pytest.mark.slow
def test_batching_and_processes_change_only_rounding(run):
    """13 rankings in updates of 4, so the last update has one, and one of two processes has none."""
    flags = (*TRAIN, "--val=val.jsonl", "--adam_eps=1e-4", "--epochs=2")
    run(*flags, "--out_dir=whole", "--batch_size=4", "--gradient_accumulation_steps=1")
    run(*flags, "--out_dir=parts", "--batch_size=1", "--gradient_accumulation_steps=4",
        "--activation_checkpointing=True")  # fmt: skip
    for name, mode in {"two": "ddp", "shards": "fsdp"}.items():
        several = f"--parallel={mode}", "--backend=gloo", f"--out_dir={name}"
        result = command("stages/dpo.py", *flags, *several, processes=2, torchrun=True)
        assert result.returncode == 0 and result.stdout.count("finished step 8") == 1, result.stderr
    for name in ("parts", "two", "shards"):
        torch.testing.assert_close(weights_of("whole/last"), weights_of(f"{name}/last"), rtol=1e-3, atol=1e-5)
        for expected, line in zip(lines_of("whole")[1:], lines_of(name)[1:], strict=True):
            assert line == {key: pytest.approx(value, rel=1e-3, abs=1e-4) for key, value in expected.items()}
    moved = weights_of("whole/last")["blocks.0.mlp.up.weight"] - weights_of("base")["blocks.0.mlp.up.weight"]
    assert moved.abs().max() > 1e-3


# ---- interrupted runs

STOPPABLE = (*TRAIN, "--val=val.jsonl", "--epochs=2")


def assert_same_runs(a, b):
    for place in ("last", "best"):
        weights_a, weights_b = weights_of(f"{a}/{place}"), weights_of(f"{b}/{place}")
        assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)
    assert lines_of(a) == lines_of(b)
    progress = [load_state(Path(folder, "last"))["progress"] for folder in (a, b)]
    assert untimed(progress[:1]) == untimed(progress[1:])


@pytest.mark.parametrize("updates", [2, 4])  # within an epoch and at its end
def test_an_interrupted_run_resumes_exactly(run, monkeypatch, updates):
    run(*STOPPABLE, "--out_dir=whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, updates - 1)  # the next update notices it
        stopped = run(*STOPPABLE, "--out_dir=halves")
    assert stopped.code == 130
    assert f"stopped after step {updates}, saved; resume with: python dpo.py --resume=halves" in stopped.output
    assert f"halves, from step {updates}" in run("halves", "--resume=True")
    assert_same_runs("whole", "halves")
    save_chat_model(randomised(GPT(config_of()), 7), CHAT, "base")
    refused = run("halves", "--resume=True")
    assert refused.code == 2 and "was started on other data or another model" in refused.message


def test_a_crashed_run_resumes_from_its_last_epoch(run, monkeypatch):
    """A crash writes nothing, like a kill."""
    update, calls = Updater.update, []

    def counted(self, *args):
        calls.append(1)
        return update(self, *args) if len(calls) < 6 else 1 / 0

    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(Updater, "update", counted)
        patched.setattr(sys, "argv", ["dpo.py", *STOPPABLE, "--out_dir=broken"])
        dpo.main()
    assert len(lines_of("broken")) == 5
    assert "broken, from step 4" in run("broken", "--resume=True")
    run(*STOPPABLE, "--out_dir=whole")
    assert_same_runs("whole", "broken")


# ---- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("base",), "name the rankings to learn from by --train"),
        (("mute", *TRAIN[1:]), "mute doesn't know how turns are marked (chat.json): train it first with: python"),
        ((*TRAIN, "--train=none.jsonl"), "there is no file none.jsonl"),
        (
            (*TRAIN, "--train=ties.jsonl"),
            "no ranking of the train split fits into 16 tokens and prefers one response to another",
        ),
        ((*TRAIN, "--beta=0"), "beta = 0 must be more than 0"),
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
