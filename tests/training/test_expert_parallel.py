"""Experts split across processes, against all of them in one process."""

import pytest
import torch

from gpt_arc.errors import UserError
from gpt_arc.nn.meta import meta_device
from gpt_arc.planning.cost import memory_estimate
from gpt_arc.training.expert_parallel import check_expert_processes
from helpers import TINY_FLAGS, command, refusal, trains_into
from model import GPT, GPTConfig

FLAGS = (*TINY_FLAGS, "--n_experts=4", "--mlp_size=16", "--compile=False", "--dtype=float32", "--learning_rate=1e-3")
FLAGS += ("--max_iters=20", "--lr_decay_iters=20", "--eval_interval=10", "--log_interval=1", "--grad_clip=0.5")
SWIGLU = ("--activation=swiglu", "--shared_experts=1", "--expert_interval=2", "--bias=True", "--experts_per_token=3")


@pytest.fixture
def run(workplace, output_of):
    """Returns a function that trains into a folder with some processes and returns the metrics and the final
    tensors."""

    return trains_into(output_of, FLAGS)


def assert_same_run(actual: tuple[list[dict], dict], expected: tuple[list[dict], dict]) -> None:
    assert len(actual[0]) == len(expected[0]) == 20
    for line, expected_line in zip(actual[0], expected[0]):
        for name in ("train_loss", "val_loss", "grad_norm", "expert_cv", "expert_max", "router_entropy"):
            assert line.get(name) == pytest.approx(expected_line.get(name), abs=1e-5), (name, line["step"])
    assert actual[1].keys() == expected[1].keys()
    for name, tensor in actual[1].items():
        torch.testing.assert_close(tensor, expected[1][name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("processes", "sharing", "flags"),
    [
        (2, 2, ("--experts_per_token=1", "--bias=True")),
        pytest.param(2, 2, (*SWIGLU, "--balance_rate=0.01"), marks=pytest.mark.slow),
        pytest.param(4, 2, SWIGLU, marks=pytest.mark.slow),
    ],
)
def test_experts_in_several_processes_train_as_in_one(run, processes, sharing, flags):
    """Twenty losses, gradient norms and router figures, including clipping and the router losses."""
    several = run("several", *flags, f"--expert_processes={sharing}", processes=processes)
    assert_same_run(run("one", *flags), several)
    clipped = [line["grad_norm"] > 0.5 for line in several[0]]
    assert any(clipped)


@pytest.mark.slow
def test_a_run_resumes_with_its_experts_in_another_number_of_processes(run):
    """Each expert's moments move along, both from one process to two and back."""
    whole = run("one")
    for before, after in ((2, 1), (1, 2)):
        folder = f"from-{before}"
        run(folder, "--max_iters=10", f"--expert_processes={before}", processes=before)
        assert_same_run(whole, run(folder, "--init_from=resume", f"--expert_processes={after}", processes=after))


EXCHANGE = """
import copy, os, sys
import torch
import torch.distributed as dist
from gpt_arc import distributed
from gpt_arc.training.expert_parallel import ExpertParallel
from gpt_arc.training.parallel import REPLICATED
from model import GPT, GPTConfig

def outputs_and_gradients(model, x, experts):
    x = x.clone().requires_grad_()
    mixed, routing = experts(x)
    mixed.square().sum().backward()
    return mixed.detach(), x.grad, experts.router.weight.grad

cpu = torch.device("cpu")
with distributed.process_group("gloo", cpu):
    rank = distributed.RANK
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for k, tokens, favoured in ((1, (7, 1), None), (2, (5, 3), 0), (4, (1, 6), None), (1, (1, 1), 3)):
            torch.manual_seed(k)
            sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 9, "mlp_size": 24, "n_experts": 4}
            model = GPT(GPTConfig(**sizes, experts_per_token=k)).to(dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(std=0.3)
                if favoured is not None:  # one expert, and so its process, gets every token
                    model.experts[0].router.weight.zero_()
                    model.experts[0].router.weight[favoured] = 10
            whole = copy.deepcopy(model)
            inputs = [torch.randn(n, 16).abs().to(dtype) for n in tokens]
            sharing = ExpertParallel(2, cpu)
            sharing.divide(model)
            actual = outputs_and_gradients(model, inputs[rank], model.experts[0])
            divided = dict(model.experts[0].named_parameters(recurse=False))
            sharing.reduce_gradients([p.grad for p in divided.values()], REPLICATED)
            for i, x in enumerate(inputs):
                expected = outputs_and_gradients(whole, x, whole.experts[0])
                if i == rank:
                    for x, y in zip(actual, expected):
                        assert (x - y).abs().max() <= bound * y.abs().max(), (dtype, k, tokens)
                whole.experts[0].router.weight.grad = None
            for name, p in whole.experts[0].named_parameters(recurse=False):  # both batches; a mean over processes
                expected = sharing.share_of(p.grad, "blocks.0.mlp." + name) / 2
                error = (divided[name].grad - expected).abs().max()
                assert error <= bound * p.grad.abs().max(), (dtype, k, tokens, name)
            gathered = sharing.whole(model, REPLICATED)
            if distributed.IS_MAIN:
                for (name, x), y in zip(gathered.state_dict().items(), whole.state_dict().values()):
                    assert torch.equal(x, y), name
            print("equal", dtype, k)
sys.stdout.flush()
os._exit(0)  # as scripts end
"""


def test_rows_are_sent_to_their_experts_and_back(tmp_path):
    """Even if a process computes no token or only one, and in 16 bits."""
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    result = command(str(script), processes=2)
    assert result.returncode == 0 and result.stdout.count("equal") == 16, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((2, 0, "float32"), "the model has none"),
        ((3, 8, "float32"), "does not divide n_experts = 8"),
        ((2, 8, "float32"), "torchrun --nproc_per_node=2"),
        ((1, 8, "float16"), None),
        ((2, 8, "float32", 6), None),
        ((4, 8, "float32", 6), "expert_processes = 4 does not divide devices = 6"),
        ((2, 8, "float16"), "use dtype = bfloat16"),
    ],
)
def test_impossible_splits_of_experts_are_refused(arguments, sentence):
    if sentence is None:
        return check_expert_processes(*arguments)
    with pytest.raises(UserError, match=sentence):
        check_expert_processes(*arguments)


def test_the_command_line_refuses_an_impossible_split(workplace):
    assert "expert_processes = 2" in refusal("train.py", "sums.toml", *FLAGS, "--expert_processes=2")


def test_the_memory_estimate_counts_a_process_s_share_of_experts():
    with meta_device():
        model = GPT(
            GPTConfig(n_layer=2, n_embd=16, mlp_size=24, n_head=2, n_experts=4, bias=False, activation="swiglu")
        )
    whole, share = (memory_estimate(model, 3, "float32", expert_processes=n) for n in (1, 4))
    assert whole - share == 16 * 2 * 3 * (3 * 16 * 24)  # bytes, layers, experts elsewhere, weights per expert
