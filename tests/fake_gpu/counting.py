"""Counts, on fake tensors, how often the host waits for the device and how much of the device's memory is in use."""

import traceback
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class FakeDevice:
    """Runs the block on fake tensors. A value read from one is 0, or 1 if it is an integer, a truth value or a float64.

    Real tensors, as other threads and numpy make them, may take part as if they were fake.
    """

    def __init__(self):
        self.waits: Counter[str] = Counter()  # file:line and the reason -> how often
        self.allocated = self.peak = self.largest = 0  # bytes
        self.copied: Counter[str] = Counter()  # bytes copied to "cuda" from the CPU and to "cpu" from the device
        self.operators: Counter[str] = Counter()  # that read or write the device's memory, by name
        self.moved = 0  # bytes that they read and write
        self._live: set[int] = set()
        self._depth = 0
        fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # or known single numbers would be computed with, on a device that can't
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fake, self._mode.dispatch = self._mode.dispatch, self._dispatch
        FakeTensor.tolist = lambda tensor: self.read(tensor)  # torch's reads one value after another
        arrival = SimpleNamespace(record=lambda *stream: None, synchronize=lambda: self.wait("waits for copies"))
        torch.cuda.current_stream().record_event = lambda: arrival
        FakeTensor.numpy = lambda tensor: np.array(self.read(tensor))

    def __enter__(self) -> "FakeDevice":
        self._mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._mode.__exit__(*error)

    def _dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self.read(args[0])
        if reason := reason_to_wait(func, args, kwargs):
            self.wait(reason)
        if copy := copy_across(func, args, kwargs):
            self.copied[copy.destination] += copy.size
            if copy.waits:
                self.wait(f"copies to {copy.destination}")
        if func is aten.nonzero.default:  # all are true
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is aten._to_copy.default and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            if args[0].device.type == "cpu":  # whose values, if they are known, have no place there
                with self._mode:
                    return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cuda")
        self._depth += 1  # of the operators that fake ones are made of, which a device doesn't run
        try:
            result = self._fake(func, types, args, kwargs)
        finally:
            self._depth -= 1
        if self._depth:
            return result
        for tensor in tree_leaves(result):
            self._allocate(tensor)
        if not only_makes_views(func) and (size := bytes_of((args, kwargs, result))):
            self.operators[str(func)] += 1
            self.moved += size
        return result

    def wait(self, reason: str) -> None:
        self.waits[f"{line_of_the_project()} {reason}"] += 1

    def read(self, tensor: Tensor) -> Any:
        """What stands for the values of a tensor, as `item` or `tolist` return them."""
        if tensor.device.type == "cuda":
            self.wait("reads a value")
        value = {torch.bool: True, torch.float64: 1.0}.get(tensor.dtype, 0.0 if tensor.is_floating_point() else 1)
        for size in reversed(tensor.shape):
            value = [value] * size
        return value

    def _allocate(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            self._live.add(storage._cdata)
            self.allocated += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
            self.peak = max(self.peak, self.allocated)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, storage: int, size: int) -> None:
        self._live.discard(storage)
        self.allocated -= size


def only_makes_views(func: Any) -> bool:
    """Whether an operator computes nothing: it allocates memory, or looks at that of its arguments in another way."""
    if not isinstance(func, torch._ops.OpOverload):  # an operator that takes functions, such as flex_attention
        return False
    aliases = [result.alias_info for result in func._schema.returns]
    is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    return is_view or "empty" in func._schema.name or func.namespace == "prim" or func is aten.detach.default


def bytes_of(values: Any) -> int:
    """The bytes of the tensors on the device, each counted once."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.device.type == "cuda"]
    return sum({(x.untyped_storage()._cdata, x.storage_offset()): x.nbytes for x in tensors}.values())


def reason_to_wait(func: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why the host waits for the device in an operator, or None."""
    if func in (aten.nonzero.default, aten.masked_select.default) and args[0].device.type == "cuda":
        return "asks for the size of a result"
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "asks for the size of a result"
    if func in INDEXING:
        places = [index for index in args[1] if index is not None]
        if args[0].device.type == "cuda" and any(index.device.type == "cpu" for index in places):
            return "copies an index to the device"
    return None


class Copy(NamedTuple):
    destination: str
    size: int  # bytes
    waits: bool


def copy_across(func: Any, args: tuple, kwargs: dict[str, Any]) -> Copy | None:
    """The copy between the CPU and the device that an operator makes, if any."""
    if func is aten._to_copy.default:
        source, destination = args[0], torch.device(kwargs.get("device") or args[0].device)
    elif func is aten.copy_.default:
        source, destination = args[1], args[0].device
        kwargs = {"non_blocking": args[2]} if len(args) > 2 else kwargs
    else:
        return None
    if {destination.type, source.device.type} != {"cpu", "cuda"}:
        return None
    return Copy(destination.type, source.nbytes, not kwargs.get("non_blocking"))


def line_of_the_project() -> str:
    """The innermost line of the project, its tests apart, that is being run."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "tests" not in path.relative_to(ROOT).parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"
