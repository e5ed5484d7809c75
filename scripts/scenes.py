"""Small random scenes (a person, a ticket, a story ...): a text and the fields that it holds.

The corpus tells about them and sample.jsonl asks about them. Names and numbers are partly invented, so that
a model can only copy them from the text: that is how it learns to look things up.
"""

import json
import re
from dataclasses import dataclass
from random import Random

from facts import PLURALS, capitalise, with_article
from split import is_reserved, sentences_of, split_by
from wordlists import (
    BAD_ENDINGS,
    BAD_WORDS,
    GOOD_ENDINGS,
    GOOD_WORDS,
    ISSUES,
    MEN,
    PLACES,
    REMEDIES,
    REVIEWED,
    SURNAMES,
    THING_ADJECTIVES,
    THINGS,
    TOPICS,
    WOMEN,
)
from world import (
    ANIMALS,
    COLOURS,
    COUNTRIES,
    DAYS,
    DRINKS,
    FOODS,
    JOBS,
    MONTHS,
    NUMBERS,
    PLANETS,
    VERBS,
    words,
)

ONSETS = words("b d f g k l m n p r s t v z br dr gr kr tr st sh ch")
ENDINGS = [*words("n r l s t k m"), "nd", "rt", *[""] * 6]
IRREGULAR_PLURALS = dict(PLURALS)

# What a scene can be asked for: the field's name in words, and in the scene's fields.
LABELS: dict[str, dict[str, str]] = {
    "person": {"name": "name", "age": "age", "job": "job", "city": "city"},
    "ticket": {"ticket number": "ticket", "customer": "customer", "priority": "priority", "day": "day"},
    "invoice": {"invoice number": "invoice", "customer": "customer", "total": "total", "due date": "due"},
    "prescription": {"patient": "patient", "age": "age", "medicine": "medicine", "dose": "dose"},
    "order": {"item": "item", "colour": "colour", "quantity": "quantity", "city": "city"},
}

TEXTS: dict[str, tuple[str, ...]] = {
    "person": (
        "{name} is {age} years old, lives in {city} and works as {a_job}.",
        "{name} is {a_job} from {city}. {They} is {age} years old.",
        "In {city} lives {a_job} named {name}, aged {age}.",
        "{name}, {age}, is {a_job} in {city}.",
        "Our neighbour {name} moved to {city} and became {a_job}. {They} turned {age} this year.",
        "{They} is called {name}, is {age} years old and works as {a_job} in {city}.",
    ),
    "ticket": (
        "Ticket {ticket}: {customer} reports that {issue}. Priority: {priority}. Opened on {day}.",
        "On {day} {customer} opened ticket {ticket} with {priority} priority because {issue}.",
        "{customer} called on {day} and said that {issue}. The call became ticket {ticket}, priority {priority}.",
        "New ticket {ticket} from {customer}, {day}, {priority} priority: {issue}.",
    ),
    "invoice": (
        "Invoice {invoice} for {customer}: {count} {items}, total {total} dollars, due on {due}.",
        "{customer} bought {count} {items}. Invoice {invoice} asks for {total} dollars by {due}.",
        "By {due} {customer} must pay {total} dollars for {count} {items}. This is invoice {invoice}.",
        "Our invoice {invoice} went to {customer}. It lists {count} {items} for {total} dollars and is due on {due}.",
    ),
    "prescription": (
        "{patient}, {age} years old, came with {problem}. The doctor gave {medicine} {dose}.",
        "Patient {patient}, age {age}, has {problem} and takes {medicine} {dose} every day.",
        "Clinic note: {patient} ({age}) with {problem}. Treatment: {medicine} {dose}.",
        "For {problem} the doctor gave {patient}, {age}, the medicine {medicine}, {dose} a day.",
    ),
    "order": (
        "Please send {quantity} {colour} {items} to our shop in {city}.",
        "The shop in {city} orders {quantity} {items}. The colour must be {colour}.",
        "We need {quantity} {items} in {colour} at our office in {city}.",
        "Order for {city}: {quantity} {items}, all of them {colour}.",
    ),
}

