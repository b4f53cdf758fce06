"""Relations between the settings of a model: combinations that no model can have."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt_arc.model_config import GPTConfig

MARKS = 3  # tokens around the two texts of a pair: [CLS], [SEP] and [SEP]
SHORTEST_PAIR = MARKS + 2
# settings of attention, and the values at which a model without it may leave them
WITHOUT_ATTENTION = {
    "positions": "none", "attention": "causal", "attention_band": None, "attention_sinks": 0, "encoder_layers": 0,
    "rotary_scaling": None, "rotary_factor": 1.0, "n_kv_head": None, "qk_norm": False, "base_width": None,
    "head_transform": False,
}  # fmt: skip


def check_heads(n_head: int, n_embd: int, or_else: str = "") -> None:
    """Raises ValueError unless heads divide the width; `or_else` is another mend than to change one of the two."""
    if n_embd % n_head:
        raise ValueError(f"n_head = {n_head} does not divide n_embd = {n_embd}: change one{or_else}")


def check_relations(config: "GPTConfig") -> None:
    """Raises ValueError for settings that contradict each other."""
    if config.mixer == "lstm":
        unsuited = {name: value for name, value in WITHOUT_ATTENTION.items() if getattr(config, name) != value}
        if config.positions not in ("rotary", "alibi"):  # these turn or bias attention
            unsuited.pop("positions", None)
        if unsuited:
            obstacles = ", ".join(f"{name} = {getattr(config, name)}" for name in unsuited)
            flags = " ".join(f"--{name}={value}" for name, value in unsuited.items())
            raise ValueError(f"mixer = lstm doesn't suit {obstacles}: leave mixer out, or set {flags}")
    for name in ("attention_band", "attention_sinks"):
        if config.attention == "bidirectional" and getattr(config, name):
            raise ValueError(
                f'{name} = {getattr(config, name)} is for a band of earlier tokens: it needs attention = "causal"'
            )
    if config.attention_sinks and config.positions == "alibi":
        raise ValueError(
            f"attention_sinks = {config.attention_sinks} doesn't suit positions = alibi, which hides what is far away: "
            "set other positions"
        )
    if config.attention_sinks and config.attention_band is None:
        raise ValueError(
            f"attention_sinks = {config.attention_sinks} are seen beside an attention_band: set one, or leave "
            "attention_sinks out"
        )
    if config.attention == "bidirectional" and config.positions == "alibi":
        raise ValueError('positions = "alibi" counts back from a token: it needs attention = "causal"')
    if config.encoder_layers and (config.attention == "bidirectional" or config.n_experts):
        raise ValueError(
            f'encoder_layers = {config.encoder_layers}: a decoder with an encoder needs attention = "causal" and has '
            "no experts"
        )
    if config.head_transform and (config.attention == "causal" or config.gated):
        raise ValueError(
            'head_transform needs attention = "bidirectional" and an activation without a gate, as in BERT'
        )
    if config.next_sentence and (config.attention == "causal" or config.token_types < 2):
        raise ValueError(
            'next_sentence tells two texts apart and reads both at once: it needs attention = "bidirectional" and '
            "token_types = 2"
        )
    if config.next_sentence and config.block_size < SHORTEST_PAIR:
        raise ValueError(
            f"block_size = {config.block_size} has no room for the pairs of next_sentence: set {SHORTEST_PAIR} or more"
        )
    if config.ngrams > config.block_size:
        raise ValueError(f"ngrams = {config.ngrams} are longer than the context, block_size = {config.block_size}")
    if config.n_experts and config.expert_interval > config.n_layer:
        raise ValueError(f"expert_interval = {config.expert_interval} leaves {config.n_layer} blocks without experts")
    if config.n_experts and not 1 <= config.experts_per_token <= config.n_experts:
        raise ValueError(f"experts_per_token = {config.experts_per_token} must lie between 1 and n_experts")
    if config.balance_rate and config.expert_selection == "drawn":
        raise ValueError("balance_rate moves the choice of the largest gates: it has no say in what is drawn")
    if config.head_size is None:
        check_heads(config.n_head, config.n_embd, ", or state head_size")
    if config.base_width and config.tied_head:
        raise ValueError("base_width gives the head a learning rate of its own: it needs tied_head = false")
    if config.n_head % config.kv_heads:
        raise ValueError(f"n_kv_head = {config.n_kv_head} does not divide n_head = {config.n_head}")
    if config.positions == "rotary" and config.head_width % 2:
        raise ValueError(f'positions = "rotary" turns pairs of features: head size {config.head_width} must be even')
    if config.rotary_scaling and config.positions != "rotary":
        raise ValueError(f'rotary_scaling = "{config.rotary_scaling}" needs positions = "rotary"')
    if config.rotary_scaling or config.rotary_factor != 1:
        from gpt_arc.nn.positions import rotary_scaling  # imports torch

        rotary_scaling(config)
    if config.positions == "sinusoidal" and config.n_embd % 2:
        raise ValueError(f'positions = "sinusoidal" needs pairs of features: n_embd = {config.n_embd} must be even')
