"""What lies around the code: the site, the notebook and the container."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, TINY_FLAGS


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    home = (tmp_path / "index.html").read_text()
    assert "Train GPTs, from a character model" in home and 'href="guide/train/"' in home
    assert 'href="notebooks/quickstart.ipynb"' in home and 'href="Dockerfile"' in home
    assert (tmp_path / "notebooks/quickstart.ipynb").exists() and (tmp_path / "Dockerfile").exists()
    assert '<span class="flag">--shots</span>' in home
    sources = re.findall(r'<(?:script|img|link)[^>]* (?:src|href)="(https?:[^"]+)', home)
    assert not sources  # nothing is loaded from elsewhere


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "notebooks/quickstart.ipynb", 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for name in ("train.py", "configs", "prepare"):
        (tmp_path / name).symlink_to(ROOT / name)
    for cell in notebook.cells:
        cell.source = re.sub(r"^FLAGS = \[\].*", f"FLAGS = {[*TINY_FLAGS]}", cell.source)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3", resources=resources).execute()
    texts = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert any(text.startswith("The ") and len(text) > 250 for text in texts)
    assert "The statemen" in texts[-2] and texts[-2].count("%") == 9


def test_the_notebook_clones_and_installs_where_there_is_no_clone(tmp_path, monkeypatch):
    cells = json.loads((ROOT / "notebooks/quickstart.ipynb").read_text())["cells"]
    first, commands = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"]), []

    def run(command, check):
        commands.append(command)
        (tmp_path / "gpt-arc").mkdir(exist_ok=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(AssertionError, match="give the address of the repository as REPOSITORY"):
        exec(first, {})
    exec(first.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/gpt-arc"'), {})
    assert [command[-2:] for command in commands] == [
        ["https://example.org/gpt-arc", tmp_path / "gpt-arc"], ["-e", f"{tmp_path}/gpt-arc[plot]"]
    ]  # fmt: skip
    assert Path.cwd() == tmp_path / "gpt-arc" == Path(sys.path[0])


def test_the_container_copies_what_the_wheel_is_built_of():
    """There is no docker here: the files that the build reads are compared with those it copies."""
    kept = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    listed = re.search(r"^RESOURCES = \((.*)\)", (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    needed = {*re.findall(r'"([^"]+)"', listed), "setup.py", "model.py", "gpt_arc", "pyproject.toml", "README.md"}
    assert {name for name in needed if not name.endswith(".py")} <= set(kept) and "*.py" in kept
    extras = re.search(r'"/source\[(.*)\]"', (ROOT / "Dockerfile").read_text())[1].split(",")
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras) <= set(declared)
