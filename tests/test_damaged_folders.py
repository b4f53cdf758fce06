"""Folders with random damage: whoever reads a model, a run, a dataset or a chat accepts it or refuses it in a sentence.

Every case changes one file by its bytes, or a value in it by key, type, size or nesting. Quick tests take the first few
hundred seeds; `-m slow` takes 10,000.
"""

import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gpt_arc.alignment.reward_model import RewardModel, load_reward_model, save_reward_model
from gpt_arc.chat.format import TEMPLATES, ChatFormat, load_chat, load_template
from gpt_arc.data.datasets import Source, open_corpus
from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer, LibraryTokenizer, load_tokenizer
from gpt_arc.errors import UserError
from gpt_arc.evaluation.tasks import load_task
from gpt_arc.finetuning.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier
from gpt_arc.finetuning.examples import Columns, SpecialTokens
from gpt_arc.manifest import MANIFEST
from gpt_arc.reading import reading
from gpt_arc.settings import build, read_file
from gpt_arc.training.checkpoints import load_state, save_checkpoint, state_file
from gpt_arc.training.config import Config, TrainingConfig
from gpt_arc.training.log import read_metrics
from gpt_arc.training.optim import Updater
from gpt_arc.training.runs import read_record, stage_of, write_record
from gpt_arc.training.stage_record import record_options, recorded_options
from gpt_arc.weights.directory import load_model, save_model
from gpt_arc.weights.huggingface import hf_config, hf_tensors
from helpers import TEXT, write_dataset
from model import GPT, GPTConfig
from stages import sft
from train import Progress

QUICK, SLOW = 40, 10_000 // 6
TINY = GPTConfig(8, 270, 2, 2, 8)
CPU = torch.device("cpu")
ODD = [
    None, True, -1, 0, 1, 2**31, 2**40, 2**63, 2**64, 10**30, 1.5, 1e308, float("inf"), float("nan"), "", "a", "\udc80",
    "../../etc/passwd", "/dev/zero", [], {}, [None], {"a": []}, "a" * 5000, [[[[[[[]]]]]]],
]  # fmt: skip


def places(value, path=()):
    """The places in a nested value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, draw):
    """A nested value with one place renamed, deleted, wrapped, or given an odd value or another place's."""
    every = list(places(value))[1:]
    if not every:
        return draw.choice(ODD)
    *path, last = draw.choice(every)
    parent = value
    for key in path:
        parent = parent[key]
    way = draw.randrange(6)
    if way == 0 and isinstance(parent, dict):
        parent[f"{last}_"] = parent.pop(last)
    elif way == 1:
        del parent[last]
    elif way == 2:
        for _ in range(draw.choice((1, 5, 150, 400))):
            parent[last] = [parent[last]]
    elif way == 3 and isinstance(parent, dict):
        parent[draw.choice(("x", "", 7, "__class__"))] = draw.choice(ODD)
    else:
        parent[last] = draw.choice(ODD)
    return value


