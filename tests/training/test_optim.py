"""The optimizers' groups and updates, the average of the weights, and the learning rate over time."""

import copy
import io
import math
from typing import get_args

import pytest
import torch

from gpt_arc.errors import UserError
from gpt_arc.training.config import TrainingConfig
from gpt_arc.training.muon import BatchedMuon, shared
from gpt_arc.training.optim import Updater, build_optimizers, check_same_optimizer, load_optimizer_state
from gpt_arc.training.schedule import learning_rate_at
from model import GPT, GPTConfig


def test_decay_applies_only_to_matrices():
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
    mean = {name: torch.zeros_like(p) for name, p in expected.items()}
    variance = {name: torch.zeros_like(p) for name, p in expected.items()}
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 11):
        for name, p in names.items():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            mean[name] = 0.8 * mean[name] + 0.2 * p.grad
            variance[name] = 0.9 * variance[name] + 0.1 * p.grad**2
            update = (mean[name] / (1 - 0.8**t)) / ((variance[name] / (1 - 0.9**t)).sqrt() + 1e-6)
            decay = 0.1 if p.dim() >= 2 else 0.0
            expected[name] = expected[name] * (1 - 0.01 * decay) - 0.01 * update
        optimizer.step()
    for name, p in names.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-9, atol=1e-12)


def test_loading_a_state_keeps_the_new_settings():
    model = GPT(GPTConfig(4, 5, 1, 1, 4))
    old = build_optimizers(model, TrainingConfig(weight_decay=0.3, beta2=0.9))["optimizer"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    new = build_optimizers(model, TrainingConfig(weight_decay=0.1, beta2=0.99))["optimizer"]
    load_optimizer_state(new, old.state_dict())
    assert [group["weight_decay"] for group in new.param_groups] == [0.1, 0.0]
    assert new.param_groups[0]["betas"] == (0.9, 0.99)
    parameter = next(model.parameters())
    assert torch.equal(new.state[parameter]["exp_avg"], old.state[parameter]["exp_avg"])
    assert new.state[parameter]["step"] == 1


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


def test_the_wsd_schedule():
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
def test_every_parameter_has_exactly_one_optimizer(name):
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


def test_muon_updates_the_blocks_matrices_and_adamw_everything_else():
    model = with_gradients()
    reference = copy.deepcopy(model)
    for parameter, expected in zip(model.parameters(), reference.parameters()):
        expected.grad = parameter.grad.clone()
    config = TrainingConfig(**MUON)
    updater = Updater(model, config, CPU, "float32")
    matrices = {name: p for name, p in reference.named_parameters() if p.dim() == 2 and name.startswith("blocks")}
    muon = torch.optim.Muon(matrices.values(), lr=0.015, weight_decay=0.1, momentum=0.9)
    for_adamw = [p for name, p in reference.named_parameters() if name not in matrices]
    decays = [
        {"params": [p for p in for_adamw if (p.dim() > 1) == tables], "weight_decay": 0.1 * tables} for tables in (0, 1)
    ]
    adam = torch.optim.AdamW(decays, lr=0.005, betas=(0.9, 0.95), eps=1e-8)
    before = {name: p.detach().clone() for name, p in matrices.items()}
    muon.step(), adam.step()
    assert updater.update(0.005, torch.tensor(1.0))[0]  # half the peak rate of both optimizers
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(parameter, expected, msg=name)
        assert parameter.grad is None
        if name in matrices:  # nearly orthogonal: singular values near 1, or sqrt(rows / columns) for tall matrices
            scale = 0.015 * max(1, parameter.size(0) / parameter.size(1)) ** 0.5
            moved = (before[name] * (1 - 0.015 * 0.1) - parameter.detach()) / scale
            assert torch.linalg.svdvals(moved).sub(1).abs().max() < 0.45, name


def test_muon_is_independent_of_the_loss_scale():
    """float16's loss scale is divided out before the momentum is updated."""
    plain, scaled = with_gradients(), with_gradients()
    updaters = [
        Updater(model, TrainingConfig(**MUON), CPU, dtype) for model, dtype in ((plain, "float32"), (scaled, "float16"))
    ]
    updaters[1].scaler.scale(torch.zeros(()))
    for parameter in scaled.parameters():
        parameter.grad *= updaters[1].scaler.get_scale()
    for updater in updaters:
        assert updater.update(0.01, torch.tensor(1.0))[0]
    for expected, actual in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(expected, actual)
    moments = [updater.optimizers["muon"].state_dict()["state"] for updater in updaters]
    assert all(torch.allclose(moments[0][i]["momentum_buffer"], moments[1][i]["momentum_buffer"]) for i in moments[0])


def test_the_average_of_the_weights():
    """After n updates: d^n of the initial weights and (1 - d) d^(n - i) of those after update i."""
    model, decay = with_gradients(), 0.8
    updater = Updater(model, TrainingConfig(ema_decay=decay), CPU, "float32")
    history = [[p.detach().double().clone() for p in model.parameters()]]
    for step in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + step)
        updater.update(0.02, torch.tensor(math.nan if step == 3 else 1.0))  # a NaN loss changes nothing
        if step != 3:
            history.append([p.detach().double().clone() for p in model.parameters()])
    n = len(history) - 1
    shares = [decay**n, *((1 - decay) * decay ** (n - i) for i in range(1, n + 1))]
    assert n == 4 and sum(shares) == pytest.approx(1)
    with pytest.raises(KeyError), updater.averaged():
        for i, parameter in enumerate(model.parameters()):
            expected = sum(share * weights[i] for share, weights in zip(shares, history))
            torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)
        raise KeyError
    assert all(torch.equal(p.double(), newest) for p, newest in zip(model.parameters(), history[-1]))


