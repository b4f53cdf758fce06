"""Shared by the tests of exports."""

import json

import transformers
from safetensors import safe_open


def described(folder):
    """The tensors' names, shapes and types, and the file's metadata."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}, file.metadata()


def with_version(path):
    return json.loads(path.read_text()) | {"transformers_version": transformers.__version__}
