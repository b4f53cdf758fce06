"""AdamW and Muon as the GPTs use them, one update of the weights, and their moving average."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gpt_arc import distributed
from gpt_arc.device import send
from gpt_arc.errors import UserError
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.muon import BatchedMuon
from gpt_arc.training.offload import OffloadedAdamW
from gpt_arc.training.parallel import REPLICATED, Parallel
from gpt_arc.training.weight_shares import WeightShares
from gpt_arc.weights.tensor_files import check_tensors
from model import GPT

# what each optimizer keeps for a weight, in its shape and type
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq")}
MOMENTS |= dict.fromkeys((torch.optim.Muon, BatchedMuon), ("momentum_buffer",))
# Muon takes the matrices between hidden states: no embeddings, heads, biases or routers.
HIDDEN = re.compile(r"(.*\.)?blocks\.\d+\..*(?<!router\.)weight")


def build_optimizers(
    model: nn.Module, config: TrainingConfig, muon: type[torch.optim.Muon] | None = None
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of a model, each built with its peak rate, by the keys of their moments in training_state.pt.

    One always has the key `optimizer`. It updates all stacked experts, because expert parallelism gathers its moments
    alone.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ratio = model.config.width_ratio if isinstance(model, GPT) else 1.0
    rates = getattr(model, "rates", {})  # of a model's parts
    match config.optimizer:
        case "adamw":
            return {"optimizer": build_adamw(parameters, config, ratio, rates)}
        case "muon":  # it can't orthogonalise the stacked matrices of experts
            hidden = {name: p for name, p in parameters.items() if p.dim() == 2 and HIDDEN.fullmatch(name)}
            others = {name: p for name, p in parameters.items() if name not in hidden}
            return {"optimizer": build_adamw(others, config, ratio), "muon": build_muon(hidden.values(), config, muon)}
    assert_never(config.optimizer)


def build_adamw(
    parameters: dict[str, nn.Parameter],
    config: TrainingConfig,
    width_ratio: float = 1.0,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW. `width_ratio` multiplies the learning rate of matrices between hidden states and of the head.

    `rates` multiply those of the model's parts, by name: every parameter is in one of them.
    """
    parts = {name + ".": rate for name, rate in (rates or {}).items()} or {"": 1.0}
    groups = [
        group | {"rate": rate * group.get("rate", 1.0)}
        for part, rate in parts.items()
        for group in decay_groups(
            {name: p for name, p in parameters.items() if name.startswith(part)}, config.weight_decay, width_ratio
        )
    ]
    kind = OffloadedAdamW if config.offload_optimizer else torch.optim.AdamW
    return kind(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,  # available on cpu, cuda and mps
    )


def build_muon(
    matrices: Iterable[nn.Parameter], config: TrainingConfig, muon: type[torch.optim.Muon] | None = None
) -> torch.optim.Muon:
    """Muon, whose update of an (M, C) matrix is an orthogonal one times sqrt(max(1, M / C)).

    That is the scale of https://github.com/KellerJordan/Muon.
    """
    rate, decay = config.muon_rate, config.weight_decay
    matrices = list(matrices)
    kind = muon or (BatchedMuon if any(matrix.is_cuda for matrix in matrices) else torch.optim.Muon)
    return kind(matrices, lr=rate, weight_decay=decay, momentum=config.momentum, nesterov=True)


