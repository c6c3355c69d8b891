"""A report as one HTML page that stands alone, without scripts and links: a table, and curves as SVG."""

from __future__ import annotations

import math
import os
from html import escape
from pathlib import Path

from metarec_fast import _plots
from metarec_fast._svg import Line, line_chart, ticks
from metarec_fast.baselines import is_baseline
from metarec_fast.cold_start import ColdStartCurve, describe
from metarec_fast.history import History
from metarec_fast.report import Report

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .45rem; text-align: right; white-space: nowrap; font-weight: normal; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #888; font-weight: 600; } thead tr.groups th { border: 0; text-align: left; }
tbody tr:nth-child(even) { background: #f5f5f5; }
.best { font-weight: 700; background: #d9f0d3; } .learner th { font-weight: 700; }
tr.chance th, tr.chance td { border-top: 1px solid #888; font-style: italic; background: #fff; }
p.caption { color: #444; font-size: .9rem; margin: .5rem 0; }
svg { width: 100%; height: auto; font-size: 13px; } svg text { fill: #1a1a1a; }
svg .grid { stroke: #e4e4e4; } svg .axis { stroke: #888; fill: none; }
"""
_GROUPS = {"errors": "errors of ratings", "query": "ranking the query set", "catalogue": "ranking the catalogue"}


def write_html(
    path: str | os.PathLike[str],
    report: Report,
    *,
    history: History | None = None,
    curve: ColdStartCurve | None = None,
    title: str = "How good for users never seen before?",
) -> None:
    """Writes one page with everything inside, to be opened in any browser or sent by mail.

    Args:
        path: The file; its folder exists.
        report: What `evaluate` gave: figures of all predictors, the best of each column marked, the chance level below.
        history: What `fit` gave, for the trials of tuning, and for the learning curve where epochs were validated.
        curve: What `cold_start_curve` gave.
        title: The heading.

    Raises:
        TypeError: An argument is something else.
    """
    for name, value, kind in (
        ("report", report, Report),
        ("history", history, History),
        ("curve", curve, ColdStartCurve),
    ):
        if not isinstance(value, kind) and (value is not None or kind is Report):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
    sections = [_table(report)]
    if curve is not None:
        sections.append(_cold_start(curve))
    if history is not None and history.best is not None:
        sections.append(_learning(history))
    if history is not None and history.trials:
        sections.append(_tuning(history))
    sections.append(_settings(report))
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *sections])
    text = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    Path(path).write_text(text, encoding="utf-8")


def _table(report: Report) -> str:
    columns = report.columns()
    groups = [_group(name) for name in columns]
    spans = "".join(f'<th colspan="{groups.count(group)}">{_GROUPS[group]}</th>' for group in dict.fromkeys(groups))
    names = "".join(f"<th>{escape(name.removeprefix('catalogue_'))}</th>" for name in columns)
    rows = []
    for label, figures in (*report.results.items(), ("chance", report.chance)):
        kind = "chance" if label not in report.results else "" if is_baseline(label) else "learner"
        cells = "".join(_cell(report.cell(label, figures, name)) for name in columns)
        rows.append(f'<tr class="{kind}"><th>{escape(label)}</th>{cells}</tr>')
    lines = "\n".join(rows)
    return f"""<div class="wide"><table>
<thead><tr class="groups"><th></th>{spans}</tr><tr><th></th>{names}</tr></thead>
<tbody>
{lines}
</tbody></table></div>
<p class="caption">{escape(report.caption())}. The best of each column is marked; errors are in rating points and
better when low, rankings when high. A dash: the scores are no ratings. Chance: what ranking at random gives.</p>"""


def _cell(text: str) -> str:
    figure = text.strip("* ")
    return f'<td class="best">{figure}</td>' if text.endswith("*") else f"<td>{figure}</td>"


def _group(metric: str) -> str:
    if metric.startswith(("catalogue", "coverage")):
        return "catalogue"
    return "query" if metric.startswith("ndcg") else "errors"


def _cold_start(curve: ColdStartCurve) -> str:
    colours, at = _plots.colours(curve.values), [math.log1p(size) for size in curve.sizes]
    lines = [
        Line(name, list(zip(at, curve.values[name], strict=True)), colours[name], thick=not is_baseline(name))
        for name in curve.by_last_value()
    ]
    if curve.chance is not None:
        lines.append(Line("chance", [(at[0], curve.chance), (at[-1], curve.chance)], "#777777", dashed=True))
    marks = [(place, str(size)) for place, size in zip(at, curve.sizes, strict=True)]
    chart = line_chart(
        lines, marks, "ratings known of a user (logarithmic)", f"{curve.metric} ({describe(curve.metric)})"
    )
    return _section("Cold start: what each further rating is worth", chart, f"Judged on {curve.caption()}.")


def _learning(history: History) -> str:
    points = [(float(epoch.number), epoch.valid) for epoch in history.epochs if epoch.valid is not None]
    last = points[-1][0]
    marks = [(place, label) for place, label in ticks(0, max(last, 1)) if place <= last and place == round(place)]
    unit = " (rating points)" if history.metric == "rmse" else ""
    chart = line_chart(
        [Line("validation", points, "#000000", thick=True)], [(place, f"{place:.0f}") for place, _ in marks],
        "epoch (0 is the start)", f"{history.metric} of validation users{unit}",
    )  # fmt: skip
    told = f"The weights of epoch {history.best_epoch}, the best at {history.best:.4f}, were kept"
    early = "; training stopped early" if history.stopped_early else ""
    return _section("Learning curve", chart, f"{told}{early}. {history.seconds:.1f} seconds.")


def _tuning(history: History) -> str:
    table = f'<div class="wide"><pre>{escape(history.trials_table())}</pre></div>'
    return _section("Tuning", table, f"{history.metric} of validation users, the best trial marked; it was kept.")


def _section(heading: str, content: str, caption: str) -> str:
    return f'<h2>{escape(heading)}</h2>\n{content}\n<p class="caption">{escape(caption)}</p>'


def _settings(report: Report) -> str:
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in report.settings.items())
    return "<h2>Settings</h2>\n<table><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
