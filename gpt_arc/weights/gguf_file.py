"""Writes an exported model as a GGUF file, with the names, shapes and keys of llama.cpp's own converter.

`config`, `tensors` and `files` are those of `tools/export.py --to hf`: transformers' configuration, its tensors in
float32, and the tokenizer's files.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_arc.data.tokenizer import FILE_NAME, SETTINGS_FILE, CharTokenizer, Tokenizer, byte_alphabet
from gpt_arc.errors import UserError
from gpt_arc.extras import import_extra
from gpt_arc.files import replacing, write_file

ARCHITECTURES = {"gpt2": "GPT2", "qwen3": "QWEN3", "llama": "LLAMA", "mixtral": "LLAMA"}  # by transformers' model_type
SIZES = {  # method of GGUFWriter: keys of config.json
    "add_context_length": ("max_position_embeddings", "n_positions"),
    "add_embedding_length": ("hidden_size", "n_embd"),
    "add_block_count": ("num_hidden_layers", "n_layer"),
    "add_feed_forward_length": ("intermediate_size", "n_inner"),
    "add_head_count": ("num_attention_heads", "n_head"),
    "add_head_count_kv": ("num_key_value_heads",),
    "add_layer_norm_rms_eps": ("rms_norm_eps",),
    "add_layer_norm_eps": ("layer_norm_epsilon",),
    "add_key_length": ("head_dim",),
    "add_value_length": ("head_dim",),
    "add_expert_count": ("num_local_experts",),
    "add_expert_used_count": ("num_experts_per_tok",),
}
YARN = {  # key of rope_parameters: method of GGUFWriter
    "original_max_position_embeddings": "add_rope_scaling_orig_ctx_len",
    "attention_factor": "add_rope_scaling_yarn_attn_factor",
    "beta_fast": "add_rope_scaling_yarn_beta_fast",
    "beta_slow": "add_rope_scaling_yarn_beta_slow",
}
FILE_TYPES = {"float32": ("ALL_F32", "F32"), "float16": ("MOSTLY_F16", "F16"), "bfloat16": ("MOSTLY_BF16", "BF16")}
IN_FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")  # whatever the type of the others
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {LLAMA3: "llama-bpe", LLAMA3.replace("{1,3}", ""): "qwen2"}  # a tokenizer's regex: llama.cpp's name for it


def write_gguf(
    path: Path, name: str, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Tokenizer | None,
    files: dict[str, bytes], dtype: str,
) -> None:  # fmt: skip
    """Writes the file. Raises UserError for a model or tokenizer that llama.cpp doesn't compute."""
    gguf = import_extra("gguf")
    check_model(config)
    file_type, kind = FILE_TYPES[dtype]
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config["model_type"]]]
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[arch])
        names = gguf.get_tensor_name_map(arch, config.get("num_hidden_layers", config.get("n_layer")))
        for theirs, tensor in rearranged(config, tensors):
            ours = theirs if theirs.startswith("rope_freqs") else names.get_name(theirs, (".weight", ".bias"))
            whole = tensor.dim() == 1 or ours.endswith(IN_FLOAT32)
            as_type = gguf.GGMLQuantizationType["F32" if whole else kind]
            writer.add_tensor(ours, gguf.quants.quantize(tensor.numpy(), as_type), raw_dtype=as_type)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
        add_settings(writer, gguf, config)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, gguf, config, tokenizer, files)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_model(config: dict[str, Any]) -> None:
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise UserError(f"llama.cpp has no counterpart to {kind}: --to gguf takes {', '.join(ARCHITECTURES)}")
    activation = config.get("activation_function", "gelu_new")
    if activation != "gelu_new":
        raise UserError(f"llama.cpp's GPT-2 computes gelu_tanh alone, and the model has {activation}: use --to hf")
    if (rope := config.get("rope_parameters", {}).get("rope_type", "default")) == "dynamic":
        raise UserError(f"llama.cpp has no rotary_scaling = {rope}: use --to hf")


