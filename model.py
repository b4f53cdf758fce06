"""The GPT: one configuration, one block and one model for every generation.

GPT-1, GPT-2, GPT-3 and their modern descendants differ in where the norm stands, how positions are
encoded, which activation the MLP uses and whether the head is tied. Each difference is one field of
`GPTConfig`; nothing is forked or subclassed. Read from the top: configuration, the parts of a block,
the block, the model. What they are written in, and how the hardware at hand computes it fastest, is in ops.py.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65))
    logits = model(tokens)              # (B, T) int64 -> (B, T, V)
    loss = model(tokens, targets)       # loss.total / loss.count is the mean cross-entropy in nats

Shapes: B batch, T time, C n_embd, H query heads, K key/value heads, D head size, M MLP width, E experts, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

import ops
from ops import IGNORED, Dropout, HeadLoss, KVCache


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. Impossible combinations raise ValueError; None means "derived", see the properties."""

    block_size: int = 1024
    """Context length in tokens."""
    vocab_size: int = 50257
    """Number of token ids. A prepared dataset that differs replaces it."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Query heads per attention layer."""
    n_embd: int = 768
    """Width of the residual stream."""
    n_kv_head: int | None = None
    """Key/value heads, each shared by n_head / n_kv_head query heads (grouped-query attention). None: n_head."""
    head_size: int | None = None
    """Width of one attention head. None: n_embd / n_head."""
    mlp_size: int | None = None
    """Hidden width of the MLP. None: 4 n_embd; for swiglu, whose MLP has three matrices, 8/3 n_embd."""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: x + f(norm(x)) and a final norm (GPT-2, GPT-3). post: norm(x + f(x)), no final norm (GPT-1)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of every norm in the model."""
    norm_eps: float = 1e-5
    """Added to the variance inside every norm."""
    positions: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """How a token knows its place: a trained table, fixed sinusoids, or rotated queries and keys."""
    rotary_base: float = 10_000.0
    """Wavelength base of rotary positions (RoFormer, arXiv:2104.09864)."""
    attention_band: int | None = None
    """Every second block sees this many latest positions only, its own included (GPT-3). None: all see everything."""
    activation: Literal["gelu_tanh", "gelu", "relu", "relu_squared", "swiglu"] = "gelu_tanh"
    """The MLP's non-linearity. GPT-1 and GPT-2 as released use the tanh form of GELU; gelu is the erf form."""
    bias: bool = True
    """Biases in linear layers and layer norms."""
    tied_head: bool = True
    """Use the token embedding as the output matrix."""
    head_bias: bool = False
    """A bias on the output logits."""
    n_experts: int = 0
    """Experts in the MLP of a block, each of which sees some of the tokens (mixture of experts). 0: one MLP for all."""
    experts_per_token: int = 2
    """How many experts a token is sent to."""
    expert_interval: int = 1
    """Every so many-th block has experts, the others one MLP (2 in Switch, arXiv:2101.03961)."""
    shared_experts: int = 0
    """Further experts that see every token, without a gate (arXiv:2401.06066)."""
    expert_selection: Literal["top", "drawn"] = "top"
    """top: a token goes to the experts of its largest gates. drawn: in training to experts drawn by their gates."""
    capacity_factor: float | None = None
    """Tokens that an expert takes of a training batch at most, as a multiple of an even share; for those beyond there
    is the residual stream alone. None: all that come, as in evaluation always."""
    router_jitter: float = 0.0
    """In training the router's inputs are multiplied by random numbers from 1 - this to 1 + this."""
    expert_dropout: float = 0.0
    """Dropout inside the experts, between their two layers (.4 in Switch's fine-tuning)."""
    balance_loss: float = 0.01
    """Weight of the loss that asks for equal use of experts (Switch's .01)."""
    router_z_loss: float = 0.001
    """Weight of the loss that keeps the router's logits small (ST-MoE's .001, arXiv:2202.08906)."""
    balance_rate: float = 0.0
    """Balance by a bias of the experts' choice that moves by this an update (.001 in arXiv:2408.15664). 0: none."""
    qk_norm: bool = False
    """Norm every query and key head before attention (arXiv:2302.05442, Qwen3)."""
    ngrams: int = 1
    """Longest run of tokens, that which is read its last, with an embedding beside the token's. 1: tokens alone."""
    ngram_rows: int = 32_768
    """Rows of the table for each length of such runs, which share them by a hash."""
    dropout: float = 0.0
    """Dropout wherever the three settings below leave it to this one."""
    embedding_dropout: float | None = None
    """Dropout on the sum of token and position embeddings. None: dropout."""
    attention_dropout: float | None = None
    """Dropout on attention weights. None: dropout."""
    residual_dropout: float | None = None
    """Dropout on each sublayer's output before it joins the residual stream. None: dropout."""
    init: Literal["gpt1", "gpt2"] = "gpt2"
    """gpt1: every weight N(0, .02). gpt2: also positions N(0, .01) and residual projections over sqrt(2 n_layer)."""

    def __post_init__(self):
        sizes = "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "expert_interval", "ngrams", "ngram_rows"
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.ngrams > self.block_size:
            raise ValueError(f"ngrams = {self.ngrams} are longer than the context, block_size = {self.block_size}")
        for name in ("n_kv_head", "head_size", "mlp_size", "attention_band"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1, or left out")
        for name in ("n_experts", "shared_experts", "balance_loss", "router_z_loss", "balance_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be zero or more, and finite")
        if self.n_experts and self.expert_interval > self.n_layer:
            raise ValueError(f"expert_interval = {self.expert_interval} leaves {self.n_layer} blocks without experts")
        if self.n_experts and not 1 <= self.experts_per_token <= self.n_experts:
            raise ValueError(f"experts_per_token = {self.experts_per_token} must lie between 1 and n_experts")
        if self.balance_rate and self.expert_selection == "drawn":
            raise ValueError("balance_rate moves the choice of the largest gates: it has no say in what is drawn")
        rates = "embedding_dropout", "attention_dropout", "residual_dropout", "expert_dropout", "router_jitter"
        for name in ("dropout", *rates):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must lie in [0, 1)")
        for name in ("norm_eps", "rotary_base", "capacity_factor"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive, and finite")
        for field in fields(self):
            choices = get_args(field.type) if get_origin(field.type) is Literal else ()
            if choices and getattr(self, field.name) not in choices:
                raise ValueError(f"{field.name} = {getattr(self, field.name)!r} must be one of {', '.join(choices)}")
        if self.head_size is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_head = {self.n_head} does not divide n_embd = {self.n_embd}: change one, or state head_size"
            )
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head = {self.n_kv_head} does not divide n_head = {self.n_head}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f'positions = "rotary" turns pairs of features: head size {self.head_width} must be even')
        if self.positions == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f'positions = "sinusoidal" needs pairs of features: n_embd = {self.n_embd} must be even')

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head if self.head_size is None else self.head_size

    @property
    def mlp_width(self) -> int:
        if self.mlp_size is not None:
            return self.mlp_size
        return 8 * self.n_embd // 3 if self.activation == "swiglu" else 4 * self.n_embd

    def has_experts(self, block: int) -> bool:
        return self.n_experts > 0 and (block + 1) % self.expert_interval == 0

    def dropout_of(self, place: Literal["embedding", "attention", "residual"]) -> float:
        own = getattr(self, f"{place}_dropout")
        return self.dropout if own is None else own


