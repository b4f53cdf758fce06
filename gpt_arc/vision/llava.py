"""Models that read images in the format of transformers' LlavaForConditionalGeneration, without that library.

    model = read_llava(directory)
    write_llava(model, directory)           # config.json and model.safetensors

Its text model is one of `gpt_arc/weights/huggingface.py`, its encoder a CLIP or SigLIP.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, with_config
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from gpt_arc.errors import UserError
from gpt_arc.files import replacing, write_file
from gpt_arc.manifest import record_files
from gpt_arc.nn.meta import meta_device
from gpt_arc.reading import read_json
from gpt_arc.vision.encoder import EncoderConfig
from gpt_arc.vision.model import VisionGPT
from gpt_arc.vision.pretrained import (
    SOURCES,
    encoder_config,
    encoder_kind,
    encoder_tensors,
    hf_encoder_config,
    read_encoder_tensors,
    read_preprocessing,
    write_preprocessing,
)
from gpt_arc.vision.projector import Projector, ProjectorConfig
from gpt_arc.weights.edit import with_more_tokens
from gpt_arc.weights.huggingface import TRANSFORMERS_VERSION, config_from_hf, hf_config, hf_tensors, read_tensors
from gpt_arc.weights.huggingface import stored_tensors as all_tensors
from model import GPT

TEXT, PROJECTOR = "language_model.", "multi_modal_projector."
LAYERS = {"first": "linear_1", "second": "linear_2"}


@with_config(ConfigDict(strict=True, extra="allow"))
class LlavaFile(TypedDict, total=False):
    """The keys of a config.json that matter here."""

    model_type: str
    text_config: dict[str, Any]
    vision_config: dict[str, Any]
    vision_feature_layer: int
    vision_feature_select_strategy: str
    projector_hidden_act: str
    multimodal_projector_bias: bool


def is_llava(directory: Path) -> bool:
    """Whether a folder holds a model in this format."""
    path = directory / "config.json"
    return path.is_file() and read_json(path).get("model_type") == "llava"


def read_llava(directory: Path) -> VisionGPT:
    """Reads a model with its encoder up to the layer whose features it uses.

    Raises UserError naming the file and the key or tensor that is missing or can't be computed.
    """
    path = directory / "config.json"
    content: LlavaFile = read_json(path, LlavaFile)
    try:
        kind, encoder = _encoder(content)
        text_content = content.get("text_config", {})
        names = {tensor.name for tensor in all_tensors(directory)}
        tied = TEXT + "lm_head.weight" not in names
        config = config_from_hf({**text_content, "tie_word_embeddings": tied})
    except UserError as error:
        raise error if str(directory) in str(error) else UserError(f"{path}: {error}") from None
    projection = ProjectorConfig(2, content.get("multimodal_projector_bias", True))
    with meta_device():
        text, projector = GPT(config), Projector(projection, encoder.n_embd, config.n_embd)
    shapes = {name: tensor.shape for name, tensor in text.state_dict().items()}
    text.load_state_dict(read_tensors(directory, text_content["model_type"], config, shapes, TEXT), assign=True)
    projector.load_state_dict(_projector_tensors(directory, projector), assign=True)
    return VisionGPT(text, read_encoder_tensors(directory, kind, encoder), projector, read_preprocessing(directory))


def _encoder(content: LlavaFile) -> tuple[str, EncoderConfig]:
    """Returns the kind and the architecture of the encoder up to the layer whose features are used."""
    kind, config = encoder_config(content.get("vision_config", {}))
    layer, strategy = content.get("vision_feature_layer", -2), content.get("vision_feature_select_strategy", "default")
    n_layer = config.n_layer + 1 + layer if layer < 0 else layer
    if not 1 <= n_layer <= config.n_layer:
        raise UserError(f"vision_feature_layer = {layer} is not a layer of the {config.n_layer}")
    if (strategy == "default") != config.class_token:
        raise UserError(f'vision_feature_select_strategy = "{strategy}" drops or keeps a token that isn\'t a patch')
    if content.get("projector_hidden_act", "gelu") != "gelu":
        raise UserError(f'projector_hidden_act = "{content.get("projector_hidden_act")}" can\'t be computed: use gelu')
    return kind, replace(config, n_layer=n_layer, final_norm=False)


def _projector_tensors(directory: Path, projector: Projector) -> dict[str, Tensor]:
    stored = {tensor.name: tensor for tensor in all_tensors(directory)}
    tensors = {}
    for name, empty in projector.state_dict().items():
        layer, kind = name.split(".")
        theirs = f"{PROJECTOR}{LAYERS[layer]}.{kind}"
        if theirs not in stored:
            raise UserError(f"{directory} lacks the tensor {theirs}")
        tensors[name] = stored[theirs].read()
        if tensors[name].shape != empty.shape:
            shape = tuple(tensors[name].shape)
            raise UserError(f"{stored[theirs].path}: {theirs} has the shape {shape}, not {tuple(empty.shape)}")
    return tensors


def llava_encoder(config: EncoderConfig) -> str:
    """Returns the kind of encoder in a LLaVA that computes these features. Raises UserError if none does."""
    whole = replace(config, final_norm=not config.first_norm)  # a SigLIP's last norm follows the features
    kind = None if config.final_norm else encoder_kind(whole)
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UserError(
            "no LLaVA has this image encoder: it must be a CLIP's (class_token, first_norm, no patch_bias) or a "
            "SigLIP's (none of the first two), and have final_norm = false"
        )
    return kind


def write_llava(model: VisionGPT, directory: Path) -> None:
    """Writes the model for transformers, with one more token, the placeholder. Raises UserError if no LLaVA equals it.

    Another block, unused and equal to the last, follows in the encoder: the features are those of the one before it.
    """
    kind, config, projection = llava_encoder(model.encoder.config), model.encoder.config, model.projector.config
    if projection.projector_layers != 2 or projection.pixel_shuffle != 1:
        raise UserError("a LLaVA's projector has two layers and no pixel_shuffle: this one can't be exported")
    if model.text.prefix_attention:
        raise UserError("a LLaVA has causal attention only: a model with prefix_attention can't be exported")
    text = with_more_tokens(model.text, 1)
    vision = hf_encoder_config(config, kind) | {"num_hidden_layers": config.n_layer + 1}
    content = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float32",
        "transformers_version": TRANSFORMERS_VERSION,
        "text_config": hf_config(text.config),
        "vision_config": vision,
        "image_token_index": model.config.vocab_size,
        "image_seq_length": model.embeddings_per_image,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default" if config.class_token else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": projection.projector_bias,
        "tie_word_embeddings": text.config.tied_head,
    }
    tensors = {TEXT + name: tensor for name, tensor in hf_tensors(text)}
    for name, tensor in model.projector.state_dict().items():
        layer, kind_of_tensor = name.split(".")
        tensors[f"{PROJECTOR}{LAYERS[layer]}.{kind_of_tensor}"] = tensor.detach().float().cpu().contiguous()
    last, unused = (f"{SOURCES[kind].layers}.{layer}." for layer in (config.n_layer - 1, config.n_layer))
    for name, tensor in encoder_tensors(model.encoder, kind):
        tensors["vision_tower." + name] = tensor
        if name.startswith(last):
            tensors["vision_tower." + name.replace(last, unused)] = tensor.clone()
    for kind_of_tensor, value in (("weight", torch.ones), ("bias", torch.zeros)):
        tensors[f"vision_tower.post_layernorm.{kind_of_tensor}"] = value(config.n_embd)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_file(directory / "config.json", json.dumps(content, indent=1) + "\n")
    write_preprocessing(model.preprocessing, directory)
    record_files(directory, "config.json", "model.safetensors")
