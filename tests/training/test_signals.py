"""What stops a run after its current step."""

import os
import signal

import pytest

from gpt_arc.training import signals
from gpt_arc.training.signals import StopSignal


@pytest.fixture
def stop():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)  # nohup and a shell's background jobs ignore some
    yield StopSignal()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_recorded_once(stop, number):
    assert stop.number == stop.anywhere() == 0
    os.kill(os.getpid(), number)
    assert stop.number == stop.anywhere() == number
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_worker_whose_torchrun_was_killed_stops(stop, monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: signals.PARENT + 1)
    assert stop.number == 0  # not under torchrun: the shell that started it may end
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert stop.number == stop.anywhere() == signal.SIGTERM


def test_a_system_without_sighup_has_the_other_signals(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    handled = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handled.append(number))
    StopSignal()
    assert handled == [signal.SIGINT, signal.SIGTERM]
