"""`bench.py moe`: optimizer steps of a mixture of experts, against a dense model with the same FLOPs per token.

    python tools/bench.py moe configs/moe.toml --batch_size=1 --transformers=True
    python tools/bench.py moe configs/moe.toml --n_layer=4 --batch_size=2 --block_size=512 --rounds=3 --steps=3

Accepts the settings of `python tools/bench.py train` and measures the same way: steps of one random batch, by
competitors that take turns, each in its own process:

- ours: the mixture, with its router losses and loads, as train.py trains it.
- dense: our model too, without experts; its MLP is as wide as all the experts that a token uses, so its active FLOPs
  are the same except for the router's.
- transformers, if the architecture is its Mixtral: weights of the same sizes, the same autocast, torch's fused AdamW,
  its router loss if balance_loss is set. Measured once for each of --implementations, its ways to compute experts;
  grouped_mm is its default, which autocast leaves in float32. The fastest one counts, and is named.

Weights are new and tokens random, so the experts are used about equally. The floor is 6 FLOPs per active parameter and
token, attention not counted, at the rate measured between the rounds for products of two 1024 x 1024 matrices.
"""

import dataclasses
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic.dataclasses import dataclass

from benchmarks.processes import check_requirements, write_results
from benchmarks.train import (
    OurTrainer,
    StepBench,
    TrainJob,
    TrainWorker,
    TransformersTrainer,
    compare,
    prepare,
    read_arguments,
    show,
)
from gpt_arc.errors import UserError
from gpt_arc.settings import STRICT

Implementation = Literal["grouped_mm", "eager", "batched_mm"]


@dataclass(frozen=True, config=STRICT)
class MoeBench(StepBench):
    implementations: Annotated[tuple[Implementation, ...], MinLen(1)] = ("grouped_mm", "eager")
    """transformers' ways of computing experts. batched_mm copies an expert's matrices for each choice of a token: it
    is for a few tokens."""


class GroupedMixtral(TransformersTrainer):
    """transformers' model, whose experts are computed in the way that `implementation` names."""

    implementation = "grouped_mm"

    def setup(self) -> None:
        super().setup()
        self.model.set_experts_implementation(self.implementation)


class EagerMixtral(GroupedMixtral):
    implementation = "eager"


class BatchedMixtral(GroupedMixtral):
    implementation = "batched_mm"


IMPLEMENTATIONS: dict[str, type[GroupedMixtral]] = {
    worker.implementation: worker for worker in (GroupedMixtral, EagerMixtral, BatchedMixtral)
}


def equal_dense(config: Any) -> Any:
    """Returns a `GPTConfig` without experts, with as much total MLP width as a token uses in `config`.

    Its blocks are all alike: where only every nth block of `config` has experts, each gets the mean width, rounded.
    """
    active = config.experts_per_token + config.shared_experts
    blocks = sum(config.has_experts(i) for i in range(config.n_layer))
    width = config.mlp_width * (blocks * active + config.n_layer - blocks) / config.n_layer
    return dataclasses.replace(config, n_experts=0, mlp_size=round(width))


def bench_moe(args: list[str]) -> None:
    settings, config = read_arguments(args, MoeBench, __doc__, "moe configs/moe.toml")
    check_requirements(settings)

    from gpt_arc.nn.meta import meta_device
    from gpt_arc.planning.cost import flops_per_token
    from gpt_arc.weights.huggingface import architecture_of
    from model import GPT

    with meta_device():
        model, dense = GPT(config.model), GPT(equal_dense(config.model))
    if not model.experts:
        raise UserError("n_experts = 0 leaves nothing to measure: name a config with experts, such as configs/moe.toml")
    if settings.transformers:
        architecture_of(config.model)
    job = prepare(settings, config)
    flops = {"ours": flops_per_token(model), "dense": flops_per_token(dense)}
    print(f"dense        {dense.num_parameters():,} parameters, mlp_size = {dense.config.mlp_size}:", end="")
    print(f" {flops['dense'] / flops['ours']:.1%} of the mixture's FLOPs per token", flush=True)

    peers = {f"transformers {name}": IMPLEMENTATIONS[name] for name in settings.implementations}
    dense_job = dataclasses.replace(job, config=dataclasses.replace(config, model=dense.config))
    workers: dict[str, tuple[type[TrainWorker], TrainJob]]
    workers = {"ours": (OurTrainer, job), "dense": (OurTrainer, dense_job)}
    workers |= {name: (worker, job) for name, worker in peers.items()} if settings.transformers else {}
    results: dict[str, Any] = compare(job, workers) | {"flops_per_token": flops}
    show(results)
    if settings.transformers:
        results["fastest"] = min(peers, key=lambda name: results["ratios"][name]["median"])
        ratio = results["ratios"][results["fastest"]]["median"]
        print(f"fastest      implementation of transformers: {results['fastest']}, {ratio:.2f} times as long as ours")
    write_results(settings.json, results)
