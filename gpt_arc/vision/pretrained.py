"""Image encoders in the format of Hugging Face's transformers: ViT, SigLIP and CLIP, without that library.

encoder, preprocessing = read_encoder(directory)
write_encoder(encoder, preprocessing, directory)    # config.json, model.safetensors, preprocessor_config.json
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Gt, Len
from pydantic import ConfigDict, with_config
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from gpt_arc.errors import UserError
from gpt_arc.files import replacing, write_file
from gpt_arc.manifest import record_files
from gpt_arc.nn.meta import meta_device
from gpt_arc.nn.names import Activation
from gpt_arc.reading import read_json
from gpt_arc.settings import mistake
from gpt_arc.vision.encoder import EncoderConfig, ImageEncoder
from gpt_arc.vision.images import Preprocessing
from gpt_arc.weights.huggingface import FLOATS, TRANSFORMERS_VERSION, stored_tensors
from gpt_arc.weights.tensor_files import WEIGHTS

PREPROCESSOR = "preprocessor_config.json"


class EncoderSource(NamedTuple):
    """An architecture of transformers in terms of ours."""

    class_name: str
    eps: float  # default of layer_norm_eps
    activation: str  # default of hidden_act
    settings: dict[str, bool]
    names: dict[str, str]  # our module or tensor outside the blocks: its name
    layers: str
    block: dict[str, tuple[str, ...]]  # our module in a block: its modules, stacked in order


LIKE_CLIP: dict[str, tuple[str, ...]] = {
    "attention_norm": ("layer_norm1",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.projection": ("self_attn.out_proj",),
    "mlp_norm": ("layer_norm2",),
    "mlp.up": ("mlp.fc1",),
    "mlp.projection": ("mlp.fc2",),
}
SOURCES = {
    "vit": EncoderSource(
        "ViTModel",
        1e-12,
        "gelu",
        {"class_token": True},
        {
            "patches": "embeddings.patch_embeddings.projection",
            "class_embedding": "embeddings.cls_token",
            "position_embedding.weight": "embeddings.position_embeddings",
            "final_norm": "layernorm",
        },
        "layers",
        {
            "attention_norm": ("layernorm_before",),
            "attention.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "attention.projection": ("attention.o_proj",),
            "mlp_norm": ("layernorm_after",),
            "mlp.up": ("mlp.fc1",),
            "mlp.projection": ("mlp.fc2",),
        },
    ),
    "siglip_vision_model": EncoderSource(
        "SiglipVisionModel",
        1e-6,
        "gelu_pytorch_tanh",
        {},
        {
            "patches": "embeddings.patch_embedding",
            "position_embedding": "embeddings.position_embedding",
            "final_norm": "post_layernorm",
        },
        "encoder.layers",
        LIKE_CLIP,
    ),
    "clip_vision_model": EncoderSource(
        "CLIPVisionModel",
        1e-5,
        "quick_gelu",
        {"class_token": True, "patch_bias": False, "first_norm": True, "final_norm": False},
        {
            "patches": "embeddings.patch_embedding",
            "class_embedding": "embeddings.class_embedding",
            "position_embedding": "embeddings.position_embedding",
            "first_norm": "pre_layrnorm",
        },
        "encoder.layers",
        LIKE_CLIP,
    ),
}
WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # models with a text encoder beside
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
    "relu": "relu",
}  # fmt: skip
SIZES = {  # transformers' key: (our setting, its default)
    "image_size": ("image_size", 224), "patch_size": ("patch_size", 16), "num_hidden_layers": ("n_layer", 12),
    "num_attention_heads": ("n_head", 12), "hidden_size": ("n_embd", 768), "intermediate_size": ("mlp_size", 3072),
}  # fmt: skip
FORMER = {  # a ViT's names before transformers 5
    "encoder.layer.": "layers.", "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj", "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
}  # fmt: skip


@with_config(ConfigDict(strict=True, extra="allow"))
class DeclaredEncoder(TypedDict, total=False):
    """The keys of a config.json of transformers that EncoderConfig doesn't check."""

    model_type: str
    hidden_act: str
    num_channels: int
    qkv_bias: bool
    layer_norm_eps: float
    vision_config: dict[str, Any]


