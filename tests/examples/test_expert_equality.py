"""examples/expert_equality.py: its cases match their names, its loop is right, and it detects errors."""

import sys

import pytest
import torch
import torch.nn.functional as F

import expert_equality
from expert_equality import SHAPES, VARIANTS, by_loop, make_case, measure, of_model, refused
from gpt_arc.errors import entry_point
from gpt_arc.nn import experts
from gpt_arc.nn.experts import Experts

SMALL = (13, 16, 4, 8)


def test_every_case_matches_its_name():
    def routing(name):
        case = make_case(VARIANTS[name], SMALL, 0)
        torch.manual_seed(case.seed)
        return case, case.experts(case.x)[1]

    for name in ("two, as the capacity allows", "top 1, as the capacity allows"):
        assert 0 < routing(name)[1].dropped < 0.6
    case, starving = routing("two, an expert without tokens")
    assert starving.load[3] == 0 and (starving.load[:3] > 0).all()
    case, balanced = routing("two, chosen with balancing biases")
    case.experts.balance.zero_()
    assert not torch.equal(case.experts(case.x)[1].load, balanced.load)
    case, _ = routing("two, drawn by their gates")
    torch.manual_seed(case.seed)
    assert not torch.equal(case.drawn().sort().values, case.experts.eval().route(case.x)[0].sort().values)
    assert make_case(VARIANTS["all experts"], SMALL, 0).experts.config.experts_per_token == 4
    case, sizes = make_case(VARIANTS["two, one token at a time"], SMALL, 0), []
    case.experts.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    of_model(case, autocast=False)
    assert sizes == [1] * 13
    assert {shape[1] * 2 % 16 == shape[3] * 2 % 16 == 0 for shape in SHAPES} == {
        False,
        True,
    }  # both kinds of 16-bit products


@pytest.mark.parametrize("shared", [0, 1])
def test_the_loop_is_the_sum_of_a_token_s_experts_by_their_gates(shared):
    """Token by token, with the softmax over the chosen logits only, as in Mixtral."""
    case = make_case(dict(activation="relu", shared_experts=shared), SMALL, 3)
    weights = {name: parameter.detach().double() for name, parameter in case.experts.named_parameters()}
    outputs_by_loop = by_loop(case.experts, weights, case.x.double(), None, torch.float64)
    for token, y in zip(case.x.double(), outputs_by_loop, strict=True):
        best = (weights["router.weight"] @ token).topk(2)
        outputs = []
        for e in best.indices:
            hidden = (weights["up"][e] @ token + weights["up_bias"][e]).clamp(min=0)
            outputs.append(weights["projection"][e] @ hidden + weights["projection_bias"][e])
        expected = best.values.softmax(0) @ torch.stack(outputs)
        if shared:
            hidden = F.linear(token, weights["shared.up.weight"], weights["shared.up.bias"]).clamp(min=0)
            expected += F.linear(hidden, weights["shared.projection.weight"], weights["shared.projection.bias"])
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_the_table_has_every_case_and_all_pass(output_of, monkeypatch):
    monkeypatch.setattr(expert_equality, "SHAPES", [SMALL])
    output = output_of(entry_point(expert_equality.main), "examples/expert_equality.py")
    *rows, mixtral, _, verdict = output.splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == list(VARIANTS) and {row[1] for row in cells} == {"13 x 16, 4 of 8"}
    for row in cells:
        assert all(0 < float(figure) < 2e-6 for figure in row[2:4])
        assert all(1e-3 < float(figure) < 0.5 for figure in row[4:])
    assert mixtral.startswith("| transformers' Mixtral") and 0 < float(mixtral.split("|")[4]) < 1e-5
    assert verdict.endswith("nothing.")


def wrong_gates(experts, x):
    chosen, gates, logits = Experts.route(experts, x)
    return chosen, gates * (1 + 3e-5), logits


def wrong_backward(ctx, gradient):
    rows = gradient[ctx.saved_tensors[0]]
    return rows if ctx.times == 1 else rows.unflatten(0, (-1, ctx.times))[:, 0], None, None


def wrong_half(x, weight, bias, ends, right=experts.grouped_linear):
    product = right(x, weight, bias, ends)
    return product if product.dtype == torch.float32 else product * 1.1


@pytest.mark.parametrize("place", ["gates", "backward", "half"])
def test_errors_are_detected(place, monkeypatch, capsys):
    case = make_case({}, SMALL, 0)
    assert not refused(measure(case))
    if place == "gates":
        monkeypatch.setattr(case.experts, "route", lambda x: wrong_gates(case.experts, x))
    elif place == "backward":
        monkeypatch.setattr(experts.TakeRows, "backward", staticmethod(wrong_backward))
    else:
        monkeypatch.setattr(experts, "grouped_linear", wrong_half)
    figures = measure(case)
    assert refused(figures) and (figures[0] > 1e-5) == (place == "gates")
    monkeypatch.setattr(expert_equality, "make_case", lambda *args: case)
    monkeypatch.setattr(expert_equality, "VARIANTS", {"top 2": {}})
    monkeypatch.setattr(expert_equality, "SHAPES", [SMALL])
    monkeypatch.setattr(expert_equality, "measure_mixtral", lambda seed: (0.0, 2e-5))
    monkeypatch.setattr(sys, "argv", ["examples/expert_equality.py"])
    assert expert_equality.main() == 1
    assert "in bfloat16: top 2, 13 x 16, 4 of 8; transformers' Mixtral." in capsys.readouterr().out


def test_without_transformers_a_message_replaces_the_row(output_of, monkeypatch):
    monkeypatch.setattr(expert_equality, "VARIANTS", {"top 2": {}})
    monkeypatch.setattr(expert_equality.importlib.util, "find_spec", lambda name: None)
    output = output_of(entry_point(expert_equality.main), "examples/expert_equality.py", "--seed=3")
    assert "there is no row for its Mixtral" in output and output.count("\n| top 2") == 2


def test_a_wrong_flag_is_refused(output_of):
    assert "did you mean --seed" in output_of(entry_point(expert_equality.main), "expert_equality.py", "--seeds=1")