def rearranged(config: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in the layout of llama.cpp, by transformers' names or, where it has none, llama.cpp's."""
    kind, experts = config["model_type"], config.get("num_local_experts", 0)
    heads = {"q_proj": config.get("num_attention_heads", 0), "k_proj": config.get("num_key_value_heads", 0)}
    rope = config.get("rope_parameters", {})
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", llama3_factors(rope, head_width(config))
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        if kind == "gpt2" and tensor.dim() == 2 and module.startswith("c_"):
            tensor = tensor.T  # transformers stores (in, out)
        elif kind in ("llama", "mixtral") and module in heads:  # llama.cpp rotates neighbours, not halves
            tensor = tensor.unflatten(0, (heads[module], 2, -1)).transpose(1, 2).flatten(0, 2)
        elif ".experts." in name:
            if ".experts.0." in name:
                stacked = [tensors[name.replace(".experts.0.", f".experts.{i}.")] for i in range(experts)]
                name = name.removeprefix("model.").replace("block_sparse_moe.experts.0", "feed_forward.experts")
                yield name, torch.stack(stacked)
            continue
        yield name, tensor.contiguous()


def head_width(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def llama3_factors(rope: dict[str, Any], width: int) -> Tensor:
    """By what llama3's scaling divides each frequency (width / 2)."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2) / width)
    wavelengths = 2 * math.pi / frequencies  # to the bit as llama.cpp's converter has them
    context, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    kept = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - kept) / rope["factor"] + kept)


def add_settings(writer: Any, gguf: Any, config: dict[str, Any]) -> None:
    """Adds the model's sizes and its rotary positions to the file."""
    values = config | ({"n_inner": config["n_inner"] or 4 * config["n_embd"]} if config["model_type"] == "gpt2" else {})
    for method, keys in SIZES.items():
        for value in [values[key] for key in keys if values.get(key) is not None]:
            getattr(writer, method)(value)
    if config["model_type"] in ("llama", "mixtral"):
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_width(config))
    if "rope_parameters" not in config:
        return
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        for key in YARN.keys() & rope.keys():
            getattr(writer, YARN[key])(rope[key])


def add_tokenizer(
    writer: Any, gguf: Any, config: dict[str, Any], tokenizer: Tokenizer | None, files: dict[str, bytes]
) -> None:
    """Adds the vocabulary and its special tokens, or notes that there is none."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    table = json.loads(files.get(FILE_NAME, b"{}"))
    if isinstance(tokenizer, CharTokenizer):
        table["model"], split = byte_level(tokenizer), "gpt-2"
    else:
        split = split_of(table)
    vocabulary = {id: text for text, id in table["model"]["vocab"].items()}
    added = {token["id"]: token for token in table.get("added_tokens") or ()}
    texts, kinds = [], []
    for id in range(config["vocab_size"]):
        token = added.get(id)
        texts.append(token["content"] if token else vocabulary.get(id, f"[PAD{id}]"))
        named = gguf.TokenType.NORMAL if id in vocabulary else gguf.TokenType.UNUSED
        marked = gguf.TokenType.CONTROL if token and token["special"] else gguf.TokenType.USER_DEFINED
        kinds.append(marked if token else named)
    if settings := json.loads(files.get(SETTINGS_FILE, b"{}")):
        prefix = settings.get("add_prefix_space")
        if prefix is not None and config["model_type"] in ("llama", "mixtral"):
            writer.add_add_space_prefix(prefix)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:  # the package reads special tokens and merges from files
        for name, content in {**files, FILE_NAME: json.dumps(table), "config.json": json.dumps(config)}.items():
            write_file(Path(folder, name), content)
        gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)


def split_of(table: dict[str, Any]) -> str:
    """Returns llama.cpp's name for how a byte-level tokenizer splits text. Raises UserError for any other tokenizer."""
    steps = (table.get("pre_tokenizer") or {}).get("pretokenizers") or [table.get("pre_tokenizer") or {}]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if table.get("model", {}).get("type") == "BPE" and steps[-1].get("type") == "ByteLevel":
        if not patterns and steps[-1].get("use_regex", True):
            return "gpt-2"
        if len(patterns) == 1 and patterns[0] in SPLITS:
            return SPLITS[patterns[0]]
    raise UserError(
        "the tokenizer splits text in a way that --to gguf doesn't know; it takes characters and the byte-level BPE of "
        "GPT-2, Llama 3 and Qwen: export with --to hf, and try llama.cpp's convert_hf_to_gguf.py on that"
    )


def byte_level(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Returns a byte-level BPE whose merges spell exactly the characters, so that it encodes the same ids."""
    printable = byte_alphabet()
    spelled = ["".join(printable[byte] for byte in character.encode()) for character in tokenizer.characters]
    merges = {(text[:end], text[end]): None for text in spelled for end in range(1, len(text))}
    return {"type": "BPE", "vocab": {text: id for id, text in enumerate(spelled)}, "merges": [*map(list, merges)]}
