"""ONNX exports: onnxruntime computes our logits, whatever the batch and the length."""

import sys
from pathlib import Path

import pytest
import torch

from gpt_arc.errors import entry_point
from gpt_arc.weights import onnx_file
from gpt_arc.weights.directory import save_model
from helpers import ROOT, randomised
from model import GPT, GPTConfig
from tools import export

MODERN = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, n_kv_head=2)
YARN = dict(rotary_scaling="yarn", rotary_factor=2.0, rotary_context=12)
MODELS = {
    "gpt2": {},
    "modern": {**MODERN, **YARN, "qk_norm": True, "attention_band": 6},
    "beyond-transformers": {"positions": "alibi", "ngrams": 2, "ngram_rows": 64},
    "lstm": {"mixer": "lstm", "bias": False},
    "bidirectional": {"attention": "bidirectional", "norm_position": "post"},
}


@pytest.fixture
def run(output_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *argv: output_of(entry_point(export.main), "tools/export.py", *argv)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_computes_our_logits(name, run, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = randomised(GPT(GPTConfig(24, 50, 2, 4, 32, **MODELS[name])), scale=0.2)
    save_model(model, None, Path("ours"))
    if name == "modern":
        monkeypatch.setattr(onnx_file, "LARGEST", 0)
    assert "ours.onnx: " in run("ours", "ours.onnx", "--to=onnx")
    assert Path("ours.onnx.data").exists() == (name == "modern")
    session = onnxruntime.InferenceSession("ours.onnx")
    for batch, length in ((1, 1), (2, 8), (3, 24), (1, 17)):
        tokens = torch.randint(50, (batch, length))
        (logits,) = session.run(["logits"], {"tokens": tokens.numpy()})
        torch.testing.assert_close(torch.tensor(logits), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**MODERN, "n_experts": 4}, "can't choose experts by token"),
        ({**MODERN, "rotary_scaling": "dynamic", "rotary_factor": 2.0, "rotary_context": 12}, "dynamic"),
    ],
)
def test_what_is_no_fixed_graph_is_refused(settings, message, run):
    save_model(GPT(GPTConfig(24, 50, 1, 4, 32, **settings)), None, Path("ours"))
    assert message in run("ours", "ours.onnx", "--to=onnx")


def test_other_settings_are_refused(run, monkeypatch):
    save_model(GPT(GPTConfig(24, 50, 1, 4, 32)), None, Path("ours"))
    assert "--to onnx writes float32 alone" in run("ours", "ours.onnx", "--to=onnx", "--dtype=float16")
    assert "not the name of a .onnx file" in run("ours", "ours.gguf", "--to=onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert f"pip install -e '{ROOT}[onnx]'" in run("ours", "ours.onnx", "--to=onnx")
