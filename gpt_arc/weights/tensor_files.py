"""Files of tensors in the safetensors format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gpt_arc.errors import UserError
from gpt_arc.reading import open_plain, reading

LONGEST_HEADER = 8 << 20  # bytes; the headers of Qwen3-235B have 5 million, over all its files
ADVICE = "use another checkpoint"


def open_tensors(path: Path, advice: str = "") -> Any:
    """Opens a file of tensors. Raises UserError if it is missing, unreadable, damaged or not a plain file."""
    with reading(path, advice):
        with open_plain(path) as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LONGEST_HEADER:
            raise ValueError(f"it claims a header of {header:,} bytes; {LONGEST_HEADER:,} are the most")
        return safe_open(path, framework="pt")


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Reads a file that holds exactly the tensors in `shapes`, as `dtype`. Raises UserError naming file and tensor."""
    file = open_tensors(path, ADVICE)
    stored = set(file.keys())
    if "lstm.weight_ih_l0" in stored - shapes.keys():
        raise UserError(f"{path.parent} is a classifier with an LSTM, which only stages/finetune.py can use")
    for problem, names in (
        ("lacks the tensor", shapes.keys() - stored),
        ("has the unexpected tensor", stored - shapes.keys()),
    ):
        if names:
            raise UserError(f"{path} {problem} {min(names)}{and_more(names)}")
    tensors = {}
    for name, shape in shapes.items():
        with reading(path, ADVICE):
            header = file.get_slice(name)
            if tuple(header.get_shape()) != tuple(shape):
                raise UserError(f"{path}: {name} has the shape {tuple(header.get_shape())}, not {tuple(shape)}")
            tensor = file.get_tensor(name)
            if not tensor.is_floating_point():
                raise UserError(f"{path}: {name} has the type {tensor.dtype}, not a floating-point type")
            tensors[name] = tensor.to(dtype)
            if tensor.dtype != dtype:  # an open file keeps what was converted in memory
                file = safe_open(path, framework="pt")
    return tensors


def and_more(names: set[str]) -> str:
    """Completes a message that names one of `names`."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def check_tensors(tensors: Mapping[Any, torch.Tensor], expected: Mapping[Any, torch.Tensor], prefix: str = "") -> None:
    """Raises ValueError unless `tensors` have the names, shapes and types of `expected`; `prefix` completes a name.

    Each must be contiguous, as kernels that get only an address and a length take it to be.
    """
    for name in tensors.keys() ^ expected.keys():
        problem = "it lacks" if name in expected else "it has the unexpected tensor"
        raise ValueError(f"{problem} {prefix}{name}")
    for name, tensor in tensors.items():
        shape, dtype = tuple(expected[name].shape), expected[name].dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{prefix}{name} has the shape {tuple(tensor.shape)} of {tensor.dtype}, not {shape} of {dtype}"
            )
        if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.is_contiguous():
            raise ValueError(f"{prefix}{name} doesn't hold a value of its own for each of its elements")
