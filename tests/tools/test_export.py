"""Exports: transformers loads them, and writes the same files."""

import dataclasses
import json
import random

import pytest
import torch
import transformers

import train
from exports import described, with_version
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, SentencePieceTokenizer, load_tokenizer
from gpt_arc.errors import entry_point
from gpt_arc.weights.directory import load_model, save_model
from helpers import TINY_FLAGS, randomised
from model import GPT, GPTConfig
from tools import export

TEXT = "The cat sat on the mat, didn't it? 1234 naïve 漢字 🙂🙃\n\n  indented\ttext . , !"
QWEN3 = dict(positions="rotary", norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias=False, qk_norm=True)
LLAMA = MIXTRAL = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False)
YARN = dict(rotary_scaling="yarn", rotary_factor=4.0, rotary_context=5, rotary_fast=3.0, rotary_slow=0.5)
DYNAMIC = dict(rotary_scaling="dynamic", rotary_factor=3.0, rotary_context=6)
CONFIGS = {
    "gpt2": GPTConfig(24, 300, 2, 3, 24, dropout=0.1),
    "gpt2-untied": GPTConfig(7, 300, 1, 5, 35, mlp_size=9, activation="relu_squared", tied_head=False, norm_eps=1e-3),
    "gpt2-unbiased": GPTConfig(9, 300, 2, 2, 16, bias=False),  # exported with zero biases
    "openai-gpt": GPTConfig(17, 300, 3, 2, 20, norm_position="post", attention_dropout=0.2),
    "qwen3": GPTConfig(19, 300, 2, 6, 32, 2, 10, 44, **QWEN3, rotary_base=5e3),
    "qwen3-untied": GPTConfig(19, 300, 1, 4, 16, tied_head=False, **QWEN3),
    "llama": GPTConfig(19, 300, 2, 6, 36, 2, 10, 44, **LLAMA, rotary_base=5e3),
    "llama-untied": GPTConfig(19, 300, 1, 4, 16, tied_head=False, **LLAMA),
    "llama-yarn": GPTConfig(19, 300, 1, 4, 16, **LLAMA, **YARN),
    "qwen3-dynamic": GPTConfig(18, 300, 1, 4, 16, **QWEN3, **DYNAMIC),
    "mixtral": GPTConfig(19, 300, 2, 6, 32, 2, 10, 20, **MIXTRAL, n_experts=5, experts_per_token=3, rotary_base=5e3),
    "mixtral-untied": GPTConfig(19, 300, 1, 4, 24, 1, **MIXTRAL, n_experts=4, tied_head=False),
    "mixtral-ungrouped": GPTConfig(19, 300, 3, 4, 24, **MIXTRAL, n_experts=2, balance_loss=0.03, router_jitter=0.1),
}


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([TEXT] * 20, 300)


@pytest.fixture
def run(output_of):
    return lambda *argv: output_of(entry_point(export.main), "tools/export.py", *map(str, argv))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_equals_what_transformers_writes(name, tokenizer, run, tmp_path):
    model = randomised(GPT(CONFIGS[name]), scale=0.15 if "mixtral" in name else 0.3)
    save_model(model, tokenizer, tmp_path / "ours")
    kind = name if name == "openai-gpt" else name.split("-")[0]
    assert f"export: {kind}, " in run(tmp_path / "ours", tmp_path / "export", "--to=hf")
    export = tmp_path / "export"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(export).eval()
    loaded.save_pretrained(tmp_path / "theirs")
    # a config.json that the class writes itself, not one that from_pretrained passes through
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "transformers_version"})
    type(loaded)(config).save_pretrained(tmp_path / "fresh")
    assert described(export) == described(tmp_path / "theirs") == described(tmp_path / "fresh")
    for reference in ("theirs", "fresh"):
        for file in ("config.json", "generation_config.json"):
            assert with_version(export / file) == json.loads((tmp_path / reference / file).read_text())
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == tokenizer.end_of_text
    tokens = torch.randint(300, (2, model.config.block_size))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    reloaded, reloaded_tokenizer = load_model(export)
    assert reloaded_tokenizer == tokenizer
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_llama_preset_is_trained_exported_and_loaded(workplace, run, stage_runner):
    tiny = *TINY_FLAGS, "--n_kv_head=1", "--mlp_size=24", "--max_iters=3", "--out_dir=trained"
    assert "finished step 3" in stage_runner(train, "llama", "--dataset=sums", "--tokens_per_step=64", *tiny)
    assert "exported: llama, " in run("trained", "exported", "--to=hf")
    loaded, (model, _) = transformers.LlamaForCausalLM.from_pretrained("exported").eval(), load_model("trained")
    tokens = torch.randint(model.config.vocab_size, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "llama", "mixtral"])
def test_a_transformers_model_survives_the_round_trip_exactly(name, run, tmp_path):
    size = dict(vocab_size=29, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=9)
    if name != "gpt2":
        size |= dict(num_key_value_heads=1, head_dim=4, intermediate_size=20, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **size))
    randomised(model).save_pretrained(tmp_path / "theirs")
    output = run(tmp_path / "theirs", tmp_path / "export", f"--dtype={str(model.dtype).removeprefix('torch.')}")
    assert "it has no tokenizer" in output
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert exported.dtype == model.dtype
    state = exported.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tokenizer, run, tmp_path):
    model = randomised(GPT(CONFIGS["gpt2"]))
    save_model(model, None, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "export", f"--dtype={dtype}")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert loaded.dtype == getattr(torch, dtype) and loaded.config.eos_token_id is None
    expected = model.blocks[1].mlp.up.weight.T.to(loaded.dtype)
    assert torch.equal(loaded.transformer.h[1].mlp.c_fc.weight, expected)


