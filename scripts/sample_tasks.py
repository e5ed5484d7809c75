"""The task types of the sample files: each function draws one row of its task."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import questions as q
from corpus_work import draw_members
from facts import ENTITY_FACTS, SENTENCES, WORD_FACTS, Fact, state, with_article
from questions import Phrases
from scenes import (
    CATEGORIES,
    CATEGORY_PLURALS,
    COUNTABLE,
    LABELS,
    Deed,
    Scene,
    invent_name,
    join_words,
    make_deed,
    make_record,
    make_review,
    make_story,
    make_ticket,
    make_topic,
    pick_words,
    swap_word,
    write_json,
)
from split import ENTITIES, SHORTEST_LIST, is_reserved
from wordlists import EXCLAMATIONS, MEN, SURNAMES, THINGS, WOMEN
from world import ANIMALS, COLOURS, COUNTRIES, DAYS, JOBS, MONTHS, NUMBERS, VERBS, words

Row = dict[str, object]
Item = TypeVar("Item", Scene, Deed)
FIRST_NAMES = [*WOMEN, *MEN]
KNOWN_NAMES = {word for name in (*FIRST_NAMES, *SURNAMES, *(c.capital for c in COUNTRIES)) for word in name.split()}
NAME_FIELDS = ("name", "customer", "patient", "city", "a", "b")
COUNTRY_FACTS, ANIMAL_FACTS, JOB_FACTS = (
    [fact for facts in ENTITY_FACTS for fact in facts if fact.subject in {entity.name for entity in table}]
    for table in (COUNTRIES, ANIMALS, JOBS)
)
FOOD_FACTS = [fact for facts in ENTITY_FACTS for fact in facts]
OPPOSITE_FACTS = [fact for fact in WORD_FACTS if fact.relation == "opposite"]
FORM_FACTS = [fact for fact in WORD_FACTS if fact.relation in ("plural", "past")]
HELD_OUT_VERBS = {form for verb in VERBS if is_reserved(verb.base, ENTITIES) for form in (verb.third, verb.past)}
# Openings after which a sentence starts with a capital letter.
OPENINGS = [text for text in EXCLAMATIONS if text[-1] in "!."]
# Sentences that the base may read, and a person would not: left out of the rows.
ODD_TEXTS = ("has a high fever since", "has a light fever since", "scanner does not print", "login page shows an error")
ODD_IN_REVIEWS = words("dirty boring broken ugly useless disgusting noisy helpful comfortable beautiful charming")
INVENTED = 0.05  # share of rows with an invented name: it reads oddly, yet tests copying
SERIES = (("days", DAYS), ("months", MONTHS), ("numbers", NUMBERS[1:]))


@dataclass(frozen=True)
class Draw:
    """What a row is made from: one side of the split, and the phrasings of the pairs or new ones."""

    rng: Random
    held_out: bool = False
    new: bool = False

    def phrase(self, phrases: Phrases) -> str:
        return self.rng.choice(phrases.new if self.new else phrases.trained)

    def mine(self, entity: str) -> bool:
        """Whether an entity stands on this side of the split."""
        return is_reserved(entity, ENTITIES) == self.held_out

    def fact(self, facts: list[Fact]) -> Fact:
        """An opposite and its reverse are one pair of words, and stand on the same side."""
        keys = {fact: " ".join(sorted((fact.subject, fact.value))) for fact in facts if fact.relation == "opposite"}
        return self.rng.choice([fact for fact in facts if self.mine(keys.get(fact, fact.subject))])

    def name(self) -> str:
        if self.rng.random() < INVENTED:
            return invent_name(self.rng)
        return self.rng.choice([name for name in FIRST_NAMES if self.mine(name)])

    def words(self, fewest: int, most: int) -> list[str]:
        fewest = max(fewest, SHORTEST_LIST) if self.held_out else fewest
        return pick_words(self.rng, self.rng.randint(fewest, most), held_out=self.held_out)

    def item(self, make: Callable[..., Item]) -> Item:
        """Draw a scene or deed of this side whose people are of this side too."""
        while True:
            item = make(self.rng, held_out=self.held_out)
            fields = {"a": item.who} if isinstance(item, Deed) else item.fields
            names = [str(fields[key]) for key in NAME_FIELDS if key in fields]
            known = all(word in KNOWN_NAMES for name in names for word in name.split())
            text = item.past if isinstance(item, Deed) else item.text
            odd = any(odd in text for odd in ODD_TEXTS)
            people = [word for word in re.findall(r"\w+", text) if word in FIRST_NAMES]
            if not odd and (known or self.rng.random() < INVENTED) and all(self.mine(first) for first in people):
                return item


def single(draw: Draw, phrases: Phrases, text: str, output: str, **words: str) -> Row:
    """One question and its answer; a text that has no place in the phrase goes into "input"."""
    phrase = draw.phrase(phrases)
    row: Row = {"instruction": phrase.format(text=text, **words)}
    if text and "{text}" not in phrase:
        row["input"] = text
    return row | {"output": output}


def chat(*turns: str, system: str = "") -> Row:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": messages + [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


def ask_fact(fact: Fact, draw: Draw) -> tuple[str, str]:
    return state(fact, draw.phrase(q.FACT_QUESTIONS[fact.relation])), state(fact, SENTENCES[fact.relation][0])


def fact_row(facts: list[Fact], draw: Draw) -> Row:
    fact = draw.fact(facts)
    question, answer = ask_fact(fact, draw)
    if draw.rng.random() < 0.2 and fact.relation != "work":
        question, answer = f"{question} {draw.rng.choice(q.ONLY_THE_ANSWER)}", fact.value
    return {"instruction": question, "output": answer}


def country_row(draw: Draw) -> Row:
    return fact_row(COUNTRY_FACTS, draw)


def animal_row(draw: Draw) -> Row:
    return fact_row(ANIMAL_FACTS, draw)


def job_row(draw: Draw) -> Row:
    return fact_row(JOB_FACTS, draw)


def words_row(draw: Draw) -> Row:
    return fact_row(draw.rng.choice((OPPOSITE_FACTS, FORM_FACTS)), draw)


def field_row(draw: Draw) -> Row:
    scene = draw.item(make_record)
    label = draw.rng.choice(list(LABELS[scene.kind]))
    value = scene.fields[LABELS[scene.kind][label]]
    if draw.rng.random() < 0.5:
        return single(draw, q.FIELD_SENTENCES, scene.text, f"The {label} is {value}.", label=label)
    return single(draw, q.FIELD_VALUES, scene.text, str(value), label=label)


def json_row(draw: Draw) -> Row:
    scene = draw.item(make_record)
    labels = draw.rng.sample(list(LABELS[scene.kind]), draw.rng.randint(2, 3))
    named, keys = "the " + join_words(labels), ", ".join(labels)
    return single(draw, q.JSON_PHRASES, scene.text, write_json(scene, labels), labels=named, keys=keys)


def draw_topic(draw: Draw) -> Scene:
    """One sentence, or two that don't start alike: those may contradict each other."""
    while True:
        scene = draw.item(make_topic)
        starts = [sentence.split()[:3] for sentence in scene.text.split(". ")]
        if len(starts) == 1 or starts[0] != starts[1]:
            return scene


