"""Every container and encoding: each row with its line and its values as they stand, or a refusal that says where."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from qlora_tune import json_stream
from qlora_tune.containers import list_files, read_rows
from qlora_tune.data import DataReport, convert_rows, find_data, load_examples
from qlora_tune.errors import DataError
from qlora_tune.shapes import DataProblem, Row

GOOD = {"instruction": "Say “hi”", "output": "hé"}
HEADER = "instruction,output\n"


def read(path: Path, content: str | bytes, **options: Any) -> list[Row | DataProblem]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(path, **options))


def cells(rows: list[Row | DataProblem]) -> list[tuple[int, list[Any]]]:
    return [(row.line, list(row.fields.values()) if isinstance(row, Row) else row.reason) for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", HEADER + "007,NULL\n2020-01-01,True\n1e5,NA\n", [(2, "007", "NULL"), (3, "2020-01-01", "True")]),
        ("crlf.csv", 'instruction,output\r\n"a\r\nb","c"\r\nd,e\r\n', [(2, "a\r\nb", "c"), (4, "d", "e")]),
        (
            "lf.csv",
            HEADER + '"a\n\nb",c\n\n\nd,e\n',
            [(2, "a\n\nb", "c"), (7, "d", "e")],
        ),
        ("semicolon.csv", 'instruction;output\n"a, ""b""; c";d, e\nf;g\n', [(2, 'a, "b"; c', "d, e"), (3, "f", "g")]),
        ("pipe.csv", "instruction|output\na, b|c;d\n", [(2, "a, b", "c;d")]),
        ("tab.csv", "instruction\toutput\na, b\tc\n", [(2, "a, b", "c")]),
        ("inches.csv", HEADER + 'a 5" pipe,b\n', [(2, 'a 5" pipe', "b")]),
        ("excel.csv", "sep=;\r\ninstruction;output\r\na,b;c\r\n", [(3, "a,b", "c")]),
        ("capitals.csv", "Instruction, OUTPUT\na,b\n", [(2, "a", "b")]),
        ("no_last_newline.csv", HEADER + "a,b", [(2, "a", "b")]),
        ("mark.csv", "\ufeff" + HEADER + "ä,b\n", [(2, "ä", "b")]),
        ("blank_cells.csv", HEADER + ",\na,\n", [(3, "a", "")]),
        ("quoted.tsv", 'instruction\toutput\n"a\tb"\t"say ""c"""\n', [(2, "a\tb", 'say "c"')]),
        ("stray.tsv", 'instruction\toutput\n"a\tb"\n"Go" he said\tc\n', [(2, '"a', 'b"'), (3, '"Go" he said', "c")]),
        ("commas.tsv", "1, 2, 3, 4\tx y.\n1, 2, 3, 4\tz.\n", [(1, "1, 2, 3, 4", "x y."), (2, "1, 2, 3, 4", "z.")]),
        ("headless.csv", "What is it?,That.\nWhy?,So.\n", [(1, "What is it?", "That."), (2, "Why?", "So.")]),
    ],
)
def test_cells_stay_the_text_that_they_are(tmp_path: Path, name: str, content: str, expected: list[Any]) -> None:
    rows = read(tmp_path / name, content)
    found = cells([row for row in rows if isinstance(row, Row) or row.action != "skipped"])
    assert found[: len(expected)] == [(line, list(values)) for line, *values in expected]


@pytest.mark.parametrize(
    ("content", "names", "note"),
    [
        ("What is it?,That.\n", ["column_1", "column_2"], "no header; columns: column_1, column_2"),
        ("frage,antwort\nWas?,Das.\n", ["frage", "antwort"], "columns: frage, antwort (line 1)"),
        (",instruction,output\n0,a,b\n", ["column_1", "instruction", "output"], "column_1, instruction, output"),
        (",frage,antwort\n0,a,b\n", ["column_1", "frage", "antwort"], "columns: column_1, frage"),
        ("instruction,output,,\na,b,,\n", ["instruction", "output", "column_3", "column_4"], "column_3, column_4"),
    ],
)
def test_columns_are_named_by_the_header_or_by_number(
    tmp_path: Path, content: str, names: list[str], note: str
) -> None:
    notes: list[str] = []
    rows = read(tmp_path / "a.csv", content, notes=notes)
    assert [list(row.fields) for row in rows if isinstance(row, Row)] == [names]
    assert note in notes[0]


def test_a_first_line_of_single_words_is_a_row_where_columns_are_mapped_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("hello\tbonjour\nworld\tmonde\n")
    examples, report = load_examples([path], columns={"instruction": "column_1", "output": "column_2"})
    assert [example.answer for example in examples] == ["bonjour", "monde"]
    assert report.rows_in == 2


