"""What a run costs and how it goes: FLOPs, memory, the rate of the hardware, metrics.jsonl."""

import math
import re
import time

import torch
from torch import nn

from gpt_arc.nn.head_loss import logits_at_once
from model import GPT, GPTConfig

# Dense matrix products, in FLOPs a second: (16-bit with float32 accumulation, float32), from the makers' data sheets.
# A whole word of the device's name, the first match counting.
ACCELERATORS = {
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H100 NVL": (835e12, 60e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def describe_parameters(model: nn.Module, noun: str = "") -> str:
    """How many a model has, heads included, as plans tell it: "284,057,088, 114,187,776 active", the second being those
    that a token takes of a mixture of experts. `noun` follows the first."""
    total = sum(p.numel() for p in model.parameters())
    mixtures = [module for module in model.modules() if isinstance(module, GPT) and module.config.n_experts]
    idle = sum(mixture.num_parameters() - mixture.num_parameters(active=True) for mixture in mixtures)
    return f"{total:,}{noun}" + (f", {total - idle:,} active" if idle else "")


def flops_per_token(model: GPT) -> int:
    """Floating-point operations of a training step per token, forward and backward (PaLM, arXiv:2204.02311, app. B).

    Six per parameter that multiplies, of the experts those that a token takes, a tied head included, and 12 H D T for
    the attention of a layer, whose T is 2W keys in the layers that see a band of W.
    """
    config = model.config
    multiplying = model.num_parameters(embeddings=False, active=True)
    if config.tied_head:
        multiplying += config.vocab_size * config.n_embd
    banded = 0 if config.attention_band is None else config.n_layer // 2
    keys_of_band = min(2 * (config.attention_band or 0), config.block_size)
    keys = (config.n_layer - banded) * config.block_size + banded * keys_of_band  # that a query meets, over all layers
    return 6 * multiplying + 12 * config.n_head * config.head_width * keys


def memory_estimate(
    model: GPT,
    sequences: int,
    dtype: str,
    device: str = "cpu",
    checkpointing: bool = False,
    expert_processes: int = 1,
) -> int:
    """Bytes that training is estimated to take in one of the processes that share out the experts: 16 a parameter that
    it has, and what the backward pass keeps of `sequences`.

    A parameter has its float32 weight, gradient and AdamW's two moments. A layer keeps about 9 C values a token beside
    its MLP's 2 M, of swiglu 4 M (Korthikanti et al., arXiv:2205.05198: with M = 4 C 34 C bytes in 16 bits, without the
    attention matrix, which is recomputed), and an expert 2 C more for its copies of the token; with activation
    checkpointing one layer does, and the others their input. The head has three copies of as many logits as it computes
    at once.
    """
    config: GPTConfig = model.config
    size = 4 if dtype == "float32" else 2
    tokens, width = sequences * config.block_size, config.n_embd
    inner = config.mlp_width * (4 if config.activation == "swiglu" else 2)
    of_experts = config.experts_per_token * (inner + 2 * width) + config.shared_experts * inner
    layers = [9 * width + (of_experts if config.has_experts(i) else inner) for i in range(config.n_layer)]
    activations = tokens * (max(layers) * size + config.n_layer * 4 * width if checkpointing else sum(layers) * size)
    logits = min(tokens * config.vocab_size, logits_at_once(device))
    elsewhere = sum(p.numel() for e in model.experts for p in e.parameters(recurse=False)) * (1 - 1 / expert_processes)
    return 16 * int(model.num_parameters() - elsewhere) + activations + logits * (size + 8)


def peak_flops(device: torch.device, name: str, dtype: str) -> float | None:
    """Matrix-product FLOPs a second: from the table for an accelerator, measured for a CPU, None where not known."""
    if device.type == "cpu":
        return measured_flops(getattr(torch, dtype))
    if device.type == "cuda":
        for known, (half, single) in ACCELERATORS.items():
            if re.search(rf"\b{known}\b", name):
                return single if dtype == "float32" else half
    return None


def measured_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.15) -> float:
    """The best rate seen of products of two (size, size) matrices on the CPU, in FLOPs a second."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(a, b)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return 2 * size**3 / best
