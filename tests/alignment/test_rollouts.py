"""Responses written by a policy, the models' outputs for them, and rewards."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt_arc.alignment import rollouts as rollouts_module
from gpt_arc.alignment.policy import ActorCritic, ReferencePolicy
from gpt_arc.alignment.reward_model import RewardModel, ScalarHead, save_reward_model
from gpt_arc.alignment.rewards import load_reward
from gpt_arc.alignment.rollouts import (
    ModelOutputs,
    Prompt,
    distributed,
    gather_rollouts,
    model_outputs,
    read_and_encode_prompts,
    update_writer,
    write_responses,
    writer_of,
)
from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.errors import UserError
from gpt_arc.training.parallel import REPLICATED
from helpers import randomised
from model import GPT, GPTConfig

LETTERS = CharTokenizer("abcdefgh")
CHAT = ChatFormat.new(TEMPLATES["markers"], LETTERS, 8)
CPU = torch.device("cpu")
PROMPTS = [Prompt(CHAT.prompt([Turn("user", text)]), {"prompt": text}) for text in ("a", "abcab", "bb", "hg", "a")]
ARCHITECTURES = {
    "gpt2": {},
    "gpt1": {"norm_position": "post", "activation": "gelu"},
    "sinusoidal": {"positions": "sinusoidal", "activation": "relu"},
    "rotary": {"positions": "rotary", "norm": "rmsnorm", "bias": False, "activation": "swiglu", "qk_norm": True},
    "banded": {"attention_band": 4},
    "grouped": {"n_kv_head": 1, "tied_head": False, "head_bias": True},
}


def model_of(seed=0, **settings):
    torch.manual_seed(seed)
    usual = {"block_size": 24, "vocab_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return randomised(GPT(GPTConfig(**usual | settings)), seed)


def written(model, prompts=PROMPTS, at_once=8, seed=1, numbers=None, most=9, temperature=1.0, ends=CHAT.ends):
    numbers = range(len(prompts)) if numbers is None else numbers
    return write_responses(Decoder(model), prompts, ends, most, temperature, seed, numbers, at_once)


# ---- responses


@pytest.mark.parametrize(
    ("device", "dtype", "copies"), [("cuda", "bfloat16", True), ("cuda", "float32", False), ("cpu", "bfloat16", False)]
)
def test_a_policy_on_a_gpu_has_a_writer_in_16_bits(device, dtype, copies):
    """It follows the policy, buffers included, and no gradient reaches it."""
    policy = model_of(n_experts=2, balance_rate=0.1)
    writer = writer_of(policy, torch.device(device), dtype)
    assert (writer is not policy) == copies
    with torch.no_grad():
        for tensor in (*policy.parameters(), *policy.buffers()):
            tensor.mul_(1.7)
    update_writer(writer, policy, REPLICATED.everywhere)
    for ours, theirs in zip(writer.state_dict().values(), policy.state_dict().values()):
        assert torch.equal(ours, theirs.to(torch.bfloat16 if copies else theirs.dtype))
    assert any(p.requires_grad for p in writer.parameters()) != copies


def test_a_response_ends_at_its_end_token_or_the_limit():
    model = model_of()
    responses = written(model, PROMPTS * 20, most=4)
    assert {len(response) for response in responses} == {1, 2, 3, 4}
    assert all(CHAT.end not in response[:-1] for response in responses)
    assert all(len(response) == 4 or response[-1] == CHAT.end for response in responses)


def test_a_response_ends_at_any_token_that_the_model_declares():
    tokenizer = CharTokenizer("abcdefgh")
    tokenizer.declared = dataclasses.replace(tokenizer.declared, ends=frozenset({2}))  # c
    chat = ChatFormat.new(TEMPLATES["markers"], tokenizer, 8)
    responses = written(model_of(), PROMPTS * 20, most=4, ends=chat.ends)
    assert {response[-1] for response in responses if len(response) < 4} == chat.ends == {2, chat.end}
    assert not chat.ends & {token for response in responses for token in response[:-1]}
    assert chat.decode([0, 1, 2]) == chat.decode([0, 1, chat.end]) == "ab"
    outputs, scores = ModelOutputs(*torch.zeros(4, len(responses), 4)), torch.zeros(len(responses))
    rollouts = gather_rollouts(PROMPTS * 20, responses, outputs, scores, scores, chat.ends)
    assert rollouts.ended.tolist() == [response[-1] in chat.ends for response in responses]


def test_a_response_depends_only_on_its_number():
    model = model_of()
    prompts, numbers = PROMPTS * 4, range(100, 120)
    whole = written(model, prompts, numbers=numbers)
    for at_once in (1, 3, 7):
        assert written(model, prompts, at_once, numbers=numbers) == whole
    assert written(model, prompts[1::2], numbers=numbers[1::2]) == whole[1::2]
    assert written(model, prompts, seed=2, numbers=numbers) != whole
    repeated = written(model, PROMPTS[:1] * 20, numbers=range(20))
    assert len({tuple(response) for response in repeated}) > 10


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_responses_follow_the_policy_s_distribution(temperature):
    """4,000 first tokens against the softmax: each share is within 5 standard errors."""
    model, count = model_of(), 4000
    responses = written(model, PROMPTS[:1] * count, count, most=1, temperature=temperature)
    logits = model(torch.tensor([PROMPTS[0].tokens]))[0, -1].detach().double()
    for token, p in enumerate((logits / temperature).softmax(-1).tolist()):
        share = sum(response == [token] for response in responses) / count
        assert abs(share - p) <= 5 * (p * (1 - p) / count) ** 0.5 + 1e-9


# ---- model outputs


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_a_full_forward_and_the_decoder(name, temperature):
    policy, reference = model_of(1, **ARCHITECTURES[name]), model_of(2, **ARCHITECTURES[name])
    critic = RewardModel(model_of(3))
    actor = ActorCritic(policy, critic, temperature).eval()
    responses = written(policy, temperature=temperature)
    held_to = ReferencePolicy(reference, temperature)
    outputs = {size: model_outputs(actor, held_to, PROMPTS, responses, size, CPU, "float32") for size in (1, 2, 16)}
    decoder = Decoder(policy)
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses)):
        step = decoder.read([prompt.tokens], room=len(response))
        for t, token in enumerate(response):
            before = torch.tensor([prompt.tokens + response[:t]])
            by_decoder = (step[0] / temperature).log_softmax(-1)[token].item()
            step = decoder.step([token])
            distribution = (policy(before)[0, -1] / temperature).log_softmax(-1)
            by_reference = (reference(before)[0, -1] / temperature).log_softmax(-1)[token].item()
            value = critic.head(critic.trunk.hidden(before))[0, -1].item()
            entropy = -(distribution.exp() * distribution).sum().item()
            for actual in outputs.values():
                assert actual.log_probs[i, t].item() == pytest.approx(distribution[token].item(), abs=1e-4)
                assert actual.log_probs[i, t].item() == pytest.approx(by_decoder, abs=1e-4)
                assert actual.reference_log_probs[i, t].item() == pytest.approx(by_reference, abs=1e-4)
                assert actual.values[i, t].item() == pytest.approx(value, abs=1e-4)
                assert actual.entropies[i, t].item() == pytest.approx(entropy, abs=1e-4)
    assert not outputs[1].log_probs.requires_grad


def test_a_shared_critic_and_the_loss_on_text():
    policy = model_of(1)
    actor = ActorCritic(policy, head := ScalarHead(16, 1.0), 1.0).eval()
    tokens, lengths, chosen = torch.randint(12, (2, 7)), torch.tensor([2, 4]), torch.randint(12, (2, 3))
    text = torch.randint(12, (2, 8)), torch.randint(12, (2, 8))
    _, _, values, none = actor(tokens, lengths, chosen)
    assert none is None
    torch.testing.assert_close(values[1], head(policy.hidden(tokens[1:])[0, 3:6]), rtol=1e-4, atol=1e-5)
    *shared_outputs, loss = actor(tokens, lengths, chosen, text)
    torch.testing.assert_close(shared_outputs[2], values)
    expected = nn.functional.cross_entropy(policy(text[0]).flatten(0, 1), text[1].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_gets_all_rollouts_in_the_order_of_prompts(monkeypatch, world):
    policy, reference = model_of(1), ReferencePolicy(model_of(2), 1.0)
    actor = ActorCritic(policy, ScalarHead(16, 1.0), 1.0).eval()
    responses = written(policy)

    def share(rank, of):
        rows = slice(rank, len(PROMPTS), of)
        outputs = model_outputs(actor, reference, PROMPTS[rows], responses[rows], 8, CPU, "float32")
        return responses[rows], outputs, torch.arange(10.0)[rows], torch.arange(20.0)[rows]

    monkeypatch.setattr(rollouts_module, "WORLD_SIZE", world)
    shares = [share(rank, world) for rank in range(world)]
    monkeypatch.setattr(
        distributed,
        "gather",
        lambda value: [(rows, torch.stack(outputs), *scores) for rows, outputs, *scores in shares],
    )
    rollouts = gather_rollouts(PROMPTS, *shares[-1], CHAT.ends)
    _, outputs, scores, monitored = share(0, 1)
    expected = ModelOutputs(*(torch.where(rollouts.mask, each, 0.0) for each in outputs))
    torch.testing.assert_close(rollouts.outputs, expected)
    assert rollouts.scores.tolist() == scores.tolist() == [0, 1, 2, 3, 4] and torch.equal(rollouts.monitored, monitored)
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses)):
        assert rollouts.sequences[i] == prompt.tokens + response and rollouts.prompt_lengths[i] == len(prompt.tokens)
        assert rollouts.responses[i, rollouts.mask[i]].tolist() == response
        assert not rollouts.responses[i, ~rollouts.mask[i]].any()
        assert rollouts.ended[i].item() == (response[-1] == CHAT.end)


def test_a_process_without_responses():
    actor = ActorCritic(model_of(1), ScalarHead(16, 1.0), 1.0).eval()
    assert written(actor.policy, []) == []
    for calls in (0, 2):  # where models are divided, it makes the others' calls
        outputs = model_outputs(actor, ReferencePolicy(model_of(2), 1.0), [], [], 8, CPU, "float32", calls)
        assert outputs.log_probs.shape == (0, 0)


# ---- prompts


def test_long_prompts_are_shortened_or_dropped(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    turns = [
        {"role": "user", "content": "aaaa"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = [{"prompt": "ab", "key": 1}, {"prompt": "a" * 9}, {"messages": turns}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_and_encode_prompts(path, CHAT, 6)
    assert [prompt.tokens for prompt in prompts] == [[9, 0, 1, 10], [9, 2, 10]] and prompts[0].row == rows[0]
    assert "prompts        2; 1 dropped: too long" in capsys.readouterr().out
    for room in (2, -5):
        with pytest.raises(UserError, match=f"no prompt of .* fits: max_new_tokens leaves {max(room, 0)} tokens"):
            read_and_encode_prompts(path, CHAT, room)
    path.write_text('{"q": "ab", "prompt": "c"}\n')
    assert read_and_encode_prompts(path, CHAT, 6, ["prompt=q"])[0].tokens == [9, 0, 1, 10]
    path.write_text('{"prompt": "X"}\n')
    with pytest.raises(UserError, match="p.jsonl, line 1: the character 'X'"):
        read_and_encode_prompts(path, CHAT, 6)


# ---- rewards

RULES = """
import numpy, torch
def length(rows, responses): return [len(text) + row.get("more", 0) for row, text in zip(rows, responses)]
def array(rows, responses): return numpy.array([len(text) for text in responses])
def tensor(rows, responses): return torch.tensor([len(text) for text in responses])
def generated(rows, responses): return (len(text) > 1 for text in responses)
def short(rows, responses): return [1.0]
def nan(rows, responses): return [0.0] * (len(responses) - 1) + [float("nan")]
def none(rows, responses): return None
def words(rows, responses): return list(responses)
def broken(rows, responses): return helper(rows)
def helper(rows): return rows[0]["no such column"]
constant = 3
class Judge:
    def __call__(self, rows, responses): return [1.0] * len(rows)
