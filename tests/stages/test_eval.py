"""stages/eval.py as a user runs it, on models whose probabilities are known, and what it refuses."""

import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import lm_eval.tasks
import matplotlib.figure
import pytest
import torch
from safetensors.torch import load_file

from gpt_arc.data.declared import Declared
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.harness import HarnessModel
from gpt_arc.evaluation.items import demonstrations
from gpt_arc.evaluation.measure import TaskItems, gather, measure_task, with_overlap
from gpt_arc.evaluation.metrics import choice_accuracy, item_values
from gpt_arc.evaluation.reader import Reader
from gpt_arc.evaluation.tasks import Question, Task
from gpt_arc.weights.directory import save_model
from helpers import randomised, write, write_dataset
from model import GPT, GPTConfig
from stages import eval as stage
from stub_models import bigrams

LETTERS = "\n abcéqr"  # an empty context becomes the first one
TOKENIZER = CharTokenizer(sorted(LETTERS))
# P(next | letter); the letters that a row doesn't name share the remaining probability evenly
CHANCES = {
    "q": {"b": 0.25, "a": 0.3, "é": 0.2, "c": 0.05},
    "a": {"a": 0.5, "b": 0.2},
    "b": {"c": 0.6},
    "c": {"\n": 0.7, "c": 0.1},
    "é": {"é": 0.4, "a": 0.25, "b": 0.25},
    "r": {"b": 0.5, "a": 0.4, "é": 0.05, "c": 0.01},
    "\n": {"q": 0.3, "a": 0.2},
    " ": {"b": 0.9},
}
LINES = ["qab", "rb", "qaé", "éa", "qbc"]
TEXT = "".join(f"{line} " + "\n" * (number % 3) for number, line in enumerate(LINES * 4))


def table_of(chances):
    """Returns the transition probabilities (from, to), in the order of TOKENIZER.characters."""
    rows = []
    for letter in TOKENIZER.characters:
        row = chances[letter]
        remainder = (1 - sum(row.values())) / (len(LETTERS) - len(row))
        rows.append([row.get(following, remainder) for following in TOKENIZER.characters])
    return torch.tensor(rows, dtype=torch.float64)


TABLE = table_of(CHANCES)


def log_chance(before, text, table=TABLE):
    """Returns the log-probability of a text after the letter `before`."""
    places = [TOKENIZER.characters.index(letter) for letter in before + text]
    return sum(math.log(table[a, b]) for a, b in zip(places, places[1:]))


def reader_of(model, batch_tokens=100):
    return Reader(model, TOKENIZER, batch_tokens)


@pytest.fixture(scope="module")
def reader():
    return reader_of(bigrams(TABLE))


def slow_log_probability(model, context, continuation):
    """Returns the log-probability of the continuation by one pass over the tokens that fit into the context."""
    tokens = TOKENIZER.encode(context + continuation)[-(model.config.block_size + 1) :]
    size = len(TOKENIZER.encode(continuation))
    with torch.no_grad():
        logs = model(torch.tensor([tokens[:-1]])).double().log_softmax(-1)[0, -size:]
    return logs.gather(1, torch.tensor(tokens[-size:])[:, None]).sum().item()


