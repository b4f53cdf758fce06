"""Checks the mixture of experts: gpt_arc/nn/experts.py against a loop over experts, as a markdown table.

    python examples/expert_equality.py
    python examples/expert_equality.py --seed=1

The model sorts tokens by expert and multiplies the tokens of each expert at once. The loop here visits the experts one
by one, selects the tokens that chose each, and computes in float64 from the same weights; autograd computes its
gradients. Only if experts are drawn at random does it take the choice from the model. Each figure is the largest
difference in a tensor (the output, or a gradient of the input or a parameter) over that tensor's largest number.

- float32: a row fails above 1e-5.
- bfloat16: under autocast, as in training. "loop's" is the difference of the same loop with products in bfloat16, which
  is due to rounding alone; a row fails above four times that.

A shape is tokens x width, then the number of experts and their width. If sizes are multiples of 8, 16-bit products are
grouped, otherwise they run expert by expert. The last row compares transformers' Mixtral, if installed: logits, and the
gradients of all weights. The exit code is 1 if a row fails.
"""

import contextlib
import dataclasses
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from gpt_arc.errors import entry_point
from gpt_arc.flags import parse_flags
from gpt_arc.nn.experts import Experts
from gpt_arc.settings import STRICT, Seed
from gpt_arc.weights.directory import load_model
from model import GPTConfig, make_experts

LIMIT, ROUNDINGS = 1e-5, 4.0  # for float32; for bfloat16 in multiples of the loop's difference
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x * (x > 0),
    "relu_squared": lambda x: (x * (x > 0)) ** 2,
    "swiglu": lambda x: x.chunk(2, -1)[0] * torch.sigmoid(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}
SHAPES = [  # tokens, width, experts, width of an expert
    (96, 64, 8, 48),
    (29, 20, 5, 12),
]
VARIANTS: dict[str, dict[str, Any]] = {  # settings of GPTConfig, and `starved` and `alone` of a case
    "top 2, gates that add up to 1": {},
    "top 1, its gate the probability": dict(experts_per_token=1),
    "all experts": dict(experts_per_token=None),
    "two, drawn by their gates": dict(expert_selection="drawn"),
    "two, and two shared experts": dict(shared_experts=2),
    "two, as the capacity allows": dict(capacity_factor=0.75),
    "top 1, as the capacity allows": dict(experts_per_token=1, capacity_factor=0.75),
    "two, chosen with balancing biases": dict(balance_rate=0.1),
    "two, layers without biases": dict(bias=False),
    **{f"two, {name}": dict(activation=name) for name in ACTIVATIONS if name != "gelu_tanh"},
    "two, an expert without tokens": dict(starved=3),
    "two, one token at a time": dict(alone=True),
}
HEADINGS = ("variant", "shape", "float32: output", "gradients", "bfloat16: output", "loop's", "gradients", "loop's")


@dataclass(frozen=True, config=STRICT)
class Options:
    seed: Seed = 0
    """Seed of the weights and tokens."""


@dataclasses.dataclass
class Case:
    """Experts in training mode with weights and biases that all matter, and their input."""

    experts: Experts
    x: Tensor  # (N, C)
    alone: bool  # whether tokens are read one at a time
    seed: int  # for random routing

    def drawn(self) -> Tensor | None:
        """Returns the experts (N, k) that the next forward pass will draw; None if it draws none."""
        if self.experts.config.expert_selection != "drawn":
            return None
        torch.manual_seed(self.seed)
        return self.experts.route(self.x)[0]


def make_case(variant: dict[str, Any], shape: tuple[int, int, int, int], seed: int) -> Case:
    tokens, width, number, inner = shape
    settings: dict[str, Any] = dict(n_head=1, n_embd=width, n_experts=number, mlp_size=inner) | variant
    starved, alone = settings.pop("starved", None), settings.pop("alone", False)
    if settings.get("experts_per_token", 2) is None:
        settings["experts_per_token"] = number
    generator = torch.Generator().manual_seed(seed)
    experts = make_experts(GPTConfig(**settings)).train()
    with torch.no_grad():
        for tensor in (*experts.parameters(), *experts.buffers()):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
        x = torch.randn(tokens, width, generator=generator)
        x[:, 0] = 1
        if starved is not None:
            experts.router.weight[starved, 0] -= 40
    return Case(experts, x, alone, seed)


def by_loop(experts: Experts, weights: dict[str, Tensor], x: Tensor, drawn: Tensor | None, dtype: Any) -> Tensor:
    """Returns the output (N, C) of `experts` in training mode for x (N, C), computed expert by expert from `weights`.

    `drawn` (N, k) are the experts if they were drawn at random. Products are in `dtype`, the router in that of x.
    """
    config, k = experts.config, experts.config.experts_per_token

    def mlp(x: Tensor, layers: dict[str, Tensor]) -> Tensor:
        layers = {name: tensor.to(dtype) for name, tensor in layers.items()}
        hidden = ACTIVATIONS[config.activation](F.linear(x.to(dtype), layers["up"], layers.get("up_bias")))
        return F.linear(hidden, layers["projection"], layers.get("projection_bias"))

    probabilities = (x @ weights["router.weight"].T).softmax(-1)  # (N, E)
    biased = probabilities + experts.balance if config.balance_rate else probabilities
    chosen = biased.argsort(-1, descending=True)[:, :k] if drawn is None else drawn  # (N, k)
    gates = probabilities.gather(1, chosen)
    gates = gates / gates.sum(-1, keepdim=True) if k > 1 else gates
    stacked = {name: weights[name] for name in ("up", "up_bias", "projection", "projection_bias") if name in weights}
    mixed = torch.zeros_like(x, dtype=dtype)
    for e in range(config.n_experts):
        rows, places = (chosen == e).nonzero(as_tuple=True)  # in token order
        if config.capacity_factor is not None:
            room = math.ceil(config.capacity_factor * chosen.numel() / config.n_experts)
            rows, places = rows[:room], places[:room]
        outputs = mlp(x[rows], {name: tensor[e] for name, tensor in stacked.items()})
        mixed = mixed.index_add(0, rows, outputs * gates[rows, places, None].to(dtype))
    if experts.shared is not None:
        names = {"up": "up.weight", "up_bias": "up.bias", "projection": "projection.weight"}
        names |= {"projection_bias": "projection.bias"}
        shared = {name: weights[f"shared.{key}"] for name, key in names.items() if f"shared.{key}" in weights}
        mixed = mixed + mlp(x, shared)
    return mixed