def decay_groups(
    parameters: dict[str, nn.Parameter], weight_decay: float, width_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """An optimizer's parameter groups, with weight decay on matrices only.

    The stacked biases of experts form a matrix, but count as biases. A ratio other than 1 divides the matrices into
    embeddings and others, whose learning rates have the factor `rate`; their decay per step stays what it was.
    """
    matrices = {name: p for name, p in parameters.items() if p.dim() >= 2 and not name.endswith("bias")}
    vectors = [p for name, p in parameters.items() if name not in matrices]
    groups = [{"params": list(matrices.values()), "weight_decay": weight_decay}]
    if width_ratio != 1.0:
        tables = [p for name, p in matrices.items() if name.endswith("embedding.weight")]
        others = [p for name, p in matrices.items() if not name.endswith("embedding.weight")]
        scaled = {"params": others, "weight_decay": weight_decay / width_ratio, "rate": width_ratio}
        groups = [{"params": tables, "weight_decay": weight_decay}, scaled]
    return [*groups, {"params": vectors, "weight_decay": 0.0}]


class Updater:
    """The optimizers and everything an update takes: loss scaling for float16, the finite check, gradient clipping."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        device: torch.device,
        dtype: str,
        parallel: Parallel = REPLICATED,
        sharing: WeightShares | None = None,
    ):
        """`sharing` divides experts, or the matrices of blocks, among processes."""
        self.model, self.config, self.device, self.parallel = model, config, device, parallel
        self.sharing = sharing or WeightShares(1, device)
        self.optimizers = build_optimizers(model, config, parallel.muon)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self._names)
        # those that `sharing` leaves whole, and its shares, which fsdp divides among other processes
        self._parts: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
        for parameter, name in self._names.items():
            self._parts[name in self.sharing.shares].append(parameter)
        self.average = [] if config.ema_decay is None else [p.detach().clone() for p in self.parameters]
        self._failures = 0  # updates in a row that were not finite
        self.problem = ""  # of the last one that wasn't

    @property
    def diverged(self) -> bool:
        """Whether training can't recover: float16 finds its loss scale by overflowing, other types don't mend."""
        return self._failures >= (20 if self.scaler.is_enabled() else 2)

    @torch.no_grad()
    def finite(self, *figures: float) -> bool:
        """Whether the weights in every process and `figures` are finite. Every process must call this."""
        parts = [self.parallel.held(weight)[1] for weight in self.model.parameters()]
        largest = get_total_norm([x for x in parts if x.numel()], math.inf)  # absolute value; NaN if a weight is
        bad = distributed.sum_over_ranks((~largest.isfinite()).float())
        return not bad and all(map(math.isfinite, figures))

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self, learning_rate: float, *sums: Tensor | float) -> tuple[bool, float, list[float]]:
        """Update the weights with the present gradients, then clear these; non-finite gradients change nothing.

        Returns whether the gradients and the first of `sums` were finite, the gradient's norm, and `sums`, each () and
        summed over the processes. This is the only point in a step that waits for the device.
        """
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        whole, shares = ([p.grad for p in part if p.grad is not None] for part in self._parts)
        norm = self.parallel.total_norm(whole)
        values = [send(norm / distributed.WORLD_SIZE, self.device)]
        values += [x if isinstance(x, Tensor) else torch.full_like(values[0], x) for x in sums]
        if shares:  # every share's gradient is in as many processes as there are copies of it
            self.sharing.reduce_gradients(shares, self.parallel)
            values.append(self.parallel.total_norm(shares).square() / self.sharing.n_copies)
        total_norm, *summed = distributed.sum_over_ranks(torch.stack(values)).tolist()
        if shares:
            total_norm = math.hypot(total_norm, math.sqrt(summed.pop()))
        finite = math.isfinite(total_norm) and math.isfinite(summed[0])
        if finite:
            if 0 < self.config.grad_clip < total_norm:
                for part in self._parts:
                    clip_grads_with_norm_(part, self.config.grad_clip, torch.full_like(norm, total_norm))
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:  # all rates follow the schedule of learning_rate
                    share = optimizer.defaults["lr"] / self.config.learning_rate
                    group["lr"] = learning_rate * share * group.get("rate", 1.0)
                optimizer.step()  # the scaler's would ask the device again whether all is finite
            if self.config.ema_decay is not None:
                update_average(self.average, self.parameters, self.config.ema_decay)
        else:
            ranks = self.parallel.sources(sums[0]) if distributed.WORLD_SIZE > 1 else []
            where = f" in process {', '.join(map(str, ranks))}" if ranks else ""
            self.problem = f"the loss or its gradient is not finite{where}"
        self._failures = 0 if finite else self._failures + 1
        self.parallel.forget()
        self.scaler.update()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=self.config.compile != "graphs")  # whose gradients stay where they are
        return finite, total_norm, summed

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Runs the block with the moving average of the weights in the model, if one is kept."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, mean in zip(self.parameters, self.average):
            kept = parameter.detach().clone()
            parameter.data.copy_(mean)
            mean.copy_(kept)

    def _gathered(self, weight: nn.Parameter, tensor: Tensor) -> Tensor:
        """Returns, in the main process, a tensor that is divided like `weight` whole. Every process must call this."""
        return self.sharing.gathered(tensor, self._names[weight], self.parallel)

    def _kept(self, weight: nn.Parameter, whole: Tensor) -> Tensor:
        """Returns what this process keeps of a tensor shaped like the whole `weight`."""
        return self.parallel.shard_of(self.sharing.share_of(whole, self._names.get(weight)), weight)

    @torch.no_grad()
    def put_weights(self, whole: nn.Module) -> None:
        """Copies the weights and buffers of a whole model of the same kind into this one, or what it keeps of them."""
        for parameter, weight in zip(self.model.parameters(), whole.parameters()):
            parameter.copy_(self._kept(parameter, weight.detach()))
        for buffer, source in zip(self.model.buffers(), whole.buffers()):
            buffer.copy_(source)

    def state_dict(self, gather: bool = True) -> dict:
        """The state to save, complete in the main process or, without `gather`, divided as it is.

        Every process has to call it.
        """
        state: dict[str, Any] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        keep = self._gathered if gather else lambda weight, tensor: tensor
        for name, optimizer in self.optimizers.items():
            state[name]["state"] = map_moments(optimizer, state[name]["state"], keep)
        state |= {"optimizer_name": self.config.optimizer, "scaler": self.scaler.state_dict()}
        if self.average:  # the model's file holds the average
            state["weights"] = [keep(p, p.detach()) for p in self.parameters]
        return state

    def take_shards(self, state: dict) -> dict[str, Tensor]:
        """Moves the moments and weights out of a state that `state_dict` didn't gather. Returns them by name."""
        shards = {f"weights.{i}": weight for i, weight in enumerate(state.get("weights", ()))}
        if shards:
            state["weights"] = []
        for name in self.optimizers:
            for i, moments in state[name]["state"].items():
                for moment in [moment for moment, x in moments.items() if x.dim()]:
                    shards[f"{name}.{i}.{moment}"] = moments.pop(moment)
        return shards

    def put_shards(self, state: dict) -> dict[str, Tensor]:
        """Reverses `take_shards`: puts tensors divided like the weights into `state`. Returns them, to be filled."""
        if self.sharing.shares:
            raise UserError(
                'a checkpoint of checkpoint_format = "sharded" can\'t be resumed with tensor_processes or '
                'expert_processes: resume with both 1, and with checkpoint_format = "whole" to divide the next one'
            )
        shards: dict[str, Tensor] = {}
        if "weights" in state:
            state["weights"] = [torch.empty_like(p) for p in self.parameters]
            shards |= {f"weights.{i}": weight for i, weight in enumerate(state["weights"])}
        for name, optimizer in self.optimizers.items():
            weights = dict(enumerate(weight for group in optimizer.param_groups for weight in group["params"]))
            for i, moments in state[name]["state"].items():
                for moment in moments_of(optimizer):
                    shards[f"{name}.{i}.{moment}"] = moments[moment] = torch.empty_like(weights[i])
        return shards

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned; rates, decay and betas stay those of the present settings.

        The model holds the weights of its file: their average, if one was kept. Raises ValueError or KeyError, and
        changes nothing, if `state` describes another model.
        """
        moments = {}
        for name, optimizer in self.optimizers.items():
            moments[name] = map_moments(optimizer, state[name]["state"], self._kept)
            check_moments(optimizer, moments[name], self._names)
        weights = state.get("weights")
        if weights is not None:
            check_tensors(dict(enumerate(weights)), dict(enumerate(self.parameters)), "weights.")
        for name, optimizer in self.optimizers.items():
            load_optimizer_state(optimizer, {"state": moments[name]})
        for mean, parameter in zip(self.average, self.parameters):
            mean.copy_(parameter.detach())
        for parameter, weight in zip(self.parameters, weights or ()):
            parameter.detach().copy_(self._kept(parameter, weight))
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def check_same_optimizer(name: str, state: dict) -> None:
    """Raises UserError if the `Updater` that returned `state` had another optimizer than `name`."""
    saved = state.get("optimizer_name", "muon" if "muon" in state else "adamw")  # older states don't name it
    if name != saved:
        raise UserError(
            f'optimizer = "{name}" can\'t continue from the moments of "{saved}", which the run has: leave it as it '
            "was to resume, or start a new run from its weights, with --init_from and the folder of its checkpoint"
        )


def update_average(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """Move the moving average of a model's weights on by one update."""
    get_ema_multi_avg_fn(decay)(tuple(average), tuple(weight.detach() for weight in weights), None)


def map_moments(
    optimizer: torch.optim.Optimizer,
    state: Mapping[int, Mapping[str, Tensor]],
    change: Callable[[nn.Parameter, Tensor], Tensor],
) -> dict[int, dict[str, Tensor]]:
    """Returns the `state` of an optimizer's `state_dict` with `change` applied to the moments of each weight."""
    weights = dict(enumerate(weight for group in optimizer.param_groups for weight in group["params"]))
    return {
        i: {name: change(weights[i], x) if x.dim() and i in weights else x for name, x in moments.items()}
        for i, moments in state.items()
    }


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return next(moments for kind, moments in MOMENTS.items() if isinstance(optimizer, kind))


def check_moments(
    optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Tensor]], names: Mapping[nn.Parameter, str]
) -> None:
    """Raises ValueError unless `state` has moments of the optimizer's weights, in their shapes and types.

    A weight without a gradient has none. `names` are those of the weights.
    """
    weights = dict(enumerate(weight for group in optimizer.param_groups for weight in group["params"]))
    for i, moments in state.items():
        if i not in weights:
            raise ValueError(f"it has moments of weight {i} of {len(weights)}")
        expected = {name: weights[i].detach() for name in moments_of(optimizer)}
        if isinstance(optimizer, torch.optim.AdamW):
            expected["step"] = torch.tensor(0.0)
        check_tensors(moments, expected, f"{names[weights[i]]}: ")


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore the moments of a saved `state_dict`; rates, decay and betas stay those of the present settings."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