def flipped(content, draw):
    """Bytes with some of them flipped, cut, repeated or inserted."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 4, 30))):
        place = draw.randrange(len(content) + 1)
        way = draw.randrange(5)
        if way == 0:
            del content[place:]
        elif way == 1:
            content[place:place] = draw.choice((b"\xff", b"\0" * 9, b"[" * 3000, b'"', b"{", b"1e999", b"NaN", b"-"))
        elif place < len(content):
            content[place] ^= 1 << draw.randrange(8)
    return bytes(content)


def damage(path, draw):
    """Changes a file at random."""
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.7:
        path.write_text(json.dumps(changed(json.loads(content), draw)), "utf-8", "surrogatepass")
    elif path.suffix == ".pt" and draw.random() < 0.7:
        state = changed(torch.load(io.BytesIO(content), weights_only=True), draw)
        torch.save(state, path)
    else:
        path.write_bytes(flipped(content, draw))


# ---- what the folders hold, and what reads them


def make_model(folder):
    save_model(GPT(TINY), BPETokenizer.train([TEXT], 270), folder)


def make_foreign(folder):
    save_file(dict(hf_tensors(GPT(TINY))), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(TINY)))
    table = json.loads(BPETokenizer.train([TEXT], 270).files()["tokenizer.json"])
    table["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "model_max_length": 8}))
    assert isinstance(load_tokenizer(folder), LibraryTokenizer)


def read_model(folder):
    model, tokenizer = load_model(folder)
    if tokenizer is not None:
        ids = tokenizer.encode("2 times 3 is 6.")
        assert max(ids, default=0) < model.config.vocab_size
        tokenizer.decode(ids)


def make_chat(folder):
    letters = CharTokenizer("abcdefgh")
    chat = ChatFormat.new(TEMPLATES["markers"], letters, 8)
    save_reward_model(RewardModel(GPT(GPTConfig(8, 12, 1, 1, 8))), letters, chat, folder)
    (folder / "template.toml").write_text('system = "{content}"\nuser = "{content}"\nassistant = "{content}<|end|>"\n')


def read_chat(folder):
    load_reward_model(folder)
    load_chat(folder, load_tokenizer(folder))
    load_template(str(folder / "template.toml"))


def make_classifier(folder):
    config = ClassifierConfig("classification", ("a", "b"), SpecialTokens(8, 9, 10), Columns("text"), 8)
    save_classifier(Classifier(GPT(GPTConfig(8, 11, 1, 1, 8)), config), CharTokenizer("abcdefgh"), folder)


def make_run(folder):
    model = GPT(TINY)
    updater = Updater(model, TrainingConfig(ema_decay=0.5), CPU, "float32")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    updater.update(0.1, torch.tensor(1.0))
    state = {"progress": vars(Progress(step=1)), **updater.state_dict(), "generators": [{"cpu": torch.get_rng_state()}]}
    state |= {"runtime": {"device": "cpu", "dtype": "float32", "compile": False}, "data": ""}
    save_checkpoint(folder, 1, 1, lambda to: save_model(model, None, to), state, 1)
    write_record(folder, Config(), "tiny", {"n_layer": 2, "max_iters": 10})
    (folder / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.5}\n{"step": 2, "train_loss": 2.4}\n')


def read_run(folder):
    name, overrides = read_record(folder)
    build(Config, read_file(Config, folder / "config.toml") | overrides)
    stage_of(folder)
    for line in read_metrics(folder / "metrics.jsonl"):
        assert line["step"] <= 2**70
    directory = next(folder.glob("step-*"))
    model, state = load_model(directory)[0], load_state(directory)
    updater = Updater(model, TrainingConfig(ema_decay=0.5), CPU, "float32")
    with reading(state_file(directory)):
        Progress(**state["progress"])
        updater.load_state_dict(state)
        torch.set_rng_state(state["generators"][0]["cpu"])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    updater.update(0.1, torch.tensor(1.0))


def make_stage(folder):
    record_options(folder, "sft", sft.SFTOptions(model="base", train=Path("chats.jsonl"), out_dir="out"))
    (folder / "task.toml").write_text('title = "T"\nkind = "generate"\ncontext = "{q}"\nanswer = "{a}"\nstop = ["."]\n')


def read_stage(folder):
    recorded_options(folder, sft.SFTOptions, "sft")
    load_task(str(folder / "task.toml"))


def make_dataset(folder):
    shutil.rmtree(folder)
    tokens = np.arange(200) % 8
    write_dataset(folder, CharTokenizer("abcdefgh"), {"train": tokens, "val": tokens})


def read_dataset(folder):
    corpus = open_corpus([Source(str(folder), 1.0)])
    if corpus is None:  # without a token file
        return
    assert isinstance(corpus.fingerprint, str)
    for split in ("train", "val"):
        corpus.split(split, 8, 8, False).read(0, 100)


KINDS = {
    "model": (make_model, read_model),
    "foreign": (make_foreign, read_model),
    "chat": (make_chat, read_chat),
    "classifier": (make_classifier, load_classifier),
    "run": (make_run, read_run),
    "stage": (make_stage, read_stage),
    "dataset": (make_dataset, read_dataset),
}


def survive(tmp_path, kind, seeds):
    make, read = KINDS[kind]
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    whole.mkdir()
    make(whole)
    for manifest in whole.rglob(MANIFEST):
        manifest.unlink()
    read(whole)  # undamaged
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    files = [path for path in files if not {"last", "best"} & set(path.parts)]
    refused = 0
    for seed in seeds:
        draw = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder, symlinks=True)
        path = draw.choice(files)
        damage(folder / path, draw)
        try:
            read(folder)
        except UserError as error:
            refused += 1
            assert str(error) and "\n" not in str(error), (seed, path, error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {path}: {type(error).__name__}: {error}") from error
    assert refused > len(seeds) / 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_read_or_refused(tmp_path, kind):
    survive(tmp_path, kind, range(QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_folders_are_read_or_refused(tmp_path, kind):
    survive(tmp_path, kind, range(QUICK, QUICK + SLOW))
