"""Data sets on the hub, from a folder with the hub's layout: a README.md that declares configurations, and parquet."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow as arrow
import pytest
import torch
from pyarrow import parquet

from gpt_arc.chat.files import read_conversations, read_prompts, read_rankings
from gpt_arc.data.hub_sets import pinned
from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError
from gpt_arc.weights.directory import save_model
from helpers import write
from model import GPT, GPTConfig
from stages import sft

README = """---
configs:
- config_name: chats
  data_files: [{split: train, path: chats/train.parquet}, {split: test, path: chats/test.parquet}]
  default: true
- config_name: rankings
  data_files: [{split: train, path: rankings.parquet}]
---
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def chats(count, weight):
    turns = [("user", "ab"), ("assistant", "c"), ("user", "a"), ("assistant", "dd")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[1]["weight"] = weight
    return [{"messages": messages}] * count


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Path("set/chats").mkdir(parents=True)
    Path("set/README.md").write_text(README)
    for split, count, weight in (("train", 12, 0), ("test", 4, 1)):
        parquet.write_table(arrow.Table.from_pylist(chats(count, weight)), f"set/chats/{split}.parquet")
    rankings = arrow.Table.from_pylist([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    parquet.write_table(rankings, "set/rankings.parquet")
    return tmp_path


def test_rows_are_those_of_files(workplace):
    write("train.jsonl", chats(12, 0))
    expected = [conversation.turns for conversation in read_conversations(Path("train.jsonl"))]
    read = read_conversations(Path("hf:set"))
    assert [conversation.turns for conversation in read] == expected and expected[0][1].weight == 0
    assert read[3].place == "hf:set, row 4"
    assert len(read_prompts(Path("hf:set:test"))) == 4
    assert read_rankings(Path("hf:set:rankings:train"))[0].responses == ("b", "c")


@pytest.mark.parametrize("name", ["hf:set:valid", "hf:set:other:train", "hf:absent"])
def test_what_is_not_there_is_refused_by_name(workplace, monkeypatch, name):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"^{name} can't be read from the Hugging Face hub"):
        read_conversations(Path(name))


def test_a_run_reads_the_same_rows_when_it_is_resumed(workplace, stage_runner, monkeypatch):
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(24, 6, 1, 1, 8)), CharTokenizer("abcd"), "base")
    flags = ("--epochs=2", "--batch_size=6", "--device=cpu", "--template=markers")
    stage_runner(sft, "base", "--train=hf:set", "--val=hf:set:chats:test", *flags)
    options = json.loads(Path("out/sft/run.json").read_text())["options"]
    assert options["train"] == f"hf:{workplace}/set" and options["val"] == f"hf:{workplace}/set:chats:test"
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    assert "finished step 4" in stage_runner(sft, "--resume=../out/sft")


def test_the_commit_is_recorded(workplace, monkeypatch):
    asked = []

    def dataset_info(self, name, revision=None):
        asked.append((name, revision))
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    assert str(pinned(Path("hf:owner/name:test"))) == f"hf:owner/name@{COMMIT}:test"
    assert str(pinned(Path("hf:owner/name@v2:main:test"))) == f"hf:owner/name@{COMMIT}:main:test"
    assert asked == [("owner/name", None), ("owner/name", "v2")]
    assert str(pinned(Path(f"hf:owner/name@{COMMIT}"))) == f"hf:owner/name@{COMMIT}" and len(asked) == 2
    with pytest.raises(UserError, match="hf::x is not hf:OWNER/NAME, with @REVISION"):
        pinned(Path("hf::x"))
