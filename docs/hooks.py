"""Hooks of MkDocs: what lies beside docs/ and README links to becomes pages and files of the site."""

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
