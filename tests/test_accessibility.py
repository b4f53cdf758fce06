"""The report, the playground's page and the site, checked by axe-core: light and dark, on a desktop and on a phone."""

import subprocess
import sys

import pytest
import torch

from browser import axe_core, chromium, violations
from gpt_arc.decoding.decoder import Decoder
from gpt_arc.planning.fits import FinishedRun
from gpt_arc.reports.attention import PromptAttention
from gpt_arc.reports.charts import charts_of
from gpt_arc.reports.content import Checkpoint, Sample
from gpt_arc.reports.images import ShownImage
from gpt_arc.reports.page import page as report_page
from gpt_arc.reports.sweeps import SweepContent
from gpt_arc.serving.server import HOST, Model
from helpers import ROOT
from reported import content
from served import BYTES, CHAT, TOKEN, gpt, seeing, serving

pytestmark = pytest.mark.slow
SCREENS = [({"width": width, "height": 800}, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


def report():
    lines = [{"step": i, "tokens": 10 * i, "train_loss": 3 / i, "val_loss": 4 / i} for i in range(1, 60)]
    figures = {"classes": ["a", "b"], "confusion_matrix": [[9, 2], [3, 4]], "accuracy": 0.7}
    checkpoint = Checkpoint("step-00000060", 60, 0.0, 1000, "best")
    attention = PromptAttention(torch.ones(2, 2, 3, 3).tril() / 3, ["a", "b", "c"])
    first = content("a", lines, {"seed": 1}, samples=[Sample(1, "text")], figures=figures, attention=attention)
    second = content(
        "b", lines, {"seed": 2}, checkpoints=[checkpoint], problems=["broken"], images=[ShownImage(b"", "a")]
    )
    result = FinishedRun("x", 2, 16, 1, 900, 600, 200, 7e5, 2.0, 1.0, [])
    laws = {"laws": {"L(C)": {"constants": {"a": 1.0}, "intervals": {}, "error": 0.1}}, "best_size": {}, "missing": {}}
    sweep = SweepContent(first.summary.folder, [result], laws, {"compute": b""})
    return report_page([first, second], charts_of([first, second]), None, [sweep])


def test_a_report_has_no_barriers(tmp_path):
    (tmp_path / "report.html").write_text(report())
    with chromium() as browser:
        for size, scheme in SCREENS:
            page = browser.new_page(viewport=size, color_scheme=scheme, bypass_csp=True)
            page.goto((tmp_path / "report.html").as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
            assert violations(page) == {}
            page.close()


def test_the_site_has_no_barriers(tmp_path):
    pytest.importorskip("material")
    axe_core()  # before the site is built in vain
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--no-directory-urls", "--site-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    with chromium() as browser:
        for size, scheme in SCREENS:
            for name in ("index", "guide/scale", "results/speed"):  # tables and code of all kinds
                page = browser.new_page(viewport=size, color_scheme=scheme, bypass_csp=True)
                page.goto((tmp_path / f"{name}.html").as_uri())
                page.locator(".md-code__nav").first.wait_for(state="attached")
                assert violations(page) == {}
                page.close()


def test_the_playground_has_no_barriers():
    with serving(Model("reads", Decoder(gpt(CHAT.vocab_size)), BYTES, CHAT, 4, 500), seeing()) as playground:
        with chromium() as browser:
            for size, scheme in SCREENS:
                page = browser.new_page(viewport=size, color_scheme=scheme, bypass_csp=True)
                page.goto(f"http://{HOST}:{playground.port}/#token={TOKEN}")
                page.locator("#go:enabled").wait_for()
                page.locator("[name=max_tokens]").evaluate("input => { input.value = 5; }")
                page.get_by_label("Prompt").fill("hi")
                page.get_by_role("button", name="Generate").click()
                page.locator("#go:enabled").wait_for()
                page.get_by_role("button", name="Attention").first.click()
                page.locator(".attention").wait_for()
                page.locator(".token").last.evaluate("token => token.style.setProperty('--surprise', 70)")  # the most
                page.locator(".token").first.dispatch_event("pointerover")
                assert violations(page) == {}
                page.get_by_label("chat", exact=True).check()
                page.get_by_role("button", name="Send").click()
                page.locator("#go:enabled").wait_for()
                assert violations(page) == {}
                page.close()
