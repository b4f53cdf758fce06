"""Models without weights, for their shapes or to be filled from files."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


class _SkipInit(TorchFunctionMode):
    """Turns torch.nn.init into no-ops: on the meta device it would import torch._dynamo, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def meta_device() -> Iterator[None]:
    """Runs the block with new modules on the meta device, without memory or initial weights."""
    with torch.device("meta"), _SkipInit():
        yield
