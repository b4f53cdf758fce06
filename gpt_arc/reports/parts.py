"""Parts of a report's page. Texts are escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from gpt_arc.tables import cell


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table whose first column names the rows."""

    def row(kind: str, cells: Sequence[Any]) -> str:
        first, *others = (escape(cell(value)) for value in cells)
        return f'<tr><th scope="{kind}">{first}</th>' + "".join(
            f'<th scope="col">{text}</th>' if kind == "col" else f"<td>{text}</td>" for text in others
        )

    body = "\n".join(row("row", cells) for cells in rows)
    return f'<div class="wide" tabindex="0"><table><thead>{row("col", header)}<tbody>\n{body}\n</table></div>'


def section(title: str, content: str) -> str:
    """Returns a section under a heading; "" without content, which is HTML."""
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def details(title: str, content: str, is_open: bool = False) -> str:
    """Returns content, which is HTML, that the title opens and closes."""
    return f"<details{' open' * is_open}><summary>{escape(title)}</summary>\n{content}\n</details>"
