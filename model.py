"""The GPT: one configuration, one block and one model for every generation.

GPT-1, GPT-2, GPT-3 and their modern descendants differ in where the norm stands, how positions are encoded, which
activation the MLP uses and whether the head is tied. Each difference is one field of `GPTConfig`
(gpt_arc/model_config.py); nothing is forked or subclassed. Read from the top: the parts of a block, the block, the
model. Kernels and mixtures of experts are in gpt_arc/nn.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65))
    logits = model(tokens)              # (B, T) int64 -> (B, T, V)
    loss = model(tokens, targets)       # loss.total / loss.count is the mean cross-entropy in nats

Shapes: B batch, T time, C n_embd, H query heads, K key/value heads, D head size, M MLP width, E experts, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt_arc.model_config import GPTConfig
from gpt_arc.nn.attention import KVCache, Mask, Packed, attend, bidirectional_mask, positions_and_masks
from gpt_arc.nn.cross_attention import CrossAttention, EncoderStates
from gpt_arc.nn.experts import Experts, Routing, router_losses
from gpt_arc.nn.functional import Dropout, RMSNorm, activate, ngram_ids, put_images, rotate, sinusoids
from gpt_arc.nn.head_loss import IGNORED, HeadLoss
from gpt_arc.nn.lstm import LSTMMixer
from gpt_arc.nn.names import Activation, Checkpointing
from gpt_arc.nn.next_sentence import PairHead, next_sentence_sums
from gpt_arc.nn.positions import rotary_waves
from gpt_arc.nn.recompute import recomputed


class Loss(NamedTuple):
    """What `GPT.forward` returns with targets: sums, so that means stay exact over micro-batches and ranks."""

    total: Tensor  # () sum of cross-entropies in nats over the scored targets
    count: Tensor  # () int64, number of scored targets
    auxiliary: dict[str, Tensor]  # further loss terms by name, each () and weighted, such as those of routers
    sentences: Tensor | None = None  # (3,) of next sentences: see `next_sentence_sums`


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    """Self-attention; `qkv` stacks H query heads, then K key heads, then K value heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        heads, kv_heads, size = config.n_head, config.kv_heads, config.head_width
        self.qkv = nn.Linear(config.n_embd, (heads + 2 * kv_heads) * size, bias=config.bias)
        self.query_norm = make_norm(config, size) if config.qk_norm else nn.Identity()
        self.key_norm = make_norm(config, size) if config.qk_norm else nn.Identity()
        self.projection = nn.Linear(heads * size, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout_of("residual"))

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Mask, cache: KVCache | None = None
    ) -> Tensor:
        config = self.config
        heads, kv_heads = config.n_head, config.kv_heads
        qkv = self.qkv(x).unflatten(-1, (heads + 2 * kv_heads, config.head_width)).transpose(1, 2)  # (B, H+2K, T, D)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.add(key, value)
            query = query.type_as(key)
        dropout = config.dropout_of("attention") if self.training else 0.0
        mixed = attend(query, key, value, mask, dropout, config.attention == "causal")
        return self.dropout(self.projection(mixed.type_as(qkv).transpose(1, 2).flatten(2)))  # (B, T, C)


class MLP(nn.Module):
    """Two linear layers around the activation; for a gated one (arXiv:2002.05202) `up` stacks gate, then value."""

    def __init__(self, config: GPTConfig, width: int):
        super().__init__()
        self.activation: Activation = config.activation
        self.up = nn.Linear(config.n_embd, 2 * width if config.gated else width, bias=config.bias)
        self.projection = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout_of("residual"))

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor shaped like x (..., C)."""
        return self.dropout(self.projection(activate(self.up(x), self.activation)))


def make_experts(config: GPTConfig) -> Experts:
    shared = MLP(config, config.shared_experts * config.mlp_width) if config.shared_experts else None
    return Experts(config, shared)


class Block(nn.Module):
    """One layer of the Transformer: attention, then the MLP, each with its norm and residual connection.

    Between them, with an encoder, cross-attention to a source.
    """

    def __init__(self, config: GPTConfig, number: int = 0):
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.attention_norm = make_norm(config, config.n_embd)
        self.attention = LSTMMixer(config) if config.mixer == "lstm" else Attention(config)
        if config.encoder_layers:
            self.cross_norm = make_norm(config, config.n_embd)
            self.cross = CrossAttention(config)
        self.mlp_norm = make_norm(config, config.n_embd)
        self.mlp = make_experts(config) if config.has_experts(number) else MLP(config, config.mlp_width)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Mask,
        cache: KVCache | None = None,
        *real: Tensor,
        source: EncoderStates | None = None,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Returns x (B, T, C) after the layer; a block with experts, in training, also its `Routing`.

        `real` (B, T), for experts only, is False for padding. `source` is for cross-attention.
        """
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x, rotary, mask, cache))
            if source is not None:
                x = self.cross_norm(x + self.cross(x, source))
            mixed = self.mlp(x, *real)
        else:
            x = x + self.attention(self.attention_norm(x), rotary, mask, cache)
            if source is not None:
                x = x + self.cross(self.cross_norm(x), source)
            mixed = self.mlp(self.mlp_norm(x), *real)
        mixed, *routing = mixed if isinstance(mixed, tuple) else (mixed,)
        x = self.mlp_norm(x + mixed) if self.post_norm else x + mixed
        return (x, *routing) if routing else x


