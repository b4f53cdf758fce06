"""Estimates what training costs: FLOPs, memory, and the peak FLOPs of the hardware."""

import math
import re
import time
from typing import NamedTuple

import torch
from torch import nn

from gpt_arc.nn.head_loss import logits_at_once
from gpt_arc.nn.names import Checkpointing
from model import GPT, GPTConfig


class Accelerator(NamedTuple):
    """Peak FLOPs per second of dense matrix products, and what decides which types of numbers a GPU multiplies."""

    half: float  # 16-bit, with float32 accumulation
    tf32: float | None  # float32's where products in TF32 are computed in float32; None: not known
    single: float  # float32
    capability: tuple[int, int]  # compute capability; of AMD's, the NVIDIA generation's with the same types

    @property
    def native_dtype(self) -> str:
        """The fastest type of 16 bits that it multiplies natively."""
        return "bfloat16" if self.capability >= (8, 0) else "float16"

    def peak(self, dtype: str) -> float | None:
        """Returns the peak FLOPs per second of products in `dtype`; None if it isn't known."""
        if dtype == "bfloat16" and self.native_dtype == "float16":
            return None
        return {"float32": self.single, "tf32": self.tf32}.get(dtype, self.half)


# From NVIDIA's and AMD's data sheets, and for RTX from the white papers on the architectures; where a sheet states a
# figure for sparse matrices alone, half of it. V100 and T4 have no TF32, and the MI250X's sheet has no figure for it.
# Keys match whole words of the device's name; the first match counts.
ACCELERATORS = {
    "H200 NVL": Accelerator(835e12, 417.5e12, 60e12, (9, 0)),
    "H200": Accelerator(989e12, 494.5e12, 67e12, (9, 0)),
    "H100 NVL": Accelerator(835e12, 417.5e12, 60e12, (9, 0)),
    "H100 PCIe": Accelerator(756e12, 378e12, 51e12, (9, 0)),
    "H100": Accelerator(989e12, 494.5e12, 67e12, (9, 0)),
    "H800": Accelerator(989e12, 494.5e12, 67e12, (9, 0)),
    "H20": Accelerator(148e12, 74e12, 44e12, (9, 0)),
    "A100": Accelerator(312e12, 156e12, 19.5e12, (8, 0)),
    "A800": Accelerator(312e12, 156e12, 19.5e12, (8, 0)),
    "A40": Accelerator(149.7e12, 74.8e12, 37.4e12, (8, 6)),
    "L40S": Accelerator(362e12, 183e12, 91.6e12, (8, 9)),
    "L40": Accelerator(181e12, 90.5e12, 90.5e12, (8, 9)),
    "L4": Accelerator(121e12, 60e12, 30.3e12, (8, 9)),
    "A10": Accelerator(125e12, 62.5e12, 31.2e12, (8, 6)),
    "V100": Accelerator(125e12, 15.7e12, 15.7e12, (7, 0)),
    "T4": Accelerator(65e12, 8.1e12, 8.1e12, (7, 5)),
    "MI300X": Accelerator(1307e12, 653.7e12, 163.4e12, (8, 9)),
    "MI325X": Accelerator(1307e12, 653.7e12, 163.4e12, (8, 9)),
    "MI250X": Accelerator(383e12, None, 95.7e12, (8, 0)),
    "RTX 5090": Accelerator(209.5e12, 104.8e12, 104.8e12, (12, 0)),
    "RTX 4090": Accelerator(165.2e12, 82.6e12, 82.6e12, (8, 9)),
    "RTX 3090": Accelerator(71e12, 35.6e12, 35.6e12, (8, 6)),
    "GB200": Accelerator(2500e12, 1250e12, 80e12, (10, 0)),
    "B200": Accelerator(2250e12, 1125e12, 75e12, (10, 0)),
    "GH200": Accelerator(989e12, 494.5e12, 67e12, (9, 0)),
}


def describe_parameters(model: nn.Module, noun: str = "") -> str:
    """Returns the number of parameters, heads included, for plans: "284,057,088, 114,187,776 active".

    The second number, only for a mixture of experts, counts the parameters that a token uses. `noun` follows the first.
    """
    total = sum(p.numel() for p in model.parameters())
    mixtures = [module for module in model.modules() if isinstance(module, GPT) and module.config.n_experts]
    idle = sum(mixture.num_parameters() - mixture.num_parameters(active=True) for mixture in mixtures)
    return f"{total:,}{noun}" + (f", {total - idle:,} active" if idle else "")


def flops_per_token(model: GPT) -> int:
    """Returns the FLOPs of a training step per token, forward and backward (PaLM, arXiv:2204.02311, app. B).

    Six per weight of the matrix products that a token goes through, head included, plus 12 H D T for each layer's
    attention. T is 2W keys in layers with banded attention of width W, and its sinks. An LSTM has no such products. The
    head of next sentences is left out: it reads one token of a row.
    """
    config = model.config
    weights = config.vocab_size * config.n_embd  # of the head
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head" and not name.startswith("pair_head"):
            weights += module.weight.numel()
        elif isinstance(module, nn.LSTM):
            weights += sum(p.numel() for p in module.parameters() if p.dim() == 2)
    weights += config.experts_per_token * sum(e.up[0].numel() + e.projection[0].numel() for e in model.experts)
    if config.mixer == "lstm":
        return 6 * weights
    banded = 0 if config.attention_band is None else config.n_layer // 2
    band_keys = min(2 * (config.attention_band or 0) + config.attention_sinks, config.block_size)
    keys = (config.n_layer - banded) * config.block_size + banded * band_keys  # per query, summed over layers
    return 6 * weights + 12 * config.n_head * config.head_width * keys


