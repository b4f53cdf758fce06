"""What nanoGPT writes and reads, converted without executing it: checkpoints, config files, and folders of tokens."""

import ast
import operator
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt_arc.data.tokenizer import CharTokenizer
from gpt_arc.errors import UserError, first_line
from gpt_arc.nn.meta import meta_device
from gpt_arc.settings import mistake
from gpt_arc.weights.tensor_files import check_tensors
from model import GPT, GPTConfig

PIECE = 1 << 24  # tokens read at a time
NAMES = {
    "transformer.wte.": "token_embedding.",
    "transformer.wpe.": "position_embedding.",
    "transformer.ln_f.": "final_norm.",
    "transformer.h.": "blocks.",
    ".ln_1.": ".attention_norm.",
    ".ln_2.": ".mlp_norm.",
    ".attn.c_attn.": ".attention.qkv.",
    ".attn.c_proj.": ".attention.projection.",
    ".mlp.c_fc.": ".mlp.up.",
    ".mlp.c_proj.": ".mlp.projection.",
}
# what nanoGPT's train.py does unless a config says otherwise
DEFAULTS = {
    "dataset": "openwebtext", "batch_size": 12, "gradient_accumulation_steps": 40, "block_size": 1024, "n_layer": 12,
    "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "max_iters": 600_000,
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "warmup_iters": 2000,
    "lr_decay_iters": 600_000, "min_lr": 6e-5, "eval_interval": 2000, "log_interval": 1, "eval_iters": 200,
}  # fmt: skip
DATASETS = {"shakespeare_char": "tinyshakespeare"}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def read_model(path: Path) -> GPT:
    """Returns the model of a checkpoint, ckpt.pt. Raises UserError if it isn't one of nanoGPT's."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        arguments, tensors = dict(content["model_args"]), dict(content["model"])
        config = GPTConfig(**arguments, activation="gelu")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a checkpoint of nanoGPT: {first_line(error)}") from None
    except ValueError as error:
        raise UserError(f"{path} doesn't describe a valid model: {mistake(error, GPTConfig)}") from None
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    tensors.pop("lm_head.weight", None)  # tied to the embedding
    tensors = {_our_name(name): x for name, x in tensors.items() if not name.endswith((".attn.bias", ".masked_bias"))}
    with meta_device():
        model = GPT(config)
    try:
        check_tensors(tensors, model.state_dict())
    except ValueError as error:
        raise UserError(f"{path} is not a checkpoint of nanoGPT: {error}") from None
    model.load_state_dict(tensors, assign=True)
    return model


def _our_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def read_characters(path: Path) -> CharTokenizer:
    """Returns the tokenizer that a meta.pkl describes. Raises UserError if it isn't one of characters."""
    try:
        with open(path, "rb") as file:
            content = _PlainUnpickler(file).load()
        names = content["itos"]
        return CharTokenizer([names[i] for i in range(len(names))])
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} doesn't list characters as nanoGPT does: {first_line(error)}") from None


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers and texts, which need no code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names code, {module}.{name}, which is not imported")


def read_tokens(path: Path) -> Iterator[np.ndarray]:
    """Yields the tokens of a train.bin or val.bin, which are 16 bits each. Raises UserError if it can't be read."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size % 2:
        raise UserError(f"{path} is not a token file of nanoGPT: it ends within a token of 16 bits")
    with open(path, "rb") as file:
        while block := file.read(2 * PIECE):
            yield np.frombuffer(block, dtype="<u2")


def read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings of a config file with nanoGPT's defaults, by our names, and the lines without a counterpart.

    Raises UserError if the file isn't Python.
    """
    try:
        text = path.read_text("utf-8")
        statements = ast.parse(text).body
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a config of nanoGPT: {first_line(error)}") from None
    settings, others = dict(DEFAULTS) | {"activation": "gelu"}, []
    for statement in statements:
        line = " ".join((ast.get_source_segment(text, statement) or "").split())
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                try:
                    settings[name] = _literal(value)
                except (ValueError, TypeError, ArithmeticError):
                    others.append(line)
            case ast.Expr(value=ast.Constant()):
                pass  # a text that comments
            case _:
                others.append(line)
    if settings.pop("decay_lr", True) is False:
        settings["schedule"] = "constant"
        for name in ("lr_decay_iters", "min_lr"):
            settings.pop(name)
    settings["dataset"] = DATASETS.get(settings["dataset"], settings["dataset"])
    if settings.get("init_from") == "scratch":
        del settings["init_from"]
    return {name: value for name, value in settings.items() if value is not None}, others


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of sums and products of numbers, such as 5 * 8. Raises ValueError for other code."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = _literal(node.left), _literal(node.right)
        if not all(isinstance(x, int | float) for x in (left, right)):
            raise ValueError("not a number")
        return ARITHMETIC[type(node.op)](left, right)
    return ast.literal_eval(node)
