"""How scripts end: a mistake prints one paragraph and exits with code 2; a bug keeps its traceback."""

import ast
import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from gpt_arc.errors import UserError, entry_point
from helpers import ROOT


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("n_layer = 0 must be at least 1"), 2, "n_layer = 0 must be at least 1"),
        (OSError(28, "No space left on device", "out/x"), 2, "out/x: No space left on device"),
        (
            PermissionError(13, "Permission denied", "out/x"),
            2,
            "out/x: Permission denied: change the permissions of this file or of the folder it is in, or work in "
            "another folder",
        ),
        (
            NotADirectoryError(20, "Not a directory", "out/x"),
            2,
            "out/x: Not a directory: a file has the name that a folder needs; rename it, or work in another folder",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_user_and_disk_errors_are_one_sentence(capsys, error, code, sentence):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        entry_point(main)()
    errors = capsys.readouterr().err
    assert stop.value.code == code and errors.endswith(f": {sentence}\n") and errors.count("\n") == 1


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: bytearray(2**62)], ids=["torch", "python"])
def test_running_out_of_memory_is_one_sentence(capsys, allocate):
    with pytest.raises(SystemExit) as stop:
        entry_point(allocate)()
    assert stop.value.code == 2
    assert "out of memory: a smaller batch, context or model takes less (" in capsys.readouterr().err


def test_the_end_of_another_process_is_one_sentence(monkeypatch, capsys):
    codes = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os._exit", codes.append)

    def main():
        raise RuntimeError("[pair.cc:537] Read error [127.0.0.1]:2462: Connection reset by peer")

    with pytest.raises(SystemExit):  # where os._exit would have ended it
        entry_point(main)()
    errors = capsys.readouterr().err
    assert codes == [1] and "a process that ended: see the message of that one\n" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("script", ["train.py", "sample.py", "new.py"])
def test_a_python_without_torch_is_one_sentence(script):
    result = subprocess.run([sys.executable, "-S", ROOT / script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "has no torch: activate the environment" in result.stderr


def test_a_bug_keeps_its_traceback():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        entry_point(main)()


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (143, 143)])
def test_main_returns_the_exit_code(returned, code):
    with pytest.raises(SystemExit) as stop:
        entry_point(lambda: returned)()
    assert stop.value.code == code


def test_a_reader_that_closes_the_pipe_early_is_no_error():
    script = "from gpt_arc.errors import entry_point\n@entry_point\ndef main():\n  print('x' * 10**6)\nmain()"
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.read(1)
    writer.stdout.close()
    assert (writer.wait(timeout=60), writer.stderr.read()) == (141, b"")  # as if killed by SIGPIPE


def test_messages_never_go_to_stdout_if_stderr_is_closed():
    script = "import sys\nfrom gpt_arc.errors import entry_point\n@entry_point\ndef main():\n  print('a')\n"
    script += "  print('b', file=sys.stderr)\nmain()"
    command = [sys.executable, "-c", "import os, sys\nos.close(2)\nos.execv(sys.argv[1], sys.argv[1:])", sys.executable]
    result = subprocess.run([*command, "-c", script], stdout=subprocess.PIPE)
    assert (result.returncode, result.stdout) == (0, b"a\n")


def test_output_in_ascii_escapes_what_it_lacks(monkeypatch):
    output, errors = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(errors, encoding="utf-8"))

    def main():
        print("out/caf\u00e9")
        raise UserError("out/\udcff can't be read")  # a name that isn't UTF-8

    with pytest.raises(SystemExit):
        entry_point(main)()
    assert output.getvalue() == b"out/caf\\xe9\n" and errors.getvalue().endswith(b"out/\\udcff can't be read\n")


SCRIPTS = [
    "new.py",
    "train.py",
    "sample.py",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("[pst]*/*.py"))),
]
SCRIPTS = [script for script in SCRIPTS if script.split("/")[0] in ("prepare", "stages", "tools", script)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_first_sees_to_ctrl_c(script):
    docstring, first, *_ = ast.parse((ROOT / script).read_text()).body
    assert ast.unparse(first.test) == "__name__ == '__main__'"
    assert ast.unparse(first.body[0]) == "import gpt_arc.startup"


def test_ctrl_c_while_torch_is_imported_is_quiet(tmp_path):
    (tmp_path / "torch.py").write_text("import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    script = [sys.executable, str(ROOT / "stages" / "sft.py"), "base"]
    process = subprocess.Popen(
        script,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not (tmp_path / "importing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert (process.wait(timeout=30), process.stderr.read()) == (-signal.SIGINT, b"")


PENDING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
execv = os.execv
os.execv = lambda *command: (os.kill(os.getpid(), signal.SIGINT), execv(*command))
sys.argv = ["gpt-arc", "sft", "--help"]
from gpt_arc import cli
cli.main()
"""


def test_ctrl_c_while_gpt_arc_starts_a_script_is_quiet():
    """The signal comes just before the process becomes another Python's, whose own start can't be guarded."""
    process = subprocess.run(
        [sys.executable, "-c", PENDING],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    assert (process.returncode, process.stderr) == (-signal.SIGINT, b"")