def memory_estimate(
    model: GPT,
    sequences: int,
    dtype: str,
    device: str = "cpu",
    checkpointing: Checkpointing = False,
    expert_processes: int = 1,
    tensor_processes: int = 1,
    compiled: bool = False,
    offloaded: bool = False,
    averaged: bool = False,
) -> int:
    """Estimates the bytes that training needs in one process.

    `expert_processes` divide the experts, or `tensor_processes` the matrices of the blocks.

    A parameter takes 16 bytes: float32 weight, gradient and AdamW's two moments, which may be `offloaded`; 4 more if
    the weights' moving average is kept. For the backward pass a layer keeps about 9 C values per token, plus 2 M for
    its MLP, or 4 M if gated (Korthikanti et al., arXiv:2205.05198: 34 C bytes in 16 bits for M = 4 C, without the
    attention matrix, which is recomputed). An expert keeps 2 C more for its copies of the token. With activation
    checkpointing, and on a CPU where the model isn't `compiled`, see `activation_bytes`. The head keeps three copies of
    the logits that it computes at once; compiled for a GPU, two in 16 bits. ALiBi's biases, H T T, are shared by all
    layers.
    """
    config: GPTConfig = model.config
    size = 4 if dtype in ("float32", "tf32") else 2
    tokens = sequences * config.block_size
    eager = device == "cpu" and not compiled
    kept, passing = activation_bytes(config, tokens, size, checkpointing, tensor_processes, eager)
    chunks = math.ceil(tokens * config.vocab_size / logits_at_once(device))
    logits = math.ceil(tokens / max(chunks, 1)) * config.vocab_size
    logits *= 2 * size if compiled and device == "cuda" else size + 8
    experts = sum(p.numel() for e in model.experts for p in e.parameters(recurse=False))
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    in_other_processes = experts * (1 - 1 / expert_processes) + matrices * (1 - 1 / tensor_processes)
    biases = 4 * config.n_head * config.block_size**2 if config.positions == "alibi" else 0
    weights = ((8 if offloaded else 16) + 4 * averaged) * int(model.num_parameters() - in_other_processes)
    return weights + kept + max(logits, passing) + biases  # the logits are gone when the layers' backward pass begins


def activation_bytes(
    config: GPTConfig,
    tokens: int,
    size: int,
    checkpointing: Checkpointing,
    tensor_processes: int = 1,
    eager: bool = False,
) -> tuple[int, int]:
    """Returns the bytes that the layers keep of `tokens` tokens for the backward pass, and what one has only there.

    Values have `size` bytes. With checkpointing a layer keeps its input, in float32; selective: also queries, keys,
    values, attention's output, and the outputs of both projections. It recomputes the others. With `tensor_processes` a
    layer keeps the inputs of both sublayers for the tokens of all of them. `eager` is a CPU without compilation, where
    the gradients of the MLP's first product are alive beside all that a layer keeps. In 16 bits such a CPU keeps more
    than this: attention's matrix (see `attend_by_products`), and norms in float32.
    """
    gathered = 2 * config.n_embd * (tensor_processes - 1)
    layers = [tokens * size * (values + gathered) for values in layer_activations(config, eager)]
    gradients = tokens * size * max(mlp_activations(config)) // 2 if eager else 0
    if not checkpointing:
        return sum(layers), gradients
    attention = 2 * (config.n_head + config.kv_heads) * config.head_width if checkpointing == "selective" else 0
    outputs = 2 * config.n_embd if checkpointing == "selective" else 0
    kept = config.n_layer * tokens * (4 * config.n_embd + size * (attention + outputs))
    recomputed = max(layers) - (tokens * size * attention if eager else 0)
    return kept, recomputed + gradients


def layer_activations(config: GPTConfig, eager: bool = False) -> list[int]:
    """How many values per token each layer keeps for its backward pass, see `memory_estimate`.

    `eager`: on a CPU without compilation, an RMSNorm keeps its input also normalised, and queries and keys that are
    normed or rotated are kept as they were, too, because the values are a part of the same tensor.
    """
    outside = 9 * config.n_embd
    if eager:
        normed = config.norm == "rmsnorm"
        heads = (config.n_head + config.kv_heads) * config.head_width
        outside += 2 * config.n_embd * normed
        outside += heads * ((config.qk_norm or config.positions == "rotary") + (config.qk_norm and normed))
    return [outside + mlp for mlp in mlp_activations(config)]


def mlp_activations(config: GPTConfig) -> list[int]:
    """How many values per token each layer's MLP or experts keep for the backward pass."""
    width, mlp = config.n_embd, config.mlp_width * (4 if config.gated else 2)
    experts = config.experts_per_token * (mlp + 2 * width) + config.shared_experts * mlp
    return [experts if config.has_experts(i) else mlp for i in range(config.n_layer)]


def peak_flops(device: torch.device, name: str, dtype: str) -> float | None:
    """Returns peak matrix-product FLOPs per second: from the table for a GPU, measured for a CPU, None if unknown."""
    if device.type == "cpu":
        return measured_flops(getattr(torch, dtype))
    if device.type == "cuda":
        for key, accelerator in ACCELERATORS.items():
            if re.search(rf"\b{key}\b", name):
                return accelerator.peak(dtype)
    return None


def measured_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.15) -> float:
    """Measures the best rate of multiplying two (size, size) matrices on the CPU, in FLOPs per second."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(a, b)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return 2 * size**3 / best
