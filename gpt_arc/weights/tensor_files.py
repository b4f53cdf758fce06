"""Files of tensors in the safetensors format: one, or several with an index that says which tensor is where."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, with_config
from safetensors import safe_open
from safetensors.torch import save_file
from typing_extensions import TypedDict

from gpt_arc.errors import NotFinite, UserError
from gpt_arc.files import replacing, write_file
from gpt_arc.reading import open_plain, read_json, reading

PARTS = "model-*-of-*.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_FILE = 5 * 10**9  # bytes of tensors in a file, as in transformers

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


@with_config(ConfigDict(extra="allow"))
class Index(TypedDict):
    weight_map: dict[str, str]  # tensor: file


def weight_files(directory: Path) -> list[Path]:
    """Returns the files with a model's weights: model.safetensors, or those that its index names. Raises UserError."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        other = (
            f", only {pickles[0]}, a pickle, which can run any code: save it again with transformers" if pickles else ""
        )
        raise UserError(f"{directory} has no {WEIGHTS}{other}")
    names = set(read_json(index, Index, limit=16 << 20)["weight_map"].values())
    for name in names:
        if Path(name).name != name:  # a path might lead anywhere
            raise UserError(f"{index} names the file {name}, which is not in its folder")
    return sorted(directory / name for name in names)


def write_weights(directory: Path, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Writes a model's weights as transformers does: one file or, if they are large, several and an index.

    Returns the names of the files.
    """
    parts: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if parts[-1] and sum(x.nbytes for x in parts[-1].values()) + tensor.nbytes > LARGEST_FILE:
            parts.append({})
        parts[-1][name] = tensor
    numbered = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    files = numbered if len(parts) > 1 else [WEIGHTS]
    for file, part in zip(files, parts):
        with replacing(directory / file) as temporary:
            save_file(part, temporary, {"format": "pt"})
    if len(parts) == 1:
        return files
    places = {name: file for file, part in zip(files, parts) for name in part}
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_file(directory / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2) + "\n")
    return [*files, INDEX]


def read_weights(directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`read_tensors` for the files of `weight_files`."""
    return _read(*open_weights(directory, shapes), dtype)


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Reads a file that holds exactly the tensors in `shapes`, as `dtype`. Raises UserError naming file and tensor."""
    return _read(*_open([path], path, shapes), dtype)


Opened = tuple[dict[Path, Any], dict[str, Path]]  # files, and the file of each tensor


def open_weights(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> Opened:
    """Opens the files of `weight_files`. Raises UserError unless they hold exactly the tensors in `shapes`."""
    paths = weight_files(directory)
    return _open(paths, paths[0] if len(paths) == 1 else directory / INDEX, shapes)


def _open(paths: Sequence[Path], whole: Path, shapes: Mapping[str, tuple[int, ...]]) -> Opened:
    """`open_weights` for these files; messages about all name the path `whole`."""
    files: dict[Path, Any] = {}
    places: dict[str, Path] = {}
    for path in paths:
        files[path] = open_tensors(path, ADVICE)
        for name in files[path].keys():
            if name in places:
                raise UserError(f"{path} and {places[name]} both have the tensor {name}: remove one of them")
            places[name] = path
    if "lstm.weight_ih_l0" in places.keys() - shapes.keys():
        raise UserError(f"{whole.parent} is a classifier with an LSTM, which only stages/finetune.py can use")
    for problem, names in (
        ("lacks the tensor", shapes.keys() - places),
        ("has the unexpected tensor", places.keys() - shapes.keys()),
    ):
        if names:
            raise UserError(f"{whole} {problem} {min(names)}{and_more(names)}")
    for name, path in places.items():
        with reading(path, ADVICE):
            shape = tuple(files[path].get_slice(name).get_shape())
        if shape != tuple(shapes[name]):
            raise UserError(f"{path}: {name} has the shape {shape}, not {tuple(shapes[name])}")
    return files, places


def _read(files: dict[Path, Any], places: dict[str, Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, path in places.items():
        with reading(path, ADVICE):
            tensor = files[path].get_tensor(name)
            if not tensor.is_floating_point():
                raise UserError(f"{path}: {name} has the type {tensor.dtype}, not a floating-point type")
            tensors[name] = tensor.to(dtype)
            if tensor.dtype != dtype:  # an open file keeps what was converted in memory
                files[path] = safe_open(path, framework="pt")
    return tensors


def check_range(tensors: Mapping[str, torch.Tensor], model: Path | str, dtype: str = "float32") -> None:
    """Raises NotFinite for a tensor of `model` that isn't, or that exceeds the range of the `dtype` it now has."""
    for name, tensor in tensors.items():
        if tensor.isnan().any() or dtype == "float32" and tensor.isinf().any():
            raise NotFinite(f"{name} of {model} is not finite: name another checkpoint")
        if tensor.isinf().any():
            raise NotFinite(f"{name} of {model} has values beyond the range of {dtype}: export in float32")


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
