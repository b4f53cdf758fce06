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
from typing import Any, Literal

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
def server() -> subprocess.Popen[str]:
    """The process of measure.py that forks for each measurement. It ends with this process."""
    paths = os.pathsep.join((str(HERE.parents[1]), str(HERE.parent)))
    kernels = Path(tempfile.gettempdir(), f"fake_gpu_kernels_{os.getuid()}")  # apart: no GPU could run these
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(kernels)}
    command = [sys.executable, "-m", "fake_gpu.measure", library(), TRITON or ""]
    return subprocess.Popen(
        command, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@functools.cache
def _measured(name: str, arguments: str, target: int, kernels: str, folder: Path | None, processes: int) -> str:
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as files:
        request = [name, arguments, target, kernels, str(folder or Path.cwd()), environment, files]
        print(json.dumps(request), file=server().stdin, flush=True)
        answers = (line.split() for line in server().stdout)  # the first may be for a test that was stopped
        code = next((code for code, place in answers if place == files), "lost")
        output = [line for line in Path(files, "output").read_text().splitlines() if "registered at" not in line]
        assert code == "0", "\n".join(output[-60:])  # without torch's list of operators
        return Path(files, "result").read_text()


def measure(
    name: str, *arguments: Any, target: int = 90, folder: Path | None = None, processes: int = 1,
    kernels: Literal["none", "counted", "assembled"] = "counted" if TRITON else "none",
) -> Any:  # fmt: skip
    """What the function `name` of measure.py returns in the first process, on a GPU of capability `target`.

    Without `kernels` nothing is compiled beyond what inductor would be given. It writes them to count them; assembling
    them takes most of the time.
    """
    return json.loads(_measured(name, json.dumps(arguments), target, kernels, folder, processes))


needs_triton = pytest.mark.skipif(not TRITON, reason="FAKE_GPU_TRITON doesn't name a folder with Triton's package")
