"""Numbers that are not finite don't leave the program: a sentence names the model, and JSON is JSON."""

import json
import math
from pathlib import Path

import pytest
import torch

import sample
import train
from gpt_arc.alignment.reward_model import RewardModel, load_reward_model, save_reward_model, score_sequences
from gpt_arc.chat.format import ChatFormat, load_template
from gpt_arc.data.json_lines import parse_line
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.decoding.beam import beam_search
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.settings import Sampling
from gpt_arc.decoding.speculative import speculative
from gpt_arc.errors import NotFinite, UserError
from gpt_arc.evaluation.score import Request, score_continuations
from gpt_arc.evaluation.tasks import filled
from gpt_arc.evaluation.word_search import WordTokens, likeliest_words
from gpt_arc.finetuning.classifier import (
    Classifier,
    ClassifierConfig,
    load_classifier,
    save_classifier,
    with_special_tokens,
)
from gpt_arc.finetuning.examples import Columns
from gpt_arc.tables import to_json
from gpt_arc.weights.directory import load_model, save_model
from model import GPT, GPTConfig
from stages import eval as eval_stage
from stages import finetune, reward
from tools import expert_use, export, upcycle

LETTERS = CharTokenizer(sorted("abcdefgh "))
SHAPE = dict(block_size=16, vocab_size=9, n_layer=1, n_head=1, n_embd=8)
SENTENCE = "the model computes numbers that are not finite: use another checkpoint, or --dtype=float32"
CPU = ("--device=cpu", "--dtype=float32")


def damaged(model, value=torch.nan):
    with torch.no_grad():
        model.final_norm.weight[0] = value
    return model.eval()


@pytest.fixture(params=[torch.nan, torch.inf])
def bad(request):
    return damaged(GPT(GPTConfig(**SHAPE)), request.param)


@pytest.fixture
def run(tmp_path, monkeypatch, stage_runner):
    """A folder with the model directory `bad`, whose logits are all NaN, and `good`."""
    monkeypatch.chdir(tmp_path)
    save_model(damaged(GPT(GPTConfig(**SHAPE))), LETTERS, "bad")
    save_model(GPT(GPTConfig(**SHAPE)), LETTERS, "good")
    Path("text.txt").write_text("abc abc " * 9)
    return stage_runner


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}, {"repetition_penalty": 2.0}])
def test_no_token_is_chosen_from_bad_logits(bad, temperature, filters):
    sampling, good = Sampling(temperature=temperature, **filters), GPT(GPTConfig(**SHAPE)).eval()
    cases = [generate(bad, [[1, 2], [3]], 5, sampling), speculative(bad, good, [1, 2], 5, sampling)]
    if temperature:  # a greedy draft's proposals are right or wrong, whatever they come from
        cases.append(speculative(good, bad, [1, 2], 5, sampling))
    for steps in cases:
        with pytest.raises(NotFinite, match="computes numbers that are not finite"):
            list(steps)


def test_beams_scores_and_words_are_refused(bad):
    with pytest.raises(NotFinite):
        beam_search(bad, [1, 2], 4, 2)
    with pytest.raises(NotFinite):
        score_continuations(bad, [Request([1, 2], [3, 4])])
    with pytest.raises(NotFinite):
        likeliest_words(WordTokens(LETTERS), bad, [([1, 2, 0], [3])], set())


@pytest.mark.parametrize("more", [(), ("--json=True",), ("--num_beams=2",), ("--temperature=0",), ("--draft=bad",)])
def test_sampling_names_the_model(run, more):
    stopped = run(sample, "bad", *CPU, "--start=ab", "--max_new_tokens=4", *more)
    assert stopped.code == 1 and stopped.message.splitlines()[-1] == f"sample.py: bad: {SENTENCE}"
    assert "NaN" not in stopped.output


def test_a_bad_draft_is_named(run):
    stopped = run(sample, "good", "--draft=bad", *CPU, "--start=ab", "--max_new_tokens=4")
    assert (
        stopped.code == 1
        and "good: its draft computes numbers that are not finite: name another --draft" in stopped.message
    )


def test_typed_prompts_each_get_an_answer(run, monkeypatch):
    lines = iter(["ab", "c"])
    monkeypatch.setattr("builtins.input", lambda: next(lines, None) or (_ for _ in ()).throw(EOFError))
    output = run(sample, "bad", "--interactive=True", "--json=True", *CPU, "--max_new_tokens=4")
    answers = [json.loads(line, parse_constant=pytest.fail) for line in output.splitlines()]
    assert answers == [{"prompt": prompt, "error": f"bad: {SENTENCE}"} for prompt in ("ab", "c")]


def test_evaluation_names_the_model(run):
    Path("task.toml").write_text(
        'title = "T"\nkind = "cloze"\ncontext = "{a}"\nanswer = "{b}"\nstop_word_filter = false\n'
    )
    Path("items.jsonl").write_text('{"a": "ab", "b": "c"}\n')
    for flags in (("--perplexity=text.txt",), ("--tasks=task.toml", "--data=items.jsonl")):
        stopped = run(eval_stage, "bad", *CPU, *flags, "--json=report.json")
        assert stopped.code == 1 and f"bad: {SENTENCE}" in stopped.message and not Path("report.json").exists()


