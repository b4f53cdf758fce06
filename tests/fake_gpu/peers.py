"""Other trainers' models, from your checkouts, for `measure.peer`: the same counts of the same step."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Returns the loss of a model on tokens and targets.
Loss = Callable[[Tensor, Tensor], Tensor]


def nanogpt(checkout: Path, layers: int) -> tuple[nn.Module, Loss]:
    """karpathy/nanoGPT with the settings of its config/train_gpt2.py, its vocabulary padded as it pads it."""
    spec = importlib.util.spec_from_file_location("nanogpt", checkout / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(n_layer=layers, dropout=0.0, bias=False, vocab_size=50_304)
    model = module.GPT(config)
    return model, lambda tokens, targets: model(tokens, targets)[1]


def nanogpt_of_2022(checkout: Path, layers: int) -> tuple[nn.Module, Loss]:
    """The same before flash attention, as when its README's times were measured."""
    fused = F.scaled_dot_product_attention
    del F.scaled_dot_product_attention
    try:
        return nanogpt(checkout, layers)
    finally:
        F.scaled_dot_product_attention = fused


def nanochat(checkout: Path, layers: int) -> tuple[nn.Module, Loss]:
    """karpathy/nanochat at GPT-2's shape, with full attention in every layer."""
    sys.path.insert(0, str(checkout))
    module = importlib.import_module("nanochat.gpt")
    config = module.GPTConfig(
        sequence_len=1024, vocab_size=50_304, n_layer=layers, n_head=12, n_kv_head=12, n_embd=768, window_pattern="L"
    )
    model = module.GPT(config)
    model.init_weights()
    return model, lambda tokens, targets: model(tokens, targets)


def torchtitan(checkout: Path, layers: int) -> tuple[nn.Module, Loss]:
    """pytorch/torchtitan's Llama 3 at GPT-2's width, attention by document, its loss over all logits at once.

    Needs the package spmd-types.
    """
    sys.path.insert(0, str(checkout))
    from torchtitan.components.loss import cross_entropy_loss  # type: ignore[import-not-found]
    from torchtitan.models import llama3  # type: ignore[import-not-found]
    from torchtitan.models.common.attention import VarlenMetadata  # type: ignore[import-not-found]

    width, vocabulary = 768, 50_304
    blocks = llama3._build_llama3_layers(
        n_layers=layers, dim=width, n_heads=12, hidden_dim=2048, attn_backend="varlen",
        rope=llama3.ComplexRoPE.Config(dim=64, max_context_length=1024, theta=500_000),
    )  # fmt: skip
    model = llama3.Llama3Model.Config(
        dim=width, vocab_size=vocabulary, enable_weight_tying=True, layers=blocks,
        tok_embeddings=llama3.Embedding.Config(num_embeddings=vocabulary, embedding_dim=width),
        norm=llama3.RMSNorm.Config(normalized_shape=width),
        lm_head=llama3.Linear.Config(in_features=width, out_features=vocabulary),
    ).build()  # fmt: skip
    model.lm_head.weight = model.tok_embeddings.weight

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        rows, length = tokens.shape
        ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=tokens.device)
        positions = torch.arange(length, device=tokens.device).repeat(rows)
        logits = model(tokens.flatten(), positions, VarlenMetadata(ends, ends, length, length))
        return cross_entropy_loss(logits, targets.flatten())

    return model, loss_of
