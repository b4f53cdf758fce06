"""The optimizer's groups and the learning rate over time."""

import copy
import math

import pytest
import torch

from gpt_arc.config import TrainingConfig
from gpt_arc.optim import Updater, build_optimizer, learning_rate_at, load_optimizer_state
from model import GPT, GPTConfig


def test_decay_acts_on_matrices_alone():
    model = GPT(GPTConfig(8, 11, 2, 2, 16, head_bias=True))
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.3, beta2=0.9))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay.pop(id(parameter)) == (0.0 if name.endswith("bias") or "norm" in name else 0.3), name
    assert not decay and all(group["fused"] and group["betas"] == (0.9, 0.9) for group in optimizer.param_groups)


def test_updates_equal_the_published_formula():
    """Ten steps of decoupled AdamW (arXiv:1711.05101) by hand, in float64."""
    model = GPT(GPTConfig(4, 5, 1, 1, 4)).double()
    config = TrainingConfig(weight_decay=0.1, learning_rate=0.01, beta1=0.8, beta2=0.9, adam_eps=1e-6)
    optimizer = build_optimizer(model, config)
    names = dict(model.named_parameters())
    expected = {name: p.detach().clone() for name, p in names.items()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 11):
        for name, p in names.items():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            first[name] = 0.8 * first[name] + 0.2 * p.grad
            second[name] = 0.9 * second[name] + 0.1 * p.grad**2
            update = (first[name] / (1 - 0.8**t)) / ((second[name] / (1 - 0.9**t)).sqrt() + 1e-6)
            decay = 0.1 if p.dim() >= 2 else 0.0
            expected[name] = expected[name] * (1 - 0.01 * decay) - 0.01 * update
        optimizer.step()
    for name, p in names.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-9, atol=1e-12)


def test_loading_keeps_the_present_settings():
    model = GPT(GPTConfig(4, 5, 1, 1, 4))
    old = build_optimizer(model, TrainingConfig(weight_decay=0.3, beta2=0.9))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    new = build_optimizer(model, TrainingConfig(weight_decay=0.1, beta2=0.99))
    load_optimizer_state(new, old.state_dict())
    assert [group["weight_decay"] for group in new.param_groups] == [0.1, 0.0]
    assert new.param_groups[0]["betas"] == (0.9, 0.99)
    first = next(model.parameters())
    assert torch.equal(new.state[first]["exp_avg"], old.state[first]["exp_avg"]) and new.state[first]["step"] == 1


def rates(steps, **settings):
    config = TrainingConfig(max_iters=steps, **settings)
    return [learning_rate_at(step, config) for step in range(steps)]


def test_schedules():
    assert rates(6, learning_rate=1.0, warmup_iters=3, schedule="constant") == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(6, learning_rate=1.0, min_lr=0.0, schedule="linear", warmup_iters=2) == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]
    )
    cosine = rates(5, learning_rate=1.0, min_lr=0.2, lr_decay_iters=4)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * x)) / 2 for x in (0, 0.25, 0.5, 0.75)]
    assert cosine == pytest.approx([*expected, 0.2])
    assert rates(3, learning_rate=1.0)[0] == 1.0 and min(rates(100, learning_rate=1.0)) > 0.1
    assert rates(4, learning_rate=1.0, warmup_iters=10) == pytest.approx([1 / 11, 2 / 11, 3 / 11, 4 / 11])


CPU = torch.device("cpu")


def with_gradients(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(8, 11, 2, 2, 16))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("grad_clip", [0.0, 1.0, 1e6])
def test_an_update_clips_and_steps(grad_clip):
    config = TrainingConfig(grad_clip=grad_clip)
    model = with_gradients()
    theirs = copy.deepcopy(model)
    for ours, its in zip(model.parameters(), theirs.parameters()):
        its.grad = ours.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip or math.inf)
    optimizer = build_optimizer(theirs, config)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.02
    optimizer.step()
    finite, seen, sums = Updater(model, config, CPU, "float32").update(0.02, torch.tensor(2.5), 3)
    assert finite and seen == pytest.approx(norm.item()) and sums == [2.5, 3.0]
    for ours, its in zip(model.parameters(), theirs.parameters()):
        torch.testing.assert_close(ours, its) and ours.grad is None


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_not_finite_changes_nothing(what, dtype):
    model = with_gradients()
    before = copy.deepcopy(model.state_dict())
    updater = Updater(model, TrainingConfig(), CPU, dtype)
    updater.scaler.scale(torch.zeros(()))
    if what == "gradient":
        model.final_norm.bias.grad[0] = math.nan
    finite, _, _ = updater.update(0.1, torch.tensor(math.inf if what == "loss" else 1.0))
    assert not finite and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
