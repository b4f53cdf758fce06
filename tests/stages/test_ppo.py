"""stages/ppo.py as a user runs it: the optimum it reaches, an update by hand, resuming, refusals."""

import dataclasses
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gpt_arc.alignment import losses
from gpt_arc.alignment.reward_model import RewardModel, ScalarHead, save_reward_model
from gpt_arc.alignment.rewards import load_reward
from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn, load_chat_model
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.extras import names_function
from gpt_arc.settings import mistake
from gpt_arc.training.checkpoints import load_state
from gpt_arc.training.optim import Updater
from gpt_arc.weights.directory import save_model
from helpers import (
    assert_same_weights,
    command,
    interrupt_at,
    kill_at,
    lines_of,
    randomised,
    untimed,
    write,
    write_dataset,
)
from model import GPT
from policy_tree import (
    distribution,
    make_tree,
    optimum,
    save_chat_model,
    total_variation,
    weights_of,
)
from ranked_texts import CHAT, LETTERS, tiny_config
from stages import ppo

QUICK = (
    "--device=cpu --dtype=float32 --episodes=32 --batch_size=4 --gradient_accumulation_steps=2 --minibatches=2 "
    "--max_new_tokens=5 --learning_rate=1e-3 --adam_eps=1e-4 --rollout_batch_size=16"
).split()
TRAIN = ("base", "--prompts=prompts.jsonl", "--reward=rules_of_ppo:letters", *QUICK)
CONFIRMED = "--reward=rules_of_ppo:letters"  # code is named again to resume
STILL = ("--learning_rate=1e-30",)  # leaves the policy unchanged
RULES = """
def letters(rows, responses): return [text.count("b") - 0.5 * text.count("c") for text in responses]
def constant(rows, responses): return [2.0] * len(rows)
def lengths(rows, responses): return [float(len(text)) for text in responses]
def bandit(rows, responses): return [float(text[:1] == row["answer"]) for row, text in zip(rows, responses)]
def broken(rows, responses): return [1 / (len(text) - len(text)) for text in responses]
def short(rows, responses): return [1.0]
def nan(rows, responses): return [float("nan")] * len(rows)
calls = []
def fails_once(rows, responses):
    import os
    calls.append(rows)
    if os.environ["RANK"] == "1" and len(calls) == 2: raise ValueError("no judge")
    return [1.0] * len(rows)
"""


config_of = partial(tiny_config, n_layer=2)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(0)
    save_chat_model(randomised(GPT(config_of(dropout=0.1))), CHAT, "base")
    save_reward_model(RewardModel(randomised(GPT(config_of()), 1)), LETTERS, CHAT, "reward")
    write("prompts.jsonl", [{"prompt": text, "answer": text[0]} for text in ("a", "bcd", "ef", "aab", "h", "gg", "c")])
    Path("rules_of_ppo.py").write_text(RULES)
    yield tmp_path
    sys.modules.pop("rules_of_ppo", None)


@pytest.fixture
def run(workplace, stage_runner):
    return partial(stage_runner, ppo)


