"""examples/moe_experts.py: its text, its losses beside the model's, and the command, which continues."""

from pydoc_data.topics import topics
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F

import moe_experts
from gpt_arc.errors import entry_point
from gpt_arc.evaluation.statistics import standard_error
from gpt_arc.reading import read_json
from helpers import ROOT, randomised
from model import GPT, GPTConfig

RESULTS = ROOT / "docs/results"


def test_every_fifth_thousand_characters_are_held_out():
    training, held_out, vocabulary = moe_experts.read_text(12_345)
    assert (len(training), len(held_out)) == (10_345, 2000)
    text = "".join(topics[name] for name in sorted(topics))[:12_345]
    assert vocabulary == len(set(text))
    alphabet = sorted(set(text))
    assert "".join(alphabet[i] for i in training) == text[:4000] + text[5000:9000] + text[10_000:]
    assert "".join(alphabet[i] for i in held_out) == text[4000:5000] + text[9000:10_000]


def test_the_loss_of_a_text_is_the_mean_over_its_windows():
    model = randomised(GPT(GPTConfig(block_size=64, vocab_size=9, n_layer=1, n_head=1, n_embd=8)))
    tokens = torch.randint(9, (64 * 3 + 20,), generator=torch.Generator().manual_seed(0))
    rows = tokens[: 64 * 3].view(3, 64)
    expected = F.cross_entropy(model.eval()(rows).flatten(0, 1), tokens[1 : 64 * 3 + 1])
    assert moe_experts.mean_loss(model, tokens) == pytest.approx(expected.item(), rel=1e-5)


def test_the_command_continues_and_compares_seed_by_seed(tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    flags = "--experts 1 4 --compared=4 --max_iters=2 --characters=6000 --output=out/try".split()
    output_of(entry_point(moe_experts.main), "moe_experts.py", *flags, "--seeds=1")
    first = read_json(tmp_path / "out/try/figures.json")["runs"]
    changed = [(4, change) for change in moe_experts.CHANGES]
    assert [(run["experts"], run["change"]) for run in first] == [(1, ""), (4, ""), *changed]
    output = output_of(entry_point(moe_experts.main), "moe_experts.py", *flags, "--seeds=2")
    runs = read_json(tmp_path / "out/try/figures.json")["runs"]
    assert runs[:5] == first and len(runs) == 10 and {run["seed"] for run in runs[5:]} == {2}
    dense, mixture = first[:2]
    assert mixture["active"] - dense["active"] == 2 * 3 * 32  # three more rows in each router
    assert mixture["parameters"] - mixture["active"] == 2 * 2 * (2 * 32 * 64)  # two idle experts a block
    assert all(run["gap"] == pytest.approx(run["val loss"] - run["train loss"]) for run in runs)
    assert dense["load CV"] == 0 < mixture["load CV"]
    differences = [runs[5 * i + 2]["val loss"] - runs[5 * i + 1]["val loss"] for i in (0, 1)]  # without balance loss
    error = abs(differences[0] - differences[1]) / 2
    assert f"{sum(differences) / 2:.3f} ± {error:.3f}" in output
    assert (tmp_path / "out/try/losses.png").stat().st_size > 5000
    refused = output_of(entry_point(moe_experts.main), "moe_experts.py", *flags, "--max_iters=3")
    assert "name another --output" in refused


@pytest.mark.parametrize(
    ("flag", "reason"),
    [("--compared=3", "compared = 3 must be one of"), ("--characters=100", "must be at least 5000")],
)
def test_mistakes_are_refused(flag, reason, tmp_path, monkeypatch, output_of):
    monkeypatch.chdir(tmp_path)
    assert reason in output_of(entry_point(moe_experts.main), "moe_experts.py", flag)
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_figures_of_the_runs():
    runs, page = read_json(RESULTS / "moe_experts.json")["runs"], (RESULTS / "moe.md").read_text()
    for experts in (1, 2, 4, 8, 16, 32, 64, 128):
        rows = [run for run in runs if run["experts"] == experts and not run["change"]]
        cells = [f"{experts}", f"{rows[0]['parameters']:,}", f"{rows[0]['active']:,}", f"{len(rows)}"]
        cells += [moe_experts.mean_and_error([row[name] for row in rows]) for name in moe_experts.METRICS]
        assert f"| {' | '.join(cells)} |" in page
        assert len(rows) == 3
    plain = {run["seed"]: run for run in runs if run["experts"] == 8 and not run["change"]}
    for change, value in moe_experts.CHANGES.items():
        changed = [run for run in runs if run["change"] == change]
        differences = [[run[name] - plain[run["seed"]][name] for run in changed] for name in moe_experts.METRICS]
        cells = [f"`{change} = {value:g}`", "3", *map(moe_experts.mean_and_error, differences)]
        assert len(changed) == 3 and f"| {' | '.join(cells)} |" in page
        by_name = dict(zip(moe_experts.METRICS, differences))
        clear = {"balance_loss": "val loss", "expert_dropout": "gap"}.get(change)  # as the page says
        if clear:
            assert abs(fmean(by_name[clear])) > 3 * standard_error(by_name[clear])
    best = min(
        moe_experts.Options().experts,
        key=lambda experts: fmean(run["val loss"] for run in runs if run["experts"] == experts and not run["change"]),
    )
    assert best == 8
