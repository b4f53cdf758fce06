"""A report as one HTML file that needs nothing else: tables made here, curves drawn by its script.

Whatever comes from a run is escaped. The page's policy allows its own script alone, by hash, and no requests.
"""

import base64
import hashlib
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gpt_arc.attention_view import view_data, with_view
from gpt_arc.reports.charts import Chart, confusion_matrix
from gpt_arc.reports.content import RunContent, setting_text
from gpt_arc.reports.images import image_section
from gpt_arc.reports.parts import details, html_table, section
from gpt_arc.reports.sweeps import SweepContent, sweep_section
from gpt_arc.tables import cell, duration, human, to_json

TEMPLATE = Path(__file__).with_name("report.html")
NOT_COMPARED = {"out_dir", "overwrite", "resume"}  # settings that say nothing about what is trained
SHOWN_CLASSES = 50  # of a confusion matrix


def page(
    runs: Sequence[RunContent],
    charts: Sequence[Chart],
    refresh: int | None = None,
    sweeps: Sequence[SweepContent] = (),
) -> str:
    """Returns the HTML of a report; with `refresh`, it reloads itself after that many seconds."""
    template = with_view(TEMPLATE.read_text(encoding="utf-8"))
    script = template.partition("<script>")[2].partition("</script>")[0]
    views = [{"run": i, **view_data(*run.attention)} for i, run in enumerate(runs) if run.attention]
    data = {"runs": [run.name for run in runs], "charts": charts_data(charts), "attention": views, "refresh": refresh}
    sections = [summary_table(runs), '<section id="charts"></section>'] if runs else []
    sections += [*map(figures_of, runs), *map(sweep_section, sweeps)]
    sections += [
        section(f"{runs[i].name}: attention", f'<div id="attention-{i}"></div>')
        for i in (view["run"] for view in views)
    ]
    sections += [image_section(run.name, run.images) for run in runs]
    sections += [samples(runs), configuration(runs) if runs else "", data_table(runs), checkpoint_table(runs)]
    sections.append(problems(runs))
    names = [each.name for each in (*runs, *sweeps)]
    title = " and ".join(names) if len(names) < 4 else f"{len(names)} runs"
    parts = {
        "policy": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": escape(title),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "data": to_json(data).replace("<", "\\u003c"),
        "content": "\n".join(filter(None, sections)),
    }
    for name, text in parts.items():
        head, mark, tail = template.partition(f"<!--{name}-->")
        assert mark, name
        parts[name] = head + text
        template = tail
    return "".join(parts.values()) + template


def charts_data(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Returns what the page's script draws."""
    return [
        {
            "title": chart.title,
            "curves": [
                {
                    "run": curve.run,
                    "metric": curve.metric,
                    "noisy": curve.is_noisy,
                    "values": curve.values,
                    "axes": curve.axes,
                }
                for curve in chart.curves
            ],
        }
        for chart in charts
    ]


def summary_table(runs: Sequence[RunContent]) -> str:
    """One column for each run."""
    facts: dict[str, list[str]] = {}
    for run in runs:
        about, best = run.summary, run.best
        tokens, rate, mfu = run.last("tokens"), run.last("tokens_per_second"), run.last("mfu")
        seconds = run.last("seconds")
        for name, value in {
            "state": run.state,
            "stage": about.stage,
            "from": about.origin,
            "parameters": run.parameters or "",
            "steps": f"{about.step:,}" + (f" of {about.steps:,}" if about.steps is not None else ""),
            "lowest val loss": f"{best[0]:.4f} at step {best[1]:,}" if best else "",
            "last train loss": cell(run.last("train_loss")),
            "tokens": human(tokens) if tokens is not None else "",
            "time": duration(seconds) if seconds is not None else "",
            "tokens a second": f"{rate:,.0f}" if rate is not None else "",
            "MFU": f"{100 * mfu:.1f}%" if mfu is not None else "",
            "skipped updates": cell(run.last("skipped")),
            "size": human(about.size, "B"),
        }.items():
            facts.setdefault(name, []).append(value)
    return section(
        "Summary", html_table(["run", *(run.name for run in runs)], ([n, *v] for n, v in facts.items() if any(v)))
    )


def figures_of(run: RunContent) -> str:
    """What a stage measured at its end: report.json, with its confusion matrix as a table."""
    figures = {name: value for name, value in run.figures.items() if name not in ("confusion_matrix", "epochs")}
    if not run.figures:
        return ""
    parts = [html_table(["figure", "value"], ([name, setting_text(value)] for name, value in flat(figures)))]
    matrix = confusion_matrix(run)
    if matrix and len(matrix[0]) <= SHOWN_CLASSES:
        classes, counts = matrix
        rows = []
        for name, row in zip(classes, counts):
            total = sum(row) or 1
            cells = "".join(f'<td style="--share:{100 * n // total}%">{n:,}</td>' for n in row)
            rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}')
        header = "".join(f'<th scope="col">{escape(name)}</th>' for name in classes)
        head = f'<thead><tr><th scope="col">actual \\ predicted</th>{header}'
        body = "\n".join(rows)
        parts.append(f'<div class="wide" tabindex="0"><table class="matrix">{head}<tbody>\n{body}\n</table></div>')
    return section(f"{run.name}: report.json", "\n".join(parts))


def flat(figures: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields figures by name; those of a table have its name before theirs."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from ((f"{name} {inner}", figure) for inner, figure in flat(value))
        else:
            yield name, value


def samples(runs: Sequence[RunContent]) -> str:
    """The texts that a model wrote while it was trained, the latest first and open."""
    parts = []
    for run in runs:
        for number, sample in enumerate(reversed(run.samples)):
            title = f"{run.name}, step {sample.step:,}" if len(runs) > 1 else f"step {sample.step:,}"
            parts.append(details(title, f"<pre>{escape(sample.text)}</pre>", not number))
    return section("Samples", "\n".join(parts))


def configuration(runs: Sequence[RunContent]) -> str:
    """The settings that differ among the runs, then all."""
    names = list(dict.fromkeys(name for run in runs for name in run.summary.settings))
    rows = [[name, *(setting_text(run.summary.settings.get(name)) for run in runs)] for name in names]
    different = [row for row in rows if len(set(row[1:])) > 1 and row[0] not in NOT_COMPARED]
    header = ["setting", *(run.name for run in runs)]
    parts = [html_table(header, different) if different else "<p>No setting differs.</p>"] if len(runs) > 1 else []
    parts.append(details("all settings", html_table(header, rows)))
    return section("Settings that differ" if len(runs) > 1 else "Settings", "\n".join(parts))


def data_table(runs: Sequence[RunContent]) -> str:
    rows = [[run.name, name, tokens, run.summary.hardware or ""] for run in runs for name, tokens in run.data.items()]
    return section("Data and hardware", html_table(["run", "data", "tokens", "hardware"], rows) if rows else "")


def checkpoint_table(runs: Sequence[RunContent]) -> str:
    rows = [
        [
            f"{run.summary.folder}/{each.name}",
            f"{each.step:,}" if each.step is not None else "",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(each.written)),
            human(each.size, "B"),
            each.links,
        ]
        for run in runs
        for each in run.checkpoints
    ]
    return section("Checkpoints", html_table(["checkpoint", "step", "written", "size", "named"], rows) if rows else "")


def problems(runs: Sequence[RunContent]) -> str:
    items = [f"<li>{escape(problem)}" for run in runs for problem in run.problems]
    return section("What isn't shown", f"<ul>{''.join(items)}</ul>" if items else "")
