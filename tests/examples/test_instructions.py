"""The instructions, the simulated judge and the report of examples/instructgpt_arc.sh."""

import json
import math
import random
import re
from collections import Counter
from itertools import combinations, permutations, product

import pytest
import torch
from scipy.stats import chisquare

import instructgpt_report
import instruction_judge
import instructions_data
from gpt_arc.chat.format import TEMPLATES, ChatFormat
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import entry_point
from gpt_arc.weights.directory import save_model
from model import GPT, GPTConfig

SMALL = ("--documents=300", "--demonstrations=60", "--train=400", "--test=120")


@pytest.fixture
def files(tmp_path, output_of):
    output_of(entry_point(instructions_data.main), "instructions_data", f"--output={tmp_path / 'made'}", *SMALL)
    return {path.stem: instruction_judge.read(path) for path in (tmp_path / "made").iterdir()}


def by_another_rule(kind, word):
    """Returns the answer of a kind by an independent implementation."""
    places = range(len(word))
    if kind == "once more":
        return "".join(word[i] for i in places)
    if kind == "backwards":
        return "".join(word[-1 - i] for i in places)
    if kind == "in order":
        return "".join(chr(c) * word.count(chr(c)) for c in range(ord("a"), ord("z") + 1))
    if kind == "in capitals":
        return "".join(chr(ord(c) - 32) for c in word)
    if kind == "double letters":
        return "".join(word[i // 2] for i in range(2 * len(word)))
    if kind == "one letter on":
        return "".join(chr((ord(c) - 96) % 26 + 97) for c in word)
    if kind == "ends":
        return re.sub("^(.).*(.)$", r"\1\2", word)
    assert kind == "most"
    return str(max(word.count(c) for c in word))


def test_every_kind_agrees_with_another_implementation():
    rng = random.Random(1)
    for name, kind in instructions_data.KINDS.items():
        for word in (*(instructions_data.draw_word(kind, held_out, rng) for held_out in [True, False] * 50), "zza"):
            assert kind.answer(word) == by_another_rule(name, word), (name, word)


def test_answers_are_right_and_fit_into_a_response(files):
    rows = files["train"] + files["test"] + files["demonstrations"]
    for row in rows:
        kind, word = row["prompt"].split(": ")
        assert row["kind"] == kind and row["answer"] == by_another_rule(kind, word)
        assert len(row.get("response", row["answer"])) < instruction_judge.MOST
        assert row["answer"] in row.get("response", row["answer"])
    names = [name for name, kind in instructions_data.KINDS.items() if kind.instructed]
    assert Counter(row["kind"] for row in files["test"]) == dict.fromkeys(names, len(files["test"]) // len(names))


def test_held_out_words_occur_nowhere_else(files):
    prompts = {name: {row["prompt"] for row in rows} for name, rows in files.items() if name != "corpus"}
    for name, rows in files.items():
        assert name == "corpus" or len(prompts[name]) == len(rows)
    for a, b in combinations(prompts.values(), 2):
        assert not a & b
    held_out = {row["prompt"].split(": ")[1] for row in files["test"]}
    elsewhere = {row["prompt"].split(": ")[1] for name in ("train", "demonstrations") for row in files[name]}
    assert not held_out & elsewhere
    sentences = [line for row in files["corpus"][-300:] for line in row["text"].splitlines()]
    forms = [form for kind in instructions_data.KINDS.values() for form in kind.sentences]
    patterns = [re.escape(form).replace(r"\{word\}", "([a-z]+)").replace(r"\{answer\}", r"\w+") for form in forms]
    words = {m[1] for line in sentences if (m := next(filter(None, (re.fullmatch(p, line) for p in patterns))))}
    assert len(words) > 800 and not any(map(instructions_data.is_held_out, words))


def test_the_same_seed_gives_the_same_files(files, tmp_path, output_of):
    output_of(entry_point(instructions_data.main), "instructions_data", f"--output={tmp_path / 'again'}", *SMALL)
    assert {path.stem: instruction_judge.read(path) for path in (tmp_path / "again").iterdir()} == files


def test_utility_counts_letters_in_their_places():
    rows = [{"answer": "regit"}] * 5
    actual = instruction_judge.utility(rows, ["regit", "regit!!!!!", "um regit", "", "rugat"])
    assert actual == [10, 5, 0, 0, 6]


def test_the_judge_ranks_by_plackett_and_luce_and_pairs_follow_bradley_and_terry():
    rng, utilities, count = random.Random(3), [0.0, 0.7, 2.0], 20_000
    drawn = Counter(tuple(instruction_judge.ranks_of(utilities, rng)) for _ in range(count))
    strengths = [math.exp(u) for u in utilities]
    expected = {}
    for order in permutations(range(3)):  # from the best to the worst
        remaining, probability = sum(strengths), 1.0
        for i in order:
            probability, remaining = probability * strengths[i] / remaining, remaining - strengths[i]
        expected[tuple(order.index(i) + 1 for i in range(3))] = count * probability
    assert chisquare([drawn[ranks] for ranks in expected], list(expected.values())).pvalue > 0.01
    for a, b in combinations(range(3), 2):
        exact = 1 / (1 + math.exp(utilities[b] - utilities[a]))
        wins = sum(n for ranks, n in drawn.items() if ranks[a] < ranks[b])
        assert abs(wins / count - exact) < 4 * math.sqrt(exact * (1 - exact) / count)


def test_bayes_accuracy_is_the_best_of_all_predictors():
    rankings = [{"utilities": [0.0, 1.0, 3.0]}, {"utilities": [2.0, 2.0]}]
    chances = [1 / (1 + math.exp(b - a)) for row in rankings for a, b in combinations(row["utilities"], 2)]
    predictors = product([True, False], repeat=len(chances))
    best = max(sum(p if a else 1 - p for p, a in zip(chances, answers)) / len(chances) for answers in predictors)
    accuracy, pairs = instruction_judge.bayes_accuracy(rankings)
    assert pairs == 4 and accuracy == pytest.approx(best)


@pytest.fixture
def chat_model(tmp_path):
    torch.manual_seed(0)
    tokenizer = CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ !-:")
    chat = ChatFormat.new(TEMPLATES["markers"], tokenizer, tokenizer.vocab_size)
    vocabulary = tokenizer.vocab_size + len(chat.added)
    model = GPT(GPTConfig(vocab_size=vocabulary, block_size=64, n_layer=1, n_head=2, n_embd=16))
    save_model(model, tokenizer, tmp_path / "model")
    chat.save(tmp_path / "model")
    return tmp_path / "model"


def test_rankings_of_a_model(files, chat_model, tmp_path, output_of):
    prompts, output = tmp_path / "made" / "train.jsonl", tmp_path / "rankings.jsonl"
    judge = entry_point(instruction_judge.main), "instruction_judge", str(chat_model)
    output_text = output_of(*judge, f"--rank={prompts}", f"--output={output}", "--limit=20", "--flaw=0.5")
    rows = instruction_judge.read(output)
    assert len(rows) == 20 and "120 pairs" in output_text
    for row, prompt in zip(rows, files["train"]):
        plain = instruction_judge.utility([prompt] * 4, row["responses"])
        assert row["prompt"] == prompt["prompt"] and sorted(row["ranks"]) == [1, 2, 3, 4]
        assert row["utilities"] == [u + 0.5 * len(r) for u, r in zip(plain, row["responses"])]
        assert len(set(row["responses"])) > 1
    again = tmp_path / "again.jsonl"
    output_of(*judge, f"--rank={prompts}", f"--output={again}", "--limit=20", "--flaw=0.5")
    assert again.read_text() == output.read_text()
    assert f"{instruction_judge.bayes_accuracy(rows)[0]:.4f}" in output_of(*judge[:2], f"--bayes={output}")
    figures = json.loads(output_of(*judge, f"--measure={tmp_path / 'made' / 'test.jsonl'}"))
    assert figures["prompts"] == 120 and 0 <= figures["utility"] < 3


def test_mistakes_are_reported(output_of, tmp_path):
    main = entry_point(instruction_judge.main), "instruction_judge"
    assert "--rank" in output_of(*main)
    assert "--responses = 1 must be at least 2" in output_of(*main, "--responses=1")
    assert "can't be read" in output_of(*main, f"--bayes={tmp_path / 'none.jsonl'}")
    assert "at least 1" in output_of(entry_point(instructions_data.main), "instructions_data", "--test=0")
    assert "has no runs" in output_of(
        entry_point(instructgpt_report.main), "instructgpt_report", f"--results={tmp_path}"
    )


def test_the_interval_is_students():
    assert instructgpt_report.interval([1.0, 2.0, 3.0]) == "+2.000 ± 2.484"  # t of 2 degrees 4.3027, over sqrt 3