# Each plot: the story, its one-sentence summary.
PLOTS = (
    (
        "On {day} {a} went to the {place}. {They} lost {their} {colour} {thing} there. {b} found it"
        " near the {place2}"
        " and gave it back.",
        "{a} lost {a_thing} and {b} found it.",
    ),
    (
        "{a} wanted {a_colour} {thing}. On {day} {they} walked to the {place} and bought one. On the"
        " way home {they}"
        " met {b} near the {place2}.",
        "{a} bought {a_thing} and met {b}.",
    ),
    (
        "{b} had {a_colour} {thing}. On {day} {a} took it to the {place} and broke it. {They} was"
        " sorry and repaired"
        " it at the {place2}.",
        "{a} broke the {thing} of {b} and repaired it.",
    ),
    (
        "It was {day}. {a} sat near the {place} with {a_colour} {thing}. Then {b} came from the"
        " {place2}. {a} gave the"
        " {thing} to {b} as a present.",
        "{a} gave {a_thing} to {b}.",
    ),
    (
        "{a} needed {a_colour} {thing} for the {place}. On {day} {they} asked {b} near the {place2}."
        " {b} was kind and"
        " lent it for a week.",
        "{b} lent {a_thing} to {a}.",
    ),
    (
        "On {day} {a} and {b} went to the {place}. There they saw {a_colour} {thing} in the grass."
        " They carried it to"
        " the {place2}, but nobody knew the owner.",
        "{a} and {b} found {a_thing}.",
    ),
)

REVIEW_TEXTS = (
    "The {one} was {w1} and the {two} was {w2}.",
    "I think the {one} was really {w1}. {end}",
    "What {a_w1} {one}! {end}",
    "We found the {one} {w1}, and the {two} was {w2} too.",
    "{a} says that the {one} is {w1}. {end}",
    "On {day} we tried the {one}. It was {w1} and {w2}.",
)

CATEGORIES: dict[str, list[str]] = {
    "animal": [a.name for a in ANIMALS],
    "bird": [a.name for a in ANIMALS if a.group == "bird"],
    "fruit": [f.name for f in FOODS if f.kind == "fruit"],
    "vegetable": [f.name for f in FOODS if f.kind == "vegetable"],
    "drink": DRINKS,
    "colour": COLOURS,
    "job": [j.name for j in JOBS],
    "country": [c.name for c in COUNTRIES],
    "city": [c.capital for c in COUNTRIES],
    "month": MONTHS,
    "planet": PLANETS,
    "number": NUMBERS[1:],
}
# Kinds whose words take an article: "a lion", but "Paris", "milk", "red".
COUNTABLE = ("animal", "bird", "fruit", "vegetable", "job")
CATEGORY_PLURALS = {name: name[:-1] + "ies" if name.endswith("y") else name + "s" for name in CATEGORIES}
NOUNS = [*CATEGORIES["animal"], *CATEGORIES["fruit"], *CATEGORIES["vegetable"], *THINGS, *CATEGORIES["job"]]
WORD_POOLS = [
    NOUNS,
    NOUNS,
    THINGS,
    CATEGORIES["animal"],
    CATEGORIES["fruit"] + CATEGORIES["vegetable"],
    COLOURS,
    CATEGORIES["job"],
]


@dataclass(frozen=True)
class Scene:
    kind: str
    text: str
    fields: dict[str, str | int]


@dataclass(frozen=True)
class Deed:
    """One sentence about a person who does something to a thing, in its present and past form."""

    who: str
    thing: str
    present: str
    past: str


def _text_is_reserved(scene: "Scene") -> bool:
    return is_reserved(scene.text)


