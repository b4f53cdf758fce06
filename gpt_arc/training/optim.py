"""AdamW and Muon as the GPTs use them, one update of the weights, their average, and the learning rate over time."""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gpt_arc import distributed
from gpt_arc.errors import UserError
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.expert_parallel import ExpertParallel

# what Muon takes: matrices between hidden states, not embeddings, heads, biases, gates of experts
HIDDEN = re.compile(r"(.*\.)?blocks\.\d+\..*(?<!router\.)weight")


def of_muon(model: nn.Module) -> list[nn.Parameter]:
    """The matrices that Muon updates. Those of all experts, stacked, are none that it could make orthogonal."""
    named = model.named_parameters()
    return [p for name, p in named if p.requires_grad and p.dim() == 2 and HIDDEN.fullmatch(name)]


def build_muon(model: nn.Module, config: TrainingConfig) -> torch.optim.Muon | None:
    """Muon on the blocks' matrices, for those settings that ask for it; of a model that has them.

    An update of an (M, C) matrix is an orthogonal one times sqrt(max(1, M / C)), as in https://github.com/KellerJordan/Muon.
    """
    matrices = of_muon(model) if config.optimizer == "muon" else []
    if not matrices:
        return None
    rate, decay = config.muon_rate, config.weight_decay
    return torch.optim.Muon(matrices, lr=rate, weight_decay=decay, momentum=config.momentum, nesterov=True)


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW on what isn't frozen, with decoupled weight decay on tensors of two or more dimensions, not on biases.

    The biases of several experts are a matrix, and biases all the same. What is `build_muon`'s is left out.
    """
    theirs = set(of_muon(model)) if config.optimizer == "muon" else set()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in theirs}
    matrices = [p for name, p in parameters.items() if p.dim() >= 2 and not name.endswith("bias")]
    vectors = [p for name, p in parameters.items() if p.dim() < 2 or name.endswith("bias")]
    assert len({id(p) for p in matrices + vectors}) == len(parameters) == len(matrices) + len(vectors)
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,  # which cpu, cuda and mps have
    )


class Updater:
    """The optimizer with all that an update takes: loss scaling for float16, the check that all is finite, clipping."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        device: torch.device,
        dtype: str,
        sharing: ExpertParallel | None = None,
    ):
        """`sharing` is the model's, where its experts are shared out among processes."""
        self.config, self.sharing = config, sharing if sharing and sharing.shares else None
        self.optimizer, self.muon = build_optimizer(model, config), build_muon(model, config)
        self.optimizers = [self.optimizer] + ([self.muon] if self.muon else [])
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.average = None if config.ema_decay is None else [p.detach().clone() for p in self.parameters]

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self, learning_rate: float, *sums: Tensor | float) -> tuple[bool, float, list[float]]:
        """Update the weights with the gradients there are, and clear these; nothing is changed if they aren't finite.

        Returns whether they were, and the first of `sums` too; the gradient's norm; and `sums`, each () and summed over
        the processes. That is the one wait for the device in a step.
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        shares = self.sharing.shares if self.sharing else {}
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None and p not in shares])
        values = [norm / distributed.WORLD_SIZE]
        values += [x if isinstance(x, Tensor) else torch.full_like(norm, x) for x in sums]
        if self.sharing:  # every expert's gradient is in as many processes as there are copies of it
            self.sharing.reduce_gradients()
            values.append(get_total_norm([p.grad for p in shares]).square() / self.sharing.n_copies)
        norm_seen, *summed = distributed.sum_over_ranks(torch.stack(values)).tolist()
        if self.sharing:
            norm_seen = math.hypot(norm_seen, math.sqrt(summed.pop()))
        finite = math.isfinite(norm_seen) and math.isfinite(summed[0])
        if finite:
            if 0 < self.config.grad_clip < norm_seen:
                clip_grads_with_norm_(self.parameters, self.config.grad_clip, torch.full_like(norm, norm_seen))
            for optimizer in self.optimizers:
                share = self.config.muon_rate / self.config.learning_rate if optimizer is self.muon else 1.0
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * share
                self.scaler.step(optimizer)
            if self.average is not None:
                follow(self.average, self.parameters, self.config.ema_decay)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return finite, norm_seen, summed

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """In which the model has the moving average of its weights, if one is kept."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, mean in zip(self.parameters, self.average or ()):
            kept = parameter.detach().clone()
            parameter.data.copy_(mean)
            mean.copy_(kept)

    def state_dict(self) -> dict[str, dict]:
        """Complete in the main process, whoever has which experts; every process has to ask."""
        state = self.optimizer.state_dict()
        if self.sharing:
            state["state"] = self.sharing.reshaped(self.optimizer, state["state"], self.sharing.gathered)
        state = {"optimizer": state, "scaler": self.scaler.state_dict()}
        if self.muon:
            state["muon"] = self.muon.state_dict()
        if self.average is not None:  # the model's file has that
            state["weights"] = [p.detach() for p in self.parameters]
        return state

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Take up what `state_dict` gave; rates, decay and betas stay those of the present settings.

        The model has the weights of its file: their average, if one was kept.
        """
        saved = state["optimizer"]
        if self.sharing:
            saved = {"state": self.sharing.reshaped(self.optimizer, saved["state"], self.sharing.own)}
        load_optimizer_state(self.optimizer, saved)
        if self.muon:
            load_optimizer_state(self.muon, state["muon"])
        if self.average is not None:
            torch._foreach_copy_(self.average, [p.detach() for p in self.parameters])
        for parameter, weight in zip(self.parameters, state.get("weights", ())):
            parameter.data.copy_(weight)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def check_same_optimizer(asked: str, state: dict[str, dict]) -> None:
    """Raises UserError where the `Updater` that gave `state` had another optimizer than is `asked` for."""
    known = "muon" if "muon" in state else "adamw"
    if asked != known:
        raise UserError(
            f'optimizer = "{asked}" can\'t go on from the moments of "{known}", which the run has: leave it as it was '
            "to resume, or start a new run from its weights, with --init_from and the folder of its checkpoint"
        )


def follow(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """Move the moving average of a model's weights on by one update."""
    for mean, weight in zip(average, weights):
        mean.lerp_(weight.detach(), 1 - decay)


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Take the moments of a saved `state_dict`; rates, decay and betas stay those of the present settings."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