class Loss(NamedTuple):
    """What `GPT.forward` returns with targets: sums, so that means stay exact over micro-batches and ranks."""

    total: Tensor  # () sum of cross-entropies in nats over the targets that count
    count: Tensor  # () int64, how many targets that was
    auxiliary: dict[str, Tensor]  # further terms by name, each () and already weighted; empty for dense models


class RMSNorm(nn.RMSNorm):
    """torch's, with its weight in the input's type: under autocast the fused kernel would refuse two types."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    """Causal self-attention; `qkv` stacks H query heads, then K key heads, then K value heads."""

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
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | BlockMask | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        config = self.config
        heads, kv_heads = config.n_head, config.kv_heads
        qkv = self.qkv(x).unflatten(-1, (heads + 2 * kv_heads, config.head_width)).transpose(1, 2)  # (B, H+2K, T, D)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
        query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = ops.rotate(query, *rotary), ops.rotate(key, *rotary)
        if cache is not None:
            key, value = cache.add(key, value)
            query = query.type_as(key)
        mixed = ops.attend(query, key, value, mask, config.dropout_of("attention") if self.training else 0.0)
        return self.dropout(self.projection(mixed.type_as(qkv).transpose(1, 2).flatten(2)))  # (B, T, C)


def activate(x: Tensor, activation: str) -> Tensor:
    """The MLP's non-linearity on x (..., M); for swiglu on (..., 2M), gate and value."""
    match activation:
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "gelu":
            return F.gelu(x)
        case "relu":
            return F.relu(x)
        case "relu_squared":
            return F.relu(x).square()
        case "swiglu":
            gate, x = x.chunk(2, dim=-1)
            return F.silu(gate) * x
    raise AssertionError(activation)