@pytest.mark.parametrize("kind", ["characters", "trained"])
def test_auto_tokenizer_gives_the_same_ids(kind, tokenizer, run, tmp_path):
    tokenizer = CharTokenizer.from_text(TEXT) if kind == "characters" else tokenizer
    save_model(GPT(GPTConfig(8, 300, 1, 1, 4)), tokenizer, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "export")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert loaded.eos_token_id == loaded.bos_token_id == tokenizer.end_of_text
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(
            draw.choice(TEXT if kind == "characters" else TEXT + "\u00a0\u3000é\U0001f9ff\r") for _ in range(40)
        )
        tokens = tokenizer.encode(text)
        assert loaded(text)["input_ids"] == tokens
        assert loaded.decode(tokens) == text
    assert load_tokenizer(tmp_path / "export") == tokenizer


def test_a_sentencepiece_model_is_copied(sentencepiece_model, run, tmp_path):
    tokenizer = SentencePieceTokenizer(sentencepiece_model)
    save_model(GPT(GPTConfig(8, tokenizer.vocab_size, 1, 1, 4)), tokenizer, tmp_path / "ours")
    assert "otherwise than SentencePiece" in run(tmp_path / "ours", tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.model").read_bytes() == sentencepiece_model
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.start_token, tokenizer.end_of_text)


def test_existing_files_are_not_overwritten(run, tmp_path):
    save_model(GPT(CONFIGS["gpt2"]), None, tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    run(tmp_path / "ours", tmp_path / "empty")
    assert "holds an export already" in run(tmp_path / "ours", tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").touch()
    refused = run(tmp_path / "ours", tmp_path / "empty", "--overwrite=True")
    assert "holds more than an export, such as notes.txt" in refused
    (tmp_path / "empty" / "notes.txt").rename(tmp_path / "notes.txt")
    (tmp_path / "empty" / "tokenizer.json").touch()  # an older export's
    (tmp_path / "link").symlink_to("empty")
    run(tmp_path / "ours", tmp_path / "link", "--overwrite=True")
    assert not (tmp_path / "empty" / "tokenizer.json").exists()
    modes = {path.stat().st_mode for path in (tmp_path / "empty").iterdir()}
    assert len(modes) == 1, modes  # the umask's permissions
    for place in ("ours", "file"):
        (tmp_path / "file").touch()
        refused = run(tmp_path / "ours", tmp_path / place, "--overwrite=True")
        assert "holds something other than an export" in refused
    assert (tmp_path / "ours" / "model.safetensors").exists()


def test_a_model_without_counterpart_is_refused_and_nothing_is_written(run, tmp_path):
    config = dataclasses.replace(CONFIGS["gpt2"], positions="sinusoidal", head_bias=True)
    save_model(GPT(config), None, tmp_path / "ours")
    refused = run(tmp_path / "ours", tmp_path / "export")
    assert 'the nearest, gpt2, has no positions = "sinusoidal" and no head_bias = true' in refused
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert "there is no model directory" in run(tmp_path / "nowhere", tmp_path / "export")


def test_a_mixture_that_is_not_a_mixtral_is_refused(run, tmp_path):
    config = dataclasses.replace(CONFIGS["mixtral"], shared_experts=1)
    save_model(GPT(config), None, tmp_path / "ours")
    refused = run(tmp_path / "ours", tmp_path / "export")
    assert "the nearest, mixtral, has no shared_experts = 1: a model trained with --shared_experts=0 has" in refused
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_heads_that_do_not_divide_the_width_are_no_llama_s(run, tmp_path):
    save_model(GPT(GPTConfig(19, 300, 1, 6, 32, 2, 10, **LLAMA)), None, tmp_path / "ours")
    refused = run(tmp_path / "ours", tmp_path / "export")
    assert "has no qk_norm = false: a model trained with --qk_norm=True has a place there\n" in refused


def test_a_failed_write_leaves_nothing(run, tmp_path, monkeypatch):
    save_model(GPT(CONFIGS["gpt2"]), None, tmp_path / "ours")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_file", full)
    assert "No space left" in run(tmp_path / "ours", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("template", ["markers", "plain"])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_chat_model_is_exported_with_its_template(kind, template, tmp_path, monkeypatch, output_of):
    """transformers' tokenizer encodes a conversation as ours does, and its model stops at the same tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gpt_arc.chat.format import TEMPLATES, ChatFormat, Turn, load_chat

    text = "Name a colour.\nRed, or blue."
    tokenizer = CharTokenizer.from_text(text) if kind == "char" else BPETokenizer.train([text * 9], 270)
    chat = ChatFormat.new(TEMPLATES[template], tokenizer, tokenizer.vocab_size)
    model = GPT(GPTConfig(32, tokenizer.vocab_size + len(chat.added), n_layer=1, n_head=2, n_embd=16))
    save_model(model, tokenizer, tmp_path / "model")
    chat.save(tmp_path / "model")
    output_of(entry_point(export.main), "export.py", str(tmp_path / "model"), str(tmp_path / "exported"))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "exported")
    turns = [Turn("system", "or blue"), Turn("user", "Name a colour."), Turn("assistant", "Red"), Turn("user", "a")]
    messages = [turn._asdict() for turn in turns]
    assert loaded.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == chat.prompt(turns)
    assert loaded.apply_chat_template(messages)["input_ids"] == chat.encode(turns)[0]
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").generation_config
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    assert ends[0] == loaded.eos_token_id == chat.end
    assert set(ends) == load_tokenizer(tmp_path / "model").ends == {chat.end, tokenizer.end_of_text} - {None}
    assert load_chat(tmp_path / "exported", tokenizer) == chat
    assert load_model(tmp_path / "exported")[1].declared.ends == set(ends)
