"""Reward models loaded by transformers: the same scores of the same conversations."""

import json
import random

import pytest
import torch
import transformers

from exports import described, with_version
from gpt_arc.alignment.reward_model import RewardModel, fold_bias, save_reward_model, score_sequences
from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.errors import entry_point
from helpers import randomised
from model import GPT, GPTConfig
from tools import export

TEXT = "Name a colour: Red, or blue. 🙂 1234\n"
CPU = torch.device("cpu")
ROTARY = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False)
SETTINGS = {
    "gpt2": dict(n_layer=2, n_head=2, n_embd=16),
    "gpt2-untied": dict(n_layer=1, n_head=2, n_embd=16, tied_head=False),
    "gpt2-unbiased": dict(n_layer=1, n_head=2, n_embd=16, bias=False),
    "openai-gpt": dict(n_layer=2, n_head=2, n_embd=16, norm_position="post"),
    "qwen3": dict(n_layer=2, n_head=4, n_embd=16, n_kv_head=2, qk_norm=True, **ROTARY),
    "llama": dict(n_layer=1, n_head=4, n_embd=16, n_kv_head=2, **ROTARY),
    "mixtral": dict(n_layer=1, n_head=2, n_embd=16, mlp_size=20, n_experts=3, **ROTARY),
}
CLASSES = {"gpt2": "GPT2", "openai-gpt": "OpenAIGPT", "qwen3": "Qwen3", "llama": "Llama", "mixtral": "Mixtral"}


@pytest.fixture
def run(output_of):
    return lambda *argv: output_of(entry_point(export.main), "tools/export.py", *map(str, argv))


@pytest.fixture
def saved(tmp_path):
    """Saves a reward model as in a run folder; returns it with its chat format."""

    def call(name, template="markers", tokenizer=None, bias=0.0, **more):
        tokenizer = tokenizer or CharTokenizer.from_text(TEXT)
        chat = ChatFormat.new(TEMPLATES[template], tokenizer, tokenizer.vocab_size + 3)
        config = GPTConfig(96, chat.vocab_size, **SETTINGS[name] | more)
        model = randomised(RewardModel(GPT(config))).eval()
        torch.nn.init.constant_(model.head.bias, bias)
        save_reward_model(model, tokenizer, chat, tmp_path / "run" / "best")
        return model, chat

    return call


def conversations(count=30):
    draw = random.Random(0)

    def text(least):
        return "".join(draw.choice(TEXT[:-1]) for _ in range(draw.randrange(least, 12)))

    roles = (("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant"))
    return [[Turn(role, text(1)) for role in draw.choice(roles)] for _ in range(count)]


def their_scores(folder, rows):
    """The scores by transformers, whose tokenizer renders, encodes and pads the conversations; and the token ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    messages = [[turn._asdict() for turn in turns] for turns in rows]
    batch = tokenizer.apply_chat_template(messages, padding=True, return_dict=True, return_tensors="pt")
    ids = [row[mask > 0].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask)]
    with torch.no_grad():
        return loaded(**batch).logits, ids


def sequences(chat, rows):
    return [chat.prompt(turns[:-1]) + chat.response(turns[-1].content) for turns in rows]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["characters", "bpe"])
@pytest.mark.parametrize("name, bias", [("gpt2", 0.7), ("qwen3", 0.0)])
def test_conversations_have_the_same_scores(name, bias, kind, template, saved, run, tmp_path):
    tokenizer = BPETokenizer.train([TEXT * 9], 270) if kind == "bpe" else CharTokenizer.from_text(TEXT + "asersytmunil")
    model, chat = saved(name, template, tokenizer, bias)
    assert "ForSequenceClassification, " in run(tmp_path / "run", tmp_path / "export", "--to=hf")
    rows = conversations()
    theirs, ids = their_scores(tmp_path / "export", rows)
    assert ids == sequences(chat, rows)
    scores = score_sequences(model, ids, 7, CPU, "float32")
    torch.testing.assert_close(theirs[:, 0], scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_architecture_has_a_class(name, saved, run, tmp_path):
    model, chat = saved(name, bias=-0.4 if name in ("gpt2", "gpt2-untied", "openai-gpt") else 0.0)
    run(tmp_path / "run", tmp_path / "export")
    folder, rows = tmp_path / "export", conversations(12)
    theirs, ids = their_scores(folder, rows)
    scores = score_sequences(model, ids, 5, CPU, "float32")
    torch.testing.assert_close(theirs[:, 0], scores, atol=1e-5, rtol=1e-5)
    loaded, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    kind = next(kind for kind in CLASSES if name.startswith(kind))
    assert type(loaded).__name__ == f"{CLASSES[kind]}ForSequenceClassification" and loaded.num_labels == 1
    loaded.save_pretrained(tmp_path / "again")
    assert with_version(folder / "config.json") == json.loads((tmp_path / "again" / "config.json").read_text())
    assert described(folder) == described(tmp_path / "again")


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt2-unbiased"])
def test_a_bias_without_a_place_is_refused_or_dropped(name, saved, run, tmp_path):
    model, chat = saved(name, bias=0.25)
    refused = run(tmp_path / "run", tmp_path / "export")
    assert "has a bias of 0.25, which " in refused and "--drop_bias" in refused
    assert not (tmp_path / "export").exists()
    run(tmp_path / "run", tmp_path / "export", "--drop_bias")
    rows = conversations(5)
    theirs, ids = their_scores(tmp_path / "export", rows)
    torch.testing.assert_close(theirs[:, 0] + 0.25, score_sequences(model, ids, 5, CPU, "float32"))
    assert "Add 0.25 for the scores" in (tmp_path / "export" / "README.md").read_text()


def test_a_reward_model_without_a_class_is_refused_by_name(saved, run, tmp_path):
    saved("qwen3", activation="relu_squared")
    assert 'has no activation = "relu_squared"' in run(tmp_path / "run", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["gpt2", "openai-gpt"])
def test_a_folded_bias_changes_no_score(name, saved):
    model, chat = saved(name, bias=2.0)
    before = score_sequences(model, ids := sequences(chat, conversations(9)), 4, CPU, "float32")
    fold_bias(model)
    assert model.head.bias.item() == 0
    torch.testing.assert_close(score_sequences(model, ids, 4, CPU, "float32"), before)
