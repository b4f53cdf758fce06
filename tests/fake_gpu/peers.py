"""Other trainers' models, from your checkouts, for `measure.peer`: the same counts of the same step."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

# Returns the loss of a model on tokens and targets.
Loss = Callable[[Tensor, Tensor], Tensor]


def nanogpt(checkout: Path, layers: int) -> tuple[nn.Module, Loss]:
    """karpathy/nanoGPT with the settings of its config/train_gpt2.py, its vocabulary padded as it pads it."""
    spec = importlib.util.spec_from_file_location("nanogpt", checkout / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(n_layer=layers, dropout=0.0, bias=False, vocab_size=50_304)
    model = module.GPT(config)
    return model, lambda tokens, targets: model(tokens, targets)[1]


def nanochat(checkout: Path, layers: int) -> tuple[nn.Module, Loss]:
    """karpathy/nanochat at GPT-2's shape, with full attention in every layer."""
    sys.path.insert(0, str(checkout))
    module = importlib.import_module("nanochat.gpt")
    config = module.GPTConfig(
        sequence_len=1024, vocab_size=50_304, n_layer=layers, n_head=12, n_kv_head=12, n_embd=768, window_pattern="L"
    )
    model = module.GPT(config)
    model.init_weights()
    return model, lambda tokens, targets: model(tokens, targets)
