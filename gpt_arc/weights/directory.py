"""Model directories: saving and loading models.

A model directory holds config.json, model.safetensors and tokenizer.json, all that is needed to use the model. A
checkpoint is a model directory `step-00002000` that also holds training_state.pt. In a run folder, `last` and `best`
are links to two checkpoints.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import save_file

from gpt_arc import hub
from gpt_arc.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from gpt_arc.errors import UserError
from gpt_arc.files import replacing, write_file
from gpt_arc.settings import mistake
from gpt_arc.weights.huggingface import config_from_hf
from gpt_arc.weights.huggingface import read_tensors as read_converted
from gpt_arc.weights.meta import meta_device
from gpt_arc.weights.tensor_files import read_tensors
from model import GPT, GPTConfig

MODEL_TYPE, FORMAT_VERSION = "gpt-arc", 1
# architecture settings that only training reads and no tensor depends on
OF_TRAINING = {"dropout", "embedding_dropout", "attention_dropout", "residual_dropout", "expert_dropout"}
OF_TRAINING |= {"expert_selection", "capacity_factor", "router_jitter", "balance_loss", "router_z_loss"}
# settings that may change on loading; a smaller context truncates learned positions
REPLACEABLE = OF_TRAINING | {"init", "block_size"}


def save_model(model: GPT, tokenizer: Tokenizer | None, directory: Path | str) -> None:
    """Writes a model directory, replacing existing files one at a time."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    content = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **asdict(model.config)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(directory / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(directory)
    write_file(directory / "config.json", json.dumps(content, indent=1) + "\n")


def model_directory(path: Path | str) -> Path:
    """Returns the model directory for `path`: the path itself, a run folder's `best` or else `last`, or a hub download.

    Raises UserError if there is none.
    """
    return _directory(path, hub.CONFIG + hub.WEIGHTS + hub.TOKENIZER)


def _directory(path: Path | str, files: tuple[str, ...]) -> Path:
    """`model_directory`, but downloads only `files` from the hub."""
    path, name = Path(path), str(path)
    for directory in (path, path / "best", path / "last"):
        if (directory / "config.json").is_file():
            return directory
    if hub.is_name(name) and not path.exists():
        return hub.download(name, files)
    if not path.exists():
        raise UserError(
            f"there is no model directory {path}; known Hugging Face hub models are {', '.join(hub.NAMES)}; name any "
            f"other as {hub.PREFIX}OWNER/NAME"
        )
    raise UserError(f"{path} is not a model directory: it has neither config.json nor a best or last checkpoint")


def load_config(path: Path | str) -> GPTConfig:
    """Returns the architecture of any model that `load_model` accepts; from the hub, downloads config.json alone.

    Raises UserError if config.json is damaged or describes an unsupported architecture.
    """
    return _read_config(_directory(path, hub.CONFIG))[1]


def _read_config(directory: Path) -> tuple[str, GPTConfig]:
    """Returns a model directory's model_type, MODEL_TYPE or one of transformers', and its architecture."""
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        kind = content.pop("model_type")
        version = content.pop("format_version") if kind == MODEL_TYPE else FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a model's config: {type(error).__name__}: {error}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} describes a model of version {version}; this program reads version {FORMAT_VERSION}")
    try:
        return kind, GPTConfig(**content) if kind == MODEL_TYPE else config_from_hf({"model_type": kind, **content})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {mistake(error, GPTConfig)}") from None


def load_model(
    path: Path | str, config: GPTConfig | None = None, dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer | None]:
    """Returns the model, on the CPU, in `dtype` and in training mode, and its tokenizer if it has one.

    `path` is a model directory, a run folder, a directory saved by transformers (gpt2, openai-gpt, qwen3 or mixtral) or
    the hub name of such a model; a local folder takes precedence. `config` replaces the stored one. It may differ in
    the REPLACEABLE settings only, and learned positions allow only a smaller block_size. The vocabulary may have more
    rows than the tokenizer has tokens, as Qwen's does, or lack some added to the tokenizer, see `Tokenizer.restrict`.

    Raises UserError naming the file and tensor if something is missing, unexpected, damaged or has the wrong shape.
    """
    directory = model_directory(path)
    kind, stored = _read_config(directory)
    config = config or stored
    for field in fields(GPTConfig):
        value, trained = getattr(config, field.name), getattr(stored, field.name)
        if value != trained and field.name not in REPLACEABLE:
            raise UserError(f"{field.name} = {value} contradicts the model {directory}, which has {trained}")
    if config.block_size > stored.block_size and config.positions == "learned":
        raise UserError(
            f"block_size = {config.block_size} is more than the {stored.block_size} positions learned by the model "
            f"{directory}"
        )
    try:
        with meta_device():
            model = GPT(config)
            shapes = {name: tensor.shape for name, tensor in GPT(stored).state_dict().items()}
    except TypeError as error:
        raise UserError(f"{directory / 'config.json'} is damaged: {error}") from None
    if kind == MODEL_TYPE:
        tensors = read_tensors(directory / "model.safetensors", shapes, dtype)
    else:
        tensors = read_converted(directory, kind, stored, shapes)
        tensors = {name: tensors.pop(name).to(dtype) for name in shapes}
    if config.block_size < stored.block_size and config.positions == "learned":
        tensors["position_embedding.weight"] = tensors["position_embedding.weight"][: config.block_size].clone()
    model.load_state_dict(tensors, assign=True)
    if not holds_tokenizer(directory):
        return model, None
    tokenizer = load_tokenizer(directory)
    try:
        tokenizer.restrict(config.vocab_size)
    except UserError as error:
        raise UserError(f"the tokenizer in {directory} belongs to another model: {error}") from None
    return model, tokenizer


def load_text_model(path: Path | str, dtype: torch.dtype = torch.float32) -> tuple[GPT, Tokenizer]:
    """`load_model` for a model that must have a tokenizer. Raises UserError if it has none."""
    model, tokenizer = load_model(path, dtype=dtype)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer, so it can't read text")
    return model, tokenizer