Three = Annotated[list[float], Len(3, 3)]


@with_config(ConfigDict(strict=True, extra="allow"))
class Preprocessor(TypedDict, total=False):
    """The keys of a preprocessor_config.json that matter here."""

    image_mean: Three
    image_std: Annotated[list[Annotated[float, Gt(0)]], Len(3, 3)]
    do_center_crop: bool | None
    do_pad: bool | None  # to a square with the mean colour, as LlavaImageProcessor does


def encoder_config(content: dict[str, Any]) -> tuple[str, EncoderConfig]:
    """Returns the key of SOURCES and the architecture that a config.json of transformers describes.

    Raises UserError naming the key and its value if our encoder would compute something else.
    """
    kind = str(content.get("model_type"))
    if kind in WHOLE:
        kind, content = WHOLE[kind], content.get("vision_config", {})
    source = SOURCES.get(kind)
    if source is None:
        raise UserError(f'model_type = "{kind}" is not an image encoder: choose one of {", ".join((*SOURCES, *WHOLE))}')
    activation = content.get("hidden_act", source.activation)
    for key, value, allowed in (
        ("num_channels", content.get("num_channels", 3), (3,)),
        ("qkv_bias", content.get("qkv_bias", True), (True,)),
        ("hidden_act", activation, tuple(ACTIVATIONS)),
    ):
        if value not in allowed:
            raise UserError(f"{key} = {value} can't be computed: choose one of {', '.join(map(str, allowed))}")
    default_patch = 32 if kind == "clip_vision_model" else 16
    settings = {name: content.get(key, default) for key, (name, default) in SIZES.items()}
    settings["patch_size"] = content.get("patch_size", default_patch)
    settings |= source.settings | {"activation": ACTIVATIONS[activation]}
    try:
        return kind, EncoderConfig(**settings, norm_eps=content.get("layer_norm_eps", source.eps))
    except (TypeError, ValueError) as error:
        raise UserError(f"it doesn't describe a valid encoder: {mistake(error, EncoderConfig)}") from None


def _parts(name: str, source: EncoderSource) -> list[str]:
    """Returns the tensors of transformers that our tensor `name` stacks."""
    if name in source.names:
        return [source.names[name]]
    module, kind = name.rpartition(".")[::2]
    if module in source.names:
        return [f"{source.names[module]}.{kind}"]
    _, layer, module = module.split(".", 2)
    return [f"{source.layers}.{layer}.{part}.{kind}" for part in source.block[module]]


def _plain_name(name: str) -> str:
    """Returns a tensor's name in transformers 5, without what encloses the encoder."""
    name = re.sub(r"^(vit\.|vision_tower\.)?((.*\.)?vision_model\.)?", "", name)
    for former, present in FORMER.items():
        name = name.replace(former, present) if ".mlp." not in name else name
    return name


def read_encoder(directory: Path) -> tuple[ImageEncoder, Preprocessing]:
    """Reads an image encoder that transformers saved: a ViTModel, SiglipVisionModel or CLIPVisionModel, or a whole
    CLIP or SigLIP. Its pooled outputs and its text encoder are left out.

    Raises UserError naming the file and the key or tensor that is missing or doesn't fit.
    """
    path = directory / "config.json"
    try:
        kind, config = encoder_config(dict(read_json(path, DeclaredEncoder)))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    return read_encoder_tensors(directory, kind, config), read_preprocessing(directory)


