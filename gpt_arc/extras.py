"""Code that is imported where it is used: optional dependencies, and functions that settings name."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

from gpt_arc.errors import UserError
from gpt_arc.files import PACKAGE

EXTRAS = {  # module -> the extra of pyproject.toml that installs it
    "PIL": "vision",
    "accelerate": "transformers",
    "datasets": "data",
    "gguf": "gguf",
    "lm_eval": "eval",
    "matplotlib": "plot",
    "onnxscript": "onnx",
    "pyarrow": "data",
    "rouge_score": "eval",
    "sacrebleu": "eval",
    "scipy": "metrics",
    "sentencepiece": "sentencepiece",
    "sklearn": "metrics",
    "starlette": "serve",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "transformers": "transformers",
    "trl": "bench",
    "uvicorn": "serve",
}
PACKAGES = {
    "PIL": "Pillow",
    "lm_eval": "EleutherAI's lm-evaluation-harness",
    "rouge_score": "rouge-score",
    "sklearn": "scikit-learn",
}


def import_extra(module: str) -> Any:
    """Import an optional module. Raises UserError with the pip command if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing_extra(module) from None


def missing_extra(module: str) -> UserError:
    """The error for an optional module that is not installed."""
    name = module.split(".")[0]
    return UserError(f"{PACKAGES.get(name, name)} is not installed: `{install_command(EXTRAS[name])}` installs it")


def install_command(extra: str) -> str:
    """Returns the command that adds an extra to gpt-arc, which was installed from a wheel or is a clone."""
    clone = PACKAGE.parent
    if (PACKAGE / "resources").is_dir():
        return shlex.join(["pip", "install", f"gpt-arc[{extra}]"])
    return shlex.join(["pip", "install", "-e", f"{'.' if Path.cwd() == clone else clone}[{extra}]"])


def names_function(name: str | None) -> bool:
    """Whether a name is that of a Python function, module:function."""
    return name is not None and re.fullmatch(r"[\w.]+:\w+", name) is not None
