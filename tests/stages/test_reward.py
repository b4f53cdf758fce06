"""stages/reward.py as a user runs it: what it learns from rankings, an update by hand, resuming."""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt_arc.alignment.reward_model import RewardModel, load_reward_model, save_reward_model
from gpt_arc.chat.format import Turn, load_chat_model
from gpt_arc.training.checkpoints import load_state
from gpt_arc.training.optim import Updater
from gpt_arc.weights.directory import save_model
from helpers import command, interrupt_at, kill_at, lines_of, randomised, untimed, write
from model import GPT
from policy_tree import save_chat_model
from ranked_texts import CHAT, LETTERS, QUICK, TEXTS, rankings, tiny_config, utility
from stages import dpo, reward

TRAIN = ("base", "--train=train.jsonl", *QUICK)


config_of = partial(tiny_config, n_layer=1)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_chat_model(GPT(config_of()), CHAT, "base")
    write("train.jsonl", rankings(13))
    write("val.jsonl", rankings(6, seed=1))
    write("chats.jsonl", [{"prompt": "h" * n, "response": text} for n in (1, 2) for text in ("aab", "b", "")])
    return tmp_path


@pytest.fixture
def run(workplace, stage_runner):
    return partial(stage_runner, reward)


def score_one(model, prompt, response):
    """A response's score, from tokens put together by hand."""
    tokens = [9, *LETTERS.encode(prompt), 10, *LETTERS.encode(response), 11]
    return model.head(model.trunk.hidden(torch.tensor([tokens]))[0, -1])


def losses_one_by_one(model, rows):
    """For each ranking, the mean loss over its pairs and the gaps in score."""
    for row in rows:
        scores = [score_one(model, row["prompt"], text) for text in row["responses"]]
        ranks = row.get("ranks", range(len(scores)))
        gaps = [
            scores[i] - scores[j] if ranks[i] < ranks[j] else scores[j] - scores[i]
            for i, j in itertools.combinations(range(len(scores)), 2)
            if ranks[i] != ranks[j]
        ]
        yield sum((1 + (-gap).exp()).log() for gap in gaps) / len(gaps), [gap.item() for gap in gaps]


# ---- updates and what they learn