def test_short_and_long_records_are_rejected_alone_with_their_line(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", HEADER + 'a,"b\nb"\nonly\n1,2,3\nc,d\n')
    assert cells(rows) == [
        (2, ["a", "b\nb"]),
        (4, "has 1 cells, expected 2 (instruction, output)"),
        (5, "has 3 cells, expected 2 (instruction, output)"),
        (6, ["c", "d"]),
    ]
    assert isinstance(rows[2], DataProblem)
    assert rows[2].original == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "instruction,output,output\na,b,c\n", 'a.csv: .*\n.*the column "output" stands twice'),
        ("a.csv", HEADER + 'a,b\nc,"d" e\nf,g\n', "a.csv:3: a quote is not closed, or text follows"),
        ("a.csv", HEADER + 'a,b\nc,"d\nf,g\n', "a.csv:3: a quote is not closed"),
        ("a.csv", HEADER.encode() + b"a,b\n\x81\xe9,c\n", "a.csv:3: not utf-8 text"),
        ("a.csv", HEADER.encode() + "请介绍一下你自己,我是一个助手\n".encode("gbk"), "a.csv: not UTF-8 .*gb18030"),
        ("a.csv", HEADER.encode() + "Привет друг,Здравствуйте\n".encode("cp1251"), "a.csv: not UTF-8 .*cp1251"),
        ("a.json", b'[{"output": "b"},\n{"output": "caf\xe9"}]', "a.json:2: not utf-8 text"),
        ("a.json", '[{"n": ' + "1" * 5000 + "}]", "a.json:1: not valid JSON: Exceeds the limit"),
        ("a.json", '{"data": [' + json.dumps(GOOD), "a.json: the array has no closing"),
        ("a.json", '{"data": [' + json.dumps(GOOD) + "]", "a.json: the object has no closing"),
        ("a.parquet", b"PAR1 is not enough", "a.parquet: not a whole Parquet file"),
        ("a.parquet", b"", "a.parquet: not a whole Parquet file"),
        ("a.txt", "Once upon a time.\n", "a.txt: plain text, with no answers to learn.*pairs"),
        ("a.xlsx", b"PK", r'files ending in ".xlsx" are not read. Expected .jsonl'),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 9999, mtime=0)[:-40],
            r"a.jsonl.gz: the gzip file is damaged or cut off",
        ),
        (
            "a.csv.gz",
            gzip.compress(HEADER.encode() * 9999, mtime=0)[:-20],
            "a.csv.gz: the gzip file is damaged or cut off",
        ),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-8] + b"\0" * 8, "the gzip file is damaged"),
    ],
)
def test_a_file_that_leaves_open_what_it_holds_is_refused_with_the_place(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){reason}"):
        read(tmp_path / name, content)