def record(monkeypatch, name):
    """Collects what a function called by ppo.py returns."""
    results, function = [], getattr(ppo, name)

    def recorded(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(ppo, name, recorded)
    return results


def record_gradients(monkeypatch):
    """Collects the gradients before each update, unclipped, and the weights after it."""
    gradients, weights, update = [], [], Updater.update

    def recorded(self, *args):
        gradients.append([p.grad.clone() for p in self.parameters])
        result = update(self, *args)
        weights.append([p.detach().clone() for p in self.parameters])
        return result

    monkeypatch.setattr(Updater, "update", recorded)
    return gradients, weights


# ---- the optimum of E[r] - beta KL: pi_ref exp(r / beta) / Z


# At the optimum r - beta log(pi / pi_ref) is the same for every response, so advantages and their noise vanish unless
# they are divided by their deviation.
SETTINGS = (
    "--max_new_tokens=3 --dtype=float32 --device=cpu --episodes=76800 --batch_size=128 --gradient_accumulation_steps=1 "
    "--minibatches=4 --inner_epochs=4 --rollout_batch_size=512 --learning_rate=3e-3 --schedule=cosine "
    "--final_learning_rate=0 --beta2=0.99 --gae_lambda=1 --value_coef=1 --value_clip=100 "
    "--whiten_advantages=False"
).split()


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "most"), [(1.0, 0.01), (0.5, 0.01), (0.2, 0.05)])
def test_the_policy_reaches_the_optimum(workplace, beta, most):
    make_tree()
    reference = distribution("tree")
    assert len(reference) == 40
    best = optimum(reference, beta)
    assert total_variation(reference, best) > 0.2
    result = command(
        "stages/ppo.py", "tree", "--prompts=tree.jsonl", "--reward=utility_of_tree:utilities", f"--kl_coef={beta}",
        *SETTINGS, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert total_variation(distribution("out/ppo"), best) <= most


@pytest.mark.slow
def test_a_bandit_learns_the_rewarded_letter(run):
    """The reward is for beginning the response with the prompt's first letter."""
    write("prompts.jsonl", [{"prompt": a * n, "answer": a} for a in "abcd" for n in (1, 2)])
    torch.manual_seed(0)
    save_chat_model(GPT(config_of(n_layer=1, n_embd=32)), CHAT, "base")
    flags = (
        "--max_new_tokens=1 --batch_size=32 --gradient_accumulation_steps=1 --minibatches=4 --inner_epochs=4 "
        "--learning_rate=1e-2 --schedule=linear --final_learning_rate=0 --episodes=3072 --rollout_batch_size=128 "
        "--save_interval=100 --beta2=0.99"
    ).split()
    run(*TRAIN, "--reward=rules_of_ppo:bandit", *flags)
    lines = lines_of("out/ppo")
    assert len(lines) == 24 and lines[0]["score"] < 0.3
    assert sum(line["score"] for line in lines[-5:]) / 5 > 0.95
    assert lines[-1]["kl_k1"] > 1 and lines[-1]["entropy"] < 0.5 and lines[-1]["response_tokens"] == 1


# ---- an update by hand


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("network", ["policy", "shared"])
def test_the_first_update_is_the_gradient_of_its_definition(run, monkeypatch, temperature, network):
    results, (gradients, _) = record(monkeypatch, "gather_rollouts"), record_gradients(monkeypatch)
    flags = ("--minibatches=1", "--episodes=8", "--whiten_rewards=False", "--whiten_advantages=False", "--kl_coef=0.3")
    other_flags = ("--gae_lambda=0.9", "--gamma=0.8", "--grad_clip=0", "--value_coef=0.4", f"--value_network={network}")
    monkeypatch.setattr(ppo, "ScalarHead", lambda width, std: ScalarHead(width, 0.5))  # values other than 0
    run(*TRAIN, *STILL, *flags, *other_flags, f"--temperature={temperature}")
    (rollouts,) = results
    policy, _, chat = load_chat_model("base")
    state = load_state(Path("out/ppo/last"))["parts"]["critic"]
    if network == "shared":
        head = ScalarHead(16, 0.0)
        head.load_state_dict(state)
        parameters = [*policy.parameters(), *head.parameters()]
    else:
        critic = RewardModel(load_chat_model("base")[0])
        critic.load_state_dict(state)
        critic.eval()
        parameters = [*policy.parameters(), *critic.parameters()]
    policy.eval()
    loss, tokens = 0.0, 0
    for i, sequence in enumerate(rollouts.sequences):
        length = int(rollouts.prompt_lengths[i])
        prompt, response = sequence[:length], sequence[length:]
        hidden = policy.hidden(torch.tensor([sequence[:-1]]))[0, length - 1 :]
        logs = (policy.logits(hidden) / temperature).log_softmax(-1)
        logs = logs[torch.arange(len(response)), response]
        values = head(hidden) if network == "shared" else critic.head(
            critic.trunk.hidden(torch.tensor([sequence[:-1]]))[0, length - 1 :]
        )  # fmt: skip
        text = chat.decode(response)
        score = text.count("b") - 0.5 * text.count("c")
        value = [*values.tolist(), 0.0]
        rewards = [0.0] * (len(response) - 1) + [score]  # the policy is still the reference: no penalty
        delta = [rewards[t] + 0.8 * value[t + 1] - value[t] for t in range(len(response))]
        for t in range(len(response)):
            gain = sum((0.8 * 0.9) ** (k - t) * delta[k] for k in range(t, len(response)))
            loss = loss - gain * (logs[t] - logs[t].item()).exp() + 0.4 * 0.5 * (values[t] - value[t] - gain) ** 2
            tokens += 1
        assert prompt == chat.prompt([Turn("user", sequence_text(prompt))])
    expected = torch.autograd.grad(loss / tokens, [p for p in parameters if p.requires_grad], allow_unused=True)
    for actual, gradient in zip(gradients[0], expected, strict=True):
        gradient = torch.zeros_like(actual) if gradient is None else gradient
        torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-5)
    (line,) = lines_of("out/ppo")
    assert line["clip_fraction"] == line["value_clip_fraction"] == 0 and abs(line["kl_k1"]) < 1e-4


