"""What a run shows of its progress: a bar on a terminal, lines in a pipe, and neither with --quiet."""

import os
import sys

import pytest

from gpt_arc.training.log import ProgressBar, trained

pty = pytest.importorskip("pty")
LINES = [
    {"step": 1, "train_loss": 4.0, "val_loss": 3.0, "learning_rate": 1e-3, "tokens_per_second": 1000.0},
    {"step": 2, "train_loss": 2.0, "val_loss": None, "learning_rate": 1e-4, "tokens_per_second": 1234.5},
]


def shown(quiet):
    bar = ProgressBar(4, 0, "step", quiet)
    for line in LINES:
        bar.show(line)
        bar.update(1)
    bar.close()


def on_terminal(monkeypatch, quiet, columns=80):
    """The text that a terminal of some width receives."""
    import fcntl
    import struct
    import termios

    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(terminal, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", stream)
        shown(quiet)
        print("end")
        stream.flush()
        text = b""
        while not text.endswith(b"end\r\n"):
            text += os.read(screen, 1 << 16)
    os.close(screen)
    return text.decode()


def test_a_terminal_has_a_bar_with_losses_rate_and_time_left(monkeypatch):
    frames = on_terminal(monkeypatch, quiet=False).replace("\n", "\r").split("\r")
    assert "step 1: loss 4.0000, val 3.0000, rate 1.00e-03, 1,000 tokens/s" in frames
    assert not [frame for frame in frames if frame.startswith("step 2")]
    last = [frame for frame in frames if "%|" in frame][-1]
    assert last.startswith(" 50%|") and "| step 2/4, loss 2.0000, val 3.0000, 1,234 tokens/s, 00:00 left" in last
    assert max(map(len, frames)) <= 80 and not [frame for frame in frames if "\033[3" in frame]  # no colours


def test_a_narrow_terminal_shows_the_beginning_of_the_line(monkeypatch):
    frames = on_terminal(monkeypatch, quiet=False, columns=40).replace("\n", "\r").split("\r")
    assert max(len(frame) for frame in frames if "%|" in frame) <= 40


def test_a_pipe_has_a_line_for_each_and_no_bar(monkeypatch, capsys):
    shown(quiet=False)
    screen = capsys.readouterr()
    assert screen.err == "" and screen.out.splitlines() == [
        "step 1: loss 4.0000, val 3.0000, rate 1.00e-03, 1,000 tokens/s",
        "step 2: loss 2.0000, rate 1.00e-04, 1,234 tokens/s",
    ]


def test_quiet_shows_neither(monkeypatch, capsys):
    shown(quiet=True)
    assert capsys.readouterr() == ("", "")
    assert on_terminal(monkeypatch, quiet=True) == "end\r\n"


def test_the_summary_names_time_and_tokens():
    assert trained(90.0, 1_800_000) == "trained        90 seconds, 1,800,000 tokens, 20,000 tokens/s"
    assert trained(2.0, None) == "trained        2 seconds"
    assert trained(0.0, 5) == "trained        0 seconds"
