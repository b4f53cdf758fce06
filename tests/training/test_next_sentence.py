"""BERT's next-sentence objective: the head and its loss against transformers', the pairs by brute force, and runs."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import train
from gpt_arc.errors import entry_point
from gpt_arc.weights.directory import load_model
from gpt_arc.weights.huggingface import hf_config, hf_tensors
from helpers import TINY_FLAGS, lines_of, randomised, write_lines
from model import GPT, GPTConfig

FLAGS = (*TINY_FLAGS, "--dataset=lines", "--attention=bidirectional", "--token_types=2", "--next_sentence=True")
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
        torch.testing.assert_close(ours.pair_logits(hidden), expected.seq_relationship_logits, **close)
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
    for mine, other in ((ours.pooler, theirs.bert.pooler.dense), (ours.pair_head, theirs.cls.seq_relationship)):
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-5)
    embeddings = theirs.bert.embeddings.word_embeddings
    mine, other = (table.weight.grad[1:] for table in (ours.token_embedding, embeddings))  # token 0 is their padding
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


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
