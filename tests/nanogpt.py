"""A checkpoint as nanoGPT writes it."""

import torch

ARGUMENTS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 7, "dropout": 0.0}


def tensors_of(bias, n_layer=2, n_embd=16, block_size=12, vocab_size=7, **_):
    """The names and shapes of nanoGPT's model.py, drawn at random."""
    width = n_embd
    shapes = {"transformer.wte": (vocab_size, width), "transformer.wpe": (block_size, width)}
    for i in range(n_layer):
        for name, shape in {
            "ln_1": (width,), "attn.c_attn": (3 * width, width), "attn.c_proj": (width, width),
            "ln_2": (width,), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width),
        }.items():  # fmt: skip
            shapes[f"transformer.h.{i}.{name}"] = shape
    shapes["transformer.ln_f"] = (width,)
    tensors = {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    if bias:
        biased = [name for name in shapes if not name.endswith(("wte", "wpe"))]
        tensors |= {f"{name}.bias": torch.randn(shapes[name][:1]) * 0.3 for name in biased}
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
