"""Model directories: saving and loading gives the same, and damage is reported."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.weights import tensor_files
from gpt_arc.weights.directory import load_model, save_model
from model import GPT, GPTConfig

CONFIG = GPTConfig(8, 11, 2, 2, 16, positions="rotary", norm="rmsnorm", head_bias=True, dropout=0.1)
TOKENIZER = CharTokenizer("abcdefghij\n")


def test_a_saved_model_loads_equal_even_from_a_moved_folder(tmp_path):
    model = GPT(CONFIG)
    save_model(model, TOKENIZER, tmp_path / "a" / "b")
    (tmp_path / "a" / "b").rename(tmp_path / "moved")
    loaded, tokenizer = load_model(tmp_path / "moved")
    assert loaded.config == CONFIG
    assert tokenizer.encode("cab") == TOKENIZER.encode("cab")
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "moved").iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    content = json.loads((tmp_path / "moved" / "config.json").read_text())
    assert content["model_type"] == "gpt-arc" and content["format_version"] == 1


def test_a_large_model_is_saved_in_parts_that_transformers_index_describes(tmp_path, monkeypatch):
    """Parts hold at most LARGEST_FILE bytes, or one tensor; a folder never has the files of two saves."""
    model, folder = GPT(CONFIG), tmp_path / "model"
    monkeypatch.setattr(tensor_files, "LARGEST_FILE", 4096)
    save_model(model, TOKENIZER, folder)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2 and names == [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    parts = {name: load_file(folder / name) for name in names}
    assert all(len(part) == 1 or sum(x.nbytes for x in part.values()) <= 4096 for part in parts.values())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {tensor: name for name, part in parts.items() for tensor in part}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in model.state_dict().values())
    for size in (10**9, 4096, 8192):
        loaded = load_model(folder)[0].state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
        monkeypatch.setattr(tensor_files, "LARGEST_FILE", size)
        save_model(model, TOKENIZER, folder)
    (folder / f"model-00001-of-{len(list(folder.glob('*.safetensors'))):05}.safetensors").unlink()
    with pytest.raises(UserError, match="model-00001-of-.* is missing"):
        load_model(folder)


@pytest.mark.parametrize("problem", ["lacks", "both have"])
def test_damaged_parts_are_named(tmp_path, monkeypatch, problem):
    monkeypatch.setattr(tensor_files, "LARGEST_FILE", 4096)
    save_model(GPT(CONFIG), None, tmp_path)
    (tmp_path / "manifest.json").unlink()
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    tensors = {"lacks": {}, "both have": load_file(first) | load_file(second)}[problem]
    save_file(tensors, second)
    with pytest.raises(UserError, match=rf"model[\w.-]*.* {problem} the tensor"):
        load_model(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"tied_head": False}, {"norm_position": "post"}, {"bias": False}])
def test_models_may_be_saved_without_a_tokenizer(tmp_path, settings):
    model = GPT(GPTConfig(8, 11, 2, 2, 16, **settings)).eval()
    save_model(model, None, tmp_path)
    loaded, tokenizer = load_model(str(tmp_path))
    assert tokenizer is None
    tokens = torch.randint(11, (2, 8))
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded.eval()(tokens))


def test_a_compiled_model_is_saved_with_plain_names(tmp_path):
    model = GPT(CONFIG)
    model.compile(backend="eager")
    model(torch.zeros(1, 4, dtype=torch.int64))
    save_model(model, None, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == GPT(CONFIG).state_dict().keys()


def damage_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("blocks.1.mlp.up.weight"), "lacks the tensor blocks.1.mlp.up.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "has the unexpected tensor extra"),
        (lambda t: t.update({"head_bias": torch.zeros(3)}), r"head_bias has the shape \(3,\), not \(11,\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, sentence):
    save_model(GPT(CONFIG), None, tmp_path)
    damage_tensors(tmp_path / "model.safetensors", change)
    with pytest.raises(UserError, match=sentence):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000])
def test_truncated_weights_are_refused(tmp_path, keep):
    save_model(GPT(CONFIG), None, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(UserError, match="model.safetensors is damaged, use another checkpoint"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "config.json is damaged: it is not JSON"),
        ("[]", "config.json is damaged: it must be a table"),
        ('{"n_layer": 2}', "config.json is damaged: it lacks model_type"),
        ('{"model_type": "gpt-arc"}', "config.json is damaged: it lacks 'format_version'"),
        ('{"model_type": "t5"}', 'model_type = "t5" is not a supported architecture'),
        ('{"model_type": "gpt-arc", "format_version": 99}', "version 99"),
        ('{"model_type": "gpt-arc", "format_version": 1, "n_layers": 3}', "is damaged"),
        ('{"model_type": "gpt-arc", "format_version": 1, "n_head": 5}', "n_head = 5 does not divide"),
        ('{"model_type": "gpt-arc", "format_version": 1, "n_layer": 2.5}', "is damaged"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, content, sentence):
    save_model(GPT(CONFIG), None, tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        load_model(tmp_path)


def test_a_file_is_not_kept_in_memory_beside_what_it_is_converted_to(tmp_path, monkeypatch):
    """The pages of a mapped file that have been read stay in memory until the file is closed."""
    used, safe_open = weakref.WeakSet(), tensor_files.safe_open

    class File:
        def __init__(self, *args, **settings):
            self.file = safe_open(*args, **settings)
            self.keys, self.get_slice = self.file.keys, self.file.get_slice

        def get_tensor(self, name):
            assert not used  # the one that gave the tensor before is closed
            used.add(self)
            return self.file.get_tensor(name)

    monkeypatch.setattr(tensor_files, "safe_open", File)
    save_model(GPT(CONFIG), None, tmp_path)
    assert load_model(tmp_path, dtype=torch.bfloat16)[0].final_norm.weight.dtype == torch.bfloat16


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no model directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a model directory"):
        load_model(tmp_path)


def test_another_models_tokenizer_is_refused(tmp_path):
    save_model(GPT(CONFIG), CharTokenizer("abcdefghijklm"), tmp_path)
    with pytest.raises(UserError, match="belongs to another model: it has 13 tokens, the model 11"):
        load_model(tmp_path)
