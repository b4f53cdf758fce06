"""The figures of docs/results/scaling.md follow from the results that are committed beside it."""

import hashlib
import re

import pytest

from gpt_arc.planning.fits import FinishedRun, best_rate, by_rate
from gpt_arc.planning.scaling_laws import CHINCHILLA, fit
from gpt_arc.reading import read_json
from helpers import ROOT

pytest.importorskip("scipy")
DOCS = ROOT / "docs/results"
TEXT = (DOCS / "scaling.md").read_text()


def law_of(results):
    sizes, tokens = [r.parameters_without_embeddings for r in results], [r.tokens for r in results]
    return fit(CHINCHILLA, {"n": sizes, "d": tokens}, [r.val_loss for r in results], resamplings=0).law


@pytest.fixture(scope="module")
def sweep():
    return read_json(DOCS / "scaling_mini.json", list[FinishedRun])


def test_the_losses_and_constants_are_those_of_the_sweep(sweep):
    for result in sweep:
        assert f"{result.n_layer}x{result.n_embd}" in TEXT and f"{result.val_loss:.3f}" in TEXT
    law = law_of([result for result in sweep if result.tokens >= 150_000])
    shown = dict(re.findall(r"^\| (E|A|B|alpha|beta) \| ([\d.e+]+) \|", TEXT, re.M))
    assert shown == {name: f"{value:.3g}" for name, value in law.constants.items()}


def test_the_losses_of_shapes_are_those_of_the_sweep():
    shapes = read_json(DOCS / "scaling_shapes.json", list[FinishedRun])
    sizes = [shape.parameters_without_embeddings for shape in shapes]
    assert max(sizes) < 1.02 * min(sizes) and len(shapes) == 4
    assert f"{min(sizes):,} to {max(sizes):,} parameters" in TEXT
    shapes = sorted(shapes, key=lambda shape: shape.n_layer)
    assert f"| val loss | {' | '.join(f'{shape.val_loss:.3f}' for shape in shapes)} |" in TEXT


def test_a_rate_tuned_at_width_64_is_right_at_512_with_base_width_only():
    best = {}
    for file, ending in (("scaling_rates", " with `base_width = 64`"), ("scaling_rates_plain", " without")):
        for run, losses in by_rate(read_json(DOCS / f"{file}.json", list[FinishedRun])):
            title = f"{run.n_embd}{ending if run.n_embd > 64 else ''}"
            best[title] = best_rate([*losses], [*losses.values()])
            (row,) = re.findall(rf"^\| {re.escape(title)} \|(.*) ([\d.]+) \|$", TEXT, re.M)
            assert re.findall(r"[\d.]+", row[0]) == [f"{loss:.3f}" for loss in losses.values()]
            assert row[1] == f"{best[title]:.2g}"
    ratio, without = best["512 with `base_width = 64`"] / best["64"], best["64"] / best["512 without"]
    assert 1 / 1.5 < ratio < 1.5 < without
    assert f"is {ratio:.2f} times that at width 64; without, it is {without:.1f} times lower" in TEXT


@pytest.mark.parametrize(("ending", "min_tokens"), [("", 0), ("_larger", 150_000)])
def test_predictions_were_made_from_the_runs_of_a_tenth_of_the_compute(sweep, ending, min_tokens):
    prediction = read_json(DOCS / f"scaling_prediction{ending}.json")
    (large,) = read_json(DOCS / f"scaling_{ending.removeprefix('_') or 'large'}.json", list[FinishedRun])
    used = [result for result in sweep if result.flops <= 0.1 * large.flops and result.tokens >= min_tokens]
    law = law_of(used)
    assert len(used) == prediction["runs"] and law.constants == pytest.approx(prediction["constants"], rel=1e-4)
    loss = float(law.loss(n=large.parameters_without_embeddings, d=large.tokens))
    assert loss == pytest.approx(prediction["val_loss"], rel=1e-6)
    low, high = prediction["interval"]
    assert f"{loss:.4f}, 95% interval {low:.4f} to {high:.4f}" in TEXT
    assert f"{large.val_loss:.4f}: missed by {large.val_loss / loss - 1:+.2%}" in TEXT
    assert prediction["date"] in TEXT and prediction["results"][:8] in TEXT
    trained_later = () if ending else ("2x32-3508", "3x48-1207", "4x64-547", "5x80-292")
    lines = [line.rstrip(",") for line in (DOCS / "scaling_mini.json").read_text().splitlines()[1:-1]]
    known = [line for line in lines if not any(f'"{name}"' in line for name in trained_later)]
    content = "[\n" + ",\n".join(known) + "\n]\n"
    assert (
        len(known) == (18 if ending else 14) and hashlib.sha256(content.encode()).hexdigest() == prediction["results"]
    )
