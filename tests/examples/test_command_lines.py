"""Every example's command line: --help, and a flag that there isn't."""

import runpy
import sys

import pytest

from helpers import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--nonsense=3", 2)])
def test_an_example_answers_help_and_refuses_an_unknown_flag(path, flag, code, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), flag])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    output, errors = capsys.readouterr()
    assert (ended.value.code or 0) == code and not list(tmp_path.iterdir())
    assert path.name in output and not errors if flag == "--help" else "--nonsense" in errors and not output
