"""Model directories: saving and loading models.

A model directory holds config.json, model.safetensors (for a large model in parts, with an index) and tokenizer.json,
all that is needed to use the model, and their checksums, manifest.json. A checkpoint is a model directory
`step-00002000` that also holds training_state.pt. In a run folder, `last` and `best` are links to two checkpoints.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from gpt_arc import hub
from gpt_arc.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from gpt_arc.errors import UserError, first_line
from gpt_arc.files import command, follow, locked, whole, write_file
from gpt_arc.manifest import DamagedFile, checking, record_files
from gpt_arc.nn.meta import meta_device
from gpt_arc.reading import read_json, reading
from gpt_arc.settings import mistake
from gpt_arc.tables import counted
from gpt_arc.weights.checkpoint_folders import ATTEMPTS, deleted_too_soon, named_checkpoint, undamaged_before
from gpt_arc.weights.huggingface import STRETCHING, config_from_hf, stored_tensors
from gpt_arc.weights.huggingface import read_tensors as read_converted
from gpt_arc.weights.tensor_files import INDEX, PARTS, WEIGHTS, open_weights, read_weights, write_weights
from model import GPT, GPTConfig

MANY_BLOCKS = 100  # from which on a config is compared with the weights before so many modules are made
MODEL_TYPE, FORMAT_VERSION = "gpt-arc", 1
VISION_FILE = "vision.json"  # beside a model that reads images (gpt_arc/vision/model.py)
# architecture settings that only training reads and no tensor depends on
OF_TRAINING = {"dropout", "embedding_dropout", "attention_dropout", "residual_dropout", "expert_dropout"}
OF_TRAINING |= {"expert_selection", "capacity_factor", "router_jitter", "balance_loss", "router_z_loss"}
# settings that older versions don't know, and the value that means what these do
LATER = {
    "base_width": None,
    "mixer": "attention",
    "attention": "causal",
    "head_transform": False,
    "embedding_norm": False,
    "token_types": 0,
    "next_sentence": False,
}
LATER |= {"encoder_layers": 0, "embedding_scale": 1.0, "rotary_scaling": None, "rotary_factor": 1.0}
LATER |= {
    "attention_sinks": 0,
    "rotary_context": None,
    "rotary_fast": None,
    "rotary_slow": 1.0,
    "rotary_attention_factor": None,
}
# settings that may change on loading; a smaller context truncates learned positions
REPLACEABLE = OF_TRAINING | STRETCHING | {"init", "base_width", "block_size"}

P = ParamSpec("P")
T = TypeVar("T")


@with_config(ConfigDict(strict=True, extra="allow"))
class ModelConfig(TypedDict):
    """A model's config.json. GPTConfig and `config_from_hf` check the other keys."""

    model_type: str


