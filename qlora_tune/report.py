"""The report of a run as one HTML page that needs nothing else: what was tuned on what, how it learned, what it scores.

No scripts, no files, no network. Its parts are those that the page shows; the same figures stand in scores.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment
from markupsafe import Markup

from qlora_tune import __version__
from qlora_tune import page_parts as parts
from qlora_tune.comparison import (
    BY_TASK,
    HEADLINE,
    Comparison,
    TaskScore,
    pick_answers,
    read_comparison,
    write_change,
    write_from_to,
    write_values,
)
from qlora_tune.config import BUILTIN
from qlora_tune.recipe import describe_method, describe_recipe
from qlora_tune.runs import UNSEEN, Run
from qlora_tune.scores import METRIC, write_value
from qlora_tune.text_signs import printable

ANSWERS = 4  # of each kind

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ run.name }}: report</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{{ style }}
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2rem 0 .25rem; font-size: 19px; }
.headline { font-size: 21px; margin: 1rem 0; } .headline b { font-size: 30px; }
.all td { font-weight: 600; } .shares { min-width: 9rem; }
.shares div { height: 7px; margin: 2px 0; border-radius: 2px; min-width: 1px; }
.shares .of-base { background: var(--note); } .shares .of-tuned { background: var(--bar); }
@media (prefers-color-scheme: dark) { :root { --error: #ff8a80; --warning: #ffb74d; --note: #aaa; --bar: #66bb6a;
--learned: #1f5a24; --c0: #64b5f6; --c1: #ff8a65; --c2: #81c784; --c3: #ce93d8; } }
</style></head><body class="part">
<h1>{{ run.name }}</h1>
<p class="soft">{{ base }}, instruction-tuned with {{ method }} by qlora-tune {{ version }} on {{ day }}</p>
{% if total %}<p class="headline">Exact match on {{ total.rows }} held-out rows: {{ before }} → <b>{{ after }}</b>
<span class="soft">{{ change }}, 95 % interval</span></p>
<p class="soft">Base and tuned model answered the same rows, greedily. Changes are tuned minus base, row by row.</p>
{% else %}<p class="headline">Not scored.</p>{% endif %}
<div class="figures">{% for name, value in figures %}<div><span class="soft">{{ name }}</span><b>{{ value }}</b></div>
{% endfor %}</div>
{% macro by_task(more, tasks) %}
<div class="wide"><table><tr><th scope="col">task</th><th class="n">rows</th><th class="n">base</th>
<th class="n">tuned</th><th></th><th class="n">change (95 %)</th>
{% for metric in more %}<th class="n" title="{{ metric.meaning }}">{{ metric.label }}</th>{% endfor %}</tr>
{% for score, shares, cells in tasks %}<tr {% if loop.last %}class="all"{% endif %}><td>{{ score.task }}</td>
<td class="n">{{ score.rows }}</td>
<td class="n">{{ cells[0] }}</td><td class="n">{{ cells[1] }}</td>
<td class="shares"><div class="of-base" style="width: {{ shares[0] }}%"></div>
<div class="of-tuned" style="width: {{ shares[1] }}%"></div></td>
{% for cell in cells[2:] %}<td class="n">{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% endmacro %}
{% if total %}<h2>Scores by task</h2>{{ by_task(more, tasks) }}{% endif %}
{% if unseen %}<h2>Task types it never saw</h2>
<p class="soft">Their rows were kept out of training whole; base and tuned model answered the same ones.</p>
{{ by_task(unseen.more, unseen.tasks) }}{% endif %}
{% if total %}<h2>All measures, all rows</h2>
<table><tr><th>measure</th><th class="n">base</th><th class="n">tuned</th><th class="n">change (95 %)</th><th></th></tr>
{% for metric, cells in measures %}<tr><td>{{ metric.label }}</td>
{% for cell in cells %}<td class="n">{{ cell }}</td>{% endfor %}<td class="soft">{{ metric.meaning }}</td></tr>
{% endfor %}</table>
{% if forgetting %}<p>{{ forgetting }}.</p>{% endif %}
{% if contracts %}<details><summary>Contracts</summary><pre>{{ contracts }}</pre></details>{% endif %}{% endif %}
<h2>How it learned</h2><div class="plots">{{ plots }}</div>
{% for title, answers in samples %}<h2>{{ title }} answers</h2>{{ answers }}{% endfor %}
<h2>Recipe</h2>
<table>{% for name, value in recipe %}<tr><th scope="row" class="key">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
<h2>Limits</h2>
<p>The scores hold for rows like the held-out ones, and say little about other requests. Intervals tell what another
draw of such rows would change, not another training. Nothing was done to make answers safe.</p>
</body></html>
"""


