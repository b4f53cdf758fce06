"""Documents: their links lead somewhere, and the files that anything names exist."""

import re
import unicodedata

import pytest

from helpers import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MENTION = re.compile(r"(?<![\w/])(?:docs|examples|configs|tasks)/(?!NAME)[\w/]+\.(?:md|png|sh|toml|py|json)\b")
SOURCES = [path for folder in ("gpt_arc", "stages", "prepare", "tools", "examples", "configs", "tasks")
           for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".toml", ".sh")]  # fmt: skip


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    kept = (re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {
        "".join(c for c in text.replace(" ", "-") if c in "-_" or unicodedata.category(c)[0] in "LN") for text in kept
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(page.read_text()):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert target.resolve().is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_the_repository_that_are_mentioned_exist(path):
    if path.name == "CHANGELOG.md":  # names what was
        return
    for name in MENTION.findall(path.read_text()):
        assert (ROOT / name).exists(), name


def test_the_lengths_of_scripts_are_those_that_the_readme_states():
    lengths = re.findall(r"`(\w+\.py)` \((\d+) lines\)", (ROOT / "README.md").read_text())
    assert len(lengths) == 3
    for name, lines in lengths:
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 10, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_column_of_a_table_has_a_head(page):
    heads = re.findall(r"^(\|.*\|)\n\|[-| :]+\|$", page.read_text(), re.MULTILINE)
    assert not [head for head in heads if re.search(r"\| *\|", head)]
