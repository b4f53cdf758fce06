"""What a compute budget buys: a model of the best size, and the days and money that a run takes."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpt_arc.errors import UserError
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.cost import ACCELERATORS, Accelerator
from model import GPT, GPTConfig

DAY = 86_400  # seconds
DEEPEST = 1024  # layers, the most that a GPTConfig may have
# GPT-3's peak learning rates and tokens a step by parameters (arXiv:2005.14165, table 2.1)
GPT3 = {
    125e6: (6e-4, 0.5e6),
    350e6: (3e-4, 0.5e6),
    760e6: (2.5e-4, 0.5e6),
    1.3e9: (2e-4, 1e6),
    2.7e9: (1.6e-4, 1e6),
    6.7e9: (1.2e-4, 2e6),
    13e9: (1e-4, 2e6),
    175e9: (0.6e-4, 3.2e6),
}


@dataclass(frozen=True)
class Hardware:
    """`devices` accelerators that reach the share `mfu` of their peak and cost `price` an hour each."""

    accelerator: str
    devices: int
    mfu: float
    price: float | None = None
    dtype: str = "float16"  # of products; bfloat16's peak is the same where both are native

    @property
    def peak(self) -> float | None:
        """FLOPs a second of one device at most; None if it isn't known."""
        return accelerator_named(self.accelerator).peak(self.dtype)

    @property
    def flops_per_second(self) -> float:
        """FLOPs a second of all devices."""
        assert self.peak is not None, "only `cost` may be asked then"
        return self.devices * self.mfu * self.peak

    def days(self, flops: float) -> float:
        return flops / self.flops_per_second / DAY

    def money(self, flops: float) -> float | None:
        return None if self.price is None else 24 * self.days(flops) * self.devices * self.price

    def cost(self, flops: float) -> str:
        """Describes the days and the money that `flops` take, or says that the peak isn't known."""
        if self.peak is None:
            return f"the peak of the {self.accelerator} in {self.dtype} isn't known"
        where = f"{self.days(flops):,.3g} days on {self.devices:,} {self.accelerator} at {self.mfu:.0%} of peak"
        money = self.money(flops)
        return where if money is None else f"{where}, {money:,.0f} at {self.price:g} an hour"


def accelerator_named(name: str) -> Accelerator:
    """The accelerator of this name, in any case. Raises UserError."""
    known = {key.lower(): accelerator for key, accelerator in ACCELERATORS.items()}
    if name.lower() not in known:
        raise UserError(f"accelerator = {name} is not known: name one of {', '.join(known)}")
    return known[name.lower()]


def gpt3_rate(parameters: float) -> float:
    """Peak learning rate: GPT-3's, between its sizes on a straight line of logarithms."""
    return _between(parameters, [rate for rate, _ in GPT3.values()])


def gpt3_batch(parameters: float) -> float:
    """Tokens a step: GPT-3's, between its sizes on a straight line of logarithms."""
    return _between(parameters, [tokens for _, tokens in GPT3.values()])


def _between(parameters: float, values: list[float]) -> float:
    return float(np.exp(np.interp(np.log(parameters), np.log(list(GPT3)), np.log(values))))


def shaped(config: GPTConfig, layers: int, aspect_ratio: float, head_width: int) -> GPTConfig:
    """`config` with another depth, the width that the aspect ratio gives it, and heads of `head_width`."""
    heads = max(1, round(aspect_ratio * layers / head_width))
    groups = config.n_head // config.n_kv_head if config.n_kv_head else None  # queries that share keys
    if groups:
        heads = groups * max(1, round(heads / groups))
    return dataclasses.replace(
        config,
        n_layer=layers,
        n_head=heads,
        n_embd=heads * head_width,
        n_kv_head=heads // groups if groups else None,
        head_size=None,
        mlp_size=None if config.mlp_size is None else round(config.mlp_size / config.n_embd * heads * head_width),
    )


def nearest_shape(
    config: GPTConfig, parameters: float, aspect_ratio: float, head_width: int, embeddings: bool
) -> GPTConfig:
    """The shape whose number of parameters is nearest to the wanted one, as a ratio. Raises UserError if none is."""

    def size(layers: int) -> float:
        shape, period = shaped(config, layers, aspect_ratio, head_width), config.expert_interval
        with meta_device():  # a deep model's size follows from those of two shallow ones
            models = (GPT(dataclasses.replace(shape, n_layer=depth)) for depth in (period, 2 * period))
            one, two = (model.num_parameters(embeddings, active=True) for model in models)
        return one + (layers / period - 1) * (two - one)

    low, high = 1, 2
    while size(high) < parameters:
        if high == DEEPEST:
            raise UserError(
                f"{parameters:.3g} parameters need more than {DEEPEST:,} layers at aspect_ratio = {aspect_ratio:g}: "
                "name a larger aspect_ratio, or a smaller budget"
            )
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < parameters else (low, middle)
    layers = min((low, high), key=lambda layers: abs(np.log(size(layers) / parameters)))
    return shaped(config, layers, aspect_ratio, head_width)


class MixtureClaim(NamedTuple):
    """What is known of a mixture: parameters in all and active, equal experts, and experts that a token uses."""

    total: float
    active: float
    experts: int
    per_token: int

    @property
    def expert(self) -> float:
        """Parameters of an expert, over all layers: total = shared + experts * expert, and active with per_token."""
        return (self.total - self.active) / (self.experts - self.per_token)

    @property
    def shared(self) -> float:
        """Parameters that every token uses. Negative where the claim is impossible."""
        return self.total - self.experts * self.expert

    @property
    def least_active(self) -> float:
        """Active parameters of such a mixture that shares nothing."""
        return self.total * self.per_token / self.experts


def serving_memory(model: GPT, sequences: int, bytes_per_value: int = 2) -> dict[str, int]:
    """Bytes that serving takes: all weights, and keys and values of `sequences` full contexts.

    A mixture's experts must all be in memory, although a token uses few.
    """
    config = model.config
    cache = 2 * sequences * config.block_size * config.n_layer * (config.n_kv_head or config.n_head) * config.head_width
    return {"weights": bytes_per_value * model.num_parameters(), "keys and values": bytes_per_value * cache}
