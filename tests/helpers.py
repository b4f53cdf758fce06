"""Shared by the tests: a tiny dataset, randomised models, and commands run as a user runs them."""

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed.run
from safetensors.torch import load_file

import train
from gpt_arc.data.token_files import MAX_TOKENS, ShardWriter
from gpt_arc.data.tokenizer import BPETokenizer
from gpt_arc.errors import entry_point
from gpt_arc.training.log import read_metrics
from gpt_arc.training.optim import Updater
from warm import WarmPopen

ROOT = Path(__file__).parents[1]


# flags of a tiny training run, added to a config or the defaults
TINY_FLAGS = (
    "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=8 --eval_interval=4 --eval_iters=2 "
    "--device=cpu --learning_rate=1e-2 --warmup_iters=2"
).split()


TEXT = "".join(f"{n} times {m} is {n * m}.\n" for n in range(1, 30) for m in range(1, 13))


def write(name, rows):
    """Writes rows as lines of JSON."""
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def untimed(lines):
    """The lines of metrics.jsonl without measured times."""
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def lines_of(folder):
    """The lines of a run's metrics.jsonl without measured times."""
    return untimed(read_metrics(Path(folder) / "metrics.jsonl"))


def assert_same_weights(a, b, **tolerance):
    """Compares the tensor files of two model directories: to the bit, or within a tolerance."""
    names = [sorted(path.name for path in Path(folder).glob("*.safetensors")) for folder in (a, b)]
    assert names[0] and names[0] == names[1]
    for file in names[0]:
        tensors, expected = load_file(Path(a) / file), load_file(Path(b) / file)
        assert tensors.keys() == expected.keys()
        if tolerance:
            torch.testing.assert_close(tensors, expected, **tolerance)
        else:
            for name, tensor in tensors.items():
                assert torch.equal(tensor, expected[name]), name


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


def write_lines(workplace):
    """Writes data/lines, whose documents are the lines of `TEXT`, of one token a byte."""
    tokenizer = BPETokenizer({bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256})
    tokens = np.concatenate([[*tokenizer.encode(line), 256] for line in TEXT.splitlines()])
    write_dataset(workplace / "data" / "lines", tokenizer, {"train": tokens[:-500], "val": tokens[-500:]})


def randomised(model, seed: int = 0, scale: float = 0.3):
    """Sets weights and biases so large that each affects the output; returns the model in eval mode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model.eval()


def without_float64(monkeypatch) -> None:
    """Makes a tensor refuse to become float64 unless it has been copied to the CPU, as one on Apple's GPUs does."""
    double = torch.Tensor.double

    def copied(tensor):
        copy = tensor.clone()
        copy.on_cpu = True
        return copy

    def checked(tensor):
        assert hasattr(tensor, "on_cpu"), "MPS has no float64"
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", copied)
    monkeypatch.setattr(torch.Tensor, "double", checked)


def run_python(*args: str, timeout: float = 120, input: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Runs `python ARGS` (a script, or -c and code) in the current folder, with torch imported already."""
    pipe = subprocess.PIPE
    streams = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "text": True}
    with WarmPopen([sys.executable, *args], env={**os.environ, **environment}, **streams) as process:
        try:
            output, errors = process.communicate(input, timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(args, process.returncode, output, errors)


def free_port() -> int:
    """Returns an unused port below those that connections of other tests are given, which could take it meanwhile."""
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port
    raise AssertionError("a hundred ports are in use")


def command(*args: str, processes: int = 1, torchrun: bool = False, **kwargs) -> subprocess.CompletedProcess:
    """Runs a script of the repository in `processes` processes, which torchrun starts if `torchrun`."""
    script, *rest = str(ROOT / args[0]), *args[1:]
    if processes == 1:
        return run_python(script, *rest, **kwargs)
    if torchrun:
        launcher = torch.distributed.run.__file__, "--standalone", f"--nproc_per_node={processes}"
        return run_python(*launcher, script, *rest, **kwargs)
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), **kwargs}
    with ThreadPoolExecutor(processes) as pool:
        numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        ranks = [pool.submit(run_python, script, *rest, **number, **shared) for number in numbers]
    results = [rank.result() for rank in ranks]
    codes, outputs, errors = zip(*((one.returncode, one.stdout, one.stderr) for one in results))
    return subprocess.CompletedProcess(args, next(filter(None, codes), 0), "".join(outputs), "".join(errors))


def trains_into(output_of, flags):
    """Returns a function that trains into a folder with some processes and returns the metrics and the final
    tensors."""

    def train_into(folder: str, *more: str, processes: int = 1) -> tuple[list[dict], dict[str, torch.Tensor]]:
        args = "train.py", "sums.toml", *flags, *more, f"--out_dir={folder}"
        if processes == 1:
            output_of(entry_point(train.main), *args)
        else:
            result = command(*args, processes=processes)
            assert result.returncode == 0, result.stdout + result.stderr
        return read_metrics(Path(folder) / "metrics.jsonl"), load_file(Path(folder) / "last/model.safetensors")

    return train_into


FORKING = """
import multiprocessing, os, runpy, sys
context = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: context
def pipe():
    ends = multiprocessing.Pipe()
    os.register_at_fork(after_in_child=ends[0].close)  # or a child, having it too, would wait for its parent to hang up
    return ends
context.Pipe = pipe
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def forking_command(script: str, *args: str, **kwargs) -> subprocess.CompletedProcess:
    """Like `command`, but multiprocessing forks the script's children, which saves them the imports too."""
    return run_python("-c", FORKING, str(ROOT / script), *args, **kwargs)


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


class Killed(BaseException):
    """In place of a SIGKILL: nothing after it has an effect."""


CALLS = ("rename", "replace", "symlink", "mkdir", "unlink", "rmdir")


def killed_at_each_call(folder, monkeypatch, start, action):
    """Yields folders made by `start` in which `action` was killed just before its first call of CALLS, its second ...

    The last folder is that of an action which ended.
    """
    for limit in itertools.count():
        case = folder / str(limit)
        start(case)
        made = itertools.count()

        def counted(call, made=made, limit=limit):
            def wrapped(*args, **kwargs):
                if next(made) >= limit:
                    raise Killed
                return call(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            for name in CALLS:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                action(case)
                ended = True
            except Killed:
                ended = False
        yield case
        if ended:
            return


KILLED = f"""
import runpy, signal, sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
import pytest
from helpers import interrupt_at
update = int(sys.argv.pop(1))
del sys.argv[0]
interrupt_at(pytest.MonkeyPatch(), update, signal.SIGKILL)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_at(update: int, script: str, *flags: str) -> None:
    """Runs `python SCRIPT FLAGS` and kills it at the given update."""
    assert run_python("-c", KILLED, str(update), str(ROOT / script), *flags).returncode == -signal.SIGKILL
