"""Reads and writes models in the format of Hugging Face's transformers, without that library.

A table for each architecture maps its config.json and tensor names to ours. An architecture that differs only in
settings and names takes one more table.

    config = config_from_hf(json.loads(...))                  # for gpt2, openai-gpt (GPT-1), qwen3, llama ...
    tensors = read_tensors(directory, "gpt2", config, shapes) # under our names, in float32
    content, tensors = hf_config(config), hf_tensors(model)   # and back
"""

import json
import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Le
from pydantic import ConfigDict, ValidationError, with_config
from torch import Tensor
from typing_extensions import TypedDict

from gpt_arc.errors import UserError
from gpt_arc.nn.names import Activation
from gpt_arc.nn.positions import rotary_scaling
from gpt_arc.reading import adapter_of, mistake_in
from gpt_arc.settings import Count, NonNegative, Positive, mistake
from gpt_arc.tables import counted
from gpt_arc.weights.tensor_files import and_more, open_tensors, weight_files
from model import GPT, GPTConfig

FLOATS = ("F32", "BF16", "F16", "F64")
TRANSFORMERS_VERSION = "5.0.0"  # the oldest that writes the same files
# masks and tables that some files store beside the weights; they follow from the configuration
BUFFER = re.compile(r"(h\.\d+\.attn\.(bias|masked_bias)|(embeddings\.)?position_ids|.*rotary_emb\.inv_freq)$")
OLD_NORMS = {"gamma": "weight", "beta": "bias"}  # as BERT's files still have them
# what BERT's files have besides: the bias a second time, and the head of another task
BESIDES = re.compile(r"(cls\.predictions\.decoder\.bias|pooler\.dense\..*|cls\.seq_relationship\..*)$")


