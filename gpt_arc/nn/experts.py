"""A mixture of experts in place of an MLP: router, experts, and what the routers' losses need.

Shapes: N tokens, C width, M hidden width, E experts, k experts per token.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt_arc.nn.functional import Dropout, activate

if TYPE_CHECKING:
    from model import GPTConfig


class Routing(NamedTuple):
    """What one block's router did with the tokens of a batch, padding left out."""

    load: Tensor  # (E,) share of the choices that fell on each expert, overflow included; sums to 1
    gates: Tensor  # (E,) mean probability of each expert
    z: Tensor  # () mean squared logsumexp of the router's logits
    entropy: Tensor  # () mean entropy of the probabilities, in nats
    dropped: Tensor  # () share of the choices that exceeded an expert's capacity


class Experts(nn.Module):
    """MLPs of which each token uses k, chosen and weighted by a router (Mixtral, arXiv:2401.04088).

    Tokens are sorted by expert, so each expert multiplies all of its tokens at once. With k = 1 the gate is the
    router's probability (Switch, arXiv:2101.03961); with more, the k gates are scaled to sum to 1. The router always
    computes in float32. `shared` is a further MLP that sees every token (arXiv:2401.06066).
    """

    balance: Tensor  # (E,), if the settings have a balance_rate

    def __init__(self, config: "GPTConfig", shared: nn.Module | None = None):
        super().__init__()
        self.config = config
        experts, width, inner = config.n_experts, config.n_embd, config.mlp_width
        up = 2 * inner if config.gated else inner
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, up, width))
        self.projection = nn.Parameter(torch.empty(experts, width, inner))
        self.up_bias = nn.Parameter(torch.zeros(experts, up)) if config.bias else None
        self.projection_bias = nn.Parameter(torch.zeros(experts, width)) if config.bias else None
        self.shared = shared
        self.inner_dropout, self.dropout = Dropout(config.expert_dropout), Dropout(config.dropout_of("residual"))
        if config.balance_rate:
            self.register_buffer("balance", torch.zeros(experts))
        self.observed = False  # in evaluation mode, too, passes with gradients return their `Routing`
        self.exchange: Callable | None = None  # under expert parallelism, runs `compute` where the experts are

    @property
    def idle_parameters(self) -> int:
        """Number of weights of the experts that a token doesn't use."""
        stacked = (self.up, self.projection, self.up_bias, self.projection_bias)
        idle = self.config.n_experts - self.config.experts_per_token
        return sum(idle * weights[0].numel() for weights in stacked if weights is not None)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The experts (N, k) that tokens x (N, C) use, their gates (N, k), and the router's logits (N, E)."""
        config, drawn = self.config, self.training and self.config.expert_selection == "drawn"
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.training and config.router_jitter:
                x = x * torch.empty_like(x).uniform_(1 - config.router_jitter, 1 + config.router_jitter)
            logits = F.linear(x, self.router.weight.type_as(x))
            probabilities = logits.softmax(-1)
            scores = probabilities.detach()
            if drawn:  # the largest logits with Gumbel noise are a draw without replacement
                scores = logits.detach() - torch.empty_like(logits).exponential_().log()
            elif config.balance_rate:
                scores = scores + self.balance
            chosen = scores.topk(config.experts_per_token, dim=-1).indices
            gates = probabilities.gather(-1, chosen)
            if config.experts_per_token > 1:
                gates = gates / gates.sum(-1, keepdim=True)
        return chosen, gates, logits

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor | tuple[Tensor, Routing]:
        """Returns a tensor shaped like x (..., C); in training, or where `observed`, also the `Routing`.

        `real` (...) is False for padding, which takes no capacity and stays out of the `Routing`.
        """
        config, inputs = self.config, x.flatten(0, -2)  # (N, C)
        chosen, gates, logits = self.route(inputs)
        experts, order, ends, counts = sort_choices(chosen, config.n_experts, real)
        back, accepted = order.argsort(), counts
        compute = self.compute if self.exchange is None else partial(self.exchange, self.compute)
        outputs = compute(take_rows(inputs, order, back), ends)
        if self.training and config.capacity_factor is not None:  # first come, first served
            capacity = expert_capacity(
                config.capacity_factor, len(order) if real is None else counts.sum(), config.n_experts
            )
            place = torch.arange(len(order), device=x.device) - F.pad(ends[:-1], (1, 0))[experts]
            gates, accepted = gates * (place < capacity)[back].view_as(gates), counts.clamp(max=capacity)
        choices = take_rows(outputs, back, order).unflatten(0, chosen.shape)  # (N, k, C)
        reports = self.training or (self.observed and torch.is_grad_enabled())
        mixed = self.dropout((choices * gates[..., None].type_as(choices)).sum(1)).view(x.shape)
        mixed = mixed if self.shared is None else mixed + self.shared(x)
        return (mixed, self.report(counts, accepted, logits, real)) if reports else mixed

    def compute(self, x: Tensor, ends: Tensor) -> Tensor:
        """Runs rows x (N, C) through their experts: the first expert has the rows before ends[0], and so on."""
        hidden = activate(grouped_linear(x, self.up, self.up_bias, ends), self.config.activation)
        return grouped_linear(self.inner_dropout(hidden), self.projection, self.projection_bias, ends)

    @staticmethod
    def report(counts: Tensor, accepted: Tensor, logits: Tensor, real: Tensor | None) -> Routing:
        """The `Routing` of a batch: choices per expert (E,), those within capacity (E,), router logits (N, E)."""
        with torch.autocast(logits.device.type, enabled=False):
            logs, total = logits.log_softmax(-1), counts.sum()
            entropies = -(logs.detach().exp() * logs.detach()).sum(-1)
            figures = torch.cat((logs.exp(), logits.logsumexp(-1, keepdim=True).square(), entropies[:, None]), dim=1)
            if real is None:
                means = figures.mean(0)
            else:
                means = torch.where(real.view(-1, 1), figures, 0.0).sum(0) / real.sum()
            return Routing(counts / total, means[:-2], means[-2], means[-1], 1 - accepted.sum() / total)


