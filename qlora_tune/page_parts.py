"""What the page shows, as HTML: tokens, conversations, the card beside Start, plots, tables. No scripts, no loads.

Every text from data, names or models is escaped by the templates. The result has no line breaks of its own, so that
a Markdown component takes it as one block and leaves it alone. Plots are SVG made here, because the plot components
of page libraries evaluate code in the browser, which the page's Content-Security-Policy forbids.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment
from markupsafe import Markup, escape

from qlora_tune.check import CheckReport
from qlora_tune.check_page import STYLE as REPORT_STYLE
from qlora_tune.check_page import render_check
from qlora_tune.comparison import HEADLINE, Answered, Comparison, TaskScore, write_change
from qlora_tune.config import TrainConfig, describe_value
from qlora_tune.disk import describe, is_full
from qlora_tune.errors import ConfigError, TuneError
from qlora_tune.plan import Plan
from qlora_tune.preview import RowView
from qlora_tune.runs import Run
from qlora_tune.scores import METRICS, is_exact_match, write_value
from qlora_tune.text_signs import printable
from qlora_tune.turns import Message

WELCOME = """Look at the data first. The built-in example leads through everything in three clicks and three minutes.
Your own rows of instruction and response: .jsonl, .json, .csv, .tsv, .parquet, a folder, or a hub dataset's id."""
STOP_WORDS = """Save and stop: finishes the step, writes a checkpoint and ends. Resume goes on to the same result.
Discard the run: ends it at once and deletes its folder, checkpoints and all. This can't be undone."""
PATH_HINT = "Type a path and press Enter, or upload"
POINTS = 400  # of one curve
WIDTH, HEIGHT, LEFT, BOTTOM = 620, 240, 62, 34  # of a plot, and its margins [px]
COLOURS = 6

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8") + REPORT_STYLE

