"""stages/scaling.py as a user runs it: sweeps that go on where they stopped, fits, plans and predictions."""

import json
import os
import re
import signal
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train
from gpt_arc.errors import UserError
from gpt_arc.planning.fits import FinishedRun, fit_laws, size_of
from gpt_arc.planning.pictures import draw_rates, draw_shapes
from gpt_arc.planning.scaling_laws import PUBLISHED, optimum
from gpt_arc.tables import to_json
from gpt_arc.training.config import write_settings
from gpt_arc.training.runs import Lock
from gpt_arc.training.sweeps import SweepRun, sweep_runs, write_table
from gpt_arc.weights.directory import load_model
from helpers import ROOT, command, refusal, write
from stages import scaling
from warm import WarmPopen

pytest.importorskip("scipy")
LAW = PUBLISHED["besiroglu"]
JOINT = "L(N, D), Chinchilla's form"
SWEEP = """
[sweep]
layers = [1, 2]
aspect_ratio = 16
head_width = 8
tokens = [64, 256]
rate_exponent = 1.0
[data]
dataset = "sums"
batch_size = 2
[model]
block_size = 16
[training]
learning_rate = 1e-2
device = "cpu"
threads = 1
[logging]
eval_iters = 2
"""


@pytest.fixture
def scaling_run(stage_runner, monkeypatch):
    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(Popen=WarmPopen))
    return lambda *args: stage_runner(scaling, *args)


def exact_results(sizes=12, budgets=6):
    """Results of runs that follow a published law exactly, each budget's sizes around its best."""
    results = []
    for flops in np.geomspace(1e18, 1e20, budgets):
        best = optimum(LAW.constants, flops).n
        for n in best * np.geomspace(0.4, 2.5, sizes):
            tokens = int(flops / 6 / n)
            share = np.array([0.25, 0.5, 1.0])
            curve = [(int(s * tokens), float(LAW.loss(n=n, d=s * tokens))) for s in share]
            results.append(
                FinishedRun("run", 4, 64, 1, int(n), int(n), tokens, 6 * n * tokens, curve[-1][1], 1.0, curve)
            )
    return results


def test_a_sweep_trains_each_run_once_and_resumes(workplace, scaling_run, stage_runner):
    Path("small.toml").write_text(SWEEP)
    runs = sweep_runs(Path("small.toml"))
    assert [run.name for run in runs] == ["1x16-2", "1x16-8", "2x32-2", "2x32-8"]
    assert [run.settings["learning_rate"] for run in sorted(runs, key=lambda run: run.name)] == [1e-2, 1e-2, 5e-3, 5e-3]
    Path("one.toml").write_text(write_settings(runs[-1].settings | {"max_iters": 4}))
    stage_runner(train, "one.toml", f"--out_dir={runs[-1].folder}")
    assert runs[-1].step == 4 and not runs[-1].finished
    printed = scaling_run("sweep", "small.toml", "--commands").splitlines()
    assert len(printed) == 4 and f"--resume={runs[-1].folder}" in printed[-1]
    assert "4 runs, 4 left" in scaling_run("sweep", "small.toml", "--jobs=2")
    results = json.loads(Path("out/small/results.json").read_text())
    assert [result["run"] for result in results] == [run.name for run in runs]
    for run, result in zip(runs, results):
        config = tomllib.loads((run.folder / "config.toml").read_text())
        assert (config["model"]["n_layer"], config["training"]["max_iters"]) == (result["n_layer"], run.steps)
        assert result["tokens"] == 32 * run.steps and 0 < result["val_loss"] < 10
        assert result["curve"][-1] == [result["tokens"], result["val_loss"]]
        assert result["parameters"] == load_model(run.folder / "last")[0].num_parameters()
    assert "4 runs, 0 left" in scaling_run("sweep", "small.toml")
    assert json.loads(Path("out/small/results.json").read_text()) == results