def sort_choices(chosen: Tensor, experts: int, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts the choices (N, k) of all tokens by expert, and padding behind an expert's tokens, where `real` is False.

    Returns the experts (N k,) in order, the order (N k,), and for each expert where its rows end and how many tokens
    chose it, both (E,).
    """
    numbers = torch.arange(experts, device=chosen.device)
    if real is None:
        sorted_choices, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_choices, numbers, right=True)
        return sorted_choices, order, ends, ends.diff(prepend=ends.new_zeros(1))
    keys, order = (2 * chosen + ~real.view(-1, 1)).flatten().sort(stable=True)
    ends = torch.searchsorted(keys, 2 * numbers + 1, right=True)
    return keys // 2, order, ends, torch.searchsorted(keys, 2 * numbers, right=True) - F.pad(ends[:-1], (1, 0))


def expert_capacity(factor: float, choices: int | Tensor, experts: int) -> int | Tensor:
    """The most choices that an expert accepts: `factor` times its even share, rounded up, and at most all."""
    if isinstance(choices, int):
        return math.ceil(min(factor * choices / experts, choices))
    share = factor * choices.to(torch.float32 if choices.device.type == "mps" else torch.float64) / experts
    return share.clamp(max=choices).ceil().long()


def router_losses(routings: Sequence[Routing], balance_weight: float, z_weight: float) -> dict[str, Tensor]:
    """The routers' losses (), summed over blocks and weighted; {} without routings.

    balance: E sum_e load_e gates_e, which is 1 when all experts are used equally (Switch, equation 4); the load is
    that of all processes together. router_z: the mean squared logsumexp (ST-MoE, arXiv:2202.08906).
    """
    losses = {}
    if balance_weight and routings:
        load = mean_over_processes(torch.stack([routing.load for routing in routings]))
        balance = (load * torch.stack([routing.gates for routing in routings])).sum()
        losses["balance"] = balance * load.size(1) * balance_weight
    if z_weight and routings:
        losses["router_z"] = sum(routing.z for routing in routings) * z_weight
    return losses


class TakeRows(torch.autograd.Function):
    """`take_rows`. Plain indexing would add up the rows' gradients one by one, on a GPU in any order."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.times = len(order) // max(len(x), 1) or 1
        return x[order // ctx.times]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows = gradient[ctx.saved_tensors[0]]
        return rows if ctx.times == 1 else rows.unflatten(0, (-1, ctx.times)).sum(1), None, None


def take_rows(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Returns rows of x (N, C), each k times, in the given order: (N k, C).

    `order` (N k,) is a permutation in which i k + j stands for copy j of row i; `back` is its inverse.
    """
    return TakeRows.apply(x, order, back)


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which x is multiplied: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """A linear layer per group of rows of x (N, C): rows before ends[0] use weight[0] (M, C), and so on: (N, M).

    `weight` is (E, M, C), `bias` (E, M) and `ends` (E,) int64, where each group's rows end; a group may be empty.
    """
    device, counts = x.device.type, ends.diff(prepend=ends.new_zeros(1))
    dtype = product_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    aligned = all(size * dtype.itemsize % 16 == 0 for size in weight.shape[1:])
    if aligned and dtype == torch.bfloat16 and device in ("cpu", "cuda"):  # no transfer of the counts from a GPU
        product = F.grouped_mm(x, weight.mT, offs=ends.int())
        return product if bias is None else product + bias.repeat_interleave(counts, dim=0, output_size=len(x))
    groups = zip(x.split(counts.tolist()), weight, [None] * len(weight) if bias is None else bias)
    return torch.cat([F.linear(*group) for group in groups])


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of x over all training processes, without a gradient. Every process has to call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
