"""tools/long_context.py and its data: rows by hand, losses by one pass each, and a model that copies."""

import dataclasses
import json
import random

import pytest
import torch

import long_context_data
import long_context_memory
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.errors import UserError, entry_point
from gpt_arc.evaluation.recall import copy_row, key_row, measure_recall, outcomes, stretched
from gpt_arc.weights.directory import save_model
from helpers import randomised, write_dataset
from model import GPT, GPTConfig
from tools import long_context

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz0123456789 :|\n.")
BYTES = BPETokenizer({bytes([byte]): byte for byte in range(256)} | {b" k": 256, b"12": 257}, {"<|endoftext|>": 258})
TINY = GPTConfig(block_size=16, vocab_size=LETTERS.vocab_size, n_layer=1, n_head=2, n_embd=16, positions="rotary")


@pytest.fixture
def run(output_of):
    return lambda *argv: output_of(entry_point(long_context.main), "tools/long_context.py", *map(str, argv))


@pytest.mark.parametrize("size", [9, 10, 33])
def test_a_row_of_copies_worked_by_hand(size):
    row, count = copy_row(LETTERS, size, random.Random(0))
    text = LETTERS.decode(row)
    first, second = text.removeprefix("copy ").split("|")
    assert text.startswith("copy ") and first == second and len(first) == count and size - 1 <= len(row) <= size
    with pytest.raises(UserError, match="a length of 6 tokens has no room for two copies"):
        copy_row(LETTERS, 7, random.Random(0))


@pytest.mark.parametrize("tokenizer", [LETTERS, BYTES], ids=["characters", "byte pairs"])
def test_a_row_with_a_key_worked_by_hand(tokenizer):
    prose = tokenizer.encode("the cat sat on the mat. " * 9)
    depths = set()
    for seed in range(50):
        row, count = key_row(tokenizer, prose, 60, random.Random(seed))
        text = tokenizer.decode(row)
        key = text[-4:]
        before, after = text.removesuffix(f" key {key}").split(f"key {key}: ")
        assert len(row) == 60 and key.isdigit() and tokenizer.decode(row[-count:]) == key
        assert before + after in tokenizer.decode(prose)
        depths.add(len(before) / len(before + after))
    assert min(depths) < 0.1 and max(depths) > 0.9 and len(depths) > 10
    with pytest.raises(UserError, match="no room for a key and its repetition"):
        key_row(tokenizer, prose, 10, random.Random(0))


def test_outcomes_are_those_of_one_pass_for_each_row():
    model = randomised(GPT(dataclasses.replace(TINY, vocab_size=7)))
    rows = torch.randint(7, (5, 17), generator=torch.Generator().manual_seed(0)).tolist()
    nats, hits = outcomes(model, rows)
    for row, losses, right in zip(rows, nats, hits):
        with torch.no_grad():
            probabilities = model(torch.tensor([row[:-1]]))[0].softmax(-1)
        for t, (token, loss, hit) in enumerate(zip(row[1:], losses, right)):
            assert loss.item() == pytest.approx(-probabilities[t, token].log().item(), rel=1e-4)
            assert hit.item() == (probabilities[t].argmax().item() == token)


class Copier(torch.nn.Module):
    """Predicts what followed the latest earlier occurrence of the last two tokens; else token 0."""

    def __init__(self, vocabulary):
        super().__init__()
        self.token_embedding, self.vocabulary = torch.nn.Embedding(1, 1), vocabulary

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.vocabulary)
        for b, row in enumerate(tokens.tolist()):
            for t in range(1, len(row)):
                ends = [s for s in range(1, t) if row[s - 1 : s + 1] == row[t - 1 : t + 1]]
                logits[b, t, row[ends[-1] + 1] if ends else 0] = 9.0
        return logits


def test_a_model_that_copies_after_two_equal_tokens_copies_all_but_the_first_two():
    prose = LETTERS.encode("aaaa. " * 30)
    recall = measure_recall(Copier(LETTERS.vocab_size), LETTERS, prose, 60, 8, seed=0)
    assert len(recall.losses) == 60 and recall.found == 1.0  # "key", and a digit or two, occurred once before
    count = (61 - 6) // 2
    assert (count - 2) / count - 0.08 < recall.copied < (count - 2) / count + 0.08


