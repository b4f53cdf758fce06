"""GGUF exports: what a file says computes our logits, and llama.cpp's own converter writes the same."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.decoding.generate import generate
from gpt_arc.decoding.settings import Sampling
from gpt_arc.errors import entry_point
from gpt_arc.weights.directory import save_model
from helpers import randomised
from model import GPT, GPTConfig
from tools import export

gguf = pytest.importorskip("gguf")
TEXT = "The cat sat on the mat, didn't it? 1234 naïve 漢字 🙂\n\n  indented\ttext"
MODERN = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, mlp_size=48, n_kv_head=2)
LLAMA3 = dict(rotary_scaling="llama3", rotary_factor=4.0, rotary_context=8, rotary_fast=4.0, rotary_slow=1.0)
MODELS = {
    "gpt2": GPTConfig(24, 300, 2, 4, 32),
    "gpt2-untied": GPTConfig(24, 300, 2, 4, 32, bias=False, mlp_size=40, tied_head=False),
    "qwen3": GPTConfig(24, 300, 2, 4, 32, **MODERN, qk_norm=True, head_size=12),
    "llama": GPTConfig(24, 300, 2, 4, 32, **MODERN, tied_head=False, rotary_base=5e3),
    "llama-llama3": GPTConfig(24, 300, 2, 4, 32, **MODERN, **LLAMA3, tied_head=False),
    "mixtral": GPTConfig(24, 300, 2, 4, 32, **MODERN, n_experts=5, experts_per_token=2),
}


@pytest.fixture
def run(output_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *argv: output_of(entry_point(export.main), "tools/export.py", *map(str, argv))


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([TEXT] * 20, 300)


def read(path):
    """The metadata and the tensors of a file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def rotated(x, fields, get, name):
    """x (T, H, D), of which llama.cpp rotates neighbours, or for Qwen3 halves."""
    halves, width = name == "qwen3", x.size(-1)
    x = x.unflatten(-1, (2, width // 2) if halves else (width // 2, 2)).movedim(-2 if halves else -1, 0)
    frequencies = fields[f"{name}.rope.freq_base"] ** -(torch.arange(0, width, 2) / width)
    angles = torch.arange(x.size(1))[:, None] * frequencies / get("rope_freqs.weight", 1.0)
    sin, cos = angles.sin()[:, None], angles.cos()[:, None]
    parts = torch.stack([x[0] * cos - x[1] * sin, x[0] * sin + x[1] * cos])
    return parts.movedim(0, -2 if halves else -1).flatten(-2)


def attention(q, k, v):
    """Causal, (T, H, D) with fewer heads in k and v."""
    q, k, v = (part.movedim(1, 0)[None] for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].movedim(0, 1).flatten(1)


def modern_logits(fields, tensors, tokens):
    """What llama.cpp computes for the architectures llama and qwen3, by the names of the file."""
    name, get = fields["general.architecture"], tensors.get
    heads, groups = fields[f"{name}.attention.head_count"], fields[f"{name}.attention.head_count_kv"]
    x = get("token_embd.weight")[tokens]
    for i in range(fields[f"{name}.block_count"]):
        of = lambda part, i=i: get(f"blk.{i}.{part}.weight")  # noqa: E731
        h = rms(x, of("attn_norm"))
        q, k, v = (
            F.linear(h, of(part)).unflatten(1, (count, -1))
            for part, count in (("attn_q", heads), ("attn_k", groups), ("attn_v", groups))
        )
        if name == "qwen3":
            q, k = rms(q, of("attn_q_norm")), rms(k, of("attn_k_norm"))
        q, k = (rotated(part, fields, get, name) for part in (q, k))
        x = x + F.linear(attention(q, k, v), of("attn_output"))
        h = rms(x, of("ffn_norm"))
        if "llama.expert_count" not in fields:
            x = x + F.linear(F.silu(F.linear(h, of("ffn_gate"))) * F.linear(h, of("ffn_up")), of("ffn_down"))
            continue
        share, chosen = F.linear(h, of("ffn_gate_inp")).softmax(-1).topk(fields["llama.expert_used_count"])
        share = share / share.sum(-1, keepdim=True)
        gate, up = (torch.einsum("tc,tkmc->tkm", h, of(f"ffn_{part}_exps")[chosen]) for part in ("gate", "up"))
        x = x + torch.einsum("tkm,tkcm,tk->tc", F.silu(gate) * up, of("ffn_down_exps")[chosen], share)
    return F.linear(rms(x, get("output_norm.weight")), get("output.weight", get("token_embd.weight")))


def gpt2_logits(fields, tensors, tokens):
    both = lambda name: (tensors[f"{name}.weight"], tensors[f"{name}.bias"])  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], *both(name), fields["gpt2.attention.layer_norm_epsilon"])  # noqa: E731
    x = tensors["token_embd.weight"][tokens] + tensors["position_embd.weight"][: len(tokens)]
    for i in range(fields["gpt2.block_count"]):
        parts = F.linear(norm(x, f"blk.{i}.attn_norm"), *both(f"blk.{i}.attn_qkv")).chunk(3, -1)
        q, k, v = (part.unflatten(1, (fields["gpt2.attention.head_count"], -1)) for part in parts)
        x = x + F.linear(attention(q, k, v), *both(f"blk.{i}.attn_output"))
        inner = F.gelu(F.linear(norm(x, f"blk.{i}.ffn_norm"), *both(f"blk.{i}.ffn_up")), approximate="tanh")
        x = x + F.linear(inner, *both(f"blk.{i}.ffn_down"))
    return F.linear(norm(x, "output_norm"), tensors.get("output.weight", tensors["token_embd.weight"]))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_and_keys_of_a_file_compute_our_logits(name, run, tokenizer):
    model = randomised(GPT(MODELS[name]), scale=0.2)
    save_model(model, tokenizer, Path("ours"))
    output = run("ours", "ours.gguf", "--to=gguf")
    assert re.fullmatch(r"ours.gguf: [\d,]+ parameters in float32, [\d.]+kB\n", output)
    fields, tensors = read("ours.gguf")
    tokens = torch.randint(300, (24,))
    logits = (gpt2_logits if name.startswith("gpt2") else modern_logits)(fields, tensors, tokens)
    torch.testing.assert_close(logits, model(tokens[None])[0], rtol=1e-4, atol=1e-4)
    prefix = fields["general.architecture"]
    sizes = {"context_length": 24, "embedding_length": 32, "feed_forward_length": model.config.mlp_width}
    assert fields.items() >= {f"{prefix}.{key}": value for key, value in sizes.items()}.items()
    assert fields["tokenizer.ggml.tokens"][model.config.vocab_size - 1] == "<|endoftext|>"
    assert fields["tokenizer.ggml.eos_token_id"] == 299 and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.token_type"] == [gguf.TokenType.NORMAL] * 299 + [gguf.TokenType.CONTROL]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_are_rounded_and_norms_and_routers_are_not(dtype, run, tokenizer):
    save_model(GPT(MODELS["mixtral"]), tokenizer, Path("ours"))
    run("ours", "ours.gguf", "--to=gguf", f"--dtype={dtype}")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader("ours.gguf").tensors}
    whole = {name for name, kind in kinds.items() if kind == "F32"}
    assert whole == {name for name in kinds if name.endswith(("_norm.weight", "ffn_gate_inp.weight"))}
    assert set(kinds.values()) == {"F32", {"float16": "F16", "bfloat16": "BF16"}[dtype]}


