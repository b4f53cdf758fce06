"""stages/translate.py as a user runs it."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import sample
import train
from gpt_arc.data.pairs import encode_pairs, pair_batch, read_pairs
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import entry_point
from gpt_arc.training.log import read_metrics
from gpt_arc.weights.directory import load_model, save_model
from helpers import interrupt_at, randomised, untimed, write
from model import GPT, GPTConfig
from stages import eval as evaluation
from stages import finetune, translate
from tools import export

SMALL = ("--n_layer=1", "--encoder_layers=1", "--n_embd=16", "--n_head=2", "--device=cpu", "--dtype=float32")
FLAGS = ("--train=train.jsonl", "--val=val.jsonl", "--batch_size=16", *SMALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder with pairs whose target is the source's letters as capitals."""
    monkeypatch.chdir(tmp_path)
    words = [a + b for a in "abcd" for b in "abcd"]
    rows = [{"source": word, "target": word.upper()} for word in words]
    write("train.jsonl", rows * 2)
    write("val.jsonl", rows[::3])
    return tmp_path


@pytest.fixture
def run(workplace, stage_runner):
    return partial(stage_runner, translate)


@pytest.mark.slow
def test_a_run_learns_its_pairs_and_sample_answers(run, output_of):
    rows = [{"source": letter, "target": letter.upper()} for letter in "abcdefgh"]
    write("train.jsonl", rows * 20)
    write("val.jsonl", rows)
    settings = ("--n_embd=32", "--norm_position=pre", "--schedule=constant", "--dropout=0", "--label_smoothing=0")
    output = run(*FLAGS, *settings, "--epochs=40", "--learning_rate=1e-2", "--warmup=0.05")
    assert "python sample.py out/translate --start=SOURCE" in output
    lines = [line for line in read_metrics(Path("out/translate/metrics.jsonl")) if "val_accuracy" in line]
    assert lines[-1]["val_accuracy"] == 1 and lines[-1]["val_loss"] < 0.5
    answer = partial(output_of, entry_point(sample.main), "sample.py", "out/translate", "--device=cpu")
    assert answer("--start=b", "--temperature=0") == "B\n"
    assert answer("--start=c", "--num_beams=3") == "C\n"
    Path("sources.txt").write_text("a\nd\n")
    answers = [json.loads(line) for line in answer("--prompts=sources.txt", "--json", "--top_k=1").splitlines()]
    assert [(line["prompt"], line["text"], line["ended"]) for line in answers] == [("a", "A", True), ("d", "D", True)]


def test_a_stopped_run_resumes_as_if_it_hadnt_stopped(run, monkeypatch):
    run(*FLAGS, "--epochs=3", "--out_dir=whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert run(*FLAGS, "--epochs=3", "--out_dir=halves").code == 130
    run("--resume=halves")
    whole, halves = (load_model(f"{name}/last")[0].state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    logs = [untimed(read_metrics(Path(name) / "metrics.jsonl")) for name in ("whole", "halves")]
    assert logs[0] == logs[1]


def test_the_scores_are_those_of_greedy_decoding_and_smoothing_is_the_papers():
    tokenizer = CharTokenizer("ab")
    model = randomised(GPT(GPTConfig(5, 3, 1, 2, 8, encoder_layers=1)))
    pairs = encode_pairs([translate_pair("ab", "ba"), translate_pair("a", "")], tokenizer, 5, "")
    batch = pair_batch(pairs, 2)
    with torch.no_grad():
        scores = translate.scores(model, batch, 0.1)
        hidden = model.hidden(batch.tokens, source=model.encode(batch.source, batch.lengths))
        logs = model.logits(hidden).log_softmax(-1)
    scored = batch.targets >= 0
    chosen = logs.gather(2, batch.targets.clamp(min=0)[..., None])[..., 0]
    assert scores.total.item() == pytest.approx(-chosen[scored].sum().item(), rel=1e-5)
    smoothed = 0.9 * chosen + 0.1 * logs.mean(-1)
    assert scores.smoothed.item() == pytest.approx(-smoothed[scored].sum().item(), rel=1e-5)
    greedy = logs.argmax(-1)
    exact = sum(bool((greedy[row][scored[row]] == batch.targets[row][scored[row]]).all()) for row in range(2))
    assert scores.exact == exact and scores.count == 4
    assert batch.tokens.tolist() == [[2, 1, 0], [2, 0, 0]] and batch.targets.tolist() == [[1, 0, 2], [2, -1, -1]]


def translate_pair(source, target):
    from gpt_arc.data.pairs import Pair

    return Pair(source, target, "")


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "name the examples to learn from by --train"),
        (("--train=bad.jsonl",), "bad.jsonl, line 2"),
        (("--train=train.jsonl", "--n_head=3"), "n_head = 3 does not divide n_embd = 16: change one\n"),
        (
            ("--train=train.jsonl", "--block_size=2"),
            "' has 2 tokens and an end, and block_size = 2 has room for 2: shorten it, or leave --block_size out",
        ),
        (("gpt", "--train=train.jsonl"), "gpt has no encoder"),
    ],
)
def test_what_cant_be_trained_is_refused(run, flags, message):
    Path("bad.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": "a"}\n')
    save_model(GPT(GPTConfig(8, 4, 1, 1, 8)), CharTokenizer("abcd"), "gpt")
    result = run(*SMALL, *flags)
    assert result.code == 2 and message in result.message