def results(y: Tensor, x: Tensor, weights: dict[str, Tensor]) -> list[Tensor]:
    """Returns y, and the gradients of x and the weights for a random gradient of y."""
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    return [y.detach(), *torch.autograd.grad(y, [x, *weights.values()], cotangent.to(y.dtype))]


def of_loop(case: Case, weight_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    """Returns the loop's output and gradients."""
    weights = {n: p.detach().to(weight_dtype).requires_grad_() for n, p in case.experts.named_parameters()}
    x = case.x.to(weight_dtype).requires_grad_()
    return results(by_loop(case.experts, weights, x, case.drawn(), dtype), x, weights)


def of_model(case: Case, autocast: bool) -> list[Tensor]:
    """Returns the output and gradients of gpt_arc/nn/experts.py."""
    x = case.x.clone().requires_grad_()
    torch.manual_seed(case.seed)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        y = torch.cat([case.experts(part)[0] for part in (x.split(1) if case.alone else [x])])
    return results(y, x, dict(case.experts.named_parameters()))


def difference(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference over the largest expected number."""
    largest = (actual.double() - expected.double()).abs().max().item()
    return largest / expected.abs().max().item() if largest else 0.0


def differences(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Returns the difference of the first tensors, and the largest of the others."""
    first, *others = (difference(a, e) for a, e in zip(actual, expected, strict=True))
    return first, max(others)


def measure(case: Case) -> list[float]:
    """Returns the figures of a row."""
    exact = of_loop(case, torch.float64, torch.float64)
    single = differences(of_model(case, autocast=False), exact)
    half = differences(of_model(case, autocast=True), exact)
    rounding = differences(of_loop(case, torch.float32, torch.bfloat16), exact)
    return [*single, half[0], rounding[0], half[1], rounding[1]]


def refused(figures: Sequence[float]) -> bool:
    """Returns whether the figures of a row exceed the limits."""
    output, gradients, *pairs = figures
    halves = zip(pairs[::2], pairs[1::2])
    return not max(output, gradients) <= LIMIT or any(not model <= ROUNDINGS * loop for model, loop in halves)


def measure_mixtral(seed: int) -> tuple[float, float]:
    """Returns the differences of logits and gradients from transformers' Mixtral, both in float32."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=24, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs, generator = transformers.MixtralForCausalLM(config).train(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    tokens, targets = torch.randint(61, (2, 3, 24), generator=generator).unbind()
    with tempfile.TemporaryDirectory(prefix="gpt-arc-") as folder:
        theirs.save_pretrained(folder)
        ours = load_model(folder)[0].train()
        logits = theirs(tokens).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        for parameter in theirs.parameters():
            assert parameter.grad is not None
            parameter.data = parameter.grad
        theirs.save_pretrained(folder)  # to load the gradients under our names
        gradients = dict(load_model(folder)[0].named_parameters())
    ours(tokens, targets).total.backward()
    actual = [ours(tokens), *(parameter.grad for parameter in ours.parameters())]
    return differences(actual, [logits, *(gradients[name] for name, _ in ours.named_parameters())])


def main() -> int:
    options = parse_flags(Options, __doc__, sys.argv[1:])
    wrong = []

    def show(*cells: Any) -> None:
        print(
            "| " + " | ".join(f"{cell:.1e}" if isinstance(cell, float) else cell for cell in cells) + " |", flush=True
        )

    show(*HEADINGS)
    print("|" + "---|" * len(HEADINGS))
    for name, variant in VARIANTS.items():
        for shape in SHAPES:
            case = make_case(variant, shape, options.seed)
            size = f"{shape[0]} x {shape[1]}, {shape[2]} of {shape[3]}"
            figures = measure(case)
            show(name, size, *figures)
            wrong += [f"{name}, {size}"] if refused(figures) else []
    if importlib.util.find_spec("transformers") is None:
        print("\ntransformers is not installed, so there is no row for its Mixtral.")
    else:
        figures = measure_mixtral(options.seed)
        show("transformers' Mixtral", "72 x 32, 8 of 48", *figures, *[""] * 4)
        wrong += ["transformers' Mixtral"] if max(figures) > LIMIT else []
    limits = f"{LIMIT:g} in float32, {ROUNDINGS:g} times the loop's difference in bfloat16"
    print(f"\nBeyond {limits}: {'; '.join(wrong) or 'nothing'}.")
    return 1 if wrong else 0


if __name__ == "__main__":
    entry_point(main)()
