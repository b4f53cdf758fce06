"""Model directories and checkpoints: folders that are whole or not there.

A model directory is config.json, model.safetensors and tokenizer.json: all that using the model takes. A checkpoint is
a model directory with training_state.pt, one folder `step-00002000` a time; in a run folder `last` and `best` point
to two of them.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from gpt_arc import hub
from gpt_arc.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from gpt_arc.errors import UserError
from gpt_arc.files import replacing, write_file
from gpt_arc.settings import mistake
from gpt_arc.weights.huggingface import config_from_hf, read_tensors
from model import GPT, GPTConfig

MODEL_TYPE, FORMAT_VERSION = "gpt-arc", 1
# settings of the architecture that training alone reads, and no tensor depends on
OF_TRAINING = {"dropout", "embedding_dropout", "attention_dropout", "residual_dropout", "expert_dropout"}
OF_TRAINING |= {"expert_selection", "capacity_factor", "router_jitter", "balance_loss", "router_z_loss"}
# what a loaded model may have otherwise than it was saved with; of learned positions a smaller context cuts the tensor
REPLACEABLE = OF_TRAINING | {"init", "block_size"}


class NothingDrawn(TorchFunctionMode):
    """In which modules draw no initial weights: on the meta device that would import torch._dynamo, for seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def save_model(model: GPT, tokenizer: Tokenizer | None, directory: Path | str) -> None:
    """Write a model directory; files that are there already are replaced one by one."""
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
    """The model directory that `path` is, for a run folder its best one, else its last; or a model of the hub, by name.

    Raises UserError.
    """
    return _directory(path, hub.CONFIG + hub.WEIGHTS + hub.TOKENIZER)


def _directory(path: Path | str, files: tuple[str, ...]) -> Path:
    """`model_directory`, where a model of the hub needs no more than `files`."""
    path, name = Path(path), str(path)
    for directory in (path, path / "best", path / "last"):
        if (directory / "config.json").is_file():
            return directory
    if hub.is_name(name) and not path.exists():
        return hub.download(name, files)
    if not path.exists():
        raise UserError(
            f"there is no model directory {path}; of the Hugging Face hub's models, {', '.join(hub.NAMES)} are known, "
            f"and any other is {hub.PREFIX}OWNER/NAME"
        )
    raise UserError(f"{path} is not a model directory: it has no config.json, and no best or last checkpoint")


def load_config(path: Path | str) -> GPTConfig:
    """The architecture of a model, whatever `load_model` takes; of the hub's models config.json alone is downloaded.

    Raises UserError if it is damaged or not an architecture of ours.
    """
    return _read_config(_directory(path, hub.CONFIG))[1]


def _read_config(directory: Path) -> tuple[str, GPTConfig]:
    """The kind of a model directory, MODEL_TYPE or one of transformers', and its architecture."""
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        kind = content.pop("model_type")
        version = content.pop("format_version") if kind == MODEL_TYPE else FORMAT_VERSION
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a model's: {type(error).__name__}: {error}") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} describes a model of the version {version}; this program reads the version {FORMAT_VERSION}"
        )
    try:
        return kind, GPTConfig(**content) if kind == MODEL_TYPE else config_from_hf({"model_type": kind, **content})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {mistake(error, GPTConfig)}") from None


def load_model(
    path: Path | str, config: GPTConfig | None = None, dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer | None]:
    """The model, on the CPU, in `dtype` and in training mode, and its tokenizer.

    `path` is a model directory, a run folder, a directory of transformers' (gpt2, openai-gpt, qwen3 or mixtral) or the
    name of such a model on the hub; a local folder comes first. `config` replaces the stored one: it may differ in what
    training alone reads, and have another block_size, a smaller one where positions are
    learned. The vocabulary may have more rows than the tokenizer has tokens, as Qwen's has.

    Raises UserError naming the file and the tensor if something is missing, surplus, of another shape or damaged.
    """
    directory = model_directory(path)
    kind, stored = _read_config(directory)
    config = config or stored
    for field in fields(GPTConfig):
        asked, trained = getattr(config, field.name), getattr(stored, field.name)
        if asked != trained and field.name not in REPLACEABLE:
            raise UserError(f"{field.name} = {asked} contradicts the model {directory}, which has {trained}")
    if config.block_size > stored.block_size and config.positions == "learned":
        raise UserError(
            f"block_size = {config.block_size} is more than the {stored.block_size} positions that the model "
            f"{directory} has learned"
        )
    try:
        with torch.device("meta"), NothingDrawn():
            model = GPT(config)
            shapes = {name: tensor.shape for name, tensor in GPT(stored).state_dict().items()}
    except TypeError as error:
        raise UserError(f"{directory / 'config.json'} is damaged: {error}") from None
    if kind == MODEL_TYPE:
        tensors = _read_tensors(directory / "model.safetensors", shapes, dtype)
    else:
        tensors = read_tensors(directory, kind, stored, shapes)
        tensors = {name: tensors.pop(name).to(dtype) for name in shapes}
    if config.block_size < stored.block_size and config.positions == "learned":
        tensors["position_embedding.weight"] = tensors["position_embedding.weight"][: config.block_size].clone()
    model.load_state_dict(tensors, assign=True)
    if not holds_tokenizer(directory):
        return model, None
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens for a model of {config.vocab_size}"
        raise UserError(f"the tokenizer in {directory} is another model's: {sizes}")
    return model, tokenizer


def _read_tensors(path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a file of ours, which has to hold those of `shapes` and no others. Raises UserError."""
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            stored = set(file.keys())
        for what, names in (("lacks", shapes.keys() - stored), ("has beyond the model", stored - shapes.keys())):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(f"{path} {what} the tensor {min(names)}{more}")
        for name, shape in shapes.items():
            with safe_open(path, "pt") as file:  # anew: as long as it is open, what was read of it stays in memory
                tensor = file.get_tensor(name)
                if tensor.shape != shape:
                    raise UserError(f"{path}: {name} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
                if not tensor.is_floating_point():
                    raise UserError(f"{path}: {name} has the type {tensor.dtype}, not one of floating point")
                tensors[name] = tensor.to(dtype)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged, use another checkpoint: {error}") from None
    return tensors