class MLP(nn.Module):
    """Two linear layers around the activation; swiglu (arXiv:2002.05202) has a gate: `up` stacks gate, then value."""

    def __init__(self, config: GPTConfig, width: int):
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.n_embd, 2 * width if config.activation == "swiglu" else width, bias=config.bias)
        self.projection = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout_of("residual"))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Of x (..., C) as much; in the place of the `Routing` of `Experts` nothing."""
        return self.dropout(self.projection(activate(self.up(x), self.activation))), None


class Routing(NamedTuple):
    """What the router of a block did with a batch of training."""

    load: Tensor  # (E,) share of the choices that each expert got, overflow included; their sum is 1
    gates: Tensor  # (E,) mean probability of each expert
    z: Tensor  # () mean square of the logsumexp of the router's logits
    entropy: Tensor  # () mean entropy of the probabilities, in nats
    dropped: Tensor  # () share of the choices that an expert had no room for


class Experts(nn.Module):
    """MLPs of which each token takes k, those of its largest gates, and adds up by these (Mixtral, arXiv:2401.04088).

    Tokens are sorted by expert, so that each expert multiplies its own at once, however many there are. Of one expert
    the gate is its probability (Switch); the gates of several are made to add up to 1. The router is in float32 always.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        experts, width, inner = config.n_experts, config.n_embd, config.mlp_width
        up = 2 * inner if config.activation == "swiglu" else inner
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, up, width))
        self.projection = nn.Parameter(torch.empty(experts, width, inner))
        self.up_bias = nn.Parameter(torch.zeros(experts, up)) if config.bias else None
        self.projection_bias = nn.Parameter(torch.zeros(experts, width)) if config.bias else None
        self.shared = MLP(config, config.shared_experts * inner) if config.shared_experts else None
        self.inner_dropout, self.dropout = Dropout(config.expert_dropout), Dropout(config.dropout_of("residual"))
        if config.balance_rate:
            self.register_buffer("balance", torch.zeros(experts))
        self.exchange = None  # under expert parallelism what calls `compute` in the processes of the experts

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers (N, k) of the experts of x (N, C), their gates (N, k), and the router's logits (N, E)."""
        config, drawn = self.config, self.training and self.config.expert_selection == "drawn"
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.training and config.router_jitter:
                x = x * torch.empty_like(x).uniform_(1 - config.router_jitter, 1 + config.router_jitter)
            logits = F.linear(x, self.router.weight.type_as(x))
            probabilities = logits.softmax(-1)
            merits = probabilities.detach()
            if drawn:  # the largest of logits with Gumbel noise are a draw without replacement
                merits = logits.detach() - torch.empty_like(logits).exponential_().log()
            elif config.balance_rate:
                merits = merits + self.balance
            chosen = merits.topk(config.experts_per_token, dim=-1).indices
            gates = probabilities.gather(-1, chosen)
            if config.experts_per_token > 1:
                gates = gates / gates.sum(-1, keepdim=True)
        return chosen, gates, logits

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """Of x (..., C) as much, and in training the `Routing`."""
        config, inputs = self.config, x.flatten(0, -2)  # (N, C)
        chosen, gates, logits = self.route(inputs)
        experts, order = chosen.flatten().sort(stable=True)  # the choices, numbered token by token, expert by expert
        back = order.argsort()
        ends = torch.searchsorted(experts, torch.arange(config.n_experts, device=x.device), right=True)  # (E,)
        asked = taken = ends.diff(prepend=ends.new_zeros(1))
        compute = self.compute if self.exchange is None else partial(self.exchange, self.compute)
        outputs = compute(ops.take_rows(inputs, order, back), ends)
        if self.training and config.capacity_factor is not None:  # the first that come are taken
            room = math.ceil(min(config.capacity_factor * len(order) / config.n_experts, len(order)))
            place = torch.arange(len(order), device=x.device) - (ends - asked)[experts]
            gates, taken = gates * (place < room)[back].view_as(gates), asked.clamp(max=room)
        choices = ops.take_rows(outputs, back, order).unflatten(0, chosen.shape)  # (N, k, C)
        mixed = self.dropout((choices * gates[..., None].type_as(choices)).sum(1)).view(x.shape)
        mixed = mixed if self.shared is None else mixed + self.shared(x)[0]
        return mixed, self.report(asked, taken, logits) if self.training else None

    def compute(self, x: Tensor, ends: Tensor) -> Tensor:
        """Of rows x (N, C) as much: those before ends[0] are the first expert's, then up to ends[1] the second's ..."""
        hidden = activate(ops.grouped_linear(x, self.up, self.up_bias, ends), self.config.activation)
        return ops.grouped_linear(self.inner_dropout(hidden), self.projection, self.projection_bias, ends)

    @staticmethod
    def report(asked: Tensor, taken: Tensor, logits: Tensor) -> Routing:
        with torch.autocast(logits.device.type, enabled=False):
            logs, total = logits.log_softmax(-1), asked.sum()
            entropy = -(logs.detach().exp() * logs.detach()).sum(-1).mean()
            z = logits.logsumexp(-1).square().mean()
            return Routing(asked / total, logs.exp().mean(0), z, entropy, 1 - taken.sum() / total)