def test_ctrl_c_stops_a_sweep_and_its_runs_and_the_same_command_goes_on(workplace, scaling_run, monkeypatch):
    Path("long.toml").write_text(SWEEP.replace("[64, 256]", "[64, 6_400_000]"))
    log, metrics = Path("out/long/1x16-200000.log"), Path("out/long/1x16-200000/metrics.jsonl")

    interrupts = []

    def sleep(seconds):
        if not interrupts and metrics.exists() and len(metrics.read_text().splitlines()) > 2:
            interrupts.append(os.kill(os.getpid(), signal.SIGINT))
        time.sleep(seconds)

    with monkeypatch.context() as patched:
        patched.setattr(scaling, "time", SimpleNamespace(sleep=sleep))
        stopped = scaling_run("sweep", "long.toml")
    assert stopped.code == 130 and "the same command goes on" in stopped.output, stopped
    assert "stopped at step" in log.read_text() and not Path("out/long/2x32-200000").exists()
    printed = scaling_run("sweep", "long.toml", "--commands").splitlines()
    assert len(printed) == 2 and "--resume=out/long/1x16-200000" in printed[0]


def test_a_run_that_was_begun_keeps_its_settings(workplace):
    Path("s.toml").write_text(SWEEP)
    run = sweep_runs(Path("s.toml"))[0]
    run.command("python")
    for changed in ("learning_rate = 2e-2", "learning_rate = 1e-2\nweight_decay = 0.3"):
        Path("s.toml").write_text(SWEEP.replace("learning_rate = 1e-2", changed))
        sweep_runs(Path("s.toml"))  # nothing was trained
    run.folder.mkdir()
    write(run.folder / "metrics.jsonl", [{"step": 1, "train_loss": 2.0}])
    with pytest.raises(UserError, match="1x16-2 was begun with another weight_decay than s.toml has now"):
        sweep_runs(Path("s.toml"))
    Path("s.toml").write_text(SWEEP.replace("threads = 1", "threads = 2"))
    assert len(sweep_runs(Path("s.toml"))) == 4


def test_a_failed_run_s_reason_is_printed(workplace, stage_runner, monkeypatch):
    Path("s.toml").write_text(SWEEP.replace("[64, 256]", "[64]").replace("[1, 2]", "[1]"))
    monkeypatch.setattr(
        SweepRun, "command", lambda run, launcher: ["sh", "-c", "echo begun; echo no memory >&2; exit 3"]
    )
    Path("out/s").mkdir(parents=True)
    failed = stage_runner(scaling, "sweep", "s.toml")
    assert failed.code == 3 and "ended with exit code 3: no memory (out/s/1x16-2.log)" in failed.output
    assert "out/s: 0 results of 1\n" in failed.output


def test_the_reason_is_found_beside_what_another_process_logs(workplace, stage_runner, monkeypatch):
    Path("s.toml").write_text(SWEEP.replace("[64, 256]", "[64]").replace("[1, 2]", "[1]"))
    monkeypatch.setattr(
        SweepRun, "command", lambda run, launcher: ["sh", "-c", "echo train.py: taken; echo step 5; exit 2"]
    )
    assert (
        "ended with exit code 2: train.py: taken (out/s/1x16-2.log)" in stage_runner(scaling, "sweep", "s.toml").output
    )


def test_a_second_sweep_into_a_folder_is_refused(workplace, stage_runner):
    Path("s.toml").write_text(SWEEP)
    Path("out/s").mkdir(parents=True)
    lock = Lock(Path("out/s"))
    refused = stage_runner(scaling, "sweep", "s.toml")
    assert refused.code == 2 and "another process is training in out/s: wait for it" in refused.message
    del lock


def test_a_planned_config_replaces_no_file(workplace, stage_runner):
    Path("mine.toml").write_text("dataset = 'x'")
    refused = stage_runner(scaling, "plan", "--flops=1e21", "--output=mine.toml")
    assert refused.code == 2 and "mine.toml exists: name another file for --output" in refused.message
    assert Path("mine.toml").read_text() == "dataset = 'x'"


def test_a_mistake_that_runs_share_ends_a_sweep_at_once(workplace, scaling_run):
    Path("s.toml").write_text(SWEEP.replace('"sums"', '"nowhere"'))
    refused = scaling_run("sweep", "s.toml")
    assert refused.code == 2 and refused.output.count("there is no dataset nowhere") == 1
    assert "mend this, then repeat the command" in refused.message