def sequence_text(prompt):
    return LETTERS.decode(prompt)


def test_ratios_begin_at_one_and_rewards_are_penalised_by_kl(run, monkeypatch):
    ratios, rewards = [], []
    policy_losses, penalised = losses.policy_losses, losses.penalised_rewards

    def recorded(logs, old, *other_args):
        ratios.append((logs - old).exp().detach())
        return policy_losses(logs, old, *other_args)

    monkeypatch.setattr(losses, "policy_losses", recorded)
    monkeypatch.setattr(
        losses, "penalised_rewards", lambda *args: rewards.append((args, penalised(*args))) or rewards[-1][1]
    )
    results = record(monkeypatch, "gather_rollouts")
    run(*TRAIN, "--learning_rate=1e-2", "--kl_coef=0.5")
    assert len(ratios) == 2 * 4 and len(rewards) == 2  # iterations, micro-batches
    for number in (0, 1, 4, 5):  # the first minibatch of each iteration
        torch.testing.assert_close(ratios[number], torch.ones_like(ratios[number]), rtol=0, atol=1e-4)
    assert (ratios[2] - 1).abs().max() > 0.01
    rollouts = results[1]
    log_ratio = rollouts.outputs.log_probs - rollouts.outputs.reference_log_probs
    assert log_ratio.abs().max() > 0.01
    for i, length in enumerate(rollouts.mask.sum(1).tolist()):
        expected = (-0.5 * log_ratio[i, :length]).tolist()
        text = CHAT.decode(rollouts.sequences[i][rollouts.prompt_lengths[i] :])
        expected[-1] += text.count("b") - 0.5 * text.count("c")
        assert rewards[1][1][i, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert not rewards[1][1][i, length:].any()


def test_unfinished_responses_get_no_end_reward(run):
    run(*TRAIN, *STILL, "--reward=rules_of_ppo:constant", "--no_end_reward=-1", "--monitor=rules_of_ppo:lengths")
    for line in lines_of("out/ppo"):
        assert 0 < line["ended"] < 1 and line["score"] == pytest.approx(2 * line["ended"] - (1 - line["ended"]))
        assert line["monitored"] == pytest.approx(line["response_tokens"] - line["ended"], abs=0.5)
    run(*TRAIN, *STILL, "--reward=rules_of_ppo:constant")
    assert all(line["score"] == 2 and line["score_std"] == 0 for line in lines_of("out/ppo-2"))


def test_a_monitor_does_not_change_training(run):
    run(*TRAIN)
    run(*TRAIN, "--monitor=reward")
    assert_same_weights("out/ppo/last", "out/ppo-2/last")
    lines = lines_of("out/ppo-2")
    assert all(math.isfinite(line.pop("monitored")) for line in lines) and lines == lines_of("out/ppo")


def test_the_value_network(run):
    reward, base = load_file("reward/model.safetensors"), weights_of("base")
    for name, reward_of_run in (("None", "reward"), ("reward", "reward"), ("policy", "reward"), ("None", None)):
        flags = ["--reward=reward"] if reward_of_run else []
        run(*TRAIN, *STILL, *flags, f"--value_network={name}", "--out_dir=run", "--overwrite=True")
        critic = load_state(Path("run/last"))["parts"]["critic"]
        copied = reward if reward_of_run and name != "policy" else base
        assert all(torch.equal(critic[f"trunk.{key}"], tensor) for key, tensor in copied.items())
        assert critic["head.weight"].abs().max() < 1e-20 or copied is reward
    run(*TRAIN, *STILL, "--value_network=shared", "--out_dir=run", "--overwrite=True")
    assert set(load_state(Path("run/last"))["parts"]["critic"]) == {"weight", "bias"}
    assert_same_weights("run/last", "base")
    refused = run(*TRAIN, "--value_network=reward")
    assert (
        refused.code == 2
        and "value_network = reward, but reward = rules_of_ppo:letters is not a reward model" in refused.message
    )


def test_pretraining_text_adds_the_gradient_of_its_loss(run, workplace, monkeypatch):
    """All windows of the dataset are the same, so it doesn't matter which ones are drawn."""
    write_dataset(workplace / "data" / "same", LETTERS, {"train": [3] * 500, "val": [3] * 100})
    gradients_of_runs = []
    flags = ("--episodes=8", "--minibatches=1", "--grad_clip=0", "--pretraining_batch_size=5")
    for text_flags in ((), ("--pretraining_dataset=same", "--pretraining_coef=2.5")):
        with monkeypatch.context() as patched:
            gradients, _ = record_gradients(patched)
            run(*TRAIN, *STILL, *flags, *text_flags, "--out_dir=run", "--overwrite=True")
            gradients_of_runs.append(gradients[0])
    policy = load_chat_model("base")[0].eval()
    window = torch.full((1, 16), 3)
    loss = policy(window, window).total / 16
    assert lines_of("run")[0]["pretraining_loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.autograd.grad(2.5 * loss, list(policy.parameters()))
    for without_text, with_text, gradient in zip(*gradients_of_runs, expected):
        torch.testing.assert_close(with_text - without_text, gradient, rtol=1e-3, atol=1e-4)
    for without_text, with_text in list(zip(*gradients_of_runs))[len(expected) :]:
        torch.testing.assert_close(with_text, without_text)  # the critic's gradients


def test_averaged_weights_are_saved(run, monkeypatch):
    _, weights = record_gradients(monkeypatch)
    run(*TRAIN, "--ema_decay=0.7")
    average = [tensor.double() for tensor in load_chat_model("base")[0].parameters()]
    for after in weights:
        average = [0.7 * mean + 0.3 * weight.double() for mean, weight in zip(average, after)]
    saved, state = load_chat_model("out/ppo")[0], load_state(Path("out/ppo/last"))["parts"]["policy"]
    for (name, actual), mean, weight_now in zip(saved.named_parameters(), average, weights[-1]):
        torch.testing.assert_close(actual.detach().double(), mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(state[name], weight_now)
    run(*TRAIN)
    assert torch.equal(next(load_chat_model("out/ppo-2")[0].parameters()), weights[-1][0])


def test_the_coefficient_follows_the_kl(run):
    run(*TRAIN, "--kl_target=0.05", "--kl_horizon=100", "--kl_coef=0.1", "--episodes=96", "--learning_rate=1e-2")
    lines = lines_of("out/ppo")
    assert lines[0]["kl_coef"] == 0.1 and len(lines) == 6
    for before, after in zip(lines, lines[1:]):
        error = min(max(before["kl_k1"] / 0.05 - 1, -0.2), 0.2)
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 16 / 100))
    assert len({line["kl_coef"] for line in lines}) > 3


# ---- batches, processes and architectures


@pytest.mark.slow
def test_batching_and_processes_change_only_rounding(run, workplace):
    write_dataset(workplace / "data" / "letters", LETTERS, {"train": list(range(8)) * 60, "val": list(range(8)) * 10})
    flags = (*TRAIN, "--pretraining_dataset=letters", "--pretraining_batch_size=3", "--ema_decay=0.5",
             "--inner_epochs=2", "--kl_target=0.1", "--monitor=reward", "--no_end_reward=-1")  # fmt: skip
    run(*flags, "--out_dir=whole")
    ways = {
        "parts": ("--batch_size=8", "--gradient_accumulation_steps=1", "--rollout_batch_size=3"),
        "checkpointing": ("--activation_checkpointing=True", "--rollout_batch_size=1"),
    }
    for name, way in ways.items():
        run(*flags, *way, f"--out_dir={name}")
    Path("ppo.toml").write_text('monitor = "reward"\n')  # torchrun would take --monitor for its own flag
    flags = ("ppo.toml", *(flag for flag in flags if "monitor" not in flag), "--backend=gloo")
    for name, mode in {"two": "ddp", "shards": "fsdp"}.items():
        several = f"--parallel={mode}", f"--out_dir={name}"
        result = command("stages/ppo.py", *flags, *several, processes=2, torchrun=True)
        assert result.returncode == 0 and result.stdout.count("finished step 2") == 1, result.stderr
    for name in (*ways, "two", "shards"):
        torch.testing.assert_close(weights_of("whole/last"), weights_of(f"{name}/last"), rtol=1e-3, atol=1e-5)
        critics = [load_state(Path(folder) / "last")["parts"]["critic"] for folder in ("whole", name)]
        torch.testing.assert_close(*critics, rtol=1e-3, atol=1e-5)
        for expected, line in zip(lines_of("whole"), lines_of(name), strict=True):
            for key in ("score", "response_tokens", "ended"):
                assert expected[key] == pytest.approx(line[key], abs=1e-6)
            assert line == {key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in expected.items()}
    moved = weights_of("whole/last")["blocks.0.mlp.up.weight"] - weights_of("base")["blocks.0.mlp.up.weight"]
    assert moved.abs().max() > 1e-3


@pytest.mark.slow
def test_divided_models_learn_as_whole_ones_and_resume(run, workplace):
    """One process has more of the 15 responses of an iteration and of the 3 windows of an update than the other.

    The saved model is an average. The run stops after an iteration and resumes.
    """
    write_dataset(workplace / "data" / "letters", LETTERS, {"train": list(range(8)) * 60, "val": list(range(8)) * 10})
    flags = (*TRAIN, "--reward=reward", "--pretraining_dataset=letters", "--pretraining_batch_size=3",
             "--ema_decay=0.5", "--episodes=45", "--batch_size=3", "--gradient_accumulation_steps=5",
             "--minibatches=1")  # fmt: skip
    run(*flags, "--out_dir=whole")
    several = "--parallel=fsdp", "--out_dir=shards", "--stop_after=1s"
    stopped = command("stages/ppo.py", *flags, *several, processes=2)
    assert "stopped after step 1, saved" in stopped.stdout, stopped.stdout + stopped.stderr
    result = command("stages/ppo.py", "--resume=shards", processes=2)
    assert "finished step 3" in result.stdout, result.stdout + result.stderr
    for expected, line in zip(lines_of("whole"), lines_of("shards"), strict=True):
        assert line == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in expected.items()}
    assert_same_weights("whole/last", "shards/last", rtol=0, atol=1e-5)


