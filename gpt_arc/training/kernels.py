"""The settings of training that choose how a model computes, beside its precision and compilation."""

import torch
from torch import nn

from gpt_arc.errors import UserError, first_line
from gpt_arc.extras import install_command
from gpt_arc.training.config import TrainingConfig
from model import GPT

# The first number of compute capabilities that a version works on, as torch/nn/attention/_fa3.py and _fa4.py have it.
FLASH_ATTENTION = {"3": ((9,), "9, such as the H100"), "4": ((9, 10), "9 or 10, such as the H100 and the B200")}


def choose_kernels(model: GPT, training: TrainingConfig) -> None:
    """Applies the settings to a model on its device. Raises UserError if a package that one needs is missing."""
    model.activation_checkpointing = training.activation_checkpointing
    model.residual_dtype = torch.bfloat16 if training.residual == "bfloat16" else None
    if training.flash_attention != "2":
        choose_flash_attention(f"FA{training.flash_attention}")
    if training.float8:
        multiply_in_float8(model)


def check_residual(training: TrainingConfig, dtype: str) -> None:
    """Raises UserError if the residual stream has another type of 16 bits, or fewer bits, than products."""
    if training.residual == "bfloat16" and dtype != "bfloat16":
        raise UserError(
            f"residual = bfloat16 needs products in bfloat16, and these are in {dtype}: use --dtype=bfloat16"
        )


def check_flash_attention(
    training: TrainingConfig, dtype: str, capability: tuple[int, int] | None, device: str
) -> None:
    """Raises UserError if the version is for other GPUs than the `device`, or for other products.

    `capability`: see `check_float8`.
    """
    version = training.flash_attention
    if version == "2":
        return
    generations, examples = FLASH_ATTENTION[version]
    if capability is None or capability[0] not in generations:
        raise UserError(
            f"flash_attention = {version} is for GPUs of compute capability {examples}, and the device is {device}: "
            "use --flash_attention=2"
        )
    if dtype not in ("bfloat16", "float16"):
        raise UserError(
            f"flash_attention = {version} needs products in 16 bits, and these are in {dtype}: use --dtype=bfloat16 or "
            "--flash_attention=2"
        )


def check_float8(training: TrainingConfig, capability: tuple[int, int] | None, device: str) -> None:
    """Raises UserError if the `device`, of this compute capability, doesn't multiply in 8 bits. None: it is no GPU."""
    if training.float8 and (capability is None or capability < (8, 9)):
        raise UserError(
            "float8 = true is for GPUs of compute capability 8.9 or more, such as the RTX 4090 and the H100, and the "
            f"device is {device}: use --float8=False"
        )


def choose_flash_attention(version: str) -> None:
    try:
        torch.nn.attention.activate_flash_attention_impl(version)
    except (ImportError, RuntimeError, ValueError) as error:
        advice = "--flash_attention=2 needs no other package"
        raise UserError(
            f"flash_attention = {version[-1]} isn't available here; {advice}: {first_line(error)}"
        ) from None


def multiply_in_float8(model: GPT) -> None:
    """Replaces the blocks' linear layers by torchao's; parameters and their names stay. Routers keep float32."""
    try:
        from torchao.float8 import convert_to_float8_training  # type: ignore[import-not-found]  # an extra
    except ImportError:
        raise UserError(f"float8 = true needs torchao: {install_command('float8')}") from None

    def takes_float8(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "router" not in name and not any(n % 16 for n in module.weight.shape)

    convert_to_float8_training(model.blocks, module_filter_fn=takes_float8)
