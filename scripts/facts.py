"""The world as single facts (subject, relation, value) and the declarative sentences that state them.

The first sentence of a relation is its plainest form: sample.jsonl uses it as the answer to a question, so
the base has already read the answer's words, though never the question.
"""

import itertools
from dataclasses import dataclass

from world import (
    ANIMALS,
    COUNTRIES,
    DAYS,
    ELEMENTS,
    FOODS,
    JOBS,
    MONTHS,
    NUMBERS,
    OPPOSITES,
    PLURALS,
    SYNONYMS,
    VERBS,
)


@dataclass(frozen=True)
class Fact:
    """One value of one relation; `plural` is only set where sentences speak of many."""

    relation: str
    subject: str
    value: str
    plural: str = ""


# {x} subject, {ax} with its article, {xs} in the plural, {X} {Ax} {Xs} capitalised; {y} the value.
SENTENCES: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {x} is {y}.",
        "{y} is the capital of {x}.",
        "{x} has the capital {y}.",
        "The capital city of {x} is {y}.",
        "{y} is the capital city of {x}.",
    ),
    "continent": (
        "{x} is in {y}.",
        "{x} lies in {y}.",
        "{x} is a country in {y}.",
        "The country {x} is a part of {y}.",
    ),
    "language": (
        "The language of {x} is {y}.",
        "People in {x} speak {y}.",
        "{y} is spoken in {x}.",
        "The main language of {x} is {y}.",
    ),
    "currency": (
        "The currency of {x} is the {y}.",
        "People in {x} pay with the {y}.",
        "The money of {x} is the {y}.",
    ),
    "group": ("{Ax} is {ay}.", "The {x} belongs to the {y} group.", "Every {x} is {ay}."),
    "home": ("{Ax} lives {y}.", "{Xs} live {y}.", "The home of the {x} is {y}."),
    "food": ("{Ax} eats {y}.", "{Xs} eat {y}.", "The food of the {x} is {y}."),
    "young": ("A young {x} is called {ay}.", "A baby {x} is called {ay}.", "The young of the {x} is {ay}."),
    "workplace": ("{Ax} works {y}.", "The {x} works {y}.", "The workplace of {ax} is {y}."),
    "work": ("{Ax} {y}.", "The {x} {y}.", "The person who {y} is {ax}."),
    "tool": ("{Ax} uses {y}.", "{Ax} works with {y}.", "The tool of {ax} is {y}."),
    "food kind": ("{Ax} is {ay}.", "The {x} is {ay}.", "{Xs} belong to the {y}s."),
    "food colour": ("{Ax} is {y}.", "{Xs} are {y}.", "The colour of {ax} is {y}."),
    "opposite": (
        "The opposite of {x} is {y}.",
        'The opposite of "{x}" is "{y}".',
        "What is not {x} is {y}: the opposite of {x} is {y}.",
        "{X} and {y} are opposites.",
    ),
    "synonym": (
        "{X} means the same as {y}.",
        'Another word for "{x}" is "{y}".',
        "A synonym of {x} is {y}.",
    ),
    "plural": (
        "The plural of {x} is {y}.",
        'The plural of "{x}" is "{y}".',
        "One {x}, two {y}.",
        "There was one {x} here, and many {y} there.",
    ),
    "past": (
        "The past tense of {x} is {y}.",
        "Today we {x}, yesterday we {y}.",
        'The past form of "{x}" is "{y}".',
    ),
    "day after": ("The day after {x} is {y}.", "After {x} comes {y}.", "{y} comes after {x}."),
    "day before": ("The day before {x} is {y}.", "Before {x} comes {y}.", "{y} comes before {x}."),
    "month after": ("The month after {x} is {y}.", "After {x} comes {y}.", "{y} comes after {x}."),
    "month before": ("The month before {x} is {y}.", "Before {x} comes {y}.", "{y} comes before {x}."),
    "number after": ("The number after {x} is {y}.", "After {x} comes {y}.", "{X}, {y}: so we count."),
    "symbol": (
        "The symbol of {x} is {y}.",
        "{y} is the symbol of {x}.",
        "The chemical symbol of {x} is {y}.",
    ),
}