def read_encoder_tensors(directory: Path, kind: str, config: EncoderConfig) -> ImageEncoder:
    """Returns an encoder with the tensors of `kind`, a key of SOURCES, in a directory. Raises UserError."""
    stored = {_plain_name(tensor.name): tensor for tensor in stored_tensors(directory)}
    with meta_device():
        encoder = ImageEncoder(config)
    tensors: dict[str, Tensor] = {}
    for name, empty in encoder.state_dict().items():
        parts = _parts(name, SOURCES[kind])
        for part in parts:
            if part not in stored:
                raise UserError(f"{directory} lacks the tensor {part}")
            header = stored[part].file.get_slice(stored[part].name)
            shape = tuple(header.get_shape())
            expected = (empty.size(0) // len(parts), *empty.shape[1:])
            if shape != (1,) * (len(shape) - len(expected)) + expected:
                raise UserError(f"{stored[part].path}: {stored[part].name} has the shape {shape}, not {expected}")
            if header.get_dtype() not in FLOATS:
                raise UserError(f"{stored[part].path}: {stored[part].name} has the type {header.get_dtype()}")
        tensors[name] = torch.cat([stored[part].read().reshape(-1) for part in parts]).reshape(empty.shape)
    encoder.load_state_dict(tensors, assign=True)
    return encoder


def encoder_kind(config: EncoderConfig) -> str | None:
    """Returns the key of SOURCES whose models compute what an encoder of this architecture does; None if none does."""
    names = {name for source in SOURCES.values() for name in source.settings}
    usual = EncoderConfig()
    for kind, source in SOURCES.items():
        if all(getattr(config, name) == source.settings.get(name, getattr(usual, name)) for name in names):
            return kind
    return None


def hf_encoder_config(config: EncoderConfig, kind: str) -> dict[str, Any]:
    """Returns the config.json of an encoder of `kind`, a key of SOURCES."""
    content = {key: getattr(config, name) for key, (name, _) in SIZES.items()}
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    content |= {"intermediate_size": config.block.mlp_width, "model_type": kind, "hidden_act": activation}
    content |= {"layer_norm_eps": config.norm_eps, "num_channels": 3}
    return content | ({"vision_use_head": False} if kind == "siglip_vision_model" else {})


def encoder_tensors(encoder: ImageEncoder, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the encoder's tensors, on the CPU in float32, named and shaped as in `kind`, a key of SOURCES."""
    for name, tensor in encoder.state_dict().items():
        if kind == "vit" and name in ("class_embedding", "position_embedding.weight"):
            tensor = tensor.reshape(1, -1, tensor.size(-1))
        parts = _parts(name, SOURCES[kind])
        for part, rows in zip(parts, tensor.detach().float().cpu().chunk(len(parts))):
            yield part, rows.contiguous()


def write_encoder(encoder: ImageEncoder, preprocessing: Preprocessing, directory: Path) -> None:
    """Writes an encoder of an `encoder_kind` for transformers."""
    kind = encoder_kind(encoder.config)
    assert kind is not None  # whoever trains it checks first
    content = {"architectures": [SOURCES[kind].class_name], "dtype": "float32"}
    content |= {"transformers_version": TRANSFORMERS_VERSION, **hf_encoder_config(encoder.config, kind)}
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS) as temporary:
        save_file(dict(encoder_tensors(encoder, kind)), temporary, metadata={"format": "pt"})
    write_file(directory / "config.json", json.dumps(content, indent=1) + "\n")
    write_preprocessing(preprocessing, directory)
    record_files(directory, "config.json", WEIGHTS)


def write_preprocessing(preprocessing: Preprocessing, directory: Path) -> None:
    """Writes the preprocessor_config.json that `read_preprocessing` reads."""
    content = {"image_mean": preprocessing.mean, "image_std": preprocessing.std}
    content |= {"do_center_crop": preprocessing.fit == "crop", "do_pad": preprocessing.fit == "pad"}
    write_file(directory / PREPROCESSOR, json.dumps(content, indent=1) + "\n")
    record_files(directory, PREPROCESSOR)


def read_preprocessing(directory: Path) -> Preprocessing:
    """Returns what a preprocessor_config.json says, or the usual settings if there is none."""
    path = directory / PREPROCESSOR
    content = read_json(path, Preprocessor) if path.exists() else {}
    usual = Preprocessing()
    return Preprocessing(
        fit="crop" if content.get("do_center_crop") else "pad" if content.get("do_pad") else "stretch",
        mean=tuple(content.get("image_mean", usual.mean)),
        std=tuple(content.get("image_std", usual.std)),
    )
