"""The language-model head and its loss in one pass, without ever holding all logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 64  # a GPU multiplies matrices slowly unless the rows have a multiple of so many numbers
ALIGNED_DEVICES = ("cuda",)
IGNORED = -1  # a target that isn't scored: padding, prompts, the masked part of a sequence


def logits_at_once(device: str) -> int:
    """How many logits `HeadLoss` computes at a time: a GPU likes large products, a CPU what its caches hold."""
    return 1 << 28 if device == "cuda" else 1 << 25


def add_sum(total: Tensor, terms: Tensor) -> None:
    """Adds the sum of all terms to total ()."""
    total.add_(terms.sum())


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Adds `scale` times the product of left (V, N) and right (N, C) to total (V, C)."""
    total.add_(left @ right, alpha=scale)


# Operators of their own for compiled code: a compiler would put all sums off to the end, and keep what they sum.
compiled_add_sum = torch.library.custom_op("gpt_arc::add_sum", add_sum, mutates_args=("total",))
compiled_add_product = torch.library.custom_op("gpt_arc::add_product", add_product, mutates_args=("total",))


@compiled_add_sum.register_fake
def _(total: Tensor, terms: Tensor) -> None:
    pass


@compiled_add_product.register_fake
def _(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    pass


def log_probabilities(
    logits: Tensor, target: Tensor, exact: torch.dtype, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the targets (N, 1), in the type `exact`, and the gradient of minus their sum by the logits.

    The gradient (N, V) has the logits' type: softmax, minus 1 at the target. Code compiled for GPUs has an expression
    that writes nothing as large as the logits in float32. It scatters nothing either, because before Hopper that takes
    a separate kernel for 16-bit numbers.
    """
    if torch.compiler.is_compiling() and logits.device.type == "cuda":
        values = logits.to(exact)
        normaliser = values.logsumexp(-1, keepdim=True)
        chosen = values.gather(1, target) - normaliser
        is_target = torch.arange(logits.size(1), device=logits.device) == target
        return chosen, torch.where(is_target, chosen.expm1(), (values - normaliser).exp()).type_as(logits)
    logs = logits.to(exact).log_softmax(-1)
    chosen = logs.gather(1, target)
    if not with_gradient:
        return chosen, None
    return chosen, logs.exp_().type_as(logits).scatter_(1, target, chosen.expm1().type_as(logits))


class HeadLoss(torch.autograd.Function):
    """Sum () of the cross-entropies in nats at targets (N,) of logits hidden (N, C) times head (V, C), plus bias (V,).

    A target of -1 isn't scored; `weights` (N,), if given, multiply the others. The logits and their gradients would be
    the largest tensors of all, so they exist for some rows at a time: the gradients of `hidden`, `head` and `bias` are
    computed along with the loss, and multiplied by the loss's own gradient in the backward pass.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None,
        with_gradients: bool,
    ) -> Tensor:  # fmt: skip
        device, vocabulary = hidden.device.type, len(head)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        matrix, offset = head.to(dtype), None if bias is None else bias.to(dtype)
        surplus = -vocabulary % ALIGNED if device in ALIGNED_DEVICES else 0
        if surplus:  # logits of no token
            matrix, offset = F.pad(matrix, (0, 0, 0, surplus)), None if offset is None else F.pad(offset, (0, surplus))
        scored, targets = (targets != IGNORED).to(exact)[:, None], targets.clamp(min=0)[:, None]
        scored = scored if weights is None else scored * weights[:, None]
        total, gradients = torch.zeros((), dtype=exact, device=hidden.device), []
        head_gradient = torch.zeros_like(head) if with_gradients and ctx.needs_input_grad[1] else None
        bias_gradient = torch.zeros_like(bias) if with_gradients and bias is not None else None
        compiling = torch.compiler.is_compiling()
        add_loss, add_gradient = (compiled_add_sum, compiled_add_product) if compiling else (add_sum, add_product)
        # in float16 a sum over many rows overflows before the loss scale adapts, so it is computed at 1/64
        shrunk = 2**-6 if dtype == torch.float16 else 1.0
        chunks = math.ceil(len(hidden) * vocabulary / logits_at_once(device))
        # chunks of equal size, so that one compiled kernel fits all
        rows = math.ceil(len(hidden) / max(chunks, 1)) or 1
        for x, target, weight in zip(hidden.split(rows), targets.split(rows), scored.split(rows)):
            x = x.to(dtype)
            logits = F.linear(x, matrix, offset)  # (rows, V), and surplus columns
            if surplus:
                logits[:, vocabulary:] = -math.inf
            chosen, gradient = log_probabilities(logits, target, exact, with_gradients)
            add_loss(total, -chosen * weight)
            if gradient is not None:
                weight = weight.to(dtype)
                gradients.append((gradient @ matrix).mul(weight).type_as(hidden))
                gradient = gradient[:, :vocabulary]
                if head_gradient is not None:
                    add_gradient(head_gradient, gradient.mT, x * (weight * shrunk), 1 / shrunk)
                if bias_gradient is not None:
                    bias_gradient += gradient.mul(weight).sum(0, dtype=exact)
        if with_gradients:
            ctx.save_for_backward(torch.cat(gradients), head_gradient, bias_gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else x * gradient for x in ctx.saved_tensors), None, None, None
