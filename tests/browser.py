"""A headless Chromium for the tests of pages."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium():
    """Runs the block with a browser. Skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as started:
        if path is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: install it, for instance by `playwright install chromium`")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def watched(browser, **settings):
    """Returns a page, and a list that its errors and the addresses of its requests go to."""
    page, events = browser.new_page(**settings), []
    page.on("pageerror", lambda error: events.append(str(error)))
    page.on("console", lambda message: events.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: (events.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: events.append(request.url))
    return page, events


def axe_core():
    """Returns the source of axe-core. Skips the test without it."""
    if "AXE_CORE" not in os.environ:
        pytest.skip("set AXE_CORE to the axe.min.js of npm's package axe-core")
    return Path(os.environ["AXE_CORE"]).read_text()


def violations(page):
    """Returns what axe-core finds on a page, by rule: its impact and the elements. Skips the test without axe-core."""
    page.evaluate(axe_core())
    result = page.evaluate("axe.run(document, {resultTypes: ['violations', 'passes']})")
    assert len(result["passes"]) > 15
    return {each["id"]: (each["impact"], [node["target"] for node in each["nodes"]]) for each in result["violations"]}