def save_model(model: GPT, tokenizer: Tokenizer | None, directory: Path | str) -> None:
    """Writes a model directory, replacing existing files one at a time."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = asdict(model.config)
    settings = {name: value for name, value in settings.items() if name not in LATER or value != LATER[name]}
    content = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **settings}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights = write_weights(directory, tensors)
    superseded = {path.name for path in directory.glob(PARTS)}.union((WEIGHTS, INDEX)).difference(weights)
    for name in superseded:
        (directory / name).unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save(directory)
    write_file(directory / "config.json", json.dumps(content, indent=1) + "\n")
    tokenizer_files = tokenizer.files() if tokenizer is not None else ()
    record_files(directory, "config.json", *weights, *tokenizer_files, removed=superseded)


def model_directory(path: Path | str) -> Path:
    """Returns the model directory for `path`: the path itself, the checkpoint that a run folder's `best` or else `last`
    names at present, or a hub download.

    Raises UserError if there is none.
    """
    return _directory(path, hub.CONFIG + hub.WEIGHTS + hub.TOKENIZER)


def local_directory(path: Path | str) -> Path | None:
    """`model_directory` without the hub: None if there is none on this machine."""
    path = whole(Path(path))
    for _ in range(ATTEMPTS):
        directories = [follow(path), named_checkpoint(path, "best"), named_checkpoint(path, "last")]
        for directory in directories:
            if directory and (directory / "config.json").is_file():
                return directory
        if all(directory in (None, path) or directory.exists() for directory in directories):
            return None
    return None  # each was deleted as soon as it was named


def _directory(path: Path | str, files: tuple[str, ...]) -> Path:
    """`model_directory`, but downloads only `files` from the hub."""
    directory, path, name = local_directory(path), Path(path), str(path)
    if directory:
        return directory
    if hub.is_name(name) and not path.exists():
        return hub.download(name, files)
    if not path.exists():
        raise UserError(
            f"there is no model directory {path}; known Hugging Face hub models are {', '.join(hub.NAMES)}; name any "
            f"other as {hub.PREFIX}OWNER/NAME; `{command('tools/runs.py')}` lists your runs"
        )
    raise UserError(f"{path} is not a model directory: it has neither config.json nor a best or last checkpoint")


def reads_images(directory: Path) -> bool:
    """Whether a model directory has an image encoder."""
    return (directory / VISION_FILE).is_file()


def refuse_images(path: Path | str, instead: str = "name the text model that it was made from") -> None:
    """Raises UserError, with what to do instead, if a model reads images: its text model alone would be saved."""
    directory = local_directory(path)
    if directory and reads_images(directory):
        raise UserError(f"{path} reads images, and only its text model would be saved: {instead}")


def of_one_checkpoint(load: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path | str, P], T]:
    """Decorates a function that loads from a model directory: it gets what `model_directory` returns for its `path`.

    All that it reads is of one checkpoint, which its run doesn't delete meanwhile. Where there are no locks the run
    may; then the function is called again with the present one.
    """

    @functools.wraps(load)
    def wrapped(path: Path | str, *args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(ATTEMPTS):
            directory = model_directory(path)
            try:
                with locked(directory, shared=True):
                    loaded = load(directory, *args, **kwargs)
                    if (directory / "config.json").exists():
                        return loaded
            except (BlockingIOError, FileNotFoundError):
                if (directory / "config.json").exists():
                    raise
            except UserError as error:
                if not (directory / "config.json").exists():
                    continue
                older = undamaged_before(directory) if isinstance(error, DamagedFile) else None
                if older is None:
                    raise
                raise UserError(f"{error}; {older} is undamaged") from None
        raise deleted_too_soon(path)

    return wrapped


def load_config(path: Path | str) -> GPTConfig:
    """Returns the architecture of any model that `load_model` accepts; from the hub, downloads config.json alone.

    Raises UserError if config.json is damaged or describes an unsupported architecture.
    """
    return _read_config(_directory(path, hub.CONFIG))[1]


def _read_config(directory: Path) -> tuple[str, GPTConfig]:
    """Returns a model directory's model_type, MODEL_TYPE or one of transformers', and its architecture."""
    path = directory / "config.json"
    content = read_json(path, ModelConfig)
    kind = content.pop("model_type")
    with reading(path):
        version = content.pop("format_version") if kind == MODEL_TYPE else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise UserError(f"{path} describes a model of version {version}; this program reads version {FORMAT_VERSION}")
    try:
        config = GPTConfig(**content) if kind == MODEL_TYPE else config_from_hf({"model_type": kind, **content})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {mistake(error, GPTConfig)}") from None
    if config.n_layer > MANY_BLOCKS and any(directory.glob("*.safetensors")):
        tensors = sum(1 for _ in stored_tensors(directory))
        if config.n_layer > tensors:
            raise UserError(
                f"{path} describes {config.n_layer} blocks, and the weights beside it are {counted(tensors, 'tensor')}"
            )
    return kind, config


@of_one_checkpoint
def load_model(
    path: Path | str, config: GPTConfig | None = None, dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer | None]:
    """Returns the model, on the CPU, in `dtype` and in training mode, and its tokenizer if it has one.

    `path` is a model directory, a run folder, a directory saved by transformers (one of its ARCHITECTURES) or the hub
    name of such a model; a local folder takes precedence. `config` replaces the stored one. It may differ in
    the REPLACEABLE settings only, and learned positions allow only a smaller block_size. The vocabulary may have more
    rows than the tokenizer has tokens, as Qwen's does. Special tokens may lie beyond it, as a [PAD] that was added
    without a row often does.

    Raises UserError naming the file and tensor if something is missing, unexpected, damaged or has the wrong shape.
    """
    directory = Path(path)
    with checking(directory, sizes_only=(".pt",)):  # the training state
        return _load(directory, config, dtype)


def _load(directory: Path, config: GPTConfig | None, dtype: torch.dtype) -> tuple[GPT, Tokenizer | None]:
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
    model = _without_weights(directory, config)
    shapes = _shapes(model if config == stored else _without_weights(directory, stored))
    if kind == MODEL_TYPE:
        tensors = read_weights(directory, shapes, dtype)
    else:
        tensors = read_converted(directory, kind, stored, shapes)
        tensors = {name: tensors.pop(name).to(dtype) for name in shapes}
    if config.block_size < stored.block_size and config.positions == "learned":
        tensors["position_embedding.weight"] = tensors["position_embedding.weight"][: config.block_size].clone()
    model.load_state_dict(tensors, assign=True)
    return model, _tokenizer_of(directory, config)


def _without_weights(directory: Path, config: GPTConfig) -> GPT:
    try:
        with meta_device():
            return GPT(config)
    except (TypeError, RuntimeError) as error:  # a size or a product of sizes that no tensor can have
        raise UserError(f"{directory / 'config.json'} is damaged: {first_line(error)}") from None


def _shapes(model: GPT) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _tokenizer_of(directory: Path, config: GPTConfig) -> Tokenizer | None:
    """Returns a model's tokenizer, None if it has none. Raises UserError if it is too large for the model."""
    if not holds_tokenizer(directory):
        return None
    tokenizer = load_tokenizer(directory)
    needed = max(tokenizer.text_size, (tokenizer.end_of_text or 0) + 1)
    if needed > config.vocab_size:
        sizes = f"it has {needed} tokens, the model {config.vocab_size}"
        raise UserError(f"the tokenizer in {directory} belongs to another model: {sizes}")
    return tokenizer


