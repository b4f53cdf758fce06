"""The configuration of a GPT. Nothing here imports torch."""

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from gpt_arc.nn.names import GATED, Activation, Stretch
from gpt_arc.nn.relations import check_relations
from gpt_arc.settings import STRICT, Count, Natural, NonNegative, Positive, Share


@dataclass(frozen=True, config=STRICT)
class GPTConfig:
    """The architecture. Impossible combinations raise ValueError; None means "derived", see the properties."""

    block_size: Count = 1024
    """Context length in tokens."""
    vocab_size: Count = 50257
    """Number of token ids. A prepared dataset of another size replaces it."""
    n_layer: Annotated[int, Ge(1), Le(1024)] = 12
    """Number of blocks."""
    n_head: Count = 12
    """Query heads per attention layer."""
    n_embd: Count = 768
    """Width of the residual stream."""
    n_kv_head: Count | None = None
    """Key/value heads, each shared by n_head / n_kv_head query heads (grouped-query attention). None: n_head."""
    head_size: Count | None = None
    """Width of one attention head. None: n_embd / n_head."""
    mlp_size: Count | None = None
    """Hidden width of the MLP. None: 4 n_embd; 8/3 n_embd if a gate (swiglu) gives the MLP a third matrix."""
    encoder_layers: Natural = 0
    """Blocks of an encoder that reads a source, whose states each block then also attends to (arXiv:1706.03762).
    0: none, a language model."""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: x + f(norm(x)) and a final norm (GPT-2, GPT-3). post: norm(x + f(x)), no final norm (GPT-1)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of every norm in the model."""
    norm_eps: Positive = 1e-5
    """Added to the variance inside every norm."""
    positions: Literal["learned", "sinusoidal", "rotary", "alibi", "none"] = "learned"
    """How positions are encoded: a trained table, fixed sinusoids, rotated queries and keys, or scores that fall with
    distance (ALiBi, arXiv:2108.12409). none: not at all, since causal attention can count (arXiv:2305.19466)."""
    rotary_base: Positive = 10_000.0
    """Wavelength base of rotary positions (RoFormer, arXiv:2104.09864)."""
    rotary_scaling: Stretch | None = None
    """How rotary positions stretch beyond the trained context: linear, ntk, dynamic, yarn or llama3, with the meanings
    of rope_scaling in transformers. dynamic follows the length of a text and reads it anew at each token beyond it."""
    rotary_factor: Annotated[float, Ge(1)] = 1.0
    """How many times the trained context they stretch to."""
    rotary_context: Count | None = None
    """The trained context, in tokens, on which dynamic, yarn and llama3 depend."""
    rotary_fast: Positive | None = None
    """yarn and llama3 leave frequencies with more turns than this in rotary_context as they are. None: 32 and 4."""
    rotary_slow: Positive = 1.0
    """yarn and llama3 divide frequencies with fewer turns than this in rotary_context by rotary_factor."""
    rotary_attention_factor: Positive | None = None
    """yarn multiplies rotated queries and keys by this. None: 0.1 ln(rotary_factor) + 1."""
    mixer: Literal["attention", "lstm"] = "attention"
    """What mixes the tokens in each block. lstm: a recurrent state in place of attention (Hochreiter and Schmidhuber
    1997), with as many units as the heads are wide together."""
    attention: Literal["causal", "bidirectional"] = "causal"
    """What a token sees: causal: itself and what precedes it (GPT). bidirectional: every token (BERT)."""
    attention_band: Count | None = None
    """Every second block sees only this many positions back, its own included (GPT-3). None: all see everything."""
    attention_sinks: Natural = 0
    """First tokens of a text that blocks with a band see from everywhere (StreamingLLM, arXiv:2309.17453)."""
    activation: Activation = "gelu_tanh"
    """The MLP's non-linearity. GPT-1 and GPT-2 as released use the tanh form of GELU; gelu is the erf form."""
    bias: bool = True
    """Biases in linear layers and layer norms."""
    tied_head: bool = True
    """Use the token embedding as the output matrix."""
    head_bias: bool = False
    """A bias on the output logits."""
    head_transform: bool = False
    """A linear layer, the activation and a norm before the output matrix (BERT)."""
    embedding_norm: bool = False
    """A norm of the summed embeddings (BERT)."""
    embedding_scale: Positive = 1.0
    """Token embeddings are multiplied by this: sqrt(n_embd) in arXiv:1706.03762."""
    token_types: Natural = 0
    """Embeddings of a token's type, such as first or second text of a pair (2 in BERT). 0: none."""
    next_sentence: bool = False
    """A head that says whether the second text of a pair follows the first, from the first token through a layer and
    tanh. The objective masked then reads pairs of texts and trains it too (BERT, arXiv:1810.04805)."""
    n_experts: Natural = 0
    """Experts per block, each of which sees some of the tokens (mixture of experts). 0: one MLP for all tokens."""
    experts_per_token: int = 2
    """Experts that each token uses."""
    expert_interval: Count = 1
    """Every n-th block has experts, the others a plain MLP (2 in Switch, arXiv:2101.03961)."""
    shared_experts: Natural = 0
    """Additional experts that see every token, without a gate (arXiv:2401.06066)."""
    expert_selection: Literal["top", "drawn"] = "top"
    """top: a token uses the experts with the largest gates. drawn: in training, experts drawn in proportion to them."""
    capacity_factor: Positive | None = None
    """Most tokens an expert accepts from a training batch, as a multiple of an even share; the rest skip it, on the
    residual stream. None: no limit, as always in evaluation."""
    router_jitter: Share = 0.0
    """In training, the router's inputs are multiplied by random numbers between 1 - this and 1 + this."""
    expert_dropout: Share = 0.0
    """Dropout between the two layers of each expert (.4 in Switch's fine-tuning)."""
    balance_loss: NonNegative = 0.01
    """Weight of the loss that balances the use of experts (Switch's .01)."""
    router_z_loss: NonNegative = 0.001
    """Weight of the loss that keeps the router's logits small (ST-MoE's .001, arXiv:2202.08906)."""
    balance_rate: NonNegative = 0.0
    """Balance by a bias on the choice of experts that moves by this much an update (.001 in arXiv:2408.15664)."""
    qk_norm: bool = False
    """Normalise every query and key head before attention (arXiv:2302.05442, Qwen3)."""
    ngrams: Count = 1
    """Longest n-gram, ending at the current token, that gets an embedding of its own. 1 turns them off."""
    ngram_rows: Count = 32_768
    """Embeddings per length of n-gram; a hash assigns n-grams to them."""
    dropout: Share = 0.0
    """Dropout wherever the three settings below are not set."""
    embedding_dropout: Share | None = None
    """Dropout on the sum of token and position embeddings. None: dropout."""
    attention_dropout: Share | None = None
    """Dropout on attention weights. None: dropout."""
    residual_dropout: Share | None = None
    """Dropout on each sublayer's output before it joins the residual stream. None: dropout."""
    init: Literal["gpt1", "gpt2"] = "gpt2"
    """gpt1: every weight N(0, .02). gpt2: also positions N(0, .01) and residual projections over sqrt(2 n_layer)."""
    base_width: Count | None = None
    """Width at which the learning rate was tuned, so that it suits a width of n_embd: initial weights and rates of
    matrices follow the width (muP, arXiv:2203.03466). Wider models then have more heads of the same size. None: off."""

    def __post_init__(self):
        check_relations(self)

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
        return 8 * self.n_embd // 3 if self.gated else 4 * self.n_embd

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def width_ratio(self) -> float:
        """base_width over n_embd: what learning rates of matrices are multiplied by."""
        return self.base_width / self.n_embd if self.base_width else 1.0

    def has_experts(self, block: int) -> bool:
        return self.n_experts > 0 and (block + 1) % self.expert_interval == 0

    def dropout_of(self, place: Literal["embedding", "attention", "residual"]) -> float:
        rate = getattr(self, f"{place}_dropout")
        return self.dropout if rate is None else rate
