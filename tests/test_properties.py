"""What must hold for any text, chat or setting: hypothesis looks for the one for which it doesn't."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tune.config import TrainConfig, load_preset, resolve_config
from qlora_tune.data import load_examples
from qlora_tune.errors import DataError, TuneError

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
# Surrogates are no text, and NUL ends a cell; both are rows to be refused, which test_fuzz covers.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
SAID = TEXT.filter(lambda text: text.strip() and text.lower().strip() not in ("n/a", "na", "none", "null", "nan"))
MARKS = st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "\n\n", "  ", "\u2028", "é", "🙂", "{}", '"', "\\n"])
PIECES = st.lists(st.one_of(SAID, MARKS), min_size=1, max_size=4).map("".join).filter(str.strip)


def check_read(path: Path, rows: list[tuple[str, str]]) -> None:
    """Each row is read as it is; otherwise it is reported as changed or rejected."""
    try:
        found, report = load_examples([path])
    except DataError as error:
        assert "No usable row" in str(error)  # noqa: PT017 - both ways are allowed
        return
    read = [tuple(turn["content"] for turn in example.messages) for example in found]
    reported = sum(problem.action in ("changed", "rejected") for problem in report.problems)
    assert len(rows) - len(read) == report.rejected
    assert sum(row not in read for row in rows) <= reported


@quick
@given(st.lists(st.tuples(PIECES, PIECES), min_size=1, max_size=5))
def test_text_comes_out_of_json_lines_as_it_went_in(rows: list[tuple[str, str]]) -> None:
    for ascii_only in (True, False):
        lines = [json.dumps({"instruction": a, "output": b}, ensure_ascii=ascii_only) + "\n" for a, b in rows]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.jsonl"
            path.write_text("".join(lines), encoding="utf-8", newline="")
            check_read(path, rows)


@quick
@given(st.lists(st.tuples(PIECES, PIECES), min_size=1, max_size=5))
def test_text_comes_out_of_a_table_as_it_went_in(rows: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["instruction", "output"])
            writer.writerows(rows)
        check_read(path, rows)


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for asked, answered in pairs
        for role, text in (("user", asked), ("assistant", answered))
    ]


@quick
@given(st.lists(st.tuples(PIECES, PIECES), min_size=1, max_size=3))
def test_exactly_the_answers_are_learned_whatever_is_typed(builtin: Any, pairs: list[tuple[str, str]]) -> None:
    _, tokenizer, chat = builtin
    found = chat.tokenize_example(turns(pairs))
    learned: list[str] = []
    for sequence in found:
        run: list[int] = []
        for token, label in zip(sequence.input_ids, sequence.labels, strict=True):
            assert label in (-100, token)
            if label != -100:
                run.append(token)
            elif run:
                learned.append(tokenizer.decode(run))
                run = []
        if run:
            learned.append(tokenizer.decode(run))
    ends = [text.rstrip("\n") for text in learned]
    assert all(text.endswith(chat.end_of_turn) for text in ends)
    assert [text.removesuffix(chat.end_of_turn).strip() for text in ends] == [answer.strip() for _, answer in pairs]
    controls = sum(sequence.input_ids.count(chat.end_of_turn_id) for sequence in found)
    assert controls == 2 * len(pairs), "one for each turn, however often somebody typed it"


LAYERED = {
    "learning_rate": st.floats(1e-6, 1e-2),
    "lora_r": st.integers(1, 64),
    "num_train_epochs": st.floats(0.1, 9),
    "seed": st.integers(0, 99),
}
LAYER = st.fixed_dictionaries({}, optional=LAYERED)


@quick
@given(LAYER, LAYER)
def test_flags_lie_over_the_file_over_the_preset_over_defaults(flags: dict[str, Any], file: dict[str, Any]) -> None:
    preset = load_preset("builtin").settings
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.toml"
        path.write_text("".join(f"{name} = {value!r}\n" for name, value in file.items()))
        resolved = resolve_config({"preset": "builtin", **{n: str(v) for n, v in flags.items()}}, path)
    for name in LAYERED:
        default = TrainConfig.model_fields[name].default
        expected = {"default": default, **preset, **file, **flags}.get(name, default)
        assert getattr(resolved.config, name) == expected
        origin = "flag" if name in flags else str(path) if name in file else None
        assert origin is None or resolved.origins[name] == origin


@quick
@given(st.dictionaries(st.sampled_from([*TrainConfig.model_fields]), st.one_of(TEXT, st.integers(), st.floats())))
def test_any_value_is_taken_or_refused_in_words(flags: dict[str, Any]) -> None:
    try:
        resolved = resolve_config({name: str(value) for name, value in flags.items()} | {"preset": "builtin"})
    except TuneError as error:
        assert str(error)  # noqa: PT017 - both ways are allowed
    else:
        assert isinstance(resolved.config, TrainConfig)
