"""The optimizer's groups and the learning rate over time."""

import copy
import io
import math
from typing import get_args

import pytest
import torch

from gpt_arc.errors import UserError
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.optim import Updater, build_optimizers, check_same_optimizer, load_optimizer_state
from gpt_arc.training.schedule import learning_rate_at
from model import GPT, GPTConfig


def test_decay_acts_on_matrices_alone():
    model = GPT(GPTConfig(8, 11, 2, 2, 16, head_bias=True))
    optimizer = build_optimizers(model, TrainingConfig(weight_decay=0.3, beta2=0.9))["optimizer"]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay.pop(id(parameter)) == (0.0 if name.endswith("bias") or "norm" in name else 0.3), name
    assert not decay and all(group["fused"] and group["betas"] == (0.9, 0.9) for group in optimizer.param_groups)


def test_updates_equal_the_published_formula():
    """Ten steps of decoupled AdamW (arXiv:1711.05101) by hand, in float64."""
    model = GPT(GPTConfig(4, 5, 1, 1, 4)).double()
    config = TrainingConfig(weight_decay=0.1, learning_rate=0.01, beta1=0.8, beta2=0.9, adam_eps=1e-6)
    optimizer = build_optimizers(model, config)["optimizer"]
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
    old = build_optimizers(model, TrainingConfig(weight_decay=0.3, beta2=0.9))["optimizer"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    new = build_optimizers(model, TrainingConfig(weight_decay=0.1, beta2=0.99))["optimizer"]
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


def test_a_schedule_that_is_constant_and_then_cools_down():
    settings = dict(learning_rate=1.0, min_lr=0.2, schedule="wsd")
    assert rates(10, cooldown=0.5, **settings) == pytest.approx([1, 1, 1, 1, 1, 1, 0.84, 0.68, 0.52, 0.36])
    assert rates(4, cooldown=1.0, **settings) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert rates(4, cooldown=0.0, **settings) == [1, 1, 1, 1]
    assert rates(6, cooldown=0.5, warmup_iters=1, lr_decay_iters=4, **settings) == pytest.approx(
        [0.5, 1, 1, 0.6, 0.2, 0.2]
    )


OPTIMIZERS = get_args(TrainingConfig.__annotations__["optimizer"])
MUON = dict(optimizer="muon", muon_rate=0.03, learning_rate=0.01, weight_decay=0.1, momentum=0.9, grad_clip=0.0)
MODELS = {
    "gpt2": dict(),
    "modern": dict(bias=False, norm="rmsnorm", qk_norm=True, tied_head=False, head_bias=True, ngrams=3, ngram_rows=9),
    "experts": dict(n_experts=4, shared_experts=1, expert_interval=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_optimizer(name):
    model = GPT(GPTConfig(8, 11, 2, 2, 16, **MODELS[name]))
    config = TrainingConfig(**MUON)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizers = build_optimizers(model, config)
    muon, adam = (
        [p for group in optimizers[key].param_groups for p in group["params"]] for key in ("muon", "optimizer")
    )
    assert sorted(names[p] for p in muon + adam) == sorted(names.values())
    expected = {f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attention.qkv", "attention.projection")}
    mlps = ["blocks.0.mlp", "blocks.1.mlp.shared"] if name == "experts" else ["blocks.0.mlp", "blocks.1.mlp"]
    assert {names[p] for p in muon} == expected | {
        f"{mlp}.{part}.weight" for mlp in mlps for part in ("up", "projection")
    }
    assert build_optimizers(model, TrainingConfig()).keys() == {"optimizer"}


def test_an_update_is_muons_of_the_blocks_and_adamws_of_the_rest():
    model = with_gradients()
    theirs = copy.deepcopy(model)
    for ours, its in zip(model.parameters(), theirs.parameters()):
        its.grad = ours.grad.clone()
    config = TrainingConfig(**MUON)
    updater = Updater(model, config, CPU, "float32")
    matrices = {name: p for name, p in theirs.named_parameters() if p.dim() == 2 and name.startswith("blocks")}
    muon = torch.optim.Muon(matrices.values(), lr=0.015, weight_decay=0.1, momentum=0.9)
    rest = [p for name, p in theirs.named_parameters() if name not in matrices]
    decays = [
        {"params": [p for p in rest if (p.dim() > 1) == tables], "weight_decay": 0.1 * tables} for tables in (0, 1)
    ]
    adam = torch.optim.AdamW(decays, lr=0.005, betas=(0.9, 0.95), eps=1e-8)
    before = {name: p.detach().clone() for name, p in matrices.items()}
    muon.step(), adam.step()
    assert updater.update(0.005, torch.tensor(1.0))[0]  # half the peak, of both
    for (name, ours), its in zip(model.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(ours, its, msg=name) and ours.grad is None
        if name in matrices:  # all but orthogonal: singular values near 1, of tall matrices sqrt(rows / columns)
            moved = (
                (before[name] * (1 - 0.015 * 0.1) - ours.detach()) / 0.015 / max(1, ours.size(0) / ours.size(1)) ** 0.5
            )
            assert torch.linalg.svdvals(moved).sub(1).abs().max() < 0.45, name


def test_muon_does_not_see_the_scale_of_a_loss():
    """What float16 multiplies a loss by is divided out again before the gradients' mean is kept."""
    plain, scaled = with_gradients(), with_gradients()
    updaters = [
        Updater(model, TrainingConfig(**MUON), CPU, dtype) for model, dtype in ((plain, "float32"), (scaled, "float16"))
    ]
    updaters[1].scaler.scale(torch.zeros(()))
    for parameter in scaled.parameters():
        parameter.grad *= updaters[1].scaler.get_scale()
    for updater in updaters:
        assert updater.update(0.01, torch.tensor(1.0))[0]
    for ours, its in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(ours, its)
    moments = [updater.optimizers["muon"].state_dict()["state"] for updater in updaters]
    assert all(torch.allclose(moments[0][i]["momentum_buffer"], moments[1][i]["momentum_buffer"]) for i in moments[0])


def test_the_average_of_the_weights():
    """After n updates d^n of the first weights and (1 - d) d^(n - i) of those after update i."""
    model, decay = with_gradients(), 0.8
    updater = Updater(model, TrainingConfig(ema_decay=decay), CPU, "float32")
    seen = [[p.detach().double().clone() for p in model.parameters()]]
    for step in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + step)
        updater.update(0.02, torch.tensor(math.nan if step == 3 else 1.0))  # which changes nothing
        if step != 3:
            seen.append([p.detach().double().clone() for p in model.parameters()])
    n = len(seen) - 1
    shares = [decay**n, *((1 - decay) * decay ** (n - i) for i in range(1, n + 1))]
    assert n == 4 and sum(shares) == pytest.approx(1)
    with pytest.raises(KeyError), updater.averaged():
        for i, parameter in enumerate(model.parameters()):
            expected = sum(share * weights[i] for share, weights in zip(shares, seen))
            torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)
        raise KeyError
    assert all(torch.equal(p.double(), last) for p, last in zip(model.parameters(), seen[-1]))


def test_a_state_goes_on_under_other_settings_of_the_average_but_not_with_another_optimizer():
    def made(**settings):
        return Updater(with_gradients(), TrainingConfig(**settings), CPU, "float32")

    adamw, muon, average = made(), made(optimizer="muon"), made(ema_decay=0.5)
    for updater in (adamw, muon, average):
        updater.update(0.1, torch.tensor(1.0))
    for saved, other, known in ((adamw, "muon", "adamw"), (muon, "adamw", "muon")):
        check_same_optimizer(known, saved.state_dict())
        with pytest.raises(UserError, match=f'from the moments of "{known}"'):
            check_same_optimizer(other, saved.state_dict())
    new = made(ema_decay=0.5)  # of a run that had none until now: the average begins with the weights there are
    new.load_state_dict(adamw.state_dict())
    assert all(torch.equal(mean, p) for mean, p in zip(new.average, new.parameters))
    without = made()  # of one that had: it goes on with the weights, not their average
    without.load_state_dict(average.state_dict())
    assert all(torch.equal(ours, its) for ours, its in zip(without.parameters, average.parameters))


CPU = torch.device("cpu")


def with_gradients(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(8, 11, 2, 2, 16))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_state_continues_bit_for_bit(optimizer, dtype):
    def update(model, updater, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            updater.scaler.scale(torch.zeros(()))  # float16's scaler has to know the device
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            assert updater.update(0.01 / (step + 1), torch.tensor(1.0))[0]

    config, whole = TrainingConfig(optimizer=optimizer), with_gradients()
    updater = Updater(whole, config, CPU, dtype)
    update(whole, updater, range(3))
    halves, file = copy.deepcopy(whole), io.BytesIO()
    torch.save(updater.state_dict(), file)
    file.seek(0)
    update(whole, updater, range(3, 6))
    resumed = Updater(halves, config, CPU, dtype)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    update(halves, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters()))


@pytest.mark.parametrize("grad_clip", [0.0, 1.0, 1e6])
def test_an_update_clips_and_steps(grad_clip):
    config = TrainingConfig(grad_clip=grad_clip)
    model = with_gradients()
    theirs = copy.deepcopy(model)
    for ours, its in zip(model.parameters(), theirs.parameters()):
        its.grad = ours.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip or math.inf)
    optimizer = build_optimizers(theirs, config)["optimizer"]
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.02
    optimizer.step()
    finite, seen, sums = Updater(model, config, CPU, "float32").update(0.02, torch.tensor(2.5), 3)
    assert finite and seen == pytest.approx(norm.item()) and sums == [2.5, 3.0]
    for ours, its in zip(model.parameters(), theirs.parameters()):
        torch.testing.assert_close(ours, its) and ours.grad is None


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_not_finite_changes_nothing(what, dtype, optimizer):
    model = with_gradients()
    before = copy.deepcopy(model.state_dict())
    updater = Updater(model, TrainingConfig(optimizer=optimizer), CPU, dtype)
    updater.scaler.scale(torch.zeros(()))
    if what == "gradient":
        model.final_norm.bias.grad[0] = math.nan
    finite, _, _ = updater.update(0.1, torch.tensor(math.inf if what == "loss" else 1.0))
    assert not finite and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
