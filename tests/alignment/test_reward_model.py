"""Rankings as tokens, reward models as files, and the agreement of scores with preferences."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from gpt_arc.alignment.losses import agreement, ranking_loss
from gpt_arc.alignment.policy import fingerprint
from gpt_arc.alignment.rankings import encode_rankings, encode_split, fitting_prompt, padded, pairs_of
from gpt_arc.alignment.reward_model import (
    HEAD,
    RewardModel,
    ScalarHead,
    is_reward_model,
    load_reward_model,
    preference_report,
    save_reward_model,
    score_sequences,
)
from gpt_arc.chat.files import Ranking, read_rankings
from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn, load_chat_model
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.weights.directory import save_model
from helpers import randomised
from model import GPT, GPTConfig

LETTERS = CharTokenizer("abcdefgh")
CHAT = ChatFormat.new(TEMPLATES["markers"], LETTERS, 8)  # <|system|> 8, <|user|> 9, <|assistant|> 10, <|end|> 11
CPU = torch.device("cpu")


def ranking(prompt, responses, ranks=None):
    turns = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    return Ranking(turns, tuple(responses), tuple(ranks or range(1, len(responses) + 1)), "a file, line 1")


def reward_model(**settings):
    torch.manual_seed(0)
    return RewardModel(randomised(GPT(GPTConfig(16, 12, 2, 2, 16, **settings))))


# ---- rankings


def test_a_ranking_is_encoded_with_its_pairs_except_ties():
    encoded = encode_rankings([ranking("ab", ["c", "dd", "", "e"], [2, 1, 2, 3])], CHAT, 16)
    (example,) = encoded.examples
    assert example.prompt == [9, 0, 1, 10] and example.responses == [[2, 11], [3, 3, 11], [11], [4, 11]]
    assert sorted(example.pairs) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]  # one of six is a tie
    assert example.sequences[1] == [9, 0, 1, 10, 3, 3, 11]
    assert (encoded.pairs, encoded.ties, encoded.dropped) == (5, 1, 0)


def test_a_pair_of_equal_responses_is_left_out_like_a_tie():
    rankings = [ranking("a", ["b", "b"]), ranking("a", ["b", "c", "b"]), ranking("a", ["b", "c"])]
    encoded = encode_rankings(rankings, CHAT, 16)
    assert [sorted(example.pairs) for example in encoded.examples] == [[(0, 1), (1, 2)], [(0, 1)]]
    assert (encoded.pairs, encoded.ties, encoded.dropped) == (3, 2, 1)


def test_equal_scores_count_half_in_every_line():
    gaps = torch.tensor([2.0, 0.0, -1.0, 0.0, 0.5])
    assert agreement(gaps).tolist() == [1, 0.5, 0, 0.5, 1]
    assert preference_report(gaps.tolist())["accuracy"] == pytest.approx(agreement(gaps).mean().item())


def test_rankings_without_preference_or_too_long_are_dropped_and_counted():
    rankings = [
        ranking("a", ["b", "c"], [1, 1]),
        ranking("a", ["b" * 13, "c"]),  # 3 + 14 tokens
        ranking("a", ["b" * 12, "c"]),
        ranking("a", ["b", "c", "d"], [1, 1, 2]),
    ]
    examples, pairs, ties, dropped = encode_rankings(rankings, CHAT, 16)
    assert (len(examples), pairs, ties, dropped) == (2, 1 + 2, 2, 2)
    assert max(map(len, examples[0].sequences)) == 16


def test_old_turns_are_dropped_to_fit_the_longest_response():
    turns = [Turn("system", "h"), Turn("user", "aaa"), Turn("assistant", "b"), Turn("user", "c")]
    assert fitting_prompt(CHAT, turns, 12) == [8, 7, 9, 0, 0, 0, 10, 1, 11, 9, 2, 10]
    assert fitting_prompt(CHAT, turns, 11) == [8, 7, 9, 2, 10] == fitting_prompt(CHAT, turns, 5)
    assert fitting_prompt(CHAT, turns, 4) is None
    for most, prompt in ((3, 12), (4, 5), (10, 5)):
        (example,) = encode_rankings([ranking(turns, ["d" * most, "e"])], CHAT, 16).examples
        assert len(example.prompt) == prompt  # shared by both responses
    assert encode_rankings([ranking(turns, ["d" * 11, "e"])], CHAT, 16).dropped == 1


def test_bad_rankings_are_named():
    with pytest.raises(UserError, match="a file, line 1: the character 'X'"):
        encode_rankings([ranking("a", ["X", "b"])], CHAT, 16)
    message = "no ranking of the train split fits into 16 tokens and prefers one response to another"
    with pytest.raises(UserError, match=message):
        encode_split("train", [ranking("a", ["b", "b"], [1, 1])], CHAT, 16)


def test_pairs_and_rankings_give_the_same_examples(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"messages": [{"role": "user", "content": "a"}], "responses": ["b", "c"]},
        {"prompt": "a", "responses": ["c", "b"], "ranks": [2, 1]},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair, listed, ranked = encode_rankings(read_rankings(tmp_path / "r.jsonl"), CHAT, 16).examples
    assert pair == listed
    assert [ranked.responses[i] for i in ranked.pairs[0]] == [pair.responses[i] for i in pair.pairs[0]]


def test_the_pairs_of_a_prompt_have_a_total_weight_of_1():
    rankings = [ranking("a", ["b", "c", "d"]), ranking("b", ["c", "d"]), ranking("c", ["d", "e", "f"], [1, 2, 2])]
    examples = encode_rankings(rankings, CHAT, 16).examples
    pairs = pairs_of(examples, CPU)
    assert pairs.better.tolist() == [0, 0, 1, 3, 5, 5] and pairs.worse.tolist() == [1, 2, 2, 4, 6, 7]
    assert pairs.weights.tolist() == pytest.approx([1 / 3] * 3 + [1] + [1 / 2] * 2)
    scores = torch.randn(8)
    separate = [ranking_loss(scores[a:b], *pairs_of([e], CPU)) for e, a, b in zip(examples, (0, 3, 5), (3, 5, 8))]
    assert ranking_loss(scores, *pairs).item() == pytest.approx(sum(separate).item(), rel=1e-6)


def test_padding():
    tokens, lengths = padded([[1, 2, 3], [4], []], CPU)
    assert tokens.tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]] and lengths.tolist() == [3, 1, 0]
    assert padded([[], []], CPU)[0].dtype == torch.int64


# ---- reward models


def test_initial_heads_match_the_published_ones():
    torch.manual_seed(0)
    head, values = ScalarHead(9999, 1 / math.sqrt(10_000)), ScalarHead(5, 0.0)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.03) and head.bias.item() == 0
    assert not values.weight.any() and not values.bias.any() and values.weight.requires_grad
    assert RewardModel(GPT(GPTConfig(8, 12, 1, 2, 9998, head_size=4, mlp_size=4))).head.weight.std().item() == (
        pytest.approx(1 / math.sqrt(9999), rel=0.03)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(3, 9999, dtype=torch.bfloat16)).dtype == torch.float32


def test_scores_are_of_the_last_token_in_any_batch():
    model = reward_model()
    draw = random.Random(0)
    sequences = [[draw.randrange(12) for _ in range(draw.randrange(1, 17))] for _ in range(11)]
    model.train()
    for size in (1, 4, 32):
        scores = score_sequences(model, sequences, size, CPU, "float32")
        for score, sequence in zip(scores.tolist(), sequences):
            hidden = model.trunk.hidden(torch.tensor([sequence]))[0, -1]
            assert score == pytest.approx((hidden @ model.head.weight[0] + model.head.bias).item(), abs=1e-5)
    assert model.training and not scores.requires_grad
    assert score_sequences(model, [], 4, CPU, "float32").shape == (0,)


@pytest.mark.parametrize("settings", [{}, {"tied_head": False, "head_bias": True}])
def test_everything_except_an_unused_head_learns(settings):
    model = reward_model(**settings)
    model(*padded([[1, 2], [3]], CPU)).sum().backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == ({"trunk.head.weight", "trunk.head_bias"} if settings else set())
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_a_reward_model_is_saved_and_loaded(tmp_path):
    model = reward_model()
    model.head.bias.data.fill_(0.5)
    save_reward_model(model, LETTERS, CHAT, tmp_path / "run" / "last")
    assert is_reward_model(tmp_path / "run") and is_reward_model(tmp_path / "run" / "last")
    assert not is_reward_model(tmp_path) and not is_reward_model("rules:correct")
    loaded, tokenizer, chat = load_reward_model(tmp_path / "run")
    assert tokenizer == LETTERS and chat == CHAT
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert fingerprint(loaded) == fingerprint(model)
    loaded.head.bias.data.add_(1e-6)
    assert fingerprint(loaded) != fingerprint(model)
    (tmp_path / "run" / "last" / "manifest.json").unlink()  # as in older versions, which wrote none
    head = tmp_path / "run" / "last" / HEAD
    head.write_bytes(head.read_bytes()[:-7])
    with pytest.raises(UserError, match="reward.safetensors is damaged"):
        load_reward_model(tmp_path / "run")
    head.unlink()
    message = r"last has no reward head \(reward.safetensors\): train one with: python stages/reward.py \S+/last"
    with pytest.raises(UserError, match=message):
        load_reward_model(tmp_path / "run")
    Path(tmp_path / "run" / "last" / "chat.json").unlink()
    message = (
        r"doesn't know how turns are marked \(chat.json\): train it first with: python stages/sft.py \S+/(last|mute) "
    )
    with pytest.raises(UserError, match=message):
        load_chat_model(tmp_path / "run")
    save_model(model.trunk, None, tmp_path / "mute")
    with pytest.raises(UserError, match=message):
        load_chat_model(tmp_path / "mute")


# ---- agreement


def test_the_preference_report_by_hand():
    report = preference_report([2.0, -1.0, 0.5, 0.0, 3.0], groups=2)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert report["pairs"] == 5 and report["accuracy"] == pytest.approx(3.5 / 5)  # an equal pair counts half
    right = [1, 0, 1, 0.5, 1]
    deviation = math.sqrt(sum((x - 0.7) ** 2 for x in right) / 4)
    assert report["standard_error"] == pytest.approx(deviation / math.sqrt(5))
    low, high = report["by_gap"]  # gaps 0, .5, -1 and 2, 3
    assert (low["from"], low["to"], low["pairs"], high["from"], high["to"], high["pairs"]) == (0, 1, 3, 2, 3, 2)
    assert low["agreed"] == pytest.approx(0.5) and high["agreed"] == 1
    assert low["predicted"] == pytest.approx((0.5 + sigmoid(0.5) + sigmoid(1)) / 3)
    assert high["predicted"] == pytest.approx((sigmoid(2) + sigmoid(3)) / 2)
    errors = 3 * abs(low["predicted"] - 0.5) + 2 * abs(high["predicted"] - 1)
    assert report["calibration_error"] == pytest.approx(errors / 5)
    assert preference_report([1.0])["accuracy"] == 1 and preference_report([1.0])["standard_error"] == 0


@pytest.mark.parametrize(("scale", "least", "most"), [(1.0, 0.0, 0.015), (3.0, 0.1, 0.3)])
def test_calibration_error_detects_overconfidence(scale, least, most):
    """Pairs drawn from the Bradley-Terry model; then with scores three times too large."""
    draw = random.Random(5)
    gaps = []
    for _ in range(20_000):
        gap = draw.gauss(0, 1)
        gaps.append(scale * (gap if draw.random() < 1 / (1 + math.exp(-gap)) else -gap))
    assert least <= preference_report(gaps)["calibration_error"] <= most
