"""Data, training and sampling in a process that lacks what Windows lacks, its console and files not in UTF-8."""

import os
import subprocess
import sys

import pytest

from gpt_arc.training.log import read_metrics
from helpers import ROOT


def run(*arguments, **environment):
    """Runs Python with the console's encoding, and without UTF-8 as that of files."""
    environment = {
        "PYTHONIOENCODING": "cp1252",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    } | environment
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    process = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": paths, **environment}, capture_output=True
    )
    output = process.stdout.decode("cp1252")
    assert process.returncode == 0, output + process.stderr.decode("cp1252")
    return output


@pytest.mark.slow
def test_text_is_prepared_learned_resumed_and_sampled(tmp_path):
    letters = "naïve 漢字 →\n"
    (tmp_path / "book.txt").write_text(letters * 100, "utf-8")
    (tmp_path / "start.txt").write_bytes("字字\r\n".encode())
    (tmp_path / "book.toml").write_text('[data]\ndataset = "book"  # 漢\n', "utf-8")
    output = run(str(ROOT / "tests/windows.py"), str(tmp_path))
    folder = tmp_path / "out/book"
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "val_loss" in line][-2:] == [2, 3]
    assert (folder / "last").read_text() == "step-00000003" and not (folder / ".lock").exists()
    assert "finished step 3" in output
    sample = output.rpartition("--max_iters=6\n")[2]
    assert sample.startswith("??") and "ï" in sample  # a console that lacks a character shows a question mark