CLOZE = 'title = "a"\nkind = "cloze"\ncontext = "{q}"\nanswer = "{a}"\nseparator = " "\n'
CHOICE = CLOZE.replace("cloze", "choice") + 'options = "options"\n'
GENERATE = CLOZE.replace("cloze", "generate")
ITEMS = [{"q": q, "a": a} for q, a in (("q", "a"), ("bq", "ab"), ("a", "a"), ("b", "c"), ("é", "éé"), ("r", "c"))]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder with the model directory `base`, tasks and items."""
    monkeypatch.chdir(tmp_path)
    save_model(bigrams(TABLE), TOKENIZER, "base")
    for name, content in (("cloze", CLOZE), ("choice", CHOICE), ("generate", GENERATE)):
        Path(f"{name}.toml").write_text(content)
    write("items.jsonl", ITEMS)
    Path("text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    """Runs the stage in this process; returns its output and report, or the error message."""

    def call(*flags):
        Path("report.json").unlink(missing_ok=True)
        flags = ["--json=report.json", *flags, "--device=cpu"]
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            entry_point(stage.main)()
        output, errors = capsys.readouterr()
        if stop.value.code:
            assert "Traceback" not in errors and errors.count("\n") == 1, errors
            assert stop.value.code == 2 and not os.path.exists("report.json")
            return SimpleNamespace(message=errors)
        return SimpleNamespace(output=output, report=json.loads(Path("report.json").read_text()))

    return call


def one_model(result):
    """Returns the report of the only model."""
    (model,) = result.report["models"]
    return model


# options after "q" with their probabilities there, tokens, bytes and probability after "r":
#     b 1/4, 1, 1, 1/2     aa 0.3 / 2, 2, 2, 0.4 / 2     éé 0.2 * 0.4, 2, 4, 0.05 * 0.4     c 0.05, 1, 1, 0.01
OPTIONS = ["b", "aa", "éé", "c"]
LIKELIEST = {"sum": 0, "token": 1, "character": 1, "byte": 2, "unconditional": 3}


def choice(**settings):
    return Task("mine", "mine", "choice", "q", options="options", answer="{answer}", unconditional="r", **settings)


@pytest.mark.parametrize("normalise", LIKELIEST)
def test_each_normalisation_selects_another_option(reader, normalise):
    chances = [0.25, 0.15, 0.08, 0.05]
    for option, value in zip(OPTIONS, chances):
        assert log_chance("q", option) == pytest.approx(math.log(value))
    values = {
        "sum": [math.log(value) for value in chances],
        "token": [math.log(value) / size for value, size in zip(chances, (1, 2, 2, 1))],
        "character": [math.log(value) / size for value, size in zip(chances, (1, 2, 2, 1))],
        "byte": [math.log(value) / size for value, size in zip(chances, (1, 2, 4, 1))],
        "unconditional": [math.log(value / prior) for value, prior in zip(chances, (0.5, 0.2, 0.02, 0.01))],
    }[normalise]
    assert values.index(max(values)) == LIKELIEST[normalise]
    task = choice(normalise=normalise)
    questions = [(task.question({"options": OPTIONS, "answer": answer}), "bac ") for answer in range(4)]
    for batch_tokens in (1, 1000):
        right = choice_accuracy(task, reader._replace(batch_tokens=batch_tokens), questions)
        assert right == [float(answer == LIKELIEST[normalise]) for answer in range(4)]


def test_normalisation_equals_the_harness(workplace):
    """acc_norm divides by the characters of an option, acc_bytes by its bytes, both without the space before it."""
    chance = random.Random(0)
    items = [
        {"q": "qab"[: 1 + n % 3], "gold": n % 3, "options": ["".join(chance.choices("abcéqr", k=k)) for k in (1, 2, 4)]}
        for n in range(60)
    ]
    write("options.jsonl", items)
    harness = {
        "task": "mine", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": "options.jsonl"}, "cache_dir": "cache"},
        "doc_to_text": "{{q}}", "doc_to_choice": "{{options}}", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc_norm"}, {"metric": "acc_bytes"}],
    }  # fmt: skip
    Path("tasks").mkdir()
    Path("tasks/mine.yaml").write_text(json.dumps(harness))
    manager = lm_eval.tasks.TaskManager(include_path="tasks", include_defaults=False)
    model = HarnessModel("base", device="cpu", batch_tokens=1000)
    output = lm_eval.simple_evaluate(model, tasks=["mine"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    samples = sorted(output["samples"]["mine"], key=lambda sample: sample["doc_id"])
    right = {}
    for normalise, metric in (("character", "acc_norm"), ("byte", "acc_bytes")):
        task = Task("mine", "mine", "choice", "{q}", " {option}", "options", answer="{gold}", normalise=normalise)
        right[normalise] = choice_accuracy(task, reader_of(model.model), [(task.question(item), "") for item in items])
        assert right[normalise] == [sample[metric] for sample in samples]
    spaced = []
    for item in items:
        values = [log_chance(item["q"][-1], f" {option}") / len(f" {option}") for option in item["options"]]
        spaced.append(float(values.index(max(values)) == item["gold"]))
    assert right["character"] != right["byte"] and right["character"] != spaced


@pytest.mark.parametrize("normalise", LIKELIEST)
def test_the_first_of_equal_options_wins(reader, normalise):
    task = choice(normalise=normalise)
    options = ["b", "c", "c"] if normalise == "unconditional" else ["c", "b", "b"]
    questions = [(Question(["q"] * 3, options, answer), "") for answer in range(3)]
    assert choice_accuracy(task, reader, questions) == [0.0, 1.0, 0.0]


def test_questions_may_differ_in_their_number_of_options_and_in_contexts(reader):
    task = choice()
    questions = [
        (Question(["q"] * 2, ["c", "b"], 1), ""),
        (Question(["q", "r", "b", "a"], ["c"] * 4, 2), ""),  # 0.05, 0.01, 0.6, 0.05, as in WinoGrande
        (Question(["q", "r", "é"], ["b"] * 3, 0), ""),
    ]
    assert choice_accuracy(task, reader, questions) == [1.0, 1.0, 0.0]


def test_a_long_prompt_loses_its_beginning():
    config = GPTConfig(block_size=8, vocab_size=8, n_layer=2, n_head=2, n_embd=16)
    model = randomised(GPT(config))
    reader, long = reader_of(model), "qabéc rab qa\nbbc éérq"
    pairs = [(long, option) for option in ("a", "bc", "qabcaqab")] + [("q", "a")]
    expected = [slow_log_probability(model, *pair) for pair in pairs]
    assert [score.log_probability for score in reader.score(pairs, "mine")] == pytest.approx(expected, rel=1e-4)
    task = Task("mine", "mine", "generate", "{q}", answer="{a}", stop=("never",), max_new_tokens=3)
    for end in range(10, len(long)):
        tokens = TOKENIZER.encode(long[:end])[-5:]
        with torch.no_grad():
            for _ in range(3):
                tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        assert reader.answers([long[:end]], task, 0) == [TOKENIZER.decode(tokens[5:])]
    (text,) = reader.answers([long], Task("a", "a", "generate", answer="", stop=("never",), max_new_tokens=20), 0)
    assert len(text) == 20


def test_batching_does_not_change_answers():
    model = randomised(GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=2, n_head=2, n_embd=16)))
    task = Task("mine", "mine", "generate", answer="", stop=("bb", "aq", "qqq"), max_new_tokens=9)
    prompts = ["qab", "", "éqr abc", "r", "qab", "abcéqr abcéqr abcéqr", "b", "éé"]
    singly = [reader_of(model).answers([prompt], task, 0)[0] for prompt in prompts]
    assert len(set(singly)) > 4 and len(set(map(len, singly))) > 2
    for batch_tokens in (1, 40, 10_000):
        assert reader_of(model, batch_tokens).answers(prompts, task, 0) == singly


def test_sampled_answers_are_among_the_likeliest_and_depend_on_the_seed(reader):
    task = Task("mine", "mine", "generate", answer="", stop=("\n",), max_new_tokens=12, top_k=2)
    drawn = {}
    for seed in range(20):
        drawn[seed] = reader.answers(["q", "r", "q"], task, seed)
        assert drawn[seed] == reader._replace(batch_tokens=1).answers(["q", "r", "q"], task, seed)
        for before, text in zip("qrq", drawn[seed]):
            for a, b in zip(before + text, text):
                row = TABLE[TOKENIZER.characters.index(a)]
                assert row[TOKENIZER.characters.index(b)] >= row.topk(2).values[1]
    assert len({text for texts in drawn.values() for text in texts}) > 10
    assert any(texts[0] != texts[2] for texts in drawn.values())  # equal prompts are sampled independently


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_beams_find_the_likeliest_answer(reader, penalty):
    """By brute force over all texts that end with a newline or at 4 letters, by log-probability / length^penalty."""
    task = Task("a", "a", "generate", answer="", stop=("\n",), max_new_tokens=4, num_beams=512, length_penalty=penalty)
    letters = [letter for letter in TOKENIZER.characters if letter != "\n"]
    for prompt in "qaé":
        texts = ["".join(part) for size in range(4) for part in itertools.product(letters, repeat=size)]
        ended = [f"{text}\n" for text in texts] + ["".join(part) for part in itertools.product(letters, repeat=4)]
        best = max(ended, key=lambda text: log_chance(prompt, text) / len(text) ** penalty)
        assert reader.answers([prompt], task, 0) == [best.removesuffix("\n")]
    greedy = reader.answers(list("qaé"), Task("a", "a", "generate", answer="", max_new_tokens=4), 0)
    assert penalty != 0.6 or greedy != reader.answers(list("qaé"), task, 0)


def test_cloze_is_right_if_greedy_decoding_gives_the_answer(run):
    result = run("base", "--tasks", "cloze.toml", "--data=items.jsonl")
    accuracy, perplexity = one_model(result)["tasks"]
    # likeliest: a after q; a, not b, after a; c after b; é after é; b after r
    assert accuracy["values"] == [1, 0, 1, 1, 1, 0] and accuracy["metric"] == "accuracy"
    assert accuracy["value"] == pytest.approx(4 / 6) and accuracy["items"] == 6 and accuracy["p_value"] is None
    assert accuracy["standard_error"] == pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 5))
    nats = [-math.log(chance) for chance in (0.3, 0.3 * 0.2, 0.5, 0.6, 0.4**2, 0.01)]
    mean = sum(nats) / 6
    deviation = math.sqrt(sum((value - mean) ** 2 for value in nats) / 5)
    assert perplexity["values"] == pytest.approx(nats, rel=1e-5) and perplexity["metric"] == "perplexity"
    assert perplexity["value"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert perplexity["standard_error"] == pytest.approx(math.exp(mean) * deviation / math.sqrt(6), rel=1e-5)
    assert "66.67" in result.output and f"{math.exp(mean):.4g}" in result.output


def test_the_perplexity_of_very_unlikely_answers_is_finite(run):
    save_model(bigrams(table_of(CHANCES | {"c": {"c": 1e-30}}), block_size=64), TOKENIZER, "sure")
    write("items.jsonl", [{"q": "c", "a": "c" * 30}])
    _, perplexity = one_model(run("sure", "--tasks", "cloze.toml", "--data=items.jsonl"))["tasks"]
    assert perplexity["value"] == pytest.approx(math.exp(700)) and perplexity["values"][0] > 2000


def test_generated_answers_are_compared_with_the_right_ones(run):
    # greedy decoding: b c \n after a space and after r; c \n after b
    write("items.jsonl", [{"q": "r", "a": "bc"}, {"q": "b", "a": "C."}, {"q": "b", "a": "bc"}, {"q": "q ", "a": "bc"}])
    (result,) = one_model(run("base", "--tasks", "generate.toml", "--data=items.jsonl"))["tasks"]
    assert result["metric"] == "exact match" and result["values"] == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("settings", "answer", "right"),
    [
        ('stop = ["c"]', "b", True),
        ('stop = ["zz", "c\\n"]', "b", True),  # of two letters
        ('stop = ["\\n", "c"]', "b", True),
        ("max_new_tokens = 1", "b", True),
        ('extract = "b(.)"', "c", True),
        ('extract = "b."', "bc", True),
        ('extract = "q"', "bc", False),
    ],
)
def test_stops_and_extraction_determine_the_answer(run, settings, answer, right):
    Path("generate.toml").write_text(GENERATE + settings + "\n")
    write("items.jsonl", [{"q": "r", "a": answer}])
    (result,) = one_model(run("base", "--tasks", "generate.toml", "--data=items.jsonl"))["tasks"]
    assert result["values"] == [right]


def test_the_stop_word_filter_changes_the_expected_word(run):
    """After c come a space and a (0.6), which is a stop word, or b (0.3), each followed by a newline."""
    chances = {"c": {" ": 0.9}, " ": {"a": 0.6, "b": 0.3}, "a": {"\n": 0.9}, "b": {"\n": 0.9}}
    save_model(bigrams(table_of(CHANCES | chances)), TOKENIZER, "base")
    write("items.jsonl", [{"q": "c", "a": " b"}, {"q": "c", "a": " a"}, {"q": "c", "a": " c"}])
    right = {}
    for settings in ("", "stop_word_filter = true\n"):
        Path("cloze.toml").write_text(CLOZE + settings)
        accuracy, perplexity = one_model(run("base", "--tasks", "cloze.toml", "--data=items.jsonl"))["tasks"]
        right[settings] = accuracy["values"]
        assert perplexity["values"][0] == pytest.approx(-math.log(0.9 * 0.3), rel=1e-5)
    assert list(right.values()) == [[0, 1, 0], [1, 0, 0]]


def test_texts_are_compared_by_bleu_and_rouge(run):
    write("items.jsonl", [{"q": "r", "a": "bc"}, {"q": "q ", "a": "bc a"}, {"q": "b", "a": "é"}])  # bc, bc and c
    for metric, figures in (
        (
            "bleu",
            {"BLEU": [[1, 0, 0, 0, 1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 1, 0, 0, 0, 1, 2], [0] * 4 + [1, 0, 0, 0, 1, 1]]},
        ),
        ("rouge", {"ROUGE-1": [1, 2 / 3, 0], "ROUGE-2": [0, 0, 0], "ROUGE-L": [1, 2 / 3, 0]}),
    ):
        Path("generate.toml").write_text(GENERATE + f'metric = "{metric}"\n')
        output = run("base", "--tasks", "generate.toml", "--data=items.jsonl")
        results = {result["metric"]: result for result in one_model(output)["tasks"]}
        assert {name: result["values"] for name, result in results.items()} == figures
    assert results["ROUGE-1"]["value"] == pytest.approx(5 / 9) and "55.56" in output.output


def test_only_the_first_sentences_count(reader):
    task = Task("mine", "mine", "generate", "{q}", answer="{a}", metric="rouge", sentences=1, stop=(), max_new_tokens=7)
    assert reader.answers(["r"], task, 0) == ["bc\nqaaa"]
    questions = [(Question(["r"], [right], 0), "") for right in ("bc", "bc qaaa")]
    for count, figures in ((1, [1, 2 / 3]), (2, [2 / 3, 1]), (0, [2 / 3, 1])):
        metrics = item_values(replace(task, sentences=count), reader, questions, 0)
        assert metrics["ROUGE-1"] == pytest.approx(figures)


def test_demonstrations_come_between_the_description_and_the_question(reader, monkeypatch):
    read = []

    def score(self, texts, label, places):
        read.extend(texts)
        return [SimpleNamespace(is_greedy=True, log_probability=-1.0) for _ in texts]

    monkeypatch.setattr(Reader, "score", score)
    task = Task("mine", "mine", "cloze", "{q}:", answer="{a}", description="[{q}]", separator=";")
    items = [{"q": f"q{n}", "a": f"a{n}"} for n in range(5)]
    measure_task(TaskItems(task, items, items, items, [0, 1, 2, 3, 4]), reader, shots=(0, 2), seed=3)
    expected = [
        (f"[q{n}]" + demonstrations(task, items, n, shots, 3, False) + f"q{n}:", f"a{n}")
        for shots in (0, 2)
        for n in range(5)
    ]
    assert read == expected and expected[5][0].count(";") == 2


def test_shots_are_compared_item_by_item(run):
    """Demonstrations end with an r, after which the model predicts b; nothing else comes before the empty question."""
    Path("cloze.toml").write_text(CLOZE.replace('" "', '"r"'))
    write("items.jsonl", [{"q": "", "a": "b"}] * 9 + [{"q": "", "a": "q"}])
    output = run("base", "--tasks", "cloze.toml", "--data=items.jsonl", "--shots", 0, 1, 2)
    results = [result for result in one_model(output)["tasks"] if result["metric"] == "accuracy"]
    assert [result["shots"] for result in results] == [0, 1, 2]
    assert [result["value"] for result in results] == [0.1, 0.9, 0.9]  # q after the start token, then b
    assert [result["p_value"] for result in results] == [None, *[pytest.approx(2 * 11 / 2**10)] * 2]


def test_demonstrations_come_from_train_data_if_given(run):
    Path("cloze.toml").write_text(CLOZE.replace('" "', '"r"'))
    write("items.jsonl", [{"q": "", "a": "b"}])
    assert "can't draw 1 demonstration from 1 item," in (
        run("base", "--tasks", "cloze.toml", "--data=items.jsonl", "--shots", 1).message
    )
    write("train.jsonl", [{"q": "q", "a": "a"}] * 3)
    result = run("base", "--tasks", "cloze.toml", "--data=items.jsonl", "--shots", 1, "--train_data=train.jsonl")
    assert one_model(result)["tasks"][0]["value"] == 1


def test_a_limit_draws_the_same_items_each_time(run):
    items = [{"q": "q" * n, "a": "qab" * n} for n in range(1, 11)]  # with different probabilities
    write("items.jsonl", items)
    nats = [-log_chance("q", item["a"]) for item in items]

    def places(*flags):
        _, result = one_model(run("base", "--tasks", "cloze.toml", "--data=items.jsonl", *flags))["tasks"]
        chosen = [min(range(10), key=lambda n: abs(nats[n] - value)) for value in result["values"]]
        assert result["values"] == pytest.approx([nats[n] for n in chosen], rel=1e-4)
        return chosen

    save_model(bigrams(TABLE, 64), TOKENIZER, "base")
    assert places() == places("--limit=100") == list(range(10))
    drawn = [places("--limit=4", f"--seed={seed}") for seed in range(4)]
    assert drawn[0] == places("--limit=4") and len({tuple(numbers) for numbers in drawn}) > 1
    assert all(len(set(numbers)) == 4 and numbers == sorted(numbers) for numbers in drawn)


def test_arithmetic_needs_no_data(run):
    Path("sums.toml").write_text(CLOZE.replace("{q}", "q").replace("{a}", "a") + 'generator = "addition 1"\n')
    output = run("base", "--tasks", "sums.toml", "--limit=7", "--shots", 0, 2)
    assert [result["items"] for result in one_model(output)["tasks"]] == [7] * 4


def figures_of(text, original=None, table=TABLE):
    """The figures of a text in closed form; the context before it is a newline."""
    original = original or text
    nats = -log_chance("\n", text, table)
    return {
        "tokens": len(text),
        "nats a token": nats / len(text),
        "perplexity": math.exp(nats / len(text)),
        "bits a byte": nats / math.log(2) / len(original.encode()),
        "bits a character": nats / math.log(2) / len(original),
        "word perplexity": math.exp(nats / len(original.split())),
    }


@pytest.mark.parametrize("flags", [(), ("--stride=1",), ("--stride=5", "--batch_tokens=1"), ("--stride=16",)])
def test_the_figures_of_a_text_equal_the_closed_forms(run, flags):
    result = run("base", "--perplexity", "text.txt", *flags)
    assert one_model(result)["texts"]["text.txt"] == pytest.approx(figures_of(TEXT), rel=1e-5)
    assert "é" in TEXT and f"{figures_of(TEXT)['perplexity']:.4g}" in result.output


def test_words_and_bytes_are_counted_before_detokenization(run):
    Path("text.txt").write_text(" ( ab ) c ( qa ) \n")
    characters = sorted([*TOKENIZER.characters, "(", ")"])
    even = torch.full((10, 10), 0.1, dtype=torch.float64)
    save_model(bigrams(even), CharTokenizer(characters), "base")
    result = run("base", "--perplexity", "text.txt", "--detokenizer=wikitext")
    figures = one_model(result)["texts"]["text.txt"]
    assert figures["tokens"] == len(" (ab) c (qa) \n") and figures["perplexity"] == pytest.approx(10)
    assert figures["word perplexity"] == pytest.approx(10 ** (14 / 7), rel=1e-4)
    assert figures["bits a byte"] == pytest.approx(14 * math.log2(10) / 18, rel=1e-4)


def test_a_stride_of_1_gives_each_token_the_longest_context(run):
    model = randomised(GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=2, n_head=2, n_embd=16)))
    save_model(model, TOKENIZER, "deep")
    whole = "\n" + TEXT
    nats = [-slow_log_probability(model, whole[:place], whole[place]) for place in range(1, len(whole))]
    result = run("deep", "--perplexity", "text.txt", "--stride=1")
    assert one_model(result)["texts"]["text.txt"]["nats a token"] == pytest.approx(sum(nats) / len(TEXT), rel=1e-4)
    windows = run("deep", "--perplexity", "text.txt")
    assert one_model(windows)["texts"]["text.txt"]["nats a token"] != pytest.approx(sum(nats) / len(TEXT), rel=1e-4)


@pytest.mark.parametrize("val", [TEXT, "qab"], ids=["long", "shorter than the context"])
def test_the_val_split_of_a_prepared_dataset_is_read(run, val):
    splits = {"train": TOKENIZER.encode("abc" * 20), "val": TOKENIZER.encode(val)}
    write_dataset(Path("data/letters"), TOKENIZER, splits)
    result = run("base", "--perplexity", "letters", "text.txt")
    texts = one_model(result)["texts"]
    assert texts["letters"] == pytest.approx(figures_of(val), rel=1e-5) and set(texts) == {"letters", "text.txt"}


def test_the_report_identifies_model_items_and_versions(run):
    flags = ("--tasks", "cloze.toml", "--data=items.jsonl", "--perplexity", "text.txt", "--seed=3")
    report = run("base", *flags).report
    assert report["options"]["seed"] == 3 and report["options"]["data"] == "items.jsonl"
    assert report["options"]["tasks"] == ["cloze.toml"] and report["options"]["shots"] == [0]
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(report["versions"]) == {"gpt-arc", "torch", "tokenizers"}
    (original,) = report["models"]
    assert original["model"] == "base" and original["checkpoint"] == str(Path("base").resolve())
    content = hashlib.sha256(Path("base/model.safetensors").read_bytes()).digest()
    assert original["weights"] == hashlib.sha256(content).hexdigest()
    assert original["tasks"][0]["items_hash"] == hashlib.sha256(json.dumps(ITEMS).encode()).hexdigest()
    assert run("base", *flags).report == report

    write("items.jsonl", [*ITEMS[:-1], {"q": "r", "a": "a"}])
    (other_items,) = run("base", *flags).report["models"]
    assert other_items["weights"] == original["weights"]
    assert other_items["tasks"][0]["items_hash"] != original["tasks"][0]["items_hash"]
    assert other_items["texts"] == original["texts"]
    save_model(bigrams(table_of(CHANCES | {"a": {"a": 0.4}})), TOKENIZER, "base")
    (other_model,) = run("base", *flags).report["models"]
    assert other_model["weights"] != other_items["weights"]
    assert other_model["tasks"][0]["items_hash"] == other_items["tasks"][0]["items_hash"]


def test_a_table_explains_its_columns(run):
    """Half the items have two options, half four: a guess is right in (1/2 + 1/4) / 2 of them."""
    Path("choice.toml").write_text(CHOICE.replace("{a}", "0"))
    options = (["a", "b"], ["a", "b", "c", "é"])
    write("items.jsonl", [{"q": "q", "options": options[number % 2]} for number in range(6)])
    result = run("base", "--tasks", "choice.toml", "--data=items.jsonl", "--shots", 0, 1)
    assert [figures["chance"] for figures in one_model(result)["tasks"]] == [0.375, 0.375]
    lines = result.output.splitlines()
    assert [line.split()[6] for line in lines if line.startswith("choice")] == ["37.5%", "37.5%"]
    assert "±: standard error" in lines and "chance: the accuracy of guessing" in lines
    assert lines[-2].startswith("p: ") and "from 0 shots" in lines[-2] and "McNemar's" in lines[-2]

    write("items.jsonl", ITEMS)
    output = run("base", "--tasks", "cloze.toml", "--data=items.jsonl").output
    assert "±: standard error" in output and "chance: " not in output and "p: " not in output


def test_published_figures_are_printed_beside_accuracy(run):
    Path("cloze.toml").write_text(CLOZE + "[published.accuracy]\nother = 12.5\n")
    lines = run("base", "--tasks", "cloze.toml", "--data=items.jsonl").output.splitlines()
    assert [line.endswith("other 12.5%") for line in lines if line.startswith("cloze")] == [True, False]


def test_each_checkpoint_is_measured(run):
    tables = [TABLE, table_of(CHANCES | {"q": {"b": 0.6}})]
    for step, table in zip((1000, 2000), tables):
        save_model(bigrams(table), TOKENIZER, f"out/run/step-{step:08}")
    Path("out/run/best").symlink_to("step-00001000")
    flags = ("--tasks", "cloze.toml", "--data=items.jsonl", "--perplexity", "text.txt")
    models = run("out/run", *flags, "--checkpoints=True").report["models"]
    assert [model["model"] for model in models] == ["out/run/step-00001000", "out/run/step-00002000"]
    for model, table in zip(models, tables):
        assert model["texts"]["text.txt"] == pytest.approx(figures_of(TEXT, table=table), rel=1e-5)
    assert [model["tasks"][0]["value"] for model in models] == pytest.approx([4 / 6, 3 / 6])
    assert load_file("out/run/best/model.safetensors").keys() and models[0]["weights"] != models[1]["weights"]
    assert one_model(run("out/run", *flags))["model"] == "out/run/step-00001000"  # which best names


def test_checkpoints_are_plotted_against_updates(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, file, **options: drawn.append((self, file, options))
    )
    tables = {500: TABLE, 2000: table_of(CHANCES | {"q": {"b": 0.6}})}
    for step, table in tables.items():
        save_model(bigrams(table), TOKENIZER, f"out/run/step-{step:08}")
    flags = ("--tasks", "cloze.toml", "--data=items.jsonl", "--perplexity", "text.txt", "--checkpoints=True")
    result = run("out/run", *flags, "--plot=scores.png")
    assert "plot           scores.png\n" in result.output and "figures        report.json\n" in result.output
    models = result.report["models"]
    ((figure, _, options),) = drawn
    assert options == {"format": "png"} and Path("scores.png").exists()
    shares, perplexities = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["per cent", "perplexity"]
    assert perplexities.get_yscale() == "log" and shares.get_xlabel() == "updates"
    (accuracy,), (answers, text) = shares.containers, perplexities.containers
    assert accuracy.get_label() == "cloze, 0 shots, accuracy" and text.get_label() == "text.txt"
    for curve, metric, scale in ((accuracy, 0, 100), (answers, 1, 1)):
        line, _, (bars,) = curve.lines
        results = [model["tasks"][metric] for model in models]
        assert line.get_xydata().tolist() == [[500, results[0]["value"] * scale], [2000, results[1]["value"] * scale]]
        heights = [bar[1][1] - bar[0][1] for bar in bars.get_segments()]
        assert heights == pytest.approx([2 * result["standard_error"] * scale for result in results])
    expected = [[step, figures_of(TEXT, table=table)["perplexity"]] for step, table in tables.items()]
    assert text.lines[0].get_xydata().ravel() == pytest.approx([x for point in expected for x in point], rel=1e-5)


def test_the_plot_is_a_png(run):
    save_model(bigrams(TABLE), TOKENIZER, "out/run/step-00000100")
    run("out/run", "--perplexity", "text.txt", "--checkpoints=True", "--plot=scores.png")
    assert Path("scores.png").read_bytes().startswith(b"\x89PNG")


def test_items_in_the_training_text_are_reported_separately(run):
    """All strings of an item count, even those that no template names: here `page` with 9 words, and q and a with one
    each."""
    pages = [" ".join(f"{sign}{n}" for n in range(9)) for sign in "uvwxyz"]
    # all answers except the second and the last are right
    items = [item | {"page": page} for item, page in zip(ITEMS, pages)]
    write("items.jsonl", items)
    Path("train").mkdir()
    Path("train/a.txt").write_text(f"Before: Q a; {pages[0].upper()}, and after.")
    write("train/b.jsonl", [{"text": f"bq\nab {pages[1]}"}, {"text": f"a c {pages[2]}"}, {"text": pages[3]}])
    flags = ("--tasks", "cloze.toml", "--data=items.jsonl")
    result = run("base", *flags, "--training_text", "train/a.txt", "train/b.jsonl")
    accuracy, perplexity = one_model(result)["tasks"]
    assert accuracy["values"] == [1, 0, 1, 1, 1, 0] and accuracy["value"] == pytest.approx(4 / 6)
    assert accuracy["overlap"] == {
        "words": 11,
        "clean": {"value": 0.75, "standard_error": pytest.approx(0.25), "items": 4},
        "dirty": {"value": 0.5, "standard_error": pytest.approx(0.5), "items": 2},
    }
    nats = perplexity["values"]
    assert perplexity["overlap"]["dirty"]["value"] == pytest.approx(math.exp((nats[0] + nats[1]) / 2))
    (line,) = [line for line in result.output.splitlines() if line.startswith("cloze") and line.endswith("11")][:1]
    assert line.split() == ["cloze", "0", "accuracy", "66.67%", "75%", "25%", "4", "50%", "50%", "2", "11"]
    for seed in range(3):  # the word count comes from all items, whatever the limit
        limited = one_model(run("base", *flags, "--training_text", "train", "--limit=3", f"--seed={seed}"))["tasks"][0]
        selected = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:3]
        assert limited["overlap"]["words"] == 11 and limited["overlap"]["dirty"]["items"] == (selected < 2).sum()
    assert one_model(run("base", *flags))["tasks"][0]["overlap"] is None


def test_only_an_item_s_original_strings_are_searched_for(workplace):
    task = Task("mine", "mine", "cloze", "{question}", answer="{result}", prepare="gsm8k")
    write("items.jsonl", [{"question": "How many", "answer": "One and two are three\n#### 3"}])
    Path("other.txt").write_text("how many? One and two are three #### 3")
    (task_items,) = with_overlap([gather(task, (0,), 0, data=Path("items.jsonl"))], ["other.txt"])
    assert task_items.overlap == (8, [True])  # 8 words: not the columns that `prepare` adds


def test_without_dirty_items_the_dirty_figure_is_none(run):
    Path("other.txt").write_text("no item")
    result = run("base", "--tasks", "cloze.toml", "--data=items.jsonl", "--training_text", "other.txt")
    overlap = one_model(result)["tasks"][0]["overlap"]
    assert overlap["dirty"] == {"value": None, "standard_error": None, "items": 0} and overlap["clean"]["items"] == 6


def test_an_error_of_the_hub_is_reported(run, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = run("base", "--tasks", "lambada").message
    assert "lambada: can't load EleutherAI/lambada_openai from the Hugging Face hub" in message
    assert "--data (ConnectionError: no route)" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "there is nothing to do: name --tasks or --perplexity"),
        (("--tasks", "helaswag"), "did you mean hellaswag?"),
        (("--tasks", "sst2", "rte", "--data=items.jsonl"), "data holds the items of one task: name one"),
        (("--tasks", "sst2", "rte", "--train_data=items.jsonl"), "train_data holds the items of one task: name one"),
        (("--tasks", "sst2", "--plot=a.png"), "plot draws the figures of checkpoints: add --checkpoints=True"),
        (("--tasks", "sst2", "--checkpoints=True", "--plot=a.pdf"), "a.pdf must end in .png"),
        (("--tasks", "sst2", "--checkpoints=True", "--plot=no/a.png"), "there is no folder no for the results"),
        (("--perplexity", "text.txt", "--training_text", "text.txt"), "training_text is looked through for the items"),
        (("--tasks", "addition_2", "--training_text", "text.txt"), "which are generated: leave it out"),
        (("--tasks", "choice.toml", "--data=items.jsonl", "--training_text", "no.txt"), "no.txt can't be read"),
        (("--tasks", "sst2", "--data=none.jsonl"), "there is no file none.jsonl"),
        (("--tasks", "sst2", "--shots=-1"), "--shots = -1 must be at least 0"),
        (("--tasks", "sst2", "--limit=0"), "limit = 0 must be at least 1"),
        (("--tasks", "sst2", "--seed=-1"), "seed = -1 must be at least 0"),
        (("--perplexity", "text.txt", "--stride=0"), "stride = 0 must be at least 1"),
        (("--perplexity", "text.txt", "--stride=17"), "stride = 17 is more than the model's context, 16"),
        (("--perplexity", "text.txt", "--batch_tokens=0"), "batch_tokens = 0 must be at least 1"),
        (("--perplexity", "text.txt", "--detokenizer=wiki"), "wiki"),
        (("--perplexity", "empty.txt"), "empty.txt is empty"),
        (("--perplexity", "nowhere"), "nowhere is neither a file nor a prepared dataset"),
        (("--perplexity", "strange.txt"), "the character 'z' (U+007A) at position 1"),
        (("--perplexity", "others"), "others was prepared with another tokenizer than the model's"),
        (("--tasks", "cloze.toml"), "cloze names no data set: give a file of items with --data"),
        (("--tasks", "cloze.toml", "--data=lacking.jsonl"), "cloze, item 2: an item has no a: it has q, b"),
        (("--tasks", "choice.toml", "--data=lacking.jsonl"), "choice, item 1: an item has no options: it has q, a"),
        (("--tasks", "cloze.toml", "--data=blank.jsonl"), "cloze, item 1: the answer or an option is empty"),
        (
            ("--tasks", "cloze.toml", "--data=long.jsonl"),
            "cloze, item 1: a continuation of 17 tokens exceeds the context of 16",
        ),
        (("--tasks", "cloze.toml", "--data=items.jsonl", "--shots", "6"), "can't draw 6 demonstrations from 6 items"),
        (
            ("--tasks", "cloze.toml", "--data=items.jsonl", "--checkpoints=True"),
            "base is not a run folder with check",
        ),
        (("--tasks", "sst2", "--json=no/report.json"), "there is no folder no for the results"),
        (("--taks", "sst2"), "did you mean --tasks?"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(run, flags, words):
    Path("empty.txt").write_text("")
    Path("strange.txt").write_text("az")
    write("lacking.jsonl", [{"q": "q", "a": "a"}, {"q": "q", "b": "a"}])
    write("blank.jsonl", [{"q": "q", "a": ""}])
    write("long.jsonl", [{"q": "q", "a": "a" * 17}])
    write_dataset(Path("data/others"), CharTokenizer("abc"), {"train": [0, 1, 2] * 9, "val": [0, 1, 2] * 9})
    assert words in run("base", *flags).message


def test_a_missing_model_or_tokenizer_is_refused(run):
    save_model(bigrams(TABLE), None, "bare")
    assert "bare has no tokenizer, so it can't read text" in run("bare", "--perplexity", "text.txt").message
    assert "there is no model directory nothing" in run("nothing", "--perplexity", "text.txt").message


def test_an_option_that_adds_no_token_is_refused(reader):
    class Trimming:
        """A tokenizer that drops white space at the end."""

        start_token, declared = 0, Declared()

        def encode(self, text):
            return TOKENIZER.encode(text.rstrip())

    trimming = reader._replace(tokenizer=Trimming())
    with pytest.raises(UserError, match="mine, item 4, option 1: the answer or option adds no token to its context"):
        trimming.score([("a", "b"), ("a", " ")], "mine", ["item 3", "item 4, option 1"])
    with pytest.raises(UserError, match="mine, text 2 of 2: the answer or option adds no token to its context"):
        trimming.score([("a", "b"), ("a", " ")], "mine")
