"""Hooks of MkDocs: what lies beside docs/ and README links to becomes pages and files of the site."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_files(files: Any, config: Any) -> None:
    from mkdocs.structure.files import File

    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text("utf-8").replace("](docs/", "](")
        files.append(File.generated(config, "index.md" if name == "README.md" else name, content=text))
    for name in ("Dockerfile", "notebooks/quickstart.ipynb"):
        files.append(File.generated(config, name, content=(ROOT / name).read_text("utf-8")))


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../../README.md", "](../index.md")


def on_page_content(html: str, **_: Any) -> str:
    """Keeps flags in sentences and tables whole, which browsers break after a hyphen."""

    def with_whole_flags(code: re.Match[str]) -> str:
        return re.sub(r"(?<![\w-])--\w[\w-]*", r'<span class="flag">\g<0></span>', code[0])

    return re.sub(r"<code>[^<]*</code>", with_whole_flags, html)
