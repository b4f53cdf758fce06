"""Load a model for decoding: precision and compilation by what the hardware gains."""

import math
from pathlib import Path

import torch
import torch.fx.experimental._config

from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.settings import SampleConfig
from gpt_arc.device import DTYPES, resolve_device, resolve_dtype
from gpt_arc.errors import UserError
from gpt_arc.training.compile import resolve_compile
from gpt_arc.weights.directory import load_model
from model import GPT

# Of decoding, per step: what compiled code saves of the time that reading a byte of the weights takes, and of a block's
# own; 2 cores with AVX-512 (`python tools/bench.py sample`). Compiling takes up to half a minute the first time.
DECODING_SAVES_PER_BYTE, DECODING_SAVES_PER_BLOCK, DECODING_COMPILES_IN = 24e-12, 150e-6, 30.0
# Weights that a CPU's caches hold, in bytes of float32: halving them gains nothing, and 16-bit operations cost more.
DECODING_SMALL = 8e6


def resolve_decoding_dtype(setting: str, device: torch.device, weights: int) -> torch.dtype:
    """The type of the weights for decoding; auto is float32 for a small model on a CPU, else as `resolve_dtype` says.

    `weights` is their size in bytes.
    """
    small = setting == "auto" and device.type == "cpu" and weights < DECODING_SMALL
    return torch.float32 if small else DTYPES[resolve_dtype(setting, device)]


def resolve_decoding_compile(setting: bool | str, device: torch.device, model: GPT, steps: int) -> bool:
    """Whether to compile the decoding of `steps` tokens a row; auto: if that saves more time than compiling takes."""
    if setting != "auto":
        return bool(setting)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    saved = steps * (weights * DECODING_SAVES_PER_BYTE + model.config.n_layer * DECODING_SAVES_PER_BLOCK)
    return saved > DECODING_COMPILES_IN and resolve_compile("auto", device, math.inf)[0]


def load_decoder(directory: Path, config: SampleConfig, rows: int, steps: int) -> tuple[Decoder, Tokenizer]:
    """A model as sampling settings ask for it: laid out for so many rows, and compiled if so many steps are worth it.

    Raises UserError for a model directory without a tokenizer.
    """
    device = resolve_device(config.device)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    dtype = resolve_decoding_dtype(config.dtype, device, size)
    model, tokenizer = load_model(directory, dtype=dtype)
    if tokenizer is None:
        raise UserError(f"{directory} has no tokenizer, so its tokens can't be turned into text")
    decoder = Decoder(model.to(device).eval())
    compile = config.draft is None and resolve_decoding_compile(config.compiling, device, model, steps)
    decoder.prepare(rows, compile, config.int8)
    return decoder, tokenizer
