"""What nanoGPT wrote: models compute what its own code computes, and nothing in a file is executed."""

import math
import pickle
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import from_nanogpt
from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.errors import UserError
from gpt_arc.training.arguments import config_file
from gpt_arc.training.config import SETTINGS, Config
from gpt_arc.weights.directory import load_model
from nanogpt import ARGUMENTS, tensors_of

META = {"vocab_size": 7, "itos": dict(enumerate("abcdefg")), "stoi": {c: i for i, c in enumerate("abcdefg")}}


def forward(w, tokens, n_layer, n_head, **_):
    """What nanoGPT computes, by its names."""
    get = lambda name: (w[f"transformer.{name}.weight"], w.get(f"transformer.{name}.bias"))  # noqa: E731
    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][: tokens.size(1)]
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], *get(name), 1e-5)  # noqa: E731
    for i in range(n_layer):
        q, k, v = F.linear(norm(x, f"h.{i}.ln_1"), *get(f"h.{i}.attn.c_attn")).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (n_head, -1)).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~torch.ones(q.size(2), k.size(2)).tril().bool(), -1e30)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, *get(f"h.{i}.attn.c_proj"))
        inner = F.gelu(F.linear(norm(x, f"h.{i}.ln_2"), *get(f"h.{i}.mlp.c_fc")))
        x = x + F.linear(inner, *get(f"h.{i}.mlp.c_proj"))
    return norm(x, "ln_f") @ w["lm_head.weight"].T


@pytest.fixture
def run(tmp_path, monkeypatch, stage_runner):
    monkeypatch.chdir(tmp_path)
    Path("meta.pkl").write_bytes(pickle.dumps(META))
    return partial(stage_runner, from_nanogpt)


@pytest.mark.parametrize(("bias", "prefix"), [(True, ""), (False, "_orig_mod.")])
def test_a_model_gives_the_same_logits(run, bias, prefix):
    tensors = tensors_of(bias)
    saved = {prefix + name: tensor for name, tensor in tensors.items()}
    saved |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 12, 12) for i in range(2)}  # a mask of old ones
    content = {"model": saved, "model_args": ARGUMENTS | {"bias": bias}, "iter_num": 5, "config": {"seed": 1}}
    torch.save(content, "ckpt.pt")
    assert "use it with: " in run("ckpt.pt", "out")
    model, tokenizer = load_model("out")
    tokens = torch.randint(7, (3, 12))
    torch.testing.assert_close(model.eval()(tokens), forward(tensors, tokens, 2, 2), rtol=1e-5, atol=1e-5)
    assert tokenizer.decode([0, 6]) == "ag"


def test_a_config_gets_nanogpt_s_defaults_and_ours_names(run):
    Path("train.py").write_text(
        '"""a comment"""\nimport time\nout_dir = "out-a"\ngradient_accumulation_steps = 2 * 4\n'
        'dataset = "shakespeare_char"\n'
        "bias = False # none\ndecay_lr = False\ndropout = 0.2\nalways_save_checkpoint = False\nbeta2 = None\n"
        'wandb_run_name = "a" + str(time.time())\n'
    )
    assert "3 lines without a counterpart" in run("train.py", "a.toml")
    text = Path("a.toml").read_text()
    for line in ("import time", "always_save_checkpoint = False", 'wandb_run_name = "a" + str(time.time())'):
        assert f"# without a counterpart here: {line}\n" in text
    settings = {name: value for table in tomllib.loads(text).values() for name, value in table.items()}
    expected = {"gradient_accumulation_steps": 8, "dataset": "tinyshakespeare", "bias": False, "dropout": 0.2,
                "out_dir": "out-a", "schedule": "constant", "batch_size": 12, "n_layer": 12, "eval_iters": 200,
                "activation": "gelu", "learning_rate": 6e-4}  # fmt: skip
    assert settings.items() >= expected.items() and "min_lr" not in settings and "beta2" not in settings
    assert settings.keys() <= SETTINGS.keys() and Config()


def test_tokens_become_a_dataset(run):
    Path("data").mkdir()
    written = {split: np.random.default_rng(0).integers(7, size=size) for split, size in (("train", 100), ("val", 30))}
    for split, tokens in written.items():
        tokens.astype("<u2").tofile(f"data/{split}.bin")
    Path("meta.pkl").rename("data/meta.pkl")
    with pytest.raises(UserError, match="convert files of nanoGPT, which have no header, with: python"):
        open_corpus((Source("data", 1.0),)).split("train", 8, 7, False)
    assert "train 100 tokens, val 30 tokens" in run("data", "data/mine")
    corpus = open_corpus((Source("data/mine", 1.0),))
    for split, tokens in written.items():
        assert corpus.split(split, 8, 7, False).read(0, 200).tolist() == tokens.tolist()


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_nothing_is_executed_and_mistakes_are_one_sentence(run):
    Path("evil.pkl").write_bytes(pickle.dumps({"itos": Payload()}))
    Path("evil.pt").write_bytes(pickle.dumps(Payload()))
    torch.save({"model": {}, "model_args": ARGUMENTS | {"bias": True}}, "empty.pt")
    torch.save({"model": {}, "model_args": ARGUMENTS | {"n_embd": 15}}, "odd.pt")
    torch.save({"model": tensors_of(True), "model_args": ARGUMENTS | {"bias": True}}, "good.pt")
    Path("evil.py").write_text('dropout = __import__("pathlib").Path("executed").touch()\n')
    Path("broken.py").write_text("a = (")
    Path("wrong.py").write_text("n_layer = 0\n")
    for arguments, message in {
        ("good.pt", "a", "--meta=evil.pkl"): "it names code, pathlib.Path.touch, which is not imported",
        ("evil.pt", "a"): "evil.pt is not a checkpoint of nanoGPT",
        ("empty.pt", "a"): "empty.pt is not a checkpoint of nanoGPT: it lacks",
        ("odd.pt", "a"): "n_embd",
        ("missing.pt", "a"): "there is no file missing.pt",
        ("good.pt", "."): ". holds something already",
        ("broken.py", "a.toml"): "broken.py is not a config of nanoGPT",
        ("wrong.py", "a.toml"): "n_layer",
    }.items():
        refused = run(*arguments)
        assert refused.code == 2 and message in refused.message, arguments
    assert "# without a counterpart here: dropout =" in (run("evil.py", "b.toml"), Path("b.toml").read_text())[1]
    assert not Path("executed").exists() and not Path("a").exists()


def test_a_config_that_is_named_says_how_to_convert_it():
    with pytest.raises(UserError, match=r"with: python .*from_nanogpt.py config/train_gpt2.py train_gpt2.toml"):
        config_file("config/train_gpt2.py")