_TEMPLATES = {
    "row": """<h3>{{ view.source }} <span class="soft">{{ view.shape }}</span></h3>
{% if not view.sequences %}<p class="bad">Not trained on:</p>{% endif %}
{% for problem in view.problems %}<p class="warning">{{ problem }}</p>{% endfor %}
{% for tokens in view.sequences %}<p>{{ tokens | length }} tokens, {{ tokens | selectattr("learned") | list | length }}
learned (coloured); control tokens bold.</p><pre class="tokens" tabindex="0">
{%- for token in tokens %}<span class="{{ "l" if token.learned }}{{ " c" if token.control }}">
{{- token.text | shown }}</span>{% endfor %}</pre>{% endfor %}
{% for example in view.examples %}<h3>As a conversation{{ " (task: %s)" % example.task if example.task }}</h3>
{{ conversation(example.messages) }}{% endfor %}
<details><summary>As it stands in the file</summary><pre tabindex="0">{{ raw }}</pre></details>""",
    "conversation": """{% if not messages %}<p class="soft">{{ empty }}</p>{% endif %}
{% for turn in messages %}<div class="turn {{ turn.role }}"><b>{{ names.get(turn.role, turn.role) }}
{{- " (not learned)" if turn.learn is defined and not turn.learn }}</b>{{ turn.content | shown }}
{%- for call in turn.tool_calls or () %}
{{ call.name }}({{ call.arguments }}){% endfor %}</div>{% endfor %}""",
    "card": """{% if plan.problems %}<p class="bad" role="alert">Not ready</p>
{% for problem in plan.problems %}<p>{{ problem }}</p>{% endfor %}
{% else %}<p class="good" role="status">Ready</p>{% endif %}
<table>{% for name, value in plan.facts %}<tr><th scope="row" class="key">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>{% if plan.memory %}<p>Memory at most about {{ plan.memory.peak_bytes | gb }} of
{{ plan.device.memory_bytes | gb }} on {{ plan.device.name }}</p>
<div class="meter {{ "over" if plan.memory_share > 1 }}" role="img"
aria-label="{{ "%.0f" % (100 * plan.memory_share) }} % of memory">
<div style="width: {{ [100 * plan.memory_share, 100] | min }}%"></div></div>
<details><summary>by part</summary><table>{% for part, size in plan.memory.parts.items() %}
<tr><td>{{ part }}</td><td class="n">{{ size | gb }}</td></tr>{% endfor %}</table></details>{% endif %}
{% for warning in plan.warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
{% if plan.changes %}<details><summary>what preset {{ plan.preset }} changes ({{ plan.changes | length }})</summary>
<table>{% for name, value in plan.changes.items() %}<tr><td>{{ name }}</td><td class="n">{{ value }}</td></tr>
{% endfor %}</table></details>{% endif %}""",
    "run": """<p><b>{{ run.name }}</b>: {{ words }}</p>
{% if state.reason %}<p class="bad">{{ state.reason }}</p>{% endif %}
{% if last %}<div class="figures">{% for name, value in figures %}<div><span class="soft">{{ name }}</span>
<b>{{ value }}</b></div>{% endfor %}</div>
<div class="meter" role="progressbar" aria-valuenow="{{ last.step }}" aria-valuemin="0"
aria-valuemax="{{ last.total_steps }}" aria-label="steps"><div style="width: {{ 100 * last.step / last.total_steps }}%">
</div></div>{% endif %}<div class="plots">{{ plots }}</div>""",
    "plot": """<figure><figcaption class="legend"><b>{{ title }}</b>&nbsp; {% for curve in curves %}<span><i
class="s{{ loop.index0 % colours }}"></i>{{ curve.name }}</span>{% endfor %}</figcaption>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img"
aria-label="{{ title }}: {{ curves | map(attribute="name") | join(", ") }}">
{% for y, label in y_ticks %}<line class="grid" x1="{{ left }}" x2="{{ width }}" y1="{{ y }}" y2="{{ y }}" />
<text x="{{ left - 6 }}" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>{% endfor %}
{% for x, label in x_ticks %}<text x="{{ x }}" y="{{ height - 18 }}" text-anchor="middle">{{ label }}</text>{% endfor %}
<text x="{{ width }}" y="{{ height - 2 }}" text-anchor="end">step</text>
{% for line, dots, name in drawn %}<polyline class="curve s{{ loop.index0 % colours }}" points="{{ line }}"><title>
{{- name }}</title></polyline>{% for x, y, text in dots %}<circle cx="{{ x }}" cy="{{ y }}" r="3"
style="fill: var(--c{{ number[name] }})"><title>{{ text }}</title></circle>{% endfor %}{% endfor %}
</svg></figure>""",
    "table": """{% if title %}<h3>{{ title }}</h3>{% endif %}<div class="wide" tabindex="0" role="region"
aria-label="{{ title or heads[0] }}"><table><tr>{% for head in heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>""",
    "answers": """{% for answer in answers %}<h3>{{ answer.source }} <span class="soft">{{ answer.task }}</span>
{% if right(answer) %}<span class="good">✓ exact</span>{% else %}<span class="bad">✗ differs</span>{% endif %}</h3>
{{ conversation(answer.prompt) }}<table>{% for name, text in (("expected", answer.reference), ("base", answer.base),
("tuned", answer.tuned)) %}<tr><th scope="row" class="key">{{ name }}</th><td>{{ text | shown }}</td></tr>{% endfor %}
</table>{% endfor %}""",
    "log": """<pre tabindex="0">{{ text | shown }}</pre>""",
    "say": """{% for line in lines %}<p class="{{ kind }}" {% if kind == "bad" %}role="alert"{% endif %}>{{ line }}</p>
{% endfor %}""",
}


@dataclass(frozen=True)
class Curve:
    """One line of a plot: points of step and value; few of them are drawn as dots too."""

    name: str
    points: Sequence[tuple[float, float]]


def show_message(text: str, kind: str = "") -> str:
    """Plain words, a paragraph a line; kind is "bad" for problems, "good", "soft" or nothing."""
    return _render("say", lines=text.splitlines(), kind=kind)


def show_problem(error: Exception) -> str:
    """A problem in words; what nobody foresaw is printed in full where the page was started, too."""
    if isinstance(error, TuneError):
        return show_message(str(error), "bad")
    if isinstance(error, OSError) or is_full(error):
        return show_message(describe(error), "bad")
    traceback.print_exception(error)
    return show_message(f"This failed, and should not have: {type(error).__name__}: {error}", "bad")


def show_check(report: CheckReport) -> str:
    """The report on data files."""
    return _block(Markup('<div class="part report">{}</div>').format(render_check(report)))


def show_row(view: RowView) -> str:
    """One row: its tokens, the learned ones coloured, its conversation, and as it stood."""
    raw = json.dumps(view.raw, indent=1, ensure_ascii=False, default=str) if view.raw is not None else ""
    return _render("row", view=view, raw=raw if not isinstance(view.raw, str) else view.raw)


def show_conversation(messages: Sequence[Message], assistant: str = "assistant") -> str:
    """The turns of a conversation as plain text; `assistant` says who answers."""
    empty = f"What {assistant} answers appears here."
    return _render("conversation", messages=messages, names={"assistant": assistant}, empty=empty)