def test_the_perplexity_of_a_very_wrong_model_is_finite(run):
    """A thousand nats a token and more: its exponential is none that a float has."""
    model = GPT(GPTConfig(**SHAPE))
    with torch.no_grad():
        model.final_norm.weight.fill_(1e6)
    save_model(model, LETTERS, "wrong")
    run(eval_stage, "wrong", *CPU, "--perplexity=text.txt", "--json=report.json")
    figures = json.loads(Path("report.json").read_text(), parse_constant=pytest.fail)["models"][0]["texts"]["text.txt"]
    assert figures["nats a token"] > 1000 and figures["perplexity"] == math.exp(700)


def test_evaluation_alone_in_training_names_the_model(workplace, stage_runner):
    run = lambda *flags: stage_runner(train, "sums.toml", "--n_layer=1", "--n_head=1", "--n_embd=8", *CPU, *flags)  # noqa: E731
    run("--block_size=16", "--batch_size=4", "--max_iters=1", "--eval_iters=1")
    model, tokenizer = load_model("out/sums/last")
    save_model(damaged(model), tokenizer, "bad")
    stopped = run("--init_from=bad", "--eval_only=True", "--block_size=16")
    assert stopped.code == 1 and f"bad: {SENTENCE}" in stopped.message


def test_the_use_of_experts_names_the_model(run):
    save_model(damaged(GPT(GPTConfig(**SHAPE, n_experts=2, experts_per_token=1, norm="rmsnorm"))), LETTERS, "mixture")
    model, _ = load_model("mixture")
    with torch.no_grad():
        model.blocks[0].mlp.router.weight[0, 0] = torch.nan
    save_model(model, LETTERS, "mixture")
    stopped = run(expert_use, "mixture", "--text=text.txt", *CPU)
    assert stopped.code == 1 and f"mixture: {SENTENCE}" in stopped.message


# ---- classifiers and reward models


def test_predictions_name_the_model(run):
    trunk, special = with_special_tokens(damaged(GPT(GPTConfig(**SHAPE))))
    config = ClassifierConfig("classification", ("x", "y"), special, Columns.usual("classification"), 16, 0.1, False)
    save_classifier(Classifier(trunk, config), LETTERS, Path("classifier"))
    assert load_classifier("classifier")
    Path("rows.jsonl").write_text('{"text": "ab", "label": "x"}\n')
    for flags in (("--classify=ab",), ("--predict=rows.jsonl",), ("--test=rows.jsonl",)):
        stopped = run(finetune, "classifier", *CPU, *flags)
        assert stopped.code == 1 and f"finetune.py: classifier: {SENTENCE}" in stopped.message and not stopped.output
    assert not Path("rows.predictions.jsonl").exists()


def test_scores_name_the_reward_model(run):
    chat = ChatFormat.new(load_template("markers"), LETTERS, 9)
    model = GPT(GPTConfig(**SHAPE | {"vocab_size": 9 + len(chat.added)}))
    save_reward_model(RewardModel(damaged(model)), LETTERS, chat, "reward")
    with pytest.raises(NotFinite):
        score_sequences(load_reward_model("reward")[0], [[1, 2], [3]], 2, torch.device("cpu"), "float32")
    Path("rows.jsonl").write_text('{"prompt": "ab", "chosen": "c", "rejected": "d"}\n')
    stopped = run(reward, "reward", "--val=rows.jsonl", *CPU)
    assert stopped.code == 1 and f"reward: {SENTENCE}" in stopped.message


# ---- files


def test_an_export_names_the_tensor(run):
    stopped = run(export, "bad", "exported")
    assert stopped.code == 1 and "transformer.ln_f.weight of bad is not finite" in stopped.message
    model = GPT(GPTConfig(**SHAPE))
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0, 0] = 1e5
    save_model(model, LETTERS, "large")
    stopped = run(export, "large", "exported", "--dtype=float16")
    sentence = "transformer.h.0.mlp.c_fc.weight of large has values beyond the range of float16: export in float32"
    assert stopped.code == 1 and sentence in stopped.message and not Path("exported").exists()
    assert "parameters in bfloat16" in run(export, "large", "exported", "--dtype=bfloat16")


def test_a_mixture_is_not_made_of_a_bad_model(run):
    stopped = run(upcycle, "bad", "mixture")
    assert stopped.code == 1 and "final_norm.weight of bad is not finite" in stopped.message
    assert not Path("mixture").exists()


def test_no_text_is_made_of_nan():
    assert parse_line('{"a": NaN, "b": [-Infinity, "NaN"]}', "x.jsonl, line 1") == {"a": None, "b": [None, "NaN"]}
    for value in (None, math.nan):
        with pytest.raises(UserError, match="is not a text or a number"):
            filled("{a}", {"a": value})


def test_json_has_no_nan():
    value = {"a": [1.5, math.nan, (math.inf, "NaN")], "b": {"c": -math.inf}, "d": True, "e": None, "path": Path("x")}
    assert (
        to_json(value, default=str)
        == '{"a": [1.5, null, [null, "NaN"]], "b": {"c": null}, "d": true, "e": null, "path": "x"}'
    )
