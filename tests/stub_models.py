"""Models small or simple enough to know their outputs exactly."""

import math

import torch

from model import GPT, GPTConfig


def bigrams(table, block_size=16):
    """A GPT that predicts from the last token alone, with the probabilities of a table (from, to).

    Its block adds nothing, its token embeddings are unit vectors e, and its norm turns them into e / rms(e)."""
    size = len(table)
    config = GPTConfig(
        block_size=block_size, vocab_size=size, n_layer=1, n_head=1, n_embd=size, positions="rotary", norm="rmsnorm",
        bias=False, tied_head=False,
    )  # fmt: skip
    model = GPT(config).eval()
    with torch.no_grad():
        model.blocks[0].attention.projection.weight.zero_()
        model.blocks[0].mlp.projection.weight.zero_()
        model.token_embedding.weight.copy_(torch.eye(size))
        model.head.weight.copy_(table.log().T * math.sqrt(1 / size + config.norm_eps))
    return model


def counting_model(vocab: int, block_size: int) -> GPT:
    """A GPT that continues with the next token id: embeddings are unit vectors, the head shifts them by one."""
    model = GPT(GPTConfig(block_size, vocab, 1, 1, vocab, head_size=2, positions="rotary", tied_head=False, bias=False))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
        model.token_embedding.weight.copy_(torch.eye(vocab))
        model.head.weight.copy_(50 * torch.eye(vocab).roll(1, dims=0))
    return model