LINES = "\n".join(json.dumps(GOOD, ensure_ascii=False) for _ in range(3))
TABLE = 'instruction,output\n"Say “hi”",hé\n' + "Say “hi”,hé\n" * 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        ("a.jsonl", LINES, 1),
        ("a.ndjson", LINES.replace("\n", "\r\n"), 1),
        ("a.json", LINES, 1),
        ("array.json", f"[{','.join(LINES.splitlines(keepends=True))}]", 1),
        ("wrapped.json", '{"version": 1,\n"data": [' + ",".join(LINES.splitlines(keepends=True)) + "]}", 2),
        ("a.csv", TABLE, 2),
        ("a.csv", TABLE.replace("\n", "\r\n"), 2),
        ("a.tsv", TABLE.replace(",", "\t"), 2),
    ],
)
def test_every_text_container_is_read_in_every_unicode_encoding(
    tmp_path: Path, name: str, content: str, first: int, encoding: str, packed: bool
) -> None:
    data = content.encode(encoding)
    rows = read(tmp_path / (name + ".gz" if packed else name), gzip.compress(data, mtime=0) if packed else data)
    assert cells(rows) == [(line, list(GOOD.values())) for line in range(first, first + 3)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize(("name", "content", "first"), [("a.jsonl", LINES, 1), ("a.csv", TABLE, 2)])
def test_a_named_encoding_needs_no_mark(tmp_path: Path, name: str, content: str, first: int, encoding: str) -> None:
    (tmp_path / name).write_bytes(content.encode(f"{encoding}-le"))
    rows = list(read_rows(tmp_path / name, encoding=encoding))
    assert cells(rows) == [(line, list(GOOD.values())) for line in range(first, first + 3)]


@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_windows_text_is_read_as_such_and_the_guess_is_noted(tmp_path: Path, name: str) -> None:
    text = HEADER + "Say “hi”,hé – là\n" if name == "a.csv" else chatml("Say “hi”", "hé – là")
    notes: list[str] = []
    rows = read(tmp_path / name, text.encode("cp1252"), notes=notes)
    assert "hé – là" in str(cells(rows))
    assert "cp1252" in notes[0]


@pytest.mark.parametrize(
    ("encoding", "text"), [("gb18030", "你好"), ("latin-1", "é"), ("utf-16-le", "é"), ("UTF8", "é")]
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_a_named_encoding_is_used_and_a_byte_order_mark_is_no_text(
    tmp_path: Path, name: str, encoding: str, text: str, mark: str
) -> None:
    mark = "" if encoding in ("latin-1", "gb18030") else mark
    row = json.dumps({"instruction": text, "output": "b"}, ensure_ascii=False)
    content = {"a.csv": f"instruction,output\n{text},b\n", "a.jsonl": row, "a.json": f"[{row}\n]"}[name]
    rows = read(tmp_path / name, (mark + content).encode(encoding), encoding=encoding)
    assert [row.fields for row in rows if isinstance(row, Row)] == [{"instruction": text, "output": "b"}]


def test_an_encoding_that_was_asked_for_is_not_replaced_by_a_guess(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a.csv:2: not utf-8 text"):
        read(tmp_path / "a.csv", HEADER.encode() + b"caf\xe9,b\n", encoding="utf-8")


@pytest.mark.parametrize("encoding", ["klingon", "hex", "rot13", ""])
def test_what_is_no_text_encoding_is_refused_by_name(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(DataError, match=f'"{encoding}" is no encoding'):
        read(tmp_path / "a.csv", HEADER + "a,b\n", encoding=encoding)


def test_blank_lines_are_skipped_not_counted_and_keep_the_lines_right(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(GOOD) + "\n  \n\r\n" + json.dumps(GOOD) + "\n\n")
    examples, report = load_examples([path])
    assert [example.source for example in examples] == ["a.jsonl:2", "a.jsonl:5"]
    assert (report.rows_in, report.kept, report.rejected) == (2, 2, 0)
    assert [problem.line for problem in report.problems if problem.action == "skipped"] == [1, 3, 4, 6]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("key", ["data", "rows"])
def test_rows_under_a_key_are_read_and_what_else_stands_there_is_noted(tmp_path: Path, key: str, name: str) -> None:
    notes: list[str] = []
    rows = read(tmp_path / name, json.dumps({"version": 1, key: [GOOD, 5], "x": {}}), notes=notes)
    assert cells(rows) == [(1, list(GOOD.values())), (2, "is a number, expected an object")]
    assert notes[0].startswith("several rows stand on one line: the lines given are the numbers of rows")
    assert notes[1:] == [f'rows are those under "{key}"; not read: version, x']


def test_the_hubs_viewer_export_is_unwrapped_and_a_row_that_it_cut_is_rejected(tmp_path: Path) -> None:
    shown = [{"row_idx": n, "row": GOOD, "truncated_cells": cut} for n, cut in enumerate([[], ["output"]])]
    rows = read(tmp_path / "a.json", json.dumps({"features": [], "rows": shown}, indent=1))
    assert cells(rows)[0][1] == list(GOOD.values())
    assert cells(rows)[1][1] == 'the hub\'s viewer cut off the text of ["output"]'


def test_a_bad_row_inside_an_array_costs_only_itself(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.json", '[{"a": 1},\n{"a": NaN},\n{"a": 1, "a": 2},\n7,\nnull,\n{"a": 3}]')
    assert cells(rows) == [
        (1, [1]),
        (2, "not valid JSON: NaN is not JSON"),
        (3, 'not valid JSON: the key "a" stands twice in one object'),
        (4, "is a number, expected an object"),
        (5, "is null, expected an object"),
        (6, [3]),
    ]


AWKWARD = [
    {"t": 'é😀"\\\n\u2028\u0000', "n": [-1.5e-7, 0, 12345.678, True, False, None], "": {}},
    {"deep": [[[{"a": "😀 ] } , :"}]]], "empty": []},
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 11])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize(
    "wrap", [lambda rows: rows, lambda rows: {"v": -12.75e10, "data": rows}], ids=["array", "data"]
)
def test_a_value_may_go_over_any_border_of_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, ascii_only: bool, wrap: Any
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    text = json.dumps(wrap(AWKWARD), ensure_ascii=ascii_only, indent=1)
    rows = read(tmp_path / "a.json", text)
    assert [row.fields for row in rows if isinstance(row, Row)] == AWKWARD
    assert all(text.split("\n")[row.line - 1].strip() == "{" for row in rows)


@pytest.mark.parametrize("number", ["1.5", "-0.25", "1e5", "2.5E-3", "12345678901234567890"])
def test_a_number_at_the_border_of_a_chunk_is_whole(tmp_path: Path, number: str) -> None:
    start = len('{"pad": "", "n": ')
    for held_back in range(len(number) + 2):
        pad = "x" * (json_stream._CHUNK - start - held_back)
        (row,) = read(tmp_path / "a.json", f'{{"pad": "{pad}", "n": {number},\n"output": "b"}}')
        assert isinstance(row, Row)
        assert row.fields["n"] == json.loads(number)
        assert row.fields["output"] == "b"


def test_a_file_of_several_chunks_is_what_the_standard_library_reads(tmp_path: Path) -> None:
    rows = [{"n": n / 7, "text": 'é😀\\"\t' * (n % 300), "flags": [n % 2 == 0, None]} for n in range(5000)]
    text = json.dumps(rows, indent=0)
    assert len(text) > 3 * json_stream._CHUNK
    found = read(tmp_path / "a.json", text)
    assert [row.fields for row in found if isinstance(row, Row)] == json.loads(text)
    assert len(found) == len(rows)


def test_a_parquet_file_gives_its_values_as_they_are(tmp_path: Path) -> None:
    fields = [
        {"instruction": f"007 {n}", "messages": [{"role": "user", "content": "é"}], "n": None} for n in range(600)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(fields), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert [(row.line, row.fields) for row in rows if isinstance(row, Row)] == list(enumerate(fields, start=1))
    packed = gzip.compress((tmp_path / "a.parquet").read_bytes())
    assert [row.line for row in read(tmp_path / "b.parquet.gz", packed)] == list(range(1, 601))


def test_a_damaged_page_of_a_parquet_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"instruction": ["a" * 99], "output": ["b"]}), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    with pytest.raises(DataError, match=f"{path}: "):
        read(path, bytes(content))


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array([text]) for text in "abc"]
    parquet.write_table(pyarrow.table(columns, names=["instruction", "output", "output"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match='the column "output" stands twice'):
        list(read_rows(tmp_path / "a.parquet"))


def chatml(*turns: str, end: str = "\n") -> str:
    roles = ("user", "assistant") * len(turns)
    return "".join(f"<|im_start|>{role}{end}{text}<|im_end|>{end}" for role, text in zip(roles, turns, strict=False))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_chatml_text_is_split_into_its_conversations(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.txt"
    system = f"<|im_start|>system{end}Be brief.<|im_end|>{end}"
    parts = [system + chatml("a", "b", end=end), system + chatml("c", f"d{end}{end}d", end=end), end]
    path.write_bytes("".join([*parts, chatml("e", "f", end=end)]).encode())
    examples, report = load_examples([path])
    assert [example.source for example in examples] == ["a.txt:1", "a.txt:7", "a.txt:16"]
    assert [example.answer for example in examples] == ["b", "d\n\nd", "f"]
    assert [example.messages[0]["content"] for example in examples] == ["Be brief.", "Be brief.", "e"]
    assert report.kept == report.rows_in == 3


def test_a_folder_gives_its_data_files_and_leaves_out_hidden_and_other_ones(tmp_path: Path) -> None:
    inside = ["b.jsonl", "sub/a.CSV", "sub/c.json.gz", ".hidden.jsonl", ".cache/d.jsonl", "notes.md", "e.xlsx"]
    for name in inside:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [str(file.relative_to(tmp_path)) for file in list_files(tmp_path)]
    assert found == ["b.jsonl", "sub/a.CSV", "sub/c.json.gz"]
    assert find_data([tmp_path, tmp_path / "b.jsonl"]) == [str(tmp_path / name) for name in [*found, "b.jsonl"]]


def test_a_folder_below_a_hidden_one_is_read_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "d").mkdir(parents=True)
    with pytest.raises(DataError, match="the folder holds no data file. Expected .jsonl"):
        list_files(tmp_path)
    (tmp_path / ".cache" / "d" / "a.jsonl").write_text("")
    assert [file.name for file in list_files(tmp_path / ".cache" / "d")] == ["a.jsonl"]


def test_every_real_file_is_read_or_refused_in_words_and_its_rows_add_up(shared_data: Path) -> None:
    for path in sorted(file for file in shared_data.rglob("*") if file.is_file() and file.suffix != ".md"):
        report = DataReport()
        if path.name == "truncated.jsonl.gz":
            with pytest.raises(DataError, match="damaged or cut off"):
                list(convert_rows(path, report))
            continue
        rows = list(read_rows(path))
        converted = list(convert_rows(path, report))
        assert all(row.line > 0 for row in rows)
        assert report.rows_in == sum(getattr(row, "action", "") != "skipped" for row in rows)
        assert len(converted) == report.kept == report.rows_in - report.rejected