class GPT(nn.Module):
    """Embeddings, `n_layer` blocks, a head.

    `hidden(tokens)` is the trunk, which other heads wrap, and `logits(hidden)` the language-model head. `model(tokens)`
    is both, and `model(tokens, targets)` their loss.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing: Checkpointing = False  # recompute blocks in the backward pass, to save memory
        self.prefix_attention = False  # tokens of an image see each other both ways: see `VisionGPT`
        self.residual_dtype: torch.dtype | None = None  # of the residual stream under autocast; None: the embeddings'
        self.routings: list[Routing] = []  # of the last forward pass in training, one per block with experts
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        if config.ngrams > 1:
            self.ngram_embedding = nn.Embedding((config.ngrams - 1) * config.ngram_rows, config.n_embd)
        if config.token_types:
            self.type_embedding = nn.Embedding(config.token_types, config.n_embd)
        self.embedding_norm = make_norm(config, config.n_embd) if config.embedding_norm else nn.Identity()
        self.dropout = Dropout(config.dropout_of("embedding"))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        if config.encoder_layers:
            reads = replace(config, encoder_layers=0, attention="bidirectional", attention_band=None)
            self.encoder = nn.ModuleList(Block(reads) for _ in range(config.encoder_layers))
            self.encoder_norm = nn.Identity() if config.norm_position == "post" else make_norm(config, config.n_embd)
        self.final_norm = nn.Identity() if config.norm_position == "post" else make_norm(config, config.n_embd)
        if config.head_transform:
            self.head_layer = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
            self.head_norm = make_norm(config, config.n_embd)
        if config.next_sentence:
            self.pair_head = PairHead(config.n_embd, config.bias)
        if not config.tied_head:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size)) if config.head_bias else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the initial weights; norms start as the identity, biases at 0.

        gpt1: openai/finetune-transformer-lm train.py:106. gpt2: openai/gpt-2 src/model.py:50,152, with the residual
        projections scaled by 1/sqrt(N) as in the paper, where N = 2 n_layer is the number of residual layers.
        base_width: matrices over the square root of the width, the head over the width (arXiv:2203.03466, table 3).
        """
        as_gpt2 = self.config.init == "gpt2"
        std = 0.02 * math.sqrt(self.config.width_ratio)
        residual_std = std / math.sqrt(2 * self.config.n_layer) if as_gpt2 else std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                head_std = 0.02 * self.config.width_ratio
                is_residual = name.endswith("projection")
                nn.init.normal_(module.weight, std=head_std if name == "head" else residual_std if is_residual else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                nn.init.normal_(module.up, std=std)
                nn.init.normal_(module.projection, std=residual_std)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.01 if as_gpt2 and name == "position_embedding" else 0.02)
        if self.head_bias is not None:
            nn.init.zeros_(self.head_bias)

    def embed(
        self,
        tokens: Tensor,
        positions: Tensor,
        previous: Tensor | None = None,
        images: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (B, T, C) of tokens (B, T) at positions (T,) or (B, T); `previous`: see `ngram_ids`.

        With `images` (N, C), a token below 0 isn't text: -1 - i stands for row i of them. `types` (B, T) are the
        tokens' types; None: all 0.
        """
        config = self.config
        x = self.token_embedding(tokens if images is None else tokens.clamp(min=0))
        if config.embedding_scale != 1:
            x = x * config.embedding_scale
        if images is not None:
            x = put_images(x, tokens, images)
        if config.ngrams > 1:
            ids = ngram_ids(tokens, positions, previous, config.ngrams, config.ngram_rows)
            x = x + self.ngram_embedding(ids).sum(-2)
        if config.positions == "learned":
            x = x + self.position_embedding(positions)
        elif config.positions == "sinusoidal":
            cosines, sines = sinusoids(positions, config.n_embd, 10_000.0)
            x = x + torch.cat((sines, cosines), dim=-1).type_as(x)
        if config.token_types:
            x = x + self.type_embedding(torch.zeros_like(tokens) if types is None else types)
        return self.dropout(self.embedding_norm(x))

    def encode(self, tokens: Tensor, lengths: Tensor | None = None) -> EncoderStates:
        """Reads sources (B, S), of which `lengths` (B,) tokens precede the padding, for `hidden`.

        Raises ValueError for more than block_size tokens.
        """
        if tokens.size(1) > self.config.block_size:
            raise ValueError(f"a source has {tokens.size(1)} tokens, and block_size = {self.config.block_size}")
        positions = torch.arange(tokens.size(1), device=tokens.device)
        mask = bidirectional_mask(tokens, None, lengths)
        x, rotary = self.embed(tokens, positions), rotary_waves(self.config, positions, lengths)
        for block in self.encoder:
            x = block(x, rotary, mask)
        return EncoderStates(self.encoder_norm(x), None if mask is None else mask[:, :, :1])

    def hidden(
        self,
        tokens: Tensor,
        documents: Tensor | Packed | None = None,
        cache: Sequence[KVCache] | None = None,
        previous: Tensor | None = None,
        lengths: Tensor | None = None,
        images: Tensor | None = None,
        types: Tensor | None = None,
        source: EncoderStates | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) before the head. Raises ValueError for more than block_size tokens.

        `documents` (B, T) gives the document of each token, as any number that changes at document boundaries, or is
        `packed`: positions restart in each document, and attention stays within it. `cache`, one per block, continues
        tokens read before; `documents` is None then, and `previous` holds the preceding tokens that n-grams need.
        `lengths` (B,) is the number of tokens in each row before its padding, which routers leave out of their
        statistics, bidirectional attention doesn't see and dynamic rotary scaling depends on. `images` and `types`: see
        `embed`. With an encoder, `source` is what `encode` returned.
        """
        config = self.config
        if (source is None) != (config.encoder_layers == 0):
            raise ValueError(f"encoder_layers = {config.encoder_layers}: a source goes with an encoder")
        if tokens.size(1) > config.block_size:
            raise ValueError(f"{tokens.size(1)} tokens are more than the context, block_size = {config.block_size}")
        prefix = self.prefix_attention and images is not None and len(images) > 0
        dropout = config.dropout_of("attention") if self.training else 0.0
        positions, masks = positions_and_masks(config, tokens, documents, cache, lengths, dropout, prefix)
        x, rotary = self.embed(tokens, positions, previous, images, types), rotary_waves(config, positions, lengths)
        routings = []
        if self.residual_dtype is not None and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.residual_dtype)
        real = () if lengths is None else (torch.arange(tokens.size(1), device=tokens.device) < lengths[:, None],)
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                block = recomputed(block, self.activation_checkpointing, config.mlp_width)
            padding = real if config.has_experts(i) else ()
            x = block(x, rotary, masks[i % 2], None if cache is None else cache[i], *padding, source=source)
            if isinstance(x, tuple):  # experts, in training
                x, routing = x
                routings.append(routing)
        self.routings = routings
        return self.final_norm(x)

    @property
    def head_weight(self) -> Tensor:
        return self.token_embedding.weight if self.config.tied_head else self.head.weight

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the output matrix reads of hidden states (..., C), shaped like them."""
        if not self.config.head_transform:
            return hidden
        return self.head_norm(activate(self.head_layer(hidden), self.config.activation))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        return F.linear(self.head_input(hidden), self.head_weight, self.head_bias)

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum () of the cross-entropies in nats of hidden states (B, T, C) at targets (B, T); -1 isn't scored.

        `weights` (B, T) multiply the cross-entropies.
        """
        weights = None if weights is None else weights.flatten()
        inputs = self.head_input(hidden).flatten(0, 1), self.head_weight, self.head_bias, targets.flatten(), weights
        return HeadLoss.apply(*inputs, torch.is_grad_enabled())

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | Packed | None = None,
        lengths: Tensor | None = None,
        images: Tensor | None = None,
        types: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | Loss:
        """Logits (B, T, V) of tokens (B, T) int64; with targets (B, T) int64, where -1 isn't scored, their `Loss`.

        `documents` confines attention to documents, and `lengths` tells where padding begins: see `hidden`; `images`
        are embeddings that tokens stand for, and `types` the tokens' types: see `embed`. `labels` (B,) are scored
        beside targets: 0 where the second text of a pair follows the first, 1 where it doesn't, -1 where none is.
        """
        hidden = self.hidden(tokens, documents, lengths=lengths, images=images, types=types)
        if targets is None:
            return self.logits(hidden)
        auxiliary, sentences = self.router_losses(), None
        if labels is not None:
            sentences = next_sentence_sums(self.pair_head(hidden), labels)
            auxiliary["next_sentence"] = sentences[0] / sentences[2].clamp(min=1)
        return Loss(self.loss(hidden, targets), (targets != IGNORED).sum(), auxiliary, sentences)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "routings": []}  # they hold a graph, which can't be copied

    @property
    def experts(self) -> list[Experts]:
        return [block.mlp for block in self.blocks if isinstance(block.mlp, Experts)]

    def router_losses(self) -> dict[str, Tensor]:
        """The routers' losses () in the last forward pass, by name; {} for dense models and in evaluation."""
        return router_losses(self.routings, self.config.balance_loss, self.config.router_z_loss)

    def num_parameters(self, embeddings: bool = True, active: bool = False) -> int:
        """Number of trained values, a tied head counted once.

        Without `embeddings`, leaves out all tables and the head, as scaling laws do (arXiv:2001.08361). `active`: count
        only as many experts as a token uses.
        """
        total = sum(p.numel() for p in self.parameters())
        if active:
            total -= sum(experts.idle_parameters for experts in self.experts)
        if embeddings:
            return total
        ends = ("token_embedding", "position_embedding", "ngram_embedding", "type_embedding", "head", "pair_head")
        return total - sum(p.numel() for name, p in self.named_parameters() if name.startswith(ends))