def test_shapes_and_rates(workplace, scaling_run):
    sizes = "shapes = [[1, 32], [4, 16]]\nrate_factors = [0.5, 1, 4]"
    Path("s.toml").write_text(SWEEP.replace("layers = [1, 2]", sizes).replace("[64, 256]", "[64]"))
    runs = {run.name: run for run in sweep_runs(Path("s.toml"))}
    assert runs.keys() == {f"{shape}-2-rate{rate}" for shape in ("1x32", "4x16") for rate in ("0.5", "1", "4")}
    assert {run.parameters_without_embeddings // 12 // 1024 for run in runs.values()} == {1}
    rates = [runs[f"{shape}-2-rate4"].settings["learning_rate"] for shape in ("4x16", "1x32")]
    assert rates == pytest.approx([0.04, 0.02])  # rate_exponent = 1
    rows = [
        exact._replace(learning_rate=0.01 * factor, val_loss=exact.val_loss + np.log(2 * factor) ** 2)
        for exact in exact_results(4, 3)
        for factor in (0.25, 0.5, 1)
    ]
    Path("results.json").write_text(write_table(rows))
    output = scaling_run("fit", "results.json", "--embeddings", "--resamplings=0", "--pictures=False")
    assert output.count("best learning rate 0.005\n") == 12  # of a parabola, exactly
    assert json.loads(Path("laws.json").read_text())["runs"] == 12
    assert json.loads(Path("laws.json").read_text())["laws"][JOINT]["constants"] == pytest.approx(
        LAW.constants, rel=1e-4
    )


def test_budgets_in_flops_and_by_parameter(workplace):
    for line in ("flops = [2e8, 8e8]", "tokens_per_parameter = [0.5, 2]"):
        Path("s.toml").write_text(SWEEP.replace("tokens = [64, 256]", line))
        for run in sweep_runs(Path("s.toml")):
            wanted = {"f": (2e8, 8e8), "t": (0.5, 2)}[line[0]]
            reached = run.flops if line[0] == "f" else run.tokens / run.parameters_without_embeddings
            step = reached / run.steps
            assert min(abs(reached - each) for each in wanted) <= step / 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[sweep]", "[swep]", "s.toml has no table [sweep]"),
        ("tokens = [64, 256]", "", "budgets are missing"),
        ("tokens = [64, 256]", "tokens = [64]\nflops = [1e9]", "not by tokens and flops"),
        ("layers = [1, 2]", "layers = [0]", "layers"),
        ("layers = [1, 2]", "", "layers is missing"),
        ("layers = [1, 2]", "layers = [2, 2]", "two runs are 2x32-2"),
        ("layers = [1, 2]", "layers = [1]\nshapes = [[1, 16]]", "leave out layers and widths, or shapes"),
        ("layers = [1, 2]", "shapes = [[1, 16], [2]]", "shapes has [2]: each shape is a pair"),
        ("block_size = 16", "n_layer = 3", "n_layer follows from the table [sweep]"),
        ("block_size = 16", "block_siz = 3", "did you mean block_size"),
        ("aspect_ratio", "aspect_rati", "did you mean aspect_ratio"),
    ],
)
def test_a_sweep_s_mistakes_are_named(workplace, old, new, message):
    Path("s.toml").write_text(SWEEP.replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)):
        sweep_runs(Path("s.toml"))


