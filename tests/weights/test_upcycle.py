"""Dense models converted to mixtures of experts on the command line."""

import json

import pytest
import torch

from gpt_arc.data.tokenizer import load_tokenizer
from gpt_arc.errors import entry_point
from gpt_arc.nn.experts import Experts
from gpt_arc.weights.directory import load_config, load_model, save_model
from gpt_arc.weights.upcycle import upcycled
from helpers import TINY_FLAGS, command, randomised, refusal
from model import GPT, GPTConfig
from tools import upcycle

MODERN = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False)


@pytest.fixture
def run(output_of):
    return lambda *argv: output_of(entry_point(upcycle.main), "tools/upcycle.py", *map(str, argv))


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, ["--n_experts", "3"]),
        ({"norm_position": "post"}, ["--expert_interval=2"]),
        (MODERN, ["--n_experts=4", "--experts_per_token=3", "--balance_rate=1e-3"]),
        ({}, ["--n_experts=4", "--shared_experts=1"]),
        (MODERN, ["--n_experts=4", "--shared_experts=2", "--expert_interval=2"]),
    ],
)
def test_a_new_mixture_computes_the_same_as_the_model(settings, flags, run, tmp_path):
    dense = randomised(GPT(GPTConfig(12, 31, 4, 2, 16, **settings)))
    save_model(dense, None, tmp_path / "dense")
    output = run(tmp_path / "dense", tmp_path / "mixture", *flags)
    mixture, _ = load_model(tmp_path / "mixture")
    mixture.eval()
    assert f"{mixture.num_parameters():,} parameters, {mixture.num_parameters(active=True):,} active" in output
    interval = mixture.config.expert_interval
    assert [isinstance(b.mlp, Experts) for b in mixture.blocks] == [(i + 1) % interval == 0 for i in range(4)]
    tokens = torch.randint(31, (5, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(mixture(tokens), dense(tokens), atol=1e-5, rtol=1e-5)
        chosen = [experts.route(torch.randn(50, 16))[0] for experts in mixture.experts]
    assert all(len(c.unique()) > 2 for c in chosen)  # the routers distinguish tokens
    run(tmp_path / "dense", tmp_path / "again", *flags)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mixture", "again")]
    assert written[0] == written[1]


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "modern"])
def test_shared_experts_start_at_zero_and_learn(settings):
    dense = randomised(GPT(GPTConfig(12, 31, 2, 2, 16, **settings)))
    torch.manual_seed(0)
    mixture = upcycled(dense, 4, shared_experts=2)
    shared = [experts.shared for experts in mixture.experts]
    width = dense.config.mlp_width
    assert [expert.projection.weight.shape for expert in shared] == [(16, 2 * width)] * 2
    for expert in shared:
        assert not expert(torch.randn(5, 16))[0].any()
        assert 0.018 < expert.up.weight.std() < 0.022 and not torch.equal(expert.up.weight[0], expert.up.weight[1])
    tokens = torch.randint(31, (3, 12), generator=torch.Generator().manual_seed(0))
    mixture.train()(tokens, tokens).total.backward()
    assert all(expert.projection.weight.grad.abs().min() > 0 for expert in shared)


@pytest.mark.slow
def test_a_mixture_trains_further(run, workplace):
    train = ["train.py", "sums.toml", *TINY_FLAGS, "--compile=False", "--dtype=float32"]
    result = command(*train, "--out_dir=dense", "--max_iters=30", "--eval_interval=30")
    assert result.returncode == 0, result.stderr
    run("dense", "mixture", "--n_experts=4")
    assert load_tokenizer(workplace / "mixture") == load_tokenizer(workplace / "dense" / "last")
    message = refusal(*train, "--init_from=dense", "--n_experts=4")
    assert "n_experts = 4, and dense is dense: make a mixture of it with: python tools/upcycle.py dense" in message
    result = command(*train, "--init_from=mixture", "--eval_only=True")
    trained = [json.loads(line) for line in (workplace / "dense" / "metrics.jsonl").read_text().splitlines()]
    assert f"mixture: val loss {trained[-1]['val_loss']:.4f} over" in result.stdout
    result = command(*train, "--out_dir=further", "--init_from=mixture", "--max_iters=4")
    assert result.returncode == 0, result.stderr
    config = load_config("further")
    assert (config.n_experts, config.experts_per_token, config.n_embd) == (4, 2, 16)
    *_, last_line = (workplace / "further" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last_line)["step"] == 4 and "expert_cv" in json.loads(last_line)
    experts = load_model("further")[0].blocks[0].mlp.up
    assert not torch.equal(experts[0], experts[1])  # they have diverged


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--experts_per_token=1"], "experts_per_token = 1 must be at least 2"),
        (["--n_experts=1"], "n_experts = 1 must be at least 2"),
        (["--n_experts=0"], "n_experts = 0 must be at least 2"),
        (["--n_experts=-3"], "n_experts = -3 must be at least 2"),
        ([f"--seed={2**64}"], f"seed = {2**64} must be at least 0 and less than 2^63"),
        (["--expert_interval=0"], "expert_interval = 0 must be at least 1"),
        (["--shared_experts=-1"], "shared_experts = -1 must be at least 0"),
        (["--expert_interval=3"], "expert_interval = 3 leaves 2 blocks without experts"),
        (["--n_expert=3"], "there is no flag --n_expert; did you mean --n_experts"),
    ],
)
def test_impossible_mixtures_are_refused_and_nothing_is_written(flags, sentence, run, tmp_path):
    save_model(GPT(GPTConfig(8, 11, 2, 2, 8)), None, tmp_path / "dense")
    assert sentence in run(tmp_path / "dense", tmp_path / "mixture", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_models_that_are_mixtures_and_folders_in_use_are_refused(run, tmp_path):
    save_model(GPT(GPTConfig(8, 11, 2, 2, 8)), None, tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "mixture")
    assert "is a mixture of 8 experts already" in run(tmp_path / "mixture", tmp_path / "more")
    assert "mixture holds something already" in run(tmp_path / "dense", tmp_path / "mixture")
    assert "there is no model directory" in run(tmp_path / "nowhere", tmp_path / "more")
    assert not (tmp_path / "more").exists()