@pytest.mark.parametrize("settings", [{}, {"tied_head": False, "head_bias": True, "norm_position": "post"}])
def test_an_update_is_the_gradient_of_the_mean_over_pairs_then_prompts(run, monkeypatch, settings):
    save_chat_model(randomised(GPT(config_of(**settings))), CHAT, "base")
    rows = [*rankings(9, responses=(2, 6)), {"prompt": "hh", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]}]
    write("train.jsonl", rows)
    gradients, update = [], Updater.update

    def recorded(self, *args):
        gradients.append({id(p): p.grad.clone() for p in self.parameters})
        return update(self, *args)

    monkeypatch.setattr(Updater, "update", recorded)
    models = []
    monkeypatch.setattr(reward, "RewardModel", lambda trunk: models.append(RewardModel(trunk)) or models[-1])
    run(*TRAIN, "--learning_rate=1e-30", "--val=val.jsonl", "--batch_size=4", "--gradient_accumulation_steps=3",
        "--grad_clip=0")  # fmt: skip
    (line,), (model,) = lines_of("out/reward"), models
    losses, gaps = zip(*losses_one_by_one(model, rows))
    loss = sum(losses) / len(rows)
    assert line["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    right = [sum(gap > 0 for gap in ranking_gaps) / len(ranking_gaps) for ranking_gaps in gaps]
    assert line["accuracy"] == pytest.approx(sum(right) / len(right))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert ("trunk.head.weight" in named, "head.bias" in named) == (False, False)
    expected = torch.autograd.grad(loss, list(named.values()))
    for (name, parameter), gradient in zip(named.items(), expected):
        torch.testing.assert_close(gradients[0][id(parameter)], gradient, rtol=1e-3, atol=1e-5, msg=name)
    losses, gaps = zip(*losses_one_by_one(model, map(json.loads, Path("val.jsonl").read_text().splitlines())))
    gaps = [gap for ranking_gaps in gaps for gap in ranking_gaps]
    report = json.loads(Path("out/reward/report.json").read_text())
    assert report["loss"] == pytest.approx(sum(losses).item() / 6, rel=1e-5) == line["val_loss"]
    assert report["pairs"] == len(gaps) and report["accuracy"] == pytest.approx(sum(g > 0 for g in gaps) / len(gaps))


@pytest.mark.parametrize("stage", [reward, dpo])
def test_the_preview_shows_each_response(workplace, stage_runner, stage):
    write("train.jsonl", [{"prompt": "h", "responses": ["a", "b"], "ranks": [2, 1]}])
    (first, *rest) = stage_runner(stage, "base", "--train=train.jsonl", "--preview=2").splitlines()
    assert first == "train.jsonl, line 1" and not Path("out").exists()
    assert rest == ["2: <|user|>·h·<|assistant|>·[a·<|end|>]", "1: <|user|>·h·<|assistant|>·[b·<|end|>]"]


def test_the_report_is_that_of_the_checkpoint_it_names(run):
    """The best epoch isn't the last; the report is recomputed, text by text, from the file of the best."""
    write("train.jsonl", rankings(6, seed=5))
    write("val.jsonl", rankings(6, seed=1))
    flags = ("--val=val.jsonl", "--demonstrations=chats.jsonl", "--epochs=8", "--learning_rate=3e-2")
    run(*TRAIN, *flags, "--schedule=constant")
    report = json.loads(Path("out/reward/report.json").read_text())
    losses = {line["step"]: line["val_loss"] for line in lines_of("out/reward") if "val_loss" in line}
    best = min(losses, key=losses.get)
    assert report["step"] == best < max(losses) and report["loss"] == pytest.approx(losses[best], rel=1e-5)
    assert Path("out/reward/best").resolve().name == f"step-{best:08}"
    model = load_reward_model("out/reward/best")[0].eval()
    rows = [json.loads(line) for line in Path("val.jsonl").read_text().splitlines()]
    losses, gaps = zip(*losses_one_by_one(model, rows))
    gaps = [gap for ranking_gaps in gaps for gap in ranking_gaps]
    scores = torch.tensor([score_one(model, row["prompt"], text).item() for row in rows for text in row["responses"]])
    assert report["loss"] == pytest.approx(sum(losses).item() / 6, rel=1e-5)
    assert report["pairs"] == len(gaps) and report["accuracy"] == pytest.approx(sum(g > 0 for g in gaps) / len(gaps))
    assert report["mean_score"] == pytest.approx(scores.mean().item(), rel=1e-4)
    assert report["score_std"] == pytest.approx(scores.std().item(), rel=1e-4)


def test_a_utility_is_learned_and_demonstrations_score_0(run):
    write("train.jsonl", rankings(2000, seed=2, responses=(4, 4)))
    write("val.jsonl", rankings(300, seed=3))
    flags = ("--learning_rate=1e-2", "--batch_size=32", "--gradient_accumulation_steps=1", "--val=val.jsonl")
    output = run(*TRAIN, *flags, "--demonstrations=chats.jsonl")
    (report,) = (json.loads(Path("out/reward/report.json").read_text()),)
    assert "score gap" in output and report["calibration_error"] < 0.06
    for place in ("last", "best"):
        model = load_reward_model(f"out/reward/{place}")[0].eval()
        scores = torch.tensor([score_one(model, "hh", text).item() for text in TEXTS])
        truth = torch.tensor([float(utility(text)) for text in TEXTS])
        assert torch.corrcoef(torch.stack((scores, truth)))[0, 1] > 0.97
        slope = ((scores - scores.mean()) * (truth - truth.mean())).sum() / (truth - truth.mean()).square().sum()
        assert 0.8 < slope < 1.2  # in the units of the model that drew the rankings
        rows = map(json.loads, Path("chats.jsonl").read_text().splitlines())
        demonstrated = [score_one(model, row["prompt"], row["response"]).item() for row in rows]
        assert abs(sum(demonstrated) / len(demonstrated)) < 1e-5 < max(map(abs, demonstrated))


def test_without_demonstrations_the_bias_stays_0(run):
    run(*TRAIN, "--epochs=3")
    assert load_reward_model("out/reward")[0].head.bias.item() == 0


def test_a_reward_model_is_measured_without_training(run):
    run(*TRAIN, "--val=val.jsonl")
    report = json.loads(Path("out/reward/report.json").read_text())
    output = run("out/reward", "--val=val.jsonl", "--device=cpu", "--dtype=float32")
    assert f"pairs {report['pairs']}: loss {report['loss']:.4f}, accuracy {report['accuracy']:.4f} ±" in output
    assert not Path("out/reward-2").exists()


def test_a_reward_model_may_be_trained_further(run):
    run(*TRAIN)
    before = load_reward_model("out/reward")[0]
    run("out/reward", "--train=val.jsonl", *QUICK, "--learning_rate=1e-30", "--val_fraction=0")
    after = load_reward_model("out/reward-2")[0]
    torch.testing.assert_close(before.state_dict(), after.state_dict())
    assert load_chat_model("out/reward-2")[2] == CHAT


# ---- batches and processes


@pytest.mark.slow
def test_batching_and_processes_change_only_rounding(run):
    """13 rankings in updates of 4, so the last update has one, and one of two processes has none."""
    flags = (*TRAIN, "--val=val.jsonl", "--demonstrations=chats.jsonl", "--adam_eps=1e-4", "--epochs=2")
    run(*flags, "--out_dir=whole", "--batch_size=4", "--gradient_accumulation_steps=1")
    run(*flags, "--out_dir=parts", "--batch_size=1", "--gradient_accumulation_steps=4",
        "--activation_checkpointing=True")  # fmt: skip
    for name, mode in {"two": "ddp", "shards": "fsdp"}.items():
        several = f"--parallel={mode}", "--backend=gloo", f"--out_dir={name}"
        result = command("stages/reward.py", *flags, *several, processes=2, torchrun=True)
        assert result.returncode == 0 and result.stdout.count("finished step 8") == 1, result.stderr
    whole = load_reward_model("whole/last")[0]
    for name in ("parts", "two", "shards"):
        torch.testing.assert_close(
            whole.state_dict(), load_reward_model(f"{name}/last")[0].state_dict(), rtol=1e-4, atol=1e-5
        )
        for expected, line in zip(lines_of("whole"), lines_of(name), strict=True):
            assert line == {key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in expected.items()}
    moved = whole.trunk.blocks[0].mlp.up.weight - load_chat_model("base")[0].blocks[0].mlp.up.weight
    assert moved.abs().max() > 1e-3


# ---- interrupted runs

STOPPABLE = (*TRAIN, "--val=val.jsonl", "--demonstrations=chats.jsonl", "--epochs=2")


def assert_same_runs(a, b):
    for place, name in itertools.product(("last", "best"), ("model", "reward")):
        state_a, state_b = (load_file(f"{folder}/{place}/{name}.safetensors") for folder in (a, b))
        assert all(torch.equal(state_a[key], state_b[key]) for key in state_a)
    assert lines_of(a) == lines_of(b)
    assert json.loads(Path(a, "report.json").read_text()) == json.loads(Path(b, "report.json").read_text())
    state_a, state_b = (load_state(Path(folder, "last")) for folder in (a, b))
    assert untimed([state_a["progress"]]) == untimed([state_b["progress"]])


@pytest.mark.parametrize("updates", [2, 4])  # within an epoch and at its end
def test_an_interrupted_run_resumes_exactly(run, monkeypatch, updates):
    run(*STOPPABLE, "--out_dir=whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, updates - 1)  # the next update notices it
        stopped = run(*STOPPABLE, "--out_dir=halves")
    assert stopped.code == 130
    assert f"stopped after step {updates}, saved; resume with: python reward.py --resume=halves" in stopped.output
    assert f"halves, from step {updates}" in run("halves", "--resume=True")
    assert_same_runs("whole", "halves")
    write("chats.jsonl", [{"prompt": "h", "response": "c"}])
    refused = run("halves", "--resume=True")
    assert refused.code == 2 and "was started on other data" in refused.message


def test_a_killed_run_resumes_from_its_last_epoch(run):
    kill_at(6, "stages/reward.py", *STOPPABLE, "--out_dir=killed")
    assert len(lines_of("killed")) == 5
    assert "killed, from step 4" in run("killed", "--resume=True")
    run(*STOPPABLE, "--out_dir=whole")
    assert_same_runs("whole", "killed")


# ---- published settings and refusals


def test_the_published_settings():
    """InstructGPT's: one epoch, 64 prompts per update, 9e-6 for 6.4B parameters, a cosine down to a tenth.

    arXiv:2203.02155, C.2.
    """
    options = reward.RewardOptions().with_rate(64 * 10**8)
    assert (options.epochs, options.examples_per_update, options.learning_rate) == (1, 64, 9e-6)
    assert (options.schedule, options.training(10).min_lr) == ("cosine", 9e-6 * 0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("base",),
            "name the rankings to learn from by --train, or a reward model and its test rankings by --val",
        ),
        (
            ("base", "--val=val.jsonl"),
            "name the rankings to learn from by --train, or a reward model and its test rankings by --val",
        ),
        (("mute", *TRAIN[1:]), "mute doesn't know how turns are marked (chat.json): train it first with: python"),
        (("base", "--train=none.jsonl"), "there is no file none.jsonl"),
        (("base", "--train=odd.jsonl"), "odd.jsonl, line 1: "),
        (
            ("base", "--train=ties.jsonl"),
            "no ranking of the train split fits into 16 tokens and prefers one response to another",
        ),
        (
            (*TRAIN, "--val=ties.jsonl"),
            "no ranking of the val split fits into 16 tokens and prefers one response to another",
        ),
        ((*TRAIN, "--demonstrations=odd.jsonl"), "odd.jsonl, line 1: there is no column response"),
        ((*TRAIN, "--demonstrations=long.jsonl"), "no conversation of long.jsonl fits into the context of 16 tokens"),
        ((*TRAIN, "--epochs=0"), "epochs = 0 must be at least 1"),
        ((*TRAIN, "--val_fraction=1"), "val_fraction = 1 must be between 0 and 1, 1 excluded"),
        ((*TRAIN, "--out_dir=base"), "out_dir = base holds the model that model names"),
        (("base", "--resume=True"), "base is not a run of reward.py that could go on"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(run, flags, message):
    write("odd.jsonl", [{"prompt": "a"}])
    write("ties.jsonl", [{"prompt": "a", "responses": ["a", "b"], "ranks": [1, 1]}])
    write("long.jsonl", [{"prompt": "a" * 20, "response": "b"}])
    save_model(GPT(config_of()), LETTERS, "mute")
    refused = run(*flags)
    assert refused.code == 2 and message in refused.message and refused.message.count("\n") == 1, refused.message
    assert refused.message.startswith("reward.py: ") and not Path("out").exists()


def test_the_last_response_of_a_conversation_is_ranked(run):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in turns]
    write("train.jsonl", [{"messages": messages, "chosen": "d", "rejected": "e"}] * 2)
    run(*TRAIN, "--learning_rate=1e-30", "--val_fraction=0")
    model = load_reward_model("out/reward")[0].eval()
    scores = [
        model(torch.tensor([tokens]), torch.tensor([len(tokens)]))
        for tokens in ([*CHAT.prompt([Turn(*turn) for turn in turns]), *CHAT.response(text)] for text in "de")
    ]
    assert lines_of("out/reward")[0]["train_loss"] == pytest.approx(
        (1 + (scores[1] - scores[0]).exp()).log().item(), rel=1e-5
    )
    save_reward_model(model, LETTERS, CHAT, "again")
    assert load_file("again/reward.safetensors").keys() == {"weight", "bias"}


@pytest.mark.parametrize("flags", [[], ["--residual_dropout=0"], ["--residual_dropout=0.5"]])
def test_dropout_defaults_to_the_model_s(run, flags):
    """Without dropout, the first loss is that of the head's initial weights in evaluation mode."""
    save_chat_model(randomised(GPT(config_of(residual_dropout=0.3))), CHAT, "base")
    run(*TRAIN, "--val_fraction=0", "--batch_size=13", "--gradient_accumulation_steps=1", *flags)
    torch.manual_seed(1337)  # the run's seed, which draws the head
    model = RewardModel(load_chat_model("base")[0]).eval()
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    initial_loss = sum(loss.item() for loss, _ in losses_one_by_one(model, rows)) / 13
    rate = float(flags[0].split("=")[1]) if flags else 0.3
    equal = math.isclose(lines_of("out/reward")[0]["train_loss"], initial_loss, rel_tol=1e-5)
    assert equal == (rate == 0)
    assert load_reward_model("out/reward")[0].trunk.config.residual_dropout == rate
