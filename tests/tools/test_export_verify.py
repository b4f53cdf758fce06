"""tools/export.py --verify: what it compares with transformers, and its exit code."""

import json
import math
import re
import string
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from gpt_arc.alignment.reward_model import RewardModel, save_reward_model
from gpt_arc.chat.format import TEMPLATES, ChatFormat
from gpt_arc.data.masking import sentence_marks
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, LibraryTokenizer
from gpt_arc.decoding.gaps import GapFiller
from gpt_arc.decoding.settings import Sampling
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig, save_classifier
from gpt_arc.finetuning.examples import Columns, SpecialTokens
from gpt_arc.weights import tensor_files
from gpt_arc.weights.directory import load_model, save_model
from gpt_arc.weights.verification import Reference, difference
from helpers import randomised
from model import GPT, GPTConfig
from tools import export

TEXT = "Name a colour: Red, or blue. 🙂 1234\n"
QWEN3 = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, qk_norm=True)
MIXTRAL = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, n_experts=3, mlp_size=21)


def bpe():
    return BPETokenizer.train([TEXT * 9], 270)


def with_a_low_special_token():
    """A tokenizer of few tokens, the first of which is special, so that some drawn texts spell it."""
    library = Library(models.WordLevel({t: i for i, t in enumerate(["<unk>", *string.ascii_letters])}, "<unk>"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.add_special_tokens(["<unk>"])
    return LibraryTokenizer(library.to_str().encode())


def save_language_model(folder, tokenizer=None, **settings):
    save_model(randomised(GPT(GPTConfig(24, 276, 2, 2, 16, **settings))), tokenizer, folder)


def save_chat_model(folder):
    tokenizer = bpe()
    save_language_model(folder, tokenizer)
    ChatFormat.new(TEMPLATES["chatml"], tokenizer, 270).save(folder)


def save_reward(folder):
    tokenizer = CharTokenizer.from_text(TEXT)
    chat = ChatFormat.new(TEMPLATES["markers"], tokenizer, 40)
    model = randomised(RewardModel(GPT(GPTConfig(24, chat.vocab_size, 2, 2, 16))))
    torch.nn.init.constant_(model.head.bias, 0.7)
    save_reward_model(model, tokenizer, chat, folder)


def save_labelled(folder, task="classification", classes=("bad", "good"), **settings):
    tokenizer = bpe()
    special = SpecialTokens.after(tokenizer.vocab_size)
    config = GPTConfig(48, special.extract + 1, 2, 2, 16, **settings)
    trained = ClassifierConfig(task, classes, special, Columns.usual(task), 41)
    save_classifier(randomised(Classifier(GPT(config), trained)), tokenizer, folder)


MODELS = {
    "language model": lambda folder: save_language_model(folder, bpe()),
    "without a tokenizer": save_language_model,
    "a special token among others": lambda folder: save_language_model(folder, with_a_low_special_token()),
    "rotary": lambda folder: save_language_model(folder, bpe(), **QWEN3),
    "experts of an odd width": lambda folder: save_language_model(folder, bpe(), **MIXTRAL),
    "chat": save_chat_model,
    "classes": save_labelled,
    "two texts": lambda folder: save_labelled(folder, "entailment", **QWEN3),
    "numbers": lambda folder: save_labelled(folder, classes=None),
    "options": lambda folder: save_labelled(folder, "multiple_choice", None),
    "options of a GPT-1": lambda folder: save_labelled(folder, "multiple_choice", None, norm_position="post"),
    "reward": save_reward,
}


@pytest.fixture
def run(stage_runner, tmp_path):
    return lambda *flags: stage_runner(export, tmp_path / "ours", tmp_path / "export", "--verify", *flags)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_export_is_verified(kind, dtype, run, tmp_path):
    MODELS[kind](tmp_path / "ours")
    shown = run(f"--dtype={dtype}")
    assert 0 <= float(re.search(r"difference of logits is (\S+),", shown)[1]) < 2e-5
    compared = re.search(r"token ids of 0 of (\d+) texts differ\n", shown)
    assert "not compared" in shown if kind == "without a tokenizer" else int(compared[1]) > 9


@pytest.mark.parametrize("kind", ["language model", "classes", "options", "reward"])
def test_another_weight_is_noticed(kind, run, tmp_path, monkeypatch):
    MODELS[kind](tmp_path / "ours")
    check_range = tensor_files.check_range

    def changed(tensors, *others):
        next(tensor for name, tensor in tensors.items() if name.endswith("h.0.ln_1.weight"))[0] += 0.05
        check_range(tensors, *others)

    monkeypatch.setattr(tensor_files, "check_range", changed)
    stopped = run()
    assert stopped.code == 1 and "texts differ" in stopped.output
    largest, bound = re.search(r"difference of logits is (\S+), the bound (\S+)", stopped.output).groups()
    assert float(largest) > float(bound)


@pytest.mark.parametrize("kind", ["language model", "chat", "classes"])
def test_another_tokenizer_is_noticed(kind, run, tmp_path, monkeypatch):
    MODELS[kind](tmp_path / "ours")
    tokenizer_files = export.tokenizer_files

    def lowercase(*others):
        files = tokenizer_files(*others)
        return files | {
            "tokenizer.json": files["tokenizer.json"].replace(
                b'"normalizer": null', b'"normalizer": {"type": "Lowercase"}'
            )
        }

    monkeypatch.setattr(export, "tokenizer_files", lowercase)
    stopped = run()
    assert stopped.code == 1 and re.search(r"token ids of [1-9]\d* of \d+ texts differ, such as ", stopped.output)


def test_verification_without_transformers_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    MODELS["language model"](tmp_path / "ours")
    monkeypatch.setitem(sys.modules, "transformers", None)
    stopped = run()
    assert stopped.code == 2 and "transformers is not installed" in stopped.message
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_an_exported_bert_fills_the_gaps_of_transformers_pipeline(tmp_path, monkeypatch, capsys):
    """Its tokenizer gets the token that hides others."""
    tokenizer = bpe()
    bert = dict(attention="bidirectional", norm_position="post", embedding_norm=True, head_transform=True)
    size = tokenizer.vocab_size + 1
    config = GPTConfig(24, size, 2, 2, 16, **bert, head_bias=True, token_types=2, activation="gelu")
    save_model(randomised(GPT(config)), tokenizer, tmp_path / "bert")
    flags = (str(tmp_path / "bert"), str(tmp_path / "exported"), "--to", "hf", "--verify=True")
    monkeypatch.setattr(sys, "argv", ["export.py", *flags])
    assert export.main() == 0
    assert "BertForMaskedLM" in capsys.readouterr().out
    fill = transformers.pipeline("fill-mask", str(tmp_path / "exported"), device="cpu")
    filler = GapFiller(load_model(tmp_path / "bert")[0], tokenizer, "bert")
    filled = filler.fill("Red, or[MASK].", Sampling(temperature=0), torch.Generator())
    best = next(guess for guess in fill("Red, or[MASK].", top_k=10) if guess["token"] != tokenizer.vocab_size)
    assert [best["token"]] == filled.tokens and best["score"] == pytest.approx(
        math.exp(filled.log_probabilities[0]), rel=0.1
    )
    again = load_model(tmp_path / "exported")[1]
    assert again.special_token("[MASK]") == tokenizer.vocab_size


def test_an_exported_model_of_next_sentences_reads_pairs_laid_out_by_transformers(tmp_path, monkeypatch, capsys):
    """Its tokenizer gets the tokens around texts, with which pairs are laid out as in training."""
    tokenizer = bpe()
    bert = dict(attention="bidirectional", norm_position="post", embedding_norm=True, head_transform=True)
    bert |= dict(head_bias=True, token_types=2, activation="gelu", next_sentence=True)
    mask = tokenizer.vocab_size
    ours = randomised(GPT(GPTConfig(24, mask + 3, 2, 2, 16, **bert)))
    save_model(ours, tokenizer, tmp_path / "bert")
    flags = (str(tmp_path / "bert"), str(tmp_path / "exported"), "--to", "hf", "--verify=True")
    monkeypatch.setattr(sys, "argv", ["export.py", *flags])
    assert export.main() == 0
    assert "BertForPreTraining" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    pair = theirs("red", "or", return_tensors="pt")
    first, second = tokenizer.encode("red"), tokenizer.encode("or")
    assert pair.input_ids.tolist() == [[mask + 1, *first, mask + 2, *second, mask + 2]]
    assert pair.token_type_ids.tolist() == [[0] * (len(first) + 2) + [1] * (len(second) + 1)]
    assert theirs("red").input_ids == [mask + 1, *first, mask + 2] and theirs.mask_token_id == mask
    with torch.no_grad():
        logits = transformers.BertForPreTraining.from_pretrained(tmp_path / "exported")(**pair).seq_relationship_logits
        hidden = ours.hidden(pair.input_ids, types=pair.token_type_ids)
        torch.testing.assert_close(ours.pair_head(hidden), logits, rtol=1e-5, atol=1e-5)
    again, read = load_model(tmp_path / "exported")
    assert again.config.next_sentence and sentence_marks(read, next_sentence=True) == (mask + 1, mask + 2)
    tensors = load_file(tmp_path / "exported/model.safetensors")
    tensors["cls.seq_relationship.bias"] += 100
    save_file(tensors, tmp_path / "exported/model.safetensors", {"format": "pt"})
    reference = Reference(ours, lambda tokens, _: export.both_logits(ours, tokens))
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert difference(reference, tmp_path / "exported", config, 24)[0] == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("tokenizer", [CharTokenizer(" abc"), BPETokenizer.train(["a b c a b c", " ab"] * 9, 262)])
def test_the_space_before_a_gap_belongs_to_it_after_an_export_too(tmp_path, monkeypatch, tokenizer):
    """Where tokens hold the space before a word; among characters, a space is a token."""
    config = GPTConfig(24, tokenizer.vocab_size + 1, 1, 2, 8, attention="bidirectional", norm_position="post")
    config = replace(config, embedding_norm=True, head_transform=True, head_bias=True, token_types=2, activation="gelu")
    save_model(GPT(config), tokenizer, tmp_path / "bert")
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "bert"), str(tmp_path / "exported"), "--to", "hf"])
    assert export.main() == 0
    before, after = (GapFiller(*load_model(tmp_path / name), name).encode for name in ("bert", "exported"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in ("a [MASK] b", "[MASK]ab", "ab[MASK]b c", "ab [MASK]"):
        assert before(text) == after(text) == theirs(text).input_ids
    assert len(before("a [MASK] b")) == (5 if isinstance(tokenizer, CharTokenizer) else 3)