@of_one_checkpoint
def check_model(path: Path | str) -> Tokenizer | None:
    """Returns a model's tokenizer. Raises UserError if its files aren't as they were written or one can't be read.

    Reads no weights into memory.
    """
    directory = Path(path)
    with checking(directory, sizes_only=(".pt",)):
        kind, config = _read_config(directory)
        if kind == MODEL_TYPE:
            open_weights(directory, _shapes(_without_weights(directory, config)))
        else:
            list(stored_tensors(directory))
        return _tokenizer_of(directory, config)


def require_causal(path: Path | str, model: GPT) -> GPT:
    """Returns the model loaded from `path`. Raises UserError unless it is a language model that continues texts."""
    check_causal(path, model.config)
    return model


def check_causal(path: Path | str, config: GPTConfig) -> None:
    """Raises UserError unless `config`, of the model at `path`, is of a language model that continues texts."""
    if config.encoder_layers:
        sample = command("sample.py", path, "--start=SOURCE")
        raise UserError(f"{path} turns sources into targets and continues no text: use it with: {sample}")
    if config.attention == "bidirectional":
        fill = command("sample.py", path, "--start=The [MASK] is")
        raise UserError(f"{path} reads a text in both directions, so it can't continue one: fill gaps with: {fill}")


@of_one_checkpoint
def load_text_model(
    path: Path | str, dtype: torch.dtype = torch.float32, causal: bool = True, translates: bool = False
) -> tuple[GPT, Tokenizer]:
    """`load_model` for a model that must have a tokenizer and, if `causal`, causal attention.

    With `translates` it may have an encoder. Raises UserError if the model doesn't fit.
    """
    model, tokenizer = load_model(path, dtype=dtype)
    if not translates and (causal or model.config.encoder_layers):
        require_causal(path, model)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer, so it can't read text")
    return model, tokenizer
