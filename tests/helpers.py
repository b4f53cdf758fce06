"""Shared by the tests: a tiny dataset, randomised models, and commands run as a user runs them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from gpt_arc.data.token_files import MAX_TOKENS, ShardWriter
from gpt_arc.training.optim import Updater

ROOT = Path(__file__).parents[1]


os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the expected values are the CPU's


os.environ["WANDB_MODE"] = "offline"


if "PYTEST_XDIST_WORKER" in os.environ:  # several threads in each process would wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


# flags of a tiny training run, added to a config or the defaults
TINY_FLAGS = (
    "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=8 --eval_interval=4 --eval_iters=2 "
    "--device=cpu --learning_rate=1e-2 --warmup_iters=2"
).split()


TEXT = "".join(f"{n} times {m} is {n * m}.\n" for n in range(1, 30) for m in range(1, 13))


def write(name, rows):
    """Writes rows as lines of JSON."""
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tokens(path, tokens, vocab_size):
    """Writes one token file with any name."""
    writer = ShardWriter(path.parent, path.stem, vocab_size, MAX_TOKENS)
    writer.append(np.asarray(tokens))
    writer.close()
    (path.parent / f"{path.stem}_000000.bin").rename(path)


def write_dataset(directory, tokenizer, splits):
    """Writes a prepared dataset from the tokens of each split."""
    directory.mkdir(parents=True)
    for split, tokens in splits.items():
        write_tokens(directory / f"{split}.bin", tokens, tokenizer.vocab_size)
    tokenizer.save(directory)
    counts = {split: len(tokens) for split, tokens in splits.items()}
    (directory / "meta.json").write_text(json.dumps({"vocab_size": tokenizer.vocab_size, "tokens": counts}))


def randomised(model, seed: int = 0, scale: float = 0.3):
    """Sets weights and biases so large that each affects the output; returns the model in eval mode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model.eval()


def command(*args: str, processes: int = 1, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python ARGS` (first a script of the repository) in the current folder, by torchrun if `processes` > 1."""
    script, *arguments = args
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def refusal(*args: str, **kwargs) -> str:
    """Runs a command that must be refused; returns the message: exit code 2, one paragraph on stderr, no traceback."""
    result = command(*args, **kwargs)
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    message = result.stderr.strip()
    assert "Traceback" not in message and "\n" not in message, message
    return message


def interrupt_at(monkeypatch, update: int, number: int = signal.SIGINT) -> None:
    """Sends this process a signal, by default that of Ctrl-C, at the given update."""
    original, updates = Updater.update, []

    def counted(self, *args):
        updates.append(1)
        if len(updates) == update:
            os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(Updater, "update", counted)


KILLED = """
import pytest
from helpers import interrupt_at
import runpy, signal, sys
sys.argv = {argv!r}
interrupt_at(pytest.MonkeyPatch(), {update}, signal.SIGKILL)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_at(update: int, script: str, *flags: str) -> None:
    """Runs `python SCRIPT FLAGS` and kills it at the given update."""
    code = KILLED.format(argv=[str(ROOT / script), *flags], update=update)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == -signal.SIGKILL