judge = Judge()
"""


@pytest.fixture
def rules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rules_of_test.py").write_text(RULES)
    Path("broken_rules.py").write_text("import json\njson.loads('{')\n")
    Path("needy_rules.py").write_text("import absent\n")
    Path("unreadable_rules.py").write_text("def length(rows:\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("rules_of_test", "needy_rules", "broken_rules", "unreadable_rules"):
        sys.modules.pop(name, None)


def rewards(name):
    prompts = [Prompt([9, 0, 10], {"prompt": "a"}), Prompt([9, 1, 10], {"prompt": "b", "more": 5})]
    return load_reward(name, CHAT, CPU, "float32", 8)(prompts, [[0, 1, 10, 11], [2]])  # a marker has no text


@pytest.mark.parametrize(
    ("function", "expected"),
    [("length", [2, 6]), ("array", [2, 1]), ("tensor", [2, 1]), ("generated", [1, 0]), ("judge", [1, 1])],
)
def test_reward_functions(rules, function, expected):
    assert rewards(f"rules_of_test:{function}").tolist() == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rules_of_test:short", "must return one number per response, not 1 for 2"),
        ("rules_of_test:nan", "must return finite numbers, not nan for 'c'"),
        ("rules_of_test:none", "must return a list of numbers, one per response, not None"),
        ("rules_of_test:words", "must return a list of numbers, one per response, not ['ab', 'c']"),
        ("rules_of_test:broken", "rules_of_test:broken failed: rules_of_test.py, line 12: KeyError: 'no such column'"),
        (
            "rules_of_test:absent",
            "reward = rules_of_test:absent can't be imported: rules_of_test has no function absent",
        ),
        ("rules_of_test:constant", "reward = rules_of_test:constant is not a function"),
        ("no_such_rules:length", "can't be imported: there is no module no_such_rules in this folder or installed"),
        (
            "needy_rules:length",
            "can't be imported: needy_rules.py, line 1: ModuleNotFoundError: No module named 'absent'",
        ),
        ("broken_rules:length", "can't be imported: broken_rules.py, line 2: JSONDecodeError: Expecting property name"),
        ("unreadable_rules:length", "can't be imported: SyntaxError"),
        ("rules_of_test", "is neither a reward model's directory nor a function (module:function)"),
        (":length", "is neither a reward model's directory nor a function (module:function)"),
    ],
)
def test_failing_reward_functions_are_named(rules, name, message):
    with pytest.raises(UserError) as refused:
        rewards(name)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_reward_models_score_whole_sequences(tmp_path):
    model = RewardModel(model_of(block_size=8))
    save_reward_model(model, LETTERS, CHAT, tmp_path / "reward")
    score = load_reward(str(tmp_path / "reward"), CHAT, CPU, "float32", 8)
    responses = [[1, 11], [2, 3, 4]]
    scores = score(PROMPTS[:1] * 2, responses)
    for number, response in zip(scores.tolist(), responses):
        whole = torch.tensor([PROMPTS[0].tokens + response])
        assert number == pytest.approx(model(whole, torch.tensor([whole.size(1)])).item(), abs=1e-5)
    with pytest.raises(UserError, match="reads at most 8 tokens; a response ends at 9"):
        score(PROMPTS[:1], [[1] * 6])
    asking = dataclasses.replace(TEMPLATES["markers"], user="<|user|>a{content}")
    formats = ChatFormat.new(TEMPLATES["markers"], CharTokenizer("abcdefgi"), 8), ChatFormat.new(asking, LETTERS, 8)
    for chat in formats:
        with pytest.raises(UserError, match="has another chat format or tokenizer than the policy"):
            load_reward(str(tmp_path / "reward"), chat, CPU, "float32", 8)