# The same relations as the clause that follows "Anna knows" or "Ben told Anna". None of them has the word order of
# a question, so that no question of sample.jsonl is read here.
CLAUSES: dict[str, tuple[str, ...]] = {
    "capital": ("the capital of {x}", "which capital {x} has", "the capital city of {x}"),
    "continent": ("where {x} is", "on which continent {x} lies", "the continent of {x}"),
    "language": ("which language people speak in {x}", "the language of {x}", "the main language of {x}"),
    "currency": ("the currency of {x}", "what people in {x} pay with", "the money of {x}", "which money {x} has"),
    "group": ("what kind of animal {ax} is", "the animal group of the {x}", "to which group the {x} belongs"),
    "home": ("where {ax} lives", "where {xs} live", "the home of the {x}", "where to find {ax}"),
    "food": ("what {ax} eats", "what {xs} eat", "the food of the {x}", "what to feed {ax}"),
    "young": ("the name of a young {x}", "how a baby {x} is called", "the word for a young {x}"),
    "workplace": ("where {ax} works", "the workplace of {ax}", "where to meet {ax} at work"),
    "work": ("what {ax} does", "the work of {ax}", "what the job of {ax} is"),
    "tool": ("which tool {ax} uses", "what {ax} works with", "the tool of {ax}"),
    "food kind": ("whether {ax} is a fruit or a vegetable", "what kind of food {ax} is"),
    "food colour": ("what colour {ax} has", "the colour of {ax}", "what {xs} look like"),
    "opposite": ("the opposite of {x}", "the word that is the opposite of {x}", 'the opposite of "{x}"'),
    "synonym": ("another word for {x}", "a synonym of {x}", "a word with the meaning of {x}"),
    "plural": ("the plural of {x}", 'how to write "{x}" in the plural', "the word for several when {x} is one"),
    "past": ("the past tense of {x}", 'how to write "{x}" in the past', 'the past form of "{x}"'),
    "day after": ("the day that comes after {x}", "the day after {x}"),
    "day before": ("the day that comes before {x}", "the day before {x}"),
    "month after": ("the month that comes after {x}", "the month after {x}"),
    "month before": ("the month that comes before {x}", "the month before {x}"),
    "number after": ("the number that comes after {x}", "the number after {x}"),
    "symbol": ("the symbol of {x}", "the chemical symbol of {x}", "which symbol {x} has"),
}


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def state(fact: Fact, template: str) -> str:
    """Fill one sentence (or question) template with a fact."""
    x, y = fact.subject, fact.value
    return template.format(
        x=x,
        X=capitalise(x),
        ax=with_article(x),
        Ax=capitalise(with_article(x)),
        xs=fact.plural,
        Xs=capitalise(fact.plural),
        y=y,
        ay=with_article(y),
    )


def _both_ways(relation: str, pairs: list[tuple[str, str]]) -> list[Fact]:
    return [Fact(relation, a, b) for pair in pairs for a, b in (pair, pair[::-1])]


def _neighbours(name: str, cycle: list[str]) -> list[Fact]:
    after = [Fact(f"{name} after", a, b) for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
    return after + [Fact(f"{name} before", fact.value, fact.subject) for fact in after]


def _entities() -> list[list[Fact]]:
    """The facts that belong together, one list an entity: the corpus tells them in one paragraph."""
    countries = [
        [Fact(r, c.name, getattr(c, r)) for r in ("capital", "continent", "language", "currency")] for c in COUNTRIES
    ]
    animals = [[Fact(r, a.name, getattr(a, r), a.plural) for r in ("group", "home", "food", "young")] for a in ANIMALS]
    jobs = [
        [Fact("workplace", j.name, j.place), Fact("work", j.name, j.work), Fact("tool", j.name, j.tool)] for j in JOBS
    ]
    foods = [
        [Fact("food kind", f.name, f.kind, f.plural), Fact("food colour", f.name, f.colour, f.plural)] for f in FOODS
    ]
    return countries + animals + jobs + foods


def _words() -> list[Fact]:
    facts = _both_ways("opposite", OPPOSITES) + _both_ways("synonym", SYNONYMS)
    facts += [Fact("plural", one, many) for one, many in PLURALS]
    facts += [Fact("past", verb.base, verb.past) for verb in VERBS]
    facts += _neighbours("day", DAYS) + _neighbours("month", MONTHS)
    facts += [Fact("number after", a, b) for a, b in itertools.pairwise(NUMBERS)]
    return facts + [Fact("symbol", name, symbol) for name, symbol in ELEMENTS]


ENTITY_FACTS = _entities()
WORD_FACTS = _words()
ALL_FACTS = [fact for facts in ENTITY_FACTS for fact in facts] + WORD_FACTS