def test_a_vocabulary_of_characters_becomes_merges_that_spell_them(run):
    from tokenizers import Tokenizer, models, pre_tokenizers

    characters = CharTokenizer.from_text(TEXT)
    save_model(GPT(GPTConfig(24, characters.vocab_size, 1, 2, 8)), characters, Path("ours"))
    run("ours", "ours.gguf", "--to=gguf")
    fields, _ = read("ours.gguf")
    vocab = {text: id for id, text in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    names = {*vocab, *(part for merge in merges for part in (*merge, "".join(merge)))}
    library = Tokenizer(models.BPE({name: vocab.get(name, len(vocab) + i) for i, name in enumerate(names)}, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert library.encode(TEXT).ids == characters.encode(TEXT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "llama.cpp's GPT-2 computes gelu_tanh alone, and the model has relu"),
        ({"norm_position": "post"}, "llama.cpp has no counterpart to openai-gpt"),
        ({**MODERN, "rotary_scaling": "dynamic", "rotary_factor": 2.0, "rotary_context": 12}, "dynamic"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(settings, message, run, tokenizer):
    save_model(GPT(GPTConfig(24, 300, 2, 4, 32, **settings)), tokenizer, Path("ours"))
    assert message in run("ours", "ours.gguf", "--to=gguf")
    assert not Path("ours.gguf").exists()


def test_outputs_that_would_be_lost_are_refused(run, tokenizer):
    save_model(GPT(MODELS["gpt2"]), tokenizer, Path("ours"))
    assert "not the name of a .gguf file" in run("ours", "folder", "--to=gguf")
    assert "--verify compares with transformers" in run("ours", "ours.gguf", "--to=gguf", "--verify")
    Path("ours.gguf").write_text("mine")
    assert "ours.gguf exists: name another file" in run("ours", "ours.gguf", "--to=gguf")
    run("ours", "ours.gguf", "--to=gguf", "--overwrite")
    assert read("ours.gguf")[0]["general.name"] == "ours"


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="set LLAMA_CPP to a clone of llama.cpp")
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_s_converter_writes_the_same(name, run):
    """Needs GPT-2's merges, since the converter knows tokenizers by a hash of what they encode."""
    config = dataclasses.replace(MODELS[name], vocab_size=50257)
    save_model(randomised(GPT(config)), BPETokenizer.gpt2(), Path("ours"))
    run("ours", "ours.gguf", "--to=gguf")
    run("ours", "exported", "--to=hf")
    content = json.loads(Path("exported/config.json").read_text())
    Path("exported/config.json").write_text(json.dumps({"n_ctx": 24, **content}))  # it asks GPT-2 for this old key
    converter = Path(os.environ["LLAMA_CPP"], "convert_hf_to_gguf.py")
    arguments = ("exported", "--outfile", "theirs.gguf", "--outtype", "f32")
    subprocess.run([sys.executable, converter, *arguments], check=True, capture_output=True)
    (ours, ours_tensors), (theirs, theirs_tensors) = read("ours.gguf"), read("theirs.gguf")
    differing = {"general.name"}
    if name == "gpt2-untied":
        differing.add("gpt2.feed_forward_length")  # the converter takes 4 n_embd for granted
    assert ours.keys() == theirs.keys()
    assert {key for key in ours if ours[key] != theirs[key]} == differing
    assert ours_tensors.keys() == theirs_tensors.keys()
    for tensor in ours_tensors:
        assert torch.equal(ours_tensors[tensor], theirs_tensors[tensor]), tensor


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_continues_a_text_as_we_do(name, run, tokenizer):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python isn't installed")
    model = randomised(GPT(MODELS[name]), scale=0.3)
    save_model(model, tokenizer, Path("ours"))
    run("ours", "ours.gguf", "--to=gguf")
    exact = {"type_k": gguf.GGMLQuantizationType.F32, "type_v": gguf.GGMLQuantizationType.F32, "n_threads": 1}
    theirs = llama_cpp.Llama("ours.gguf", n_ctx=24, logits_all=True, verbose=False, **exact)
    assert theirs.tokenize(TEXT.encode(), add_bos=False) == tokenizer.encode(TEXT)
    prompt = theirs.tokenize(b"The cat sat on", add_bos=False)
    count = 24 - len(prompt)
    continued = list(itertools.islice(theirs.generate(prompt, temp=0.0, repeat_penalty=1.0), count))
    assert continued == [step.tokens[0] for step in generate(model, [prompt], count, Sampling(temperature=0))]
    logits = torch.tensor(theirs.scores[: len(prompt)])
    tolerance = 2e-3 if name.startswith("gpt2") else 1e-5  # llama.cpp reads GELU from a table in 16 bits
    torch.testing.assert_close(logits, model(torch.tensor([prompt]))[0], rtol=0, atol=tolerance)