def test_a_model_that_is_trained_further_keeps_its_architecture(run):
    run(*FLAGS, "--epochs=1", "--out_dir=base")
    further = partial(run, "base", "--train=train.jsonl", "--epochs=1")
    refused = further("--n_layer=3", "--n_head=2", "--n_embd=64")
    assert refused.code == 2 and "base has n_layer = 1 and n_embd = 16: leave out --n_layer and" in refused.message
    for flag, has in {"--norm_position=pre": "norm_position = post", "--block_size=9": "block_size = 3"}.items():
        assert f"base has {has}: leave out {flag.split('=')[0]}\n" in further(flag).message
    Path("letters").mkdir()
    CharTokenizer("abc").save("letters")
    assert "base has another tokenizer than letters" in further("--tokenizer=letters").message
    assert "finished" in further(*SMALL, "--tokenizer=base", "--dropout=0.5", "--out_dir=more")
    assert load_model("more")[0].config.dropout == 0.5


def test_a_run_says_that_too_few_pairs_leave_no_val(run):
    write("one.jsonl", [{"source": "a", "target": "b"}])
    assert "val_fraction = 0.05 of 1 example rounds to none" in run("--train=one.jsonl", *SMALL, "--epochs=1")


def test_what_a_translator_isnt_for_is_refused(workplace, output_of):
    config = GPTConfig(5, 5, 1, 2, 8, encoder_layers=1)
    save_model(GPT(config), CharTokenizer("abcd"), "base")
    for main, *flags in (
        (sample.main, "sample.py", "base", "--start=ab", "--draft=base"),
        (evaluation.main, "eval.py", "base", "--tasks=addition_2"),
        (finetune.main, "finetune.py", "base", "--train=train.jsonl", "--text_a=source", "--label=target"),
    ):
        assert "turns sources into targets" in output_of(entry_point(main), *flags)
    sampled = partial(output_of, entry_point(sample.main), "sample.py", "base")
    assert "the source '' has 0 tokens, and a model needs one: write a text" in sampled("--start=")
    assert "the source 'abcdab' has 6 tokens, and the model reads 5: shorten it" in sampled("--start=abcdab")
    unknown = sampled("--start=xyz")
    assert "the source 'xyz': the character 'x'" in unknown and "vocabulary: leave it out" in unknown
    Path("sources.txt").write_text("ab\n\n")
    assert "sources.txt, line 2: the source ''" in sampled("--prompts=sources.txt")
    exported = output_of(entry_point(export.main), "export.py", "base", "x", "--to", "hf")
    assert "no counterpart here for such a model: use it with: python sample.py base --start=SOURCE" in exported
    Path("x.toml").write_text("encoder_layers = 1\n")
    assert "stages/translate.py trains" in output_of(entry_point(train.main), "train.py", "x.toml")


def test_pairs_are_read_from_rows(workplace):
    assert read_pairs(Path("val.jsonl"))[1] == ("ad", "AD", "val.jsonl, line 2")
