"""The table of docs/results/speed.md: what a compiled training step of GPT-2's width takes, by variant and target.

    FAKE_GPU_TRITON=../triton python tests/fake_gpu/table.py            counts what kernels.json lacks, prints the table
    FAKE_GPU_TRITON=../triton python tests/fake_gpu/table.py "dense" "modern, sm_90"    counts these again first

A count takes 15 to 30 seconds of one core, in a process of its own, and is kept in kernels.json at once. Each target is
captured and compiled anew, because inductor's choices depend on it: a kernel or a launch, and 0.01% of the bytes.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fake_gpu.build import measure
from gpt_arc.tables import markdown

GOLDEN = Path(__file__).with_name("kernels.json")
TARGETS = (75, 80, 90, 100)
ROWS = 12
MODERN = {
    "n_kv_head": 4, "positions": "rotary", "qk_norm": True, "norm": "rmsnorm", "activation": "swiglu", "bias": False
}  # fmt: skip
TRANSLATION = {"encoder_layers": 2, "positions": "sinusoidal", "activation": "relu"}
Variant = tuple[str, dict[str, Any], dict[str, Any]]
VARIANTS: dict[str, Variant] = {  # the function of steps.py, the model's settings, and training's
    "dense": ("text", {}, {}),
    "modern": ("text", MODERN, {}),
    "band of 256 with 4 sinks": ("text", {"attention_band": 256, "attention_sinks": 4}, {}),
    "ALiBi, 8 heads": ("text", {"positions": "alibi", "n_head": 8}, {}),  # more slopes would be a real tensor
    "bidirectional": ("text", {"attention": "bidirectional"}, {}),
    "documents": ("documents", {}, {}),
    "n-grams up to 3": ("text", {"ngrams": 3}, {}),
    "8 experts": ("text", {"n_experts": 8}, {}),
    "selective checkpointing": ("text", {}, {"activation_checkpointing": "selective"}),
    "`--float8`": ("text", {}, {"float8": True}),  # needs torchao
    "`--dtype=float16`": ("text", {}, {"dtype": "float16"}),
    "Muon and an average of the weights": ("text", {}, {"optimizer": "muon", "ema_decay": 0.99}),
    "`--offload_optimizer`": ("text", {}, {"offload_optimizer": True}),
    "encoder-decoder": ("translation", TRANSLATION, {}),
    "images": ("images", {}, {}),
    "image encoder": ("encoder", {}, {}),
}
FEWER_TARGETS = {
    "8 experts": (80, 90, 100),  # on sm_75, without grouped products, experts are a loop that waits for their sizes
    "`--float8`": (90, 100),  # such products need sm_89 or later
    "`--dtype=float16`": (80, 90, 100),  # sm_75 takes nothing else
    "Muon and an average of the weights": (90,),  # Triton compiles both passes, which are those of dense
    "`--offload_optimizer`": (90,),
}
CASES = {
    f"{variant}, sm_{target}": (variant, target)
    for variant in VARIANTS
    for target in FEWER_TARGETS.get(variant, TARGETS)
}
KEPT = ("graphs", "breaks", "kernels", "launches", "bytes", "tokens", "peak", "estimate", "spills")
Counts = dict[str, Any]


def counts(case: str) -> Counts:
    variant, target = CASES[case]
    kind, config, training = VARIANTS[variant]
    dtype = {"dtype": "float16"} if target < 80 else {}  # GPUs before the A100 don't multiply in bfloat16
    result = measure("step", {"n_layer": 2} | config, ROWS, training | dtype, kind, target=target, kernels="assembled")
    return {name: result[name] for name in KEPT}


def kept() -> dict[str, Counts]:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def keep(case: str, row: Counts) -> None:
    rows = kept() | {case: row}
    lines = (f" {json.dumps(name)}: {json.dumps(rows[name])}" for name in CASES if name in rows)
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def cell(rows: dict[int, Counts], text: Callable[[Counts], str]) -> str:
    """What the targets have in common, and then those that differ: "127; sm_100: 126"."""
    texts = {target: text(row) for target, row in rows.items()}
    common = Counter(texts.values()).most_common(1)[0][0]
    others = (f"sm_{target}: {value}" for target, value in texts.items() if value != common)
    return "; ".join((common, *others))


def kernels(row: Counts | None) -> str:
    if row is None:
        return ""
    spilled = sum(row["spills"].values())
    return f"{row['kernels']}, {spilled} bytes" if spilled else str(row["kernels"])


def table(cases: dict[str, Counts]) -> str:
    """The table in Markdown, a row for each variant with all its targets."""
    heads = ["model", "graphs, breaks", "launches", "bytes a token", "peak memory", "planned"]
    lines = [[*heads, *(f"sm_{target}" for target in TARGETS)]]
    for variant in VARIANTS:
        rows = {target: cases[case] for case, (name, target) in CASES.items() if name == variant and case in cases}
        if not rows:
            continue
        figures = [
            cell(rows, lambda row: f"{row['graphs']}, {row['breaks']}"),
            cell(rows, lambda row: str(row["launches"])),
            cell(rows, lambda row: f"{row['bytes'] / row['tokens'] / 1e6:.2f} MB"),
            cell(rows, lambda row: f"{row['peak'] / 1e9:.2f} GB"),
            cell(rows, lambda row: f"{row['estimate'] / 1e9:.2f} GB" if row["estimate"] else ""),
            *(kernels(rows.get(target)) for target in TARGETS),
        ]
        lines.append([variant, *figures])
    return markdown(lines)


def main() -> None:
    again = tuple(sys.argv[1:])
    for case in CASES:
        if case not in kept() or (again and case.startswith(again)):
            keep(case, counts(case))
            print(case, flush=True)
    print(table(kept()))
    for case, row in kept().items():
        for name, size in row["spills"].items():
            print(f"{case}: {name} spills {size} bytes")


if __name__ == "__main__":
    main()