def sentiment_row(draw: Draw) -> Row:
    """Only of words that fit whatever is reviewed."""
    scene = draw.item(make_review)
    while any(odd in scene.text for odd in ODD_IN_REVIEWS):
        scene = draw.item(make_review)
    return single(draw, q.SENTIMENT_PHRASES, scene.text, str(scene.fields["mood"]))


def topic_row(draw: Draw) -> Row:
    scene = draw_topic(draw)
    return single(draw, q.TOPIC_PHRASES, scene.text, str(scene.fields["topic"]))


def ticket_row(draw: Draw) -> Row:
    scene = draw.item(make_ticket)
    return single(draw, q.TEAM_PHRASES, scene.text, str(scene.fields["team"]))


def yes_no_row(draw: Draw) -> Row:
    """Half of the answers are yes; a word that belongs to two kinds (orange) is never a no to either."""
    kind, other = draw.rng.sample(list(CATEGORIES), 2)
    word = draw.rng.choice([word for word in CATEGORIES[kind] if draw.mine(word)] or CATEGORIES[kind])
    if not draw.mine(word):
        return yes_no_row(draw)
    asked = draw.rng.choice((kind, other))
    answer = "Yes" if word in CATEGORIES[asked] else "No"
    named = with_article(word) if kind in COUNTABLE else word
    return single(draw, q.YES_NO_PHRASES, "", answer, word=named, kind=with_article(asked))