@dataclass(frozen=True)
class Architecture:
    """One of transformers' architectures in terms of ours. Keys refer to its config.json."""

    class_name: str
    classifier: str | None  # class with a linear head on the last token that isn't padding, if any
    multiple_choice: str | None  # class with a language model and one logit per option, if any
    ours: dict[str, Any]  # constant settings; those that the table doesn't name have GPTConfig's defaults
    sizes: dict[str, tuple[str, Any]]  # key: (our setting, transformers' default)
    dropouts: dict[str, tuple[str, float]]  # the same
    activations: tuple[str, dict[str, Activation]]  # key, {its value: our value}; the first is the default
    fixed: dict[str, tuple]  # key: supported values; the first is the default
    inert: dict[str, Any]  # keys that don't affect the computation, with transformers' defaults
    prefix: str  # of every tensor except the head's; files without a head lack it
    layers: str
    outside: dict[str, str]  # our module outside the blocks: its name
    block: dict[str, tuple[str, ...]]  # our module in a block: its modules, stacked in order; {} is an expert
    transposed: bool = False  # Conv1D stores the blocks' matrices as (in, out)
    aliases: dict[str, str] = field(default_factory=dict)  # other spellings of keys
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # for files with all experts in one tensor
    heads_divide_width: bool = False  # required even if config.json has another width of a head

    head: str = "lm_head"  # of the output matrix; it and whatever else is not in the trunk lacks the prefix

    def full_name(self, name: str) -> str:
        return name if name.split(".")[0] == self.head.split(".")[0] else self.prefix + name

    def parts_of(self, name: str, shape: torch.Size, config: GPTConfig) -> list["TensorPart"]:
        """Returns the tensors of this architecture that our tensor `name` of `shape` stacks, in row order."""
        if len(shape) == 3:  # the matrices of all experts
            matrices = self.parts_of(f"{name}.weight", shape[1:], config)
            if "{}" in matrices[0].name:
                return [part._replace(name=part.name.format(expert)) for expert in range(shape[0]) for part in matrices]
            return [TensorPart(matrices[0].name.removesuffix(".weight"), shape[0] * shape[1], tuple(shape), False)]
        if name in self.outside:  # a vector of its own
            return [TensorPart(self.outside[name], shape[0], tuple(shape), False)]
        module, kind = name.rsplit(".", 1)
        if not module.startswith("blocks."):
            return [TensorPart(f"{self.outside[module]}.{kind}", shape[0], tuple(shape), False)]
        _, layer, module = module.split(".", 2)
        query, key = config.n_head * config.head_width, config.kv_heads * config.head_width
        # one tensor; an MLP's gate and value; or attention's query, key and value
        counts = {1: (shape[0],), 2: (shape[0] // 2,) * 2, 3: (query, key, key)}[len(self.block[module])]
        transposed = self.transposed and len(shape) == 2
        return [
            TensorPart(
                f"{self.layers}.{layer}.{part}.{kind}", rows, (rows, *shape[1:])[:: -1 if transposed else 1], transposed
            )
            for part, rows in zip(self.block[module], counts)
        ]


class TensorPart(NamedTuple):
    """A tensor of transformers that holds some rows of ours."""

    name: str  # without the architecture's prefix
    rows: int
    shape: tuple[int, ...]  # as stored
    transposed: bool  # stored as (in, out)


GPT_SIZES = {
    "vocab_size": ("vocab_size", 50257), "n_positions": ("block_size", 1024), "n_embd": ("n_embd", 768),
    "n_layer": ("n_layer", 12), "n_head": ("n_head", 12), "layer_norm_epsilon": ("norm_eps", 1e-5),
    "tie_word_embeddings": ("tied_head", True),
}  # fmt: skip
GPT_INERT = {
    "initializer_range": 0.02, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
}  # fmt: skip
GPT_BASE = {  # shared by GPT-1 and GPT-2
    "dropouts": {
        "embd_pdrop": ("embedding_dropout", 0.1), "attn_pdrop": ("attention_dropout", 0.1),
        "resid_pdrop": ("residual_dropout", 0.1),
    },
    "prefix": "transformer.", "layers": "h", "transposed": True,
    "block": {
        "attention_norm": ("ln_1",), "attention.qkv": ("attn.c_attn",), "attention.projection": ("attn.c_proj",),
        "mlp_norm": ("ln_2",), "mlp.up": ("mlp.c_fc",), "mlp.projection": ("mlp.c_proj",),
    },
    "aliases": {
        "max_position_embeddings": "n_positions", "hidden_size": "n_embd", "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
}  # fmt: skip
ARCHITECTURES = {
    "gpt2": Architecture(
        class_name="GPT2LMHeadModel",
        classifier="GPT2ForSequenceClassification",
        multiple_choice="GPT2DoubleHeadsModel",
        ours={},
        sizes={**GPT_SIZES, "n_inner": ("mlp_size", None)},
        activations=("activation_function", {
            "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
            "gelu": "gelu", "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu_squared",
        }),
        fixed={
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
            "reorder_and_upcast_attn": (False, True),  # changes only rounding in half precision
        },
        inert={**GPT_INERT, "use_cache": True},
        outside={"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f", "head": "lm_head"},
        **GPT_BASE,
    ),
    "openai-gpt": Architecture(
        class_name="OpenAIGPTLMHeadModel",
        classifier="OpenAIGPTForSequenceClassification",
        multiple_choice="OpenAIGPTDoubleHeadsModel",
        ours={"norm_position": "post", "init": "gpt1"},
        sizes={**GPT_SIZES, "vocab_size": ("vocab_size", 40478), "n_positions": ("block_size", 512)},
        activations=("afn", {"gelu": "gelu_tanh", "relu": "relu"}),  # this gelu is the tanh form
        fixed={},
        inert=GPT_INERT,
        outside={"token_embedding": "tokens_embed", "position_embedding": "positions_embed", "head": "lm_head"},
        **GPT_BASE,
    ),
    "qwen3": Architecture(
        class_name="Qwen3ForCausalLM",
        classifier="Qwen3ForSequenceClassification",
        multiple_choice=None,
        ours={"norm": "rmsnorm", "positions": "rotary", "bias": False, "qk_norm": True},
        sizes={
            "vocab_size": ("vocab_size", 151936), "max_position_embeddings": ("block_size", 32768),
            "hidden_size": ("n_embd", 4096), "intermediate_size": ("mlp_size", 22016),
            "num_hidden_layers": ("n_layer", 32), "num_attention_heads": ("n_head", 32),
            "num_key_value_heads": ("n_kv_head", 32), "head_dim": ("head_size", 128),
            "rms_norm_eps": ("norm_eps", 1e-6), "rope_theta": ("rotary_base", 10_000.0),
            "tie_word_embeddings": ("tied_head", False),
        },
        dropouts={"attention_dropout": ("attention_dropout", 0.0)},
        activations=("hidden_act", {"silu": "swiglu", "swish": "swiglu"}),
        fixed={"attention_bias": (False,), "use_sliding_window": (False,)},
        inert={"initializer_range": 0.02, "max_window_layers": 28, "sliding_window": None, "use_cache": True},
        prefix="model.", layers="layers",
        outside={"token_embedding": "embed_tokens", "final_norm": "norm", "head": "lm_head"},
        block={
            "attention_norm": ("input_layernorm",),
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.query_norm": ("self_attn.q_norm",), "attention.key_norm": ("self_attn.k_norm",),
            "attention.projection": ("self_attn.o_proj",),
            "mlp_norm": ("post_attention_layernorm",),
            "mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.projection": ("mlp.down_proj",),
        },
    ),
    "llama": Architecture(
        class_name="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
        multiple_choice=None,
        ours={"norm": "rmsnorm", "positions": "rotary", "bias": False},
        sizes={
            "vocab_size": ("vocab_size", 32000), "max_position_embeddings": ("block_size", 2048),
            "hidden_size": ("n_embd", 4096), "intermediate_size": ("mlp_size", 11008),
            "num_hidden_layers": ("n_layer", 32), "num_attention_heads": ("n_head", 32),
            "num_key_value_heads": ("n_kv_head", None), "head_dim": ("head_size", None),
            "rms_norm_eps": ("norm_eps", 1e-6), "rope_theta": ("rotary_base", 10_000.0),
            "tie_word_embeddings": ("tied_head", False),
        },
        dropouts={"attention_dropout": ("attention_dropout", 0.0)},
        activations=("hidden_act", {"silu": "swiglu", "swish": "swiglu"}),
        fixed={"attention_bias": (False,), "mlp_bias": (False,)},
        inert={"initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True},
        prefix="model.", layers="layers",
        outside={"token_embedding": "embed_tokens", "final_norm": "norm", "head": "lm_head"},
        block={
            "attention_norm": ("input_layernorm",),
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.projection": ("self_attn.o_proj",),
            "mlp_norm": ("post_attention_layernorm",),
            "mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.projection": ("mlp.down_proj",),
        },
        heads_divide_width=True,
    ),
    "mixtral": Architecture(
        class_name="MixtralForCausalLM",
        classifier="MixtralForSequenceClassification",
        multiple_choice=None,
        ours={"norm": "rmsnorm", "positions": "rotary", "bias": False, "router_z_loss": 0.0},
        sizes={
            "vocab_size": ("vocab_size", 32000), "max_position_embeddings": ("block_size", 131_072),
            "hidden_size": ("n_embd", 4096), "intermediate_size": ("mlp_size", 14336),
            "num_hidden_layers": ("n_layer", 32), "num_attention_heads": ("n_head", 32),
            "num_key_value_heads": ("n_kv_head", 8), "head_dim": ("head_size", None),
            "rms_norm_eps": ("norm_eps", 1e-5), "rope_theta": ("rotary_base", 1e6),
            "tie_word_embeddings": ("tied_head", False), "num_local_experts": ("n_experts", 8),
            "num_experts_per_tok": ("experts_per_token", 2),
            "router_aux_loss_coef": ("balance_loss", 0.001),  # in another unit, see _balance_unit
            "router_jitter_noise": ("router_jitter", 0.0),  # also on the experts' input
        },
        dropouts={"attention_dropout": ("attention_dropout", 0.0)},
        activations=("hidden_act", {"silu": "swiglu", "swish": "swiglu"}),
        fixed={"sliding_window": (None,)},
        inert={"initializer_range": 0.02, "output_router_logits": False, "use_cache": True},
        prefix="model.", layers="layers",
        outside={"token_embedding": "embed_tokens", "final_norm": "norm", "head": "lm_head"},
        block={
            "attention_norm": ("input_layernorm",),
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.projection": ("self_attn.o_proj",),
            "mlp_norm": ("post_attention_layernorm",), "mlp.router": ("block_sparse_moe.gate",),
            "mlp.up": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
            "mlp.projection": ("block_sparse_moe.experts.{}.w2",),
        },
        aliases={"num_experts": "num_local_experts"},
        fused={
            "mlp.router": ("mlp.gate",), "mlp.up": ("mlp.experts.gate_up_proj",),
            "mlp.projection": ("mlp.experts.down_proj",),
        },
    ),
    "bert": Architecture(
        class_name="BertForMaskedLM",
        classifier=None,  # its classifiers read a layer of their own, the pooler
        multiple_choice=None,
        ours={
            "attention": "bidirectional", "norm_position": "post", "embedding_norm": True, "head_transform": True,
            "head_bias": True, "init": "gpt1",
        },
        sizes={
            "vocab_size": ("vocab_size", 30522), "max_position_embeddings": ("block_size", 512),
            "hidden_size": ("n_embd", 768), "intermediate_size": ("mlp_size", 3072),
            "num_hidden_layers": ("n_layer", 12), "num_attention_heads": ("n_head", 12),
            "layer_norm_eps": ("norm_eps", 1e-12), "type_vocab_size": ("token_types", 2),
        },
        dropouts={
            "hidden_dropout_prob": ("residual_dropout", 0.1),  # and of the embeddings
            "attention_probs_dropout_prob": ("attention_dropout", 0.1),
        },
        activations=("hidden_act", {
            "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
        }),
        fixed={
            "tie_word_embeddings": (True,), "is_decoder": (False,), "add_cross_attention": (False,),
            "position_embedding_type": ("absolute",),
        },
        inert={"initializer_range": 0.02, "classifier_dropout": None, "use_cache": True},
        prefix="bert.", layers="encoder.layer", head="cls.predictions.decoder",
        outside={
            "token_embedding": "embeddings.word_embeddings", "position_embedding": "embeddings.position_embeddings",
            "type_embedding": "embeddings.token_type_embeddings", "embedding_norm": "embeddings.LayerNorm",
            "head_layer": "cls.predictions.transform.dense", "head_norm": "cls.predictions.transform.LayerNorm",
            "head_bias": "cls.predictions.bias", "pair_head.pooler": "pooler.dense",
            "pair_head.output": "cls.seq_relationship",
        },
        block={
            "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
            "attention.projection": ("attention.output.dense",), "attention_norm": ("attention.output.LayerNorm",),
            "mlp.up": ("intermediate.dense",), "mlp.projection": ("output.dense",), "mlp_norm": ("output.LayerNorm",),
        },
        heads_divide_width=True,
    ),
}  # fmt: skip
PLACES = ("embedding_dropout", "attention_dropout", "residual_dropout")
# settings that affect training only, and settings without meaning in a dense model
TRAINING = {"dropout", *PLACES, "init", "expert_dropout", "expert_selection", "router_jitter"}
TRAINING |= {"balance_loss", "router_z_loss"}
UNBIASED = ("token_embedding.", "position_embedding.", "type_embedding.", "head.", "head_bias")  # tensors without one
OF_EXPERTS = {"experts_per_token", "expert_interval", "shared_experts", "capacity_factor", "balance_rate"}
# rope_type: {key of rope_parameters: our setting}
ROPE_KEYS = {
    "default": {},
    "linear": {"factor": "rotary_factor"},
    "dynamic": {"factor": "rotary_factor"},
    "llama3": {
        "factor": "rotary_factor", "high_freq_factor": "rotary_fast", "low_freq_factor": "rotary_slow",
        "original_max_position_embeddings": "rotary_context",
    },
    "yarn": {
        "factor": "rotary_factor", "beta_fast": "rotary_fast", "beta_slow": "rotary_slow",
        "attention_factor": "rotary_attention_factor", "original_max_position_embeddings": "rotary_context",
    },
}  # fmt: skip
PAIRS = "BertForPreTraining"  # the class of a BERT with next_sentence
STRETCHING = {"rotary_scaling"}.union(*map(dict.values, ROPE_KEYS.values()))


@with_config(ConfigDict(strict=True, extra="allow", allow_inf_nan=False))
class HFRope(TypedDict, total=False):
    """The keys of rope_scaling and rope_parameters that are computed with."""

    rope_type: str | None
    type: str | None
    rope_theta: Positive | None
    partial_rotary_factor: float | None
    factor: Annotated[float, Ge(1), Le(1_000_000)] | None
    original_max_position_embeddings: Count | None
    mscale: NonNegative | None
    mscale_all_dim: NonNegative | None


@with_config(ConfigDict(strict=True, extra="allow", allow_inf_nan=False))
class HFConfig(TypedDict, total=False):
    """The keys of transformers' config.json that aren't handed on to GPTConfig, which checks the others."""

    activation_function: str
    afn: str
    architectures: list[str] | None
    type_vocab_size: Annotated[int, Ge(1)]
    hidden_act: str
    num_local_experts: int
    num_experts_per_tok: int
    router_aux_loss_coef: float
    layer_types: list[str] | None
    max_position_embeddings: Count
    original_max_position_embeddings: Count | None
    rope_scaling: HFRope | None
    rope_parameters: HFRope | None


def config_from_hf(content: dict[str, Any]) -> GPTConfig:
    """Returns the architecture that a config.json of transformers describes; absent keys have transformers' defaults.

    Raises UserError naming the key and its value if our model would compute something else.
    """
    kind = str(content.get("model_type"))
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f'model_type = "{kind}" is not a supported architecture: choose one of {known}')
    content = {architecture.aliases.get(key, key): value for key, value in content.items()}
    try:
        adapter_of(HFConfig).validate_python(content)
    except ValidationError as error:
        raise UserError(mistake_in(error)) from None
    rope = _rope_settings(content, architecture) if "rope_theta" in architecture.sizes else {}
    for key, allowed in {**architecture.fixed, "quantization_config": (None,)}.items():
        if content.get(key, allowed[0]) not in allowed:
            raise _unknown(key, content[key], kind, f"{json.dumps(allowed[0])} is computed")
    if set(content.get("layer_types") or ()) - {"full_attention"}:
        raise _unknown("layer_types", content["layer_types"], kind, '"full_attention" is computed')
    key, activations = architecture.activations
    activation = content.get(key, next(iter(activations)))
    if activation not in activations:
        raise _unknown(key, activation, kind, f"{', '.join(activations)} are known")
    settings: dict[str, Any] = {name: content.get(key, default) for key, (name, default) in architecture.sizes.items()}
    settings |= {"next_sentence": True} if kind == "bert" and PAIRS in (content.get("architectures") or ()) else {}
    dropouts: dict[str, Any] = dict.fromkeys(PLACES, 0.0)
    dropouts |= {name: content.get(key, default) for key, (name, default) in architecture.dropouts.items()}
    if "hidden_dropout_prob" in architecture.dropouts:
        dropouts["embedding_dropout"] = dropouts["residual_dropout"]
    if len(set(dropouts.values())) == 1:  # so that the single setting still changes all of them
        dropouts = {"dropout": dropouts[PLACES[0]]}
    for key, least in (("num_local_experts", 1), ("num_experts_per_tok", 2)) if _has_experts(architecture) else ():
        if content.get(key, least) in range(least):  # a single expert's gate is a probability here, 1 there
            raise _unknown(key, content[key], kind, f"{least} or more are computed")
    try:
        if "balance_loss" in settings:
            settings["balance_loss"] = _rounded(settings["balance_loss"] / _balance_unit(GPTConfig(**settings)))
        return GPTConfig(**settings | rope, **architecture.ours, **dropouts, activation=activations[activation])
    except (TypeError, ValueError) as error:
        sentence = mistake(error, GPTConfig)
        names = {key: name for key, (name, _) in {**architecture.sizes, **architecture.dropouts}.items()}
        for key, name in (names | ROPE_KEYS[rope.get("rotary_scaling", "default")]).items():
            sentence = re.sub(rf"\b{name}\b", key, sentence)
        raise UserError(f"it doesn't describe a valid model: {sentence}") from None


def _unknown(key: str, value: Any, kind: str, instead: str) -> UserError:
    return UserError(f"{key} = {json.dumps(value)} can't be computed for a {kind}: only {instead}")


def _balance_unit(config: GPTConfig) -> float:
    """Returns the factor from our balance-loss weight to transformers'.

    With k experts per token and an even load, transformers' loss is k over all layers taken together; ours is 1 per
    layer, summed over layers. Loss and gradient agree if all layers have the same load.
    """
    return config.n_layer / config.experts_per_token


def _rounded(value: float) -> float:
    """Rounds to six digits if that only removes rounding errors of a conversion there and back."""
    short = float(f"{value:.6g}")
    return short if math.isclose(short, value, rel_tol=1e-12) else value


def _rope_settings(content: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Returns our settings of rotary positions, from rope_scaling, or rope_parameters (transformers 5), and rope_theta.

    Raises UserError for what our model doesn't compute.
    """
    key = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
    rope = {name: content[name] for name in ("rope_theta", "partial_rotary_factor") if content.get(name) is not None}
    rope |= {name: value for name, value in (content.get(key) or {}).items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KEYS or rope.get("partial_rotary_factor", 1) != 1 or rope.get("truncate") is False:
        kinds = ", ".join(ROPE_KEYS)
        instead = f"the rope_types {kinds} are computed, over all of a head and with truncate = true"
        raise _unknown(key, rope, content["model_type"], instead)
    context = content.get("max_position_embeddings", architecture.sizes["max_position_embeddings"][1])
    rope.setdefault("original_max_position_embeddings", context)
    if content.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = content["original_max_position_embeddings"]
    if kind == "yarn":
        factor = rope.setdefault("factor", context / rope["original_max_position_embeddings"])
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            scales = (0.1 * rope[name] * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
            rope.setdefault("attention_factor", operator.truediv(*scales))
    missing = [name for name in ROPE_KEYS[kind] if name not in rope and (name == "factor" or kind == "llama3")]
    if missing:
        raise UserError(f"{key} = {json.dumps(rope)} lacks {missing[0]}")
    settings = {"rotary_base": rope.get("rope_theta", architecture.sizes["rope_theta"][1])}
    settings |= {name: rope[theirs] for theirs, name in ROPE_KEYS[kind].items() if theirs in rope}
    if kind == "dynamic":  # transformers has no limit, and counts the factor from max_position_embeddings
        settings |= {"rotary_context": context, "block_size": int(context * rope["factor"])}
    return settings if kind == "default" else settings | {"rotary_scaling": kind}


def _rope_parameters(config: GPTConfig) -> dict[str, Any]:
    """Returns the rope_parameters of transformers, which knows ntk as a larger base."""
    stretch, width = rotary_scaling(config), config.head_width
    if stretch is None or stretch.kind == "ntk":
        base = config.rotary_base * (stretch.factor ** (width / (width - 2)) if stretch else 1)
        return {"rope_theta": base, "rope_type": "default"}
    values = asdict(config) | {"rotary_fast": stretch.fast}
    keys = {key: values[name] for key, name in ROPE_KEYS[stretch.kind].items() if values[name] is not None}
    return {"rope_theta": config.rotary_base, "rope_type": stretch.kind, **keys}


def architecture_of(config: GPTConfig) -> str:
    """Returns the model_type that can express `config`. Raises UserError naming the settings that none can.

    Dropouts, initialisation and router losses don't matter: a trained model computes the same without them.
    """
    nearest, foreign = nearest_architecture(config)
    if foreign:
        settings = (f"{name} = {json.dumps(getattr(config, name))}" for name in foreign)
        flags = " ".join(f"--{name}={value}" for name, value in foreign.items())
        raise UserError(
            f"no supported architecture of transformers ({', '.join(ARCHITECTURES)}) matches this model: the nearest, "
            f"{nearest}, has no {' and no '.join(settings)}: a model trained with {flags} has a place there"
        )
    return nearest


def nearest_architecture(config: GPTConfig) -> tuple[str, dict[str, Any]]:
    """Returns the model_type nearest to `config`, and the settings that it can't express, each with a value it can."""
    foreign = {kind: _foreign_settings(architecture, config) for kind, architecture in ARCHITECTURES.items()}
    alike = [kind for kind in foreign if ARCHITECTURES[kind].ours.get("attention", "causal") == config.attention]
    mixtures = [kind for kind in alike if _has_experts(ARCHITECTURES[kind])]
    if mixtures:
        alike = mixtures if config.n_experts else [kind for kind in alike if kind not in mixtures]
    nearest = min(alike, key=lambda kind: len(foreign[kind]))
    return nearest, foreign[nearest]


def _has_experts(architecture: Architecture) -> bool:
    return "mlp.router" in architecture.block


def _foreign_settings(architecture: Architecture, config: GPTConfig) -> dict[str, Any]:
    """Returns the settings of `config` that the architecture can't express, each with a value that it can."""
    free = {name for name, _ in architecture.sizes.values()} | TRAINING | {"activation", "ngram_rows"}
    free |= STRETCHING if config.positions != "rotary" or "rope_theta" in architecture.sizes else set()
    free |= set() if config.positions == "rotary" else {"rotary_base"}
    free |= set() if config.n_experts and _has_experts(architecture) else OF_EXPERTS
    free |= {"next_sentence"} if "pair_head.output" in architecture.outside else set()
    free |= {"bias"} if _lacks_biases(architecture, config) else set()
    values, fixed = asdict(config), {**asdict(GPTConfig()), **architecture.ours}
    usual = {"n_kv_head": config.n_head, "head_size": config.n_embd / config.n_head, "mlp_size": 4 * config.n_embd}
    values |= {name: None for name, value in usual.items() if values[name] == value}  # the default, spelled out
    foreign = {name: fixed[name] for name in values if name not in free and values[name] != fixed[name]}
    known = list(architecture.activations[1].values())
    if config.activation not in known:
        foreign["activation"] = known[0]
    if architecture.heads_divide_width and config.n_embd % config.n_head:
        foreign["n_head"] = math.gcd(config.n_embd, config.n_head)
    if "type_vocab_size" in architecture.sizes and not config.token_types:
        foreign["token_types"] = 1
    if config.n_experts and _has_experts(architecture) and config.experts_per_token == 1:
        foreign["experts_per_token"] = 2  # their single gate is 1, ours is a probability
    return foreign


def _lacks_biases(architecture: Architecture, config: GPTConfig) -> bool:
    """Whether the architecture has biases and the model hasn't: zeros then compute the same."""
    return not config.bias and architecture.ours.get("bias", True)


def hf_config(
    config: GPTConfig, dtype="float32", start_token: int | None = None, end_of_text: int | None = None
) -> dict:
    """Returns the config.json that transformers' save_pretrained writes. Raises UserError if it has none."""
    kind = architecture_of(config)
    architecture = ARCHITECTURES[kind]
    key, activations = architecture.activations
    ours = {**asdict(config), "n_kv_head": config.kv_heads, "head_size": config.head_width}
    ours["mlp_size"] = None if kind == "gpt2" and config.mlp_width == 4 * config.n_embd else config.mlp_width
    if _has_experts(architecture):
        ours["head_size"] = config.head_size
        ours["balance_loss"] = _rounded(config.balance_loss * _balance_unit(config))
    ours |= {f"{place}_dropout": config.dropout_of(place) for place in ("embedding", "attention", "residual")}
    content = {
        "architectures": [PAIRS if config.next_sentence else architecture.class_name],
        "model_type": kind,
        "dtype": dtype,
        "transformers_version": TRANSFORMERS_VERSION,
        "bos_token_id": start_token,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        key: next(theirs for theirs, activation in activations.items() if activation == config.activation),
        **{key: ours[name] for key, (name, _) in (architecture.sizes | architecture.dropouts).items()},
        **{key: allowed[0] for key, allowed in architecture.fixed.items()},
        **architecture.inert,
    }
    if "rope_theta" in content:
        content["rope_parameters"] = _rope_parameters(config)
        del content["rope_theta"]
        if config.rotary_scaling == "dynamic":
            content["max_position_embeddings"] = config.rotary_context
    if kind == "qwen3":
        content["layer_types"] = ["full_attention"] * config.n_layer
    return dict(sorted(content.items()))


def hf_tensors(model: GPT, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    """Yields copies of the model's tensors on the CPU, named and shaped as in transformers."""
    architecture = ARCHITECTURES[architecture_of(model.config)]
    for name, tensor in model.state_dict().items():
        parts = architecture.parts_of(name, tensor.shape, model.config)
        tensor = tensor.detach().flatten(0, -2) if tensor.dim() == 3 else tensor.detach()  # (E, M, C) to (E M, C)
        for part, rows in zip(parts, tensor.split([part.rows for part in parts])):
            rows = rows.T if part.transposed else rows
            yield architecture.full_name(part.name), torch.empty(part.shape, dtype=dtype).copy_(rows)
            if _lacks_biases(architecture, model.config) and not name.startswith(UNBIASED):
                bias = part.name.removesuffix("weight") + "bias"
                yield architecture.full_name(bias), torch.zeros(part.rows, dtype=dtype)


def hf_classifier_config(
    content: dict[str, Any], task: str, classes: Sequence[str] | None, pad: int, dropout: float = 0.0
) -> dict[str, Any]:
    """Returns `hf_config`'s `content` changed for the transformers class that computes a classifier's logits.

    `task` may also be "reward". `classes` names the outputs; None: a single output, for a number, a score or an option.
    `pad` is the id of the padding, which isn't any input's last token. Raises UserError if transformers has no such
    class.
    """
    kind, by_option = content["model_type"], task == "multiple_choice"
    class_name = ARCHITECTURES[kind].multiple_choice if by_option else ARCHITECTURES[kind].classifier
    if task == "similarity":
        raise UserError(
            "task = similarity can't be exported: its head reads the sum of the hidden states of both orders of a "
            "pair, which no class of transformers computes"
        )
    if class_name is None:
        raise UserError(
            f"task = {task} can't be exported: transformers has no {kind} class with "
            + ("one logit per option" if by_option else "a single linear layer as its head")
        )
    labels = classes or ("LABEL_0",)  # transformers' name for a single output
    content = content | {"architectures": [class_name], "id2label": dict(enumerate(labels))}  # sets num_labels
    content["label2id"] = {label: number for number, label in enumerate(labels)}
    content["pad_token_id"] = pad  # the class reads the rightmost token that isn't padding
    if by_option:
        content["summary_first_dropout"] = dropout
    else:
        content["problem_type"] = "single_label_classification" if classes else "regression"
    return dict(sorted(content.items()))


def hf_classifier_tensors(
    model: GPT, head: Tensor, task: str, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """`hf_tensors` with a classifier's head; only multiple choice keeps the language model's head."""
    head = torch.empty(head.shape, dtype=dtype).copy_(head.detach())
    if task == "multiple_choice":
        yield from hf_tensors(model, dtype)
        yield "multiple_choice_head.summary.weight", head
        yield "multiple_choice_head.summary.bias", torch.zeros(len(head), dtype=dtype)
    else:
        yield from ((name, tensor) for name, tensor in hf_tensors(model, dtype) if name != "lm_head.weight")
        yield "score.weight", head


class Stored(NamedTuple):
    """A tensor in a file."""

    name: str
    path: Path
    file: Any  # safetensors' open file

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name).float()


def read_tensors(
    directory: Path, kind: str, config: GPTConfig, shapes: dict[str, torch.Size], within: str = ""
) -> dict[str, Tensor]:
    """Reads tensors by our names and `shapes`, in float32, from a directory of the architecture `kind`.

    `within` is the prefix of the language model's tensors in a larger model.

    Raises UserError naming the file and tensor if one is missing, unexpected, damaged, or has the wrong shape or type.
    """
    architecture = ARCHITECTURES[kind]
    stored = {}
    for tensor in stored_tensors(directory):
        if not tensor.name.startswith(within):
            continue
        name = tensor.name.removeprefix(within).removeprefix(architecture.prefix)
        name = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda old: OLD_NORMS[old[0]], name)
        other = stored.setdefault(name, tensor)
        if other is not tensor:
            raise UserError(f"{tensor.path} has {tensor.name}, and {other.path} has {other.name}: remove one of them")
    if any(".mlp.experts." in name for name in stored):
        architecture = replace(architecture, block=architecture.block | architecture.fused)
    elif config.n_experts * config.n_layer > len(stored):
        total = config.n_experts * config.n_layer
        raise UserError(
            f"{directory} has {counted(len(stored), 'tensor')}, too few for the {total} experts of its config.json"
        )
    embedding, head = f"{architecture.outside['token_embedding']}.weight", f"{architecture.head}.weight"
    if config.tied_head and embedding not in stored and head in stored:  # a tied pair
        stored[embedding] = stored.pop(head)
    parts_of = {name: architecture.parts_of(name, shape, config) for name, shape in shapes.items()}
    expected = {part.name: part for parts in parts_of.values() for part in parts}
    missing = expected.keys() - stored
    if missing:
        paths = {tensor.path for tensor in stored.values()}
        place = paths.pop() if len(paths) == 1 else directory
        raise UserError(f"{place} lacks the tensor {architecture.full_name(min(missing))}{and_more(missing)}")
    tied_copy = stored.pop(head, None) if config.tied_head else None
    besides = [BUFFER, *([BESIDES] if kind == "bert" else [])]
    surplus = {name for name in stored.keys() - expected if not any(pattern.match(name) for pattern in besides)}
    if surplus:
        extra = stored[min(surplus)]
        raise UserError(f"{extra.path} has the unexpected tensor {extra.name}{and_more(surplus)}")
    for part in expected.values():
        tensor = stored[part.name]
        header = tensor.file.get_slice(tensor.name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != part.shape:
            raise UserError(f"{tensor.path}: {tensor.name} has the shape {shape}, not {part.shape}")
        if dtype not in FLOATS:
            raise UserError(f"{tensor.path}: {tensor.name} has the type {dtype}, not one of {', '.join(FLOATS)}")
    tensors = {}
    for name, parts in parts_of.items():  # one at a time, to hold little in memory twice
        rows = [stored[part.name].read().T if part.transposed else stored[part.name].read() for part in parts]
        tensors[name] = (rows[0].contiguous() if len(rows) == 1 else torch.cat(rows)).view(shapes[name])
    if tied_copy and not torch.equal(tied_copy.read(), tensors["token_embedding.weight"]):
        raise UserError(
            f"{tied_copy.path}: {tied_copy.name} differs from the embedding, although config.json has "
            "tie_word_embeddings = true: set that to false"
        )
    return tensors


def stored_tensors(directory: Path) -> Iterator[Stored]:
    """Yields the tensors in the safetensors of `directory`: one file, or the shards that an index names."""
    for path in weight_files(directory):
        file = open_tensors(path)
        yield from (Stored(name, path, file) for name in file.keys())