def show_sides(sides: Sequence[Sequence[Message]], voices: Sequence[str]) -> list[str]:
    """Conversations side by side, one for each voice."""
    return [show_conversation(turns, who) for turns, who in zip(sides, voices, strict=True)]


def show_card(plan: Plan) -> str:
    """The card beside Start."""
    return _render("card", plan=plan)


def show_run(run: Run) -> str:
    """A run's state in words, its figures, and its curves so far."""
    state, metrics = run.read_state(), run.read_metrics()
    steps = [entry for entry in metrics if "loss" in entry and entry.get("total_steps")]
    last = steps[-1] if steps else None
    figures = _figures(last, metrics, state) if last else []
    plots = show_losses([run]) + _plot("learning rate", [_curve("learning rate", metrics, "learning_rate")])
    words = _state_words(run, state)
    return _render("run", run=run, state=state, words=words, last=last, figures=figures, plots=Markup(plots))


def show_log(text: str) -> str:
    """The end of a log as it is."""
    return _render("log", text=text)


def show_brief(run: Run) -> str:
    """In a line, how far a run is: for the card beside Start."""
    steps = [entry for entry in run.read_metrics() if "loss" in entry and entry.get("total_steps")]
    far = f", step {steps[-1]['step']} of {steps[-1]['total_steps']}" if steps else ""
    return show_message(f"{run.name}: {_state_words(run, run.read_state())}{far}", "good")


def show_losses(runs: Sequence[Run]) -> str:
    """The loss curves of runs over each other, training and held-out."""
    curves = []
    for run in runs:
        front = f"{run.name}: " if len(runs) > 1 else ""
        metrics = run.read_metrics()
        curves += [_curve(f"{front}training", metrics, "loss"), _curve(f"{front}held-out", metrics, "eval_loss")]
    return _plot("loss", curves)


def show_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> str:
    """A table of plain cells."""
    return _render("table", heads=heads, rows=rows, title=title)


def show_runs(runs: Sequence[Run]) -> str:
    """All runs with state, preset, data and scores."""
    rows = []
    for run in runs:
        state = run.read_state()
        score, loss = state.get("score_tuned"), state.get("eval_loss")
        try:
            config = run.read_config()
            files = config.preference_data or config.data
            data = ", ".join(file.rpartition("/")[2] for file in files) or "the built-in sample"
        except ConfigError as error:
            data = str(error)
        rows.append(
            (
                run.name,
                _state_words(run, state),
                state.get("preset", "?"),
                data,
                "" if loss is None else f"{loss:.4f}",
                "" if score is None else f"{state['score_base']:.0%} → {score:.0%}",
            )
        )
    if not rows:
        return show_message("No runs yet. Start one on the tab Train.", "soft")
    return show_table(("run", "state", "preset", "data", "held-out loss", "exact match, base → tuned"), rows)


def show_differences(runs: Sequence[Run]) -> str:
    """The settings in which runs differ, and nothing else."""
    configs = [run.read_config() for run in runs]
    rows = []
    for name in TrainConfig.model_fields:
        values = [describe_value(getattr(config, name)) for config in configs]
        if name == "data":
            values = [value.replace("none", "the built-in sample") for value in values]
        if len(set(values)) > 1 and name != "run_name":
            rows.append((name, *values))
    if not rows:
        return show_message("These runs have the same settings.", "soft")
    return show_table(("setting", *(run.name for run in runs)), rows, "settings that differ")


def show_scores(scored: Mapping[str, Comparison]) -> str:
    """The score table: the base, and each run by its name. The base's column is that of the first run's rows."""
    tables = {name: {s.task: s for s in [*found.by_task(), found.total()]} for name, found in scored.items()}
    base = next(iter(tables.values()))
    tasks = [*dict.fromkeys(task for table in tables.values() for task in table if task != "all"), "all"]

    def cell(table: Mapping[str, TaskScore], task: str, side: str) -> str:
        if task not in table:
            return ""
        return f"{write_value(HEADLINE, getattr(table[task], side).get(HEADLINE, 0.0))} of {table[task].rows}"

    rows = [(t, cell(base, t, "base"), *(cell(table, t, "tuned") for table in tables.values())) for t in tasks]
    html = show_table(("task", "base", *tables), rows, "exact match on held-out rows")
    html += show_table(("measure", "base", *tables), _all_measures(tables), "all measures, all rows")
    asked = {tuple(answer.source for answer in found.answers) for found in scored.values()}
    if len(asked) > 1:
        html += show_message("These runs were scored on different rows, so their scores can't be compared.", "warning")
    return html


