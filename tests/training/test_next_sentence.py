"""BERT's next-sentence objective: the head and its loss against transformers', the pairs by brute force, and runs."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sample
import train
from gpt_arc.data.tokenizer import BPETokenizer
from gpt_arc.decoding.gaps import GapFiller
from gpt_arc.errors import entry_point
from gpt_arc.finetuning.classifier import load_classifier
from gpt_arc.nn.meta import meta_device
from gpt_arc.weights.directory import load_model, save_model
from gpt_arc.weights.huggingface import hf_config, hf_tensors
from helpers import ROOT, TINY_FLAGS, command, lines_of, randomised, write, write_dataset, write_lines
from model import GPT, GPTConfig
from stages import finetune

FLAGS = (*TINY_FLAGS, "--dataset=lines", "--attention=bidirectional", "--token_types=2", "--next_sentence=True")
BYTES = {bytes([byte]): byte for byte in range(256)}
BASE = transformers.BertConfig()
SIZES = ("train", 2000), ("val", 500)  # of a document of each split, in tokens
FLAGS += ("--dtype=float32", "--compile=False", "--dropout=0.1", "--block_size=24")


def bert() -> transformers.BertForPreTraining:
    sizes = dict(vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
    return randomised(transformers.BertForPreTraining(transformers.BertConfig(**sizes, max_position_embeddings=16)))


def test_logits_and_loss_equal_those_of_transformers_both_ways(tmp_path):
    theirs = bert()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")[0].eval()
    assert ours.config.next_sentence
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(37, (5, 16), generator=generator)
    types = (torch.arange(16) > torch.tensor([[4], [9], [1], [14], [7]])).long()
    labels = torch.tensor([0, 1, 1, 0, 1])
    targets = torch.where(torch.rand(5, 16, generator=generator) < 0.3, tokens, -1)
    with torch.no_grad():
        expected = theirs(
            tokens,
            token_type_ids=types,
            labels=targets.where(targets >= 0, torch.tensor(-100)),
            next_sentence_label=labels,
        )
        hidden = ours.hidden(tokens, types=types)
        close = dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.logits(hidden), expected.prediction_logits, **close)
        torch.testing.assert_close(ours.pair_head(hidden), expected.seq_relationship_logits, **close)
        loss = ours(tokens, targets, types=types, labels=labels)
    torch.testing.assert_close(loss.total / loss.count + loss.auxiliary["next_sentence"], expected.loss, **close)
    right = (expected.seq_relationship_logits.argmax(-1) == labels).sum().item()
    assert loss.sentences[1:].tolist() == [right, 5]

    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(hf_config(ours.config)))
    save_file(dict(hf_tensors(ours)), tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    again = transformers.BertForPreTraining.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        output = again(tokens, token_type_ids=types)
    assert torch.equal(output.prediction_logits, expected.prediction_logits)
    assert torch.equal(output.seq_relationship_logits, expected.seq_relationship_logits)
    written = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    assert written[0].keys() == written[1].keys()


def test_gradients_equal_those_of_transformers(tmp_path):
    theirs = bert()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)[0].eval()
    tokens, labels = torch.arange(32).view(2, 16), torch.tensor([1, 0])
    targets = tokens.where(tokens % 5 == 0, torch.tensor(-1))
    theirs(tokens, labels=targets.where(targets >= 0, torch.tensor(-100)), next_sentence_label=labels).loss.backward()
    loss = ours(tokens, targets, labels=labels)
    (loss.total / loss.count + loss.auxiliary["next_sentence"]).backward()
    for mine, other in (
        (ours.pair_head.pooler, theirs.bert.pooler.dense),
        (ours.pair_head.output, theirs.cls.seq_relationship),
    ):
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-5)
    embeddings = theirs.bert.embeddings.word_embeddings
    mine, other = (table.weight.grad[1:] for table in (ours.token_embedding, embeddings))  # token 0 is their padding
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_bert_base_has_as_many_parameters_as_transformers():
    settings = tomllib.loads((ROOT / "configs/bert.toml").read_text())["model"]
    with meta_device():
        ours, theirs = GPT(GPTConfig(**settings, next_sentence=True)), transformers.BertForPreTraining(BASE)
    assert ours.num_parameters() == theirs.num_parameters() == 110_106_428


def test_rows_that_fill_a_batch_are_not_scored():
    model = randomised(GPT(GPTConfig(8, 9, 1, 1, 8, attention="bidirectional", token_types=2, next_sentence=True)))
    tokens = torch.arange(8).expand(3, 8)
    targets = torch.full_like(tokens, -1)
    with torch.no_grad():
        one = model(tokens[:1], targets[:1], labels=torch.tensor([1]))
        more = model(tokens, targets, labels=torch.tensor([1, -1, -1]))
        none = model(tokens, targets, labels=torch.tensor([-1, -1, -1]))
    torch.testing.assert_close(more.sentences, one.sentences)
    assert none.sentences.tolist() == [0, 0, 0] and none.auxiliary["next_sentence"] == 0


@pytest.fixture
def lines(workplace):
    write_lines(workplace)
    return workplace


@pytest.fixture
def run(lines, output_of):
    def run(*flags):
        return output_of(entry_point(train.main), "train.py", "sums.toml", *FLAGS, *flags)

    return run


def test_a_resumed_run_equals_one_that_never_stopped(run, output_of):
    run("--out_dir=whole")
    run("--out_dir=halves", "--max_iters=4", "--lr_decay_iters=8")
    output_of(entry_point(train.main), "train.py", "--resume=halves", "--max_iters=8")
    whole, halves = (load_file(f"{name}/last/model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    last = lines_of("whole")[-1]
    assert {**lines_of("halves")[-1], "mfu": 0} == {**last, "mfu": 0}
    assert 0 < last["val_next_sentence_loss"] < 2 and 0 <= last["val_next_sentence_accuracy"] <= 1
    first = next(line for line in lines_of("whole") if "next_sentence_loss" in line)
    assert first["next_sentence_loss"] == pytest.approx(np.log(2), abs=0.1)  # nothing is learned yet
    assert first["train_loss"] == pytest.approx(np.log(260), abs=0.2)  # of the hidden tokens alone


def test_micro_batches_add_up(run):
    flags = ("--dropout=0", "--max_iters=1", "--warmup_iters=0", "--eval_iters=0")
    run("--out_dir=whole", *flags, "--batch_size=4")
    run("--out_dir=parts", *flags, "--batch_size=2", "--gradient_accumulation_steps=2")
    whole, parts = (load_file(f"{name}/last/model.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], rtol=1e-4, atol=1e-6)
    for one, other in zip(lines_of("whole"), lines_of("parts")):
        for name in (name for name in one if "next_sentence" in name or "loss" in name):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(run, parallel):
    flags = ("--dropout=0", "--eval_iters=0", "--max_iters=2", "--warmup_iters=0", "--eval_interval=2")
    run("--out_dir=one", *flags)
    words = ("train.py", "sums.toml", *FLAGS, *flags, "--batch_size=2", "--gradient_accumulation_steps=2")
    result = command(*words, f"--parallel={parallel}", "--out_dir=two", processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    one, two = (load_file(f"{name}/last/model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-5)
    for lines in zip(lines_of("one"), lines_of("two")):
        for name in (name for name in lines[0] if "next_sentence" in name or "loss" in name):
            assert lines[1][name] == pytest.approx(lines[0][name], rel=1e-4), name


@pytest.mark.slow
def test_a_longer_run_tells_what_follows(workplace, output_of):
    """Each document repeats a letter, so the second text follows if it has the letter of the first."""
    tokenizer = BPETokenizer(BYTES, {"<|endoftext|>": 256})
    splits = {name: [token for letter in b"abcdefgh" for token in (*[letter] * length, 256)] for name, length in SIZES}
    write_dataset(workplace / "data" / "letters", tokenizer, splits)
    flags = ("--dataset=letters", "--dropout=0", "--n_embd=32", "--batch_size=32", "--block_size=12")
    flags += ("--max_iters=500", "--eval_interval=500", "--warmup_iters=20", "--eval_iters=0", "--out_dir=run")
    output_of(entry_point(train.main), "train.py", "sums.toml", *FLAGS, *flags)
    assert lines_of("run")[-1]["val_next_sentence_accuracy"] > 0.95


def test_the_plan_says_so_and_the_vocabulary_has_room(run):
    plan = run("--dry_run=True")
    assert "objective      masked: 12.5% of the tokens are predicted, and whether a text follows another" in plan
    assert "vocabulary     260, as in the dataset with tokens to hide others and around texts" in plan


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--attention=causal",), "next_sentence tells two texts apart and reads both at once: it needs attention"),
        (("--token_types=0",), "and token_types = 2"),
        (("--block_size=4",), "block_size = 4 has no room for the pairs of next_sentence: set 5 or more"),
        (("--document_mask=True",), "document_mask hides one text of a pair from the other"),
        (("--dataset=sums",), "next_sentence = true needs an end-of-text token between documents, and data/sums"),
        (("--dataset=single",), "the val split of data/single is a single one: prepare more documents, or set next_s"),
    ],
)
def test_what_has_no_pairs_is_refused(run, flags, message):
    tokenizer = BPETokenizer(BYTES, {"<|endoftext|>": 256})
    document = [*b"a b c d e f " * 9, 256]
    write_dataset(Path("data/single"), tokenizer, {"train": document * 2, "val": document})
    assert message in run(*flags)
    if flags == ("--block_size=4",):
        assert "finished" in run("--block_size=5")
    if flags == ("--dataset=single",):
        assert "finished" in run(*flags, "--next_sentence=False")


def test_a_model_without_room_for_the_marks_is_refused(run):
    config = GPTConfig(24, 258, 2, 2, 16, attention="bidirectional", token_types=2, next_sentence=True)
    save_model(GPT(config), None, "small")
    assert "next_sentence puts the tokens 258 and 259 around texts, and the model has 258" in run("--init_from=small")


def test_a_trained_model_fills_gaps_classifies_and_trains_on(run, output_of, stage_runner):
    run("--out_dir=run", "--max_iters=4")
    filled = output_of(entry_point(sample.main), "sample.py", "run", "--start=2 times 3[MASK]is 6.", "--temperature=0")
    assert filled.startswith("2 times 3") and filled.endswith("is 6.\n")
    model, tokenizer = load_model("run")
    assert GapFiller(model, tokenizer, "run").encode("2[MASK]") == [258, 50, 257, 259]
    rows = [{"a": f"{n} is", "b": "odd" if n % 2 else "even", "label": str(n % 3 == 0)} for n in range(10, 40)]
    write("rows.jsonl", rows)
    flags = (
        "--train=rows.jsonl",
        "--task=entailment",
        "--text_a=a",
        "--text_b=b",
        "--epochs=1",
        "--device=cpu",
        "--out_dir=tuned",
    )
    result = stage_runner(finetune, "run", *flags)
    assert "val_accuracy" in result, result
    classifier, _ = load_classifier("tuned")
    assert classifier.config.special == (258, 259, 259) and classifier.trunk.config.vocab_size == 260
    assert "finished" in run("--init_from=run", "--out_dir=more", "--max_iters=2", "--warmup_iters=0")
    output = run("--init_from=run", "--eval_only=True")
    assert "val next sentence loss" in output and "val next sentence accuracy" in output


@pytest.mark.slow
def test_compiled_steps_are_the_same(run):
    run("--dropout=0", "--out_dir=plain", "--max_iters=4")
    output = run("--dropout=0", "--out_dir=compiled", "--max_iters=4", "--compile=True")
    assert "not compiled" not in output
    for one, other in zip(lines_of("plain"), lines_of("compiled")):
        for name in (name for name in one if "next_sentence" in name or "loss" in name):
            assert other[name] == pytest.approx(one[name], rel=1e-3), name
