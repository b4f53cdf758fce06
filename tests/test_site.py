"""What lies around the code: the site, the notebook and the container."""

import re
import subprocess
import sys

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


def test_the_container_copies_what_the_wheel_is_built_of():
    """There is no docker here: the files that the build reads are compared with those it copies."""
    kept = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    listed = re.search(r"^RESOURCES = \((.*)\)", (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    needed = {*re.findall(r'"([^"]+)"', listed), "setup.py", "model.py", "gpt_arc", "pyproject.toml", "README.md"}
    assert {name for name in needed if not name.endswith(".py")} <= set(kept) and "*.py" in kept
    extras = re.search(r'"/source\[(.*)\]"', (ROOT / "Dockerfile").read_text())[1].split(",")
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras) <= set(declared)