def _all_measures(tables: Mapping[str, Mapping[str, TaskScore]]) -> list[tuple[str, ...]]:
    """Every measure over all rows: the base's, and each run's with its change against the base on the same rows."""
    totals = [table["all"] for table in tables.values()]
    return [
        (
            metric.label,
            write_value(metric.name, totals[0].base[metric.name]),
            *(_with_change(total, metric.name) for total in totals),
        )
        for metric in METRICS
        if metric.name in totals[0].base
    ]


def _with_change(total: TaskScore, name: str) -> str:
    change = write_change(total, name)
    return " · ".join(filter(None, [write_value(name, total.tuned[name]), change])) if name in total.tuned else ""


def show_answers(answers: Sequence[Answered]) -> str:
    """Scored answers, base and tuned beside what was expected."""
    return _render("answers", answers=answers, right=lambda answer: is_exact_match(answer.tuned, answer.reference))


def _figures(last: dict[str, Any], metrics: Sequence[dict[str, Any]], state: dict[str, Any]) -> list[tuple[str, str]]:
    held_out = [entry["eval_loss"] for entry in metrics if "eval_loss" in entry]
    going, estimated = state["status"] == "running", sum(state.get("estimated_parts", {}).values())
    return [
        ("step", f"{last['step']} of {last['total_steps']}"),
        ("loss", f"{last['loss']:.3f}"),
        ("held-out loss", f"{held_out[-1]:.3f}" if held_out else "not yet"),
        ("speed", f"{last.get('tokens_per_s', 0):,.0f} tokens/s"),
        ("memory", _gb(last["memory_bytes"]) + (f" of {_gb(estimated)} estimated" if estimated else "")),
        ("time left", str(timedelta(seconds=int(last["left_s"]))) if going else "–"),
    ]


def _state_words(run: Run, state: dict[str, Any]) -> str:
    status = str(state["status"])
    if status == "finished" and run.is_alive():
        who, done, total = state.get("scoring") or ("base", 0, "the")
        return f"trained and saved; {who} model answers held-out rows, {done} of {total}"
    if status == "finished" and state.get("scoring") and "score_tuned" not in state:
        return "finished; stopped before it was scored"
    return {"preparing": "preparing: reading the rows, loading the base"}.get(status, status)


def _curve(name: str, metrics: Sequence[dict[str, Any]], key: str) -> Curve:
    points = [(e["step"], e[key]) for e in metrics if math.isfinite(e.get(key, math.nan))]
    stride = math.ceil(len(points) / POINTS) or 1
    return Curve(name, points[::stride] + (points[-1:] if len(points) > 1 and (len(points) - 1) % stride else []))


def _plot(title: str, curves: Sequence[Curve]) -> str:
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    x_ticks, y_ticks = (_ticks([point[axis] for point in points]) for axis in (0, 1))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = (point[0] - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        y = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(LEFT + x * (WIDTH - LEFT - 12), 1), round(8 + (1 - y) * (HEIGHT - BOTTOM - 8), 1)

    drawn = []
    for curve in curves:
        line = " ".join("{},{}".format(*place(point)) for point in curve.points)
        few = curve.points if len(curve.points) <= 12 else ()
        drawn.append((line, [(*place(p), f"{curve.name}: {p[1]:.4g} at step {p[0]}") for p in few], curve.name))
    return _render(
        "plot",
        title=title,
        curves=curves,
        drawn=drawn,
        number={curve.name: index % COLOURS for index, curve in enumerate(curves)},
        x_ticks=[(place((tick, y_ticks[0]))[0], f"{tick:g}") for tick in x_ticks],
        y_ticks=[(place((x_ticks[0], tick))[1], f"{tick:.3g}") for tick in y_ticks],
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """Four to eight round numbers that reach around the values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = math.floor(low / step)
    return [number * step for number in range(first, max(math.ceil(high / step), first + 1) + 1)]


def _render(template: str, **values: Any) -> str:
    html = _environment().get_template(template).render(**values, colours=COLOURS)
    return _block(Markup('<div class="part">{}</div>').format(Markup(html)))


def _block(html: str) -> str:
    # Line breaks of data are entities by now; those left are the templates'.
    return str(html).replace("\r", " ").replace("\n", " ")


def _shown(text: Any) -> Markup:
    """Text of data or a model: control characters in sight, line breaks as entities."""
    return Markup(str(escape(printable(str(text)))).replace("\r", "&#13;").replace("\n", "&#10;"))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=DictLoader(_TEMPLATES), autoescape=True, finalize=lambda v: v if isinstance(v, Markup) else _shown(v)
    )
    environment.filters |= {"shown": _shown, "gb": _gb}
    environment.globals["conversation"] = lambda messages: Markup(show_conversation(messages))
    return environment