def test_weights_stay_when_a_model_is_stretched():
    model = randomised(GPT(TINY))
    for kind in (None, "linear", "ntk", "dynamic", "yarn", "llama3"):
        longer = stretched(model, 64, kind, 16)
        assert longer.config.rotary_scaling == kind and longer.config.block_size == 64
        assert longer.blocks[0].attention.qkv.weight.data_ptr() == model.blocks[0].attention.qkv.weight.data_ptr()
        assert stretched(model, 16, kind, 16).config == model.config
    learned = GPT(dataclasses.replace(TINY, positions="learned"))
    assert stretched(learned, 17) is None and stretched(learned, 16) is not None


def test_the_tool_s_tables_figures_and_plot(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = LETTERS.encode("the cat sat on the mat.\n" * 20)
    write_dataset(tmp_path / "data" / "cats", LETTERS, {"train": tokens, "val": tokens})
    for name in ("rotary", "learned"):
        save_model(randomised(GPT(dataclasses.replace(TINY, positions=name, block_size=24))), LETTERS, name)
    flags = "--dataset=cats", "--rows=2", "--multiples", "1", "4", "--device=cpu", "--stretch", "ntk", "dynamic"
    shown = run("rotary", "learned", *flags, "--json=figures.json", "--plot=loss.png")
    lines = [line.split() for line in shown.splitlines()]
    assert [line[0] for line in lines if line][:5] == ["loss,", "rotary", "rotary,", "rotary,", "learned"]
    assert lines[4][-1] == "-" and (tmp_path / "loss.png").stat().st_size > 1000
    figures = json.loads((tmp_path / "figures.json").read_text())["models"]
    assert figures.keys() == {"rotary", "rotary, ntk", "rotary, dynamic", "learned"}
    assert len(figures["rotary, ntk"]["96"]["losses"]) == 96 and figures["learned"].keys() == {"24"}
    assert figures["rotary"]["24"] == figures["rotary, ntk"]["24"]
    save_model(GPT(dataclasses.replace(TINY, vocab_size=300)), BYTES, "bytes")
    for argv, sentence in (
        (["rotary", "--dataset=dogs"], "there is no prepared dataset dogs"),
        (["bytes", "--dataset=cats"], "cats was prepared with another tokenizer than that of bytes"),
        (["rotary", "--dataset=cats", "--multiples", "99"], "is too short for windows of 2376"),
        (["rotary", "--dataset=cats", "--plot=loss.pdf"], "loss.pdf must end in .png"),
        (["rotary", "--dataset=cats", "--json=no/figures.json"], "there is no folder no for the results"),
    ):
        assert sentence in run(*argv, "--device=cpu")


def test_the_documents_are_prose_copies_and_keys(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    main = entry_point(long_context_data.main)
    output_of(main, "long_context_data.py", "--documents=400", "--longest=100", "--output=written")
    texts = [json.loads(line)["text"] for line in (tmp_path / "written" / "corpus.jsonl").read_text().splitlines()]
    copies = [text.removeprefix("copy ").split("|") for text in texts if text.startswith("copy ")]
    keys = [text for text in texts if text.startswith("key ") and text[4:8].isdigit()]
    assert len(texts) == 400 and 160 < len(copies) < 240 and 70 < len(keys) < 130
    assert all(first == second and first.isalnum() for first, second in copies)
    assert any(character.isdigit() for first, _ in copies for character in first)
    assert all(text[4:8] == text[-4:] and text[8] == ":" for text in keys)
    assert max(map(len, texts)) <= 100 and min(map(len, texts)) >= 12
    assert "longest = 9 must be more than 16" in output_of(main, "long_context_data.py", "--longest=9")


@pytest.mark.parametrize("name", long_context_memory.READERS)
def test_reading_is_measured_with_each_cache(name):
    label, length, *figures = long_context_memory.reading(name, 40)
    assert (label, length) == (name, 40) and all(float(figure) >= 0 for figure in figures)
    bytes_per_token = next((size for dtype, size in (("bfloat16", 256), ("int8", 128 + 4 * 4)) if dtype in name), 512)
    size = 4 * 2 * 44 * bytes_per_token / 2**20
    assert float(figures[1]) == pytest.approx(size, abs=0.051)


def test_training_is_measured_and_large_biases_are_left_out():
    names = long_context_memory.TRAINERS
    figures = [[float(x) for x in long_context_memory.training(name, 1024)[2:]] for name in names]
    assert [planned for _, planned, _ in figures] == [50, 16] and all(spent > 0 for *_, spent in figures)
    assert long_context_memory.reading("alibi", 32_768)[2:] == [None] * 4
