"""Loads a model for decoding, with the precision and compilation that pay off on the hardware."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from gpt_arc.data.tokenizer import Tokenizer
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.decoding.settings import SampleConfig
from gpt_arc.device import DTYPES, resolve_device, resolve_dtype
from gpt_arc.training.compile import resolve_compile
from gpt_arc.training.threads import choose_threads, timed
from gpt_arc.weights.directory import load_text_model
from model import GPT

# Seconds that compiled code saves per step, for each byte of the weights and for each block, on 2 cores with AVX-512
# (`python tools/bench.py sample`). Compiling takes up to half a minute the first time.
DECODING_SAVES_PER_BYTE, DECODING_SAVES_PER_BLOCK, DECODING_COMPILES_IN = 24e-12, 150e-6, 30.0
# Bytes of float32 weights that fit a CPU's caches: halving them gains nothing, and 16-bit operations are slower.
DECODING_SMALL = 8e6
DECODING_LARGE = 200e6  # parameters, of which a step takes so long that threads hardly wait for one another


def resolve_decoding_dtype(setting: str, device: torch.device, weights: int) -> torch.dtype:
    """Returns the type of the weights; auto is float32 for a small model on a CPU, else as in `resolve_dtype`.

    `weights` is their size in bytes.
    """
    small = setting == "auto" and device.type == "cpu" and weights < DECODING_SMALL
    return torch.float32 if small else DTYPES[resolve_dtype(setting, device)]


def resolve_decoding_compile(setting: bool | str, device: torch.device, model: GPT, steps: int) -> bool:
    """Whether to compile the decoding of `steps` tokens per row; auto: if it saves more time than it takes."""
    if setting != "auto":
        return bool(setting)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    saved = steps * (weights * DECODING_SAVES_PER_BYTE + model.config.n_layer * DECODING_SAVES_PER_BLOCK)
    return saved > DECODING_COMPILES_IN and resolve_compile("auto", device, math.inf)[0]


def set_decoding_threads(decoder: Decoder, setting: int | Literal["auto"], rows: int) -> None:
    """Sets the number of CPU threads for decoding `rows` rows; auto measures the steps of a model that isn't large.

    Compiled code isn't measured either, since that would compile it.
    """
    large = decoder.compiled != "no" or decoder.model.num_parameters() > DECODING_LARGE

    def timer() -> Callable[[int], float]:
        decoder.read([[0]] * rows)
        return timed(lambda: decoder.step([0] * rows))

    torch.set_num_threads(choose_threads(setting, decoder.model.token_embedding.weight.device, large, timer))


def load_decoder(directory: Path, config: SampleConfig, rows: int, steps: int) -> tuple[Decoder, Tokenizer]:
    """Loads a model laid out for `rows` rows, and compiled if `steps` steps make that worthwhile.

    Raises UserError for a model directory without a tokenizer.
    """
    device = resolve_device(config.device)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    dtype = resolve_decoding_dtype(config.dtype, device, size)
    model, tokenizer = load_text_model(directory, dtype=dtype, translates=True)
    cache_dtype = None if config.cache == "auto" else getattr(torch, config.cache)
    decoder = Decoder(model.to(device).eval(), cache_dtype, config.prefill)
    compile = config.draft is None and not model.config.encoder_layers
    compile = compile and resolve_decoding_compile(config.compiling, device, model, steps)
    decoder.prepare(rows, compile, config.int8)
    return decoder, tokenizer