def invent_name(rng: Random) -> str:
    syllables = [rng.choice(ONSETS) + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3)))]
    return capitalise("".join(syllables) + rng.choice(ENDINGS))


def pick_person(rng: Random, invented: float = 0.3) -> tuple[str, str]:
    """First name and pronoun; a share of the names is invented."""
    names, pronoun = rng.choice(((WOMEN, "she"), (MEN, "he")))
    return (invent_name(rng) if rng.random() < invented else rng.choice(names)), pronoun


def pick_two(rng: Random) -> tuple[str, str]:
    one, _ = pick_person(rng)
    other, _ = pick_person(rng)
    return (one, other) if one != other else pick_two(rng)


def pick_full_name(rng: Random) -> tuple[str, str]:
    first, pronoun = pick_person(rng)
    last = invent_name(rng) if rng.random() < 0.3 else rng.choice(SURNAMES)
    return f"{first} {last}", pronoun


def pick_code(rng: Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(rng.choice((1, 2))))
    return f"{letters}-{rng.randint(100, 9999)}"


@split_by(lambda words: is_reserved(", ".join(words)))
def pick_words(rng: Random, count: int) -> list[str]:
    return rng.sample(rng.choice(WORD_POOLS), count)


def pluralise(noun: str) -> str:
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def join_words(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def swap_word(text: str, old: str, new: str) -> str:
    """Replace the first whole word `old`: the car in "carried the car" is the second."""
    return re.sub(rf"\b{re.escape(old)}\b", new, text, count=1)


def _fill(rng: Random, kind: str, fields: dict[str, str | int]) -> Scene:
    return Scene(kind, rng.choice(TEXTS[kind]).format(**fields), fields)


@split_by(_text_is_reserved)
def make_person(rng: Random) -> Scene:
    name, pronoun = pick_full_name(rng)
    job = rng.choice(JOBS).name
    city = invent_name(rng) if rng.random() < 0.2 else rng.choice(COUNTRIES).capital
    fields = {"name": name, "age": rng.randint(18, 89), "job": job, "city": city}
    return _fill(rng, "person", fields | {"a_job": with_article(job), "They": capitalise(pronoun)})


def make_ticket(rng: Random, held_out: bool = False) -> Scene:
    """Held out are whole issues, so that a held-out ticket tells of one that no other text names."""
    team = rng.choice(list(ISSUES))
    issue = rng.choice(sentences_of(ISSUES[team], held_out))
    fields = {"ticket": pick_code(rng), "customer": pick_full_name(rng)[0], "issue": issue, "team": team}
    return _fill(rng, "ticket", fields | {"priority": rng.choice(("low", "medium", "high")), "day": rng.choice(DAYS)})


@split_by(_text_is_reserved)
def make_invoice(rng: Random) -> Scene:
    due = f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
    fields = {"invoice": rng.randint(1000, 9999), "customer": pick_full_name(rng)[0], "due": due}
    item = {"count": rng.randint(2, 9), "items": pluralise(rng.choice(THINGS)), "total": rng.randint(5, 400)}
    return _fill(rng, "invoice", fields | item)


@split_by(_text_is_reserved)
def make_prescription(rng: Random) -> Scene:
    problem, medicine, dose = rng.choice(REMEDIES)
    fields = {
        "patient": pick_full_name(rng)[0],
        "age": rng.randint(3, 90),
        "medicine": medicine,
        "dose": dose,
    }
    return _fill(rng, "prescription", fields | {"problem": problem})


@split_by(_text_is_reserved)
def make_order(rng: Random) -> Scene:
    items = pluralise(rng.choice(THINGS))
    city = invent_name(rng) if rng.random() < 0.3 else rng.choice(COUNTRIES).capital
    fields = {
        "item": items,
        "items": items,
        "colour": rng.choice(COLOURS),
        "quantity": rng.randint(2, 99),
        "city": city,
    }
    return _fill(rng, "order", fields)


RECORDS = (make_person, make_person, make_ticket, make_invoice, make_prescription, make_order)


def make_record(rng: Random, held_out: bool = False) -> Scene:
    return rng.choice(RECORDS)(rng, held_out=held_out)


def write_json(scene: Scene, labels: list[str]) -> str:
    """The chosen labels as one JSON object, in the order asked for."""
    return json.dumps({label: scene.fields[LABELS[scene.kind][label]] for label in labels})


@split_by(_text_is_reserved)
def make_story(rng: Random) -> Scene:
    plot, summary = rng.choice(PLOTS)
    a, pronoun = pick_person(rng)
    b = next(name for name in iter(lambda: pick_person(rng)[0], "") if name != a)
    thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
    place, place2 = rng.sample(PLACES, 2)
    fields = {
        "a": a,
        "b": b,
        "they": pronoun,
        "They": capitalise(pronoun),
        "their": {"she": "her", "he": "his"}[pronoun],
    }
    fields |= {"day": rng.choice(DAYS), "place": place, "place2": place2, "thing": thing, "colour": colour}
    fields |= {"a_thing": with_article(thing), "a_colour": with_article(colour)}
    return Scene("story", plot.format(**fields), fields | {"summary": summary.format(**fields)})


@split_by(_text_is_reserved)
def make_review(rng: Random) -> Scene:
    mood = rng.choice(("positive", "negative"))
    words, ends = (GOOD_WORDS, GOOD_ENDINGS) if mood == "positive" else (BAD_WORDS, BAD_ENDINGS)
    w1, w2 = rng.sample(words, 2)
    one, two = rng.sample(REVIEWED, 2)
    fields = {"w1": w1, "w2": w2, "a_w1": with_article(w1), "one": one, "two": two, "end": rng.choice(ends)}
    text = rng.choice(REVIEW_TEXTS).format(**fields, a=pick_person(rng)[0], day=rng.choice(DAYS))
    return Scene("review", text, {"mood": mood})


def make_topic(rng: Random, held_out: bool = False) -> Scene:
    """Held out are single sentences: none of them stands in any other text."""
    topic = rng.choice(list(TOPICS))
    sentences = rng.sample(sentences_of(TOPICS[topic], held_out), rng.choice((1, 1, 2)))
    return Scene("topic", " ".join(sentences), {"topic": topic})


@split_by(lambda deed: is_reserved(deed.past))
def make_deed(rng: Random) -> Deed:
    verb, (who, _) = rng.choice(VERBS), pick_person(rng)
    thing, colour, adjective = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(THING_ADJECTIVES)
    objects = (f"the {thing}", with_article(f"{colour} {thing}"), f"the {adjective} {thing}")
    end = rng.choice(("", "", f" near the {rng.choice(PLACES)}", f" on {rng.choice(DAYS)}")) + "."
    rest = rng.choice(objects) + end
    return Deed(who, thing, f"{who} {verb.third} {rest}", f"{who} {verb.past} {rest}")


def draw_swap(rng: Random) -> tuple[Deed, str, str]:
    """A deed, a word of it and another for its place; the changed sentence is no held-out text either."""
    while True:
        deed = make_deed(rng)
        old, new = rng.choice(((deed.who, pick_person(rng)[0]), (deed.thing, rng.choice(THINGS))))
        if not is_reserved(swap_word(deed.past, old, new)):
            return deed, old, new


@split_by(is_reserved)
def make_phrase(rng: Random) -> str:
    """Any short text, for copying and for capital letters."""
    kind = rng.randrange(5)
    if kind == 0:
        return " ".join(rng.choice(NOUNS + COLOURS) for _ in range(rng.randint(1, 4)))
    if kind == 1:
        return make_deed(rng).present
    if kind == 2:
        return " ".join(invent_name(rng) for _ in range(rng.randint(1, 3)))
    return pick_code(rng) if kind == 3 else str(make_topic(rng).text)