class Block(nn.Module):
    """One layer of the Transformer decoder: attention, then the MLP, each with its norm and residual connection."""

    def __init__(self, config: GPTConfig, number: int = 0):
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.attention_norm = make_norm(config, config.n_embd)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config, config.n_embd)
        self.mlp = Experts(config) if config.has_experts(number) else MLP(config, config.mlp_width)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | BlockMask | None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x, rotary, mask, cache))
            mixed, routing = self.mlp(x)
            return self.mlp_norm(x + mixed), routing
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache)
        mixed, routing = self.mlp(self.mlp_norm(x))
        return x + mixed, routing


class GPT(nn.Module):
    """Embeddings, `n_layer` blocks, a head.

    `hidden(tokens)` is the trunk that other heads wrap and `logits(hidden)` the language-model head; `model(tokens)`
    is both and `model(tokens, targets)` their loss.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # whether the backward pass computes blocks anew, to save memory
        self.routings: list[Routing] = []  # of the last forward pass, in training, of the blocks with experts
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        if config.ngrams > 1:
            self.ngram_embedding = nn.Embedding((config.ngrams - 1) * config.ngram_rows, config.n_embd)
        self.dropout = Dropout(config.dropout_of("embedding"))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.final_norm = nn.Identity() if config.norm_position == "post" else make_norm(config, config.n_embd)
        if not config.tied_head:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size)) if config.head_bias else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the initial weights; norms start as the identity, biases at 0.

        gpt1: openai/finetune-transformer-lm train.py:106. gpt2: openai/gpt-2 src/model.py:50,152, with the
        residual projections scaled by 1/sqrt(N) as the paper says, N = 2 n_layer being the residual layers.
        """
        as_gpt2 = self.config.init == "gpt2"
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if as_gpt2 and name.endswith("projection") else 0.02
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Experts):
                nn.init.normal_(module.up, std=0.02)
                nn.init.normal_(module.projection, std=0.02 / math.sqrt(2 * self.config.n_layer) if as_gpt2 else 0.02)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.01 if as_gpt2 and name == "position_embedding" else 0.02)
        if self.head_bias is not None:
            nn.init.zeros_(self.head_bias)

    def hidden(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) before the head. Raises ValueError for more than block_size tokens.

        `documents` (B, T) tells which document each token belongs to, by any number that changes where the next one
        begins: positions then count from the document's beginning, and attention doesn't look back beyond it.
        With `cache`, one of each block and all with the same positions, the tokens go on from those read before;
        there `documents` is None, and `previous` (B, T, ngrams - 1) the tokens before each, see `ops.run_rows`.
        """
        config, (batch, length) = self.config, tokens.shape
        if length > config.block_size:
            raise ValueError(f"{length} tokens are more than the context, block_size = {config.block_size}")
        positions = torch.arange(length, device=tokens.device)
        dropout = config.dropout_of("attention") if self.training else 0.0
        mask = banded = beginnings = None
        if documents is not None:
            begins = documents != F.pad(documents[:, :-1], (1, 0))
            beginnings = torch.where(begins, positions, 0).cummax(dim=1).values  # (B, T)
            mask = banded = ops.causal_mask(beginnings, None, dropout)
        if cache is not None and cache[0].positions is not None:
            positions, slots = cache[0].positions, torch.arange(cache[0].keys.size(2), device=tokens.device)
            mask = banded = (slots <= positions[..., None])[:, None]  # (B, 1, T, S)
            if config.attention_band is not None:
                banded = mask & (slots > positions[..., None] - config.attention_band)[:, None]
        elif config.attention_band is not None and config.attention_band < length:
            earliest = (positions - config.attention_band + 1).clamp(min=0).expand(batch, length)
            earliest = earliest if beginnings is None else torch.maximum(earliest, beginnings)
            banded = ops.causal_mask(earliest, config.attention_band, dropout)
        if beginnings is not None:
            positions = positions - beginnings

        x = self.token_embedding(tokens)
        if config.ngrams > 1:
            rows = ops.run_rows(tokens, positions, previous, config.ngrams, config.ngram_rows)
            x = x + self.ngram_embedding(rows).sum(-2)
        rotary = None
        if config.positions == "learned":
            x = x + self.position_embedding(positions)
        elif config.positions == "sinusoidal":  # sines in the first half, cosines in the second
            cosines, sines = ops.sinusoids(positions, config.n_embd, 10_000.0)
            x = x + torch.cat((sines, cosines), dim=-1).type_as(x)
        else:
            cosines, sines = ops.sinusoids(positions, config.head_width, config.rotary_base)
            rotary = cosines.unsqueeze(-3), sines.unsqueeze(-3)  # (..., 1, T, D / 2): alike for every head
        x = self.dropout(x)
        checkpointing, routings = self.activation_checkpointing and torch.is_grad_enabled(), []
        for i, block in enumerate(self.blocks):
            rest = rotary, banded if i % 2 else mask, None if cache is None else cache[i]
            x, routing = checkpoint(block, x, *rest, use_reentrant=False) if checkpointing else block(x, *rest)
            routings += [] if routing is None else [routing]
        self.routings = routings
        return self.final_norm(x)

    @property
    def head_weight(self) -> Tensor:
        return self.token_embedding.weight if self.config.tied_head else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        return F.linear(hidden, self.head_weight, self.head_bias)

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum () of the cross-entropies in nats of hidden states (B, T, C) at targets (B, T), where -1 is not scored.

        With `weights` (B, T) each is multiplied by its own.
        """
        weights = None if weights is None else weights.flatten()
        inputs = hidden.flatten(0, 1), self.head_weight, self.head_bias, targets.flatten(), weights
        return HeadLoss.apply(*inputs, torch.is_grad_enabled())

    def forward(self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor | Loss:
        """Logits (B, T, V) of tokens (B, T) int64; with targets (B, T) int64, where -1 is not scored, their `Loss`.

        `documents` confines attention to documents, see `hidden`.
        """
        hidden = self.hidden(tokens, documents)
        if targets is None:
            return self.logits(hidden)
        return Loss(self.loss(hidden, targets), (targets != IGNORED).sum(), self.router_losses())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "routings": []}  # a copy of the model needs none, and a graph can't be copied

    @property
    def experts(self) -> list[Experts]:
        return [block.mlp for block in self.blocks if isinstance(block.mlp, Experts)]

    def router_losses(self) -> dict[str, Tensor]:
        """The losses () of the routers in the last forward pass, summed over blocks and weighted; {} of evaluation.

        balance: E sum_e load_e gates_e, 1 where all experts are used alike (Switch, equation 4), the load being that of
        all processes together. z: see `Routing`.
        """
        config, losses = self.config, {}
        if config.balance_loss and self.routings:
            load = ops.mean_over_processes(torch.stack([r.load for r in self.routings]))
            balance = (load * torch.stack([r.gates for r in self.routings])).sum()
            losses["balance"] = balance * config.n_experts * config.balance_loss
        if config.router_z_loss and self.routings:
            losses["router_z"] = sum(r.z for r in self.routings) * config.router_z_loss
        return losses

    def num_parameters(self, embeddings: bool = True, active: bool = False) -> int:
        """Number of trained values, a tied head counted once; without `embeddings`, as scaling laws count them.

        `active`: of the experts only as many as a token takes.
        """
        total = sum(p.numel() for p in self.parameters())
        if active:
            idle = self.config.n_experts - self.config.experts_per_token
            own = ("up", "projection", "up_bias", "projection_bias")
            total -= sum(p[0].numel() * idle for e in self.experts for name, p in e.named_parameters() if name in own)
        if embeddings:
            return total
        tables = (module for name, module in self.named_children() if name.endswith("embedding"))
        return total - sum(table.weight.numel() for table in tables)
