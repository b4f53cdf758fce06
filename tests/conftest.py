"""What several test files share: a tiny dataset, and the command line run as a user runs it."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt_arc.errors import entry_point
from gpt_arc.optim import Updater
from gpt_arc.token_files import MAX_TOKENS, ShardWriter
from gpt_arc.tokenizer import CharTokenizer

ROOT = Path(__file__).parents[1]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare with figures of the CPU
os.environ["WANDB_MODE"] = "offline"
if "PYTEST_XDIST_WORKER" in os.environ:  # processes of several threads each would wait for one another's
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
# the smallest real training run, added to a config or the defaults
TINY_FLAGS = (
    "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=8 --eval_interval=4 --eval_iters=2 "
    "--device=cpu --learning_rate=1e-2 --warmup_iters=2"
).split()

TEXT = "".join(f"{n} times {m} is {n * m}.\n" for n in range(1, 30) for m in range(1, 13))


def write_tokens(path, tokens, vocab_size):
    """One token file of any name."""
    writer = ShardWriter(path.parent, path.stem, vocab_size, MAX_TOKENS)
    writer.append(np.asarray(tokens))
    writer.close()
    (path.parent / f"{path.stem}_000000.bin").rename(path)


def write_dataset(directory, tokenizer, splits):
    """A prepared dataset of the tokens of each split."""
    directory.mkdir(parents=True)
    for split, tokens in splits.items():
        write_tokens(directory / f"{split}.bin", tokens, tokenizer.vocab_size)
    tokenizer.save(directory)
    counts = {split: len(tokens) for split, tokens in splits.items()}
    (directory / "meta.json").write_text(json.dumps({"vocab_size": tokenizer.vocab_size, "tokens": counts}))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, with the dataset data/sums and the config sums.toml."""
    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer.from_text(TEXT)
    tokens = np.array(tokenizer.encode(TEXT))
    cut = len(tokens) * 9 // 10
    write_dataset(tmp_path / "data" / "sums", tokenizer, {"train": tokens[:cut], "val": tokens[cut:]})
    (tmp_path / "sums.toml").write_text('[data]\ndataset = "sums"\n')
    return tmp_path


@pytest.fixture
def output_of(monkeypatch, capsys):
    """Run a script's `main` in this process: its output, or the one sentence with which it is refused."""

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
def stage_runner(monkeypatch, capsys):
    """Run the `main` of train.py or a stage in this process: what it printed, or its exit code, output and message."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, flags)])
        try:
            with pytest.raises(SystemExit) as stop:
                entry_point(module.main)()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        output, errors = capsys.readouterr()
        if stop.value.code:
            assert "Traceback" not in errors
            return SimpleNamespace(code=stop.value.code, output=output, message=errors)
        return output

    return call


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    """The bytes of a tiny SentencePiece model with the usual control tokens: <unk> 0, <s> 1, </s> 2."""
    import sentencepiece

    written, sentences = io.BytesIO(), [*TEXT.splitlines(), "naïve 漢字"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=written, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return written.getvalue()


def randomised(model, seed: int = 0, scale: float = 0.3):
    """A torch model in eval mode whose weights and biases are so large that each of them shows in the logits."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model.eval()


def command(*args: str, processes: int = 1, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    """Run `python ARGS` (a script of the repository first) in the current folder; torchrun for several processes."""
    script, *rest = args
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, str(ROOT / script), *rest],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def refusal(*args: str, **kwargs) -> str:
    """The sentence with which a command is refused: exit code 2, one paragraph on stderr, no traceback."""
    result = command(*args, **kwargs)
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    message = result.stderr.strip()
    assert "Traceback" not in message and "\n" not in message, message
    return message


def interrupt_at(monkeypatch, update: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal, by default a Ctrl-C, when it makes so many updates."""
    original, made = Updater.update, []

    def counted(self, *args):
        made.append(1)
        if len(made) == update:
            os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(Updater, "update", counted)


KILLED = """
import pytest
from conftest import interrupt_at
import runpy, signal, sys
sys.argv = {argv!r}
interrupt_at(pytest.MonkeyPatch(), {update}, signal.SIGKILL)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_at(update: int, script: str, *flags: str) -> None:
    """Run `python SCRIPT FLAGS` and kill it when it makes so many updates."""
    code = KILLED.format(argv=[str(ROOT / script), *flags], update=update)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT / "tests")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == -signal.SIGKILL
