"""Forks of the warm process against the processes that they stand for."""

import os
import signal
import subprocess
import sys

import pytest

from helpers import run_python

SHOW = "import os, sys; print(__name__, sys.argv, sys.path[0], os.getcwd(), os.environ['NAME'], sys.stdin.read())"


@pytest.mark.parametrize("kind", ["script", "-c"])
def test_a_fork_sees_what_a_process_sees(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "folder" / "show.py"
    script.parent.mkdir()
    script.write_text(SHOW + "; print(__file__)")
    args = (str(script), "a", "--b=c") if kind == "script" else ("-c", SHOW, "a", "--b=c")
    process = subprocess.run(
        [sys.executable, *args], input="typed\n", capture_output=True, text=True, env={**os.environ, "NAME": "value"}
    )
    fork = run_python(*args, input="typed\n", NAME="value")
    assert (fork.returncode, fork.stdout, fork.stderr) == (0, process.stdout, "") and "typed" in fork.stdout


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("os._exit(5)", 5, ""),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -signal.SIGTERM, ""),
        ("os.kill(os.getpid(), signal.SIGKILL); time.sleep(9)", -signal.SIGKILL, ""),
        ("try: os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\nexcept KeyboardInterrupt: sys.exit(130)", 130, ""),
    ],
)
def test_a_fork_ends_as_a_process_ends(code, status, message):
    result = run_python("-c", f"import os, signal, sys, time\n{code}")
    assert result.returncode == status and message in result.stderr and bool(message) == bool(result.stderr)


def test_what_is_registered_runs_at_the_end():
    assert run_python("-c", "import atexit; atexit.register(print, 'last'); print('first')").stdout == "first\nlast\n"


def test_a_fork_that_takes_too_long_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("-c", "import time; time.sleep(100)", timeout=0.2)
