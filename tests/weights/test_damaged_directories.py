"""Model directories that others wrote, by mistake or on purpose: what is wrong is named, and costs next to nothing."""

import json
import os
import resource
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_arc.data.tokenizer import BPETokenizer, load_tokenizer
from gpt_arc.errors import UserError
from gpt_arc.manifest import MANIFEST
from gpt_arc.weights.directory import load_config, load_model, save_model
from gpt_arc.weights.huggingface import hf_config, hf_tensors
from helpers import TEXT
from model import GPT, GPTConfig

TINY = GPTConfig(8, 300, 2, 2, 16)
MIXTURE = GPTConfig(
    8, 300, 2, 2, 16, n_experts=2, norm="rmsnorm", positions="rotary", bias=False, activation="swiglu", mlp_size=8
)


@pytest.fixture
def foreign(tmp_path):
    """Writes a model in transformers' format; returns a function that changes its config.json."""

    def write(config=TINY, **changes):
        save_file(dict(hf_tensors(GPT(config))), tmp_path / "model.safetensors")
        content = hf_config(config) | changes
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon = null must be a number"),
        ({"layer_norm_epsilon": "1e-5"}, 'layer_norm_epsilon = "1e-5" must be a number'),
        ({"n_embd": 16.5}, "n_embd = 16.5 must be a whole number"),
        ({"n_head": True}, "n_head = true must be a whole number"),
        ({"n_head": 3}, "n_head = 3 does not divide n_embd = 16"),
        ({"n_positions": 0}, "n_positions = 0 must be at least 1"),
        ({"n_positions": 2**40}, "n_positions = .* must be between 1 and"),
        ({"n_layer": 10**9}, "n_layer = 1000000000 must be between 1 and 1024"),
        ({"n_layer": 1000}, "describes 1000 blocks, and the weights beside it are 28 tensors"),
        ({"model_type": ...}, "it lacks model_type"),
        ({"model_type": None}, "model_type = null"),
        ({"activation_function": ["gelu"]}, "activation_function = .* must be a text"),
        ({"layer_types": [["full_attention"]]}, "layer_types.0 = "),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1 must be true or false"),
        ({"embd_pdrop": float("nan")}, "embd_pdrop = nan must be"),
    ],
)
def test_a_config_is_checked_in_whole_and_by_its_own_keys(foreign, changes, sentence):
    folder = foreign(**changes)
    with pytest.raises(UserError, match=sentence) as refusal:
        load_model(folder)
    assert str(folder / "config.json") in str(refusal.value)
    with pytest.raises(UserError, match=sentence):
        load_config(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_local_experts": 10**9}, "too few for the 2000000000 experts"),
        ({"num_local_experts": "2"}, 'num_local_experts = "2"'),
        ({"router_aux_loss_coef": None}, "router_aux_loss_coef = null"),
        ({"rope_parameters": [1]}, "rope_parameters = "),
        ({"hidden_size": 2**31 - 1, "head_dim": 2**31 - 2}, "config.json is damaged"),
    ],
)
def test_a_mixtures_config_is_checked_too(foreign, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        load_model(foreign(MIXTURE, **changes))


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_alone_is_the_embedding_too_if_both_are_tied(foreign, tied):
    folder = foreign(tie_word_embeddings=tied)
    whole = load_file(folder / "model.safetensors")
    expected = load_model(folder)[0].state_dict() if tied else {}
    whole["lm_head.weight"] = whole.pop("transformer.wte.weight")
    save_file(whole, folder / "model.safetensors")
    if not tied:
        with pytest.raises(UserError, match=r"lacks the tensor transformer\.wte\.weight"):
            load_model(folder)
        return
    loaded = load_model(folder)[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("special", [True, False])
def test_a_pad_token_without_a_row_is_accepted_for_no_text_has_it(foreign, special):
    """Common in fine-tunes of GPT-2, with 50,258 tokens for 50,257 rows."""
    folder, tokenizer = foreign(), BPETokenizer.train([TEXT], 300)
    assert tokenizer.vocab_size == 300
    tokenizer.save(folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    table["added_tokens"].append({**table["added_tokens"][0], "id": 300, "content": "[PAD]", "special": special})
    (folder / "tokenizer.json").write_text(json.dumps(table))
    if not special:  # then the library encodes it, wherever it stands in a text
        with pytest.raises(UserError, match="it has 301 tokens, the model 300"):
            load_model(folder)
        return
    model, loaded = load_model(folder)
    assert loaded.vocab_size == 301 and model.config.vocab_size == 300
    assert max(loaded.encode("[PAD] 2 times 3 [PAD]")) < 300


def write_model(folder):
    """A model directory without a manifest, which whoever changes a file on purpose would change too."""
    save_model(GPT(TINY), BPETokenizer.train([TEXT], 300), folder)
    (folder / MANIFEST).unlink()


def many_tensors(path, count):
    """A file whose header lists `count` empty tensors."""
    entries = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    header = f"{{{entries}}}".encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "secret"])
@pytest.mark.skipif(os.name == "nt", reason="no pipes")
def test_only_plain_readable_files_are_read(tmp_path, name, kind, monkeypatch):
    write_model(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"{}")
        opened = os.open

        def refused(other, *args, **kwargs):
            if str(other) == str(path):
                raise PermissionError(13, "Permission denied", str(other))
            return opened(other, *args, **kwargs)

        monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UserError) as refusal:
        load_model(tmp_path)
    message = str(refusal.value)
    if name != "config.json" or kind == "secret":
        assert ("permission denied" if kind == "secret" else "is not a plain file") in message, message
        assert "damaged" not in message and str(path) in message


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ""])
def test_an_index_names_files_in_its_folder_alone(foreign, name):
    folder = foreign()
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    with pytest.raises(UserError, match=r"index\.json names the file .*, which is not in its folder|is not a plain"):
        load_model(folder)