def past_row(draw: Draw) -> Row:
    """Held out are whole verbs."""
    while True:
        deed = draw.item(make_deed)
        if (deed.present.split()[1] in HELD_OUT_VERBS) == draw.held_out:
            return single(draw, q.PAST_PHRASES, deed.present, deed.past)


def capitals_row(draw: Draw) -> Row:
    texts = (draw.item(make_deed).present, draw_topic(draw).text, " ".join(draw.words(2, 4)))
    text = draw.rng.choice(texts)
    return single(draw, q.CAPITALS_PHRASES, text, text.upper())


def replace_row(draw: Draw) -> Row:
    deed, name = draw.item(make_deed), draw.name()
    things = [thing for thing in THINGS if thing != deed.thing]
    old, new = draw.rng.choice(((deed.who, name), (deed.thing, draw.rng.choice(things))))
    if old == new:
        return replace_row(draw)
    return single(draw, q.REPLACE_PHRASES, deed.past, swap_word(deed.past, old, new), old=old, new=new)


def list_row(draw: Draw) -> Row:
    """A list with one right answer: neighbours in a known order, or the words of one kind."""
    if draw.rng.random() < 0.3:
        return series_row(draw)
    words: list[str] = []
    while len(words) < SHORTEST_LIST:
        words, members, kind = draw_members(draw.rng, held_out=draw.held_out)
    return single(draw, q.MEMBER_PHRASES, ", ".join(words), ", ".join(members), many=CATEGORY_PLURALS[kind])


def series_row(draw: Draw) -> Row:
    name, series = draw.rng.choice(SERIES)
    count = draw.rng.randint(2, 3)  # of four, the tuned base gave three
    start = draw.rng.randrange(len(series) - count)
    if not draw.mine(f"after {series[start]}"):
        return series_row(draw)
    run = ", ".join(series[start + 1 : start + 1 + count])
    return single(draw, q.SERIES_PHRASES, "", run, count=NUMBERS[count], series=name, start=series[start])


def bullets_row(draw: Draw) -> Row:
    words = draw.words(2, 5)
    return single(draw, q.BULLET_PHRASES, ", ".join(words), "\n".join(f"- {word}" for word in words))


def sort_row(draw: Draw) -> Row:
    words = draw.words(2, 4)
    return single(draw, q.SORT_PHRASES, ", ".join(words), ", ".join(sorted(words)))


def count_row(draw: Draw) -> Row:
    words = draw.words(2, 6)
    return single(draw, q.COUNT_PHRASES, ", ".join(words), str(len(words)))


def summary_row(draw: Draw) -> Row:
    scene = draw.item(make_story)
    return single(draw, q.SUMMARY_PHRASES, scene.text, str(scene.fields["summary"]))


def memory_row(draw: Draw) -> Row:
    """What the user said earlier: a name, a colour, a town, or what the talk is about."""
    return draw.rng.choice((_name_talk, _told_talk, _follow_up_talk))(draw)


def _between(draw: Draw) -> tuple[str, ...]:
    facts = COUNTRY_FACTS + ANIMAL_FACTS + JOB_FACTS + OPPOSITE_FACTS
    return ask_fact(draw.fact(facts), draw) if draw.rng.random() < 0.6 else ()


def _name_talk(draw: Draw) -> Row:
    a = draw.name()
    hello, reply = draw.phrase(q.GREETINGS).format(a=a), q.GREETING_REPLY.format(a=a)
    return chat(hello, reply, *_between(draw), draw.phrase(q.NAME_QUESTIONS), f"Your name is {a}.")


def _told_talk(draw: Draw) -> Row:
    """A colour or a town; a held-out row tells of one that no pair tells of."""
    colours = [colour for colour in COLOURS if draw.mine(colour)]
    towns = [country.capital for country in COUNTRIES if draw.mine(country.name)]
    if draw.rng.random() < 0.5:
        v = draw.rng.choice(colours)
        said, asked, answer = q.FAVOURITE_STATEMENTS, q.FAVOURITE_QUESTIONS, f"Your favourite colour is {v}."
    else:
        v = draw.rng.choice(towns)
        said, asked, answer = q.TOWN_STATEMENTS, q.TOWN_QUESTIONS, f"You live in {v}."
    return chat(draw.phrase(said).format(v=v), q.TOLD_REPLY, *_between(draw), draw.phrase(asked), answer)


