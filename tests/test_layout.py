"""What keeps the repository readable: imports point one way, and each script says how to run it."""

import ast
import subprocess
import sys

import pytest

from helpers import ROOT

NOUNS = sorted((ROOT / "gpt_arc").glob("*.py"))
FOLDERS = ("prepare", "stages", "tools")
VERBS = [ROOT / "train.py", ROOT / "sample.py", *(path for f in FOLDERS for path in sorted((ROOT / f).glob("*.py")))]


def imported(path):
    """Names of the modules that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(path):
    return {name.split(".")[0] for name in imported(path)}


def test_the_model_imports_torch_the_standard_library_and_its_operations_alone():
    for name, further in (("model", {"ops"}), ("ops", set())):
        assert top_level(ROOT / f"{name}.py") <= {"torch", *sys.stdlib_module_names} | further


@pytest.mark.parametrize("path", NOUNS + VERBS, ids=lambda path: path.stem)
def test_nothing_imports_a_verb(path):
    assert not top_level(path) & {"train", "sample", *FOLDERS}


def test_nouns_do_not_import_in_a_circle():
    needs = {f"gpt_arc.{path.stem}": {n for n in imported(path) if n.startswith("gpt_arc.")} for path in NOUNS}
    done = set()
    while len(done) < len(needs):
        ready = {name for name in needs.keys() - done if not (needs[name] & needs.keys()) - done}
        assert ready, f"a circle among {sorted(needs.keys() - done)}"
        done |= ready


@pytest.mark.parametrize("path", VERBS, ids=lambda path: path.stem)
def test_a_script_shadows_no_module(path):
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in {
        "datasets",
        "evaluate",
        "tokenizers",
        "transformers",
        "torch",
        "numpy",
        "tiktoken",
        "wandb",
    }


@pytest.mark.parametrize("path", VERBS, ids=lambda path: path.stem)
def test_a_script_says_what_it_is_for_and_how_to_run_it(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python {path.relative_to(ROOT)}" in docstring


@pytest.mark.parametrize("script", [str(path.relative_to(ROOT)) for path in VERBS])
def test_help_answers_from_any_folder_and_imports_nothing_slow(script, tmp_path, monkeypatch):
    """What is slow to import is imported where it is used; the loops of train.py and stages/ need torch."""
    monkeypatch.chdir(tmp_path)
    slow = {"datasets", "pyarrow", "tiktoken", "tokenizers", "transformers", "wandb"}
    slow |= {"sklearn", "scipy"} | ({"torch"} if script != "train.py" and not script.startswith("stages/") else set())
    code = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print('imported', sorted({slow} & sys.modules.keys())))\n"
        f"sys.argv = [{script!r}, '--help']\n"
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "--" in result.stdout and not result.stderr, result.stderr
    assert result.stdout.endswith("imported []\n"), result.stdout[-200:]
    assert not list(tmp_path.iterdir())


def test_the_three_files_to_read_stay_readable():
    for name, lines in (("model.py", 550), ("train.py", 350), ("sample.py", 150)):
        assert len((ROOT / name).read_text().splitlines()) <= lines
