"""What several test files share: a tiny dataset, and the command line run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt_arc.token_files import write_dataset
from gpt_arc.tokenizer import CharTokenizer

ROOT = Path(__file__).parents[1]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare with figures of the CPU
os.environ["WANDB_MODE"] = "offline"
# the smallest real training run, added to a config or the defaults
TINY_FLAGS = (
    "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=8 --eval_interval=4 --eval_iters=2 "
    "--device=cpu --learning_rate=1e-2 --warmup_iters=2"
).split()

TEXT = "".join(f"{n} times {m} is {n * m}.\n" for n in range(1, 30) for m in range(1, 13))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, with the dataset data/sums and the config sums.toml."""
    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer.from_text(TEXT)
    tokens = np.array(tokenizer.encode(TEXT))
    cut = len(tokens) * 9 // 10
    write_dataset(tmp_path / "data" / "sums", tokenizer, {"train": tokens[:cut], "val": tokens[cut:]}, {})
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
