"""Lets inductor compile for the device of `device.install`: it writes kernels, which Triton and ptxas may assemble.

Nothing is launched, only counted. Triton's package is unpacked in a folder apart, since an installed one would change
what torch does on the CPU.
"""

import re
import subprocess
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fake_gpu.counting import bytes_of
from fake_gpu.device import GPU


class Compiler:
    """Sets inductor up for `gpu`, and keeps what it compiles and launches.

    Of the configurations among which inductor would choose by measuring them, the first counts.
    """

    def __init__(self, gpu: GPU, triton: Path, assembles: bool):
        self.gpu, self.triton, self.assembles = gpu, triton / "triton", assembles
        self.kernels: dict[str, str] = {}  # name -> PTX, empty if they aren't assembled
        self.launches: Counter[str] = Counter()
        self.bytes = 0  # of the tensors that launched kernels were given
        self._set_driver()
        self._set_inductor()

    def _set_driver(self) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.driver import DriverBase

        gpu = self.gpu
        limits = {"max_shared_mem": gpu.shared_memory, "multiprocessor_count": gpu.multiprocessors}

        class Driver(DriverBase):
            utils = types.SimpleNamespace(get_device_properties=lambda device: limits)

            def __init__(self):
                pass

            @staticmethod
            def is_active():
                return True

            def get_current_target(self):
                return GPUTarget("cuda", gpu.target, 32)

            def get_active_torch_device(self):
                return torch.device("cuda", 0)

            def get_current_device(self):
                return 0

            def get_current_stream(self, device=None):
                return 0

        Driver.__abstractmethods__ = frozenset()
        triton.runtime.driver.set_active(Driver())

    def _set_inductor(self) -> None:
        import torch._inductor.config as settings
        from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
        from torch._inductor.runtime import triton_helpers
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
        from triton.backends.nvidia.compiler import CUDABackend

        CUDABackend.make_cubin = lambda *args: b""  # `spills` runs ptxas
        torch.library.register_fake("aten::_scaled_mm.out")(lambda *args, out, **settings: out)
        settings.compile_threads = 1
        settings.fx_graph_cache = False
        settings.use_static_triton_launcher = False
        settings.joint_graph_constant_folding = False  # it computes
        settings.shape_padding = False  # it measures
        triton_helpers.set_driver_to_gpu = lambda: None
        for module, name in (
            (fuse_attention, "_get_sfdp_patterns"), (misc_patterns, "_misc_patterns_init"), (pad_mm, "_pad_mm_init")
        ):  # fmt: skip
            setattr(module, name, on_the_cpu(getattr(module, name)))
        CachingAutotuner.precompile = lambda tuner, *args, **settings: self._precompile(tuner)

    def _precompile(self, tuner: Any) -> None:
        """Gives a kernel what inductor calls in its place."""
        name, config = tuner.fn.__name__, tuner.configs[0]
        self.kernels[name] = tuner._precompile_config(config).kernel.asm["ptx"] if self.assembles else ""

        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches[name] += 1
            self.bytes += bytes_of(args)

        launch.config, launch.store_cubin, launch.cache_hash = config, False, None
        tuner.launchers = [launch]

    def spills(self) -> dict[str, int]:
        """The bytes that each kernel's registers spill to memory, by ptxas; kernels without are left out."""
        name = "ptxas-blackwell" if self.gpu.target >= 100 else "ptxas"
        ptxas = self.triton / "backends" / "nvidia" / "bin" / name
        architecture = f"sm_{self.gpu.target}" + "a" * (self.gpu.target >= 90)
        spilled = {}
        for kernel, ptx in self.kernels.items():
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(ptx)
                file.flush()
                command = [ptxas, "-v", "--regAllocOptLevel=2", f"-arch={architecture}", file.name, "-o", "/dev/null"]
                report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            if size := int(re.search(r"(\d+) bytes spill stores", report)[1]):
                spilled[kernel] = size
        return spilled


def on_the_cpu(function):
    """`function`, which traces patterns on real example tensors, as a machine without a GPU runs it."""

    def call(*args, **kwargs):
        available, torch.cuda.is_available = torch.cuda.is_available, lambda: False
        cpu = torch.device("cpu")
        try:
            args = [cpu if isinstance(x, torch.device) else x for x in args]
            return function(*args, **{k: cpu if isinstance(x, torch.device) else x for k, x in kwargs.items()})
        finally:
            torch.cuda.is_available = available

    return call