def test_a_fit_replaces_its_own_laws_and_no_other_results_laws(scaling_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("results.json", "others.json"):
        Path(name).write_text(write_table(exact_results(4, 3)))
    flags = ("--embeddings", "--resamplings=0", "--pictures=False")
    scaling_run("fit", "results.json", *flags)
    laws = Path("laws.json").read_text()
    refused = scaling_run("fit", "others.json", *flags)
    assert refused.code == 2 and "laws.json has the laws of results.json: move others.json to" in refused.message
    assert Path("laws.json").read_text() == laws
    for former in ("{}", "[]", "{"):  # an older version's, and damaged ones
        Path("laws.json").write_text(former)
        scaling_run("fit", "results.json", *flags)
        assert Path("laws.json").read_text() == laws


def test_every_law_is_fitted_to_runs_that_follow_one(scaling_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = exact_results()
    (tmp_path / "results.json").write_text(write_table(results))
    output = scaling_run("fit", "results.json", "--embeddings", "--resamplings=3", "--pictures=False")
    figures = json.loads((tmp_path / "laws.json").read_text())
    assert figures["laws"][JOINT]["constants"] == pytest.approx(LAW.constants, rel=1e-4)
    least = sorted(result.tokens for result in results)[20]
    scaling_run("fit", "results.json", "--embeddings", "--resamplings=0", "--pictures=False", f"--min_tokens={least}")
    assert json.loads((tmp_path / "laws.json").read_text())["runs"] == len(results) - 20
    (tmp_path / "laws.json").write_text(to_json(figures))
    exponent = LAW.constants["beta"] / (LAW.constants["alpha"] + LAW.constants["beta"])
    for approach in ("approach 2", "approach 3"):
        assert figures["best_size"][approach]["exponent"] == pytest.approx(exponent, rel=0.01)
    assert figures["best_size"]["approach 1"]["exponent"] == pytest.approx(exponent, rel=0.15)  # of five sizes a budget
    assert "best N by approach 2" in output and JOINT in output
    planned = scaling_run("plan", "--flops=1e20", "--law=.", "--head_width=64")
    best = optimum(LAW.constants, 1e20)
    assert f"{best.tokens_per_parameter:.3g} a parameter" in planned and "95% interval" in planned


def test_what_the_runs_cannot_determine_is_said(scaling_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = [result._replace(curve=result.curve[-1:]) for result in exact_results(2, 1)]
    (tmp_path / "results.json").write_text(write_table(results))
    output = scaling_run("fit", "results.json", "--pictures=False")
    assert f"not fitted: {JOINT}: it needs three values or more" in output
    assert "not fitted: approach 1: runs were evaluated at their ends only" in output
    assert "not fitted: approach 2: it needs the parabolas of two budgets" in output


def test_sizes_count_what_the_setting_says():
    result = FinishedRun("run", 1, 8, 1, 100, 60, 10, 1e3, 2.0, 1.0, [])
    assert (size_of(result, True), size_of(result, False)) == (100, 60)
    assert fit_laws([result] * 3, True, 0).missing.keys() >= {JOINT}


@pytest.mark.slow
def test_pictures_are_drawn(scaling_run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text(write_table(exact_results(5, 3)))
    scaling_run("fit", "results.json", "--resamplings=0")
    for name in ("compute", "isoflop", "residuals", "predicted"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (
            tmp_path / f"{name}.svg"
        ).read_text()


def test_shapes_of_one_size_are_drawn_as_a_line_of_means():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    base, shapes = exact_results(1, 1)[0], ((1, 128), (4, 64), (16, 32))
    runs = [base._replace(n_layer=n, n_embd=c, seed=s, val_loss=2 + s + n / 10) for s in (0, 1) for n, c in shapes]
    draw_shapes(axes, runs)
    assert axes.lines[0].get_xdata().tolist() == [2, 16, 128]
    assert axes.lines[0].get_ydata() == pytest.approx([4.1, 2.9, 2.6])


def test_losses_by_rate_are_drawn_as_a_line_for_each_size():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    base = exact_results(1, 1)[0]
    runs = [
        base._replace(n_embd=width, learning_rate=rate, val_loss=2 + width * np.log(rate / best) ** 2)
        for width, best in ((16, 0.01), (32, 0.003), (64, 0.5))  # the last is beyond the rates
        for rate in (0.02, 0.001, 0.005)
    ]
    draw_rates(axes, [*runs, base._replace(n_embd=8, learning_rate=0.1)])
    curves, bests = [[line for line in axes.lines if (line.get_linestyle() == ":") == dotted] for dotted in (0, 1)]
    assert [list(line.get_xdata()) for line in curves] == [[0.001, 0.005, 0.02]] * 3
    assert [line.get_xdata()[0] for line in bests] == pytest.approx([0.01, 0.003])


def test_a_loss_is_predicted_before_it_is_trained_and_compared_after(scaling_run, workplace):
    Path("large.toml").write_text(SWEEP.replace("layers = [1, 2]", "layers = [2]").replace("[64, 256]", "[25600]"))
    run = sweep_runs(Path("large.toml"))[0]
    small = [r._replace(flops=r.flops * run.flops / 1e23, tokens=r.tokens // 10**6) for r in exact_results(6, 3)]
    small = [r._replace(curve=[]) for r in small]
    Path("results.json").write_text(write_table([*small, small[0]._replace(flops=run.flops / 50, val_loss=99.0)]))
    output = scaling_run("predict", "results.json", "large.toml", "--resamplings=5")
    path = run.folder.with_name(run.name + ".prediction.json")
    prediction = json.loads(path.read_text())
    assert prediction["runs"] == len(small) and prediction["largest_share"] <= 0.01  # not the larger one
    assert str(path) in output and len(prediction["results"]) == 64
    assert "not trained yet" in scaling_run("predict", "results.json", "large.toml")
    loss = prediction["val_loss"] * 1.01
    run.folder.mkdir(parents=True)
    write(run.folder / "metrics.jsonl", [{"step": run.steps, "val_loss": loss, "tokens": 1, "seconds": 1.0}])
    assert "missed by +1.00%" in scaling_run("predict", "results.json", "large.toml")
    path.unlink()
    assert "has begun to train" in refusal("stages/scaling.py", "predict", "results.json", "large.toml")


def test_a_plan_s_config_trains_what_it_says(scaling_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = scaling_run("plan", "--accelerator=h100", "--days=1", "--price=2.5", "--output=mine.toml")
    assert f"{0.4 * 989e12 * 86_400:.4g} FLOPs: 1 days on 1 h100 at 40% of peak, 60 at 2.5 an hour" in output
    result = command("train.py", "mine.toml", "--dry_run", "--dataset=none", "--device=cpu")
    parameters = re.search(r"heads: ([\d,]+) parameters", output).group(1)
    assert f"parameters     {parameters} " in result.stdout, result.stdout + result.stderr
    tokens_per_step = re.search(r"steps of ([\d,]+);", output).group(1)
    assert f"tokens a step  {tokens_per_step} " in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "name what to do: python stages/scaling.py sweep, fit, plan"),
        (("plan",), "name a budget: either --flops, or --days"),
        (("plan", "--days=1", "--accelerator=h1"), "accelerator = h1 is not known"),
        (("plan", "--flops=1e20", "--law=nowhere"), "law = nowhere is none of hoffmann, besiroglu and kaplan"),
        (("plan", "--flops=1e20", "--law=."), "laws.json is damaged, fit again with: python"),
        (("plan", "--flops=100"), "100 FLOPs are less than a step of the smallest model"),
        (("plan", "--flops=1e40"), "parameters need more than 1,024 layers at aspect_ratio = 64"),
        (("plan", "--flops=1e20", "--aspect_ratio=1e9"), "--aspect_ratio = 1e9 must be between 0 and 10000"),
        (("plan", "--days=1", "--mfu=0"), "--mfu = 0 must be between 0 and 1"),
        (("fit", "nowhere"), "there is no nowhere"),
        (
            ("fit", "one.json", "--min_tokens=3000000000000"),
            "one.json has no results of 3,000,000,000,000 tokens or more",
        ),
        (("fit", "zero.json"), "0.tokens = 0 must be greater than 0"),
        (("claim", "--total=1e9", "--active=2e9"), "active = 2e+09 must be at most total = 1e+09"),
        (("claim", "--total=1e9", "--active=1e9", "--experts=2"), "experts_per_token must be less than experts"),
    ],
)
def test_mistakes_are_refused(stage_runner, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    Path("laws.json").write_text("{}")
    Path("one.json").write_text(write_table(exact_results(1, 1)))
    Path("zero.json").write_text(write_table([exact_results(1, 1)[0]._replace(tokens=0)]))
    refused = stage_runner(scaling, *args)
    assert refused.code == 2 and message in refused.message


def test_claims_and_comparisons(scaling_run, stage_runner):
    impossible = stage_runner(scaling, "claim", "--total=1.8e12", "--active=220e9")
    assert impossible.code == 1 and "-307B" in impossible.output and "at least 450B active" in impossible.output
    output = scaling_run("compare", str(ROOT / "configs/gpt2.toml"), str(ROOT / "configs/moe.toml"))
    assert re.search(r"active +124,439,808 +114,187,776", output)