ARCHITECTURES = {
    "gpt1": {"norm_position": "post", "activation": "gelu"},
    "sinusoidal": {"positions": "sinusoidal"},
    "rotary": {"positions": "rotary", "norm": "rmsnorm", "bias": False, "activation": "swiglu", "qk_norm": True},
    "banded": {"attention_band": 3},
    "grouped": {"n_kv_head": 1, "tied_head": False, "head_bias": True},
    "experts": {"n_experts": 3, "experts_per_token": 2},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(run, name):
    save_chat_model(GPT(config_of(**ARCHITECTURES[name])), CHAT, "base")
    run(*TRAIN, "--episodes=16", "--ema_decay=0.9")
    (line,) = lines_of("out/ppo")
    assert abs(line["kl_k1"]) < 1e-4 and line["grad_norm"] > 0
    before, after = weights_of("base"), weights_of("out/ppo/last")
    for key in before.keys() - {"position_embedding.weight"}:
        assert torch.equal(before[key], after[key]) == ("router" in key)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(run, dtype):
    for flag in ("float32", dtype):
        run(*TRAIN, f"--dtype={flag}", f"--out_dir={flag}", "--learning_rate=1e-4")
    for expected, line in zip(lines_of("float32"), lines_of(dtype), strict=True):
        assert expected["score"] == pytest.approx(line["score"], abs=0.2)
        assert expected["value_loss"] == pytest.approx(line["value_loss"], rel=0.2)


# ---- interrupted runs

STOPPABLE = (*TRAIN, "--episodes=96", "--ema_decay=0.9", "--kl_target=0.05", "--save_interval=2", "--reward=reward",
             "--learning_rate=1e-2")  # fmt: skip


def assert_same_runs(a, b):
    assert_same_weights(f"{a}/last", f"{b}/last")
    assert lines_of(a) == lines_of(b)
    state_a, state_b = (load_state(Path(folder) / "last") for folder in (a, b))
    assert untimed([state_a["progress"]]) == untimed([state_b["progress"]])
    assert state_a["progress"]["numbers"]["kl_coef"] != 0.02
    for part in ("critic", "policy"):
        assert all(torch.equal(state_a["parts"][part][key], value) for key, value in state_b["parts"][part].items())


@pytest.mark.parametrize(
    ("setting", "experts", "device", "dtype", "expected"),
    [
        (True, 0, "cuda", "float16", True),
        (True, 2, "cuda", "bfloat16", True),
        (False, 0, "cuda", "bfloat16", False),
        ("auto", 0, "cuda", "bfloat16", False),  # a run of a second
        ("auto", 0, "cpu", "float32", False),
        ("auto", 2, "cuda", "float16", False),
    ],
)
def test_responses_are_compiled_on_gpus(setting, experts, device, dtype, expected):
    """Except by experts that wait for the device within a step."""
    policy = GPT(config_of(n_experts=experts))
    device = SimpleNamespace(type=device)
    assert ppo.compiles_rollouts(ppo.PPOOptions(compile=setting), policy, device, dtype) == expected


@pytest.mark.parametrize("updates", [3, 8])  # within an iteration and at its end
def test_an_interrupted_run_resumes_exactly(run, monkeypatch, updates):
    run(*STOPPABLE, "--out_dir=whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, updates)
        stopped = run(*STOPPABLE, "--out_dir=halves")
    step = math.ceil((updates + 1) / 2)
    assert stopped.code == 130
    assert f"stopped after step {step}, saved; resume with: python ppo.py --resume=halves" in stopped.output
    assert f"halves, from step {step}" in run("halves", "--resume=True")
    assert_same_runs("whole", "halves")
    assert "finished step 6" in run("halves", "--resume=True")


def test_a_killed_run_resumes_from_its_last_checkpoint(run):
    kill_at(10, "stages/ppo.py", *STOPPABLE, "--out_dir=killed")
    assert len(lines_of("killed")) == 4
    run(*STOPPABLE, "--out_dir=whole")
    assert "killed, from step 4" in run("killed", "--resume=True")
    assert_same_runs("whole", "killed")


def test_resuming_refuses_changed_prompts_or_another_reference(run):
    run(*TRAIN)
    refused = run("out/ppo", "--resume=True", CONFIRMED, "--episodes=64")
    assert refused.code == 2 and "--episodes can't be changed" in refused.message
    rows = Path("prompts.jsonl").read_text()
    write("prompts.jsonl", [{"prompt": "a"}])
    refused = run("out/ppo", "--resume=True", CONFIRMED)
    assert refused.code == 2 and "was started on other data or another model" in refused.message
    Path("prompts.jsonl").write_text(rows)
    assert "finished step 2" in run("out/ppo", "--resume=True", CONFIRMED)
    save_chat_model(randomised(GPT(config_of()), 7), CHAT, "base")
    refused = run("out/ppo", "--resume=True", CONFIRMED)
    assert refused.code == 2 and "was started on other data or another model" in refused.message


def test_code_that_a_run_names_is_imported_only_from_the_command_line(run):
    run(*TRAIN, "--monitor=rules_of_ppo:lengths")
    sys.modules.pop("rules_of_ppo", None)
    record = json.loads(Path("out/ppo/run.json").read_text())
    record["options"]["reward"] = "out.ppo.payload:f"
    Path("out/ppo/run.json").write_text(json.dumps(record))
    Path("out/ppo/payload.py").write_text("raise SystemExit('executed')")
    command = "python ppo.py --resume=out/ppo --reward=out.ppo.payload:f --monitor=rules_of_ppo:lengths"
    for flags in ((), ("--monitor=rules_of_ppo:lengths",)):
        refused = run("--resume=out/ppo", *flags)
        assert refused.code == 2 and "reward = out.ppo.payload:f, which is imported only from the" in refused.message
        assert refused.message.endswith(f"resume with: {command}\n")
    assert not {"out.ppo.payload", "rules_of_ppo"} & sys.modules.keys()
    assert "--reward = rules_of_ppo:letters can't be changed" in run("--resume=out/ppo", CONFIRMED).message
    record["options"]["reward"] = "rules_of_ppo:letters"
    Path("out/ppo/run.json").write_text(json.dumps(record))
    assert "monitor = rules_of_ppo:lengths, which is" in run("--resume=out/ppo", CONFIRMED).message
    assert "finished step 2" in run("--resume=out/ppo", CONFIRMED, "--monitor=rules_of_ppo:lengths")


@pytest.mark.parametrize("name", ["out/evil:f", "/a:b/reward", "rules_of_ppo:letters:f", "rules_of_ppo:", "os.path"])
def test_only_module_and_function_are_imported(name):
    assert not names_function(name)
    with pytest.raises(UserError, match="neither a reward model's directory nor a function"):
        load_reward(name, CHAT, torch.device("cpu"), "float32", 1)


# ---- published settings and refusals


def test_the_published_settings():
    """InstructGPT's (arXiv:2203.02155, section 3.5 and appendix C.4), and lm-human-preferences' where it has none."""
    options = ppo.PPOOptions()
    assert (options.episodes, options.episodes_per_iteration, options.examples_per_update) == (256_000, 512, 64)
    assert (options.kl_coef, options.clip, options.value_clip, options.inner_epochs) == (0.02, 0.2, 0.2, 1)
    assert (options.gamma, options.gae_lambda, options.value_coef, options.adam_eps) == (1, 0.95, 0.1, 1e-5)
    assert (options.temperature, options.pretraining_coef, options.kl_horizon) == (1, 27.8, 10_000)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("base",), "name the prompts by --prompts"),
        (("base", "--prompts=prompts.jsonl"), "name the reward by --reward"),
        (("mute", *TRAIN[1:]), "mute doesn't know how turns are marked (chat.json): train it first with: python"),
        ((*TRAIN, "--prompts=none.jsonl"), "there is no file none.jsonl"),
        ((*TRAIN, "--prompts=odd.jsonl"), "odd.jsonl, line 1: there is no column prompt"),
        ((*TRAIN, "--max_new_tokens=16"), "no prompt of prompts.jsonl fits: max_new_tokens leaves 0 tokens"),
        ((*TRAIN, "--reward=base"), "base is neither a reward model's directory nor a function"),
        (
            (*TRAIN, "--reward=no_such_rules:f"),
            "reward = no_such_rules:f can't be imported: there is no module no_such_rules in this folder",
        ),
        (
            (*TRAIN, "--reward=rules_of_ppo:f"),
            "reward = rules_of_ppo:f can't be imported: rules_of_ppo has no function f",
        ),
        ((*TRAIN, "--reward=rules_of_ppo:broken"), "broken failed: rules_of_ppo.py, line 6: ZeroDivisionError: "),
        ((*TRAIN, "--reward=rules_of_ppo:short"), "must return one number per response, not 1 for 16"),
        ((*TRAIN, "--monitor=rules_of_ppo:nan"), "monitor = rules_of_ppo:nan must return finite numbers, not nan"),
        ((*TRAIN, "--monitor=rules_of_ppo:f"), "monitor = rules_of_ppo:f can't be imported: rules_of_ppo has no"),
        ((*TRAIN, "--monitor=rules_of_ppo:broken"), "monitor = rules_of_ppo:broken failed: rules_of_ppo.py, line 6"),
        ((*TRAIN, "--monitor=other"), "other has another chat format or tokenizer than the policy"),
        ((*TRAIN, "--reward=other"), "other has another chat format or tokenizer than the policy"),
        ((*TRAIN, "--reward=narrow"), "the value network reads 8 tokens, the policy 16"),
        (
            (*TRAIN, "--reward=narrow", "--value_network=policy"),
            "narrow reads at most 8 tokens; a response ends at",
        ),
        ((*TRAIN, "--pretraining_dataset=none"), "pretraining_dataset = none: there is no prepared dataset"),
        ((*TRAIN, "--pretraining_dataset=foreign"), "pretraining_dataset = foreign: it has another tokenizer"),
        ((*TRAIN, "--out_dir=reward", "--reward=reward"), "out_dir = reward holds the model that reward names"),
        ((*TRAIN, "--compile"), "compile = true can't work on cpu in float32 here: leave it out"),
        ((*TRAIN, "--clip=0"), "clip = 0 must be more than 0"),
        ((*TRAIN, "--temperature=0"), "temperature = 0 must be more than 0"),
        ((*TRAIN, "--gae_lambda=1.5"), "gae_lambda = 1.5 must be between 0 and 1"),
        ((*TRAIN, "--kl_target=1", "--kl_coef=0"), "kl_coef = 0 must be more than 0, for kl_target to adapt it"),
        ((*TRAIN, "--value_network=none"), "value_network"),
        (("base", "--resume=True"), "base is not a run of ppo.py that could go on"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(run, workplace, flags, message):
    write("odd.jsonl", [{"text": "a"}])
    other = CharTokenizer("abcdefgi")
    save_model(GPT(config_of()), LETTERS, "mute")
    save_reward_model(RewardModel(GPT(config_of())), other, ChatFormat.new(TEMPLATES["markers"], other, 8), "other")
    save_reward_model(RewardModel(GPT(config_of(block_size=8))), LETTERS, CHAT, "narrow")
    write_dataset(workplace / "data" / "foreign", other, {"train": [1] * 200, "val": [1] * 100})
    refused = run(*flags)
    assert refused.code == 2 and message in refused.message and refused.message.count("\n") == 1, refused.message
    assert refused.message.startswith("ppo.py: ")


def test_every_setting_is_checked():
    for name, value in {
        "minibatches": 0, "inner_epochs": 0, "max_new_tokens": 0, "rollout_batch_size": 0, "save_interval": 0,
        "episodes": 0, "kl_coef": -1.0, "pretraining_coef": float("inf"), "kl_horizon": 0.0, "gamma": 2.0,
        "kl_target": 0.0, "ema_decay": 1.0, "value_clip": float("nan"),
    }.items():  # fmt: skip
        with pytest.raises(ValueError) as refused:
            dataclasses.replace(ppo.PPOOptions(), **{name: value})
        assert re.search(f"{name} = .* must be", mistake(refused.value, ppo.PPOOptions))


def test_a_run_saves_before_bad_pretraining_text_ends_it(run, workplace, monkeypatch):
    write_dataset(workplace / "data" / "same", LETTERS, {"train": [3] * 500, "val": [3] * 100})
    flags = ("--episodes=32", "--minibatches=1", "--pretraining_dataset=same", "--pretraining_batch_size=5")
    original = Updater.update

    def update(self, *args):
        (workplace / "data" / "same" / "train.bin").touch()
        return original(self, *args)

    monkeypatch.setattr(Updater, "update", update)
    stopped = run(*TRAIN, *flags)
    assert stopped.code == 2 and "train.bin was changed or replaced while it was in use" in stopped.message
    assert "; step 1 is saved, resume with: python ppo.py --resume=out/ppo" in stopped.message
    assert load_state(Path("out/ppo/last"))["progress"]["step"] == 1


def test_a_reward_that_fails_in_one_of_two_processes_ends_both_after_they_have_saved(workplace):
    flags = ("base", "--prompts=prompts.jsonl", "--reward=rules_of_ppo:fails_once", *QUICK, "--backend=gloo")
    stopped = command("stages/ppo.py", *flags, processes=2)
    sentence = (
        "fails_once failed: rules_of_ppo.py, line 13: ValueError: no judge; step 1 is saved, resume with: torchrun"
    )
    assert stopped.returncode == 2 and stopped.stderr.count(sentence) == 2
    assert load_state(Path("out/ppo/last"))["progress"]["step"] == 1
    resumed = command("stages/ppo.py", "--resume=out/ppo", "--reward=rules_of_ppo:fails_once", processes=2)
    assert "finished step 2" in resumed.stdout, resumed.stderr
