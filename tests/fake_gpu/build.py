"""Compiles device.cpp and runs measurements on the device, each in a process of its own."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TRITON = os.environ.get("FAKE_GPU_TRITON")  # folder of `pip install --no-deps --target FOLDER triton==3.7.1`


@functools.cache
def library() -> Path:
    """The device as a shared library, compiled once a session. Skips the test if it can't be compiled here."""
    import torch

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or not compiler:
        pytest.skip("the fake GPU needs Linux and a C++ compiler")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("the fake GPU is for torch's CPU build")
    headers = Path(importlib.util.find_spec("torch").origin).parent / "include"
    path = Path(tempfile.mkdtemp(prefix="fake_gpu_")) / "device.so"
    command = [compiler, "-std=c++20", "-w", "-shared", "-fPIC", f"-I{headers}", HERE / "device.cpp", "-o", path]
    subprocess.run(command, check=True)
    return path


@functools.cache
def _measured(name: str, arguments: str, target: int, folder: Path | None, processes: int) -> str:
    request = json.dumps([name, str(library()), target, TRITON])
    command = [sys.executable, "-m", "fake_gpu.measure", request, arguments]
    paths = os.pathsep.join((str(HERE.parents[1]), str(HERE.parent)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    errors = [line for line in result.stderr.splitlines() if "registered at" not in line]  # torch's list of operators
    assert not result.returncode, "\n".join(errors[-40:])
    return result.stdout.splitlines()[-1]


def measure(name: str, *arguments: Any, target: int = 90, folder: Path | None = None, processes: int = 1) -> Any:
    """What the function `name` of measure.py returns in the first process, on a GPU of capability `target`."""
    return json.loads(_measured(name, json.dumps(arguments), target, folder, processes))


needs_triton = pytest.mark.skipif(not TRITON, reason="FAKE_GPU_TRITON doesn't name a folder with Triton's package")
