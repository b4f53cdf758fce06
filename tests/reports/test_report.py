"""tools/report.py: the page, the pictures, and what they say about runs of every state."""

import base64
import hashlib
import io
import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import train
from browser import chromium, watched
from gpt_arc.errors import entry_point
from gpt_arc.nn.attention_maps import attention_maps
from gpt_arc.planning.fits import FinishedRun
from gpt_arc.reports.attention import PromptAttention, draw_attention_maps
from gpt_arc.reports.charts import charts_of, confusion_matrix, curve_of, draw_all, smoothed, thinned
from gpt_arc.reports.content import Sample, read_run, read_samples
from gpt_arc.reports.page import page
from gpt_arc.training import runs
from gpt_arc.training.log import read_metrics
from gpt_arc.training.sweeps import write_table
from gpt_arc.weights.directory import load_text_model
from helpers import TINY_FLAGS, write
from reported import content
from tools import report as tool

main = entry_point(tool.main)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \" ' <!--content--> ${x}"
NAME = HOSTILE.replace("/", "")


class Parsed(HTMLParser):
    """The tags, the attributes' names and the text of a page; the text of scripts is apart."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.text = [], set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and self.scripts and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture
def begin(workplace, stage_runner):
    """Trains a tiny run in a folder."""

    def call(folder, *flags):
        assert "finished step" in stage_runner(train, "sums.toml", *TINY_FLAGS, f"--out_dir={folder}", *flags)

    return call


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr("gpt_arc.reports.charts.draw_all", lambda *arguments: [])


def test_a_report_has_the_run_s_metrics_samples_settings_and_checkpoints(begin, output_of, without_pictures):
    begin("out/a", "--sample_interval=4", "--log_interval=2", "--sample_start=1 times")
    output = output_of(main, "report.py", "a")
    assert output == "wrote out/a/report/report.html\n"
    parsed = Parsed(Path("out/a/report/report.html").read_text())
    curves = {curve["metric"]: curve for chart in parsed.data["charts"] for curve in chart["curves"]}
    lines = read_metrics(Path("out/a/metrics.jsonl"))
    for metric in ("train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu"):
        recorded = [line for line in lines if metric in line]
        assert curves[metric]["values"] == [line[metric] for line in recorded]
        for axis in ("step", "tokens", "seconds"):
            assert curves[metric]["axes"][axis] == [line[axis] for line in recorded]
    lowest = min(line["val_loss"] for line in lines if "val_loss" in line)
    expected = [f"{lowest:.4f} at step", "8 of 8", "finished", "n_layer", "tokens in train", "step-00000008", "last"]
    expected += [
        runs.summary(Path("out/a")).hardware,
        *(sample.text for sample in read_samples(Path("out/a/samples.txt"))),
    ]
    assert all(text in parsed.text for text in expected)
    assert parsed.data["refresh"] is None
    runs.clear(Path("out/a"))
    assert [path.name for path in Path("out/a").iterdir()] == []


def test_pictures_show_curves_and_confusion_matrices(tmp_path):
    lines = [{"step": i, "train_loss": 3 / i, "val_loss": 4.0} for i in range(1, 30)]
    figures = {"classes": ["a$", "$b"], "confusion_matrix": [[1, 2], [3, 4]]}
    attention = PromptAttention(torch.rand(2, 3, 4, 4).tril(), ["$"] * 4)
    pair = [content("$a", lines, figures=figures, attention=attention), content("b$", lines[:1])]
    written = draw_all(pair, charts_of(pair), tmp_path)
    assert [path.name for path in written] == ["loss.png", "confusion_matrix_1.png", "attention_1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_attention_in_a_prompt_is_that_of_the_best_checkpoint(begin, output_of, without_pictures):
    begin("out/a")
    begin("out/b", "--max_iters=4")
    output_of(main, "report.py", "a", "b", "--attention=1 times 12", "--output=both")
    views = Parsed(Path("both/report.html").read_text()).data["attention"]
    for number, (name, view) in enumerate(zip("ab", views, strict=True)):
        model, tokenizer = load_text_model(Path("out") / name)
        maps = attention_maps(model.eval(), tokenizer.encode("1 times 12"))
        levels = np.frombuffer(base64.b64decode(view["weights"]), np.uint8).reshape(maps.shape) / 255
        assert view["run"] == number and view["tokens"] == list("1 times 12")
        np.testing.assert_allclose(levels, maps, atol=0.5 / 255 + 1e-6)
    output_of(main, "report.py", "a", "--attention=é")
    parsed = Parsed(Path("out/a/report/report.html").read_text())
    assert parsed.data["attention"] == [] and "é" in parsed.text.partition("What isn't shown")[2]


def test_a_picture_of_attention_has_a_tile_for_each_head():
    maps = torch.rand(2, 3, 4, 4).tril()
    axes = Figure().subplots()
    draw_attention_maps(axes, maps)
    (picture,) = [np.ma.filled(image.get_array(), np.nan) for image in axes.get_images()]
    below = np.tril(np.ones((4, 4), bool))
    for layer in range(2):
        for head in range(3):
            tile = picture[5 * layer :, 5 * head :][:4, :4]
            np.testing.assert_allclose(tile[below], maps[layer, head].sqrt().numpy()[below], rtol=1e-6)
            assert np.isnan(tile[~below]).all()


def test_a_sweep_shows_its_results_laws_and_pictures(workplace, output_of, without_pictures):
    losses = {"worse": 3.0, "better": 2.5}
    results = [FinishedRun(name, 2, 16, 1, 900, 600, 200, 7e5, loss, 1.0, []) for name, loss in losses.items()]
    Path("out/sizes").mkdir(parents=True)
    Path("out/sizes/results.json").write_text(write_table(results))
    assert output_of(main, "report.py", "sizes") == "wrote out/sizes/report/report.html\n"
    text = Parsed(Path("out/sizes/report/report.html").read_text()).text
    assert "Fit laws with: python stages/scaling.py fit out/sizes" in text and "Summary" not in text
    assert text.index("2.5000") < text.index("worse") < text.index("3.0000")
    laws = {"L(C)": {"constants": {"alpha": 0.05}, "intervals": {"alpha": [0.04, 0.06]}, "error": 0.01, "draws": []}}
    figures = {"embeddings": False, "runs": 2, "laws": laws, "best_size": {"isoFLOP": {"factor": 2.0, "exponent": 0.5}}}
    write("out/sizes/laws.json", [figures | {"parabolas": [], "missing": {"L(N)": "too few runs"}}])
    Figure().savefig("out/sizes/compute.png")
    output_of(main, "report.py", "out/sizes")
    page = Path("out/sizes/report/report.html").read_text()
    assert base64.b64encode(Path("out/sizes/compute.png").read_bytes()).decode() in page
    assert all(shown in page for shown in ("0.04 to 0.06", "1.00%", "2 C^0.500", "not fitted: L(N): too few runs"))
    Path("out/sizes/laws.json").write_text("{")
    assert "out/sizes/laws.json is damaged" in output_of(main, "report.py", "sizes")


def test_a_run_on_images_shows_the_first_ones_beside_their_rows(tmp_path):
    (tmp_path / "run").mkdir()
    rows = [{"image": f"{i}.png", "prompt": f"{i} <b>?", "response": "red"} for i in range(20)]
    rows[1] = {"images": ["0.png", "2.png"], "prompt": "alike?"}
    for i in range(20):
        Image.new("RGB", (600, 300), (i, 0, 0)).save(tmp_path / f"{i}.png")
    write(tmp_path / "images.jsonl", rows)
    options = {"model": "m", "train": str(tmp_path / "images.jsonl"), "image_encoder": "clip"}
    record = {"stage": "sft", "config": "sft", "overrides": {}, "options": options}
    write(tmp_path / "run/run.json", [record])
    run = read_run(tmp_path / "run")
    decoded = [Image.open(io.BytesIO(image.png)) for image in run.images]
    assert [image.getpixel((5, 5))[0] for image in decoded] == [0, 0, 2, *range(2, 12)]
    assert {image.size for image in decoded} == {(224, 112)}
    text = page([run], [])
    assert text.count("data:image/png") == 13 and "0 &lt;b&gt;?" in text and "<b>" not in text
    (tmp_path / "3.png").write_text("no image")
    run = read_run(tmp_path / "run")
    assert run.images == [] and any("3.png is not a PNG" in problem for problem in run.problems)
    write(tmp_path / "run/run.json", [record | {"options": options | {"image_encoder": None}}])
    assert read_run(tmp_path / "run").images == []  # the run reads text alone


def test_two_runs_are_compared_by_the_settings_that_differ(begin, output_of, without_pictures):
    begin("out/a")
    begin("elsewhere/b", "--seed=7", "--max_iters=4")
    output_of(main, "report.py", "a", "elsewhere/b", "a", "--output=both")
    text = Path("both/report.html").read_text()
    different = text.partition("<h2>Settings that differ</h2>")[2].partition("<details>")[0]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', different)
    assert rows == [("max_iters", "8", "4"), ("seed", "1337", "7")]
    assert Parsed(text).data["runs"] == ["a", "b"]


def test_text_of_runs_is_shown_as_text():
    run = content(
        NAME, [{"step": 1, "train_loss": 1.0, HOSTILE: 2.0}], {HOSTILE: HOSTILE}, data={HOSTILE: HOSTILE},
        samples=[Sample(3, HOSTILE)], problems=[HOSTILE],
        figures={"classes": [HOSTILE, "b"], "confusion_matrix": [[1, 2], [3, 4]], HOSTILE: {HOSTILE: HOSTILE}},
    )  # fmt: skip
    plain = content(
        "plain", [{"step": 1, "train_loss": 1.0, "x": 2.0}], {"a": "b"}, data={"a": "b"}, samples=[Sample(3, "c")],
        problems=["d"], figures={"classes": ["a", "b"], "confusion_matrix": [[1, 2], [3, 4]], "e": {"f": "g"}},
    )  # fmt: skip
    hostile, expected = (Parsed(page([each], charts_of([each]))) for each in (run, plain))
    assert hostile.tags == expected.tags and hostile.attributes == expected.attributes
    assert hostile.text.count(HOSTILE) >= 8
    assert hostile.data["runs"] == [NAME] and HOSTILE in {chart["title"] for chart in hostile.data["charts"]}


def test_the_page_allows_its_own_script_alone():
    text = page([content()], [])
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert f'content="{policy}"' in text
    assert set(re.findall(r"https?:[^\"]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, which nothing fetches


def test_damaged_and_half_written_files_leave_the_rest(begin, output_of, without_pictures):
    begin("out/a", "--max_iters=3")
    lines = ['{"step": 1, "train_loss": 3.0, "val_loss": "low"}', "[1]", '{"step": 2, "train_loss": NaN}', "\xff"]
    lines += ['{"step": 3, "train_loss": 1e400, "grad_norm": ' + "9" * 400 + "}", '{"step": true, "train_loss": 9}']
    lines += ['{"step": 4, "train_loss": 2.0, "seconds": {}}', '{"step": 5, "train_lo']
    Path("out/a/metrics.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    Path("out/a/samples.txt").write_bytes(b"--- step 4\n\xff\xfe\n\n--- step 5\nhalf")
    Path("out/a/report.json").write_text("{")
    output_of(main, "report.py", "a")
    parsed = Parsed(Path("out/a/report/report.html").read_text())
    (curve,) = [curve for chart in parsed.data["charts"] for curve in chart["curves"]]
    assert curve["values"] == [3.0, 2.0] and curve["axes"] == {"step": [1, 4]}
    assert "out/a/report.json is damaged" in parsed.text and "half" in parsed.text


def test_a_run_that_has_just_begun_has_a_report(begin, output_of, without_pictures):
    begin("out/a", "--max_iters=3")
    folder = Path("out/a")
    for name in ("metrics.jsonl", "last", "best"):
        (folder / name).unlink()
    next(folder.glob("step-*")).rename("elsewhere")
    assert read_run(folder).best is None
    output_of(main, "report.py", "a")
    parsed = Parsed((folder / "report/report.html").read_text())
    assert parsed.data["charts"] == [] and "stopped" in parsed.text


def test_watching_ends_with_the_run(begin, output_of, monkeypatch, without_pictures):
    begin("out/a", "--max_iters=3")
    lock, slept, pages = [runs.Lock(Path("out/a"))], [], []

    def sleep(seconds):
        if seconds < 1:  # filelock's
            return
        slept.append(seconds)
        pages.append(Parsed(Path("out/a/report/report.html").read_text()))
        if len(slept) == 2:
            lock.clear()

    monkeypatch.setattr(tool.time, "sleep", sleep)
    output = output_of(main, "report.py", "a", "--watch", "--interval=3")
    assert slept == [3, 3] and output.count("wrote ") == 3
    assert all("running" in each.text and each.data["refresh"] == 3 for each in pages)
    last = Parsed(Path("out/a/report/report.html").read_text())
    assert "finished" in last.text and last.data["refresh"] is None


def test_without_matplotlib_the_page_alone_is_written(begin, output_of, monkeypatch):
    begin("out/a", "--max_iters=3")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert output_of(main, "report.py", "a") == "wrote out/a/report/report.html\n"


def test_a_name_that_is_no_run_is_refused(begin, output_of):
    begin("out/a", "--max_iters=3")
    assert "there is no run b; the runs under out/ are: a" in output_of(main, "report.py", "b")
    assert "runs" in output_of(main, "report.py")


def test_a_curve_continues_the_axes_of_lines_before_it():
    lines = [{"step": 1, "tokens": 10, "train_loss": 3.0}, {"step": 1, "val_loss": 4.0}, {"step": 2, "val_loss": 2.0}]
    assert curve_of(0, lines, "val_loss").axes == {"step": [1, 2], "tokens": [10, 10]}
    assert curve_of(0, lines[1:], "val_loss").axes == {"step": [1, 2]}


def test_related_metrics_share_a_chart_and_unknown_ones_have_their_own():
    run = content(metrics=[{"step": 1, "score": 1.0, "reward": 0.5, "kl_k1": 0.1, "expert_cv": 0.2, "new": 7.0}])
    charts = {chart.name: [curve.metric for curve in chart.curves] for chart in charts_of([run, content("b")])}
    assert charts == {"reward": ["score", "reward"], "kl": ["kl_k1"], "experts": ["expert_cv"], "new": ["new"]}


def test_thinning_keeps_ends_and_extremes():
    values = [random.Random(1).random() for _ in range(5003)]
    values[1234], values[4321] = 7.0, -7.0
    points = thinned([(value, i) for i, value in enumerate(values)])
    assert len(points) <= 2000 and {0, 1234, 4321, 5002} <= {i for _, i in points}
    assert points == sorted(points, key=lambda point: point[1]) and all(values[i] == value for value, i in points)


def test_smoothing_is_a_weighted_mean_of_the_past():
    values = np.random.default_rng(0).normal(size=200)
    weight = 1 - 1 / (0.05 * len(values))
    for i, actual in enumerate(smoothed(list(values), 0.05)):
        weights = weight ** np.arange(i, -1, -1)
        assert math.isclose(actual, weights @ values[: i + 1] / weights.sum(), rel_tol=1e-9)
    assert smoothed([1.0, 2.0], 0.05) == [1.0, 2.0]


@pytest.mark.parametrize("matrix", [None, [[1, 2]], [[1, 2], [3]], [[1, 2], [3, "4"]], [[1, 2], [3, -4]], "ab"])
def test_a_matrix_that_isn_t_one_is_left_out(matrix):
    run = content(figures={"classes": ["a", "b"], "confusion_matrix": matrix})
    assert confusion_matrix(run) is None and 'class="matrix"' not in page([run], [])


@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_a_browser_draws_the_curves_and_runs_nothing_of_the_runs(width, scheme, tmp_path):
    lines = [{"step": i, "tokens": 10 * i, "train_loss": 3 / i, HOSTILE: 1.0} for i in range(1, 60)]
    lines += [{"step": 60, "val_loss": 1.0}]
    attention = PromptAttention(torch.ones(2, 2, 3, 3).tril() / 3, ["a", HOSTILE, "b"])
    hostile = content(NAME, lines, {"a": HOSTILE}, samples=[Sample(1, HOSTILE * 20)], attention=attention)
    pair = [hostile, content("b", lines[:30])]
    path = tmp_path / "report.html"
    path.write_text(page(pair, charts_of(pair)))
    with chromium() as browser:
        shown, events = watched(browser, viewport={"width": width, "height": 800}, color_scheme=scheme)
        shown.goto(path.as_uri())
        drawn = shown.locator("polyline").count()
        assert drawn >= 5 and shown.locator("figure").count() == 2
        first = shown.locator("polyline").first.get_attribute("points")
        for label in ("tokens", "log x", "log y"):
            shown.get_by_label(label).check()
        assert shown.locator("polyline").first.get_attribute("points") != first
        shown.get_by_role("button", name="layer 2, head 1").click()
        assert "attends to" in shown.locator(".seen").inner_text() and HOSTILE in shown.locator(".words").inner_text()
        shown.locator("svg").first.hover()
        assert " at " in shown.locator(".keys").first.inner_text()
        shown.reload()
        assert shown.get_by_label("log x").is_checked()
        assert not shown.evaluate("document.documentElement.scrollWidth > innerWidth")
        assert set(events) == {path.as_uri()}


def test_values_that_are_no_numbers_are_dropped_from_metrics(tmp_path):
    write(tmp_path / "metrics.jsonl", [{"step": 1, "train_loss": "x", "val_loss": 2, "mfu": None, "tokens": True}])
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "val_loss": 2}]
