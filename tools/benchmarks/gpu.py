"""`bench.py gpu`: what each setting that a GPU decides about is worth there, by the other benchmarks, as one file.

    python tools/bench.py gpu --json=gpu.json --nanogpt=../nanoGPT
    python tools/bench.py gpu --settings tf32 float8 --decoding=False
    python tools/bench.py gpu --rehearse=True

Training steps of configs/gpt2.toml with the defaults and then with one setting changed at a time, and decoding. A
setting that doesn't work here, for want of a package for instance, is reported with the reason.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from benchmarks.processes import check_requirements, write_results
from gpt_arc.errors import UserError
from gpt_arc.files import resource
from gpt_arc.flags import parse_flags
from gpt_arc.settings import STRICT, Count, ResultFile

TRAINING = {
    "defaults": (),
    "eager": ("--compile=False",),
    "blocks": ("--compile=blocks",),
    "graphs": ("--compile=graphs",),
    "residual": ("--residual=bfloat16", "--dtype=bfloat16"),
    "muon": ("--optimizer=muon",),
    "checkpointing": ("--activation_checkpointing=True",),
    "selective": ("--activation_checkpointing=selective",),
    "offload": ("--offload_optimizer=True",),
    "tf32": ("--dtype=tf32",),
    "float16": ("--dtype=float16",),
    "flash3": ("--flash_attention=3",),
    "flash4": ("--flash_attention=4",),
    "float8": ("--float8=True",),
}
DECODING = {"one row": ("--batch_size=1",), "64 rows": ("--batch_size=64",)}
TINY = ("--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=64", "--vocab_size=300")


@dataclass(frozen=True, config=STRICT)
class GPUBench:
    settings: tuple[str, ...] = ("eager", "blocks", "graphs", "residual", "muon", "selective")
    """Settings to compare with the defaults: eager, blocks, graphs, residual, muon, checkpointing, selective,
    offload, tf32, float16, flash3, flash4, float8."""
    decoding: bool = True
    """Measure decoding too."""
    rounds: Count = 2
    """Measured rounds, after one warm-up round."""
    steps: Count = 10
    """Optimizer steps per round."""
    nanogpt: Path | None = None
    """A nanoGPT checkout (the folder with its model.py) to measure beside the defaults."""
    rehearse: bool = False
    """Run everything once with a tiny model, on any device."""
    check: bool = False
    """Only check the settings, and measure nothing."""
    json: ResultFile | None = None
    """A file for the results."""

    def __post_init__(self):
        if unknown := set(self.settings) - TRAINING.keys():
            raise ValueError(f"settings has no {sorted(unknown)[0]}: choose among {', '.join(TRAINING)}")


def measured(title: str, benchmark: str, *flags: str) -> dict[str, Any]:
    """The results of another benchmark, or {"failure": its last line}. Its output goes to this process's."""
    print(f"\n==== {title}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, str(resource("tools/bench.py")), benchmark, str(resource("configs/gpt2.toml"))]
        process = subprocess.run([*command, *flags, f"--json={path}"], stderr=subprocess.PIPE, text=True)
        if process.returncode:
            failure = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            print(failure, flush=True)
            return {"failure": failure}
        return json.loads(path.read_text())


def bench_gpu(args: list[str]) -> None:
    from gpt_arc.device import resolve_device

    options = parse_flags(GPUBench, __doc__, args)
    check_requirements(options)
    if not options.rehearse and resolve_device("auto").type == "cpu":
        raise UserError("there is no GPU here: --rehearse=True tries everything on the CPU, with a tiny model")
    if options.check:
        return
    rounds, steps = (1, 1) if options.rehearse else (options.rounds, options.steps)
    shape = TINY if options.rehearse else ()
    quickly = ["--compile=False"] if options.rehearse else []
    results: dict[str, Any] = {"training": {}, "decoding": {}}
    for name in ("defaults", *options.settings):
        flags = [*shape, *TRAINING[name], f"--rounds={rounds}", f"--steps={steps}"]
        flags += quickly if not any("compile" in flag for flag in flags) else []
        flags += [f"--nanogpt={options.nanogpt}"] if options.nanogpt and name == "defaults" else []
        results["training"][name] = measured(f"training: {name}", "train", *flags)
    for name, flags in DECODING.items() if options.decoding else ():
        tokens = "--max_new_tokens=4" if options.rehearse else "--max_new_tokens=256"
        flags = [*shape, *flags, tokens, f"--rounds={rounds}", f"--compile={not options.rehearse}"]
        results["decoding"][name] = measured(f"decoding: {name}", "sample", *flags)
    show(results["training"])
    write_results(options.json, results)
    for name, result in {"the defaults": results["training"]["defaults"], **results["decoding"]}.items():
        if "failure" in result:
            raise UserError(f"{name} failed: {result['failure']}")


def show(training: dict[str, Any]) -> None:
    print(f"\n{'':16}{'tokens/s':>12}{'memory GB':>12}")
    for name, result in training.items():
        if "failure" in result:
            print(f"{name:16}{result['failure']}")
            continue
        for program, figures in result["programs"].items():
            label = name if program == "ours" else program
            print(f"{label:16}{figures['tokens_per_second']:12,.0f}{figures['peak_memory_gb']:12.2f}")
