"""Benchmark sampling, training and evaluation on this machine, against other libraries and the hardware's limits.

    python tools/bench.py sample configs/gpt2.toml --batch_size=16 --max_new_tokens=128
    python tools/bench.py sample configs/gpt2.toml --n_layer=6 --nanogpt=../nanoGPT --transformers=True
    python tools/bench.py sample out/quickstart --json=quickstart.json
    python tools/bench.py train configs/gpt2.toml --batch_size=1 --nanogpt=../nanoGPT
    python tools/bench.py moe configs/moe.toml --batch_size=1 --transformers=True
    python tools/bench.py finetune configs/gpt2.toml --n_layer=4 --transformers=True
    python tools/bench.py eval configs/gpt2.toml --transformers=True
    python tools/bench.py ppo --trl=True
    python tools/bench.py prepare --megabytes=1000
    python tools/bench.py gpu --json=gpu.json
    python tools/bench.py speedrun configs/speedrun_cpu.toml --target=1.886 --nanogpt=../nanoGPT

Each benchmark is a module of tools/benchmarks. Its docstring says what is compared and how.
"""

if __name__ == "__main__":
    import gpt_arc.startup  # noqa: F401


import importlib
import signal
import sys

from gpt_arc.errors import UserError, entry_point
from gpt_arc.files import HELP, command
from gpt_arc.flags import help_width, reflowed

BENCHMARKS = ("sample", "train", "moe", "finetune", "eval", "ppo", "prepare", "speedrun", "gpu")


def main() -> int | None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    name, *args = sys.argv[1:] or [""]
    if name in HELP:
        helps = ", ".join(command("tools/bench.py", name, "--help") for name in BENCHMARKS)
        print(reflowed(f"{__doc__}\nSettings: {helps}", help_width()))
        return None
    if name not in BENCHMARKS:
        raise UserError(f"name a benchmark: {command('tools/bench.py')} {', '.join(BENCHMARKS)}")
    benchmark = importlib.import_module(f"benchmarks.{name}")
    return getattr(benchmark, f"bench_{name}")(args)


if __name__ == "__main__":
    entry_point(main)()
