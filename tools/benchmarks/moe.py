"""The mixtures' part of tools/bench.py: optimizer steps of experts, beside the dense model of as many operations.

    python tools/bench.py moe configs/moe.toml --batch_size=1 --transformers=True
    python tools/bench.py moe configs/moe.toml --n_layer=4 --batch_size=2 --block_size=512 --rounds=3 --steps=3

It takes what `python tools/bench.py train` takes, and measures in the same way: steps of one random batch each, by
programs that take turns, each in a process of its own:

- ours: the mixture, with its routers' losses and loads, as train.py trains it.
- dense: ours too, the config without experts and with an MLP as wide as what a token takes of them all: equal active
  FLOPs but for the router's.
- transformers, where the architecture is its Mixtral: weights of the same sizes, autocast as ours, torch's fused AdamW,
  its loss of routers if balance_loss is set. Once for each of --implementations, its ways of computing experts;
  grouped_mm is its default, which autocast leaves in float32. What counts is the fastest, which is named.

Weights are new and tokens random, so the experts are used about alike. The floor is 6 FLOPs an active parameter and
token, attention not counted, over the rate of products of two 1024 x 1024 matrices between the rounds.
"""

import dataclasses
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from benchmarks.processes import check_places
from benchmarks.train import (
    Ours,
    Program,
    StepBench,
    Transformers,
    compare,
    prepare,
    read_arguments,
    show,
    write_results,
)
from gpt_arc.errors import UserError
from gpt_arc.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class MoeBench(StepBench):
    implementations: tuple[Literal["grouped_mm", "eager", "batched_mm"], ...] = ("grouped_mm", "eager")
    """transformers' ways of computing experts. batched_mm copies an expert's matrices for each choice of a token: it
    is for a few tokens."""

    def __post_init__(self):
        super().__post_init__()
        if not self.implementations:
            raise ValueError("implementations must name one or more")


class Grouped(Transformers):
    """transformers' model with its experts computed in one of its ways."""

    implementation = "grouped_mm"

    def setup(self) -> None:
        super().setup()
        self.model.set_experts_implementation(self.implementation)


class Eager(Grouped):
    implementation = "eager"


class Batched(Grouped):
    implementation = "batched_mm"


IMPLEMENTATIONS: dict[str, type[Program]] = {program.implementation: program for program in (Grouped, Eager, Batched)}


def equal_dense(config: Any) -> Any:
    """A `GPTConfig` without experts, whose MLPs together are as wide as what a token takes of `config`'s.

    Its blocks are alike, so where only every so many-th has experts all get the mean, to the nearest whole number.
    """
    taken = config.experts_per_token + config.shared_experts
    blocks = sum(config.has_experts(i) for i in range(config.n_layer))
    width = config.mlp_width * (blocks * taken + config.n_layer - blocks) / config.n_layer
    return dataclasses.replace(config, n_experts=0, mlp_size=round(width))


def bench_moe(args: list[str]) -> None:
    settings, config = read_arguments(args, MoeBench, __doc__, "moe configs/moe.toml")
    check_places(settings)

    import torch  # slow to import: not before the settings are known to be right

    from gpt_arc.planning.cost import flops_per_token
    from gpt_arc.weights.huggingface import architecture_of
    from model import GPT

    with torch.device("meta"):
        model, dense = GPT(config.model), GPT(equal_dense(config.model))
    if not model.experts:
        raise UserError("n_experts = 0 leaves nothing to measure: name a config with experts, as configs/moe.toml")
    if settings.transformers:
        architecture_of(config.model)
    job = prepare(settings, config)
    flops = {"ours": flops_per_token(model), "dense": flops_per_token(dense)}
    print(f"dense        {dense.num_parameters():,} parameters, mlp_size = {dense.config.mlp_size}:", end="")
    print(f" {flops['dense'] / flops['ours']:.1%} of the mixture's FLOPs a token", flush=True)

    theirs = {f"transformers {name}": IMPLEMENTATIONS[name] for name in settings.implementations}
    programs = {"ours": (Ours, job)}
    programs |= {"dense": (Ours, dataclasses.replace(job, config=dataclasses.replace(config, model=dense.config)))}
    programs |= {name: (program, job) for name, program in theirs.items()} if settings.transformers else {}
    results = compare(job, programs) | {"flops_per_token": flops}
    show(results)
    if settings.transformers:
        results["fastest"] = min(theirs, key=lambda name: results["ratios"][name]["median"])
        ratio = results["ratios"][results["fastest"]]["median"]
        print(f"fastest      of transformers' is {results['fastest']}: {ratio:.2f} times as long as ours")
    write_results(settings, results)
