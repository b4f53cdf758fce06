"""Files written by an earlier version (tests/data/before) still load, and its runs resume to the same result."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train
from gpt_arc.chat.format import load_chat_model
from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.errors import entry_point
from gpt_arc.finetuning.classifier import load_classifier
from gpt_arc.training.log import read_metrics
from gpt_arc.weights.directory import load_model, save_model
from helpers import ROOT
from stages import finetune, sft
from tools import export

BEFORE = ROOT / "tests" / "data" / "before"
TIMES = {"seconds", "tokens_per_second", "mfu", "examples_per_second"}
ALPHABET = sorted("\n .0123456789eimst")


@pytest.fixture
def before(tmp_path, monkeypatch):
    """Copies the files into a folder, makes it the current one, and lets the paths in the run records point into it."""
    shutil.copytree(BEFORE, tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "sums").rename(tmp_path / "data" / "sums")
    for record in tmp_path.glob("runs/*/run.json"):
        record.write_text(record.read_text().replace("/tmp/before", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_ended_as_before(name):
    """Asserts that the resumed run's metrics and final weights equal those of the earlier version."""
    run, expected = Path("runs", name), Path("ended", name)
    lines, expected_lines = read_metrics(run / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl")
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines):
        expected_figures = {key: value for key, value in expected_line.items() if key not in TIMES}
        assert line.keys() >= expected_figures.keys()  # newer versions write more
        figures = {key: line[key] for key in expected_figures}
        assert figures == pytest.approx(expected_figures, rel=1e-6, abs=1e-6)
    for path in expected.glob("*.safetensors"):
        tensors, expected_tensors = load_file(run / "last" / path.name), load_file(path)
        assert tensors.keys() == expected_tensors.keys()
        for tensor_name, tensor in tensors.items():
            difference = (tensor - expected_tensors[tensor_name]).abs()
            if tensor_name.endswith("attention.qkv.bias"):
                # softmax cancels the key bias, so its gradient is rounding noise, which Adam amplifies
                _, key, _ = difference.chunk(3)
                assert key.max() < 1e-4
                key.zero_()
            assert difference.max() <= 1e-6, tensor_name


@pytest.mark.parametrize("name", ["dense", "experts", "muon"])
def test_a_training_run_resumes_to_the_same_result(before, stage_runner, name):
    assert f"runs/{name}, from step 8" in stage_runner(train, "--init_from=resume", f"--out_dir=runs/{name}")
    assert_ended_as_before(name)


@pytest.mark.parametrize("stage", [sft, finetune])
def test_a_stage_resumes_to_the_same_result(before, stage_runner, stage):
    name = Path(stage.__file__).stem
    stage_runner(stage, f"runs/{name}", "--resume=True")
    assert_ended_as_before(name)


@pytest.mark.parametrize("name", ["base", "runs/dense", "runs/experts", "runs/muon", "runs/sft", "runs/finetune"])
def test_models_load_and_are_written_byte_for_byte(before, name):
    model, tokenizer = load_model(name)
    assert tokenizer.characters[:18] == ALPHABET and tokenizer.decode(tokenizer.encode("2 times 3")) == "2 times 3"
    save_model(model, tokenizer, "written")
    source = before / name if name == "base" else before / name / "last"
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert Path("written", file).read_bytes() == (source / file).read_bytes(), file


def test_the_dataset_opens(before):
    corpus = open_corpus([Source("sums", 1.0)])
    split = corpus.split("train", 16, 18, False)
    counts = json.loads(Path("data/sums/meta.json").read_text())["tokens"]
    assert len(split) == counts["train"]
    assert corpus.tokenizer.decode(split.read(0, 30).tolist()) == "1 times 1 is 1.\n1 times 2 is 2."[:30]


def test_the_chat_model_and_the_classifier_load(before):
    _, tokenizer, chat = load_chat_model("runs/sft")
    assert chat.end == tokenizer.vocab_size + 4 - 1
    classifier, _ = load_classifier("runs/finetune/last")
    assert classifier.config.classes == ("even", "odd")


def test_an_export_loads_and_is_written_byte_for_byte(before, output_of):
    model, tokenizer = load_model("exported")
    assert model.config.qk_norm and model.config.n_kv_head == 2
    save_model(model, tokenizer, "qwen3")
    output_of(entry_point(export.main), "tools/export.py", "qwen3", "again", "--to=hf")
    for path in Path("exported").iterdir():
        assert Path("again", path.name).read_bytes() == path.read_bytes(), path.name