def write_report(run: Run) -> Path:
    """Write a run's report beside its scores. Text of data is escaped and the page forbids scripts and loads."""
    path = run.path / "report.html"
    path.write_text(render_report(run), encoding="utf-8", errors="backslashreplace")
    return path


def render_report(run: Run) -> str:
    """The report of a finished run, scored or not, as a whole page."""
    config, state = run.read_config(), run.read_state()
    comparison = read_comparison(run) if (run.path / "scores.json").exists() else None
    unseen = read_comparison(run, UNSEEN) if (run.path / f"scores-{UNSEEN}.json").exists() else None
    environment = Environment(
        autoescape=True, finalize=lambda value: value if isinstance(value, Markup) else printable(str(value))
    )
    return environment.from_string(_PAGE).render(
        run=run,
        style=Markup(parts.STYLE),
        base="The built-in base" if state["base_model"] == BUILTIN else Path(state["base_model"]).name,
        method=describe_method(config),
        version=__version__,
        day=datetime.fromtimestamp(state["created"], UTC).date().isoformat(),
        figures=_figures(run, state),
        plots=Markup(parts.show_losses([run])),
        recipe=describe_recipe(run),
        unseen=_task_table(unseen) if unseen and unseen.answers else None,
        **(_scores(comparison) if comparison and comparison.answers else {"samples": []}),
    )


def _scores(comparison: Comparison) -> dict[str, Any]:
    total = comparison.total()
    kinds: tuple[Literal["best", "worst", "random"], ...] = ("best", "worst", "random")
    return {
        "total": total,
        "before": write_value(HEADLINE, total.base[HEADLINE]),
        "after": write_value(HEADLINE, total.tuned[HEADLINE]),
        "change": write_change(total, HEADLINE),
        **_task_table(comparison),
        "measures": [(METRIC[name], write_values(total, name)) for name in METRIC if name in total.tuned],
        "forgetting": comparison.forgetting.describe().capitalize() if comparison.forgetting else "",
        "contracts": "\n".join(map(str, comparison.contracts.to_tables())),
        "samples": [
            (kind.capitalize(), Markup(parts.show_answers(pick_answers(comparison, kind, ANSWERS)))) for kind in kinds
        ],
    }


def _task_table(comparison: Comparison) -> dict[str, Any]:
    """Exact match by task and in all, and the further measures that the tasks have."""
    total, by_task = comparison.total(), comparison.by_task()
    more = [METRIC[name] for name in BY_TASK if any(name in score.tuned for score in by_task)]
    tasks = [_task_row(score, [metric.name for metric in more]) for score in [*by_task, total]]
    return {"more": more, "tasks": tasks}


def _task_row(score: TaskScore, names: Sequence[str]) -> tuple[TaskScore, tuple[float, float], list[str]]:
    shares = (100 * score.base[HEADLINE], 100 * score.tuned[HEADLINE])
    others = [write_from_to(score, name) for name in names]
    return score, shares, [*write_values(score, HEADLINE), *others]


def _figures(run: Run, state: dict[str, Any]) -> list[tuple[str, str]]:
    """What it cost, and where it ran."""
    steps = [entry for entry in run.read_metrics() if "loss" in entry]
    loss = state.get("eval_loss")
    peak, estimated = state.get("peak_bytes", 0), sum(state.get("estimated_parts", {}).values())
    found = [
        ("held-out loss", "" if loss is None else f"{loss:.4f} nats"),
        ("steps", str(state.get("steps", 0))),
        ("training took", str(timedelta(seconds=round(steps[-1]["elapsed_s"]))) if steps else ""),
        ("processor time", f"{state['train_cpu_s']:.0f} s" if "train_cpu_s" in state else ""),
        ("speed", f"{steps[-1].get('tokens_per_s', 0):,.0f} tokens/s" if steps else ""),
        ("peak memory", f"{peak / 1e9:.2f} GB of {estimated / 1e9:.2f} estimated" if peak else ""),
        ("device", str(state.get("device", ""))),
    ]
    return [(name, value) for name, value in found if value]
