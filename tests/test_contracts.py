"""Contracts: what an answer must hold, read from a file that a user writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tune.contracts import Contract, Contracts, make_contracts, read_contracts
from qlora_tune.errors import ConfigError

FILE = """
[[contract]]
task = "section"
labels = ["ALLERGY", "Plan"]

[[contract]]
task = "person"
json_schema = {type = "object", required = ["name"], properties = {age = {type = "integer"}}}

[[contract]]
task = "*"
regex = "[A-Z].*"
max_words = 3
max_characters = 12
"""


@pytest.fixture
def contracts(tmp_path: Path) -> Contracts:
    (tmp_path / "contracts.toml").write_text(FILE)
    return read_contracts(tmp_path / "contracts.toml")


@pytest.mark.parametrize(
    ("task", "answer", "breaches"),
    [
        ("section", "allergy.", []),
        ("section", "Allergies", ["is none of the labels"]),
        ("person", '{"name": "Ann", "age": 3}', []),
        ("person", '{"name": "Ann", "age": "3"}', ["breaks the JSON schema at $.age: '3' is not of type 'integer'"]),
        ("person", '{"age": 3}', ["breaks the JSON schema at $: 'name' is a required property"]),
        ("person", "Ann", ["is no JSON"]),
        ("other", "One two.\nTen", []),
        ("other", " One\n", []),
        (
            "other",
            "one two three four",
            [
                "does not match the regular expression",
                "has 4 words, at most 3 are allowed",
                "has 18 characters, at most 12 are allowed",
            ],
        ),
    ],
)
def test_every_breach_is_told(contracts: Contracts, task: str, answer: str, breaches: list[str]) -> None:
    contract = contracts.find(task)
    assert contract is not None
    assert contract.find_breaches(answer) == breaches


def test_a_task_without_a_contract_has_none() -> None:
    assert Contracts((Contract("a", max_words=1),)).find("b") is None


def test_contracts_survive_being_kept(contracts: Contracts) -> None:
    assert make_contracts(contracts.to_tables(), "kept") == contracts
    anything = Contracts((Contract("a", json_schema={}),))
    assert make_contracts(anything.to_tables(), "kept") == anything
    assert anything.contracts[0].find_breaches("[]") == []
    assert anything.contracts[0].find_breaches("no") == ["is no JSON"]


@pytest.mark.parametrize("reference", ["http://127.0.0.1:9/s", "other.json", "#/$defs/missing"])
def test_a_schema_that_refers_elsewhere_is_refused(reference: str) -> None:
    schema = {"properties": {"x": {"$ref": reference}}, "$defs": {"here": {"type": "integer"}}}
    with pytest.raises(ConfigError, match="contract 1: json_schema refers to .*nothing is fetched"):
        make_contracts([{"task": "a", "json_schema": schema}], "here")


def test_a_schema_may_refer_to_its_own_parts() -> None:
    schema = {"properties": {"x": {"$ref": "#/$defs/here"}}, "$defs": {"here": {"type": "integer"}}}
    contract = make_contracts([{"task": "a", "json_schema": schema}], "here").contracts[0]
    assert contract.find_breaches('{"x": 1}') == []
    assert contract.find_breaches('{"x": "1"}') == ["breaks the JSON schema at $.x: '1' is not of type 'integer'"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no \[\[contract\]\]"),
        ("x = 1", "holds x; expected"),
        ("contract = 3", r"no \[\[contract\]\]"),
        ("[[contract]]", "contract 1: task: Field required"),
        ('[[contract]]\ntask = "a"', "contract 1 asks for nothing"),
        ('[[contract]]\ntask = "a"\nmax_words = 0', "max_words: .* greater than or equal to 1, found '0'"),
        ('[[contract]]\ntask = "a"\nmax_words = "3"', "max_words: .* valid integer"),
        ('[[contract]]\ntask = "a"\nlabels = []', "labels: .* at least 1"),
        ('[[contract]]\ntask = "a"\nregexp = "x"', "regexp: Extra inputs are not permitted"),
        ('[[contract]]\ntask = "a"\nregex = "("', "contract 1: regex can't be read: missing"),
        ('[[contract]]\ntask = "a"\njson_schema = {type = "objekt"}', "json_schema is no JSON schema"),
        ('[[contract]]\ntask = "a"\nmax_words = 1\n' * 2, 'contract 2 is the second one for task "a"'),
        ("[[contract", "not valid TOML"),
    ],
)
def test_a_faulty_file_is_told_by_table(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_contracts(path)
