"""Writes a language model as an ONNX file: tokens (B, T) to logits (B, T, V), for any B and any T up to the context."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch

from gpt_arc.errors import UserError
from gpt_arc.extras import import_extra
from gpt_arc.files import replacing
from model import GPT

LARGEST = 2**31 - 2**20  # bytes: protobuf's limit, less what isn't weights


def write_onnx(path: Path, model: GPT) -> None:
    """Writes the file, and weights of over 2 GB beside it. Raises UserError for a model that is no fixed graph."""
    import_extra("onnxscript")
    config = model.config
    if config.n_experts:
        raise UserError("a graph of ONNX can't choose experts by token: use --to hf or gguf")
    if config.encoder_layers:
        raise UserError("--to onnx takes models of one text, and this one reads a source too: use it with sample.py")
    if config.rotary_scaling == "dynamic":
        raise UserError("a graph of ONNX can't follow rotary_scaling = dynamic, which depends on length: use --to hf")
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=config.block_size)
    tokens = torch.zeros(2, min(config.block_size, 8), dtype=torch.int64)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # torch narrates
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model.eval(), (tokens,), dynamo=True, dynamic_shapes=({0: batch, 1: length},), verbose=False,
            input_names=["tokens"], output_names=["logits"],
        )  # fmt: skip
    assert program is not None
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > LARGEST:
        program.save(path, external_data=True)
        return
    with replacing(path) as temporary:
        program.save(temporary)
