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
from gpt_arc.distributed import WORLD_SIZE
from gpt_arc.errors import UserError
from gpt_arc.training.config import Config, TrainingConfig
from gpt_arc.training.expert_parallel import ExpertParallel
from gpt_arc.training.weight_shares import WeightShares
from gpt_arc.watch import WATCH
from model import GPT, MLP, Attention, Block


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
    """Built from a whole model, of whose blocks it keeps this process's heads and its part of the MLPs' width."""

    def __init__(self, model: GPT, processes: int, device: torch.device):
        super().__init__(processes, device)
        config = model.config
        heads, kv_heads, size = config.n_head, config.kv_heads, config.head_width
        kept = replace(config, n_head=heads // processes, n_kv_head=kv_heads // processes, head_size=size)
        for block in model.blocks:
            assert isinstance(block, Block) and isinstance(block.mlp, MLP), "check_tensor_processes refuses experts"
            assert isinstance(block.attention, Attention), "it refuses an LSTM too"
            block.attention.config = kept
            rows = [n * size for n in (heads, kv_heads, kv_heads)]
            self._divide(block.attention.qkv, block.attention.projection, rows)
            self._divide(block.mlp.up, block.mlp.projection, [config.mlp_width] * (2 if config.gated else 1))
        self.hide_from_ddp(model)

    def _divide(self, first: nn.Linear, second: nn.Linear, sections: Sequence[int]) -> None:
        """Divides the outputs of the `first` layer, which are stacked in `sections`, and the inputs of the `second`."""
        self.divide(first.weight, 0, sections)
        if first.bias is not None:
            self.divide(first.bias, 0, sections)
        self.divide(second.weight, 1, sections[:1])
        for layer, forward in ((first, self._first), (second, self._second)):
            cast(Any, layer).forward = partial(forward, layer)

    def _first(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Returns this process's outputs (P B, T, M / P) for the inputs x (B, T, C) of all processes of the group."""
        x = Exchange.apply(x, gather_rows, sum_rows, self.group)
        return F.linear(x, layer.weight, layer.bias)

    def _second(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Returns the whole outputs (B, T, C) for this process's sequences, of x (P B, T, M / P)."""
        x = Exchange.apply(F.linear(x, layer.weight), sum_rows, gather_rows, self.group)
        return x if layer.bias is None else x + layer.bias.type_as(x)


def make_shares(model: GPT, training: TrainingConfig, device: torch.device) -> WeightShares:
    """Divides the model's blocks or its experts among processes, as set."""
    if training.tensor_processes > 1:
        return TensorParallel(model, training.tensor_processes, device)
    return ExpertParallel(model, training.expert_processes, device)


def check_tensor_processes(config: Config, dtype: str) -> None:
    """Raises UserError if the model or the processes can't be divided this way."""
    processes, model, compile_setting = config.training.tensor_processes, config.model, config.training.compile
    if processes == 1:
        return
    setting = f"tensor_processes = {processes}"
    if WORLD_SIZE % processes:
        raise UserError(
            f"{setting} does not divide the number of processes, {WORLD_SIZE}: start {processes} with torchrun "
            f"--nproc_per_node={processes}, or set tensor_processes = 1"
        )
    divided = {"n_head": model.n_head, "n_kv_head": model.kv_heads, "mlp_size": model.mlp_width}
    for name, size in divided.items():
        if size % processes:
            raise UserError(f"{setting} does not divide {name} = {size}")
    obstacles = {  # masks by head or by sequence are those of a whole model's heads and of a process's own sequences
        f"n_experts = {model.n_experts}, for which there is expert_processes": model.n_experts,
        f"mixer = {model.mixer}": model.mixer == "lstm",
        "positions = alibi": model.positions == "alibi",
        f"attention_band = {model.attention_band}": model.attention_band,
        "document_mask": config.data.document_mask,
        "dtype = float16": dtype == "float16",
        f"compile = {compile_setting}": compile_setting not in ("auto", False),
    }
    for obstacle in (name for name, applies in obstacles.items() if applies):
        raise UserError(f"{setting} doesn't suit {obstacle}: leave out one of the two")
