"""Write sample.jsonl: instruction rows about the same world that the built-in base has read about.

    python scripts/make_sample.py

The same seed gives the same file. Single-turn rows are alpaca style (instruction, input where useful,
output); rows with several turns or a system prompt hold messages. Every row names its task.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TypeVar

import questions as q
from facts import ENTITY_FACTS, SENTENCES, WORD_FACTS, Fact, capitalise, state, with_article
from scenes import (
    CATEGORIES,
    CATEGORY_PLURALS,
    LABELS,
    Deed,
    Scene,
    join_words,
    make_deed,
    make_record,
    make_review,
    make_story,
    make_ticket,
    make_topic,
    pick_person,
    pick_words,
    swap_word,
    write_json,
)
from wordlists import EXCLAMATIONS, MEN, SURNAMES, THINGS, WOMEN
from world import ANIMALS, COLOURS, COUNTRIES, DAYS, JOBS, MONTHS, NUMBERS

Row = dict[str, object]
Item = TypeVar("Item", Scene, Deed)
KNOWN_NAMES = {word for name in (*WOMEN, *MEN, *SURNAMES, *(c.capital for c in COUNTRIES)) for word in name.split()}
NAME_FIELDS = ("name", "customer", "patient", "city", "a", "b")
COUNTRY_FACTS, ANIMAL_FACTS, JOB_FACTS = (
    [fact for facts in ENTITY_FACTS for fact in facts if fact.subject in {entity.name for entity in table}]
    for table in (COUNTRIES, ANIMALS, JOBS)
)
OPPOSITE_FACTS = [fact for fact in WORD_FACTS if fact.relation == "opposite"]
FORM_FACTS = [fact for fact in WORD_FACTS if fact.relation in ("plural", "past")]
# Openings after which a sentence starts with a capital letter.
OPENINGS = [text for text in EXCLAMATIONS if text[-1] in "!."]
# Kinds whose words take an article: "a lion", but "Paris", "milk", "red".
COUNTABLE = ("animal", "bird", "fruit", "vegetable", "job")


def single(rng: Random, phrases: tuple[str, ...], text: str, output: str, **words: str) -> Row:
    """One question and its answer; a text that has no place in the phrase goes into "input"."""
    phrase = rng.choice(phrases)
    row: Row = {"instruction": phrase.format(text=text, **words)}
    if text and "{text}" not in phrase:
        row["input"] = text
    return row | {"output": output}


def chat(*turns: str, system: str = "") -> Row:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": messages + [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


def draw(make: Callable[[Random], Item], rng: Random) -> Item:
    """Draw until the names are real, but for one in twenty: invented ones read oddly, yet test copying."""
    while True:
        item = make(rng)
        fields = {"a": item.who} if isinstance(item, Deed) else item.fields
        names = " ".join(str(fields[key]) for key in NAME_FIELDS if key in fields)
        if set(names.split()) <= KNOWN_NAMES or rng.random() < 0.05:
            return item


def ask_fact(fact: Fact, rng: Random) -> tuple[str, str]:
    return state(fact, rng.choice(q.FACT_QUESTIONS[fact.relation])), state(fact, SENTENCES[fact.relation][0])


def fact_row(facts: list[Fact], rng: Random) -> Row:
    fact = rng.choice(facts)
    question, answer = ask_fact(fact, rng)
    if rng.random() < 0.2 and fact.relation != "work":
        question, answer = f"{question} {rng.choice(q.ONLY_THE_ANSWER)}", fact.value
    return {"instruction": question, "output": answer}


def country_row(rng: Random) -> Row:
    return fact_row(COUNTRY_FACTS, rng)


def animal_row(rng: Random) -> Row:
    return fact_row(ANIMAL_FACTS, rng)


def job_row(rng: Random) -> Row:
    return fact_row(JOB_FACTS, rng)


def words_row(rng: Random) -> Row:
    return fact_row(rng.choice((OPPOSITE_FACTS, FORM_FACTS)), rng)


def field_row(rng: Random) -> Row:
    scene = draw(make_record, rng)
    label = rng.choice(list(LABELS[scene.kind]))
    value = scene.fields[LABELS[scene.kind][label]]
    if rng.random() < 0.5:
        return single(rng, q.FIELD_SENTENCES, scene.text, f"The {label} is {value}.", label=label)
    return single(rng, q.FIELD_VALUES, scene.text, str(value), label=label)


def json_row(rng: Random) -> Row:
    scene = draw(make_record, rng)
    labels = rng.sample(list(LABELS[scene.kind]), rng.randint(2, 3))
    named, keys = "the " + join_words(labels), ", ".join(labels)
    return single(rng, q.JSON_PHRASES, scene.text, write_json(scene, labels), labels=named, keys=keys)


def sentiment_row(rng: Random) -> Row:
    scene = make_review(rng)
    return single(rng, q.SENTIMENT_PHRASES, scene.text, str(scene.fields["mood"]))


def topic_row(rng: Random) -> Row:
    scene = make_topic(rng)
    return single(rng, q.TOPIC_PHRASES, scene.text, str(scene.fields["topic"]))


def ticket_row(rng: Random) -> Row:
    scene = draw(make_ticket, rng)
    return single(rng, q.TEAM_PHRASES, scene.text, str(scene.fields["team"]))


def yes_no_row(rng: Random) -> Row:
    """Half of the answers are yes; a word that belongs to two kinds (orange) is never a no to either."""
    kind, other = rng.sample(list(CATEGORIES), 2)
    word = rng.choice(CATEGORIES[kind])
    asked = rng.choice((kind, other))
    answer = "Yes" if word in CATEGORIES[asked] else "No"
    named = with_article(word) if kind in COUNTABLE else word
    return single(rng, q.YES_NO_PHRASES, "", answer, word=named, kind=with_article(asked))


def past_row(rng: Random) -> Row:
    deed = draw(make_deed, rng)
    return single(rng, q.PAST_PHRASES, deed.present, deed.past)


def capitals_row(rng: Random) -> Row:
    texts = (draw(make_deed, rng).present, make_topic(rng).text, " ".join(pick_words(rng, rng.randint(2, 4))))
    text = rng.choice(texts)
    return single(rng, q.CAPITALS_PHRASES, text, text.upper())


def replace_row(rng: Random) -> Row:
    deed, name = draw(make_deed, rng), pick_person(rng, invented=0.05)[0]
    old, new = rng.choice(((deed.who, name), (deed.thing, rng.choice(THINGS))))
    return single(rng, q.REPLACE_PHRASES, deed.past, swap_word(deed.past, old, new), old=old, new=new)


def list_row(rng: Random) -> Row:
    """A list with one right answer: neighbours in a known order, or the words of one kind."""
    if rng.random() < 0.3:
        name, series = rng.choice((("days", DAYS), ("months", MONTHS), ("numbers", NUMBERS[1:])))
        count = rng.randint(2, 4)
        start = rng.randrange(len(series) - count)
        run = ", ".join(series[start + 1 : start + 1 + count])
        return single(rng, q.SERIES_PHRASES, "", run, count=NUMBERS[count], series=name, start=series[start])
    kind, other = rng.sample([k for k in CATEGORIES if k not in ("animal", "number")], 2)
    members = rng.sample(CATEGORIES[kind], rng.randint(2, 3))
    strangers = rng.sample([w for w in CATEGORIES[other] if w not in CATEGORIES[kind]], rng.randint(1, 2))
    words = rng.sample(members + strangers, len(members) + len(strangers))
    found, count = ", ".join(w for w in words if w in members), NUMBERS[len(members)]
    return single(rng, q.MEMBER_PHRASES, ", ".join(words), found, count=count, many=CATEGORY_PLURALS[kind])


def bullets_row(rng: Random) -> Row:
    words = pick_words(rng, rng.randint(2, 5))
    return single(rng, q.BULLET_PHRASES, ", ".join(words), "\n".join(f"- {word}" for word in words))


def sort_row(rng: Random) -> Row:
    words = pick_words(rng, rng.randint(2, 4))
    return single(rng, q.SORT_PHRASES, ", ".join(words), ", ".join(sorted(words)))


def count_row(rng: Random) -> Row:
    words = pick_words(rng, rng.randint(2, 6))
    return single(rng, q.COUNT_PHRASES, ", ".join(words), str(len(words)))


def summary_row(rng: Random) -> Row:
    scene = draw(make_story, rng)
    return single(rng, q.SUMMARY_PHRASES, scene.text, str(scene.fields["summary"]))


def memory_row(rng: Random) -> Row:
    """What the user said earlier: a name, a favourite colour, or what the talk is about."""
    return rng.choice((_name_talk, _favourite_talk, _follow_up_talk))(rng)


def _name_talk(rng: Random) -> Row:
    a = pick_person(rng, invented=0.1)[0]
    between = ask_fact(rng.choice(COUNTRY_FACTS + OPPOSITE_FACTS), rng) if rng.random() < 0.6 else ()
    greeting, question = rng.choice(q.GREETINGS), rng.choice(q.NAME_QUESTIONS)
    return chat(greeting.format(a=a), q.GREETING_REPLY.format(a=a), *between, question, f"Your name is {a}.")


def _favourite_talk(rng: Random) -> Row:
    colour = rng.choice(COLOURS)
    between = ask_fact(rng.choice(ANIMAL_FACTS + JOB_FACTS), rng) if rng.random() < 0.6 else ()
    said, question = rng.choice(q.FAVOURITE_STATEMENTS).format(v=colour), rng.choice(q.FAVOURITE_QUESTIONS)
    return chat(
        said,
        f"{capitalise(colour)} is a nice colour.",
        *between,
        question,
        f"Your favourite colour is {colour}.",
    )


def _follow_up_talk(rng: Random) -> Row:
    facts = rng.choice([facts for facts in ENTITY_FACTS if facts[0].relation == "capital"])
    first, second = rng.sample(facts, 2)
    follow_up = rng.choice(q.FOLLOW_UPS).format(relation=second.relation)
    return chat(*ask_fact(first, rng), follow_up, state(second, SENTENCES[second.relation][0]))


def system_row(rng: Random) -> Row:
    """A system prompt that sets the form of the answer."""
    fact = rng.choice(COUNTRY_FACTS + ANIMAL_FACTS + OPPOSITE_FACTS + FORM_FACTS)
    question, answer = ask_fact(fact, rng)
    opening, name = rng.choice(OPENINGS), pick_person(rng, invented=0.2)[0]
    persona = chat(
        rng.choice(q.PERSONA_QUESTIONS), f"I am {name}.", system=rng.choice(q.PERSONA_SYSTEMS).format(a=name)
    )
    opened = rng.choice(q.OPENING_SYSTEMS).format(opening=opening)
    rows = (
        persona,
        chat(question, f"{opening} {answer}", system=opened),
        chat(question, answer.upper(), system=rng.choice(q.CAPITALS_SYSTEMS)),
        chat(question, json.dumps({"answer": fact.value}), system=rng.choice(q.JSON_SYSTEMS)),
    )
    return rng.choice(rows)


TASKS: dict[str, Callable[[Random], Row]] = {
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


def prompt_of(row: Row) -> str:
    """All that comes before the last answer, in a form that only equal prompts share."""
    messages = row.get("messages")
    return json.dumps(messages[:-1] if isinstance(messages, list) else [row["instruction"], row.get("input")])


def make_rows(rows_per_task: int, seed: int) -> list[Row]:
    """Draw rows task by task, no prompt twice, then mix the tasks."""
    rows: list[Row] = []
    prompts: set[str] = set()
    for task, make in TASKS.items():
        rng = Random(f"sample/{seed}/{task}")
        made = 0
        while made < rows_per_task:
            row = make(rng)
            if prompt_of(row) not in prompts:
                prompts.add(prompt_of(row))
                rows.append({"task": task, **row})
                made += 1
    Random(seed).shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "sample.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--rows-per-task", type=int, default=80, help="rows of each task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = make_rows(args.rows_per_task, args.seed)
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.out}: {len(rows)} rows, {len(TASKS)} tasks")


if __name__ == "__main__":
    main()
