"""Tensor parallelism: divides the heads and the MLPs of every block among processes.

Each process reads sequences of its own, as under data parallelism, and has embeddings, norms and the head whole. Before
the first matrix of a sublayer the processes of a group gather their sequences, and each computes its heads, or its part
of the MLP's width, for all of them; after the second matrix the sums go back to the process of each sequence. These are
the two communications of Megatron's sequence parallelism (arXiv:2205.05198), along the batch instead of the sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_arc import distributed
from gpt_arc.errors import UserError
from gpt_arc.nn.attention import KVCache, Mask
from gpt_arc.nn.experts import Experts, product_dtype
from gpt_arc.training.config import Config, TrainingConfig
from gpt_arc.training.expert_parallel import ExpertParallel
from gpt_arc.training.parallel import check_divides
from gpt_arc.training.weight_shares import WeightShares
from gpt_arc.watch import WATCH
from model import GPT, MLP, Attention

Rotary = tuple[Tensor, Tensor] | None


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the rows x (N, ...) of all processes of the group, (P N, ...)."""
    WATCH.arrive()
    rows = x.new_empty(x.size(0) * dist.get_world_size(group), *x.shape[1:])
    distributed.all_gather_single(rows, x.contiguous(), group)
    return rows


def sum_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns this process's rows (N, ...) of the sum of x (P N, ...) over the group."""
    WATCH.arrive()
    rows = x.new_empty(x.size(0) // dist.get_world_size(group), *x.shape[1:])
    distributed.reduce_scatter_single(rows, x.contiguous(), dist.ReduceOp.SUM, group)
    return rows


class Exchange(torch.autograd.Function):
    """Applies `gather_rows` or `sum_rows`; the gradient goes back by the other one."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Callable, back: Callable, group: dist.ProcessGroup) -> Tensor:
        ctx.route = back, group
        return there(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, group = ctx.route
        return back(gradient, group), None, None, None


class TensorParallel(WeightShares):
    """Keeps this process's heads and its part of the MLPs' width of every block."""

    _exchange: Callable[..., Tensor]
    _mask: Mask = None  # of this process's sequences in the last forward pass
    _of_group: tuple[Rotary, Mask]  # and of those of the whole group

    def divide(self, model: GPT) -> None:
        config, processes = model.config, self.processes
        heads, kv_heads, size = config.n_head, config.kv_heads, config.head_width
        kept = replace(config, n_head=heads // processes, n_kv_head=kv_heads // processes, head_size=size)
        for name, module in model.blocks.named_modules(prefix="blocks"):
            assert not isinstance(module, Experts | nn.LSTM), "check_tensor_processes refuses them"
            if isinstance(module, Attention):
                module.config, cast(Any, module).forward = kept, partial(self._attention, module)
                self._divide(f"{name}.qkv", module.qkv, [n * size for n in (heads, kv_heads, kv_heads)])
            elif isinstance(module, MLP):
                self._divide(f"{name}.up", module.up, [config.mlp_width] * (2 if config.gated else 1))
            elif isinstance(module, nn.Linear) and name.endswith(".projection"):
                self.shares[f"{name}.weight"] = 1, [module.in_features]
                cast(Any, module).forward = partial(self._second, module)
        self._exchange = cast(Any, torch.compiler.disable(Exchange.apply))
        super().divide(model)

    def _divide(self, name: str, layer: nn.Linear, sections: Sequence[int]) -> None:
        """Divides the outputs of a layer, which are stacked in `sections`."""
        self.shares[f"{name}.weight"] = self.shares[f"{name}.bias"] = 0, sections
        cast(Any, layer).forward = partial(self._first, layer)

    def _attention(
        self, attention: Attention, x: Tensor, rotary: Rotary, mask: Mask, cache: KVCache | None = None
    ) -> Tensor:
        """Attends with the masks of the whole group, and the positions that restart with each document.

        They are gathered once for all blocks.
        """
        if isinstance(mask, Tensor):
            if mask is not self._mask:
                waves = rotary and (gather_rows(rotary[0], self.group), gather_rows(rotary[1], self.group))
                allowed = gather_rows(mask.view(torch.uint8), self.group).view(torch.bool)
                self._mask, self._of_group = mask, (waves, allowed)
            rotary, mask = self._of_group
        return Attention.forward(attention, x, rotary, mask, cache)

    def _first(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Returns this process's outputs (P B, T, M / P) for the inputs x (B, T, C) of all processes of the group."""
        x = self._exchange(x.to(product_dtype(x)), gather_rows, sum_rows, self.group)
        return F.linear(x, layer.weight, layer.bias)

    def _second(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Returns the whole outputs (B, T, C) for this process's sequences, of x (P B, T, M / P)."""
        x = self._exchange(F.linear(x, layer.weight), sum_rows, gather_rows, self.group)
        return x if layer.bias is None else x + layer.bias.type_as(x)


def make_shares(training: TrainingConfig, device: torch.device) -> WeightShares:
    """Returns how processes divide blocks or experts, as set."""
    if training.tensor_processes > 1:
        return TensorParallel(training.tensor_processes, device)
    return ExpertParallel(training.expert_processes, device)


def check_tensor_processes(config: Config, dtype: str) -> None:
    """Raises UserError if the model or the processes can't be divided this way."""
    processes, model, compile_setting = config.training.tensor_processes, config.model, config.training.compile
    is_compiled = compile_setting not in ("auto", False)
    if processes == 1:
        return
    setting = f"tensor_processes = {processes}"
    check_divides("tensor_processes", processes, config.run.planned_devices)
    divided = {"n_head": model.n_head, "n_kv_head": model.kv_heads, "mlp_size": model.mlp_width}
    for name, size in divided.items():
        if size % processes:
            raise UserError(f"{setting} does not divide {name} = {size}")
    obstacles = {  # ALiBi's biases are those of all heads, and a band's masks those of a process's own sequences
        f"n_experts = {model.n_experts}, for which there is expert_processes": model.n_experts,
        f"mixer = {model.mixer}": model.mixer == "lstm",
        "positions = alibi": model.positions == "alibi",
        f"attention_band = {model.attention_band}": model.attention_band,
        "dtype = float16": dtype == "float16",
        f"document_mask with compile = {compile_setting}": is_compiled and config.data.document_mask,
    }
    for obstacle in (name for name, applies in obstacles.items() if applies):
        raise UserError(f"{setting} doesn't suit {obstacle}: leave out one of the two")
