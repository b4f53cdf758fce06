"""Fixtures shared by several test files. Imports no torch, so that pytest starts its two processes at once."""

import functools
import gc
import io
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gpt_arc.data.tokenizer import BPETokenizer, CharTokenizer
from gpt_arc.errors import entry_point

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # set in many containers: every process would compile what it imports
sys.dont_write_bytecode = False
os.environ["WANDB_MODE"] = "offline"
os.environ["OMP_NUM_THREADS"] = "1"  # several threads in each process would wait for one another


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the expected values are the CPU's


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keeps the garbage collector away from what the test modules import: hardly any of it is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def runs_that_start_and_save_quickly():
    """The CPU's speed is measured once instead of by each run, nothing in this process waits for the disk, and
    lm-evaluation-harness doesn't ask pip and compilers about this machine."""
    from torch.utils import collect_env

    from gpt_arc.planning import cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", str)
        patch.setattr(cost, "measured_flops", functools.cache(cost.measured_flops))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder with the dataset data/sums and the config sums.toml."""
    from helpers import TEXT, write_dataset

    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer.from_text(TEXT)
    tokens = np.array(tokenizer.encode(TEXT))
    cut = len(tokens) * 9 // 10
    write_dataset(tmp_path / "data" / "sums", tokenizer, {"train": tokens[:cut], "val": tokens[cut:]})
    (tmp_path / "sums.toml").write_text('[data]\ndataset = "sums"\n')
    return tmp_path


@pytest.fixture
def documents(workplace):
    """Datasets one and two, whose documents end-of-text tokens separate, and mixed.toml, a mixture of both."""
    from helpers import TEXT, write_dataset

    tokenizer = BPETokenizer({bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256})
    for name, texts in (("one", TEXT.splitlines()), ("two", [line[::-1] for line in TEXT.splitlines()])):
        tokens = np.concatenate([[*tokenizer.encode(text), 256] for text in texts])
        cut = len(tokens) * 9 // 10
        write_dataset(workplace / "data" / name, tokenizer, {"train": tokens[:cut], "val": tokens[cut:]})
    table = '[[data.mixture]]\nname = "{}"\nweight = {}\n'
    (workplace / "mixed.toml").write_text(table.format("one", 3) + table.format("two", 1))
    return workplace


@pytest.fixture
def output_of(monkeypatch, capsys):
    """Runs a script's `main` in this process; returns its output, or the sentence with which it is refused."""

    def call(main, *argv):
        monkeypatch.setattr(sys, "argv", list(argv))
        with pytest.raises(SystemExit) as stop:
            main()
        output, errors = capsys.readouterr()
        if stop.value.code:
            assert stop.value.code == 2 and "Traceback" not in errors and errors.count("\n") == 1, errors
            return errors
        return output

    return call


@pytest.fixture
def main_runner(monkeypatch, capsys):
    """Runs the `main` of train.py or a stage in this process; returns the exit code, output and message."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(module, script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            with pytest.raises(SystemExit) as stop:
                entry_point(module.main)()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        output, errors = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code or 0, output=output, message=errors)

    return call


@pytest.fixture
def stage_runner(main_runner):
    """Runs `main` as `main_runner` does; returns its output, or the exit code, output and message."""

    def call(module, *flags):
        result = main_runner(module, Path(module.__file__).name, *flags)
        if result.code:
            assert "Traceback" not in result.message
            return result
        return result.output

    return call


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    """The bytes of a tiny SentencePiece model with the usual control tokens: <unk> 0, <s> 1, </s> 2."""
    import sentencepiece

    from helpers import TEXT

    written, sentences = io.BytesIO(), [*TEXT.splitlines(), "naïve 漢字"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=written, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return written.getvalue()