def test_a_state_loads_with_other_average_settings_but_not_another_optimizer():
    def updater_of(**settings):
        return Updater(with_gradients(), TrainingConfig(**settings), CPU, "float32")

    adamw, muon, average = updater_of(), updater_of(optimizer="muon"), updater_of(ema_decay=0.5)
    for updater in (adamw, muon, average):
        updater.update(0.1, torch.tensor(1.0))
    for saved, other, saved_name in ((adamw, "muon", "adamw"), (muon, "adamw", "muon")):
        check_same_optimizer(saved_name, saved.state_dict())
        with pytest.raises(UserError, match=f'from the moments of "{saved_name}"'):
            check_same_optimizer(other, saved.state_dict())
    new = updater_of(ema_decay=0.5)  # the run had no average: it begins with the current weights
    new.load_state_dict(adamw.state_dict())
    assert all(torch.equal(mean, p) for mean, p in zip(new.average, new.parameters))
    plain = updater_of()  # the run had an average: it continues with the plain weights
    plain.load_state_dict(average.state_dict())
    assert all(torch.equal(actual, expected) for actual, expected in zip(plain.parameters, average.parameters))


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
    reference = copy.deepcopy(model)
    for parameter, expected in zip(model.parameters(), reference.parameters()):
        expected.grad = parameter.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), grad_clip or math.inf)
    optimizer = build_optimizers(reference, config)["optimizer"]
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.02
    optimizer.step()
    finite, grad_norm, sums = Updater(model, config, CPU, "float32").update(0.02, torch.tensor(2.5), 3)
    assert finite and grad_norm == pytest.approx(norm.item()) and sums == [2.5, 3.0]
    for parameter, expected in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(parameter, expected)
        assert parameter.grad is None


@pytest.mark.parametrize("non_finite", ["gradient", "loss"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_non_finite_values_change_nothing(non_finite, dtype, optimizer):
    model = with_gradients()
    before = copy.deepcopy(model.state_dict())
    updater = Updater(model, TrainingConfig(optimizer=optimizer), CPU, dtype)
    updater.scaler.scale(torch.zeros(()))
    if non_finite == "gradient":
        model.final_norm.bias.grad[0] = math.nan
    finite, _, _ = updater.update(0.1, torch.tensor(math.inf if non_finite == "loss" else 1.0))
    assert not finite and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def after_three_updates(kind, shapes):
    """The matrices and the optimizer after updates with random gradients."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = kind(matrices, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(3):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return matrices, optimizer


SHAPES = [(24, 8), (8, 24), (24, 8), (8, 8), (24, 8)]


def test_batched_muon_equals_torch_s():
    expected, one_by_one = after_three_updates(torch.optim.Muon, SHAPES)
    actual, batched = after_three_updates(BatchedMuon, SHAPES)
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=0)
    assert batched.state_dict()["state"].keys() == one_by_one.state_dict()["state"].keys()
    for i, moments in one_by_one.state_dict()["state"].items():
        torch.testing.assert_close(batched.state_dict()["state"][i], moments)


def test_processes_share_batched_muon_s_matrices(monkeypatch):
    """Both processes have the same gradients, so each can stand in for the other in the exchange."""
    _, optimizer = after_three_updates(BatchedMuon, SHAPES)
    steps, group = [torch.randn(8, 24) for _ in range(3)], optimizer.param_groups[0]
    alone, shares = shared(steps, group), []
    monkeypatch.setattr("gpt_arc.distributed.WORLD_SIZE", 2)
    monkeypatch.setattr("gpt_arc.distributed.all_gather_single", lambda whole, share: shares.append(share.clone()))
    for rank in (0, 1):
        monkeypatch.setattr("gpt_arc.distributed.RANK", rank)
        assert shared(steps, group).shape == alone.shape
    assert [len(share) for share in shares] == [2, 2] and not shares[1][1].any()
    torch.testing.assert_close(torch.cat(shares)[:3], alone)