def test_a_header_too_long_is_refused_unread(tmp_path):
    write_model(tmp_path)
    many_tensors(tmp_path / "model.safetensors", 300_000)
    with pytest.raises(UserError, match="model.safetensors is damaged.* it claims a header of"):
        load_model(tmp_path)


MEASURED = """
import resource, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from gpt_arc.errors import UserError
from gpt_arc.manifest import MANIFEST
from gpt_arc.weights.directory import load_model
import gpt_arc.data.tokenizer, tokenizers
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    tokenizer = load_model(Path(sys.argv[1]))[1]
    tokenizer.encode("a" * 100)
    print("accepted")
except UserError as error:
    print(error)
print(time.process_time() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def normalizing(folder, *steps):
    """Gives the tokenizer these normalizers."""
    edit_tokenizer(folder, normalizer={"type": "Sequence", "normalizers": steps})


def adding(folder, times, ids):
    """Makes the tokenizer put a special token of several ids before a text, again and again."""
    single = [{"SpecialToken": {"id": "a", "type_id": 0}}] * times + [{"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"a": {"id": "a", "ids": [0] * ids, "tokens": ["a"] * ids}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    edit_tokenizer(folder, post_processor={"type": "Sequence", "processors": [template]}, truncation=None)


def edit_tokenizer(folder, **changes):
    table = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(table | changes))


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BOMBS = {
    "blocks": lambda folder: edit(folder, n_layer=10**9),
    "many blocks": lambda folder: edit(folder, n_layer=1024),
    "wide": lambda folder: edit(folder, n_embd=2**30, n_head=2**15),
    "experts": lambda folder: edit(folder, n_experts=2**31 - 1),
    "context": lambda folder: edit(folder, block_size=2**31 - 1),
    "header": lambda folder: many_tensors(folder / "model.safetensors", 10**6),
    "header within bounds": lambda folder: many_tensors(folder / "model.safetensors", 200_000),
    "normalizers": lambda folder: normalizing(folder, *[DOUBLE] * 40),
    "prefix": lambda folder: normalizing(folder, {"type": "Prepend", "prepend": "a" * 10**7}),
    "special tokens": lambda folder: adding(folder, 10**4, 10**4),
    "nesting": lambda folder: (folder / "config.json").write_text("[" * 10**6),
    "vast config": lambda folder: (folder / "config.json").write_bytes(b"[],".join([b"["] + [b""] * (1 << 20))),
}


def edit(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_small_folder_that_claims_much_is_refused(tmp_path, bomb):
    write_model(tmp_path)
    bomb(tmp_path)
    with pytest.raises(UserError):
        load_model(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_refusing_takes_less_than_five_cpu_seconds_and_300_megabytes(tmp_path, bomb):
    from helpers import ROOT

    write_model(tmp_path)
    bomb(tmp_path)
    code = MEASURED.format(root=str(ROOT))
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 60))}
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, **limit)
    assert result.returncode == 0, result.stderr
    *message, figures = result.stdout.splitlines()
    seconds, megabytes = map(float, figures.split())
    assert message != ["accepted"] and seconds < 5 and megabytes < 300, (message, seconds, megabytes)


def test_a_tokenizer_that_loads_reads_its_text_back(tmp_path):
    BPETokenizer.train([TEXT], 300).save(tmp_path)
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode(TEXT)) == TEXT
