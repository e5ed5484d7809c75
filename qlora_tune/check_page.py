"""The report of `check` as one HTML page that needs nothing else: no scripts, no files, no network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tune.check import CheckReport
from qlora_tune.lengths import Histogram
from qlora_tune.quality import DEFECTS
from qlora_tune.shapes import NO_TASK
from qlora_tune.text_signs import printable

if TYPE_CHECKING:
    from markupsafe import Markup

_SHOWN = 50  # findings of one kind on the page; the JSON report holds more
_WIDTH, _HEIGHT, _GAP = 640, 160, 2  # of the plot [px]

# Shared with the page: what the marks of a report look like.
STYLE = """
.report table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
.report td, .report th { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: left; }
.report td { vertical-align: top; }
.report td.n, .report th.n { text-align: right; font-variant-numeric: tabular-nums; }
.report .error { color: var(--error); font-weight: 600; } .report .warning { color: var(--warning); }
.report .note { color: var(--note); } .report code { overflow-wrap: anywhere; }
.report rect { fill: var(--bar); } .report rect.cut { fill: var(--error); }
.report line { stroke: var(--error); stroke-dasharray: 4; } .report text { fill: currentColor; font-size: 11px; }
"""

_BODY = """
<p><b>{{ "{:,}".format(report.rows_in) }}</b> rows = {{ "{:,}".format(report.kept) }} kept +
{{ "{:,}".format(report.rejected) }} rejected.
{% for severity in ("error", "warning", "note") -%}
<span class="{{ severity if report.count(severity) }}">
{{- "{:,}".format(report.count(severity)) }} {{ severity }}s</span>
{% endfor %}</p>
<h2>Files</h2>
<table><tr><th>file</th><th class="n">rows</th><th class="n">kept</th><th class="n">rejected</th><th></th></tr>
{% for file in report.files %}<tr>
<td><code title="{{ file.path }}">{{ (file.path | string).rpartition("/")[2] }}</code></td>
<td class="n">{{ "{:,}".format(file.rows_in) }}</td><td class="n">{{ "{:,}".format(file.kept) }}</td>
<td class="n">{{ "{:,}".format(file.rows_in - file.kept) }}</td>
<td>{% if file.refused %}<span class="error">refused: {{ file.refused }}</span>{% endif %}
{{ file.notes | join("; ") }}</td></tr>{% endfor %}</table>
{% if report.lengths %}<h2>Length of the examples</h2>
<p>Median {{ "{:,}".format(report.lengths.median) }}, longest {{ "{:,}".format(report.lengths.longest) }}
{{ report.lengths.unit }}{% if report.lengths.limit %}; max_length is {{ report.lengths.limit }}: what is longer (red)
is left out, or cut after the last turn that fits{% endif %}.</p>
<svg viewBox="0 0 {{ width }} {{ height + 20 }}" role="img" aria-label="Histogram of lengths">
{% for bar in bars %}<rect {% if bar.cut %}class="cut" {% endif %}x="{{ bar.x }}" y="{{ bar.y }}"
width="{{ bar.width }}" height="{{ bar.height }}"><title>{{ bar.title }}</title></rect>{% endfor %}
{% if cut is not none %}<line x1="{{ cut }}" x2="{{ cut }}" y1="0" y2="{{ height }}"><title>max_length</title></line>
{% endif %}
<text x="0" y="{{ height + 14 }}">0</text>
<text x="{{ width }}" y="{{ height + 14 }}" text-anchor="end">{{ "{:,}".format(report.lengths.edges[-2]) }}
{{ report.lengths.unit }} and more</text></svg>
{% endif %}
<h2>Defects</h2>
{% if not report.counts %}<p>None found.</p>{% endif %}
{% for kind, defect in defects.items() if kind in report.counts %}
<details {% if defect.severity == "error" %}open{% endif %}><summary><span class="{{ defect.severity }}">
{{ defect.severity }}</span> <b>{{ kind }}</b>: {{ "{:,}".format(report.counts[kind]) }} rows.
{{ defect.meaning }}</summary>
<table>{% for finding in report.findings[kind][:shown] %}<tr>
<td><code title="{{ finding.file }}">{{ (finding.file | string).rpartition("/")[2] }}
{{- ":%d" % finding.line if finding.line }}</code></td>
<td>{{ finding.detail }}</td></tr>{% endfor %}</table>
{% if report.counts[kind] > shown %}<p>… and {{ report.counts[kind] - shown }} more.</p>{% endif %}
</details>{% endfor %}
{% for title, counts in (("Shapes", report.shapes), ("Tasks", report.tasks)) if counts and no_task not in counts %}
<details><summary><b>{{ title }}</b>: {{ counts | length }}</summary>
<table>{% for name, count in counts.most_common() %}<tr><td>{{ name }}</td>
<td class="n">{{ "{:,}".format(count) }}</td></tr>{% endfor %}</table></details>
{% endfor %}
{% for note in report.notes %}<p>{{ note }}</p>{% endfor %}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>qlora_tune check</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --line: #8885; --error: #c62828; --warning: #b26a00; --note: #777; --bar: #2e7d32; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
{{ style }}</style></head><body class="report"><h1>Data check</h1>{{ body }}</body></html>
"""


def write_check_page(report: CheckReport, path: Path) -> None:
    """Write the report as a page. Text from data is escaped and the page forbids scripts and loads."""
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(_PAGE).render(style=STYLE, body=render_check(report))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def render_check(report: CheckReport) -> Markup:
    """The report as HTML without the page around it; text from data is escaped."""
    from jinja2 import Environment
    from markupsafe import Markup

    lengths = report.lengths
    html = (
        Environment(autoescape=True, trim_blocks=True, finalize=lambda value: printable(str(value)))
        .from_string(_BODY)
        .render(
            report=report,
            defects=DEFECTS,
            no_task=NO_TASK if len(report.tasks) == 1 else None,
            shown=_SHOWN,
            width=_WIDTH,
            height=_HEIGHT,
            bars=_bars(lengths) if lengths else [],
            cut=_cut_line(lengths) if lengths else None,
        )
    )
    return Markup(html)


def _cut_line(lengths: Histogram) -> float | None:
    """Where max_length lies [px]; None where no bar reaches it."""
    place = (lengths.limit or math.inf) / lengths.edges[1] * _WIDTH / len(lengths.counts)
    return round(place, 1) if place < _WIDTH else None


def _bars(lengths: Histogram) -> list[dict[str, object]]:
    step, highest = _WIDTH / len(lengths.counts), max(lengths.counts)
    bars: list[dict[str, object]] = []
    for number, count in enumerate(lengths.counts):
        low, high = lengths.edges[number], lengths.edges[number + 1]
        height = _HEIGHT * count / highest
        title = f"{low:,} to {high - 1:,} {lengths.unit}: {count:,} examples"
        cut = lengths.limit is not None and low > lengths.limit
        box = {"x": round(number * step, 1), "y": round(_HEIGHT - height, 1), "width": round(step - _GAP, 1)}
        bars.append({**box, "height": round(height, 1), "title": title, "cut": cut})
    return bars