def _follow_up_talk(draw: Draw) -> Row:
    first = draw.fact(COUNTRY_FACTS)
    others = [f for f in COUNTRY_FACTS if f.subject == first.subject and f.relation != first.relation]
    second = draw.rng.choice(others)
    follow_up = draw.phrase(q.FOLLOW_UPS).format(relation=second.relation)
    return chat(*ask_fact(first, draw), follow_up, state(second, SENTENCES[second.relation][0]))


def small_talk_row(draw: Draw) -> Row:
    """Thanks, goodbye and how-are-you after a question; half of the talks start with a greeting."""
    hello = (draw.rng.choice(q.HELLOS), q.HELLO_REPLY) if draw.rng.random() < 0.5 else ()
    asked = ask_fact(draw.fact(COUNTRY_FACTS + ANIMAL_FACTS + JOB_FACTS), draw)
    answer, said = draw.rng.choice(list(q.SMALL_TALK.items()))
    return chat(*hello, *asked, draw.phrase(said), answer)


def system_row(draw: Draw) -> Row:
    """A system prompt that sets the form of the answers, half of the time of two."""
    opening, name = draw.rng.choice(OPENINGS), draw.name()
    forms: tuple[tuple[str, Callable[[Fact, str], str]], ...] = (
        (draw.phrase(q.OPENING_SYSTEMS).format(opening=opening), lambda _, answer: f"{opening} {answer}"),
        (draw.phrase(q.CAPITALS_SYSTEMS), lambda _, answer: answer.upper()),
        (draw.phrase(q.JSON_SYSTEMS), lambda fact, _: json.dumps({"answer": fact.value})),
    )
    if draw.rng.random() < 0.25:
        persona = draw.phrase(q.PERSONA_SYSTEMS).format(a=name)
        return chat(draw.phrase(q.PERSONA_QUESTIONS), f"I am {name}.", system=persona)
    system, form = draw.rng.choice(forms)
    turns: list[str] = []
    for _ in range(draw.rng.choice((1, 2))):
        fact = draw.fact(COUNTRY_FACTS + ANIMAL_FACTS + OPPOSITE_FACTS + FORM_FACTS)
        question, answer = ask_fact(fact, draw)
        turns += question, form(fact, answer)
    return chat(*turns, system=system)


def _unseen_fact(relation: str) -> Callable[[Draw], Row]:
    facts = [fact for fact in (*FOOD_FACTS, *WORD_FACTS) if fact.relation == relation]

    def make(draw: Draw) -> Row:
        question, answer = ask_fact(draw.rng.choice(facts), draw)
        return {"instruction": question, "output": answer}

    return make


def last_word_row(draw: Draw) -> Row:
    words = draw.words(3, 5)
    return single(draw, q.LAST_WORD_PHRASES, ", ".join(words), words[-1])


def backwards_row(draw: Draw) -> Row:
    words = draw.words(3, 4)
    return single(draw, q.BACKWARDS_PHRASES, ", ".join(words), ", ".join(words[::-1]))


def repeat_row(draw: Draw) -> Row:
    text = draw_topic(draw).text
    return single(draw, q.REPEAT_PHRASES, text, text)


TASKS: dict[str, Callable[[Draw], Row]] = {
    "country": country_row,
    "animal": animal_row,
    "job": job_row,
    "words": words_row,
    "extract_field": field_row,
    "extract_json": json_row,
    "sentiment": sentiment_row,
    "topic": topic_row,
    "ticket_team": ticket_row,
    "yes_no": yes_no_row,
    "past_tense": past_row,
    "capitals": capitals_row,
    "replace_word": replace_row,
    "list_items": list_row,
    "bullets": bullets_row,
    "sort_words": sort_row,
    "count_words": count_row,
    "summary": summary_row,
    "memory": memory_row,
    "system_format": system_row,
}
# Its few fixed answers are learned by heart: in the pairs, so that a chat is polite, but never scored.
UNSCORED_TASKS: dict[str, Callable[[Draw], Row]] = {"small_talk": small_talk_row}
UNSEEN_TASKS: dict[str, Callable[[Draw], Row]] = {
    "symbol": _unseen_fact("symbol"),
    "synonym": _unseen_fact("synonym"),
    "food_colour": _unseen_fact("food colour"),
    "last_word": last_word_row,
    "backwards": backwards_row,
    "repeat": repeat_row,
}
